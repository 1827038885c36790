"""How many decode steps to plan at once: as few as keep the device busy."""

from __future__ import annotations

import statistics

NUMBERS = 1, 4, 8
"""Of steps planned at once. Of few sequences, four are one call of a compiled program (`buckets.NUM_REPEATS`)."""
MAX_SECONDS = 0.04
"""What is planned at once takes no longer than this, but in trials: its tokens come together, and new requests wait."""
UNNOTICED_SECONDS = 0.01
"""More than one step is planned wherever they take no longer than this together: a host that is held up for as long
holds up no device, and has more time for others."""
NUM_SAMPLES = 5
"""Plans that are timed before numbers are compared, with their median."""
NUM_QUIET = 50
"""Plans between trials."""
GAIN = 0.03
"""Share of a step's time that a trial must save to be kept."""


class StepPacer:
    """Finds the number by trying.

    Planning a step, launching it and taking in its tokens costs the host a millisecond, and some microseconds a
    sequence, while the device runs the step before. Where that takes longer than the device needs, planning several
    decode steps at once shares the cost out among them. Whether it does cannot be told from how long the host waits,
    since a launch goes on in other threads; so now and then more are tried, and kept if a step takes less time then.
    Fewer are tried too, and kept unless a step takes longer. A host that waits most of the time tries more only where
    steps are so short that nobody notices, and once at the start: the first call of a program that runs several steps
    takes a GPU up to 70 ms, which is better early than later.

    Attributes:
        num_steps: To plan next.
    """

    def __init__(self, fixed: int | None):
        """Starts with one step.

        Args:
            fixed: The number, if it is not to be found out.
        """
        self.num_steps = fixed or 1
        self._is_fixed = fixed is not None
        self._kept = self.num_steps  # what a trial is compared with
        self._kept_seconds = 0.0  # of a step
        self._samples: list[tuple[float, float]] = []
        self._num_quiet = 0
        self._tries_fewer = False
        self._has_tried_more = False

    def observe(self, num_steps: int, seconds: float, waited: float) -> None:
        """Takes in that decode steps planned at once are done, after others of as many sequences or a few more.

        Args:
            num_steps: How many.
            seconds: From when the ones before were done to when these were.
            waited: How many of them the host waited for the device.
        """
        if self._is_fixed or num_steps != self.num_steps:  # planned before the number was changed
            return
        if self._num_quiet:
            self._num_quiet -= 1
            return
        self._samples.append((seconds / num_steps, waited / seconds))
        if len(self._samples) <= NUM_SAMPLES:  # the first follows steps that were planned otherwise
            return
        step_seconds = statistics.median(step for step, _ in self._samples[1:])
        waited_share = statistics.median(share for _, share in self._samples[1:])
        self._samples = []
        if self.num_steps == self._kept:
            self._try(step_seconds, waited_share)
        else:
            self._judge(step_seconds)

    def _try(self, step_seconds: float, waited_share: float) -> None:
        """Another number, compared with the time that a step takes now."""
        self._kept_seconds = step_seconds
        seconds = self.num_steps * step_seconds
        fewer = max((n for n in NUMBERS if n < self.num_steps), default=0)
        more = min((n for n in NUMBERS if n > self.num_steps), default=0)
        is_first = not self._has_tried_more and more * step_seconds <= MAX_SECONDS
        if not fewer and more * step_seconds <= UNNOTICED_SECONDS:
            self.num_steps = more
        elif fewer and seconds > UNNOTICED_SECONDS and (self._tries_fewer or waited_share > 0.5):
            self.num_steps = fewer
        elif more and (waited_share < 0.5 or is_first) and seconds <= MAX_SECONDS:
            self.num_steps = more
        else:
            self._num_quiet = NUM_QUIET
        self._has_tried_more |= self.num_steps > self._kept
        self._tries_fewer = not self._tries_fewer

    def _judge(self, step_seconds: float) -> None:
        """Keeps the number tried, or goes back."""
        change, seconds = step_seconds / self._kept_seconds - 1, self.num_steps * step_seconds
        if self.num_steps < self._kept:
            is_better = change < GAIN or self._kept * self._kept_seconds > MAX_SECONDS
        elif self._kept == 1 and seconds <= UNNOTICED_SECONDS:
            is_better = change < GAIN
        else:
            is_better = change < -GAIN and seconds <= MAX_SECONDS
        if is_better:
            self._kept = self.num_steps
            self._tries_fewer = False
        else:
            self.num_steps = self._kept
            self._num_quiet = NUM_QUIET

"""How many steps are planned at once, given how long a simulated host and device take."""

import random

from jaxengine.engine.pacing import MAX_SECONDS, NUMBERS, UNNOTICED_SECONDS, StepPacer


def run(
    pacer: StepPacer, *, device: float, planning: float, launch: float, launches_wait: bool = False, calls: int = 500
) -> list[int]:
    """The numbers that come of a device that needs so many seconds a step, and a host that needs so many.

    With `launches_wait`, launching goes on in another thread while the host waits.
    """
    rng, planned, seen = random.Random(0), [pacer.num_steps] * 2, []
    for _ in range(calls):
        num_steps = planned.pop(0)
        busy = planning + num_steps * launch
        seconds = max(busy, num_steps * device) * rng.uniform(1, 1.02)
        waited = max(0.0, seconds - busy) + launches_wait * num_steps * launch
        pacer.observe(num_steps, seconds, waited)
        planned.append(pacer.num_steps)
        seen.append(pacer.num_steps)
    return seen


def most_used(seen: list[int]) -> int:
    return max(set(seen), key=seen.count)


def test_a_slow_device_gets_one_step_at_a_time():
    """More are tried once, early on, if they take no longer than they may."""
    seen = run(StepPacer(None), device=0.007, planning=0.002, launch=0.001)
    assert set(seen[:15]) == {1, 4}
    assert set(seen[20:]) == {1}
    assert set(run(StepPacer(None), device=0.015, planning=0.002, launch=0.001)) == {1}


def test_a_slow_host_plans_as_many_as_keep_the_device_busy():
    seen = run(StepPacer(None), device=0.003, planning=0.0035, launch=0.001)
    assert seen[0] == 1
    assert most_used(seen[20:]) == 4


def test_launches_in_other_threads_do_not_hide_it():
    seen = run(StepPacer(None), device=0.003, planning=0.008, launch=0.001, launches_wait=True)
    assert most_used(seen[40:]) == 4


def test_bounds():
    assert max(run(StepPacer(None), device=0.0001, planning=0.004, launch=0.001)) == NUMBERS[-1]
    for planning in (0.02, 0.03, 0.1):
        steps = most_used(run(StepPacer(None), device=0.015, planning=planning, launch=0.001)[50:])
        assert steps == 1 or steps * 0.015 <= MAX_SECONDS


def test_goes_back_when_the_device_needs_longer():
    pacer = StepPacer(None)
    assert most_used(run(pacer, device=0.001, planning=0.004, launch=0.0005)[-100:]) > 1
    assert most_used(run(pacer, device=0.02, planning=0.004, launch=0.0005)[-100:]) == 1


def test_goes_back_when_fewer_do_as_well():
    pacer = StepPacer(None)
    assert most_used(run(pacer, device=0.003, planning=0.02, launch=0.001)[-100:]) == 8
    assert most_used(run(pacer, device=0.003, planning=0.0035, launch=0.001, calls=1000)[-300:]) == 4


def test_several_short_steps_are_planned_where_it_costs_nothing():
    """So that a host that is held up has time, even if it waits for the device otherwise."""
    for planning in (0.001, 0.0001):
        seen = run(StepPacer(None), device=0.002, planning=planning, launch=0.0005)
        assert set(seen[20:]) == {4}
        seen = run(StepPacer(None), device=UNNOTICED_SECONDS / 3, planning=planning, launch=0.0005)
        assert most_used(seen[20:]) == 1


def test_a_given_number_stays():
    assert set(run(StepPacer(4), device=0.02, planning=0.004, launch=0.0005)) == {4}

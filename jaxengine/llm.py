"""`LLM`: offline inference, with vLLM's interface."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from jaxengine.engine.beam_search import BeamSearchOutput, beam_search
from jaxengine.engine.chat import normalize_conversations, render_chat
from jaxengine.engine.inputs import Prompt, PromptInput
from jaxengine.engine.llm_engine import LLMEngine
from jaxengine.engine_args import EngineArgs
from jaxengine.metrics import Metric
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)


class LLM:
    """A model, ready to generate.

    Usable as a context manager; `shutdown()` frees the device.

    Attributes:
        llm_engine: The engine, for callers that want to add requests and step themselves.
    """

    def __init__(self, model: str | None = None, **engine_args: Any):
        """Loads a model.

        Args:
            model: A folder in Hugging Face's form, a GGUF file, or a hub id; None for the embedded
                SmolLM2-135M-Instruct.
            **engine_args: Fields of `EngineArgs`.

        Raises:
            TypeError: An argument that `EngineArgs` does not have.
            ValueError: A wrong value, or a model that cannot be loaded.
        """
        self.llm_engine = LLMEngine(EngineArgs(model=model, **engine_args))

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts.

        Ctrl-C ends the call early: finished outputs are kept, the others carry what they had and finish reason "abort".

        Args:
            prompts: A text, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`, or a list of these.
            sampling_params: For all prompts, or one each; None takes the model's defaults.
            use_tqdm: Show a progress bar with tokens/s in and out; or a function that makes the bar.
            priority: For all prompts, or one each; lower runs first under the "priority" policy.

        Returns:
            One output per prompt, in their order.

        Raises:
            ValueError: Any prompt or parameter is wrong; then nothing has run.
        """
        engine = self.llm_engine
        processed = engine.input_processor.process_batch(
            prompts,
            sampling_params,
            request_ids=lambda _: engine.next_request_id(),
            priority=priority,
            arrival_time=time.time(),
        )
        for item in processed:
            for child in item.children:
                child.sampling_params.output_kind = RequestOutputKind.FINAL_ONLY
            item.params.output_kind = RequestOutputKind.FINAL_ONLY
        added: list[str] = []
        try:
            for item in processed:
                engine.add_processed(item)
                added.append(item.request_id)
        except BaseException:
            engine.abort_request(added)
            raise
        return self._run(added, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many.

        Args:
            messages: A list of `{"role": ..., "content": ...}`, or a list of such lists.
            sampling_params: For all conversations, or one each; None takes the model's defaults.
            use_tqdm: See `generate`.
            chat_template: A Jinja template instead of the model's own.
            add_generation_prompt: End with the beginning of the assistant's answer.
            continue_final_message: Go on with the last message instead of answering it.
            tools: Functions the model may call, as JSON schemas.
            chat_template_kwargs: More variables for the template.

        Raises:
            ValueError: No chat template, messages of a wrong form, or as in `generate`.
        """
        prompts = [
            Prompt(
                text=render_chat(
                    self.get_tokenizer(),
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                ),
                add_special_tokens=False,
            )
            for conversation in normalize_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: PromptInput | Sequence[PromptInput], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Finds the `beam_width` most likely continuations of each prompt; shared prefixes are computed once.

        Raises:
            ValueError: A prompt is wrong, or `2 * beam_width` is more than the engine's `max_logprobs`.
        """
        generate = functools.partial(self.generate, use_tqdm=False)
        return beam_search(self.llm_engine, generate, prompts, params)

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: The engine was made with `skip_tokenizer_init`.
        """
        if self.llm_engine.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: there is no tokenizer")
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without `sampling_params`."""
        return self.llm_engine.default_sampling_params()

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of the engine."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False (and no change) while requests hold pages."""
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Frees device memory; level 1 keeps the weights on the host, level 2 loads them anew on `wake_up`."""
        self.llm_engine.sleep(level)

    def wake_up(self) -> None:
        """Takes the device memory back after `sleep`."""
        self.llm_engine.wake_up()

    def update_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Puts new weights in place of some or all, as from a trainer. Nothing is compiled again.

        All names, shapes and dtypes are checked before anything changes. Arrays on the engine's devices are put where
        they belong without a copy through the host, and stay the caller's. Cached prefixes are forgotten.

        Args:
            weights: Pairs of a tensor's name in the checkpoint ("model.layers.0.self_attn.q_proj.weight") and an array
                of NumPy or JAX with its shape there. Those that are not named stay as they are. Numbers are converted
                to the dtype that the engine holds. `jaxengine.loading.loader.named_weights` gives those of a model
                that is being trained.

        Raises:
            ValueError: A name is not part of the model or comes twice, or a shape or dtype is wrong; then nothing has
                changed.
            RuntimeError: Requests are running, or the engine sleeps.
        """
        self.llm_engine.update_weights(weights)

    def wait_until_warm(self) -> None:
        """Waits until every step shape is compiled: from then on nothing is compiled any more."""
        self.llm_engine.wait_until_warm()

    def shutdown(self) -> None:
        """Ends everything and frees the device. Can be called again."""
        self.llm_engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(self, request_ids: list[str], use_tqdm: bool | Callable[..., tqdm]) -> list[RequestOutput]:
        """Steps until all requests have finished."""
        done: dict[str, RequestOutput] = {}
        progress = _Progress(len(request_ids), use_tqdm)
        try:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    if output.finished:
                        done[output.request_id] = output
                        progress.add(output)
        except KeyboardInterrupt:
            logger.warning("interrupted: %d of %d requests had finished", len(done), len(request_ids))
            for output in self.llm_engine.abort_request(self.llm_engine.unfinished_request_ids):
                done[output.request_id] = output
            self.llm_engine.core.drain()
        except BaseException:
            self.llm_engine.abort_request(self.llm_engine.unfinished_request_ids)
            raise
        finally:
            progress.close()
        return [done[request_id] for request_id in request_ids]


class _Progress:
    """A progress bar over requests, with tokens/s in and out."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., tqdm]):
        self._bar = None
        if use_tqdm:
            make = use_tqdm if callable(use_tqdm) else tqdm
            self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True)
        self._start = time.perf_counter()
        self._num_in = self._num_out = 0

    def add(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._num_in += len(output.prompt_token_ids or ())
        self._num_out += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(
            f"in: {self._num_in / seconds:.1f} tokens/s, out: {self._num_out / seconds:.1f} tokens/s", refresh=False
        )
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

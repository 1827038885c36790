"""The half of an engine that knows text: checks and tokenises prompts, makes outputs of sampled tokens.

It never touches a device, and knows the other half, the core, by two methods: the core may live in another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from jaxengine.config import ModelLimits
from jaxengine.engine.inputs import InputProcessor, ProcessedInput
from jaxengine.engine.output_processor import OutputProcessor, SampledUpdate
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.resolve import resolve_model
from jaxengine.metrics import RequestStats
from jaxengine.outputs import RequestOutput
from jaxengine.request import Request, RequestSpec, RequestStatus
from jaxengine.sampling_params import SamplingParams
from jaxengine.structured.grammar import tokenizer_setup
from jaxengine.workers.grammars import GrammarChecker
from jaxengine.workers.pool import WorkerPool


class Core(Protocol):
    """What runs requests: an `EngineCore`, or a client of one in another process."""

    def add_requests(self, spec: RequestSpec, requests: Sequence[Request]) -> None:
        """Queues a request's completions, as the front knows them; raises ValueError if one cannot run."""
        ...

    def finish_request(
        self, request_id: str, status: RequestStatus, stop_reason: int | str | None = None
    ) -> Request | None:
        """Ends a request from outside; no change, and None, if it is unknown or finished."""
        ...


class EngineFront:
    """Requests of callers, their texts and their ends.

    Attributes:
        tokenizer: None with `skip_tokenizer_init`.
        input_processor: Makes requests of prompts.
        default_params: Parameters of requests that bring none.
        stats: Times and ends of requests.
        workers: Processes that look at what could do harm here.
        grammars: Forms of outputs, looked at by them.
    """

    def __init__(
        self,
        core: Core,
        args: EngineArgs,
        checkpoint: Checkpoint,
        tokenizer: Any,
        limits: ModelLimits,
    ):
        self._core = core
        self.tokenizer = tokenizer
        ends = eos_token_ids(checkpoint)
        self.workers = WorkerPool(lambda: _worker_setup(tokenizer, limits.vocab_size, ends))
        self.grammars = GrammarChecker(self.workers)
        self.default_params = default_sampling_params(args, checkpoint)
        self.input_processor = InputProcessor(
            tokenizer,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            max_logprobs=limits.max_logprobs,
            eos_token_ids=ends,
            default_params=self.default_params,
            grammars=self.grammars,
        )
        self.stats = RequestStats()
        self._outputs = OutputProcessor(tokenizer, stats=self.stats)

    @property
    def request_ids(self) -> list[str]:
        """Ids of the callers' unfinished requests, oldest first."""
        return self._outputs.request_ids

    def parent_id(self, child_id: str) -> str | None:
        """The caller's id of the request that an unfinished completion belongs to."""
        return self._outputs.parent_id(child_id)

    def add(self, processed: ProcessedInput) -> None:
        """Queues what `input_processor` made.

        Raises:
            ValueError: The id is in use, or the core refuses the request; nothing has been queued then.
        """
        self._outputs.add(
            processed.request_id,
            processed.prompt_text,
            processed.prompt_token_ids,
            processed.children,
            processed.params,
        )
        try:
            self._core.add_requests(processed.spec, processed.children)
        except BaseException:
            self.abort([processed.request_id])
            raise

    def take(self, updates: Iterable[SampledUpdate]) -> list[RequestOutput]:
        """Makes outputs of what a step gave, and ends in the core what a stop string has ended."""
        outputs, stopped = self._outputs.process(updates)
        for child_id, stop_string in stopped:
            status = RequestStatus.FINISHED_ERROR if stop_string is None else RequestStatus.FINISHED_STOPPED
            self._core.finish_request(child_id, status, stop_string)
        return outputs

    def abort(self, request_ids: Sequence[str]) -> list[RequestOutput]:
        """Ends requests at once and gives back what they had, with finish reason "abort". Unknown ids are ignored."""
        outputs = []
        for request_id in request_ids:
            for child_id in self._outputs.child_ids(request_id):
                self._core.finish_request(child_id, RequestStatus.FINISHED_ABORTED)
            output = self._outputs.abort(request_id)
            outputs += [] if output is None else [output]
        return outputs


def _worker_setup(tokenizer: Any, vocab_size: int, eos_token_ids: list[int]) -> dict[str, Any]:
    """What workers need to know of the model: see `Jobs`."""
    try:
        return {"tokens": tokenizer_setup(tokenizer, vocab_size, eos_token_ids)}
    except ValueError as error:
        return {"no_tokens": str(error)}


def load_tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer, or the one that the arguments name: a GGUF file, a folder or a hub id.

    Returns:
        The tokenizer; None with `skip_tokenizer_init`.

    Raises:
        ValueError: There is none.
    """
    if args.skip_tokenizer_init:
        return None
    name = args.tokenizer
    if name is None:
        return checkpoint.tokenizer()
    if name.endswith(".gguf"):
        return resolve_model(name).tokenizer()
    from jaxengine.loading.safetensors_checkpoint import open_tokenizer

    try:
        return open_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"tokenizer={name!r} cannot be loaded: {error}") from error


def default_sampling_params(args: EngineArgs, checkpoint: Checkpoint) -> SamplingParams:
    """The model's own defaults (`generation_config.json`), unless `generation_config` says otherwise."""
    if args.generation_config != "auto":
        return SamplingParams()
    given = checkpoint.generation_config
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        return SamplingParams(**{name: given[name] for name in names if given.get(name) is not None})
    except ValueError as error:
        raise ValueError(f"the generation_config.json of {checkpoint.path}: {error}") from error


def eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """All tokens that end an output, from `generation_config.json` and `config.json`."""
    found: set[int] = set()
    for source in (checkpoint.generation_config, checkpoint.config):
        ids = source.get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)

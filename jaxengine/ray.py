"""Replicas of an engine as Ray actors, and batch inference as a stage of Ray Data; needs the extra `ray`.

Ray places the actors. Each holds a whole engine, with all devices of its tensor-parallel group, on one host.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

try:
    ray: Any = importlib.import_module("ray")  # type checkers would take this very file for it
except ImportError as error:
    raise ImportError('jaxengine.ray needs Ray: pip install "jaxengine[ray]"') from error
from ray.exceptions import GetTimeoutError, RayError, RayTaskError  # pyright: ignore[reportMissingImports]

from jaxengine.engine.calls import EngineStateError, SyncCalls
from jaxengine.engine.weight_transfer import pieces
from jaxengine.engine_args import EngineArgs
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ray.data import Dataset  # pyright: ignore[reportMissingImports]

PLACING_SECONDS = 120
"""How long a replica may wait for its devices and its process."""
Row = dict[str, Any]


class RayReplicas(SyncCalls):
    """Engines with the same model, each in an actor of its own; every call shares its prompts out to them.

    The calls of `SyncCalls` (`sleep`, `pause_generation`, ...) go to all of them, once they have done what they were
    asked before. An error tells the replica that has raised it; the others have done what was asked.

    Usable as a context manager.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        num_replicas: int = 1,
        resources: Mapping[str, float] | None = None,
        **engine_args: Any,
    ):
        """Starts the actors and waits until their engines are ready. Without `ray.init()` before, Ray starts here.

        Args:
            model: As for `LLM`; every node must find it.
            num_replicas: Actors.
            resources: What Ray gives each, such as {"GPU": 2}; by default as many of the cluster's GPUs or TPU chips as
                the engine has devices, or one CPU.
            **engine_args: Fields of `EngineArgs`.

        Raises:
            ValueError: A wrong argument, or there is no room for so many replicas.
            RuntimeError: A replica died.
        """
        self._actors: list[Any] = []
        self._has_started_ray = not ray.is_initialized()
        args = _checked(model, engine_args)
        if self._has_started_ray:
            ray.init()
        try:
            options = _actor_options(args, "num_replicas", num_replicas, resources)
            self._actors = [ray.remote(_Engine).options(**options).remote() for _ in range(num_replicas)]
            try:
                ray.get([actor.is_there.remote() for actor in self._actors], timeout=PLACING_SECONDS)
            except GetTimeoutError as error:
                reason = f"not all have started in {PLACING_SECONDS} s; others may hold their {options}"
                raise ValueError(f"num_replicas={num_replicas}: {reason}") from error
            self._gather([actor.load.remote(model, engine_args) for actor in self._actors])
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self, prompts: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Does as `LLM.generate`, for a list of prompts.

        Raises:
            ValueError: A prompt or parameter is wrong.
            RuntimeError: A replica has died; the others have been ended.
        """
        return self._share_out("generate", prompts, sampling_params)

    def chat(self, messages: Sequence[Sequence[Mapping[str, Any]]], sampling_params: Any = None, **options: Any):
        """Does as `LLM.chat`, for a list of conversations; parameters and errors as in `generate`."""
        return self._share_out("chat", messages, sampling_params, **options)

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Makes a call of `SyncCalls` on all replicas, and waits for all; see there.

        Raises:
            RuntimeError: A replica has died; the others have been ended.
        """
        return self._call_all("call", method, list(args), dict(kwargs or {}))

    def update_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """As `LLM.update_weights`, on all replicas, which read the arrays from Ray's memory; errors as in `sleep`."""
        self._call_all("update_weights", ray.put([pair for piece in pieces(weights) for pair in piece]))

    def shutdown(self) -> None:
        """Ends the actors, and Ray if it was started here. Can be called again."""
        while self._actors:
            ray.kill(self._actors.pop())
        if self._has_started_ray:
            ray.shutdown()

    def __enter__(self) -> RayReplicas:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _share_out(self, method: str, items: Sequence[Any], params: Any, **options: Any) -> list[RequestOutput]:
        if not self._actors:
            raise RuntimeError("the replicas have been shut down")
        if isinstance(items, str | Mapping) or any(isinstance(item, int) for item in items[:1]):
            raise ValueError("prompts must be a list of prompts, not a single one")
        has_own = isinstance(params, Sequence)
        if has_own and len(params) != len(items):
            raise ValueError(f"{len(params)} sampling_params for {len(items)} prompts")
        count = len(self._actors)  # every replica takes every `count`-th: neighbours are often alike
        parts = [
            actor.run.remote(method, list(items[i::count]), list(params[i::count]) if has_own else params, options)
            for i, actor in enumerate(self._actors[: len(items)])
        ]
        outputs: list[Any] = [None] * len(items)
        for i, part in enumerate(self._gather(parts)):
            outputs[i::count] = part
        return outputs

    def _call_all(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of all actors; the first error that one of them raises is raised when all have ended."""
        if not self._actors:
            raise RuntimeError("the replicas have been shut down")
        count, results, first = len(self._actors), [], None
        refs = [getattr(actor, name).remote(*args) for actor in self._actors]
        for replica, ref in enumerate(refs):
            try:
                results.append(ray.get(ref))
            except RayTaskError as error:
                kind = next(
                    (kind for kind in (ValueError, EngineStateError) if isinstance(error.cause, kind)), RuntimeError
                )
                first = first or kind(f"replica {replica} of {count}: {error.cause}")
            except RayError as error:
                self.shutdown()
                raise RuntimeError(f"replica {replica} of {count} has died: {error}") from error
        if first is not None:
            raise first
        return results

    def _gather(self, refs: list[Any]) -> list[Any]:
        """Returns the results of all replicas, or the first error as soon as there is one."""
        waiting, results = {ref: i for i, ref in enumerate(refs)}, [None] * len(refs)
        while waiting:
            (ref,), _ = ray.wait(list(waiting), num_returns=1)
            replica = waiting.pop(ref)
            try:
                results[replica] = ray.get(ref)
            except RayTaskError as error:  # raised by the engine
                raise error.cause from error
            except RayError as error:
                count = len(self._actors)
                self.shutdown()
                raise RuntimeError(f"replica {replica} of {count} has died: {error}") from error
        return results


def build_llm_processor(
    model: str | None = None,
    *,
    concurrency: int = 1,
    batch_size: int = 64,
    resources: Mapping[str, float] | None = None,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    **engine_args: Any,
) -> Callable[[Dataset], Dataset]:
    """Makes a stage of Ray Data that answers every row of a dataset.

    A row has "messages" (a conversation), "prompt" or "prompt_token_ids", and may have "sampling_params", a dict of
    their fields. It gets "generated_text", "generated_tokens", "num_input_tokens", "num_generated_tokens" and
    "finish_reason". What fails, a row or an engine, fails the dataset's execution.

    Args:
        model, resources, **engine_args: As for `RayReplicas`.
        concurrency: Engines, each in an actor of its own.
        batch_size: Rows that an engine is given at once; it runs no more together.
        preprocess: Makes such a row of one of the dataset's.
        postprocess: Makes what comes out of a row with its answer.

    Raises:
        ValueError: A wrong argument; when a dataset is given, too, that there is no room for so many engines.
    """
    args = _checked(model, engine_args)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")

    def process(dataset: Dataset) -> Dataset:
        if not ray.is_initialized():
            ray.init()
        given = {"model": model, "engine_args": engine_args}
        answered = (dataset if preprocess is None else dataset.map(preprocess)).map_batches(
            _Stage,
            fn_constructor_kwargs=given,
            batch_format="pandas",
            batch_size=batch_size,
            concurrency=concurrency,
            **_actor_options(args, "concurrency", concurrency, resources),
        )
        return answered if postprocess is None else answered.map(postprocess)

    return process


class _Engine:
    """What runs in an actor."""

    def is_there(self) -> bool:
        return True

    def load(self, model: str | None, engine_args: dict[str, Any]) -> None:
        from jaxengine.llm import LLM

        self._llm = LLM(model, **engine_args)

    def run(self, method: str, items: list[Any], params: Any, options: dict[str, Any]) -> list[RequestOutput]:
        methods: dict[str, Callable[..., list[RequestOutput]]] = {
            "generate": self._llm.generate,
            "chat": self._llm.chat,
        }
        return methods[method](items, params, use_tqdm=False, **options)

    def call(self, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return self._llm.collective_rpc(method, args, kwargs)[0]

    def update_weights(self, weights: list[tuple[str, Any]]) -> None:
        self._llm.update_weights(weights)


class _Stage:
    """What Ray Data calls with batches of rows."""

    def __init__(self, model: str | None, engine_args: dict[str, Any]):
        self._engine = _Engine()
        self._engine.load(model, engine_args)

    def __call__(self, batch: Any) -> Any:  # pandas.DataFrame
        column = next((name for name in ("messages", "prompt", "prompt_token_ids") if name in batch), None)
        if column is None:
            raise ValueError(f'rows need "messages", "prompt" or "prompt_token_ids"; they have {list(batch)}')
        params = None
        if "sampling_params" in batch:
            params = [SamplingParams(**(_plain(fields) or {})) for fields in batch["sampling_params"]]
        prompts = [_plain(value) for value in batch[column]]
        outputs = self._engine.run("chat" if column == "messages" else "generate", prompts, params, {})
        answers = [output.outputs[0] for output in outputs]
        return batch.assign(
            generated_text=[answer.text for answer in answers],
            generated_tokens=[list(answer.token_ids) for answer in answers],
            num_input_tokens=[len(output.prompt_token_ids or ()) for output in outputs],
            num_generated_tokens=[len(answer.token_ids) for answer in answers],
            finish_reason=[answer.finish_reason for answer in answers],
        )


def _plain(value: Any) -> Any:
    """Returns a row as it was before Arrow changed it.

    It has lists for arrays, and no fields that only other rows have.
    """
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _checked(model: str | None, engine_args: Mapping[str, Any]) -> EngineArgs:
    """Returns the arguments, before anything starts."""
    args = EngineArgs(model=model, **engine_args)
    if args.distributed_executor_backend is not None:
        raise ValueError("distributed_executor_backend: a replica is one process, which Ray starts")
    return args


def _actor_options(args: EngineArgs, name: str, count: int, resources: Mapping[str, float] | None) -> dict[str, Any]:
    """Returns what Ray is asked for, for each of `count` actors.

    Raises:
        ValueError: The cluster's nodes have no room for them, however long one waits.
    """
    if count < 1:
        raise ValueError(f"{name}={count}: must be at least 1")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = next((kind for kind in ("GPU", "TPU") if any(kind in node for node in nodes)), None)
    size = args.tensor_parallel_size * args.data_parallel_size
    needed = dict(resources or ({"CPU": 1} if device is None else {device: size}))
    room = sum(min(math.floor(node.get(kind, 0) / amount) for kind, amount in needed.items()) for node in nodes)
    if room < count:
        raise ValueError(f"{name}={count} with {needed} each: this Ray cluster has room for {room}")
    options = {"num_cpus": needed.pop("CPU", 0), "num_gpus": needed.pop("GPU", 0)}
    # An engine that has died would most likely die again, and Ray Data would try for ever.
    return options | {"resources": needed, "max_restarts": 0, "max_task_retries": 0}

"""From arguments and a checkpoint to an `EngineCore` that can run a first step."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.config import EngineConfig
from jaxengine.engine.controls import Controls
from jaxengine.engine.core import EngineCore
from jaxengine.engine.front import eos_token_ids
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.structured.grammar import GrammarCompiler

if TYPE_CHECKING:
    from jax.sharding import Mesh

logger = logging.getLogger(__name__)


def build_core(args: EngineArgs, checkpoint: Checkpoint, get_tokenizer: Callable[[], Any]) -> EngineCore:
    """Loads the weights and starts compiling; returns when a first step can run.

    Args:
        args: Which model, and how.
        checkpoint: The model.
        get_tokenizer: Gives its tokenizer, or None; called when a grammar first needs it.

    Raises:
        ValueError: A value that the model or the memory does not allow, or weights that do not fit the model.
    """
    from jaxengine.runner.memory import device_bytes_in_use, reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    set_up_compilation_cache(args.compilation_cache_dir)
    from jaxengine.models.abstract import abstract_model
    from jaxengine.runner.model_runner import ModelRunner
    from jaxengine.runner.step_programs import StepPrograms
    from jaxengine.scheduler.shards import make_scheduler
    from jaxengine.sharding.mesh import make_mesh

    config = args.resolve(checkpoint)
    num_shards, size = config.data_parallel_size, config.model.tensor_parallel_size
    mesh = make_mesh(num_shards, size) if num_shards * size > 1 else None
    bytes_in_use = device_bytes_in_use()
    with ThreadPoolExecutor(1) as pool:  # weights load while the first steps compile
        model = pool.submit(load_weights, args, checkpoint, config, mesh)
        abstract = abstract_model(config.model, config.dtype, config.weight_dtype)
        programs = StepPrograms(abstract, config, mesh, bytes_in_use)
        runner = ModelRunner(programs)
        try:
            runner.load(model.result(), calibration_tokens(config, get_tokenizer))
            if config.warmup == "full":
                programs.wait_until_warm()
            elif config.warmup != "none":
                programs.wait_until_ready()
        except BaseException:
            runner.close()
            raise
    grammars = GrammarCompiler(get_tokenizer, config.model.vocab_size, eos_token_ids(checkpoint))
    return EngineCore(make_scheduler(config, programs.num_pages), runner, grammars)


def make_controls(core: EngineCore, args: EngineArgs, checkpoint: Checkpoint) -> Controls:
    """Returns the calls of a core that `build_core` made of these arguments."""
    config, mesh = core.runner.config, core.runner.programs.context.place.mesh
    return Controls(core, lambda: load_weights(args, checkpoint, config, mesh), args.profiler_dir)


def load_weights(args: EngineArgs, checkpoint: Checkpoint, config: EngineConfig, mesh: Mesh | None) -> Any:
    """Returns the model with its weights, or with random ones for `load_format="dummy"`.

    Raises:
        ValueError: The checkpoint's tensors are not those of the model.
    """
    from jaxengine.loading.cache_scales import fill_cache_scales
    from jaxengine.loading.loader import init_dummy, load_model

    is_dummy = args.load_format == "dummy"
    if is_dummy:
        loaded = init_dummy(config.model, config.dtype, mesh, seed=args.seed, weight_dtype=config.weight_dtype)
    else:
        loaded = load_model(checkpoint, config.model, config.dtype, mesh, weight_dtype=config.weight_dtype)
    fill_cache_scales(loaded, None if is_dummy else checkpoint, config.kv_cache_dtype, mesh)
    checkpoint.release()
    return loaded


def calibration_tokens(config: EngineConfig, get_tokenizer: Callable[[], Any]) -> list[int]:
    """Tokens of a text on which the scales of the cache are measured; any tokens if there is no tokenizer."""
    from jaxengine.runner.cache_scales import NUM_TOKENS, TEXT

    if not config.model.cache_scales:
        return []
    tokenizer, vocab_size = get_tokenizer(), config.model.vocab_size
    known = [] if tokenizer is None else [token for token in tokenizer.encode(TEXT) if token < vocab_size]
    return known or [(7919 * i + 1) % vocab_size for i in range(NUM_TOKENS)]


def _why_not_trusted(folder: Path) -> str | None:
    """Makes a folder for this user alone, if it is not there; tells why others could put programs into one that is."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        places = [place for place in (folder, folder / "lowered") if place.exists()]
        about = [place.stat() for place in places]
    except OSError:  # no folder, no entries: whoever writes to it tells of it
        return None
    if not hasattr(os, "getuid"):
        return None
    for place, found in zip(places, about, strict=True):
        if found.st_uid not in (os.getuid(), 0):
            return f"{place} belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others can write to {place} (chmod go-w would mend it)"
    return None


def set_up_compilation_cache(folder: str | None) -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache folder unless told otherwise.

    A folder that JAX has been given already (its own setting, or `JAX_COMPILATION_CACHE_DIR`) is kept. One that others
    can write to is not used: what it holds is run.
    """
    import jax

    if folder == "":
        return
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "jaxengine" / "xla")
    if (reason := _why_not_trusted(Path(folder))) is not None:
        logger.warning("compilation_cache_dir=%r is not used: %s, and what it holds would be run", folder, reason)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if folder == jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

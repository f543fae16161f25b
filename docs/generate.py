"""Write the pages of docs/ that come from the code and from benchmark results.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import results_page
import serving_page
import speed_page
from transformers import TrainingArguments

from prefillshare_train.training.config import CacheConditionedConfig

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "prefillshare_train"
PAGE = DOCS / "training.md"
RESULTS = DOCS / "results.md"
SERVING = DOCS / "serving.md"
SPEED = DOCS / "speed.md"
SECTIONS = (
    ("Recipe", "training/recipe.py", "Recipe", ""),
    ("base", "training/recipe.py", "BaseConfig", "base."),
    ("decoder", "training/recipe.py", "DecoderConfig", "decoder."),
    ("data", "data/config.py", "DataConfig", "data."),
    ("data.train and data.eval", "data/config.py", "SourceConfig", "data.train."),
    ("training: what the method adds", "training/config.py", "CacheConditionedConfig", "training."),
)
# A recipe sets these at its top and refuses them under `training`.
TOP_LEVEL = frozenset({"training.method", "training.boundary"})


def documented_fields(path: Path, name: str) -> list[tuple[str, str, str | None, str]]:
    """(name, type, default, text) of each field of a dataclass, from its source.

    A default is None where the field is required, and empty where its own section gives it.
    """
    module = ast.parse(path.read_text())
    aliases = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Subscript)
    }
    body = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name).body
    fields = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if not is_text:
            raise SystemExit(f"{path}: {name}.{node.target.id} has no string below it")
        kind = node.annotation
        if isinstance(kind, ast.Name):
            kind = aliases.get(kind.id, kind)  # `Dtype` tells a reader less than its values
        text = " ".join(str(following.value.value).split())
        fields.append((node.target.id, ast.unparse(kind), _default(node.value), text))
    return fields


def _default(value: ast.expr | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, ast.Call):
        return ast.unparse(value)
    factory = next(k.value for k in value.keywords if k.arg == "default_factory")
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    return "{}" if ast.unparse(factory) == "dict" else ""


def _line(name: str, kind: str, default: str | None, text: str) -> str:
    if default is None:
        return f"- **`{name}`** (`{kind}`, required): {text}"
    return f"- **`{name}`** (`{kind}`{f', default `{default}`' if default else ''}): {text}"


def _inherited() -> list[str]:
    """Rows of a table: the arguments of transformers and their defaults."""
    rows = ["| key | default |", "|---|---|"]
    for field in sorted(dataclasses.fields(TrainingArguments), key=lambda f: f.name):
        if field.init:
            default: Any = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()  # type: ignore[misc]
            rows.append(f"| `training.{field.name}` | `{default!r}` |")
    return rows


def page() -> str:
    """The whole document."""
    parts = [(DOCS / "training.in.md").read_text().rstrip()]
    for title, file, name, prefix in SECTIONS:
        lines = [
            _line(prefix + field, kind, default, text)
            for field, kind, default, text in documented_fields(SOURCE / file, name)
            if prefix + field not in TOP_LEVEL
        ]
        parts += [f"## {title}", "\n".join(lines)]
    inherited = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    own = {f.name for f in dataclasses.fields(CacheConditionedConfig) if f.init} - inherited
    assert own, "the configuration adds nothing of its own"
    parts.append("## training: inherited from `transformers.TrainingArguments`")
    parts.append(
        "With the defaults of transformers, whose documentation says what each does. Of these, "
        "`training.output_dir` is required in a recipe, `training.label_smoothing_factor` must "
        "stay 0, `training.remove_unused_columns` and `training.logging_nan_inf_filter` are always "
        "false, and `training.resume_from_checkpoint` is not read: use `--resume`."
    )
    parts.append("\n".join(_inherited()))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    stale = []
    pages = {
        PAGE: page(),
        RESULTS: results_page.page(),
        SERVING: serving_page.page(),
        SPEED: speed_page.page(),
    }
    for place, text in pages.items():
        if place.is_file() and place.read_text() == text:
            continue
        stale.append(place)
        if not check:
            beside = place.with_suffix(".tmp")
            beside.write_text(text)
            beside.replace(place)
    for place in stale if check else []:
        print(f"{place} is out of date: run `make docs`")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/training.md from the dataclasses: `python docs/generate.py [--check]`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from pathlib import Path

from transformers import TrainingArguments

from prefillshare_train.training.config import CacheConditionedConfig

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "prefillshare_train"
PAGE = DOCS / "training.md"
SECTIONS = (
    ("Recipe", "training/recipe.py", "Recipe", ""),
    ("base", "training/recipe.py", "BaseConfig", "base."),
    ("decoder", "training/recipe.py", "DecoderConfig", "decoder."),
    ("data", "data/config.py", "DataConfig", "data."),
    ("data.train and data.eval", "data/config.py", "SourceConfig", "data.train."),
    ("training: what the method adds", "training/config.py", "CacheConditionedConfig", "training."),
)


def documented_fields(path: Path, name: str) -> list[tuple[str, str, str, str]]:
    """(name, type, default, text) of each field of a dataclass, from its source."""
    module = ast.parse(path.read_text())
    body = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name).body
    fields = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if not is_text:
            raise SystemExit(f"{path}: {name}.{node.target.id} has no string below it")
        default = "required" if node.value is None else ast.unparse(node.value)
        text = " ".join(str(following.value.value).split())
        fields.append((node.target.id, ast.unparse(node.annotation), default, text))
    return fields


def page() -> str:
    """The whole document."""
    parts = [(DOCS / "training.in.md").read_text().rstrip()]
    for title, file, name, prefix in SECTIONS:
        parts.append(f"## {title}")
        parts.extend(
            f"- **`{prefix}{field}`** (`{kind}`, default `{default}`): {text}"
            if default != "required"
            else f"- **`{prefix}{field}`** (`{kind}`, required): {text}"
            for field, kind, default, text in documented_fields(SOURCE / file, name)
        )
    inherited = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    own = {f.name for f in dataclasses.fields(CacheConditionedConfig) if f.init} - inherited
    assert own, "the configuration adds nothing of its own"
    parts.append("## training: inherited from `transformers.TrainingArguments`")
    parts.append(", ".join(f"`{name}`" for name in sorted(inherited)) + ".")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print(f"{PAGE} is out of date: run `make docs`")
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

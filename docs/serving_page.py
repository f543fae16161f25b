"""docs/serving.md: the hand-written part, every option, every metric, and what was measured."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from typer.models import OptionInfo

from prefillshare_train.cli.serve import serve
from prefillshare_train.serving.api import EngineStats
from prefillshare_train.serving.server.metrics import ServerMetrics

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "serve.md"


def _options() -> list[str]:
    lines = ["| option | default | |", "|---|---|---|"]
    hints = typing.get_type_hints(serve, include_extras=True)
    for name, parameter in inspect.signature(serve).parameters.items():
        option = next(o for o in typing.get_args(hints[name]) if isinstance(o, OptionInfo))
        default = parameter.default
        shown = "required" if default is inspect.Parameter.empty else f"`{default}`"
        if default is None:
            shown = ""
        lines.append(f"| `--{name.replace('_', '-')}` | {shown} | {option.help} |")
    return lines


def _metrics() -> list[str]:
    zero = {f.name: 0 for f in dataclasses.fields(EngineStats)} | {"finished": {}}
    metrics = ServerMetrics(("math",), lambda: EngineStats(**zero))
    lines = ["| metric | type | |", "|---|---|---|"]
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        if not family.name.endswith("_created"):
            name = family.name + "_total" * (family.type == "counter")
            lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return lines


def page() -> str:
    """The whole document."""
    parts = [(DOCS / "serving.in.md").read_text().rstrip()]
    parts += ["## Options of `prefillshare serve`", "\n".join(_options())]
    parts += ["## Metrics at `/metrics`", "\n".join(_metrics())]
    if RESULTS.is_file():
        measured = RESULTS.read_text().strip().replace("\n## ", "\n### ")
        measured = measured.replace("## ", "### ", 1) if measured.startswith("## ") else measured
        parts += ["## Measured: `make bench-serve`", measured]
    return "\n\n".join(parts) + "\n"

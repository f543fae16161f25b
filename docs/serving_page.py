"""docs/serving.md: the hand-written part, every option, every metric, and what was measured."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from typer.models import OptionInfo

from prefillshare_train.cli.serve import serve
from prefillshare_train.core.few_rows import MOST_ROWS
from prefillshare_train.serving.api import EngineStats
from prefillshare_train.serving.server.metrics import ServerMetrics

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "serve.md"
MEASURED = """## Measured

Of `make bench-serve`, which takes hours, these parts were run, on SmolLM2-135M with four LoRA
decoders of random weights where no other number is given; responses have fixed lengths. Lines of
machines that name no dtype are of bfloat16.

```sh
make bench-serve QUICK=1
python benchmarks/serve.py compare --workloads react,reflexion --regimes memory --repeats 1 \\
  --caps 8 --loads 0.9 --sessions 8 --warm-up 0
python benchmarks/serve.py compare --workloads react --regimes memory --context-tokens 2048 \\
  --memory-sessions 3 --caps 1,3 --loads 0.9 --sessions 8 --warm-up 1 --repeats 1
python benchmarks/serve.py ttft --ttft-contexts 4
python benchmarks/serve.py one-decoder --sessions 3 --warm-up 0
python benchmarks/serve.py overload --memory-sessions 3 --overloads 1,2 --sessions 6 --warm-up 0 \\
  --repeats 1
python benchmarks/serve.py map --map-prompts 256,1024 --map-responses 8,32 --map-sessions 1
python benchmarks/serve_baseline.py --sessions 4 --batch 4 --repeats 1 \\
  --methods generate prefillshare
python benchmarks/adapters.py
python benchmarks/disaggregated.py
python benchmarks/few_rows.py
```

`document 2048`: each session begins with a document of its own, as an agent over a repository does,
and the K/V budget holds three sessions shared, which is less than the four copies of one session
that isolated decoders keep. What is left of the time once the prefill is shared is half decoding,
which no cache takes away, and half the one prefill of each document; so the gain stays below the
number of calls over a context (less than seven here). Without documents, ReAct and Reflexion
sessions leave the base a few hundred tokens each, and more than 70 % of the shared side's time is
decoding: that bounds the gain at about 1.6 (`bound`), which is reached when all sessions are there
at once.

`bound` counts both sides' prefill at one rate, the shared side's, whose few new tokens at a time
cost more each than isolated's long prompts (see "ms a token"): isolated does its work faster than
the bound supposes, and the gain of the quick run and of parts of the map stays below 0.9 of it."""


def _options() -> list[str]:
    lines = ["| option | default | |", "|---|---|---|"]
    hints = typing.get_type_hints(serve, include_extras=True)
    for name, parameter in inspect.signature(serve).parameters.items():
        option = next(o for o in typing.get_args(hints[name]) if isinstance(o, OptionInfo))
        default = parameter.default
        shown = "required" if default is inspect.Parameter.empty else f"`{default}`"
        if default is None:
            shown = ""
        variable = f" Variable: `{option.envvar}`." if option.envvar else ""
        lines.append(f"| `--{name.replace('_', '-')}` | {shown} | {option.help}{variable} |")
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


def _few_rows() -> list[str]:
    """Linear layers of a decoding step."""
    measured = json.loads((RESULTS.parent / "few_rows.json").read_text())
    title = (
        "Linear layers of a decoding step, `F.linear` / what decoders use on a CPU up to "
        f"{MOST_ROWS} rows, ms (float32; {measured['machine']}):"
    )
    shapes = list(measured["ms"])
    counts = measured["ms"][shapes[0]]
    lines = [f"| rows | {' | '.join(shapes)} |", "|" + "---:|" * (1 + len(shapes))]
    for rows in counts:
        cells = [
            " / ".join(f"{ms:.2f}" for ms in measured["ms"][shape][rows].values())
            for shape in shapes
        ]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return [title, "\n".join(lines)]


def _baseline() -> list[str]:
    """Transformers' own serving beside ours."""
    path = RESULTS.parent / "serve_baseline.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())
    first = rows[0]
    title = (
        f"The same {first['sessions']} {first['workload']} sessions of {first['decoders']} LoRA "
        f"decoders, {first['at_once']} at once, by transformers with PEFT and by our engine "
        f"({first['dtype']}; {first['machine']}):"
    )
    lines = ["| | s | response tokens/s | times the first |", "|---|---:|---:|---:|"]
    for row in rows:
        ratio = first["seconds"] / row["seconds"]
        lines.append(
            f"| `{row['method']}` | {row['seconds']:.0f} | {row['throughput_tok_s']:.1f} | "
            f"{ratio:.2f} |"
        )
    return [title, "\n".join(lines)]


def _small_tables() -> list[str]:
    """Adapters in one batch, and where the prefill runs."""
    adapters = json.loads((RESULTS.parent / "adapters.json").read_text())
    steps = [f"| {name} | {ms:.1f} |" for name, ms in adapters["ms_per_step"].items()]
    title = (
        f"A decoding step of {adapters['rows']} rows with {adapters['adapters']} adapters "
        f"({adapters['dtype']}; {adapters['machine']}):"
    )
    ways = json.loads((RESULTS.parent / "disaggregated.json").read_text())
    rows = [
        f"| {name} | {way['tokens_per_s']:.1f} | {way['hop_ms']:.2f} |"
        for name, way in ways["ways"].items()
    ]
    other = (
        f"Where the prefill runs, {ways['requests']} requests of {ways['prompt']} prompt and "
        f"{ways['response']} response tokens ({ways['dtype']}; {ways['machine']}):"
    )
    return [
        title,
        "\n".join(["| | ms |", "|---|---:|", *steps]),
        other,
        "\n".join(["| prefill | response tokens/s | hop ms |", "|---|---:|---:|", *rows]),
    ]


def page() -> str:
    """The whole document."""
    parts = [(DOCS / "serving.in.md").read_text().rstrip()]
    parts += ["## Options of `prefillshare serve`", "\n".join(_options())]
    parts += ["## Metrics at `/metrics`", "\n".join(_metrics())]
    if RESULTS.is_file():
        measured = RESULTS.read_text().strip().replace("\n## ", "\n### ")
        parts += [MEASURED, *_baseline(), *_small_tables(), *_few_rows(), f"#{measured}"]
    return "\n\n".join(parts) + "\n"

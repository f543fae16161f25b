"""Shared against isolated prefill on one engine, driven by agent sessions.

    python benchmarks/serve.py compare          ReAct and Reflexion, both regimes, each mode at its
                                                best cap on sessions, against arrival rate
    python benchmarks/serve.py ttft             later agents on an unchanged context
    python benchmarks/serve.py one-decoder      where sharing must lose nothing
    python benchmarks/serve.py decoders         against the number of decoders
    python benchmarks/serve.py overload         sessions past memory: reservations, host tier
    python benchmarks/serve.py map              gain over decoders, prompt and response lengths
    python benchmarks/serve.py quick            one load of each mode, under four minutes
    python benchmarks/serve.py report           tables and plots of what was run

Every load point is a fresh engine on one copy of the models, and lies in `--runs` once it is
finished: a run that was killed goes on from there. Rows go to `benchmarks/results/serve.json`,
where they replace those of the same experiment, workload and regime, so that parts may be run one
by one (`compare --workloads react --regimes memory`); tables and plots lie beside it. With
`--context-tokens`, each session's context begins with a document of its own of so many tokens, and
the rows stand beside those without. Decoders are LoRA adapters with random weights unless
`--decoder name=folder` gives trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import serve_experiments as experiments
import serve_ttft
from serve_setup import Lab, decoders_of, random_decoders

from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.workloads.files import write_json, write_text
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.plots import plot_gain_map, plot_loads
from prefillshare_train.workloads.report import Row, markdown

EXPERIMENTS: dict[str, Callable[[Lab, argparse.Namespace], list[Row]]] = {
    "compare": experiments.compare,
    "one-decoder": experiments.one_decoder,
    "decoders": experiments.decoders,
    "overload": experiments.overload,
    "map": experiments.gain_map,
    "quick": experiments.quick,
}
# The others run with `--decoders` of them.
ALL_DECODERS = ("map", "decoders")
TITLES = {
    "compare": "Each mode at its best cap on sessions",
    "sweep": "Sweep of the cap on sessions, all sessions there at once",
    "one-decoder": "One decoder",
    "decoders": "Against the number of decoders",
    "overload": "Sessions past what memory holds",
    "map": "Gain map",
    "quick": "Quick run",
}


def keep_rows(path: Path, rows: list[Row]) -> list[Row]:
    """Put rows in place of those of the same experiments, workloads, regimes and documents."""

    def part(row: Row) -> tuple[str, ...]:
        document = row["variant"] if row["experiment"] in ("compare", "sweep") else ""
        return row["experiment"], row["workload"], row["regime"], document

    held = json.loads(path.read_text()) if path.is_file() else []
    new = {part(row) for row in rows}
    merged = [row for row in held if part(row) not in new] + rows
    write_json(path, merged)
    return merged


def report(rows: list[Row], ttft: list[Row], out: Path, objectives: Objectives) -> str:
    """Write tables and plots beside the rows."""
    limits = f"TTFT within {objectives.ttft_s:g} s and TPOT within {objectives.tpot_s:g} s"
    parts = []
    for name, title in TITLES.items():
        mine = [row for row in rows if row["experiment"] == name]
        if not mine:
            continue
        text = experiments.gain_table(mine) if name == "map" else markdown(mine, limits)
        parts.append(f"## {title}\n\n{text}")
        if name == "map":
            plot_gain_map(experiments.gain_cells(mine), out / "serve_map")
        elif name != "quick":
            plot_loads(mine, out, f"serve_{name.replace('-', '_')}")
    if ttft:
        parts.append(
            f"## TTFT on an unchanged context\n\n{serve_ttft.table(ttft)}\n{ttft[0]['machine']}\n"
        )
    text = "\n".join(parts)
    write_text(out / "serve.md", text)
    return text


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts, shares = _list_of(int), _list_of(float)
    parser.add_argument("experiment", nargs="+", choices=[*EXPERIMENTS, "ttft", "report"])
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--decoder", action="append", default=[], help="name=folder")
    parser.add_argument("--decoders", type=int, default=4, help="number of them, but for the map")
    parser.add_argument("--dtype", default=default_dtype_name(), choices=("float32", "bfloat16"))
    parser.add_argument("--traces", type=Path, default=Path("../shared/data/react_traces"))
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument(
        "--context-tokens", type=int, default=0, help="a session's own document (compare alone)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/serve"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--workloads", type=_list_of(str), default=["react", "reflexion"])
    parser.add_argument("--regimes", type=_list_of(str), default=["compute", "memory"])
    parser.add_argument("--caps", type=counts, default=[1, 2, 4, 8, 16])
    parser.add_argument("--loads", type=shares, default=[0.6, 0.9], help="of the capacity")
    parser.add_argument("--sessions", type=int, default=24, help="half of them reflexion")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-sessions", type=int, default=8, help="that shared holds")
    parser.add_argument("--overloads", type=shares, default=[0.5, 1, 2, 3], help="of them")
    parser.add_argument("--fixed-cap", type=int, default=8, help="where it does not vary")
    parser.add_argument("--quick-sessions", type=int, default=6)
    parser.add_argument("--map-decoders", type=counts, default=[1, 2, 4, 8])
    parser.add_argument("--map-prompts", type=counts, default=[256, 1024, 2048])
    parser.add_argument("--map-responses", type=counts, default=[8, 32, 128])
    parser.add_argument("--map-sessions", type=int, default=2)
    parser.add_argument("--ttft-prompts", type=counts, default=[512, 1024, 2048])
    parser.add_argument("--ttft-contexts", type=int, default=8)
    parser.add_argument("--ttft-limit", type=float, default=2.0, help="of a good request, s")
    parser.add_argument("--tpot-limit", type=float, default=0.2, help="of a good request, s")
    options = parser.parse_args()
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there; `make model` fetches one")
    if options.context_tokens and set(options.experiment) - {"compare", "report"}:
        parser.error("--context-tokens is compare's alone: run the other experiments without it")
    return options


def _list_of(kind: type) -> Callable[[str], list[int | float | str]]:
    def read(text: str) -> list[int | float | str]:
        return [kind(part) for part in text.split(",")]

    return read


def main() -> None:
    """Run the experiments in turn; rows, tables and plots are written after each."""
    started = time.perf_counter()
    options = parse()
    objectives = Objectives(options.ttft_limit, options.tpot_limit)
    rows_path, ttft_path = options.out / "serve.json", options.out / "serve_ttft.json"
    rows = json.loads(rows_path.read_text()) if rows_path.is_file() else []
    ttft = json.loads(ttft_path.read_text()) if ttft_path.is_file() else []
    wanted = [name for name in options.experiment if name != "report"]
    if wanted:
        most = options.decoders
        if set(wanted) & set(ALL_DECODERS):
            most = max(most, *options.map_decoders)
        decoders = decoders_of(options.decoder) or random_decoders(
            options.model, options.runs / "decoders", most, options.dtype
        )
        lab = Lab.load(
            options.model,
            decoders,
            dtype=options.dtype,
            traces=options.traces if options.traces.is_dir() else None,
            system_tokens=options.system_tokens,
            seed=options.seed,
            out=options.runs,
            objectives=objectives,
        )
        few = replace(lab, plan=replace(lab.plan, decoders=lab.plan.decoders[: options.decoders]))
        print(f"{len(decoders)} decoders; lengths: {lab.plan.lengths.source}", flush=True)
        for name in wanted:
            if name == "ttft":
                ttft = serve_ttft.ttft(few, options)
                write_json(ttft_path, ttft)
            else:
                here = lab if name in ALL_DECODERS else few
                rows = keep_rows(rows_path, EXPERIMENTS[name](here, options))
            report(rows, ttft, options.out, objectives)
    print(report(rows, ttft, options.out, objectives))
    print(f"{rows_path}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

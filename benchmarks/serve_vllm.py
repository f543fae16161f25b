"""Decoders on stock vLLM: prefill shared, not shared, and our own loop, on the same agent sessions.

    python benchmarks/serve_vllm.py              sessions, then vLLM's own client (make bench-vllm)
    python benchmarks/serve_vllm.py --quick      one load of each server, in a few minutes
    python benchmarks/serve_vllm.py report       the tables of what was run

Four LoRA decoders, by three servers: `shared` (one vLLM process with our store connector, behind
our router), `stock` (the same process without it: vLLM's own multi-LoRA with prefix caching) and
`reference` (`prefillshare serve`). They get the same token ids, lengths, dtype, cores and GiB of
K/V, and run one after another, each load on a fresh server, all on the cores that the load
generator runs on too. Each server is compared at its own best cap on sessions.

The bound is what the removed prefill allows at vLLM's own rates, measured on the stock process:
the work of stock over that of shared, with caches of whole blocks that never forget.

`client` drives the same servers with `vllm bench serve`. A load that has finished lies in `--runs`
and is not run again, so a run that was killed goes on from there. Results:
`benchmarks/results/vllm.json` and `vllm.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serve_setup import decoders_of, random_decoders
from transformers import AutoTokenizer
from vllm_figures import Rates, Row, best_caps, comparison, markdown, merged
from vllm_loads import MODES, Loads
from vllm_systems import SYSTEMS, Servers, System, stop_on_sigterm

from prefillshare_train.cli.bench_targets import decoder_digest
from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.engines import vllm as vllm_engine
from prefillshare_train.engines.vllm.vllm_python import find_python, look_into
from prefillshare_train.workloads.files import write_json, write_text
from prefillshare_train.workloads.machine import machine
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import LoadPoint, PointStore
from prefillshare_train.workloads.run import choose_lengths
from prefillshare_train.workloads.sessions import SessionPlan
from prefillshare_train.workloads.vocabulary import ordinary_token_ids

RESULTS = Path("benchmarks/results")
PARTS = ("sessions", "client", "report")
NOTE = (
    "servers one after another; the load generator shares the cores with each of them; vLLM runs "
    "eagerly"
)


def measure_sessions(loads: Loads, options: argparse.Namespace) -> tuple[list[Row], dict[int, Any]]:
    """Every cap once, then each server's best cap again; and vLLM's rates at those caps."""

    def point(system: System, cap: int, repeat: int) -> LoadPoint:
        return LoadPoint(
            experiment="sessions",
            workload=options.workload,
            regime="compute",
            mode=MODES[system],
            decoders=len(loads.plan.decoders),
            sessions_per_s=None,
            max_sessions=cap,
            sessions=options.sessions,
            warm_up=options.warm_up,
            kv_bytes=options.kv_gib << 30,
            variant=system,
            repeat=repeat,
        )

    found: dict[tuple[System, int], list[Row]] = {}

    def run(system: System, cap: int, repeat: int) -> None:
        figures = loads.sessions(point(system, cap, repeat), system)
        row = {"system": system, "max_sessions": cap, **figures}
        found.setdefault((system, cap), []).append(row)
        speed, tail = row["throughput_tok_s"], row["p95_s"] or 0.0
        print(f"{system}, cap {cap}: {speed:.1f} tok/s, p95 {tail:.1f} s", flush=True)

    def rows() -> list[Row]:
        return [merged(repeats) for repeats in found.values()]

    for cap in options.caps:
        for system in options.systems:
            run(system, cap, 0)
    caps = {system: int(row["max_sessions"]) for system, row in best_caps(rows()).items()}
    for repeat in range(1, options.repeats):
        for system in options.systems:
            run(system, caps[system], repeat)
    rates: dict[int, Any] = {}
    for cap in sorted({cap for system, cap in caps.items() if system != "reference"}):
        at = replace(point("stock", cap, 0), experiment="rates", sessions=0, warm_up=0)
        rates[cap] = dataclasses.asdict(loads.rates(at))
    return rows(), rates


def measure_client(loads: Loads, options: argparse.Namespace) -> list[Row]:
    """vLLM's own client on each server; medians."""
    found: dict[str, list[Row]] = {}
    for repeat in range(options.repeats):
        for system in options.systems:
            point = LoadPoint(
                experiment="client",
                workload="prefix_repetition",
                regime="compute",
                mode=MODES[system],
                decoders=len(loads.plan.decoders),
                sessions_per_s=None,
                max_sessions=options.client_cap,
                sessions=options.client_prompts,
                kv_bytes=options.kv_gib << 30,
                variant=f"{system}/{options.client_prefix}",
                repeat=repeat,
            )
            row = loads.client(point, system, options.client_prefix) | {"system": system}
            found.setdefault(system, []).append(row)
            print(f"vllm bench serve, {system}: {row['throughput_tok_s']:.1f} tok/s", flush=True)
    return [merged(repeats) for repeats in found.values()]


def load(options: argparse.Namespace) -> tuple[Loads, dict[str, Any]]:
    """Everything that a load needs, and what sets the results apart from others."""
    python = look_into(find_python(options.vllm_python))
    python.require(nixl=False)
    decoders = decoders_of(options.decoder) or random_decoders(
        options.model, Path("runs/serve/decoders"), options.decoders, options.dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    plan = SessionPlan(
        kind=options.workload,
        decoders=tuple(decoders),
        vocabulary=ordinary_token_ids(tokenizer),
        lengths=choose_lengths(options.traces if options.traces.is_dir() else None, tokenizer),
        system_tokens=options.system_tokens,
        seed=options.seed,
    )
    setup: dict[str, Any] = {
        "base": Path(options.model).name,
        "decoders": {name: decoder_digest(folder) for name, folder in decoders.items()},
        "dtype": options.dtype,
        "block_tokens": options.block_tokens,
        "kv_gib": options.kv_gib,
        "lengths": plan.lengths.source,
        "system_tokens": plan.system_tokens,
        "seed": plan.seed,
        "vllm": f"{python.distribution} {python.vllm}",
    }
    shown = setup | {key: getattr(options, key) for key in ("sessions", "warm_up", "repeats")}
    servers = Servers(
        base=options.model,
        decoders=decoders,
        dtype=options.dtype,
        kv_gib=options.kv_gib,
        block_tokens=options.block_tokens,
        rows=max(16, *options.caps),
        python=python.path,
        runs=options.runs,
    )
    store = PointStore(options.runs / "points", setup | {"engine": _code_of(vllm_engine)})
    objectives = Objectives(options.ttft_limit, options.tpot_limit)
    return Loads(servers, plan, store, objectives), shown | {"machine": machine()}


def _code_of(package: Any) -> str:
    """SHA-256 of the sources that the shared side runs through beside those that a store hashes."""
    hasher = hashlib.sha256()
    folder = Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        hasher.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def report(result: dict[str, Any], out: Path) -> str:
    """Compare, and write the results with their tables."""
    rates = {int(cap): Rates(**values) for cap, values in result["rates"].items()}
    result["comparison"] = comparison(best_caps(result["loads"]), rates)
    write_json(out / "vllm.json", result)
    text = markdown(result)
    write_text(out / "vllm.md", text)
    return text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = _counts
    parser.add_argument(
        "parts", nargs="*", default=["sessions", "client"], help="sessions, client, or report"
    )
    parser.add_argument("--quick", action="store_true", help="few sessions, one cap, one repeat")
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--decoder", action="append", default=[], help="name=folder")
    parser.add_argument("--decoders", type=int, default=4, help="number of random ones")
    parser.add_argument("--dtype", default=default_dtype_name(), choices=("float32", "bfloat16"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--vllm-python", type=Path, help="Python that has vLLM")
    parser.add_argument("--kv-gib", type=int, default=4, help="of each server")
    parser.add_argument("--block-tokens", type=int, default=32, help="of vLLM's blocks")
    parser.add_argument("--traces", type=Path, default=Path("../shared/data/react_traces"))
    parser.add_argument("--workload", default="react", choices=("react", "reflexion"))
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caps", type=counts, default=[1, 2, 4, 8, 16], help="on sessions")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--client-prompts", type=int, default=64)
    parser.add_argument("--client-prefix", type=int, default=1024, help="tokens of a prefix")
    parser.add_argument("--client-cap", type=int, default=8, help="requests at once")
    parser.add_argument("--ttft-limit", type=float, default=2.0, help="of a good request, s")
    parser.add_argument("--tpot-limit", type=float, default=0.2, help="of a good request, s")
    parser.add_argument("--runs", type=Path, default=Path("runs/serve_vllm"))
    parser.add_argument("--out", type=Path, help=f"otherwise {RESULTS}; runs/…/quick for --quick")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"{unknown[0]} is none of {', '.join(PARTS)}")
    if options.quick:
        options.caps, options.repeats = [options.client_cap], 1
        options.sessions, options.warm_up, options.client_prompts = 8, 1, 32
    options.out = options.out or (options.runs / "quick" if options.quick else RESULTS)
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there; `make model` fetches one")
    return options


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run the parts in turn; results are written after each."""
    started = time.perf_counter()
    stop_on_sigterm()
    options = parse()
    path = options.out / "vllm.json"
    held = json.loads(path.read_text()) if path.is_file() else None
    parts = options.parts
    if parts == ["report"]:
        if held is None:
            raise SystemExit(f"{path} is not there: run the loads first")
        print(report(held, options.out))
        return
    loads, setup = load(options)
    result: dict[str, Any] = {"setup": setup, "note": NOTE, "loads": [], "rates": {}, "client": []}
    if held is not None and held["setup"] == setup:
        result = held
    if "sessions" in parts:
        result["loads"], result["rates"] = measure_sessions(loads, options)
        report(result, options.out)
    if "client" in parts:
        result["client"] = measure_client(loads, options)
    print(report(result, options.out))
    print(f"{path}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

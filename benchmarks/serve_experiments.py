"""The experiments of `benchmarks/serve.py`, each from load points to rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

from serve_setup import Lab

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.points import LoadPoint
from prefillshare_train.workloads.report import Row, best, gains, rows_of

MODES: tuple[Mode, ...] = ("shared", "isolated")


def sessions_of(workload: str, options: argparse.Namespace) -> int:
    """Sessions of a load; a Reflexion session makes more than twice the calls of a ReAct one."""
    count: int = options.sessions
    return max(1, count // 2) if workload == "reflexion" else count


def budget(lab: Lab, options: argparse.Namespace, workload: str, regime: str, cap: int) -> int:
    """The K/V budget of a regime, the same for both modes.

    compute: what the isolated side needs for `cap` sessions. memory: what the shared side needs for
    `--memory-sessions` of them, which is below what the isolated side needs.
    """
    plan = replace(lab.plan, kind=workload)
    count = sessions_of(workload, options)
    if regime == "compute":
        return lab.kv_bytes(plan, cap, len(plan.decoders), count)
    return lab.kv_bytes(plan, options.memory_sessions, 1, count)


def compare(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """Both modes, each at its best cap on sessions, against arrival rate.

    For each workload and regime: a sweep of caps with all sessions there at once finds each mode's
    best cap and the shared side's capacity; then both run at these caps, all at once and with
    Poisson arrivals at shares of that capacity. With `--context-tokens` every session begins with a
    document of its own.
    """
    document = options.context_tokens
    if document:
        lab = replace(lab, plan=replace(lab.plan, context_tokens=document))
    rows: list[Row] = []
    for regime in options.regimes:
        for workload in options.workloads:
            kv = budget(lab, options, workload, regime, max(options.caps))
            point = LoadPoint(
                experiment="sweep",
                workload=workload,
                regime=regime,
                mode="shared",
                decoders=len(lab.plan.decoders),
                sessions_per_s=None,
                max_sessions=1,
                sessions=sessions_of(workload, options),
                warm_up=options.warm_up,
                kv_bytes=kv,
                variant=f"document {document}" if document else "",
            )
            sweep = run(
                lab,
                (
                    replace(point, mode=mode, max_sessions=cap)
                    for cap in options.caps
                    for mode in MODES
                ),
            )
            chosen = {mode: best([r for r in sweep if r["mode"] == mode]) for mode in MODES}
            top = chosen["shared"]
            assert top is not None
            rates = [None] + [
                float(f"{share * top['completed_sessions_per_s']:.3g}") for share in options.loads
            ]
            point = replace(point, experiment="compare")
            rows += sweep + run(
                lab,
                (
                    replace(
                        point,
                        mode=mode,
                        max_sessions=row["max_sessions"],
                        sessions_per_s=rate,
                        repeat=repeat,
                    )
                    for repeat in range(options.repeats)
                    for rate in rates
                    for mode, row in chosen.items()
                    if row is not None
                ),
            )
    return rows


def quick(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """One load of each mode."""
    workload, count = options.workloads[0], options.quick_sessions
    plan = replace(lab.plan, kind=workload)
    point = LoadPoint(
        experiment="quick",
        workload=workload,
        regime="compute",
        mode="shared",
        decoders=len(lab.plan.decoders),
        sessions_per_s=None,
        max_sessions=count,
        sessions=count,
        warm_up=1,
        kv_bytes=lab.kv_bytes(plan, count, len(plan.decoders), count),
    )
    return run(lab, (replace(point, mode=mode) for mode in MODES))


def one_decoder(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """A single decoder, where sharing can win nothing and must lose nothing."""
    cap, workload = options.fixed_cap, options.workloads[0]
    count = sessions_of(workload, options)
    plan = replace(lab.plan, kind=workload)
    point = LoadPoint(
        experiment="one-decoder",
        workload=workload,
        regime="compute",
        mode="shared",
        decoders=1,
        sessions_per_s=None,
        max_sessions=cap,
        sessions=count,
        warm_up=options.warm_up,
        kv_bytes=lab.kv_bytes(plan, cap, 1, count),
    )
    repeats = range(max(options.repeats, 5))
    return run(lab, (replace(point, mode=m, repeat=n) for n in repeats for m in MODES))


def decoders(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """Both modes against the number of decoders, at one cap on sessions."""
    cap, workload = options.fixed_cap, options.workloads[0]
    count = sessions_of(workload, options)
    points = []
    for repeat in range(options.repeats):
        for number in options.map_decoders:
            plan = replace(lab.plan, kind=workload, decoders=lab.plan.decoders[:number])
            point = LoadPoint(
                experiment="decoders",
                workload=workload,
                regime="compute",
                mode="shared",
                decoders=number,
                sessions_per_s=None,
                max_sessions=cap,
                sessions=count,
                warm_up=options.warm_up,
                kv_bytes=lab.kv_bytes(plan, cap, number, count),
                repeat=repeat,
            )
            points += [replace(point, mode=mode) for mode in MODES]
    return run(lab, points)


def overload(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """Sessions grow past what memory holds: plain, with reservations, with a host tier, with both.

    The isolated mode runs plain beside them.
    """
    workload = options.workloads[0]
    plan = replace(lab.plan, kind=workload)
    caps = [max(1, round(share * options.memory_sessions)) for share in options.overloads]
    # As many sessions at every cap, and enough for the largest.
    count = max(sessions_of(workload, options), *caps)
    kv = lab.kv_bytes(plan, options.memory_sessions, 1, count)
    reserve = lab.session_tokens(plan, count)
    variants: dict[str, dict[str, int]] = {
        "plain": {},
        "reserved": {"session_tokens": reserve},
        "staged": {"staging_bytes": 2 * kv},
        "reserved+staged": {"session_tokens": reserve, "staging_bytes": 2 * kv},
    }
    point = LoadPoint(
        experiment="overload",
        workload=workload,
        regime="memory",
        mode="shared",
        decoders=len(lab.plan.decoders),
        sessions_per_s=None,
        max_sessions=1,
        sessions=count,
        warm_up=options.warm_up,
        kv_bytes=kv,
    )
    points = []
    for repeat in range(options.repeats):
        for cap in caps:
            here = replace(point, max_sessions=cap, repeat=repeat)
            points += [replace(here, variant=name, **more) for name, more in variants.items()]
            points.append(replace(here, variant="plain", mode="isolated"))
    return run(lab, points)


def gain_map(lab: Lab, options: argparse.Namespace) -> list[Row]:
    """Both modes over decoders x prompt length x response length.

    Every session makes eight calls over one context, whatever the number of decoders.
    """
    points = []
    for decoders in options.map_decoders:
        for prompt in options.map_prompts:
            for response in options.map_responses:
                plan = replace(
                    lab.plan,
                    kind="uniform",
                    decoders=lab.plan.decoders[:decoders],
                    system_tokens=0,
                    context_tokens=prompt,
                    response_tokens=response,
                )
                count = options.map_sessions
                point = LoadPoint(
                    experiment="map",
                    workload="uniform",
                    regime="compute",
                    mode="shared",
                    decoders=decoders,
                    sessions_per_s=None,
                    max_sessions=count,
                    sessions=count,
                    kv_bytes=lab.kv_bytes(plan, count, decoders, count),
                    variant=f"{prompt}/{response}",
                )
                points += [replace(point, mode=mode) for mode in MODES]
    return run(lab, points)


def gain_cells(rows: Sequence[Row]) -> dict[int, dict[tuple[int, int], float]]:
    """Throughput gains of `gain_map` by decoders, then by (prompt, response) tokens."""
    cells: dict[int, dict[tuple[int, int], float]] = {}
    for gain in gains(rows):
        if gain["throughput_ratio"] is None:  # every call of the isolated side failed
            continue
        prompt, response = map(int, gain["variant"].split("/"))
        cells.setdefault(gain["decoders"], {})[prompt, response] = gain["throughput_ratio"]
    return cells


def gain_table(rows: Sequence[Row]) -> str:
    """The map as a Markdown table: a line for each prompt and response, a column a decoder count.

    A cell has the gain in throughput and, in brackets, the bound.
    """
    found = gains(rows)
    counts = sorted({gain["decoders"] for gain in found})
    cells = {
        (tuple(map(int, gain["variant"].split("/"))), gain["decoders"]): (
            f"{gain['throughput_ratio']:.2f} ({gain['bound']:.2f})"
            if gain["throughput_ratio"] and not gain["errors"]
            else "failed"
        )
        for gain in found
    }
    names = [f"{count} decoder{'s' * (count > 1)}" for count in counts]
    lines = [
        f"| prompt | response | {' | '.join(names)} |",
        "|" + "---:|" * (2 + len(counts)),
    ]
    for prompt, response in sorted({case for case, _ in cells}):
        line = [cells.get(((prompt, response), count), "–") for count in counts]
        lines.append(f"| {prompt} | {response} | {' | '.join(line)} |")
    machines = dict.fromkeys(row["machine"] for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            "How many times the throughput of isolated, and in brackets what the removed prefill "
            "allows at the measured rates. Tokens; eight calls a session over one context, "
            f"{rows[0]['sessions']} at once.",
            "",
            *machines,
            "",
        ]
    )


def run(lab: Lab, points: Iterable[LoadPoint]) -> list[Row]:
    """Rows of load points."""
    return rows_of(lab.bench().run(points))

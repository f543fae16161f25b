"""Rows, gains and Markdown tables of finished load points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefillshare_train.workloads.metrics import Figures
from prefillshare_train.workloads.points import LoadPoint

Row = dict[str, Any]

# The keys that every row has first, in this order; the other figures follow.
KEYS = (
    "workload",
    "regime",
    "mode",
    "decoders",
    "sessions_per_s",
    "max_sessions",
    "throughput_tok_s",
    "p50_s",
    "p95_s",
    "p99_s",
    "ttft_p95_s",
    "hit_ratio",
    "hit_ratio_max",
    "peak_kv_bytes",
    "staged_bytes",
    "errors",
    "bound",
)
# What two systems that are compared have in common.
_CASE = ("experiment", "workload", "regime", "variant", "decoders", "sessions_per_s", "sessions")


def rows_of(found: Mapping[LoadPoint, Figures]) -> list[Row]:
    """One row a load point, medians over its repeats.

    `bound` is the same for both modes: it is taken at the shared side's measured rates.
    """
    groups: dict[LoadPoint, list[Figures]] = {}
    for point, figures in found.items():
        groups.setdefault(dataclasses.replace(point, repeat=0), []).append(figures)
    rows = [_row(point, repeats) for point, repeats in groups.items()]
    for row in rows:
        if row["mode"] == "isolated" and (partner := counterpart(row, rows)) is not None:
            row["bound"] = partner["bound"]
    return rows


def counterpart(row: Row, rows: Sequence[Row]) -> Row | None:
    """The other mode's row for the same load, at the same cap on sessions where there is one."""
    same = [
        other
        for other in rows
        if other["mode"] != row["mode"] and all(other[key] == row[key] for key in _CASE)
    ]
    exact = [other for other in same if other["max_sessions"] == row["max_sessions"]]
    return best(exact or same)


def best(rows: Sequence[Row]) -> Row | None:
    """The row of the highest throughput, among those without errors where there are any."""
    return max(rows, key=lambda row: (not row["errors"], row["throughput_tok_s"]), default=None)


def gains(rows: Sequence[Row]) -> list[Row]:
    """What sharing bought at each load, each side at its best cap on sessions.

    Returns:
        One entry a load that both modes ran: throughput of shared over isolated, p95 of isolated
        over shared, the share of the bound that was reached, and the errors of both sides, which
        are not 0 where one of them has failed at every cap.
    """
    found = []
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        case = tuple(row[key] for key in _CASE)
        if case in seen:
            continue
        seen.add(case)
        sides = {
            mode: best([r for r in rows if r["mode"] == mode and _case(r) == case])
            for mode in ("shared", "isolated")
        }
        shared, isolated = sides["shared"], sides["isolated"]
        if shared is None or isolated is None:
            continue
        ratio = _ratio(shared["throughput_tok_s"], isolated["throughput_tok_s"])
        found.append(
            {
                **{key: row[key] for key in _CASE},
                "max_sessions_shared": shared["max_sessions"],
                "max_sessions_isolated": isolated["max_sessions"],
                "throughput_ratio": ratio,
                "p95_ratio": _ratio(isolated["p95_s"], shared["p95_s"]),
                "ttft_p95_ratio": _ratio(isolated["ttft_p95_s"], shared["ttft_p95_s"]),
                "bound": shared["bound"],
                "bound_share": _ratio(ratio, shared["bound"]),
                "errors": shared["errors"] + isolated["errors"],
            }
        )
    return found


def markdown(rows: Sequence[Row], objectives: str) -> str:
    """Tables of rows and of gains, with what the figures are.

    Args:
        objectives: the limits of a good request, in words.
    """
    lines = _table(
        [
            "workload",
            "regime",
            "mode",
            "decoders",
            "sessions/s",
            "cap",
            "tok/s",
            "p50 s",
            "p95 s",
            "p99 s",
            "request p95 s",
            "TTFT p50 s",
            "TTFT p95 s",
            "TPOT p95 ms",
            "goodput",
            "hits",
            "hits at most",
            "K/V MiB",
            "staged MiB",
            "errors",
        ],
        [_cells(row) for row in rows],
        texts=3,
    )
    lines += [
        "",
        "p50, p95, p99: of whole sessions, from arrival to the end of the last call. cap: sessions "
        f"that run at once. goodput: share of requests with {objectives}. hits: share of the "
        "base's prompt tokens whose K/V were found; at most: with a cache that never forgets. "
        "regime: memory where the K/V budget is less than what isolated would hold at that cap, "
        "compute where it is not.",
    ]
    if compared := gains(rows):
        header = ["workload", "regime", "decoders", "sessions/s", "caps", "throughput"]
        header += ["p95", "TTFT p95", "bound", "of the bound", "errors"]
        lines += ["", *_table(header, [_gain_cells(gain) for gain in compared], texts=2)]
        lines += [
            "",
            "Shared against isolated: how many times the throughput, and what part of the latency "
            "(3.0 is a third). caps: shared / isolated, each at its best. bound: work of isolated "
            "over work of shared at the measured rates, without memory pressure. errors: failed "
            "calls of both sides; unless 0, the two did not do the same work.",
        ]
    if timed := [row for row in rows if row.get("prefilled_tokens") and row.get("duration_s")]:
        header = ["workload", "regime", "mode", "sessions/s", "cap", "prefilled tokens"]
        header += ["prefill", "ms a token", "decode", "ms a token", "rest"]
        lines += ["", *_table(header, [_time_cells(row) for row in timed], texts=3)]
        lines += [
            "",
            "Where the time of a run went. Sharing can remove prefill only: the share of decode is "
            "what no cache takes away.",
        ]
    return "\n".join([*lines, "", *_machines(rows)]) + "\n"


def _machines(rows: Sequence[Row]) -> list[str]:
    """The machine, and where there are several what each has run."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("machine"):
            case = f"{row['workload']} {row['variant']}".strip() + f", {row['regime']}"
            found.setdefault(row["machine"], []).append(case)
    if len(found) == 1:
        return list(found)
    return [f"- {'; '.join(dict.fromkeys(cases))}: {name}" for name, cases in found.items()]


def _row(point: LoadPoint, repeats: Sequence[Figures]) -> Row:
    figures = {key: _median([r.get(key) for r in repeats]) for key in repeats[0]}
    maxima = [r.get("hit_ratio_max_by_mode", {}).get(point.mode) for r in repeats]
    values = dataclasses.asdict(point) | figures
    values["hit_ratio_max"] = _median(maxima)
    # Errors are never averaged away.
    values["errors"] = sum(r["errors"] for r in repeats)
    values["repeats"] = len(repeats)
    for key in ("repeat", "hit_ratio_max_by_mode"):
        values.pop(key, None)
    values.setdefault("bound", None)
    return {key: values.pop(key) for key in KEYS} | values


def _median(values: Sequence[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) == len(values):
        middle = float(np.median(numbers))
        return int(middle) if all(isinstance(n, int) for n in numbers) else middle
    return values[0] if not numbers else float(np.median(numbers))


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _CASE)


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None


def _cells(row: Row) -> list[str]:
    return [
        f"{row['workload']} {row['variant']}".strip(),
        row["regime"],
        row["mode"],
        str(row["decoders"]),
        "all at once" if row["sessions_per_s"] is None else f"{row['sessions_per_s']:.3g}",
        str(row["max_sessions"]),
        *(
            _number(row.get(key), scale)
            for key, scale in (
                ("throughput_tok_s", 1),
                ("p50_s", 1),
                ("p95_s", 1),
                ("p99_s", 1),
                ("request_p95_s", 1),
                ("ttft_p50_s", 1),
                ("ttft_p95_s", 1),
                ("tpot_p95_s", 1e3),
            )
        ),
        _percent(row.get("goodput_share")),
        _percent(row["hit_ratio"]),
        _percent(row["hit_ratio_max"]),
        _number(row["peak_kv_bytes"], 2**-20),
        _number(row["staged_bytes"], 2**-20),
        str(row["errors"]),
    ]


def _gain_cells(gain: Row) -> list[str]:
    return [
        f"{gain['workload']} {gain['variant']}".strip(),
        gain["regime"],
        str(gain["decoders"]),
        "all at once" if gain["sessions_per_s"] is None else f"{gain['sessions_per_s']:.3g}",
        f"{gain['max_sessions_shared']} / {gain['max_sessions_isolated']}",
        *(
            _number(gain[key])
            for key in ("throughput_ratio", "p95_ratio", "ttft_p95_ratio", "bound", "bound_share")
        ),
        str(gain["errors"]),
    ]


def _time_cells(row: Row) -> list[str]:
    """Shares of a run's time, by the engine's own seconds a token."""
    decoded = row["throughput_tok_s"] * row["duration_s"]
    prefill = row["prefilled_tokens"] * (row["prefill_s_per_token"] or 0.0) / row["duration_s"]
    decode = decoded * (row["decode_s_per_token"] or 0.0) / row["duration_s"]
    return [
        f"{row['workload']} {row['variant']}".strip(),
        row["regime"],
        row["mode"],
        "all at once" if row["sessions_per_s"] is None else f"{row['sessions_per_s']:.3g}",
        str(row["max_sessions"]),
        str(row["prefilled_tokens"]),
        _percent(prefill),
        _number(row["prefill_s_per_token"], 1e3),
        _percent(decode),
        _number(row["decode_s_per_token"], 1e3),
        _percent(max(0.0, 1.0 - prefill - decode)),
    ]


def _number(value: float | None, scale: float = 1) -> str:
    if value is None:
        return "–"
    scaled = value * scale
    return f"{scaled:.3g}" if scaled < 1e3 else f"{scaled:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> list[str]:
    """Markdown; all but the first `texts` columns are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return [f"| {' | '.join(line)} |" for line in (header, rule, *rows)]

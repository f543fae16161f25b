"""The figures of `benchmarks/serve_vllm.py`: what vLLM counts, the bound, rows and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from prefillshare_train.serving.config import Mode
from prefillshare_train.workloads.reuse import Sent, Work

Row = dict[str, Any]
# Of vLLM's /metrics and the store connector's; the names that follow are those of the rows.
COUNTED = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
    "vllm:external_prefix_cache_hits_total": "store_hit_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:iteration_tokens_total_count": "steps",
    "prefillshare_store_hit_requests_total": "store_hit_requests",
    "prefillshare_store_refused_requests_total": "store_refused_requests",
    "prefillshare_store_waited_requests_total": "store_waited_requests",
    "prefillshare_store_waited_seconds_total": "store_waited_seconds",
    "prefillshare_store_written_bytes_total": "store_written_bytes",
    "prefillshare_store_loaded_bytes_total": "store_loaded_bytes",
    "prefillshare_store_evicted_blocks_total": "store_evicted_blocks",
}


def counts_of(text: str) -> dict[str, float]:
    """Sums over all labels of the counters in `COUNTED` that a /metrics page has."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (name := COUNTED.get(sample.name)) is not None:
                found[name] = found.get(name, 0.0) + sample.value
    return found


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted between two pages, and the prompt tokens that were run and not found."""
    found = {name: value - before.get(name, 0.0) for name, value in after.items()}
    if "prompt_tokens" in found:
        held = found.get("prefix_hit_tokens", 0.0) + found.get("store_hit_tokens", 0.0)
        found["run_prompt_tokens"] = found["prompt_tokens"] - held
    return found


def block_work(sent: Iterable[Sent], mode: Mode, before: Iterable[Sent], block_tokens: int) -> Work:
    """A load's work under a cache that never forgets and keeps whole blocks only, as vLLM's does.

    Args:
        sent: the load's requests, in the order of their ends.
        mode: `shared` finds every earlier request's blocks, `isolated` the same decoder's.
        before: requests of the warm-up, which leave blocks and do not count.
    """
    kept: set[tuple[str, tuple[int, ...]]] = set()

    def new_tokens(request: Sent) -> int:
        owner = request.decoder if mode == "isolated" else ""
        prompt = request.base_prompt
        ends = range(block_tokens, len(prompt) + 1, block_tokens)
        blocks = [(owner, tuple(prompt[:end])) for end in ends]
        found = 0
        while found < len(blocks) and blocks[found] in kept:
            found += 1
        kept.update(blocks)
        return len(prompt) - found * block_tokens

    for request in before:
        new_tokens(request)
    base = prefill = decode = 0
    for request in sent:
        base += len(request.base_prompt)
        prefill += new_tokens(request)
        decode += request.completion_tokens
    return Work(base, prefill, decode)


@dataclass(frozen=True)
class Rates:
    """Seconds a token, measured on the stock process with so many requests at once.

    Attributes:
        base_prefill_s: of a prompt that the base runs.
        adapter_prefill_s: of one that adapters run, which costs vLLM more.
        decode_s: of a response by adapters, all rows together.
    """

    base_prefill_s: float
    adapter_prefill_s: float
    decode_s: float


def speed_bound(stock: Work, stock_rates: Rates, shared: Work, shared_rates: Rates) -> float:
    """How many times faster sharing can be where it costs nothing: stock's work over shared's."""
    slow = stock.seconds(stock_rates.adapter_prefill_s, stock_rates.decode_s)
    return slow / shared.seconds(shared_rates.base_prefill_s, shared_rates.decode_s)


def merged(repeats: Sequence[Mapping[str, Any]]) -> Row:
    """Medians of one load's repeats; errors are summed, and what is no number is the first's."""
    row: Row = {}
    for key, first in repeats[0].items():
        values = [repeat.get(key) for repeat in repeats]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        row[key] = float(np.median(numbers)) if numbers else first
    row["errors"] = sum(repeat["errors"] for repeat in repeats)
    row["repeats"] = len(repeats)
    row["throughput_range_tok_s"] = [
        min(r["throughput_tok_s"] for r in repeats),
        max(r["throughput_tok_s"] for r in repeats),
    ]
    return row


def best_caps(rows: Sequence[Row]) -> dict[str, Row]:
    """Each system's row of the highest throughput, among its rows of the most repeats.

    A sweep runs every cap once and repeats one: against the median of that one's repeats, a single
    lucky run of another cap would win.
    """
    found: dict[str, Row] = {}
    for row in rows:
        held = found.get(row["system"])
        if held is None or _standing(row) > _standing(held):
            found[row["system"]] = row
    return found


def _standing(row: Row) -> tuple[int, float]:
    return row["repeats"], row["throughput_tok_s"]


def comparison(best: Mapping[str, Row], rates: Mapping[int, Rates]) -> Row | None:
    """Shared against stock, each at its best cap, and against what the removed prefill allows.

    Args:
        rates: by the number of requests at once.
    """
    if "shared" not in best or "stock" not in best:
        return None
    shared, stock = best["shared"], best["stock"]
    found: Row = {
        "caps": [shared["max_sessions"], stock["max_sessions"]],
        "throughput_ratio": shared["throughput_tok_s"] / stock["throughput_tok_s"],
        "p95_ratio": stock["p95_s"] / shared["p95_s"],
        "ttft_p95_ratio": stock["ttft_p95_s"] / shared["ttft_p95_s"],
        "errors": shared["errors"] + stock["errors"],
    }
    if "reference" in best:
        reference = best["reference"]["throughput_tok_s"]
        found["throughput_ratio_to_reference"] = shared["throughput_tok_s"] / reference
    if {shared["max_sessions"], stock["max_sessions"]} <= rates.keys():
        found["bound"] = speed_bound(
            Work(**stock["work"]["isolated"]),
            rates[int(stock["max_sessions"])],
            Work(**shared["work"]["shared"]),
            rates[int(shared["max_sessions"])],
        )
        found["bound_share"] = found["throughput_ratio"] / found["bound"]
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result file, with what they say."""
    best = best_caps(result["loads"])
    header = ["system", "cap", "tok/s", "p50 s", "p95 s", "p99 s", "TTFT p50 s", "TTFT p95 s"]
    header += ["hits", "prompt tokens run", "errors", "repeats"]
    lines = _table(header, [_load_cells(row, best) for row in result["loads"]])
    lines += [
        "",
        "Sessions of the ReAct workload over HTTP, all there at once. cap: sessions that run at "
        "once (**bold**: the system's best). p50, p95, p99: of whole sessions. hits: cached over "
        "all prompt tokens, as the server tells. Medians over the repeats.",
    ]
    if result["rates"]:
        cells = [
            [cap, *(_number(1e3 * rate[key]) for key in Rates.__dataclass_fields__)]
            for cap, rate in result["rates"].items()
        ]
        header = ["requests at once", "base prefill", "adapter prefill", "decode"]
        lines += ["", *_table(header, cells), "", "Milliseconds a token, the stock process's own."]
    if found := result.get("comparison"):
        lines += ["", _sentence(found)]
    if clients := result.get("client"):
        header = ["system", "requests/s", "tok/s", "p50 s", "p95 s", "TTFT p50 s", "TTFT p95 s"]
        lines += ["", *_table([*header, "completed"], [_client_cells(row) for row in clients])]
        lines += ["", f"`vllm bench serve`, {clients[0]['load']}. p50, p95: of requests."]
    lines += ["", f"{result['setup']['machine']}; {result['note']}"]
    return "\n".join(lines) + "\n"


def _sentence(found: Row) -> str:
    caps = " and ".join(f"{cap:.0f}" for cap in found["caps"])
    text = (
        f"Shared against stock, each at its best cap ({caps}): "
        f"{_number(found['throughput_ratio'])} times the throughput, sessions' p95 "
        f"{_number(found['p95_ratio'])} times and TTFT p95 {_number(found['ttft_p95_ratio'])} "
        "times lower."
    )
    if "bound" in found:
        text += (
            f" The removed prefill allows {_number(found['bound'])} times at these rates; "
            f"{_percent(found['bound_share'])} of that is reached."
        )
    if "throughput_ratio_to_reference" in found:
        ratio = _number(found["throughput_ratio_to_reference"])
        text += f" Against our own loop: {ratio} times the throughput."
    return text


def _load_cells(row: Row, best: Mapping[str, Row]) -> list[str]:
    cap = f"{row['max_sessions']:.0f}"
    keys = ("throughput_tok_s", "p50_s", "p95_s", "p99_s", "ttft_p50_s", "ttft_p95_s")
    return [
        row["system"],
        f"**{cap}**" if best[row["system"]] is row else cap,
        *(_number(row[key]) for key in keys),
        _percent(row["hit_ratio"]),
        _number(row.get("run_prompt_tokens")),
        str(row["errors"]),
        str(row["repeats"]),
    ]


def _client_cells(row: Row) -> list[str]:
    keys = ("requests_per_s", "throughput_tok_s", "p50_s", "p95_s", "ttft_p50_s", "ttft_p95_s")
    return [row["system"], *(_number(row[key]) for key in keys), str(row["completed"])]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(map(str, line))} |" for line in (header, rule, *rows)]

"""The CPU attention kernels beside SDPA: `python benchmarks/attention.py [--threads N]`.

Interleaved in one process, medians of several rounds. Shapes of a 135M model with four
conversations: the base's causal prefill (forward only), a chunk of 256 tokens after a past of 1024
(forward only), a decoder's response over the prompt cache (forward and backward), and a decoding
step of 16 rows, with and without the query heads of one K/V head folded into its queries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prefillshare_train.core import kernels

BATCH, HEADS, KV_HEADS, DIM = 4, 9, 3, 64
PROMPT, RESPONSE = 512, 64
CHUNK, CHUNK_PAST = 256, 1024
STEP_ROWS = 16
BLOCKS = (32, 64, 128, 256, 512)


def rows(heads: int, tokens: int, dtype: torch.dtype, grad: bool) -> Tensor:
    return torch.randn(heads, BATCH, tokens, DIM, dtype=dtype, requires_grad=grad)


def prefill_case(dtype: torch.dtype) -> Callable[[Callable[..., Tensor]], None]:
    query, key, value = (rows(h, PROMPT, dtype, False) for h in (HEADS, KV_HEADS, KV_HEADS))

    def run(route: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            route(query, key, value, None, DIM**-0.5, 0.0, None, None)

    return run


def chunk_case(dtype: torch.dtype) -> Callable[[Callable[..., Tensor]], None]:
    query, key, value = (rows(h, CHUNK, dtype, False) for h in (HEADS, KV_HEADS, KV_HEADS))
    past = (rows(KV_HEADS, CHUNK_PAST, dtype, False), rows(KV_HEADS, CHUNK_PAST, dtype, False))

    def run(route: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            route(query, key, value, past, DIM**-0.5, 0.0, None, None)

    return run


def response_case(dtype: torch.dtype) -> Callable[[Callable[..., Tensor]], None]:
    query, key, value = (rows(h, RESPONSE, dtype, True) for h in (HEADS, KV_HEADS, KV_HEADS))
    past = (rows(KV_HEADS, PROMPT, dtype, False), rows(KV_HEADS, PROMPT, dtype, False))

    def run(route: Callable[..., Tensor]) -> None:
        route(query, key, value, past, DIM**-0.5, 0.0, None, None).sum().backward()

    return run


def blocked(size: int) -> Callable[..., Tensor]:
    def route(*arguments: object) -> Tensor:
        kernels._QUERY_BLOCK = size
        return kernels._attend_blocks(*arguments)  # type: ignore[arg-type]

    return route


def decoding_step(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One query a row over `PROMPT` tokens of K/V."""
    query, key, value = (
        torch.randn(STEP_ROWS, heads, length, DIM, dtype=dtype)
        for heads, length in ((HEADS, 1), (KV_HEADS, PROMPT), (KV_HEADS, PROMPT))
    )
    mask = torch.ones(STEP_ROWS, 1, 1, PROMPT, dtype=torch.bool)
    return {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        ),
        "folded": lambda: kernels.masked_attention(query, key, value, mask, DIM**-0.5),
    }


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> list[str]:
    """Milliseconds of each, as text."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - start)
    return [f"{statistics.median(values) * 1e3:.1f}" for values in times.values()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    routes = {"sdpa": kernels._attend_sdpa, **{f"blocks of {b}": blocked(b) for b in BLOCKS}}
    table = Table(title=f"median ms, {options.threads} threads")
    for column in ("case", *routes):
        table.add_column(column, justify="right")
    cases = {"prefill": prefill_case, "chunk": chunk_case, "response": response_case}
    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        for name, make in cases.items():
            run = make(dtype)
            runs = {n: partial(run, attend) for n, attend in routes.items()}
            table.add_row(
                f"{name} {str(dtype).removeprefix('torch.')}", *medians(runs, options.rounds)
            )
    Console(width=110).print(table)
    table = Table(title=f"a decoding step of {STEP_ROWS} rows, median ms")
    for column in ("dtype", "sdpa, enable_gqa", "folded"):
        table.add_column(column, justify="right")
    for dtype in (getattr(torch, name) for name in options.dtypes.split(",")):
        name = str(dtype).removeprefix("torch.")
        table.add_row(name, *medians(decoding_step(dtype), options.rounds))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

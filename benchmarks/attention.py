"""The CPU attention kernel beside SDPA: `python benchmarks/attention.py [--threads N]`.

Interleaved in one process, medians of several rounds. Two shapes of a 135M model with four
conversations: the base's causal prefill (forward only), and a decoder's response over the prompt
cache (forward and backward).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prefillshare_train.core import kernels

BATCH, HEADS, KV_HEADS, DIM = 4, 9, 3, 64
PROMPT, RESPONSE = 512, 64
BLOCKS = (32, 64, 128, 256, 512)


def rows(heads: int, tokens: int, dtype: torch.dtype, grad: bool) -> Tensor:
    return torch.randn(heads, BATCH, tokens, DIM, dtype=dtype, requires_grad=grad)


def prefill_case(dtype: torch.dtype) -> Callable[[Callable[..., Tensor]], None]:
    query, key, value = (rows(h, PROMPT, dtype, False) for h in (HEADS, KV_HEADS, KV_HEADS))

    def run(route: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            route(query, key, value, None, DIM**-0.5, 0.0, None, None)

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    routes = {"sdpa": kernels._attend_sdpa, **{f"blocks of {b}": blocked(b) for b in BLOCKS}}
    table = Table(title=f"median ms, {options.threads} threads")
    for column in ("case", *routes):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in (("prefill", prefill_case), ("response", response_case)):
            run = make(dtype)
            times: dict[str, list[float]] = {route: [] for route in routes}
            for number in range(options.rounds + 2):
                for route, attend in routes.items():
                    start = time.perf_counter()
                    run(attend)
                    if number >= 2:  # the first rounds warm up
                        times[route].append(time.perf_counter() - start)
            medians = [f"{statistics.median(values) * 1e3:.1f}" for values in times.values()]
            table.add_row(f"{name} {str(dtype).removeprefix('torch.')}", *medians)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

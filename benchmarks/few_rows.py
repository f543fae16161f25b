"""Linear layers of a decoding step: `F.linear` beside `core.few_rows.linear`.

    python benchmarks/few_rows.py [--rows 1,2,3,4,8,16,32,64] [--repeats 15]

The shapes of a 135M model's layers and its LM head, in float32 on CPU. Each shape has as many
weights as lie outside the caches. Interleaved, medians; milliseconds a product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prefillshare_train.core import few_rows
from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine

SHAPES = {"attention": (576, 576), "up": (576, 1536), "down": (1536, 576), "head": (576, 49152)}
CACHES = 128 << 20  # bytes, more than a processor's last cache
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "few rows": few_rows.linear,
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,2,3,4,8,16,32,64")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/few_rows.json"))
    options = parser.parse_args()
    few_rows.MOST_ROWS = max(counts := [int(n) for n in options.rows.split(",")])
    result: dict[str, dict[int, dict[str, float]]] = {}
    with torch.inference_mode():
        for shape, (width, out) in SHAPES.items():
            weights = torch.randn(max(1, CACHES // (4 * width * out)), out, width)
            times: dict[tuple[int, str], list[float]] = {}
            for repeat in range(options.repeats + 1):
                for rows in counts:
                    x = torch.randn(rows, width)
                    for name, way in WAYS.items():
                        start = time.perf_counter()
                        for weight in weights:
                            way(x, weight)
                        spent = 1e3 * (time.perf_counter() - start) / len(weights)
                        if repeat:
                            times.setdefault((rows, name), []).append(spent)
            result[shape] = {
                rows: {name: statistics.median(times[rows, name]) for name in WAYS}
                for rows in counts
            }
            for rows, found in result[shape].items():
                shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items())
                print(f"{shape}, {rows} rows: {shown}", flush=True)
    write_json(options.out, {"machine": machine(), "ms": result})


if __name__ == "__main__":
    main()

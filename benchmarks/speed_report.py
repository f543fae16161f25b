"""Rows of the training benchmark as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
_PANEL = ("model", "adapter", "checkpointing", "dtype")
_COLOURS = {"sft": "#8a8a8a", "trl": "#4c78a8", "alora": "#f2a33a", "prefillshare": "#2a9d5c"}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, then move it there: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    write(beside)
    beside.replace(path)


def write_json(rows: list[Row], path: Path) -> None:
    """The rows as a JSON list."""
    text = json.dumps(rows, indent=1) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))


def print_table(rows: list[Row], console: Console) -> None:
    """One line a row, settings that repeat left blank."""
    table = Table(caption=_CAPTION)
    for name in ("model", "adapter", "ckpt", "dtype", "P/R", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("resp tok/s", "ratio", "bound", "/ bound", "MiB", "/ sft", "loss 0"):
        table.add_column(name, justify="right")
    for name in ("GFLOP/s", "matmul"):
        table.add_column(name, justify="right")
    previous: tuple[str, ...] = ()
    for row in rows:
        setting = (
            row["model"],
            row["adapter"],
            "yes" if row["checkpointing"] else "no",
            row["dtype"],
            row["workload"],
        )
        if previous and setting != previous:
            table.add_section()
        table.add_row(
            *(setting if setting != previous else ("",) * len(setting)),
            row["method"],
            f"{row['response_tokens_per_s']:.1f}",
            f"{row['ratio_to_sft']:.2f}",
            f"{row['flop_bound']:.2f}",
            f"{row['ratio_to_sft'] / row['flop_bound']:.2f}",
            f"{row['peak_memory_mib']:.0f}",
            f"{row['peak_memory_to_sft']:.2f}",
            f"{row['step0_loss']:.4f}",
            f"{row['gflops']:.0f}",
            f"{row['matmul_share']:.2f}",
        )
        previous = setting
    console.print(table)


_CAPTION = (
    "ratio: step time of sft / that of the method. bound: the same by FLOPs. GFLOP/s: FLOPs that "
    "the method needs over the time of its forward and backward passes; matmul: their share of "
    "what a plain matrix product reached in the same rounds. MiB: peak "
    "resident memory of a step in a process of its own, libraries included."
)


def write_plot(rows: list[Row], path: Path) -> None:
    """Ratio to sft by method and shape, one panel a setting, the FLOP bound as a black mark."""
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] for key in _PANEL), []).append(row)
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for axes, (setting, members) in zip(grid.flat, panels.items(), strict=False):
        model, adapter, checkpointing, dtype = setting
        _draw_panel(axes, members)
        kind = "full" if adapter == "none" else adapter
        extra = ", checkpointing" if checkpointing else ""
        axes.set_title(f"{model}\n{kind}, {dtype}{extra}", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(panels)]:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.supylabel("speed relative to sft")
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=140))
    plt.close(figure)


def _draw_panel(axes: Any, rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["workload"] for row in rows))
    methods = [m for m in _COLOURS if any(row["method"] == m for row in rows)]
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        left = [
            names.index(row["workload"]) + (place - (len(methods) - 1) / 2) * width for row in mine
        ]
        axes.bar(
            left, [row["ratio_to_sft"] for row in mine], width, color=_COLOURS[method], label=method
        )
        if method == "prefillshare":
            bounds = [row["flop_bound"] for row in mine]
            axes.scatter(
                left, bounds, marker="_", s=250, color="black", zorder=3, label="FLOP bound"
            )
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linewidth=0.5)

"""Plots of a comparison, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefillshare_train.evaluation.compare import Comparison, Result


def plot_scores(comparison: Comparison, folder: Path) -> list[Path]:
    """Score by task, one bar a decoder, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 2 * len(comparison.tasks)), 4), layout="constrained")
    axes = figure.subplots()
    names = comparison.names
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        cells = [(i, comparison.cell(name, t)) for i, t in enumerate(comparison.tasks)]
        found = [(i + number * width, cell) for i, cell in cells if cell is not None]
        axes.bar(
            [x for x, _ in found],
            [100 * cell.row["score"] for _, cell in found],
            width,
            yerr=_errors([cell for _, cell in found]),
            capsize=2,
            label=name,
        )
    middle = width * (len(names) - 1) / 2
    axes.set_xticks([i + middle for i in range(len(comparison.tasks))], comparison.tasks)
    axes.set_ylabel("answered right, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, folder / "scores")


def plot_sharing(comparison: Comparison, folder: Path) -> list[Path]:
    """Score against sharing ratio, one line a decoder and task; nothing where no ratio varies."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], list[Result]] = {}
    for result in comparison.results:
        if result.row["sharing_ratio"] is not None and result.row["label"] != "base":
            lines.setdefault((result.task, result.row["decoder"]), []).append(result)
    lines = {key: found for key, found in lines.items() if len(found) > 2}
    if not lines:
        return []
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (task, decoder), found in lines.items():
        found.sort(key=lambda r: r.row["sharing_ratio"])
        axes.errorbar(
            [r.row["sharing_ratio"] for r in found],
            [100 * r.row["score"] for r in found],
            yerr=_errors(found),
            marker="o",
            capsize=2,
            label=f"{decoder}: {task}",
        )
    axes.set_xlabel("sharing ratio: share of the prompt whose K/V come from the base")
    axes.set_ylabel("answered right, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, folder / "sharing_ratio")


def _errors(results: list[Result]) -> list[list[float]]:
    scores = [100 * r.row["score"] for r in results]
    low = [max(0.0, s - 100 * r.row["ci95"][0]) for s, r in zip(scores, results, strict=True)]
    high = [max(0.0, 100 * r.row["ci95"][1] - s) for s, r in zip(scores, results, strict=True)]
    return [low, high]


def _save(figure: Any, stem: Path) -> list[Path]:
    paths = []
    for kind in ("png", "svg"):
        path = stem.with_suffix(f".{kind}")
        beside = path.with_name(f".unfinished-{path.name}")
        figure.savefig(beside, format=kind, dpi=150)
        beside.replace(path)
        paths.append(path)
    return paths

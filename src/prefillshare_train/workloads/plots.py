"""Plots of load points, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefillshare_train.workloads.files import write_with
from prefillshare_train.workloads.report import Row, best

_COLOURS = {"shared": "#2a9d5c", "isolated": "#8a8a8a"}
_AXES = {
    "sessions_per_s": "sessions arriving per second",
    "max_sessions": "sessions at once",
    "decoders": "decoders",
}
_FIGURES = {
    "throughput_tok_s": "response tokens per second",
    "p95_s": "p95 of a session, s",
    "ttft_p95_s": "p95 of TTFT, s",
    "hit_ratio": "hits (thin: at most)",
}


def plot_loads(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Throughput, latency and hits against every axis that varies, one panel a workload and regime.

    Args:
        stem: the files are `{stem}_{axis}.png` and `.svg`.

    Returns:
        The files; none for an axis along which fewer than two loads lie.
    """
    paths: list[Path] = []
    for axis, label in _AXES.items():
        usable = [row for row in rows if row[axis] is not None]
        if len({row[axis] for row in usable}) > 1:
            paths += _plot_axis(usable, axis, label, folder / f"{stem}_{axis}")
    return paths


def plot_lines(
    lines: dict[str, list[tuple[float, float]]], labels: tuple[str, str], stem: Path
) -> list[Path]:
    """Plain lines: points of each name, with the labels of x and y."""
    figure = _figure((7, 4))
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return save(figure, stem)


def plot_gain_map(
    gains: dict[int, dict[tuple[int, int], float]], stem: Path, what: str = "throughput"
) -> list[Path]:
    """Heat maps of shared over isolated, one panel a number of decoders.

    Args:
        gains: by number of decoders, then by (prompt tokens, response tokens).
        what: the figure that is compared.
    """
    import numpy as np

    figure = _figure((3.4 * len(gains) + 1, 3.6))
    panels = figure.subplots(1, len(gains), squeeze=False)[0]
    prompts = sorted({prompt for cells in gains.values() for prompt, _ in cells})
    responses = sorted({response for cells in gains.values() for _, response in cells})
    top = max(value for cells in gains.values() for value in cells.values())
    for axes, (decoders, cells) in zip(panels, sorted(gains.items()), strict=True):
        grid = np.array([[cells.get((p, r), np.nan) for r in responses] for p in prompts])
        picture = axes.imshow(grid, vmin=1, vmax=max(top, 1.01), cmap="YlGn", origin="lower")
        for (line, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if value > (1 + top) / 2 else "black"
                axes.text(column, line, f"{value:.2f}", color=colour, ha="center", va="center")
        axes.set_xticks(range(len(responses)), responses)
        axes.set_yticks(range(len(prompts)), prompts)
        axes.set_xlabel("response tokens")
        axes.set_title(f"{decoders} decoder{'s' if decoders > 1 else ''}", fontsize=9)
    panels[0].set_ylabel("prompt tokens")
    figure.colorbar(picture, ax=list(panels), label=f"{what}, shared / isolated")
    return save(figure, stem)


def save(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as `stem`.png and .svg, each complete or not at all."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        write_with(path, lambda beside: figure.savefig(beside, format=beside.suffix[1:], dpi=150))
    return paths


def _plot_axis(rows: Sequence[Row], axis: str, label: str, stem: Path) -> list[Path]:
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["workload"], row["regime"]), []).append(row)
    figure = _figure((3.4 * len(_FIGURES), 2.8 * len(panels)))
    grid = figure.subplots(len(panels), len(_FIGURES), squeeze=False)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    legend: dict[str, Any] = {}
    for line, ((workload, regime), members) in zip(grid, panels.items(), strict=True):
        for axes, (key, title) in zip(line, _FIGURES.items(), strict=True):
            _draw(axes, members, variants, axis, key)
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(text, handle)
            axes.set_title(f"{workload}, {regime}: {title}", fontsize=8)
            axes.set_xlabel(label, fontsize=8)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
    return save(figure, stem)


def _draw(axes: Any, rows: Sequence[Row], variants: list[str], axis: str, key: str) -> None:
    styles = ("-", "--", ":", "-.")
    for mode, colour in _COLOURS.items():
        for number, variant in enumerate(variants):
            style = styles[number % len(styles)]
            mine = [r for r in rows if r["mode"] == mode and r["variant"] == variant]
            points = _best_along([r for r in mine if r[key] is not None], axis, key)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    linestyle=style,
                    color=colour,
                    label=f"{mode} {variant}".strip(),
                )
            if key == "hit_ratio":
                limit = _best_along([r for r in mine if r["hit_ratio_max"]], axis, "hit_ratio_max")
                if limit:
                    thin = {"linewidth": 0.8, "color": colour, "alpha": 0.5}
                    axes.plot(*zip(*limit, strict=True), linestyle=style, **thin)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _best_along(rows: Sequence[Row], axis: str, key: str) -> list[tuple[float, float]]:
    """One point a place on the axis: of the best row there."""
    places: dict[float, list[Row]] = {}
    for row in rows:
        places.setdefault(row[axis], []).append(row)
    chosen = {place: best(there) for place, there in places.items()}
    return [(place, row[key]) for place, row in sorted(chosen.items()) if row is not None]


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")

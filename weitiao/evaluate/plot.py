"""Loss curves as PNG.

    curves(run.metrics(), run.path / "loss.png")

The labels are ASCII, so that no font is needed that a machine may lack; nothing global in matplotlib is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weitiao.runs import write_atomic

SMOOTHED_OVER = 0.05  # share of the run over which the training loss is averaged for its bold line


def curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the training and validation loss of ``metrics`` (lines of metrics.jsonl) over the steps, and below them the
    other validation measures that lie between 0 and 1, if there are any; written to ``path``, which is returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [(line["step"], line["loss"]) for line in metrics if _finite(line.get("loss"))]
    validated = _measures(metrics)
    losses = validated.pop("loss", [])
    shares = {name: points for name, points in validated.items() if all(0 <= value <= 1 for _, value in points)}
    figure = Figure(figsize=(7, 6 if shares else 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if shares else 1, 1, sharex=True, squeeze=False)[:, 0]
    _lines(axes[0], trained, losses)
    for name, points in shares.items():
        axes[1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    if shares:
        axes[1].set(ylabel="validation", ylim=(-0.02, 1.02))
        axes[1].legend(fontsize="small")
    axes[-1].set_xlabel("step")
    for ax in axes:
        ax.grid(alpha=0.3)
    return _png(figure, path)


def scatter(points: Mapping[str, tuple[float, float]], path: str | Path, across: str, up: str) -> Path:
    """Draw named points (x, y), x on a logarithmic axis; written to ``path``, which is returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for name, (x, y) in points.items():
        ax.plot(x, y, marker="o")
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize="small")
    ax.set(xlabel=across, ylabel=up, xscale="log")
    ax.grid(alpha=0.3)
    return _png(figure, path)


def scaling(curves: Mapping[str, Sequence[tuple[float, float, float]]], path: str | Path) -> Path:
    """Draw (tokens, loss, loss by the law) of each size, tokens on a logarithmic axis; written to ``path``, which is
    returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for name, points in curves.items():
        tokens, losses, fitted = zip(*sorted(points), strict=True)
        (line,) = ax.plot(tokens, fitted, label=name, marker="x")
        ax.plot(tokens, losses, color=line.get_color(), marker="o", linestyle="")
    ax.set(xlabel="tokens", ylabel="validation loss (o measured, x by the law)", xscale="log")
    ax.legend(fontsize="small", title="parameters")
    ax.grid(alpha=0.3)
    return _png(figure, path)


def intervals(figures: Mapping[str, Mapping[str, Any]], path: str | Path, across: str) -> Path:
    """Draw the value of each name with its interval, one below the other; written to ``path``, which is returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.4 * len(figures)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for place, one in enumerate(figures.values()):
        low, high = one.get("low", one["value"]), one.get("high", one["value"])
        ax.plot((low, high), (place, place), color="tab:blue", linewidth=2)
        ax.plot(one["value"], place, color="tab:blue", marker="o")
    names = [name if name.isascii() else str(number) for number, name in enumerate(figures, 1)]
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=across, ylim=(len(names) - 0.5, -0.5))
    ax.grid(alpha=0.3, axis="x")
    return _png(figure, path)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> Path:
    """Draw how often texts of a class (rows) were taken for one (columns); classes whose names no font may have are
    numbered. Written to ``path``, which is returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(labels) if all(label.isascii() for label in labels) else [str(n) for n in range(len(labels))]
    side = max(4.0, 0.6 * len(names) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            ink = "white" if shares[row][column] > 0.5 else "black"
            ax.text(column, row, str(count), ha="center", va="center", color=ink, fontsize="small")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted", ylabel="true")
    return _png(figure, path)


def reliability(bins: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw accuracy over confidence, with the line on which both are equal; written to ``path``, which is returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.plot((0, 1), (0, 1), color="gray", linestyle=":")
    ax.plot([one["confidence"] for one in bins], [one["accuracy"] for one in bins], marker="o")
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.grid(alpha=0.3)
    return _png(figure, path)


def _png(figure: Any, path: str | Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())
    return Path(path)


def _lines(ax: Any, trained: Sequence[tuple[int, float]], losses: Sequence[tuple[int, float]]) -> None:
    ax.set_ylabel("loss")
    if trained:
        steps, values = zip(*trained, strict=True)
        ax.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        ax.plot(steps, smoothed(values), color="tab:blue", label="training")
    if losses:
        ax.plot(*zip(*losses, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    if trained or losses:
        ax.legend(fontsize="small")


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it within a window of ``SMOOTHED_OVER`` of them."""
    window = max(1, round(len(values) * SMOOTHED_OVER))
    return [
        math.fsum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])
    ]


def _measures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every validation measure."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in (line.get("validation") or {}).items():
            if _finite(value):
                found.setdefault(name, []).append((line["step"], value))
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

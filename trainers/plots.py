"""Pictures of runs and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (4.2, 2.8)):
    """A matplotlib figure and its axes ``[rows, columns]``, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained", dpi=120)
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def curves(history: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Draws every metric of a run against its step, one panel a metric, phases one after the other."""
    series: dict[str, list[tuple[int, float]]] = {}
    points: dict[str, int] = {}
    offset, last_phase, last_step = 0, None, 0
    for entry in history:
        if entry["phase"] != last_phase and last_phase is not None:
            offset += last_step
        last_phase, last_step = entry["phase"], entry["step"]
        for k, v in entry.items():
            if k not in ("phase", "step") and isinstance(v, (int, float)):
                series.setdefault(k, []).append((offset + entry["step"], v))
                points[k] = points.get(k, 0) + 1
    drawn = [k for k in series if len(series[k]) > 1] or list(series)
    if not drawn:
        return
    columns = min(3, len(drawn))
    fig, axes = figure(columns, -(-len(drawn) // columns))
    for axis, name in zip(axes.ravel(), drawn, strict=False):
        x, y = np.array(series[name], float).T
        axis.plot(x, y, color="#3060a0", linewidth=1.2, marker="." if len(x) < 40 else None)
        finite = y[np.isfinite(y)]
        if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 100:
            axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.ravel()[len(drawn) :]:
        axis.set_axis_off()
    fig.suptitle(title, fontsize=10)
    save(fig, file)


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images ``[N, H, W]`` as one array with a one-pixel border."""
    n, h, w = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1), images.min() if n else 0.0, images.dtype)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        sheet[top : top + h, left : left + w] = image
    return sheet


def save(fig, file: Path) -> None:
    """Writes a figure whole or not at all."""
    scratch = file.with_name(f".{file.name}.tmp.png")
    try:
        fig.savefig(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)

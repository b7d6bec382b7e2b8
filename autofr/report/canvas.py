"""What all pictures share: an empty figure in the house style, and its colours.

The colours are those of the page in its light theme: the style sheet is the one place that has
them. Nothing here or in the pictures touches pyplot or other global state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

STYLE_SHEET = Path(__file__).parent / "templates" / "page.css"
MARKERS = {  # of matplotlib, by what `svg.MARKERS` calls them
    "square": "s", "circle": "o", "up": "^", "down": "v", "diamond": "D", "cross": "X", "star": "*",
}  # fmt: skip
DPI = 150


@cache
def colours() -> dict[str, str]:
    """Colours of the page's light theme, `#rrggbb` or `#rgb`, by their names in its style sheet."""
    light = STYLE_SHEET.read_text(encoding="utf-8").split("}", 1)[0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]+)", light))


INK, SOFT, LINE = (colours()[name] for name in ("ink", "soft", "line"))
STYLE: dict[str, Any] = {
    "figure.dpi": DPI, "font.size": 9, "text.color": INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
}  # fmt: skip


@contextmanager
def picture(
    path: Path, width: float, height: float, title: str = "", layout: Any = "constrained"
) -> Iterator[Figure]:
    """Hand out an empty figure (inches) in the house style, and save it at the end.

    It is drawn once: matplotlib's own way to save draws all of it twice.
    """
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure((width, height), layout=layout)
        canvas = FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=11, weight="bold")
        yield figure
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
    Image.fromarray(pixels).convert("RGB").save(path, dpi=(DPI, DPI))


def label(ax: Axes, of: str, places: list[float], texts: list[str]) -> None:
    """Put ticks of an axis ("x" or "y") at places, with these texts and no others."""
    axis = ax.xaxis if of == "x" else ax.yaxis
    axis.set_ticks(places, texts)
    axis.set_ticks([], minor=True)

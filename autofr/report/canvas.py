"""What all pictures share: an empty figure in the house style, its colours, and plain numbers.

Nothing here or in the pictures touches pyplot or other global state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1F2933"
SHADES = (  # of masks and kinds: Okabe and Ito's, then Tol's
    "#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#F0E442",
    "#332288", "#117733", "#AA4499", "#999933", "#661100", "#6699CC", "#DDCC77",
)  # fmt: skip
STYLE: dict[str, Any] = {
    "savefig.dpi": 150, "figure.dpi": 150, "font.size": 9, "text.color": INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8A9199",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E8ECEF", "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
}  # fmt: skip


@contextmanager
def picture(
    path: Path, width: float, height: float, title: str = "", layout: Any = "constrained"
) -> Iterator[Figure]:
    """Hand out an empty figure (inches) in the house style, and save it at the end."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure((width, height), layout=layout)
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=11, weight="bold")
        yield figure
        figure.savefig(path)


def plain_numbers(ax: Axes) -> None:
    """Label a logarithmic y axis with 1, 2, 5 of each power of ten, or all on a short one."""
    low, high = ax.get_ylim()
    digits = "125" if high / low > 8 else "123456789"
    for put in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        put(lambda y, _: f"{y:.6g}" if f"{y:.0e}"[0] in digits else "")

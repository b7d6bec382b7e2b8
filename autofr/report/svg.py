"""Hand-written SVG: nodes, marks that say their values, and the ticks of axes.

A drawing is a tree of elements, so that whatever stands in a file can only become text or the
value of an attribute, never markup. Colours are classes: the page's style sheet has them for light,
dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

MARKERS = {  # paths around (0, 0), about 10 wide
    "square": "M-4.5-4.5h9v9h-9z",
    "circle": "M-4.8 0a4.8 4.8 0 1 0 9.6 0a4.8 4.8 0 1 0-9.6 0z",
    "up": "M0-5.6L5.4 4.2H-5.4z",
    "down": "M0 5.6L5.4-4.2H-5.4z",
    "diamond": "M0-6L5.2 0L0 6L-5.2 0z",
    "cross": "M-4.6-3L-3-4.6L0-1.6L3-4.6L4.6-3L1.6 0L4.6 3L3 4.6L0 1.6L-3 4.6L-4.6 3L-1.6 0z",
    "star": "M0-9.5L2.4-3.2L9-2.9L3.8 1.2L5.6 7.7L0 4L-5.6 7.7L-3.8 1.2L-9-2.9L-2.4-3.2z",
}


def drawing(box: Sequence[float], label: str, kind: str = "", stretch: bool = False) -> Element:
    """An empty drawing; `box` is (x, y, width, height) of its own units.

    It takes the width of the page. `stretch` lets its height be set freely; it has no text then.
    """
    root = Element("svg", {"viewBox": " ".join(map(_written, box)), "class": f"drawing {kind}"})
    root.attrib |= {"role": "img", "aria-label": label, "tabindex": "0"}
    if stretch:
        root.set("preserveAspectRatio", "none")
    return root


def node(parent: Element, tag: str, text: str = "", **attributes: object) -> Element:
    """Add an element; `kind` is its class, and `_` in names of attributes stands for `-`."""
    names = {"kind": "class"}
    written = {names.get(k, k.replace("_", "-")): _written(v) for k, v in attributes.items()}
    found = SubElement(parent, tag, written)
    found.text = text or None
    return found


def mark(parent: Element, says: str) -> Element:
    """Add a group that says its value: to the pointer, and to the page's script."""
    group = node(parent, "g", kind="mark")
    node(group, "title", says)
    return group


def rect(parent: Element, place: Sequence[float], kind: str) -> None:
    """Add a rectangle (x, y, width, height)."""
    x, y, width, height = place
    node(parent, "rect", x=x, y=y, width=width, height=height, kind=kind)


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return str(value)


# -- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto places from `start` to `end`, by logarithm or not."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside stands at the edge."""
        low, high, value = map(self._scaled, (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, most: int = 7) -> list[float]:
        """Round values within the axis, at most about `most`."""
        if self.log and self.high > 12 * self.low:
            return self._decades(most)
        rough = (self.high - self.low) / max(1, most - 1)
        if rough <= 0:
            return [self.low]
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= 0.999 * rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _decades(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            all_of = [digit * 10.0**power for power in powers for digit in digits]
            found = [value for value in all_of if self.low <= value <= self.high]
            if len(found) <= most + 2:
                break
        return found


def around(values: Sequence[float], log: bool = False, room: float = 0.06) -> tuple[float, float]:
    """The range of values with some room at both ends."""
    low, high = min(values), max(values)
    if log:
        factor = max(high / low, 1.02) ** room
        return low / factor, high * factor
    more = room * (high - low) or room * abs(high) or room
    return low - more, high + more

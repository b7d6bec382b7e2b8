"""From values to one self-contained HTML file: templates, style and script of the pages.

Everything is escaped but drawings, which are trees of elements. The page's own policy allows no
request to anywhere, and no script but the one that is in it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import jinja2
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """The text of a page; `template` is a name in `templates/`, without its ending."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _draw(drawing: Element) -> Markup:
    return Markup(tostring(drawing, encoding="unicode"))


@cache
def _environment() -> jinja2.Environment:
    templates = Path(__file__).parent / "templates"
    script = (templates / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["draw"] = _draw
    found.globals["script"] = Markup(script)  # ours, as the file has it
    found.globals["style"] = Markup((templates / "page.css").read_text(encoding="utf-8").strip())
    found.globals["script_digest"] = f"'sha256-{digest}'"
    return found

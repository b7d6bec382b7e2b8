"""The table of what is supported is the registry's, not somebody's claim."""

from __future__ import annotations

from pathlib import Path

import support


def test_the_page_is_up_to_date() -> None:
    """`docs/support.md` is what the registry and the suite say today."""
    page = Path(__file__).parents[2] / "docs" / "support.md"
    assert page.read_text(encoding="utf-8") == support.text()

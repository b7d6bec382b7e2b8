"""Tells what was found: Markdown, pictures and one self-contained page."""

"""The progress bar of a pipe, watched: a run ends where the sampling loop does, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

BAR = "progress_bar"


def watch(pipe: Any, stop: Callable[[], None]) -> bool:
    """Call `stop` where the pipe's sampling loop ends; False for a pipe without a bar."""
    original = getattr(pipe, BAR, None)
    if original is not None:
        setattr(pipe, BAR, lambda *args, **kwargs: _Bar(original(*args, **kwargs), stop))
    return original is not None


def unwatch(pipe: Any) -> None:
    """Undo `watch`."""
    delattr(pipe, BAR)


class _Bar:
    """A pipeline's progress bar that ends the run with the loop, also when the loop raises."""

    def __init__(self, bar: Any, stop: Callable[[], None]) -> None:
        self._bar, self._stop = bar, stop

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._stop()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._stop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

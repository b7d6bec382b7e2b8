"""Files that are there whole or not at all, and files that one process at a time holds."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file, atomically: a kill or a full disk leaves the old one or the new one.

    Raises: OSError where it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a process of the same number that was killed
    try:
        with part.open("xb") as file:  # so that no link that waits there is followed
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, patience: float = 0.0, look: bool = False) -> Iterator[bool]:
    """Hold a lock file inside the block; False where another process holds it.

    It is waited for up to `patience` seconds, and let go when its process ends, however that
    happens. With `look` nothing is made or held against others who look.
    Raises: OSError where the file cannot be opened.
    """
    way, kind = (os.O_RDONLY, fcntl.LOCK_SH) if look else (os.O_CREAT | os.O_RDWR, fcntl.LOCK_EX)
    file = os.open(path, way, 0o644)
    until = time.monotonic() + patience
    try:
        while not (taken := _take(file, kind)) and time.monotonic() < until:
            time.sleep(0.05)
        yield taken
    finally:
        os.close(file)


def _take(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

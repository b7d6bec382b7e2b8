"""Places that commands write to: what cannot be written is refused before any work."""

from __future__ import annotations

from pathlib import Path

from autofr.errors import RunFolderError, UserError


def folder(out: Path) -> Path:
    """Return a folder that can be written, made if it is missing.

    Raises: RunFolderError with the reason.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".autofr-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"{out}: cannot write there ({error.strerror}); give another place with --out"
        ) from None
    return out


def file(out: Path, kind: str = "") -> Path:
    """Return the place of a file that can be written; its folder is made if it is missing.

    `kind` is the ending that the name must have, such as `.png`.
    Raises: UserError when it is a folder or of another kind; RunFolderError when its folder cannot
        be written.
    """
    if out.is_dir() or (kind and out.suffix.lower() != kind):
        what = f"a {kind[1:].upper()} file, such as samples{kind}" if kind else "a file"
        raise UserError(f"--out {out}: expected the name of {what}")
    folder(out.resolve().parent)
    return out

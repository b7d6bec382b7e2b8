"""The exception tree: one root class, one class per kind of refusal."""

from __future__ import annotations

import re


class AutofrError(Exception):
    """Root of every error that autofr raises on purpose."""

    exit_code = 1


class UserError(AutofrError, ValueError):
    """The request cannot be met as written; the message says what to change."""

    exit_code = 2


class BudgetError(UserError):
    """A budget that cannot be read or cannot be met."""


class ModelError(UserError):
    """A model that cannot be found, loaded or searched."""


class PolicyError(UserError):
    """A policy file that is not valid, or not valid for this pipe."""


class InterchangeError(UserError):
    """A schedule of another tool that cannot be read, or a policy that it cannot express."""


class TaskError(UserError):
    """Inputs or call arguments that a pipe cannot draw from."""


class SpaceError(UserError):
    """A search-space file that is not valid."""


class JobsError(UserError):
    """A job file that is not valid, or jobs that cannot be started."""


class HubError(UserError):
    """A place on the Hugging Face hub that cannot be read or written."""


class RunFolderError(UserError):
    """A results folder that cannot be written, is in use, or holds another run."""


class StorageError(UserError):
    """A database that cannot be reached or used, or a study in it that is another's."""


class MeasurementError(AutofrError):
    """A measurement gave no usable number (NaN from the model, latency that does not settle)."""


def brief(value: object, most: int = 80) -> str:
    """A value as a message quotes it: on one line, its middle left out where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits; lists in lists in lists
        text = f"a very large {type(value).__name__}"
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


_SECRETS = [
    re.compile(f"({before})({secret})")
    for before, secret in (
        (r"https?://", r"[^\s/@]+(?=@)"),  # a name alone may be a token
        (r"://[^\s:/@]*:", r"\S*(?=@)"),
        (r"(?i:password)=", r"[^\s&'\"]+"),
        (r"Bearer ", r"[^\s'\"]{8,}"),
        (r"\bhf_", r"[A-Za-z0-9]{20,}"),
    )
]
"""What comes before a secret, and the secret."""


def redacted(text: str, address: str = "") -> str:
    """A text without the passwords of addresses and the tokens of the hub.

    Of the password in `address` nothing that the text quotes is left: a driver that cannot read an
    address quotes the part that it stumbled over.
    """
    secrets = [found[2] for pattern in _SECRETS for found in pattern.finditer(address)]
    for quoted in [*secrets, *re.findall(r'"([^"]+)"', text)]:
        if any(quoted in secret for secret in secrets):
            text = text.replace(f'"{quoted}"', '"***"')
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def damaged(path: object) -> RunFolderError:
    """Say that a file of a run cannot be read, and what to do about it."""
    return RunFolderError(
        f"{path}: damaged, or of another version of autofr; delete it and give the same command"
        " again"
    )

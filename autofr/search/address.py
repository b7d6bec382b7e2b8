"""Addresses of databases: which can hold a shared study; telling them without passwords."""

from __future__ import annotations

import re

from autofr.errors import StorageError

ENVIRONMENT = "AUTOFR_STORAGE"
_SECRETS = (
    (re.compile(r"(://[^\s:/@]*:)(\S*)@"), r"\1***@"),
    (re.compile(r"(password=)([^\s&'\"]+)", re.IGNORECASE), r"\1***"),
)


def redacted(text: str, address: str = "") -> str:
    """A text, with the passwords of all addresses in it left out.

    Of the password in `address` nothing that the text quotes is left: a driver that cannot read an
    address quotes the part that it stumbled over.
    """
    secrets = [found[2] for pattern, _ in _SECRETS for found in pattern.finditer(address)]
    for quoted in [*secrets, *re.findall(r'"([^"]+)"', text)]:
        if any(quoted in secret for secret in secrets):
            text = text.replace(f'"{quoted}"', '"***"')
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def checked(address: str) -> str:
    """The address of a PostgreSQL database, as it is connected to.

    Raises: StorageError for another kind of database, with the reason.
    """
    if re.search(r"\s", address):  # where its password ends could not be told
        raise StorageError("--storage: an address has no spaces; write them as %20")
    kind, found, rest = address.partition("://")
    if found and kind.partition("+")[0] in ("postgresql", "postgres"):
        return f"postgresql+psycopg://{rest}"
    said = redacted(address)
    if kind.startswith("sqlite") or address.endswith((".db", ".sqlite", ".sqlite3")):
        raise StorageError(
            f"--storage {said}: SQLite cannot lock single rows, so that several processes on one"
            " study run trials twice and lose others; without --storage one process owns a study"
            " on SQLite, for several give postgresql://USER@HOST/DATABASE"
        )
    raise StorageError(
        f"--storage {said}: expected the address of a PostgreSQL database, such as"
        " postgresql://USER@HOST/DATABASE (the password may stand in ~/.pgpass or PGPASSWORD)"
    )

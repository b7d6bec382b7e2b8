"""Addresses of databases, and names of studies: which can hold a shared one."""

from __future__ import annotations

import re

from autofr.errors import StorageError, redacted

ENVIRONMENT = "AUTOFR_STORAGE"
LONGEST = 512  # characters of a study's name, as many as Optuna's table has room for


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


def check_name(study: str | None) -> None:
    """Refuse the name of a study that a database cannot hold.

    Raises: StorageError.
    """
    if study and (len(study) > LONGEST or not study.isprintable()):
        raise StorageError(
            f"--study: expected a name of at most {LONGEST} printable characters, got"
            f" {len(study)}: {study[:40]!r}"
        )

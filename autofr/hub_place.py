"""Places on the Hugging Face hub, read and written: the only code that asks huggingface_hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofr import reading
from autofr.errors import AutofrError, HubError, PolicyError, redacted
from autofr.policy import MAX_BYTES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
FILE = "policy.json"
CARD = "README.md"
MAIN = "main"
REPOSITORY = r"[\w.-]+/[\w.-]+"

_REFERENCE = re.compile(
    rf"{PREFIX}(?P<repository>{REPOSITORY})(/(?P<file>[^@\s\\]+\.json))?"
    r"(@(?P<revision>\w[\w.+/-]*))?",
    re.ASCII,
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_log = logging.getLogger("autofr")


class NoAnswerError(HubError):
    """The hub said nothing about the request, so that a copy in the cache may stand in."""


@dataclass(frozen=True)
class Place:
    """One file of a repository at a revision; its text is the reference."""

    repository: str
    file: str = FILE
    revision: str = MAIN

    def __str__(self) -> str:
        file = "" if self.file == FILE else f"/{self.file}"
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{file}{revision}"


def parse(reference: str) -> Place:
    """Read a reference.

    Raises: HubError when it is none.
    """
    found = _REFERENCE.fullmatch(reference)
    if not found or ".." in reference or "//" in reference:
        raise HubError(
            f"{reference!r} names no policy on the hub: expected {PREFIX}owner/name,"
            f" {PREFIX}owner/name@revision or {PREFIX}owner/name/folder/file.json@revision"
        )
    return Place(found["repository"], found["file"] or FILE, found["revision"] or MAIN)


# -- the door to huggingface_hub ------------------------------------------------------------------


def _endpoint() -> str:
    # huggingface_hub reads the variable when it is imported, which may have been long ago.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def cached(place: Place) -> Path | None:
    """The copy of a place in the cache, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    with _refusals(place):
        found = try_to_load_from_cache(place.repository, place.file, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def download(place: Place) -> Path:
    """The file of a place, asked for now.

    Raises: NoAnswerError, HubError; PolicyError when it is too large for a policy.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where: dict[str, Any] = {
        "repo_id": place.repository,
        "filename": place.file,
        "revision": place.revision,
        "endpoint": _endpoint(),
    }
    with _refusals(place):
        # Asked first, since hf_hub_download hides that the hub does not answer: behind the cached
        # copy where there is one, behind half a minute of retries where there is none.
        count = get_hf_file_metadata(hf_hub_url(**where)).size
        if count is not None and count > MAX_BYTES:
            raise PolicyError(f"{place}: larger than {MAX_BYTES >> 20} MiB, not a policy")
        return Path(hf_hub_download(**where))


def commit(
    place: Place, files: Mapping[str, str], message: str, private: bool, token: str | None
) -> str:
    """Write files and return the commit's reference; the repository is made if it is missing.

    Raises: HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _refusals(place):
        api = HfApi(endpoint=_endpoint(), token=token)
        if not api.repo_exists(place.repository):
            # None leaves it to the owner's default, which may be private.
            api.create_repo(place.repository, private=private or None)
        elif private and not api.model_info(place.repository).private:
            raise HubError(
                f"{place}: this repository is there already and is public; make it private on the"
                " hub first, or give another one"
            )
        if place.revision != MAIN:
            api.create_branch(place.repository, branch=place.revision, exist_ok=True)
        if not _may_write_card(api, place):
            files = {name: text for name, text in files.items() if name != CARD}
            _log.warning("%s: its %s is no card of autofr and is left as it is", place, CARD)
        made = api.create_commit(
            place.repository,
            [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
            commit_message=message,
            revision=place.revision,
        )
    return f"{PREFIX}{place.repository}@{made.oid}"


def _may_write_card(api: HfApi, place: Place) -> bool:
    from huggingface_hub import metadata_load

    if not api.file_exists(place.repository, CARD, revision=place.revision):
        return True
    path = api.hf_hub_download(place.repository, CARD, revision=place.revision)
    try:
        facts = metadata_load(path) or {}
    except Exception:  # front matter that nothing can read was not written here
        return False
    # The tag alone may stand in the card of a model that also ships a policy.
    return facts.get("library_name") == "autofr" and "autofr" in (facts.get("tags") or ())


@contextmanager
def _refusals(place: Place) -> Iterator[None]:
    """Turn every failure of huggingface_hub into a HubError that says what to change."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its first base is the root of the HTTP library's errors, whichever library this version uses.
    transport: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except AutofrError:
        raise
    except (OSError, ValueError, transport) as error:
        raise _refusal(error, place) from None


def _refusal(error: Exception, place: Place) -> HubError:
    from huggingface_hub import errors as hub

    site, repository = redacted(_endpoint()), place.repository
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = (getattr(error, "server_message", None) or str(error)).strip().splitlines()
    detail = reading.printable(redacted(lines[0] if lines else type(error).__name__), 300)
    kind: type[HubError] = HubError
    match error:
        case hub.GatedRepoError():
            why = f"{repository} is gated; ask for access at {site}/{repository}, then {_LOG_IN}"
        case hub.RepositoryNotFoundError():
            why = f"{site} has no repository {repository}, or it is private; if so, {_LOG_IN}"
        case hub.RevisionNotFoundError():
            why = f"{repository} has no revision {place.revision}"
        case hub.EntryNotFoundError() if status is not None:
            why = f"{repository} has no file {place.file} at revision {place.revision}"
        case hub.OfflineModeIsEnabled():
            kind, why = NoAnswerError, f"HF_HUB_OFFLINE is set, so {site} is not asked"
        case OSError(filename=str(path)):
            why = f"the cache cannot be used ({path}: {error.strerror}); HF_HOME names another"
        case _ if status in (401, 403):
            why = f"{site} does not allow it ({detail}); {_LOG_IN}"
        case hub.HFValidationError():
            why = detail
        case ValueError() if status is None:
            why = f"{site} does not answer as a hub does ({detail})"
        case _ if status is None or status in (408, 429) or status >= 500:
            kind, why = NoAnswerError, f"{site} does not answer ({detail})"
        case _:
            why = f"{site} refuses ({detail})"
    return kind(f"{place}: {why}")

"""Policies on the Hugging Face hub: pull one by its reference, push one with its model card."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from autofr import hub_place
from autofr.errors import HubError, PolicyError
from autofr.hub_card import card
from autofr.hub_place import CARD, FILE, PREFIX, REPOSITORY, NoAnswerError
from autofr.policy import Policy
from autofr.policy_file import load, loads

_COMMIT = re.compile("[0-9a-f]{40}")
_log = logging.getLogger("autofr")


def is_reference(text: str | Path) -> bool:
    """Say whether a text names a policy on the hub rather than a file."""
    return str(text).startswith(PREFIX)


def read(place: str | Path) -> Policy:
    """Read a policy from a file, or from the hub by its reference.

    Raises: PolicyError when it is not a valid policy; HubError when the hub does not give it.
    """
    return load(pull(place) if is_reference(place) else place)


def pull(reference: str | Path) -> Path:
    """Return the local path of a policy on the hub, downloading it where the cache has no copy.

    A reference is `hub:owner/name[/folder/file.json][@revision]`. The file is `policy.json` and the
    revision `main` where they are not given; a revision is a branch, a tag or a commit. A commit
    that is in the cache is not asked for again. A hub that does not answer is replaced by the copy
    of that revision in the cache, with a notice in the log.
    Raises: HubError when the reference cannot be read, or the hub does not have or not give the
        file; PolicyError when the file is not a valid policy.
    """
    place = hub_place.parse(str(reference))
    held = hub_place.cached(place)
    if held is None or not _COMMIT.fullmatch(place.revision):
        try:
            held = hub_place.download(place)
        except NoAnswerError as error:
            if held is None:
                raise HubError(f"{error}, and the cache has no copy of that revision") from None
            _log.warning("%s; the copy in the cache is used", error)
    try:
        load(held)
    except PolicyError as error:
        raise PolicyError(f"{place}: {str(error).removeprefix(f'{held}: ')}") from None
    return held


def push(
    policy: Policy | str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a policy with its model card in one commit, and return that commit's reference.

    Args: policy, the value, its file, or its reference on the hub; repository, `owner/name`, made
        if it is missing; private, make it a private one; revision, a branch, made from `main` if it
        is missing; token, where the login is not to be used.
    A README.md that is not a card of autofr is left as it is, with a notice in the log.
    Raises: PolicyError, before anything is sent, when the policy is not valid; HubError when the
        hub refuses or does not answer, or when `private` is asked of a public repository.
    """
    # A Policy made by `model_copy` or `model_construct` was never checked.
    policy = loads(policy.model_dump_json()) if isinstance(policy, Policy) else read(policy)
    if not re.fullmatch(REPOSITORY, repository, re.ASCII):
        raise HubError(f"{repository!r} is no repository of the hub: expected owner/name")
    place = hub_place.parse(PREFIX + repository + (f"@{revision}" if revision else ""))
    files = {FILE: policy.model_dump_json(indent=1) + "\n", CARD: card(policy, str(place))}
    return hub_place.commit(place, files, f"autofr policy {policy.digest}", private, token)

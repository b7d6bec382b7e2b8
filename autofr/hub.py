"""Policies on the Hugging Face hub: pull one by its reference, push one with its model card."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofr import reading
from autofr.errors import AutofrError, HubError, PolicyError, redacted
from autofr.memory import size
from autofr.policy import MAX_BYTES, Interval, Measured, Policy, Provenance
from autofr.policy_file import load, loads

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
FILE = "policy.json"
CARD = "README.md"
MAIN = "main"

_REPOSITORY = r"[\w.-]+/[\w.-]+"
_REFERENCE = re.compile(
    rf"{PREFIX}(?P<repository>{_REPOSITORY})(/(?P<file>[^@\s\\]+\.json))?"
    r"(@(?P<revision>\w[\w.+/-]*))?",
    re.ASCII,
)
_COMMIT = re.compile("[0-9a-f]{40}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_log = logging.getLogger("autofr")


class _NoAnswerError(HubError):
    """The hub said nothing about the request, so that a copy in the cache may stand in."""


@dataclass(frozen=True)
class _Place:
    """One file of a repository at a revision; its text is the reference."""

    repository: str
    file: str = FILE
    revision: str = MAIN

    def __str__(self) -> str:
        file = "" if self.file == FILE else f"/{self.file}"
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{file}{revision}"


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
    place = _parse(str(reference))
    with _refusals(place):
        held = _held(place)
    if held is None or not _COMMIT.fullmatch(place.revision):
        try:
            with _refusals(place):
                held = _download(place)
        except _NoAnswerError as error:
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
    if not re.fullmatch(_REPOSITORY, repository, re.ASCII):
        raise HubError(f"{repository!r} is no repository of the hub: expected owner/name")
    place = _parse(PREFIX + repository + (f"@{revision}" if revision else ""))
    with _refusals(place):
        return _commit(policy, place, private, token)


def _parse(reference: str) -> _Place:
    found = _REFERENCE.fullmatch(reference)
    if not found or ".." in reference or "//" in reference:
        raise HubError(
            f"{reference!r} names no policy on the hub: expected {PREFIX}owner/name,"
            f" {PREFIX}owner/name@revision or {PREFIX}owner/name/folder/file.json@revision"
        )
    return _Place(found["repository"], found["file"] or FILE, found["revision"] or MAIN)


# -- the door to huggingface_hub ------------------------------------------------------------------


def _endpoint() -> str:
    # huggingface_hub reads the variable when it is imported, which may have been long ago.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _held(place: _Place) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repository, place.file, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def _download(place: _Place) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where: dict[str, Any] = {
        "repo_id": place.repository,
        "filename": place.file,
        "revision": place.revision,
        "endpoint": _endpoint(),
    }
    # Asked first, since hf_hub_download hides that the hub does not answer: behind the cached copy
    # where there is one, behind half a minute of retries where there is none.
    count = get_hf_file_metadata(hf_hub_url(**where)).size
    if count is not None and count > MAX_BYTES:
        raise PolicyError(f"{place}: larger than {MAX_BYTES >> 20} MiB, not a policy")
    return Path(hf_hub_download(**where))


def _commit(policy: Policy, place: _Place, private: bool, token: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=_endpoint(), token=token)
    if not api.repo_exists(place.repository):
        # None leaves it to the owner's default, which may be private.
        api.create_repo(place.repository, private=private or None)
    elif private and not api.model_info(place.repository).private:
        raise HubError(
            f"{place}: this repository is there already and is public; make it private on the hub"
            " first, or give another one"
        )
    if place.revision != MAIN:
        api.create_branch(place.repository, branch=place.revision, exist_ok=True)
    files = {FILE: policy.model_dump_json(indent=1) + "\n"}
    if _may_write_card(api, place):
        files[CARD] = card(policy, str(place))
    else:
        _log.warning("%s: its %s is no card of autofr and is left as it is", place, CARD)
    made = api.create_commit(
        place.repository,
        [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
        commit_message=f"autofr policy {policy.digest}",
        revision=place.revision,
    )
    return f"{PREFIX}{place.repository}@{made.oid}"


def _may_write_card(api: HfApi, place: _Place) -> bool:
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
def _refusals(place: _Place) -> Iterator[None]:
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


def _refusal(error: Exception, place: _Place) -> HubError:
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
            kind, why = _NoAnswerError, f"HF_HUB_OFFLINE is set, so {site} is not asked"
        case OSError(filename=str(path)):
            why = f"the cache cannot be used ({path}: {error.strerror}); HF_HOME names another"
        case _ if status in (401, 403):
            why = f"{site} does not allow it ({detail}); {_LOG_IN}"
        case hub.HFValidationError():
            why = detail
        case ValueError() if status is None:
            why = f"{site} does not answer as a hub does ({detail})"
        case _ if status is None or status in (408, 429) or status >= 500:
            kind, why = _NoAnswerError, f"{site} does not answer ({detail})"
        case _:
            why = f"{site} refuses ({detail})"
    return kind(f"{place}: {why}")


# -- the model card -------------------------------------------------------------------------------

_CARD = """\
---
library_name: autofr
tags:
- autofr
- feature-reuse
- diffusers
{base}---

# {title}

`{file}` tells the stock diffusers pipeline how to sample {name} faster: of {steps} steps of
{scheduler}{instead}, {keys} are computed in full, the others reuse kept features or hold the score.
It holds no weights and changes none; `autofr` follows it.

## What was measured

{measured}

## How to use it

```python
import autofr
autofr.apply(pipe, "{reference}")  # pipe: your diffusers pipeline of the model
result = pipe(*your_arguments, num_inference_steps={replaces})
```

`{pinned}@COMMIT` is the policy of that commit and no later one. On another device, or with another
batch, dtype or resolution, the gain is another; this measures it:

```sh
autofr evaluate --model MODEL --policy {reference}
```

## What it refuses

- a denoiser other than this {denoiser} (fingerprint of architecture and reuse points:
  {fingerprint});
- a scheduler other than {scheduler}, or one with other settings;
- a call with another number of steps than {counts}.
"""


def card(policy: Policy, reference: str) -> str:
    """Write a policy's model card: what was measured and how, how to use it, what it refuses."""
    model, sampler, measured = policy.model, policy.sampler, policy.measured
    name, steps, replaces = _line(model.name), len(policy.steps), sampler.replaces
    based = re.fullmatch(_REPOSITORY, model.name, re.ASCII)
    gain = f": {measured.speedup.value:.2f}x faster" if measured else ""
    found = "\n".join(f"| {what} | {value} |" for what, value in _rows(measured))
    made = f"\n\n{_origin(policy.provenance)}" if policy.provenance else ""
    return _CARD.format(
        base=f"base_model: {model.name}\n" if based else "",
        title=f"{name}{gain}",
        file=FILE,
        name=name,
        steps=steps,
        scheduler=_line(sampler.scheduler),
        instead="" if steps == replaces else f", instead of {replaces}",
        keys=len(policy.keyframes),
        measured=found + made,
        reference=reference,
        pinned=reference.partition("@")[0],
        replaces=replaces,
        denoiser=_line(model.denoiser),
        fingerprint=_line(model.fingerprint),
        counts=" or ".join(str(n) for n in sorted({steps, replaces})),
    )


def _origin(made: Provenance) -> str:
    return (
        f"Found on {_line(made.date)} by autofr {_line(made.autofr)} in {made.trials} trials:"
        f" `{_line(made.command)}`"
    )


def _rows(measured: Measured | None) -> list[tuple[str, str]]:
    """What was measured, then the protocol; the header first."""
    if measured is None:
        return [("what", "value"), ("---", "---"), ("speed-up", "not measured yet")]
    rows = [
        ("what", "value (95 % interval)"),
        ("---", "---"),
        ("speed-up of the whole call", _spread(measured.speedup, ".2f", "x")),
        ("time per call without the policy", f"{measured.teacher_seconds:.3g} s"),
        ("time per call with it", f"{measured.policy_seconds:.3g} s"),
        ("relative error of the final latents", _spread(measured.trajectory_error, ".2g")),
        ("PSNR to the images without it", f"{measured.psnr:.1f} dB"),
    ]
    for one in measured.judged:
        title = _line(one.title)
        rows += [
            (f"{title}, without / with", f"{one.teacher:.3f} / {one.policy:.3f}"),
            (f"{title}, difference", _spread(one.difference, "+.3f")),
        ]
    return [
        *rows,
        ("samples", f"{measured.samples}, seeds {_line(measured.seeds)}"),
        ("device", f"{_line(measured.device)}, CPU threads: {measured.threads}"),
        ("batch", str(measured.batch)),
        ("dtype", _line(measured.dtype)),
        ("versions", ", ".join(f"{_line(k)} {_line(v)}" for k, v in measured.versions.items())),
        ("kept between steps", size(measured.kept_bytes)),
    ]


def _spread(value: Interval, form: str, unit: str = "") -> str:
    return f"{value.value:{form}}{unit} ({value.low:{form}} to {value.high:{form}})"


def _line(text: str) -> str:
    """A text of the policy where Markdown wants one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")

"""Read policies from their files, and say what these hold: the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autofr import reading
from autofr.errors import PolicyError, brief
from autofr.policy import MAX_BYTES, Policy

VERSION = 1


def loads(text: str | bytes) -> Policy:
    """Read a policy from JSON text, in UTF-8 where it is bytes.

    Raises: PolicyError naming the field, for any text that is not a valid policy.
    """
    if len(text) > MAX_BYTES:
        raise PolicyError(f"larger than {MAX_BYTES >> 20} MiB, not a policy")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        fields = reading.parsed(text)
    except UnicodeDecodeError:
        raise PolicyError("not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise PolicyError(f"not valid JSON ({error}); is the file truncated?") from None
    except ValueError as error:
        raise PolicyError(f"not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise PolicyError(f"a policy is a JSON object, got {type(fields).__name__}")
    version = fields.get("autofr_policy")
    if version is None:
        raise PolicyError('no field "autofr_policy": this is not a policy file')
    if version != VERSION or isinstance(version, bool):
        raise PolicyError(
            f"policy version {brief(version)}; this autofr reads version {VERSION}: upgrade autofr,"
            " or search again with this one"
        )
    try:
        return Policy.model_validate_json(text.encode("utf-8", "replace"))
    except ValidationError as error:
        raise PolicyError(reading.objections(error)) from None


def load(path: str | Path) -> Policy:
    """Read a policy file.

    Raises: PolicyError naming the file and the field.
    """
    path = Path(path)
    try:
        return loads(reading.content(path, MAX_BYTES))
    except OSError as error:
        raise PolicyError(f"{path}: cannot read the policy ({error.strerror})") from None
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the policy file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


def schema_text() -> str:
    """The schema as it is published, in `docs/policy.schema.json`."""
    return json.dumps(schema(), indent=1) + "\n"

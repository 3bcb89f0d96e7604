"""Blobs that are no tensors, but show some of them in ``optuna-dashboard``; only their names are known here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

ARTIFACT_ATTRIBUTES = "dashboard:artifacts:"
"""A study's system attributes that list artifacts, followed by ``trial_id:artifact_id``."""
NOTHING = json.dumps(None)
"""What stands there for an artifact that is not there any more."""
PUBLISHED_PREFIX = "0d15-"
_PUBLISHED = re.compile(rf"{PUBLISHED_PREFIX}([0-9a-f]{{32}})-[0-9a-f]{{32}}")
"""Hexadecimal digits and hyphens: the dashboard serves nothing else."""


def new_artifact(study: str, digest: str) -> str:
    """The identifier of one that belongs to the study with this UUID."""
    return f"{PUBLISHED_PREFIX}{study}-{digest[:32]}"


def is_published(artifact: str) -> bool:
    """Whether it is the identifier of such a blob."""
    return _PUBLISHED.fullmatch(artifact) is not None


def owner_of(artifact: str) -> str:
    """The UUID of the study that wrote it."""
    return artifact.removeprefix(PUBLISHED_PREFIX).partition("-")[0]


def listed_in(attributes: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> Iterator[str]:
    """Such blobs that a study's system attributes list."""
    pairs = attributes.items() if isinstance(attributes, Mapping) else attributes
    for key, value in pairs:
        artifact = str(key).rpartition(":")[2]
        if str(key).startswith(ARTIFACT_ATTRIBUTES) and value != NOTHING and is_published(artifact):
            yield artifact

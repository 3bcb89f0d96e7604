"""Pointers: trial attributes that say which blob holds which tensors, and what it must be."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial

from .._errors import CorruptTensorError
from ._encoding import TensorSpec, parse_specs

ATTRIBUTE_PREFIX = "hypergrad:tensor:"
CHECKPOINT = "checkpoint"
FORMAT = 1

_MAX_SPEC_BYTES = 16_000
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
BLOB_PREFIX = "hg-"
_BLOB = re.compile(r"hg-[0-9a-f]{32}-[0-9a-f]{32}")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
ROLE = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Pointer:
    """Where a dict of tensors is, and everything that it claims to be.

    ``sha256`` covers the bytes together with all other fields, so that neither can be changed,
    nor one blob put in another's place, without :meth:`TensorStore.load` noticing.
    """

    study: str
    """UUID of the study that wrote it (32 hex digits)."""
    trial: int
    """Number of the trial that wrote it; a retried or copied trial inherits it as it is."""
    name: str
    role: str
    step: int
    blob: str
    """Identifier in the artifact store."""
    size: int
    """Bytes of the blob."""
    tensors: tuple[TensorSpec, ...] | None
    """Names, dtypes and shapes; ``None`` where there are too many for an attribute."""
    sha256: str = ""

    @property
    def key(self) -> str:
        """The trial system attribute that holds this pointer: one per name and role."""
        return attribute_key(self.name, self.role)

    def __str__(self) -> str:
        return (
            f"the tensors {shorten(self.name)} (role {self.role!r}, step {self.step}) of trial "
            f"{self.trial}, blob {self.blob}, attribute {self.key!r}"
        )

    def digest(self, *pieces: Any) -> str:
        """SHA-256 over the claims and the bytes of ``pieces`` in turn, as hex."""
        claims = {k: v for k, v in self.to_json().items() if k != "sha256"}
        found = hashlib.sha256(json.dumps(claims, sort_keys=True, separators=(",", ":")).encode())
        found.update(b"\n")
        for piece in pieces:
            found.update(piece)
        return found.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "study": self.study,
            "trial": self.trial,
            "name": self.name,
            "role": self.role,
            "step": self.step,
            "blob": self.blob,
            "size": self.size,
            "tensors": None
            if self.tensors is None
            else [[*s[:2], list(s[2])] for s in self.tensors],
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, value: Any, key: str, trial: int) -> Pointer:
        """Read the attribute ``key`` of trial number ``trial`` (both only name the row in errors).

        Raises:
            CorruptTensorError: if ``value`` is not a pointer, or the pointer of another key.
        """
        where = f"The attribute {key!r} of trial {trial}"
        if (
            isinstance(value, Mapping)
            and type(value.get("format")) is int
            and value["format"] > FORMAT
        ):
            raise CorruptTensorError(
                f"{where} has format {value['format']} and this version of optuna_hypergrad reads "
                f"up to {FORMAT}. Install the version that wrote it."
            )
        try:
            found = cls._parse(value)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptTensorError(
                f"{where} is not a pointer to tensors ({error}). The row was changed by something "
                "else than optuna_hypergrad: use an earlier trial, or a backup of the storage."
            ) from error
        if found.key != key:
            raise CorruptTensorError(
                f"{where} points to {found}, which belongs under another key. The row was moved: "
                "use an earlier trial, or a backup of the storage."
            )
        return found

    @classmethod
    def _parse(cls, value: Any) -> Pointer:
        if not isinstance(value, Mapping):
            raise ValueError("not a JSON object")
        if value.get("format") != FORMAT:
            raise ValueError("unknown format")
        for field in ("trial", "step", "size"):
            if type(value[field]) is not int or not -(2**63) <= value[field] < 2**63:
                raise ValueError(f"{field} is not an integer of 64 bits")
        for field, pattern in (
            ("study", _HEX32),
            ("role", ROLE),
            ("blob", _BLOB),
            ("sha256", _HEX64),
        ):
            if not isinstance(value[field], str) or not pattern.fullmatch(value[field]):
                raise ValueError(f"{field} is malformed")
        if not isinstance(value["name"], str):
            raise ValueError("name is not a string")
        tensors = None if value["tensors"] is None else parse_specs(value["tensors"])
        size = value["size"]
        payload = 0 if tensors is None else sum(spec.num_bytes for spec in tensors)
        if not payload + 10 <= size or (tensors is not None and size > payload + _MAX_HEADER_BYTES):
            raise ValueError(f"its size {size} does not fit its shapes, which need {payload} bytes")
        fields = ("study", "trial", "name", "role", "step", "blob", "sha256")
        return cls(**{f: value[f] for f in fields}, size=size, tensors=tensors)


@functools.lru_cache(maxsize=1024)
def attribute_key(name: str, role: str) -> str:
    """Short and plain whatever the name: databases cut keys and refuse NUL in them."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    return f"{ATTRIBUTE_PREFIX}{role}:{digest[:32]}"


def checkpoint_attributes(trial: FrozenTrial) -> dict[str, Any]:
    """System attributes of a trial that point to checkpoints, unread."""
    return pointers_in(trial.system_attrs, CHECKPOINT)


def pointers_in(attributes: Mapping[str, Any], role: str = "") -> dict[str, Any]:
    """Those of a trial's system attributes that should be pointers, to tensors of ``role`` if given."""
    prefix = ATTRIBUTE_PREFIX + (f"{role}:" if role else "")
    # SQLite lets any type into any column, also into that of keys.
    return {k: v for k, v in attributes.items() if isinstance(k, str) and k.startswith(prefix)}


def new_blob(study: str) -> str:
    """An identifier that no other blob has."""
    return f"{BLOB_PREFIX}{study}-{uuid.uuid4().hex}"


def study_of_blob(blob: str) -> str:
    """The UUID of the study that wrote it."""
    return blob.removeprefix(BLOB_PREFIX).partition("-")[0]


def claimable(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...] | None:
    """``specs`` if they are short enough for an attribute. The blob's header has them anyway."""
    return specs if len(json.dumps(specs)) <= _MAX_SPEC_BYTES else None


def shorten(name: str) -> str:
    return repr(name) if len(name) <= 80 else f"{name[:60]!r}... ({len(name)} characters)"

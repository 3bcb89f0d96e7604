"""Which study is this? A UUID, because SQLite gives the id of a deleted study to the next one.

Each worker that finds no UUID writes one under a key of its own, and the smallest wins: attributes
have no compare-and-swap, and two workers may start at once. ``copy_study`` and the dashboard's
rename copy user attributes: the copy's inherited UUIDs say which tensors it may read, and it mints
one of its own, so that two studies never own the same blob.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage

from ._attributes import set_study_attribute
from ._optuna_tables import plain_rdb, read_study
from ._retrying import retry_while_busy

ATTRIBUTE_PREFIX = "hypergrad:study:"
_UUID = re.compile(r"[0-9a-f]{32}")
_MAX_NAME_LENGTH = 1000
_minting = threading.Lock()


def uuids_in(user_attrs: Mapping[str, Any]) -> frozenset[str]:
    """Every UUID by which this study's trials may claim tensors, its own and inherited ones."""
    keys = (str(k) for k in user_attrs)  # SQLite lets any type into any column
    found = (k.removeprefix(ATTRIBUTE_PREFIX) for k in keys if k.startswith(ATTRIBUTE_PREFIX))
    return frozenset(u for u in found if _UUID.fullmatch(u))


def own_uuid(study_id: int, name: str, user_attrs: Mapping[str, Any]) -> str:
    """The UUID in its user attributes that is the study's own, or ``""`` if none is."""
    own = _ownership(study_id, name)
    mine = (u for u in uuids_in(user_attrs) if user_attrs[ATTRIBUTE_PREFIX + u] == own)
    return min(mine, default="")


def study_uuid(storage: BaseStorage, study_id: int) -> str:
    """The study's own UUID, minted on first use."""
    if found := _find(storage, study_id)[0]:
        return found
    with _minting:
        found, own = _find(storage, study_id)
        if not found:
            set_study_attribute(storage, study_id, ATTRIBUTE_PREFIX + uuid.uuid4().hex, own)
    return _find(storage, study_id)[0]


def _short(name: str) -> str:
    """A study's name, or what stands for one that is too long for an attribute."""
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[:60]}... {digest}"


def _find(storage: BaseStorage, study_id: int) -> tuple[str, dict[str, Any]]:
    """:func:`own_uuid`, and what says that a UUID is the study's own."""
    rdb = plain_rdb(storage)
    found = None if rdb is None else read_study(rdb, study_id)
    if found is None:
        name = storage.get_study_name_from_id(study_id)
        found = name, retry_while_busy(lambda: storage.get_study_user_attrs(study_id))
    name, attrs = found
    return own_uuid(study_id, name, attrs), _ownership(study_id, name)


def _ownership(study_id: int, name: str) -> dict[str, Any]:
    return {"study_id": study_id, "study_name": _short(name)}

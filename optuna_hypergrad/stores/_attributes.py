"""The one place where this library writes an attribute of a study or a trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from optuna.storages import BaseStorage

from .._errors import StorageError
from ._database import transaction
from ._full import saying_what_has_no_room
from ._optuna_tables import (
    lock_study_attributes,
    plain_rdb,
    remove_study_attributes,
    write_attributes,
    write_study_attributes,
)
from ._retrying import retry_while_busy

MAX_ATTRIBUTE_BYTES = 48_000
"""MySQL keeps 65,535 bytes of an attribute and may cut the rest off without a word."""

REMOVED = object()
_PATIENCE = 5.0
"""Seconds that a write may wait without which a study is none the worse."""

MAX_KEY_LENGTH = 512
"""Optuna's ``key`` columns are VARCHAR(512)."""


def check_attribute(key: str, value: Any) -> None:
    """Refuse an attribute that some storage would cut off, lose or not accept.

    Raises:
        StorageError: if ``value`` takes more than :data:`MAX_ATTRIBUTE_BYTES` as JSON, if it is
            not JSON, or if ``key`` is longer than :data:`MAX_KEY_LENGTH` characters.
    """
    if len(key) > MAX_KEY_LENGTH:
        raise StorageError(
            f"The attribute key {key[:60]!r}... has {len(key)} characters and databases hold "
            f"{MAX_KEY_LENGTH}. Use a shorter name."
        )
    try:
        size = len(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StorageError(f"The attribute {key!r} cannot be written as JSON: {error}.") from error
    if size > MAX_ATTRIBUTE_BYTES:
        raise StorageError(
            f"The attribute {key!r} takes {size} bytes as JSON and the limit is "
            f"{MAX_ATTRIBUTE_BYTES}, so that every database holds it whole. Use shorter names, "
            "or keep large data as tensors."
        )


def set_trial_attribute(storage: BaseStorage, trial_id: int, key: str, value: Any) -> None:
    """Write a system attribute of a running trial.

    Raises:
        StorageError: if it is too large, or there is no room for it.
    """
    check_attribute(key, value)
    _set_checked(storage, trial_id, key, value)


def _set_checked(storage: BaseStorage, trial_id: int, key: str, value: Any) -> None:
    with saying_what_has_no_room(f"The attribute {key!r} of the trial with id {trial_id}"):
        retry_while_busy(lambda: storage.set_trial_system_attr(trial_id, key, value))


def set_user_attributes(storage: BaseStorage, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Write user attributes of a running trial: in a database, in one transaction.

    Raises:
        StorageError: if one is too large.
        UpdateFinishedTrialError: if the trial is not running.
    """
    for key, value in attributes.items():
        check_attribute(key, value)
    rdb = plain_rdb(storage)
    if rdb is not None and attributes:

        def write() -> None:
            with transaction(rdb.engine) as connection:
                write_attributes(connection, trial_id, attributes, "user")

        retry_while_busy(write, _PATIENCE, _PATIENCE)
        return
    for key, value in attributes.items():
        storage.set_trial_user_attr(trial_id, key, value)


def change_study_attributes(
    storage: BaseStorage,
    study_id: int,
    prefix: str,
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    instead: Any = None,
) -> None:
    """Read system attributes of a study, and set some; in a database, with nothing in between.

    Args:
        prefix: of their keys.
        change: from what there is to what shall be, :data:`REMOVED` for nothing: other keys stay as they are.
        instead: what to write where nothing shall be and the storage cannot remove an attribute.

    Raises:
        StorageError: if one is too large.
    """
    rdb = plain_rdb(storage)
    if rdb is None:
        known = {
            k: v
            for k, v in storage.get_study_system_attrs(study_id).items()
            if str(k).startswith(prefix)
        }
        wanted = {k: instead if v is REMOVED else v for k, v in change(known).items()}
        for key, value in _changed(known, wanted).items():
            storage.set_study_system_attr(study_id, key, value)
        return

    def write() -> None:
        with transaction(rdb.engine) as connection:
            known = lock_study_attributes(connection, study_id, prefix)
            wanted = change(known)
            gone = [k for k, v in wanted.items() if v is REMOVED and k in known]
            changed = _changed(known, {k: v for k, v in wanted.items() if v is not REMOVED})
            write_study_attributes(connection, study_id, changed, known)
            remove_study_attributes(connection, study_id, gone)

    retry_while_busy(write, _PATIENCE, _PATIENCE)


def _changed(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in wanted.items() if k not in known or known[k] != v}
    for key, value in found.items():
        check_attribute(key, value)
    return found


def set_long_trial_attribute(
    storage: BaseStorage, trial_id: int, key: str, payload: dict[str, Any]
) -> None:
    """A system attribute of any size; in numbered pieces, the head last, where it is too long."""
    text = json.dumps(payload, allow_nan=False)
    if len(text) <= MAX_ATTRIBUTE_BYTES and len(key) <= MAX_KEY_LENGTH:
        _set_checked(storage, trial_id, key, payload)
        return
    size = MAX_ATTRIBUTE_BYTES // 2  # quotes inside a string are escaped when it is stored
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        set_trial_attribute(storage, trial_id, f"{key}:{i}", piece)
    set_trial_attribute(storage, trial_id, key, {"pieces": len(pieces)})


def long_attribute(attributes: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """What :func:`set_long_trial_attribute` wrote, or ``None`` where there is no such attribute.

    Raises:
        ValueError: saying what is wrong with it, for anything else. No more is read than there is.
    """
    if key not in attributes:
        return None
    payload = attributes[key]
    if isinstance(payload, dict) and "pieces" in payload:
        payload = _joined(attributes, key, payload["pieces"])
    if not isinstance(payload, dict):
        raise ValueError("it is not a JSON object")
    return payload


def _joined(attributes: Mapping[str, Any], key: str, count: Any) -> Any:
    if type(count) is not int or count < 1:
        raise ValueError("its number of pieces is not a positive integer")
    pieces: list[str] = []
    while len(pieces) < count:
        piece = attributes.get(f"{key}:{len(pieces)}")
        if not isinstance(piece, str):
            raise ValueError(f"its piece {len(pieces)} is missing or not text")
        pieces.append(piece)
    try:
        return json.loads("".join(pieces))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {len(pieces)} pieces are not JSON together ({error})") from error


def set_study_attribute(storage: BaseStorage, study_id: int, key: str, value: Any) -> None:
    """Write a user attribute of a study.

    User attributes, because a study renamed in the dashboard loses its system attributes.

    Raises:
        StorageError: if it is too large, or there is no room for it.
    """
    check_attribute(key, value)
    with saying_what_has_no_room(f"The attribute {key!r} of the study with id {study_id}"):
        retry_while_busy(lambda: storage.set_study_user_attr(study_id, key, value))

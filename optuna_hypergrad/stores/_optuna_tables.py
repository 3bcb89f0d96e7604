"""The tables of Optuna that a save reads and writes, so that it is one transaction and a few queries.

Only for Optuna's own ``RDBStorage`` (the tables are those of Optuna 5.0); with every other storage, and
with an Optuna that keeps its tables elsewhere, a save uses the storage's methods, each of which is a
transaction of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from .. import _optuna
from .._errors import StorageError
from ._database import read, transaction

Kind = Literal["system", "user"]

try:
    from optuna.storages._cached_storage import _CachedStorage
    from optuna.storages._rdb import models

    _studies: sa.Table = models.StudyModel.__table__
    _trials: sa.Table = models.TrialModel.__table__
    _attributes: sa.Table = models.TrialSystemAttributeModel.__table__
    _user_attributes: sa.Table = models.TrialUserAttributeModel.__table__
    _study_attributes: sa.Table = models.StudyUserAttributeModel.__table__
    _study_system_attributes: sa.Table = models.StudySystemAttributeModel.__table__
    _TABLES_KNOWN = True
except (ImportError, AttributeError):
    _TABLES_KNOWN = False
else:
    # Made once: to make a statement takes SQLAlchemy longer than to execute it.
    _trial_id: Any = sa.bindparam("of_trial")
    _study_id: Any = sa.bindparam("of_study")
    _keys: Any = sa.bindparam("keys", expanding=True)
    _STUDY = (  # a row for each attribute, or one with NULL for them
        sa.select(_studies.c.study_name, _study_attributes.c.key, _study_attributes.c.value_json)
        .select_from(
            _studies.outerjoin(
                _study_attributes, _study_attributes.c.study_id == _studies.c.study_id
            )
        )
        .where(_studies.c.study_id == _study_id)
    )
    _RUNNING = (  # for each attribute of the trial, a row for each of the study
        sa.select(
            _trials.c.number,
            _trials.c.state,
            _attributes.c.key,
            _attributes.c.value_json,
            _studies.c.study_name,
            _study_attributes.c.key.label("study_key"),
            _study_attributes.c.value_json.label("study_value_json"),
        )
        .select_from(
            _trials.join(_studies, _studies.c.study_id == _trials.c.study_id)
            .outerjoin(
                _attributes,
                (_attributes.c.trial_id == _trials.c.trial_id) & _attributes.c.key.in_(_keys),
            )
            .outerjoin(
                _study_attributes,
                (_study_attributes.c.study_id == _trials.c.study_id)
                & _study_attributes.c.key.startswith(sa.bindparam("prefix")),
            )
        )
        .where(_trials.c.trial_id == _trial_id, _trials.c.study_id == _study_id)
    )
    _NO_UPDATE = _studies.update().where(sa.false()).values(study_id=_studies.c.study_id)
    _LOCKED_TRIAL = (
        sa.select(_trials.c.state).where(_trials.c.trial_id == _trial_id).with_for_update()
    )
    _ATTRIBUTES, _INSERT_ATTRIBUTE, _UPDATE_ATTRIBUTE = {}, {}, {}
    for _kind, _table in {"system": _attributes, "user": _user_attributes}.items():
        _ATTRIBUTES[_kind] = sa.select(_table.c.key, _table.c.value_json).where(
            _table.c.trial_id == _trial_id, _table.c.key.in_(_keys)
        )
        _INSERT_ATTRIBUTE[_kind] = _table.insert()
        _UPDATE_ATTRIBUTE[_kind] = (
            _table.update()
            .where(_table.c.trial_id == _trial_id, _table.c.key == sa.bindparam("of_key"))
            .values(value_json=sa.bindparam("value"))
        )


def plain_rdb(storage: BaseStorage) -> RDBStorage | None:
    """The ``RDBStorage`` that ``storage`` is or caches, if nothing stands between it and its tables."""
    if not _TABLES_KNOWN:
        return None
    while getattr(storage, "passes_calls_through", False) or type(storage) is _CachedStorage:
        storage = _optuna.wrapped_by(storage)
    found = storage
    return found if type(found) is RDBStorage else None


@dataclass(frozen=True)
class RunningTrial:
    """What a save asks of the study and of a trial of it that runs.

    Attributes:
        number: Of the trial in its study.
        attributes: System attributes of the trial: those asked for that it has.
        study_name: The study's.
        study_attributes: User attributes of the study: those asked for that it has.
    """

    number: int
    attributes: dict[str, Any]
    study_name: str
    study_attributes: dict[str, Any]


def read_running_trial(
    rdb: RDBStorage, study_id: int, trial_id: int, keys: Collection[str], prefix: str
) -> RunningTrial | None:
    """With system attributes ``keys`` of the trial, and user attributes of the study that start with ``prefix``.

    ``None`` for a trial that is finished or not there.

    Raises:
        StorageError: if its number is none.
    """

    wanted = {"of_study": study_id, "of_trial": trial_id, "keys": list(keys), "prefix": prefix}
    rows = read(rdb, lambda connection: connection.execute(_RUNNING, wanted).all())
    if not rows or rows[0].state.is_finished():
        return None
    number = rows[0].number
    if type(number) is not int:  # SQLite lets any type into any column
        raise StorageError(
            f"The trial with id {trial_id} has the number {str(number)[:60]!r}, which is none. Something "
            "has changed the row in the table trials; restore it from a backup."
        )
    own = {row.key: row.value_json for row in rows}
    of_study = {row.study_key: row.study_value_json for row in rows}
    return RunningTrial(number, _decoded(own), str(rows[0].study_name), _decoded(of_study))


def read_study(rdb: RDBStorage, study_id: int) -> tuple[str, dict[str, Any]] | None:
    """Name of a study, and its user attributes; ``None`` if it is not there."""
    mine = {"of_study": study_id}
    rows = read(rdb, lambda connection: connection.execute(_STUDY, mine).all())
    attributes = {row.key: row.value_json for row in rows}
    return (str(rows[0].study_name), _decoded(attributes)) if rows else None


def _decoded(attributes: Mapping[Any, str]) -> dict[str, Any]:
    """Without the one that stands for none."""
    return {str(key): json.loads(text) for key, text in attributes.items() if key is not None}


def study_attribute_keys(rdb: RDBStorage, prefix: str) -> list[tuple[int, str]]:
    """``(study_id, key)`` of the user attributes of all studies whose key starts with ``prefix``."""
    table = _study_attributes.c
    query = sa.select(table.study_id, table.key).where(
        table.key.startswith(prefix, autoescape=True)
    )
    rows = read(rdb, lambda connection: connection.execute(query).all())
    return [(int(study_id), str(key)) for study_id, key in rows]


def lock_study_attributes(connection: Connection, study_id: int, prefix: str) -> dict[str, Any]:
    """System attributes of a study whose key starts with ``prefix``; nobody else changes them until
    ``connection`` has committed."""
    lock_sqlite(connection)
    table = _study_system_attributes.c
    study = sa.select(_studies.c.study_id).where(_studies.c.study_id == study_id)
    connection.execute(study.with_for_update())
    found = connection.execute(
        sa.select(table.key, table.value_json).where(
            table.study_id == study_id, table.key.startswith(prefix, autoescape=True)
        )
    )
    return {str(key): json.loads(text) for key, text in found}


def lock_sqlite(connection: Connection) -> None:
    """Be the only one who writes until ``connection`` has committed, where that is a file of SQLite: it knows no FOR
    UPDATE, and Python's driver begins no transaction before it writes. Nothing is written by this."""
    if connection.dialect.name == "sqlite":
        connection.execute(_NO_UPDATE)


def write_study_attributes(
    connection: Connection, study_id: int, attributes: Mapping[str, Any], known: Collection[str]
) -> None:
    """Set system attributes of a study; those in ``known`` are there already."""
    table = _study_system_attributes
    for key, value in attributes.items():
        text = json.dumps(value)
        if key in known:
            mine = (table.c.study_id == study_id) & (table.c.key == key)
            connection.execute(table.update().where(mine), {"value_json": text})
        else:
            row = {"study_id": study_id, "key": key, "value_json": text}
            connection.execute(table.insert(), row)


def remove_study_attributes(connection: Connection, study_id: int, keys: Collection[str]) -> None:
    """Remove system attributes of a study."""
    table = _study_system_attributes
    for key in keys:
        mine = (table.c.study_id == study_id) & (table.c.key == key)
        connection.execute(table.delete().where(mine))


def find_created_trial(rdb: RDBStorage, study_id: int, key: str, value: Any) -> int | None:
    """Which trial of a study has this system attribute with this value. Not tried again by itself.

    Waits for trials that are being created, maybe for somebody who is not connected any more: their
    transactions, too, hold the row of the study.
    """
    study = sa.select(_studies.c.study_id).where(_studies.c.study_id == study_id).with_for_update()
    trial = (
        sa.select(_trials.c.trial_id)
        .join(_attributes, _attributes.c.trial_id == _trials.c.trial_id)
        .where(_trials.c.study_id == study_id, _attributes.c.key == key)
        .where(_attributes.c.value_json == json.dumps(value))
    )
    with transaction(rdb.engine) as connection:
        connection.execute(study)
        return connection.execute(trial).scalar()


def claim_waiting_trial(rdb: RDBStorage, trial_id: int, attributes: Mapping[str, Any]) -> bool:
    """Have a waiting trial run and set system attributes of it; ``False`` if somebody else has it.

    Not tried again by itself. With ``attributes`` that nobody else gives, it is idempotent.
    """
    waiting = (_trials.c.trial_id == trial_id) & (_trials.c.state == TrialState.WAITING)
    running = {"state": TrialState.RUNNING, "datetime_start": datetime.now()}
    with transaction(rdb.engine) as connection:
        if connection.execute(_trials.update().where(waiting), running).rowcount == 1:
            write_attributes(connection, trial_id, attributes)
            return True
        known = _attributes_of(connection, trial_id, attributes)
        return {k: json.loads(text) for k, text in known.items()} == dict(attributes)


def write_attributes(
    connection: Connection, trial_id: int, attributes: Mapping[str, Any], kind: Kind = "system"
) -> None:
    """Set attributes of a running trial, which stays so until ``connection`` has committed.

    Raises:
        UpdateFinishedTrialError: if it is not running.
    """
    lock_sqlite(connection)
    known = hold_trial(connection, trial_id, attributes, kind)
    set_attributes(connection, trial_id, attributes, known, kind)


def hold_trial(
    connection: Connection, trial_id: int, keys: Collection[str], kind: Kind = "system"
) -> Collection[str]:
    """See to it that a running trial stays so until ``connection`` has committed, and which attributes it has of
    ``keys``. To SQLite this transaction must have written already.

    Raises:
        UpdateFinishedTrialError: if it is not running.
    """
    trial = connection.execute(_LOCKED_TRIAL, {"of_trial": trial_id}).first()
    if trial is None or trial.state.is_finished():
        raise UpdateFinishedTrialError(f"Trial {trial_id} is not running any more.")
    return _attributes_of(connection, trial_id, keys, kind)


def set_attributes(
    connection: Connection,
    trial_id: int,
    attributes: Mapping[str, Any],
    known: Collection[str],
    kind: Kind = "system",
) -> None:
    """Set attributes of a trial that is held; it has those in ``known`` already (no upsert is in all databases)."""
    for key, value in attributes.items():
        text = json.dumps(value)
        if key in known:
            mine = {"of_trial": trial_id, "of_key": key, "value": text}
            connection.execute(_UPDATE_ATTRIBUTE[kind], mine)
        else:
            row = {"trial_id": trial_id, "key": key, "value_json": text}
            connection.execute(_INSERT_ATTRIBUTE[kind], row)


def _attributes_of(
    connection: Connection, trial_id: int, keys: Collection[str], kind: Kind = "system"
) -> dict[str, str]:
    found = connection.execute(_ATTRIBUTES[kind], {"of_trial": trial_id, "keys": list(keys)})
    return {str(key): text for key, text in found}

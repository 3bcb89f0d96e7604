"""The storage, the study and the tensor store that a command line means."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study

from .. import _optuna
from .._errors import StorageError
from ..stores import (
    AbstractArtifactStore,
    AtomicFileSystemArtifactStore,
    RDBArtifactStore,
    TensorStore,
)
from ..stores import default_artifact_store as artifacts_of
from ..stores._database import unwrap_rdb
from ..stores._opening import open_existing
from ..stores._pointer import BLOB_PREFIX


@contextlib.contextmanager
def opened_storage(location: str) -> Iterator[BaseStorage]:
    storage = open_existing(location)
    try:
        yield storage
    finally:
        storage.remove_session()
        database = unwrap_rdb(storage)
        if isinstance(database, RDBStorage):
            database.engine.dispose()


@contextlib.contextmanager
def opened_store(storage: BaseStorage, location: str | None) -> Iterator[TensorStore]:
    if location is None:
        yield TensorStore(artifacts_of(storage), storage, exclusive=True)
    elif "://" in location:
        with opened_storage(location) as database:
            yield TensorStore(RDBArtifactStore(database), storage)
    elif location and Path(location).is_dir():
        yield TensorStore(AtomicFileSystemArtifactStore(location), storage)
    else:
        raise StorageError(
            f"There is no directory {location!r}. Give --tensor-store a directory, or the URL of a database."
        )


def sizes_in(store: TensorStore) -> dict[str, int]:
    """Sizes of the tensors in the store, by identifier."""
    assert isinstance(store.artifact_store, AbstractArtifactStore)
    return {a.artifact_id: a.size for a in store.artifact_store.stored(BLOB_PREFIX)}


def study_of(name: str | None, storage: BaseStorage) -> Study:
    names = study_names(storage)
    return optuna.load_study(study_name=meant(name, names), storage=storage)


def study_names(storage: BaseStorage) -> list[str]:
    names = optuna.get_all_study_names(storage)
    odd = [
        name for name in names if not isinstance(name, str)
    ]  # SQLite lets any type into any column
    if odd:
        _optuna.logger.warning(
            f"The study named {str(odd[0])[:60]} is left out: its name is not text. Something has changed "
            "the row; restore it from a backup."
        )
    return sorted(name for name in names if isinstance(name, str))


def meant(name: str | None, names: list[str]) -> str:
    """The study that is meant."""
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        assert name is not None
        return name
    known = ", ".join(map(_quoted, names[:5]))
    known += f" and {len(names) - 5} more" if len(names) > 5 else ""
    if not names:
        raise StorageError("There is no study in this storage.")
    if name is None:
        raise StorageError(f"There are {len(names)} studies: {known}. Say which one: --study NAME.")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {_quoted(near[0])}?" if near else ""
    raise StorageError(
        f"There is no study {_quoted(name)} in this storage; there is {known}.{hint}"
    )


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")

"""Blobs in the study's own database, as rows of about 512 KiB.

Code for the common subset of SQLAlchemy 1.4.2 and 2.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, ClassVar

import sqlalchemy as sa
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from .._errors import CorruptTensorError, StorageError
from . import _schema as schema
from ._database import read, transaction, unwrap_rdb, write
from ._encoding import Pieces, cut
from ._optuna_tables import hold_trial, set_attributes
from ._schema import has_tables, make_tables
from ._sqlite import CHUNK_BYTES, can_write_in_place, insert_in_place
from .artifact_store import AbstractArtifactStore, StoredArtifact

_MAX_CHUNK_BYTES = 1 << 24  # what is read into memory at once, whatever a row holds

# Made once: to make a statement takes SQLAlchemy longer than to execute it.
_INSERT_BLOB, _INSERT_CHUNK = schema.blobs.insert(), schema.chunks.insert()
_SET_SIZE = (
    schema.blobs.update()
    .where(schema.blobs.c.artifact_id == sa.bindparam("of_blob"))
    .values(num_bytes=sa.bindparam("size"))
)
_DELETE = tuple(
    table.delete().where(table.c.artifact_id.in_(sa.bindparam("some", expanding=True)))
    for table in (schema.chunks, schema.blobs)
)


@dataclass(frozen=True)
class _Content:
    """Of an artifact.

    Attributes:
        chunks: From its beginning each time; each chunk as the parts it is made of.
        size: In bytes, where it is known.
    """

    chunks: Callable[[], Iterator[list[memoryview]]]
    size: int | None = None

    @classmethod
    def of(cls, pieces: Pieces) -> _Content:
        return cls(partial(cut, pieces, CHUNK_BYTES), sum(map(len, pieces)))


class RDBArtifactStore(AbstractArtifactStore):
    """An artifact store in the database of an ``RDBStorage``, through its own engine.

    Its tables, ``hypergrad_version``, ``hypergrad_blobs`` and ``hypergrad_chunks``, are made on the
    first write. Also good for ``optuna.artifacts.upload_artifact`` and for
    ``optuna_dashboard.wsgi(storage, artifact_store=...)``.

    Protocol: ``optuna/artifacts/_protocol.py``.

    Args:
        storage: an ``RDBStorage``, or a storage that wraps one as ``_backend``
            (``study._storage`` of a study made from a URL does).

    Raises:
        StorageError: if ``storage`` holds no ``RDBStorage``.
    """

    name: ClassVar[str] = "rdb"

    def __init__(self, storage: BaseStorage) -> None:
        found = unwrap_rdb(storage)
        if found is None:
            raise StorageError(
                f"RDBArtifactStore needs an RDBStorage, and {type(storage).__name__} holds none. "
                "Use another artifact store."
            )
        self._storage = found

    @classmethod
    def beside(cls, storage: BaseStorage) -> RDBArtifactStore | None:
        return None if unwrap_rdb(storage) is None else cls(storage)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A reader that holds one chunk in memory and no transaction open.

        Raises:
            ArtifactNotFound: if there is no such artifact.
            CorruptTensorError: if the rows do not add up; before anything large is read.
        """
        if not has_tables(self._storage):
            raise ArtifactNotFound(f"There is no artifact {artifact_id!r} in the database.")
        length = sa.func.length(schema.chunks.c.data)
        claim = sa.select(schema.blobs.c.num_bytes).where(schema.blobs.c.artifact_id == artifact_id)
        facts = sa.select(
            sa.func.count(),
            sa.func.max(schema.chunks.c.chunk),
            sa.func.sum(length),
            sa.func.max(length),
        ).where(schema.chunks.c.artifact_id == artifact_id)
        claimed, (count, last, total, longest) = read(
            self._storage,
            lambda connection: (
                connection.execute(claim).scalar(),
                connection.execute(facts).one(),
            ),
        )
        if claimed is None and not count:
            raise ArtifactNotFound(f"There is no artifact {artifact_id!r} in the database.")
        if (
            claimed != int(total or 0)
            or (count and last != count - 1)
            or (longest or 0) > _MAX_CHUNK_BYTES
        ):
            raise CorruptTensorError(
                f"The row hypergrad_blobs(artifact_id={artifact_id!r}) says {claimed} bytes, and "
                f"its {count} rows in hypergrad_chunks hold {total or 0} bytes with the last "
                f"numbered {last}. Rows were lost, added or changed: use an earlier trial, or a backup."
            )
        return io.BufferedReader(_ChunkReader(self, artifact_id, int(claimed)), CHUNK_BYTES)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """One transaction for the whole artifact. Replaces an artifact of the same identifier.

        Raises:
            StorageError: if a newer version of this library has made the tables.
        """
        with ExitStack() as stack:
            body = content_body
            if not body.seekable():  # it may have to be read again
                body = stack.enter_context(tempfile.SpooledTemporaryFile(_MAX_CHUNK_BYTES))  # type: ignore[assignment]
                shutil.copyfileobj(content_body, body, CHUNK_BYTES)
                body.seek(0)
            start = body.tell()

            def chunks() -> Iterator[list[memoryview]]:
                body.seek(start)
                while data := body.read(CHUNK_BYTES):
                    yield [memoryview(data)]

            self._write({artifact_id: _Content(chunks)})

    def write_many(self, bodies: Mapping[str, bytes]) -> None:
        """One transaction for all of ``bodies``. Replaces artifacts of the same identifiers."""
        self._write({name: _Content.of((data,)) for name, data in bodies.items()})

    def write_with_attributes(
        self,
        bodies: Mapping[str, Pieces],
        trial_id: int,
        keys: Collection[str],
        attributes: Callable[[], Mapping[str, Any]],
        unneeded: Sequence[str],
    ) -> None:
        """Store ``bodies``, set system attributes ``keys`` of a running trial, remove ``unneeded``.

        The identifiers must never have been used before: by them it is seen whether an attempt whose
        answer was lost was carried out. One transaction: all of it or nothing. ``attributes`` is called
        last. The pages of ``unneeded`` are free for the next write, not for this one, which would have to
        keep their contents until it is over.

        Raises:
            UpdateFinishedTrialError: if the trial is not running.
        """

        def action(connection: Connection) -> bool:
            _insert(connection, {name: _Content.of(pieces) for name, pieces in bodies.items()})
            _delete(connection, unneeded)
            known = hold_trial(connection, trial_id, keys)
            set_attributes(connection, trial_id, attributes(), known)
            return True

        def settle() -> bool | None:
            with transaction(self._engine) as connection:
                return True if _has_all(connection, bodies) else None

        make_tables(self._storage)
        write(self._storage, action, settle)

    def is_in(self, rdb: RDBStorage) -> bool:
        """Whether the artifacts are in the database of ``rdb``."""
        return self._engine is rdb.engine

    def remove(self, artifact_id: str) -> None:
        self._require(artifact_id)
        self.remove_many([artifact_id])

    def remove_many(self, artifact_ids: Iterable[str]) -> None:
        """Remove those of ``artifact_ids`` that are there, a hundred in one transaction."""
        wanted = list(artifact_ids)
        if not wanted or not has_tables(self._storage):
            return
        for some in _hundreds(wanted):
            write(self._storage, partial(_delete, artifact_ids=some))

    def stored(self, prefix: str = "") -> Iterator[StoredArtifact]:
        if not has_tables(self._storage):
            return
        query = sa.select(
            schema.blobs.c.artifact_id, schema.blobs.c.num_bytes, schema.blobs.c.written
        ).where(schema.blobs.c.artifact_id.startswith(prefix, autoescape=True))
        rows = read(self._storage, lambda connection: connection.execute(query).all())
        for artifact_id, num_bytes, written in rows:
            try:
                yield StoredArtifact(str(artifact_id), int(num_bytes), float(written))
            except (TypeError, ValueError, OverflowError):  # SQLite lets any type into any column
                yield StoredArtifact(str(artifact_id), 0, 0.0)

    @property
    def _engine(self) -> Engine:
        # Asked for each time: a pickled RDBStorage comes back with a new one.
        return self._storage.engine

    def _write(self, bodies: Mapping[str, _Content]) -> None:
        def replace(connection: Connection) -> None:
            _delete(connection, list(bodies))
            _insert(connection, bodies)

        make_tables(self._storage)
        try:
            write(self._storage, partial(_insert, bodies=bodies))
        except IntegrityError:  # they are there, maybe by an attempt whose answer was lost
            write(self._storage, replace)

    def _require(self, artifact_id: str) -> None:
        if has_tables(self._storage) and read(
            self._storage, partial(_has_all, artifact_ids=[artifact_id])
        ):
            return
        raise ArtifactNotFound(f"There is no artifact {artifact_id!r} in the database.")

    def _read_chunk(self, artifact_id: str, chunk: int) -> bytes:
        # As it is in the row: made to bytes, a number would be as many zeros.
        query = sa.select(sa.type_coerce(schema.chunks.c.data, sa.types.NullType())).where(
            schema.chunks.c.artifact_id == artifact_id, schema.chunks.c.chunk == chunk
        )
        where = f"The row hypergrad_chunks(artifact_id={artifact_id!r}, chunk={chunk})"
        row = read(self._storage, lambda connection: connection.execute(query).first())
        if row is None:
            raise CorruptTensorError(
                f"{where} is missing. Another worker has removed the artifact while it was read, "
                "or the database was changed."
            )
        data: Any = row[0]
        if not isinstance(data, (bytes, bytearray, memoryview)):  # SQLite lets any type in
            raise CorruptTensorError(
                f"{where} does not hold bytes. The database was changed: use an earlier trial, "
                "or a backup."
            )
        return bytes(data)


def _has_all(connection: Connection, artifact_ids: Collection[str]) -> bool:
    query = sa.select(sa.func.count()).where(schema.blobs.c.artifact_id.in_(list(artifact_ids)))
    return connection.execute(query).scalar() == len(artifact_ids)


def _insert(connection: Connection, bodies: Mapping[str, _Content]) -> None:
    # All rows of a unique key first: what is there already is noticed before anything is read, and SQLite
    # waits for its turn here, and never in mid-transaction.
    for artifact_id, content in bodies.items():
        size = content.size or 0
        row = {"artifact_id": artifact_id, "num_bytes": size, "written": int(time.time())}
        connection.execute(_INSERT_BLOB, row)
    for artifact_id, content in bodies.items():
        size = _insert_chunks(connection, artifact_id, content.chunks())
        if size != content.size:
            connection.execute(_SET_SIZE, {"of_blob": artifact_id, "size": size})


def _insert_chunks(
    connection: Connection, artifact_id: str, chunks: Iterator[list[memoryview]]
) -> int:
    """Their bytes in all."""
    num_bytes = 0
    in_place = can_write_in_place(connection)
    for chunk, parts in enumerate(chunks):
        if in_place:
            num_bytes += insert_in_place(connection, artifact_id, chunk, parts)
            continue
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        row = {"artifact_id": artifact_id, "chunk": chunk, "data": data}
        connection.execute(_INSERT_CHUNK, row)
        num_bytes += len(data)
    return num_bytes


def _delete(connection: Connection, artifact_ids: Sequence[str]) -> None:
    for some in _hundreds(artifact_ids):
        for statement in _DELETE:
            connection.execute(statement, {"some": list(some)})


def _hundreds(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[i : i + 100] for i in range(0, len(values), 100))


class _ChunkReader(io.RawIOBase):
    """An artifact as a file; fetches the chunk that it is asked for, each on its own connection."""

    def __init__(self, store: RDBArtifactStore, artifact_id: str, size: int) -> None:
        self._store = store
        self._artifact_id = artifact_id
        self._size = size
        self._position = 0
        self._chunk = -1
        self._start = 0
        self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        while not self._start <= self._position < self._start + len(self._data):
            self._fetch_next()
        view = memoryview(buffer).cast("B")
        offset = self._position - self._start
        part = self._data[offset : offset + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch_next(self) -> None:
        self._start += len(self._data)
        self._chunk += 1
        self._data = self._store._read_chunk(self._artifact_id, self._chunk)

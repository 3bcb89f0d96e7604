"""Tensors that belong to a study: saved blob first, verified on loading, removed by policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import CorruptTensorError, MissingTensorError, StorageError
from .._typing import Params
from ._database import is_for_threads, unwrap_rdb
from ._encoding import DecodeError, decode, specs_of
from ._housekeeping import Read, SweepReport, find_expired, find_gone, find_orphans
from ._identity import ATTRIBUTE_PREFIX, study_uuid
from ._pointer import Pointer, attribute_key, pointers_in
from ._retention import Retention, Trajectory
from ._retrying import retry_while_busy
from ._verifying import VerifyReport, verify
from ._writing import Encoded, Writer, encode_all
from .artifact_store import AbstractArtifactStore, default_artifact_store
from .file_system import AtomicFileSystemArtifactStore

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

T = TypeVar("T")

_READ_BYTES = 1 << 20


class TensorStore:
    """Dicts of tensors by study, trial, name, role and step, in an artifact store.

    A blob is written first, and then a pointer to it: a system attribute of the trial, one per
    name and role. In the study's own database all of a save is one transaction; elsewhere a crash in
    between leaves a blob that nothing refers to, for :meth:`sweep`. A pointer is replaced in one
    piece, and its old blob is not removed before that.

    Args:
        artifact_store: anything with Optuna's three-method ``ArtifactStore`` protocol.
        storage: the study's storage.
        retention: what :meth:`apply_retention` leaves in the store.
        exclusive: whether ``artifact_store`` serves this ``storage`` and no other, so that a sweep
            may remove the blobs of studies that are not in ``storage`` (any more).
    """

    def __init__(
        self,
        artifact_store: ArtifactStore,
        storage: BaseStorage,
        retention: Retention | None = None,
        *,
        exclusive: bool = False,
    ) -> None:
        missing = [m for m in ("open_reader", "write", "remove") if not hasattr(artifact_store, m)]
        if missing:
            raise StorageError(
                f"tensor_store= needs an artifact store with the methods open_reader, write and "
                f"remove, and {type(artifact_store).__name__} lacks {', '.join(missing)}. Give a "
                "directory, or a store of optuna.artifacts."
            )
        self.artifact_store = artifact_store
        self.retention = Retention() if retention is None else retention
        self._storage = storage
        self._exclusive = exclusive
        self._gone: dict[int, set[str]] = {}  # per study: blobs that retention has removed
        self._read_pointers: dict[int, Read] = {}
        self._thread: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read_pointers": {}, "_thread": None}

    @classmethod
    def of_study(
        cls,
        study: Study,
        artifact_store: ArtifactStore | str | os.PathLike[str] | None = None,
        retention: Retention | None = None,
    ) -> TensorStore:
        """The store of a study: in its database, beside its Journal file, or in its memory.

        Args:
            artifact_store: use this one instead, or this directory.

        Raises:
            StorageError: if the storage has no place of its own and none is given.
        """
        storage = _optuna.storage_of(study)
        if artifact_store is None:
            return cls(default_artifact_store(storage), storage, retention, exclusive=True)
        if isinstance(artifact_store, (str, os.PathLike)):
            artifact_store = AtomicFileSystemArtifactStore(artifact_store)
        return cls(artifact_store, storage, retention)

    def check_serves(self, study: Study) -> None:
        """Raises :class:`StorageError` if this store is not made for the storage of ``study``."""
        storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
        if (unwrap_rdb(storage) or storage) is (unwrap_rdb(self._storage) or self._storage):
            return
        own = ATTRIBUTE_PREFIX + study_uuid(storage, study_id)
        try:
            is_there = own in self._storage.get_study_user_attrs(study_id)
        except KeyError:
            is_there = False
        if not is_there:
            raise StorageError(
                f"The TensorStore given as tensor_store= was made for another storage, in which there is no "
                f"study {study.study_name!r}. Give the artifact store alone (tensor_store=store.artifact_store), or "
                "TensorStore.of_study(study, ...)."
            )

    def save(
        self, study_id: int, trial_id: int, name: str, role: str, step: int, tensors: Params
    ) -> Pointer:
        """Write ``tensors`` and point to them from a running trial, in place of what was there.

        Args:
            name: any text; usually the hyperparameter.
            role: what the tensors are: ``[a-z][a-z0-9_]*``, such as ``"value"``.
            step: an integer that fits into 64 bits.
            tensors: any shapes, strides and devices, also sharing memory; dtypes of safetensors.

        Raises:
            HyperparameterError: for names or tensors that cannot be stored. Nothing is written.
            TakenOverError: if the trial has finished.
            StorageError: if the names need more than an attribute holds. What was stored before is
                still there.
        """
        return self.save_all(study_id, trial_id, step, {(name, role): tensors})[0]

    def save_all(
        self,
        study_id: int,
        trial_id: int,
        step: int,
        tensors: Mapping[tuple[str, str], Params],
        *,
        retain: bool = False,
        trajectory: Trajectory | None = None,
    ) -> list[Pointer]:
        """:meth:`save` for several ``{(name, role): tensors}``: in the study's own database, all or
        nothing.

        Args:
            retain: with it, also do what ``apply_retention(study_id, trajectory)`` does: in the
                study's own database for the price of no further transaction.
        """
        blobs = encode_all(step, tensors)
        return self._write(study_id, trial_id, step, blobs, retain, trajectory)

    def save_all_soon(
        self,
        study_id: int,
        trial_id: int,
        step: int,
        tensors: Mapping[tuple[str, str], Params],
        *,
        retain: bool = False,
        trajectory: Trajectory | None = None,
    ) -> Future[list[Pointer]]:
        """:meth:`save_all` on a thread of this store's own, while the caller computes on.

        Bad input is refused here and now, and the tensors may be changed afterwards. Everything
        else is told by ``result()``, which must be called before the trial finishes. Where the
        storage is bound to one thread (SQLite in memory) this is done when it returns.
        """
        blobs = encode_all(step, tensors, snapshot=True)
        return self._soon(self._write, study_id, trial_id, step, blobs, retain, trajectory)

    def load(self, pointer: Pointer, device: str | torch.device = "cpu") -> Params:
        """The tensors that were saved, bit for bit and in order, on ``device``.

        Raises:
            MissingTensorError: if the blob is not in the store (any more).
            CorruptTensorError: if its bytes, or the pointer's claims, are not what was saved.
        """
        data = retry_while_busy(lambda: self._read(pointer))
        if pointer.digest(data) != pointer.sha256:
            raise CorruptTensorError(
                f"The SHA-256 of {pointer} does not match: the bytes in the store, or what the "
                f"pointer says about them, have changed since they were written. {_REMEDY}"
            )
        try:
            tensors = decode(data)
        except DecodeError as error:
            raise CorruptTensorError(f"Cannot read {pointer}: {error}. {_REMEDY}") from error
        if pointer.tensors is not None and specs_of(tensors) != pointer.tensors:
            raise CorruptTensorError(
                f"The blob of {pointer} holds other tensors than its pointer says. {_REMEDY}"
            )
        return {n: t.to(device) for n, t in tensors.items()}

    def pointers(
        self,
        frozen_trial: FrozenTrial,
        name: str | None = None,
        role: str | None = None,
    ) -> list[Pointer]:
        """What a trial points to, by role and name. A retried or copied trial inherits pointers.

        Raises:
            CorruptTensorError: if an attribute that should be a pointer is none.
        """
        attrs = frozen_trial.system_attrs
        keys: Iterable[str]
        if name is not None and role is not None:
            keys = [attribute_key(name, role)] if attribute_key(name, role) in attrs else []
        else:
            keys = pointers_in(attrs)
        found = (Pointer.from_json(attrs[k], k, frozen_trial.number) for k in keys)
        return sorted(
            (p for p in found if name in (None, p.name) and role in (None, p.role)),
            key=lambda p: (p.role, p.name),
        )

    def discard(self, *pointers: Pointer) -> None:
        """Remove blobs whatever the retention policy says. Those that are gone already are fine.

        The pointers stay, because a finished trial cannot be changed; loading one then raises
        :class:`MissingTensorError`.
        """
        self._writer.remove([p.blob for p in pointers])

    def apply_retention(
        self, study_id: int, trajectory: Trajectory | None = None
    ) -> tuple[Pointer, ...]:
        """Remove the blobs of finished trials that ``self.retention`` does not keep.

        A blob stays while an unfinished trial, or another study in this storage that was copied
        from this one, may refer to it.

        Args:
            trajectory: which trajectory a finished trial belongs to, or ``None`` if that is over;
                transient roles (optimizer states) are kept for each. Without it, the study is one.

        Returns:
            Pointers to what was removed now.
        """
        expired = self._expired(study_id, trajectory)
        if expired:
            self._writer.remove([p.blob for p in expired])
            self._gone_blobs(study_id).update(p.blob for p in expired)
        return expired

    def apply_retention_soon(
        self, study_id: int, trajectory: Trajectory | None = None
    ) -> Future[tuple[Pointer, ...]]:
        """:meth:`apply_retention` on the thread of :meth:`save_all_soon`, after its work so far."""
        return self._soon(self.apply_retention, study_id, trajectory)

    def sweep(self, dry_run: bool = False, *, min_age: float = 3600.0) -> SweepReport:
        """Remove blobs to which no trial of any study refers: of deleted studies and failed writes.

        Args:
            dry_run: only report.
            min_age: seconds; younger blobs are left alone, as their pointers may be on the way.

        Raises:
            StorageError: if the artifact store cannot list what it holds.
        """
        store = self.artifact_store
        if not isinstance(store, AbstractArtifactStore):
            raise StorageError(
                f"{type(store).__name__} cannot list its artifacts, so orphans cannot be found. "
                f"Remove artifacts named 'hg-<study>-<blob>' with the tools of that store."
            )
        report = find_orphans(self._storage, store, min_age, self._exclusive)
        if dry_run:
            return report
        self._writer.remove([orphan.artifact_id for orphan in report.orphans])
        return replace(report, removed=True)

    def verify(
        self, study_ids: Iterable[int] | None = None, *, progress: bool = False
    ) -> VerifyReport:
        """Read everything to which a trial points, and compare it with its checksum.

        Args:
            study_ids: of these studies; by default, of all studies in the storage.
            progress: show a progress bar on stderr.

        Returns:
            What is sound, what retention has removed, and, in words, what is damaged: bytes or
            pointers that have changed, and blobs that are lost although no retention policy removes
            them (the newest value, and all of a trial that is not finished).
        """
        transient = self.retention.transient
        return verify(self._storage, study_ids, transient, self.load, progress)

    @property
    def _writer(self) -> Writer:
        return Writer(self._storage, self.artifact_store)

    def _write(
        self,
        study_id: int,
        trial_id: int,
        step: int,
        blobs: Encoded,
        retain: bool,
        trajectory: Trajectory | None,
    ) -> list[Pointer]:
        expired: list[str] = []
        if retain:
            expired = [p.blob for p in self._expired(study_id, trajectory)]
        pointers = self._writer.write(study_id, trial_id, step, blobs, expired)
        if retain:
            self._gone_blobs(study_id).update(expired)
        return pointers

    def _soon(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        if not is_for_threads(self._storage):
            return _done(function, *arguments)

        def on_thread() -> T:
            try:
                return function(*arguments)
            finally:
                self._storage.remove_session()

        if self._thread is None or self._thread[0] != os.getpid():  # threads do not survive a fork
            self._thread = os.getpid(), ThreadPoolExecutor(1, "hypergrad-tensors")
        try:
            return self._thread[1].submit(on_thread)
        except RuntimeError:  # no thread is started any more once the main one has ended
            return _done(function, *arguments)

    def _read(self, pointer: Pointer) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            with self.artifact_store.open_reader(pointer.blob) as reader:
                # Piece by piece: memory follows what is there, not what the pointer claims.
                while size <= pointer.size and (part := reader.read(_READ_BYTES)):
                    parts.append(part)
                    size += len(part)
        except ArtifactNotFound as error:
            raise MissingTensorError(self._why_missing(pointer)) from error
        except CorruptTensorError as error:
            raise CorruptTensorError(f"Cannot read {pointer}: {error}") from error
        if size != pointer.size:
            found = f"more than {pointer.size}" if size > pointer.size else str(size)
            raise CorruptTensorError(
                f"The blob of {pointer} has {found} bytes and should have {pointer.size}. {_REMEDY}"
            )
        return b"".join(parts)

    def _why_missing(self, pointer: Pointer) -> str:
        kind = getattr(self.artifact_store, "name", type(self.artifact_store).__name__)
        return (
            f"There is nothing in the store ({kind}) for {pointer}. The retention policy has "
            f"probably removed it: it {self.retention.explain(pointer.role)}; set retention= to "
            "keep more. Or the study was copied from a storage whose tensors were not copied with "
            "it, or it was written with another tensor_store=."
        )

    def _expired(self, study_id: int, trajectory: Trajectory | None) -> tuple[Pointer, ...]:
        gone = self._gone_blobs(study_id)
        read = self._read_pointers.setdefault(study_id, {})
        return find_expired(self._storage, study_id, self.retention, trajectory, gone, read)

    def _gone_blobs(self, study_id: int) -> set[str]:
        """Blobs of this study that need no second look: those that the listing, if any, lacks."""
        if study_id in self._gone:
            return self._gone[study_id]
        gone: set[str] = set()
        if isinstance(self.artifact_store, AbstractArtifactStore):
            gone = find_gone(self._storage, study_id, self.artifact_store)
        return self._gone.setdefault(study_id, gone)


def _done(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """What it returns or raises, as a future."""
    done: Future[T] = Future()
    try:
        done.set_result(function(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


_REMEDY = "Use an earlier trial, or a backup of the storage."

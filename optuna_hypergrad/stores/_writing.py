"""One save: blobs, then the pointers to them, then the end of what they replace."""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage

from .._errors import CorruptTensorError, HyperparameterError, TakenOverError
from .._typing import Params
from ._attributes import check_attribute, set_trial_attribute
from ._database import unwrap_rdb
from ._encoding import Pieces, TensorSpec, check_text, encode_in_place
from ._full import saying_what_has_no_room
from ._identity import ATTRIBUTE_PREFIX, own_uuid, study_uuid
from ._optuna_tables import plain_rdb, read_running_trial
from ._pointer import ROLE, Pointer, attribute_key, claimable, new_blob, shorten
from ._retrying import patience_of, retry_while_busy
from .artifact_store import AbstractArtifactStore
from .rdb import RDBArtifactStore

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

Encoded = dict[tuple[str, str], tuple[Pieces, tuple[TensorSpec, ...]]]
Bodies = Mapping[Pointer, Pieces]
"""Pointers without their sha256, and what they will point to."""

_INT64 = 2**63
_HASHED_AT_ONCE = 1 << 20  # bytes: takes less time than starting a thread


def encode_all(
    step: int, tensors: Mapping[tuple[str, str], Params], *, snapshot: bool = False
) -> Encoded:
    """The bytes of each ``{(name, role): tensors}``, and what they hold.

    Args:
        snapshot: copy them; otherwise they are in the memory of the tensors, which must not be changed.

    Raises:
        HyperparameterError: for names, roles, steps or tensors that cannot be stored.
    """
    for name, role in tensors:
        _check_claims(name, role, step)
    found = {claim: encode_in_place(entry) for claim, entry in tensors.items()}
    if snapshot:
        found = {claim: ((b"".join(pieces),), specs) for claim, (pieces, specs) in found.items()}
    return found


@dataclass(frozen=True)
class Writer:
    """Writes blobs into ``store`` and points to them from the running trials of ``storage``."""

    storage: BaseStorage
    store: ArtifactStore

    def write(
        self, study_id: int, trial_id: int, step: int, blobs: Encoded, expired: list[str]
    ) -> list[Pointer]:
        """Store ``blobs``, point to them, and remove what they replace and the blobs ``expired``.

        Where blobs and pointers are in one database this is one transaction. Elsewhere blobs come
        first, pointers second and removals last, so that no pointer is ever without its blob.

        Raises:
            TakenOverError: if the trial has finished.
            StorageError: if the names need more than an attribute holds, or there is no room left.
        """
        keys = [attribute_key(*claim) for claim in blobs]
        study, number, previous = self._facts(study_id, trial_id, keys)
        bodies: dict[Pointer, Pieces] = {}
        for (name, role), (pieces, specs) in blobs.items():
            blob, size = new_blob(study), sum(map(len, pieces))
            claims = Pointer(study, number, name, role, step, blob, size, claimable(specs))
            check_attribute(claims.key, replace(claims, sha256="0" * 64).to_json())
            bodies[claims] = pieces
        replaced = {p.key: _replaced_blob(previous.get(p.key), p) for p in bodies}
        with saying_what_has_no_room(_sentence_start(number, step, blobs)):
            return self._write(trial_id, bodies, replaced, expired)

    def remove(self, blobs: list[str]) -> None:
        """Remove those of ``blobs`` that are there."""
        if isinstance(self.store, AbstractArtifactStore):
            self.store.remove_many(blobs)
            return
        for blob in blobs:
            try:
                self.store.remove(blob)
            except ArtifactNotFound:
                continue

    def _write(
        self,
        trial_id: int,
        bodies: Bodies,
        replaced: Mapping[str, list[str]],
        expired: list[str],
    ) -> list[Pointer]:
        seal = _seal_soon(bodies)
        database = self._common_database()
        if database is None or not bodies:
            return self._write_in_turn(trial_id, bodies, seal, replaced, expired)
        try:
            database.write_with_attributes(
                {claims.blob: pieces for claims, pieces in bodies.items()},
                trial_id,
                [claims.key for claims in bodies],
                lambda: {p.key: p.to_json() for p in seal()},
                [*itertools.chain(*replaced.values()), *expired],
            )
        except UpdateFinishedTrialError as error:
            raise _too_late(next(iter(bodies))) from error
        return seal()

    def _write_in_turn(
        self,
        trial_id: int,
        bodies: Bodies,
        seal: Callable[[], list[Pointer]],
        replaced: Mapping[str, list[str]],
        expired: list[str],
    ) -> list[Pointer]:
        contents = {claims.blob: b"".join(pieces) for claims, pieces in bodies.items()}
        try:
            self._put(contents)
        except Exception:
            with suppress(Exception):
                self.remove(list(contents))  # those that had room: nothing points to them
            raise
        pointers = seal()
        unneeded: list[str] = []
        try:
            for pointer in pointers:
                set_trial_attribute(self.storage, trial_id, pointer.key, pointer.to_json())
                unneeded += replaced[pointer.key]
            unneeded += expired
        except UpdateFinishedTrialError as error:
            # Surely not written. After any other error it may be, and the sweep decides.
            self.remove([p.blob for p in pointers[pointers.index(pointer) :]])
            raise _too_late(pointer) from error
        finally:
            self.remove(unneeded)
        return pointers

    def _put(self, contents: Mapping[str, bytes]) -> None:
        if isinstance(self.store, AbstractArtifactStore):
            self.store.write_many(contents)
            return
        for blob, data in contents.items():
            self.store.write(blob, io.BytesIO(data))

    def _facts(
        self, study_id: int, trial_id: int, keys: list[str]
    ) -> tuple[str, int, Mapping[str, Any]]:
        """The study's UUID, the trial's number, and of its system attributes at least those of ``keys`` it has."""
        if (rdb := plain_rdb(self.storage)) is not None:
            found = read_running_trial(rdb, study_id, trial_id, keys, ATTRIBUTE_PREFIX)
            if found is not None:
                own = own_uuid(study_id, found.study_name, found.study_attributes)
                study = own or study_uuid(self.storage, study_id)
                return study, found.number, found.attributes
        study = study_uuid(self.storage, study_id)
        number = self.storage.get_trial_number_from_id(trial_id)
        # Through _CachedStorage this would read the whole trial, parameter by parameter.
        storage = unwrap_rdb(self.storage) or self.storage
        attributes = retry_while_busy(
            lambda: storage.get_trial_system_attrs(trial_id), patience=patience_of(storage)
        )
        return study, number, attributes

    def _common_database(self) -> RDBArtifactStore | None:
        rdb, store = plain_rdb(self.storage), self.store
        common = rdb is not None and isinstance(store, RDBArtifactStore) and store.is_in(rdb)
        return store if common else None  # type: ignore[return-value]


def _seal_soon(bodies: Bodies) -> Callable[[], list[Pointer]]:
    """Start to hash, on a thread if it is much; the function returned gives the whole pointers."""

    def sealed() -> list[Pointer]:
        return [replace(claims, sha256=claims.digest(*pieces)) for claims, pieces in bodies.items()]

    if sum(claims.size for claims in bodies) > _HASHED_AT_ONCE:
        with suppress(RuntimeError):  # no thread is started any more once the main one has ended
            return _hashers().submit(sealed).result
    found = sealed()
    return lambda: found


@functools.cache
def _hashers() -> ThreadPoolExecutor:
    """Kept: to start a thread takes longer than the queries of a small save."""
    return ThreadPoolExecutor(thread_name_prefix="hypergrad-sha256")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hashers.cache_clear)  # a child has none of the threads


def _sentence_start(number: int, step: int, blobs: Encoded) -> str:
    named = [f"{shorten(name)} (role {role!r})" for name, role in blobs]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    size = sum(len(piece) for pieces, _ in blobs.values() for piece in pieces) / 1e6
    return f"Trial {number}, step {step}: the tensors {', '.join(named[:3])}{more} ({size:.2g} MB)"


def _too_late(pointer: Pointer) -> TakenOverError:
    return TakenOverError(
        f"Trial {pointer.trial} has finished, so {pointer.name!r} (role {pointer.role!r}) is not stored in "
        "it any more. Another worker has taken the trial over because this process had not renewed its lease "
        "(was it paused? see lease=), or it was told before its tensors were saved."
    )


def _replaced_blob(previous: Any, pointer: Pointer) -> list[str]:
    """The blob that only ``previous``, the pointer now replaced by ``pointer``, can refer to."""
    if previous is None:
        return []
    try:
        old = Pointer.from_json(previous, pointer.key, pointer.trial)
    except CorruptTensorError:
        return []  # names no blob that could be trusted
    # A retried trial inherits the pointers of the failed one, which still refers to the blob.
    return [old.blob] if (old.study, old.trial) == (pointer.study, pointer.trial) else []


def _check_claims(name: str, role: str, step: int) -> None:
    check_text(name, "name under which tensors are stored")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise HyperparameterError(
            f"The role of {name!r} must look like 'step_state' (at most 32 letters, digits and "
            f"underscores), not {role!r}."
        )
    if type(step) is not int or not -_INT64 <= step < _INT64:
        raise HyperparameterError(
            f"The step of {name!r} must be an integer of at most 64 bits, not {step!r}."
        )

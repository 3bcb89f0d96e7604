"""What in a store is no longer needed: found here, removed by ``TensorStore``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import CorruptTensorError
from ._identity import ATTRIBUTE_PREFIX as UUID_PREFIX
from ._identity import uuids_in
from ._optuna_tables import plain_rdb, study_attribute_keys
from ._pointer import BLOB_PREFIX, Pointer, pointers_in, study_of_blob
from ._published import PUBLISHED_PREFIX, is_published, listed_in, owner_of
from ._retention import Retention, Trajectory
from .artifact_store import AbstractArtifactStore, StoredArtifact


@dataclass(frozen=True)
class SweepReport:
    """What a sweep has found."""

    orphans: tuple[StoredArtifact, ...]
    """Blobs to which no trial refers."""
    removed: bool
    """Whether they were removed (``False`` for a dry run)."""
    unreadable: tuple[str, ...]
    """Pointers that could not be read; every blob of their studies was left alone."""
    young: tuple[StoredArtifact, ...] = ()
    """Blobs that would be orphans, were they not younger than ``min_age``."""
    min_age: float = 3600.0
    strange: Mapping[str, tuple[StoredArtifact, ...]] = field(default_factory=dict)
    """Those of the orphans whose study is not in the storage (any more), by study."""
    has_known: bool = True
    """Whether any blob in the store belongs to a study that is in the storage."""

    @property
    def num_bytes(self) -> int:
        return sum(orphan.size for orphan in self.orphans)

    def __str__(self) -> str:
        verb = "Removed" if self.removed else "Would remove"
        text = f"{verb} {len(self.orphans)} blobs ({self.num_bytes / 1e6:.1f} MB)."
        if self.young:
            size = sum(blob.size for blob in self.young) / 1e6
            text += (
                f" {len(self.young)} more ({size:.1f} MB), to which no trial refers either, are younger "
                f"than {self.min_age:.0f} seconds and were left alone."
            )
        if self.unreadable:
            text += f" {len(self.unreadable)} pointers are damaged; their studies were left alone."
        return text


Read = dict[int, tuple[dict[str, Any], list[Pointer]]]
"""What finished trials point to, by number, with the attributes in which that was read."""


def find_expired(
    storage: BaseStorage,
    study_id: int,
    retention: Retention,
    trajectory: Trajectory | None,
    gone: set[str],
    read: Read,
) -> tuple[Pointer, ...]:
    """Pointers of finished trials that ``retention`` does not keep, without the blobs in ``gone``.

    Not those that an unfinished trial, or a study copied from this one, may refer to.

    Args:
        read: Of the same study, from earlier calls; filled.
    """
    by_role: dict[str, list[tuple[FrozenTrial, Pointer]]] = {}
    needed: set[str] = set()
    for trial in storage.get_all_trials(study_id, deepcopy=False):
        for pointer in _read(trial, gone, read):
            if pointer.blob in gone:
                continue
            if trial.state.is_finished():
                by_role.setdefault(pointer.role, []).append((trial, pointer))
            else:
                needed.add(pointer.blob)
    directions = storage.get_study_directions(study_id)
    expired: dict[str, Pointer] = {}
    for role, entries in by_role.items():
        trials = list({t.number: t for t, _ in entries}.values())
        kept = retention.keeps(role, trials, directions, trajectory)
        needed.update(p.blob for t, p in entries if t.number in kept)
        expired.update((p.blob, p) for t, p in entries if t.number not in kept)
    removable = [p for blob, p in expired.items() if blob not in needed]
    shared = _uuids(storage, excluding=study_id) if removable else set()
    return tuple(p for p in removable if p.study not in shared)


def _read(trial: FrozenTrial, gone: set[str], read: Read) -> list[Pointer]:
    """The pointers of a trial, at least those whose blobs are not in ``gone``."""
    attributes, found = read.get(trial.number, (None, []))
    if attributes is trial.system_attrs:  # storages replace what they change
        return found
    found = []
    for key, value in pointers_in(trial.system_attrs).items():
        if _blob_of(value) in gone:
            continue
        try:
            found.append(Pointer.from_json(value, key, trial.number))
        except CorruptTensorError:
            continue  # whoever loads it hears of it
    if trial.state.is_finished():
        read[trial.number] = trial.system_attrs, found
    return found


def find_gone(storage: BaseStorage, study_id: int, store: AbstractArtifactStore) -> set[str]:
    """Blobs that finished trials point to and that are not in ``store`` any more."""
    referred = {
        blob
        for trial in storage.get_all_trials(study_id, deepcopy=False)
        if trial.state.is_finished()
        for _, value in pointers_in(trial.system_attrs).items()
        if (blob := _blob_of(value)) is not None
    }
    if not referred:
        return set()
    return referred.difference(a.artifact_id for a in store.stored(BLOB_PREFIX))


def find_orphans(
    storage: BaseStorage, store: AbstractArtifactStore, min_age: float, exclusive: bool
) -> SweepReport:
    """Blobs older than ``min_age`` seconds to which nothing in ``storage`` refers: no trial, and no study that shows
    artifacts of its best one.

    Unless ``exclusive``, only those of studies that are in ``storage``: the others may belong to
    another storage.
    """
    latest = time.time() - min_age
    # Listed before the pointers are read: a blob that gets its pointer meanwhile is no orphan.
    published = (a for a in store.stored(PUBLISHED_PREFIX) if is_published(a.artifact_id))
    listed = [*store.stored(BLOB_PREFIX), *published]
    used: set[str] = set()
    unreadable: list[str] = []
    untouchable: set[str] = set()
    for study in storage.get_all_studies():
        used.update(listed_in(study.system_attrs))
        for trial in storage.get_all_trials(_optuna.study_id_of(study), deepcopy=False):
            for key, value in pointers_in(trial.system_attrs).items():
                try:
                    used.add(Pointer.from_json(value, key, trial.number).blob)
                except CorruptTensorError as error:
                    unreadable.append(f"Study {study.study_name!r}: {error}")
                    untouchable |= uuids_in(study.user_attrs)
    known = _uuids(storage)
    unused = [
        a
        for a in listed
        if a.artifact_id not in used
        and (exclusive or _owner(a.artifact_id) in known)
        and _owner(a.artifact_id) not in untouchable
    ]
    orphans = tuple(a for a in unused if a.written <= latest)
    strange: dict[str, list[StoredArtifact]] = {}
    for orphan in orphans:
        if (owner := _owner(orphan.artifact_id)) not in known:
            strange.setdefault(str(owner), []).append(orphan)
    return SweepReport(
        orphans,
        removed=False,
        unreadable=tuple(unreadable),
        young=tuple(a for a in unused if a.written > latest),
        min_age=min_age,
        strange={owner: tuple(blobs) for owner, blobs in strange.items()},
        has_known=any(_owner(a.artifact_id) in known for a in listed),
    )


def _owner(blob: str) -> str:
    """The UUID of the study that wrote it."""
    return owner_of(blob) if is_published(blob) else study_of_blob(blob)


def _blob_of(value: Any) -> str | None:
    blob = value.get("blob") if isinstance(value, Mapping) else None
    return blob if isinstance(blob, str) else None


def _uuids(storage: BaseStorage, excluding: int | None = None) -> set[str]:
    """What the studies of ``storage``, but one, claim to be."""
    if (rdb := plain_rdb(storage)) is not None:
        keys = study_attribute_keys(rdb, UUID_PREFIX)
        return set(uuids_in({key: None for study_id, key in keys if study_id != excluding}))
    studies = storage.get_all_studies()
    return {
        u for s in studies if _optuna.study_id_of(s) != excluding for u in uuids_in(s.user_attrs)
    }

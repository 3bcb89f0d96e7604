"""Where the artifacts of the best trial are: blobs beside the study's tensors, and what makes the dashboard list them.

In the format of ``optuna_dashboard/artifact/_backend.py`` that can be changed when the trial has ended: a *study's*
system attribute for each artifact, under a key with the trial's id. An artifact's identifier follows from study,
trial and file name, so that several workers who publish the same do it once.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage

from ..stores import REMOVED, AbstractArtifactStore, TensorStore, change_study_attributes
from ..stores._published import ARTIFACT_ATTRIBUTES, NOTHING, is_published, new_artifact, owner_of
from .artifacts import File


def shown_trial(attributes: Mapping[str, Any], study: str) -> int | None:
    """Id of the trial whose artifacts are shown; ``None`` for none.

    Args:
        attributes: system attributes of the study.
        study: its UUID.
    """
    for key, value in attributes.items():
        place = _place(key)
        if place is not None and owner_of(place[1]) == study and value != NOTHING:
            return place[0]
    return None


def put(
    storage: BaseStorage,
    study_id: int,
    trial_id: int,
    study: str,
    store: TensorStore,
    files: Sequence[File],
) -> None:
    """Show ``files`` as artifacts of the trial, and no other artifacts of ours.

    Blobs are there before they are listed, and are removed after they are not any more.

    Args:
        study: UUID of the study.
    """
    wanted = {
        f"{ARTIFACT_ATTRIBUTES}{trial_id}:{_identifier(study, trial_id, f)}": f for f in files
    }
    _write(store, {key.rpartition(":")[2]: f.content for key, f in wanted.items()})
    gone: list[str] = []

    def change(known: Mapping[str, Any]) -> dict[str, Any]:
        gone.clear()
        # What somebody has deleted in the dashboard stays deleted.
        kept = {key: f for key, f in wanted.items() if known.get(key) != NOTHING}
        found: dict[str, Any] = {key: _meta(key, f) for key, f in kept.items()}
        gone.extend(key.rpartition(":")[2] for key in wanted if key not in found)
        for key, value in known.items():
            place = _place(key)
            if place is None or key in wanted or value == NOTHING:
                continue
            found[key] = REMOVED
            if owner_of(place[1]) == study:  # a copied study lists what is another one's
                gone.append(place[1])
        return found

    change_study_attributes(storage, study_id, ARTIFACT_ATTRIBUTES, change, NOTHING)
    for artifact in gone:
        try:
            store.artifact_store.remove(artifact)
        except ArtifactNotFound:
            continue


def _write(store: TensorStore, bodies: Mapping[str, bytes]) -> None:
    if isinstance(store.artifact_store, AbstractArtifactStore):
        store.artifact_store.write_many(bodies)
        return
    for artifact, content in bodies.items():
        store.artifact_store.write(artifact, io.BytesIO(content))


def _identifier(study: str, trial_id: int, file: File) -> str:
    digest = hashlib.sha256(f"{trial_id}\n{file.name}".encode() + b"\n" + file.content).hexdigest()
    return new_artifact(study, digest)


def _meta(key: str, file: File) -> str:
    return json.dumps(
        {
            "artifact_id": key.rpartition(":")[2],
            "filename": file.name,
            "mimetype": file.mimetype,
            "encoding": None,
        }
    )


def _place(key: str) -> tuple[int, str] | None:
    """Id of the trial and identifier of one of our artifacts, if the key is that of one."""
    trial_id, _, artifact = key.removeprefix(ARTIFACT_ATTRIBUTES).partition(":")
    if not key.startswith(ARTIFACT_ATTRIBUTES) or not is_published(artifact):
        return None
    return (int(trial_id), artifact) if trial_id.isdigit() else None

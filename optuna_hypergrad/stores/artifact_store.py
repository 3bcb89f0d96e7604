"""What a place for blobs has to offer, and which place belongs to a storage by default."""

from __future__ import annotations

import abc
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage

from .. import _optuna
from .._errors import StorageError


@dataclass(frozen=True)
class StoredArtifact:
    """One entry of a store's listing."""

    artifact_id: str
    size: int
    """Bytes."""
    written: float
    """Seconds since the epoch, by the clock of whoever wrote it."""


class AbstractArtifactStore(abc.ABC):
    """Optuna's ``ArtifactStore`` protocol (``optuna/artifacts/_protocol.py``), plus a listing.

    ``TensorStore`` needs the protocol only; sweeping needs the listing. An artifact is immutable
    once written, and is there whole or not at all.
    """

    name: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def beside(cls, storage: BaseStorage) -> AbstractArtifactStore | None:
        """The store of this kind that belongs to ``storage``; ``None`` if it can have none."""

    @abc.abstractmethod
    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A binary file to read from. Raises ``ArtifactNotFound`` if there is no such artifact."""

    @abc.abstractmethod
    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store everything that is left in ``content_body``, durably."""

    @abc.abstractmethod
    def remove(self, artifact_id: str) -> None:
        """Raises ``ArtifactNotFound`` if there is no such artifact."""

    @abc.abstractmethod
    def stored(self, prefix: str = "") -> Iterator[StoredArtifact]:
        """Every artifact whose identifier starts with ``prefix``, in no particular order."""

    def write_many(self, bodies: Mapping[str, bytes]) -> None:
        """Store ``{artifact_id: content}``, durably."""
        for artifact_id, data in bodies.items():
            self.write(artifact_id, io.BytesIO(data))

    def remove_many(self, artifact_ids: Iterable[str]) -> None:
        """Remove those of ``artifact_ids`` that are there."""
        for artifact_id in artifact_ids:
            try:
                self.remove(artifact_id)
            except ArtifactNotFound:
                continue


def default_artifact_store(storage: BaseStorage) -> AbstractArtifactStore:
    """The artifact store that belongs to ``storage``: the first registered kind that has one.

    Raises:
        StorageError: if none has (a gRPC proxy, Journal on Redis, storages of other packages).
    """
    from . import REGISTRY

    while getattr(storage, "passes_calls_through", False):
        storage = _optuna.wrapped_by(storage)
    for kind in REGISTRY.values():
        if (found := kind.beside(storage)) is not None:
            return found
    raise StorageError(
        f"{type(storage).__name__} has no place of its own for tensors. Give one that every worker "
        "can reach: HypergradientSampler(tensor_store='/shared/directory'), an artifact store of "
        "optuna.artifacts (S3, GCS), or stores.RDBArtifactStore(RDBStorage(url)) in a database."
    )

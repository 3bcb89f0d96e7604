"""Blobs in this process, for studies that live in this process."""

from __future__ import annotations

import io
import threading
import time
import weakref
from collections.abc import Iterator
from typing import BinaryIO, ClassVar

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, InMemoryStorage

from .artifact_store import AbstractArtifactStore, StoredArtifact

_of_storage: weakref.WeakKeyDictionary[BaseStorage, MemoryArtifactStore]


class MemoryArtifactStore(AbstractArtifactStore):
    """A dict. Goes when the ``InMemoryStorage`` that it belongs to goes.

    Protocol: ``optuna/artifacts/_protocol.py``.
    """

    name: ClassVar[str] = "memory"

    def __init__(self) -> None:
        self._artifacts: dict[str, tuple[bytes, float]] = {}

    @classmethod
    def beside(cls, storage: BaseStorage) -> MemoryArtifactStore | None:
        if not isinstance(storage, InMemoryStorage):
            return None
        with _lock:
            return _of_storage.setdefault(storage, cls())

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return io.BytesIO(self._artifacts[artifact_id][0])
        except KeyError:
            raise ArtifactNotFound(f"There is no artifact {artifact_id!r} in memory.") from None

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._artifacts[artifact_id] = (content_body.read(), time.time())

    def remove(self, artifact_id: str) -> None:
        if self._artifacts.pop(artifact_id, None) is None:
            raise ArtifactNotFound(f"There is no artifact {artifact_id!r} in memory.")

    def stored(self, prefix: str = "") -> Iterator[StoredArtifact]:
        for artifact_id, (data, written) in list(self._artifacts.items()):
            if artifact_id.startswith(prefix):
                yield StoredArtifact(artifact_id, len(data), written)


_of_storage = weakref.WeakKeyDictionary()
_lock = threading.Lock()

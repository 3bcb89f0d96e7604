"""Blobs as files in a directory."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from .. import _optuna
from .artifact_store import AbstractArtifactStore, StoredArtifact

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class AtomicFileSystemArtifactStore(AbstractArtifactStore):
    """A file per artifact, written beside its place, synced, then renamed into it.

    Optuna's own ``FileSystemArtifactStore`` (``optuna/artifacts/_filesystem.py``) writes in place,
    so that a crash leaves half an artifact.

    Args:
        directory: made on the first write.
    """

    name: ClassVar[str] = "file_system"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()

    @classmethod
    def beside(cls, storage: BaseStorage) -> AtomicFileSystemArtifactStore | None:
        """For a Journal file ``x.log``, the directory ``x.log.hypergrad``."""
        backend = _optuna.wrapped_by(storage)
        if not isinstance(storage, JournalStorage) or not isinstance(backend, JournalFileBackend):
            return None
        return cls(f"{_optuna.path_of_journal(backend)}.hypergrad")

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return open(self._path(artifact_id), "rb")
        except FileNotFoundError:
            raise ArtifactNotFound(
                f"There is no artifact {artifact_id!r} in {str(self.directory)!r}."
            ) from None

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        path = self._path(artifact_id)
        self.directory.mkdir(parents=True, exist_ok=True)
        # Left behind by a crash, it is an artifact that nothing refers to: the sweep takes it.
        unfinished = path.with_name(f"{artifact_id}.{uuid.uuid4().hex}.tmp")
        try:
            with open(unfinished, "xb") as file:
                shutil.copyfileobj(content_body, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._sync_directory()

    def remove(self, artifact_id: str) -> None:
        try:
            self._path(artifact_id).unlink()
        except FileNotFoundError:
            raise ArtifactNotFound(
                f"There is no artifact {artifact_id!r} in {str(self.directory)!r}."
            ) from None

    def stored(self, prefix: str = "") -> Iterator[StoredArtifact]:
        if not self.directory.is_dir():
            return
        for path in list(self.directory.iterdir()):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.name.startswith(prefix) and path.is_file():
                yield StoredArtifact(path.name, status.st_size, status.st_mtime)

    def _path(self, artifact_id: str) -> Path:
        if not _SAFE.fullmatch(artifact_id):
            raise ValueError(f"{artifact_id!r} cannot be a file name; use letters, digits, '.-_'.")
        return self.directory / artifact_id

    def _sync_directory(self) -> None:
        if os.name != "posix":
            return  # Windows has no directory sync; its renames are journaled.
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

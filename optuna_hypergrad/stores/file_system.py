"""Blobs as files in a directory."""

from __future__ import annotations

import errno
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
from .._errors import StorageError
from .artifact_store import AbstractArtifactStore, StoredArtifact

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_UNUSABLE = frozenset(
    {errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}
)


class AtomicFileSystemArtifactStore(AbstractArtifactStore):
    """A file per artifact, written beside its place, synced, then renamed into it.

    Optuna's own ``FileSystemArtifactStore`` (``optuna/artifacts/_filesystem.py``) writes in place,
    so that a crash leaves half an artifact.

    Args:
        directory: made on the first write; a relative path is taken from where the process is now.

    Raises:
        StorageError: if it can be no directory: the path is empty, or that of a file or below one.
    """

    name: ClassVar[str] = "file_system"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not os.fspath(directory):
            raise StorageError(
                "The directory for tensors has an empty path. Give the path of one, such as './tensors'."
            )
        self.directory = Path(directory).absolute()
        for place in (self.directory, *self.directory.parents):
            if os.path.isdir(place):
                break
            if os.path.exists(place):
                raise self._unusable(f"{str(place)!r} is not a directory")

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
        """As a whole, durably.

        Raises:
            StorageError: if the directory cannot be made, or not be written to.
        """
        path = self._path(artifact_id)
        try:
            self._write(path, content_body)
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            raise self._unusable(error.strerror or str(error)) from error

    def _write(self, path: Path, content_body: BinaryIO) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # Left behind by a crash, it is an artifact that nothing refers to: the sweep takes it.
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
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

    def _unusable(self, cause: str) -> StorageError:
        return StorageError(
            f"Tensors cannot be written to the directory {str(self.directory)!r}: {cause}. Give another one "
            "(tensor_store=), or make it a directory that this user may write to."
        )

    def _sync_directory(self) -> None:
        if os.name != "posix":
            return  # Windows has no directory sync; its renames are journaled.
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

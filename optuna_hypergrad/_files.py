"""Files that are written whole or not at all, and never over what is there unless that is wanted."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from ._errors import StorageError


def target_of(path: Path, overwrite: bool) -> Path:
    """What is written for ``path``: for a link, what it leads to.

    Raises:
        StorageError: if it exists and is not to be overwritten, or is a directory or a device.
    """
    try:
        if path.is_dir():
            raise StorageError(f"{str(path)!r} is a directory. Give the name of a file in it.")
        if not overwrite and (path.exists() or path.is_symlink()):
            raise _exists(path)
        target = path.resolve() if path.is_symlink() else path
        if target.exists() and not target.is_file():
            raise StorageError(
                f"{str(path)!r} is no regular file but a device, a pipe or a socket, and is not replaced. "
                "Give the name of a file."
            )
    except (OSError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise _cannot_write(path, error) from error
    return target


def write_file(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a file that :func:`target_of` has found fit.

    Raises:
        StorageError: if it exists meanwhile, or cannot be written.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(unfinished, path)
            else:
                _move(unfinished, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise _cannot_write(path, error) from error


def _move(source: Path, target: Path) -> None:
    """Rename, but never over a file that another process has made meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(source, target)


def _cannot_write(path: Path, error: Exception) -> StorageError:
    cause = getattr(error, "strerror", None) or error
    return StorageError(
        f"Cannot write {str(path)!r}: {cause}. Nothing was left there; choose another place, or make room."
    )


def _exists(path: Path) -> StorageError:
    return StorageError(
        f"There is a file {str(path)!r} already. Choose another name, or overwrite it (--force)."
    )

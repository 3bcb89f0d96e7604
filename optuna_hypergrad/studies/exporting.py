"""The tensors of a trial as a .safetensors file that any program can read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from .._errors import HyperparameterError
from .._files import target_of, write_file
from .._typing import Params
from ..stores import TensorStore
from ..stores._encoding import encode
from .tensors import load_tensors


def export_tensors(
    study: Study,
    trial: FrozenTrial,
    path: Path,
    store: TensorStore,
    names: Collection[str] = (),
    overwrite: bool = False,
) -> Params:
    """Write the tensors of a trial to a file, whole or not at all.

    A tensor is named as ``load_tensors`` names it; an entry of a dict of tensors, ``name.entry``. The
    file's metadata says the study, the trial and the value.

    Args:
        names: Only these hyperparameters.
        overwrite: Replace a file that is there; the target of a link, not the link.

    Returns:
        What the file holds.

    Raises:
        MissingTensorError: if the trial has no such tensors, or retention has removed them.
        CorruptTensorError: if stored bytes are not what was written.
        HyperparameterError: if two tensors would have the same name in the file.
        StorageError: if the file exists, is a directory or a device, or cannot be written.
    """
    target = target_of(path, overwrite)
    found: dict[str, Any] = {}
    wanted: list[str | None] = [*names] or [None]
    for name in wanted:
        found |= load_tensors(trial, name, study=study, tensor_store=store)
    tensors: Params = {}
    for name, value in found.items():
        entries = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        for flat, tensor in (entries or {name: value}).items():
            if flat in tensors:
                raise HyperparameterError(
                    f"Two tensors of trial {trial.number} would both be named {flat!r} in the file. "
                    "Export them to two files (--name)."
                )
            tensors[flat] = tensor
    metadata = {"study": study.study_name, "trial": str(trial.number)}
    if trial.values is not None:
        metadata["value"] = ", ".join(map(repr, trial.values))
    data, _ = encode(tensors)
    write_file(target, _with_metadata(data, metadata), overwrite)
    return tensors


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with ``__metadata__`` in its header; offsets count from the header's end."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(data[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]

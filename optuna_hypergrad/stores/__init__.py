"""Tensors in the study's own storage.

A new kind of artifact store: one file with a subclass of :class:`AbstractArtifactStore`, and one
import line here. The order of the imports is the order in which a storage is offered to the kinds.
"""

from .._registry import registry
from ._attributes import (
    MAX_ATTRIBUTE_BYTES,
    long_attribute,
    set_long_trial_attribute,
    set_study_attribute,
    set_trial_attribute,
)
from ._housekeeping import SweepReport
from ._pointer import Pointer
from ._retention import Retention
from .artifact_store import AbstractArtifactStore, StoredArtifact, default_artifact_store
from .file_system import AtomicFileSystemArtifactStore
from .memory import MemoryArtifactStore
from .rdb import RDBArtifactStore
from .tensor_store import TensorStore

__all__ = [
    "MAX_ATTRIBUTE_BYTES",
    "REGISTRY",
    "AbstractArtifactStore",
    "AtomicFileSystemArtifactStore",
    "MemoryArtifactStore",
    "Pointer",
    "RDBArtifactStore",
    "Retention",
    "StoredArtifact",
    "SweepReport",
    "TensorStore",
    "default_artifact_store",
    "long_attribute",
    "set_long_trial_attribute",
    "set_study_attribute",
    "set_trial_attribute",
]

REGISTRY = registry(AbstractArtifactStore, globals())  # type: ignore[type-abstract]

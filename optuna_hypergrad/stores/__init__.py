"""Tensors in the study's own storage.

A new kind of artifact store: one file with a subclass of :class:`AbstractArtifactStore`, and one
import line here. The order of the imports is the order in which a storage is offered to the kinds.
"""

from .._registry import registry
from ._attributes import (
    MAX_ATTRIBUTE_BYTES,
    REMOVED,
    change_study_attributes,
    long_attribute,
    set_long_trial_attribute,
    set_study_attribute,
    set_trial_attribute,
    set_user_attributes,
)
from ._database import is_for_threads, unwrap_rdb
from ._full import is_of_storage, saying_what_has_no_room
from ._housekeeping import SweepReport
from ._optuna_tables import claim_waiting_trial, find_created_trial, plain_rdb
from ._pointer import Pointer, checkpoint_attributes
from ._retention import Retention
from ._retrying import is_lost, retry_while_busy, seconds_since_loss, set_patience
from ._secrets import without_password
from ._verifying import VerifyReport
from .artifact_store import AbstractArtifactStore, StoredArtifact, default_artifact_store
from .file_system import AtomicFileSystemArtifactStore
from .memory import MemoryArtifactStore
from .rdb import RDBArtifactStore
from .tensor_store import TensorStore

__all__ = [
    "MAX_ATTRIBUTE_BYTES",
    "REGISTRY",
    "REMOVED",
    "AbstractArtifactStore",
    "AtomicFileSystemArtifactStore",
    "MemoryArtifactStore",
    "Pointer",
    "RDBArtifactStore",
    "Retention",
    "StoredArtifact",
    "SweepReport",
    "TensorStore",
    "VerifyReport",
    "change_study_attributes",
    "checkpoint_attributes",
    "claim_waiting_trial",
    "default_artifact_store",
    "find_created_trial",
    "is_for_threads",
    "is_lost",
    "is_of_storage",
    "long_attribute",
    "plain_rdb",
    "retry_while_busy",
    "saying_what_has_no_room",
    "seconds_since_loss",
    "set_long_trial_attribute",
    "set_patience",
    "set_study_attribute",
    "set_trial_attribute",
    "set_user_attributes",
    "unwrap_rdb",
    "without_password",
]

REGISTRY = registry(AbstractArtifactStore, globals())  # type: ignore[type-abstract]

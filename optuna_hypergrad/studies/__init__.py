"""The Optuna side: a sampler, a trial adapter, and gradients from anywhere."""

from .differentiable import differentiable, report_hypergradient
from .journal import AtomicJournalFileBackend
from .retrying_storage import RetryingStorage
from .sampler import HypergradientSampler
from .tensors import load_tensors
from .trial import DifferentiableTrial

__all__ = [
    "AtomicJournalFileBackend",
    "DifferentiableTrial",
    "HypergradientSampler",
    "RetryingStorage",
    "differentiable",
    "load_tensors",
    "report_hypergradient",
]

"""What ``optuna-dashboard`` shows of a study: published as the study goes on, and served with its tensors' store.

Published by :class:`~optuna_hypergrad.HypergradientSampler` and ``minimize_bilevel(..., trial=trial)``, unless
``publish=False``: user attributes of each trial (:mod:`optuna_hypergrad.trial_attributes`); and, where
``optuna-dashboard`` is installed, one note of the study, its plots, and artifacts of its best trial. Nothing is
published that a trial would fail for, and what others have written in a note stays.
"""

from .publishing import publish
from .server import run_server, wsgi

__all__ = ["publish", "run_server", "wsgi"]

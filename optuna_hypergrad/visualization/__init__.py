"""Figures of studies, beside those of ``optuna.visualization``: trajectories, hypergradients, tensors.

Arguments and return types are Optuna's: plotly figures here, and under the same names, drawn with Matplotlib, in
:mod:`optuna_hypergrad.visualization.matplotlib`. A study without anything to show gives an empty figure and a
warning. Both libraries are optional, and ask for themselves when a figure is drawn without them.

Example::

    from optuna_hypergrad import visualization

    visualization.plot_trajectories(study).show()
    visualization.matplotlib.plot_trajectories(study).figure.savefig("trajectories.pdf")
"""

import importlib
from typing import TYPE_CHECKING

from ._cost_against_error import plot_cost_against_error
from ._extreme_hyperparameters import plot_extreme_hyperparameters
from ._hypergradient_norms import plot_hypergradient_norms
from ._images import plot_images
from ._imports import is_available
from ._layers import plot_layers
from ._sample_weights import plot_sample_weights
from ._spectrum import plot_spectrum
from ._sweep import sweep_estimators
from ._tensor_evolution import plot_tensor_evolution
from ._trajectories import plot_trajectories
from ._warm_against_retrained import plot_warm_against_retrained

if TYPE_CHECKING:
    from . import matplotlib as matplotlib


def __getattr__(name: str) -> object:
    """The Matplotlib side, imported where it is used: studies publish plotly figures from processes that train."""
    if name == "matplotlib":
        return importlib.import_module(f"{__name__}.matplotlib")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "is_available",
    "matplotlib",
    "plot_cost_against_error",
    "plot_extreme_hyperparameters",
    "plot_hypergradient_norms",
    "plot_images",
    "plot_layers",
    "plot_sample_weights",
    "plot_spectrum",
    "plot_tensor_evolution",
    "plot_trajectories",
    "plot_warm_against_retrained",
    "sweep_estimators",
]

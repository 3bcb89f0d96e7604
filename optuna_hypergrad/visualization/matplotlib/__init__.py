"""The figures of :mod:`optuna_hypergrad.visualization`, drawn with Matplotlib: for papers.

Arguments are those of the functions there, and ``ax=``, axes to draw on. Axes are returned, as by
``optuna.visualization.matplotlib``; Matplotlib's settings stay as they are.
"""

from ._cost_against_error import plot_cost_against_error
from ._extreme_hyperparameters import plot_extreme_hyperparameters
from ._hypergradient_norms import plot_hypergradient_norms
from ._images import plot_images
from ._imports import is_available
from ._layers import plot_layers
from ._sample_weights import plot_sample_weights
from ._spectrum import plot_spectrum
from ._tensor_evolution import plot_tensor_evolution
from ._trajectories import plot_trajectories
from ._warm_against_retrained import plot_warm_against_retrained

__all__ = [
    "is_available",
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
]

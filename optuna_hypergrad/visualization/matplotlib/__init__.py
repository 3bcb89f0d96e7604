"""The figures of :mod:`optuna_hypergrad.visualization`, drawn with Matplotlib: for papers.

Arguments are those of the functions there, and ``ax=``, axes to draw on. Axes are returned, as by
``optuna.visualization.matplotlib``; Matplotlib's settings stay as they are.
"""

from ._hypergradient_norms import plot_hypergradient_norms
from ._imports import is_available
from ._tensor_evolution import plot_tensor_evolution
from ._trajectories import plot_trajectories

__all__ = [
    "is_available",
    "plot_hypergradient_norms",
    "plot_tensor_evolution",
    "plot_trajectories",
]

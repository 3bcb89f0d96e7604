"""Figures of studies, beside those of ``optuna.visualization``: trajectories, hypergradients, tensors.

Arguments and return types are Optuna's: plotly figures here, and under the same names, drawn with Matplotlib, in
:mod:`optuna_hypergrad.visualization.matplotlib`. A study without anything to show gives an empty figure and a
warning. Both libraries are optional, and ask for themselves when a figure is drawn without them.

Example::

    from optuna_hypergrad import visualization

    visualization.plot_trajectories(study).show()
    visualization.matplotlib.plot_trajectories(study).figure.savefig("trajectories.pdf")
"""

from . import matplotlib
from ._hypergradient_norms import plot_hypergradient_norms
from ._imports import is_available
from ._tensor_evolution import plot_tensor_evolution
from ._trajectories import plot_trajectories

__all__ = [
    "is_available",
    "matplotlib",
    "plot_hypergradient_norms",
    "plot_tensor_evolution",
    "plot_trajectories",
]

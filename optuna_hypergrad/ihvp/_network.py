"""What preconditioners that know a network's layers share: settings, and how they come to the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._arguments import is_number
from .._errors import RequirementError, SolverError
from .._results import Result, Status
from .._typing import Batch, Params
from ..operators import AbstractLinearOperator, InnerGraph, undamped
from ._layers import AnyLayer, covered_layers
from ._preconditioner import AbstractPreconditioner

Loss = Literal["cross_entropy", "squared"]


class AbstractNetworkPreconditioner(AbstractPreconditioner):
    """A preconditioner that runs the model of an inner objective on its batch."""

    takes_one_batch: ClassVar[bool] = True
    ways: ClassVar[tuple[str, ...]] = ("refuse", "identity")
    """What may be done with parameters that are not covered."""
    model: nn.Module
    inputs: Callable[[Batch], Any]
    loss: Loss
    scale: float
    damping: float | Callable[[Params], float | Tensor]
    prefix: str
    uncovered: str

    def check_settings(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: naming the preconditioner.
        """
        owner = type(self).__name__
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"{owner} needs a torch.nn.Module as model, got {self.model!r:.80}.")
        if not callable(self.inputs):
            raise ValueError(
                f"{owner} needs inputs= to be a function batch -> the model's input, such as lambda batch: x, got "
                f"{self.inputs!r:.80}."
            )
        for label, value, known in (
            ("loss", self.loss, ("cross_entropy", "squared")),
            ("uncovered", self.uncovered, self.ways),
        ):
            if value not in known:
                raise ValueError(f"{owner} needs {label} to be one of {known}, got {value!r:.80}.")
        if not (is_number(self.scale) and 0 < self.scale < math.inf):
            raise ValueError(f"{owner} needs scale > 0, finite, got {self.scale!r}.")
        if not callable(self.damping):
            self._check_damping(self.damping)
        self.check_refresh()

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse what no loss can be taken of.

        Raises:
            RequirementError: if there is not one row of outputs per sample.
            SolverError: if they are not finite.
        """
        owner = type(self).__name__
        if not bool(torch.isfinite(outputs).all()):
            raise failure(
                Status.NONFINITE,
                f"{owner}: the model returned NaN or infinite entries at the inner solution; check that inputs(batch) is "
                f"what it is trained on.",
            )
        if outputs.ndim != 2 and not (self.loss == "squared" and outputs.ndim > 1):
            raise RequirementError(
                f"{owner}(loss={self.loss!r}) needs one row of outputs per sample; the model returned a tensor of shape "
                f"{tuple(outputs.shape)}."
            )

    def graph_of(self, operator: AbstractLinearOperator) -> InnerGraph:
        """That of the inner objective under the operator.

        Raises:
            RequirementError: if it has none.
        """
        graph = getattr(undamped(operator)[0], "graph", None)
        if not isinstance(graph, InnerGraph):
            raise RequirementError(
                f"{type(self).__name__} preconditions the Hessian or GaussNewton operator of an inner objective, whose "
                f"batch and parameters it runs the model with; for another operator use NystromPreconditioner or "
                f"DiagonalPreconditioner."
            )
        return graph

    def layers(self, graph: InnerGraph, kind: type[AnyLayer]) -> list[AnyLayer]:
        """The layers that are covered: :func:`covered_layers`."""
        return covered_layers(self, graph.layout, kind)

    def damping_of(self, operator: AbstractLinearOperator) -> float:
        """The operator's damping, and what the inner objective adds to the loss.

        Raises:
            ValueError: if that is no number ``>= 0``.
        """
        own = self.damping
        if callable(own):
            with torch.no_grad():
                own = self._check_damping(float(own(self.graph_of(operator).outer_params)))
        return undamped(operator)[1] + own

    def _check_damping(self, value: float) -> float:
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(
                f"{type(self).__name__} needs damping >= 0, finite, got {value!r:.80}."
            )
        return value


def failure(status: Status, message: str) -> SolverError:
    """A failure of a preconditioner, for :func:`linear_solve` to report."""
    return SolverError(message, Result(status, message))

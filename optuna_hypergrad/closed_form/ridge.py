"""Ridge regression as a differentiable function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import ProblemError
from ._fitting import ridge_fit
from ._inputs import Systems, checked_tensor, systems


@dataclass(frozen=True)
class LinearModel:
    """A linear model with a graph to what it was fitted to.

    Attributes:
        coefficients: ``(..., p)``, or ``(..., p, k)`` for ``k`` targets.
        intercept: ``(...)``, or ``(..., k)``; zeros where there is none.
    """

    coefficients: Tensor
    intercept: Tensor
    single: bool = True

    def predict(self, x: Tensor) -> Tensor:
        """``(..., n, p)`` to ``(..., n)``, or ``(..., n, k)``.

        Raises:
            ProblemError: if ``x`` has another number of columns than the model was fitted to.
        """
        size = self.coefficients.shape[-1 if self.single else -2]
        if x.dim() == 0 or x.shape[-1] != size:
            raise ProblemError(
                f"LinearModel.predict: x has shape {tuple(x.shape)}, so {x.shape[-1] if x.dim() else 0} columns, and the "
                f"model was fitted to {size} features; give the same features in the same order, (..., n, {size})."
            )
        if self.single:
            product = (x @ self.coefficients.unsqueeze(-1)).squeeze(-1)
            return product + self.intercept.unsqueeze(-1)
        return x @ self.coefficients + self.intercept.unsqueeze(-2)


def ridge(
    x: Tensor,
    y: Tensor,
    penalty: Tensor | float,
    *,
    intercept: bool = False,
    sample_weight: Tensor | None = None,
) -> LinearModel:
    """``argmin over w, c of sum_i s_i (y_i - x_i w - c)^2 + sum_j penalty_j w_j^2``.

    That is scikit-learn's ``Ridge(alpha=penalty)``, with gradients. One Cholesky factorization, of a ``(p, p)``
    matrix or (``n < p``, Woodbury) of an ``(n, n)`` one; gradients to every argument reuse the factor.

    Reference: Hoerl & Kennard (1970), "Ridge regression". As a layer: Bertinetto et al. (2019), "Meta-learning with
    differentiable closed-form solvers".

    Args:
        x: ``(..., n, p)``; leading dimensions are separate problems (tasks).
        y: ``(..., n)``, or ``(..., n, k)`` for ``k`` targets.
        penalty: Positive: a number, ``(p,)`` for one per feature, ``(1, k)`` for one per target, ``(p, k)`` for one
            per weight; with more dimensions, the first ones are those of ``x``. For groups, ``penalty[group_of_feature]``.
        intercept: Fit an unpenalized ``c``.
        sample_weight: ``s``, ``(n,)`` or ``(..., n)``, not negative; ones by default.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite, or do not fit.
        SolverError: if the system is singular to rounding.
    """
    given = systems("ridge", x, y, penalty, sample_weight)
    centered, mean_x, mean_y = center(given, intercept)
    w = ridge_fit(centered.x, centered.y, centered.weights, centered.penalty, "ridge")
    c = mean_y - mean_x @ w  # (..., 1, k)
    if given.split:
        w, c = w.squeeze(-1).mT, c.squeeze(-1).mT
    c = c.squeeze(-2)
    return LinearModel(
        w.squeeze(-1) if given.single else w, c.squeeze(-1) if given.single else c, given.single
    )


def ridge_head(
    features: Tensor, targets: Tensor, penalty: Tensor | float, *, intercept: bool = False
) -> LinearModel:
    """The last layer of a network in closed form, for each task of a batch: ridge on its features.

    Gradients go through ``features`` into the network (hyper-representation, few-shot learning).

    Reference: Bertinetto et al. (2019), "Meta-learning with differentiable closed-form solvers" (R2-D2; without its
    learned scale and shift of the predictions).

    Args:
        features: ``(..., n, p)``: of the support samples of each task.
        targets: Classes ``(..., n)``, integers from 0 on, that become one-hot targets (up to the largest of
            all tasks); or ``(..., n, k)``.
        penalty: As for :func:`ridge`.
        intercept: Fit an unpenalized intercept.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite, or do not fit.
        SolverError: if a system is singular to rounding.
    """
    features = checked_tensor("ridge_head", "features", features, least_dim=2)
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        if targets.shape != features.shape[:-1] or int(targets.min()) < 0:
            raise ProblemError(
                f"ridge_head: classes must be integers from 0 on, one per sample, {tuple(features.shape[:-1])}; they "
                f"have shape {tuple(targets.shape)} and least entry {int(targets.min())}."
            )
        targets = torch.nn.functional.one_hot(targets.long()).to(features)
    return ridge(features, targets, penalty, intercept=intercept)


def center(given: Systems, intercept: bool) -> tuple[Systems, Tensor, Tensor]:
    """The same without their weighted means, ``(..., 1, p)`` and ``(..., 1, k)``, where there is an intercept."""
    if not intercept:
        return given, torch.zeros_like(given.x[..., :1, :]), torch.zeros_like(given.y[..., :1, :])
    share = (given.weights / given.weights.sum(-1, keepdim=True)).unsqueeze(-2)
    mean_x, mean_y = share @ given.x, share @ given.y
    moved = Systems(
        given.x - mean_x,
        given.y - mean_y,
        given.penalty,
        given.weights,
        given.split,
        given.single,
    )
    return moved, mean_x, mean_y

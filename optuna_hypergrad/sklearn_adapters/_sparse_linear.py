"""The elastic net solved to rounding: coordinate descent finds the support, a linear system the coefficients on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status

_ACCURATE = 1e-9
"""By how much correlations may exceed the penalty, relative to it."""


@dataclass(frozen=True)
class Centered:
    """Samples without their weighted means, each scaled by the root of its share.

    Attributes:
        x: ``(n, p)``, in Fortran order.
        y: ``(n,)``.
        gram: ``x^T x`` where there are more samples than features, else ``None``.
        correlations: ``x^T y``.
    """

    x: np.ndarray
    y: np.ndarray
    gram: np.ndarray | None
    correlations: np.ndarray

    @classmethod
    def of(cls, x: Tensor, y: Tensor, shares: Tensor, intercept: bool) -> Centered:
        """Of ``(n, p)``, ``(n,)`` and ``(n,)``, which add up to 1."""
        with torch.no_grad():
            if intercept:
                x, y = x - shares @ x, y - shares @ y
            root = shares.sqrt()
            scaled = np.asfortranarray((root[:, None] * x).numpy())
            target = np.ascontiguousarray((root * y).numpy())
        gram = scaled.T @ scaled if len(scaled) > scaled.shape[1] else None
        return cls(scaled, target, gram, scaled.T @ target)


def coefficients(
    data: Centered, l1: float, l2: float, positive: bool, start: np.ndarray | None
) -> np.ndarray:
    """``argmin over w of |y - x w|^2 / 2 + l1 |w|_1 + l2 |w|^2 / 2``, to rounding.

    Coordinate descent (Friedman, Hastie & Tibshirani 2010) comes close; then, as in feature-sign search (Lee et al.
    2007), the linear system of a support and its signs is solved exactly, a coefficient that would change its sign
    leaves, the feature that violates optimality most enters, and so on: each step lowers the objective.

    Raises:
        SolverError: if that does not end.
    """
    w = _descended(data, l1, l2, positive, start)
    for _ in range(20 + 2 * len(w)):
        support = np.flatnonzero(w)
        if len(support):
            signs = np.sign(w[support])
            target = _on_support(data, support, signs, l1, l2)
            crossing = target * signs <= 0
            if crossing.any():
                here = w[support]
                shares = here[crossing] / (here[crossing] - target[crossing])
                step = shares.min()
                w[support] = here + step * (target - here)
                w[support[crossing][shares <= step]] = 0.0
                continue
            w[support] = target
        left = data.correlations - _gram_times(data, support, w[support])
        violation = left if positive else np.abs(left)
        violation[support] = 0.0
        worst = int(np.argmax(violation))
        if violation[worst] <= l1 * (1 + _ACCURATE) + 1e-15 * np.abs(data.correlations).max():
            return w
        entering = _first_step(data, worst, left[worst], l1, l2)
        if entering == 0.0:
            return w
        w[worst] = entering
    message = (
        f"An elastic net could not be solved at penalties l1={l1:.3g}, l2={l2:.3g}: its support did not settle. Raise the "
        f"lower bound of alpha, lower the upper bound of l1_ratio, or take out features that repeat others."
    )
    raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))


def _descended(
    data: Centered, l1: float, l2: float, positive: bool, start: np.ndarray | None
) -> np.ndarray:
    n, p = data.x.shape
    settings: dict[str, Any] = {"precompute": False}
    if data.gram is not None:
        settings = {"precompute": data.gram, "Xy": data.correlations}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is left is done exactly
        found = enet_path(
            data.x,
            data.y,
            alphas=[(l1 + l2) / n],
            l1_ratio=l1 / (l1 + l2),
            coef_init=np.zeros(p) if start is None else start.copy(),
            positive=positive,
            check_input=False,
            tol=1e-6,
            max_iter=1000,
            **settings,
        )
    return np.array(found[1][:, 0])


def _gram_of(data: Centered, support: np.ndarray) -> np.ndarray:
    x = data.x[:, support]
    gram: np.ndarray = x.T @ x if data.gram is None else data.gram[np.ix_(support, support)]
    return gram


def _gram_times(data: Centered, support: np.ndarray, w: np.ndarray) -> np.ndarray:
    product: np.ndarray
    if data.gram is None:
        product = data.x.T @ (data.x[:, support] @ w)
    else:
        product = data.gram[:, support] @ w
    return product


def factor_on_support(data: Centered, support: np.ndarray, l2: float) -> Tensor:
    """Of the Hessian on a support; columns that repeat others are told apart by a penalty just beyond rounding.

    Raises:
        SolverError: if that does not help.
    """
    matrix = torch.as_tensor(_gram_of(data, support))
    sizes = matrix.diagonal().clone() + l2
    for jitter in (0.0, 1e-13, 1e-12, 1e-11):
        matrix.diagonal().copy_((1 + jitter) * sizes)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and bool((factor.diagonal().square() > 1e-14 * sizes).all()):
            return torch.as_tensor(factor)
    message = "The features of an elastic net's support depend linearly on each other: take some of them out."
    raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))


def _on_support(
    data: Centered, support: np.ndarray, signs: np.ndarray, l1: float, l2: float
) -> np.ndarray:
    side = torch.as_tensor(data.correlations[support] - l1 * signs)
    found = torch.cholesky_solve(side.unsqueeze(1), factor_on_support(data, support, l2))
    return np.asarray(found.squeeze(1))


def _first_step(data: Centered, feature: int, correlation: float, l1: float, l2: float) -> float:
    """Coordinate descent's step of a coefficient that is zero."""
    square = float(data.x[:, feature] @ data.x[:, feature])
    if square + l2 == 0:
        return 0.0
    return float(np.sign(correlation) * (abs(correlation) - l1) / (square + l2))


def fitted(
    x: Tensor,
    y: Tensor,
    shares: Tensor,
    l1: Tensor,
    l2: Tensor,
    found: np.ndarray,
    data: Centered,
    intercept: bool,
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Coefficients on the support with a graph to everything: one Newton step from the solution, the Hessian held fixed.

    Its derivative is that of the implicit function (Bertrand et al. 2022, proposition 10).

    Args:
        x, y, shares: The samples.
        l1, l2: Penalties.
        found: The solution there.
        data: What it was found from.
        intercept: Whether there is one.

    Returns:
        Coefficients ``(s,)``, the support ``(s,)`` and the intercept.
    """
    support = np.flatnonzero(found)
    if intercept:
        mean_x, mean_y = shares @ x[:, support], shares @ y
    else:
        mean_x, mean_y = x.new_zeros(len(support)), x.new_zeros(())
    if not len(support):
        return x.new_zeros(0), support, mean_y
    w = torch.as_tensor(found[support])
    centered = x[:, support] - mean_x
    slope = centered.mT @ (shares * (centered @ w - (y - mean_y)))
    slope = slope + l1 * torch.sign(w) + l2 * w
    factor = factor_on_support(data, support, float(l2.detach()))
    w = w - torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    return w, support, mean_y - mean_x @ w

"""The elastic net solved to rounding: coordinate descent finds the support, a linear system the coefficients on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status
from ._plain import Factor

_ACCURATE = 1e-9
"""By how much correlations may exceed the penalty, relative to it."""

_FEW = 12
"""Steps of feature-sign search, which take about as long as coordinate descent."""


@dataclass(frozen=True)
class Centered:
    """Samples without their weighted means, each scaled by the root of its share.

    Attributes:
        x: ``(n, p)``, in Fortran order; where there is ``gram``, for its shape.
        y: ``(n,)``.
        gram: ``x^T x`` where there are more samples than features, else ``None``.
        correlations: ``x^T y``.
        mean_x, mean_y: What was taken off.
    """

    x: np.ndarray
    y: np.ndarray
    gram: np.ndarray | None
    correlations: np.ndarray
    mean_x: np.ndarray
    mean_y: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, shares: Tensor, intercept: bool) -> Centered:
        """Of ``(n, p)``, ``(n,)`` and ``(n,)``, which add up to 1."""
        samples, target, share = x.numpy(), y.numpy(), shares.numpy()
        mean_x, mean_y = np.zeros(samples.shape[1]), 0.0
        if intercept:
            mean_x, mean_y = share @ samples, float(share @ target)
            samples, target = samples - mean_x, target - mean_y
        root = np.sqrt(share)
        scaled, target = np.asfortranarray(root[:, None] * samples), root * target
        gram = scaled.T @ scaled if len(scaled) > scaled.shape[1] else None
        return cls(scaled, target, gram, scaled.T @ target, mean_x, mean_y)

    def weighted(self, scales: np.ndarray) -> Centered:
        """Of features that are multiplied by ``scales``, ``(p,)``."""
        if self.gram is None:
            x, gram = self.x * scales, None
        else:
            x, gram = self.x, self.gram * scales * scales[:, None]
        return replace(self, x=x, gram=gram, correlations=self.correlations * scales)


def coefficients(
    data: Centered, l1: float, l2: float, positive: bool, start: np.ndarray | None
) -> np.ndarray:
    """``argmin over w of |y - x w|^2 / 2 + l1 |w|_1 + l2 |w|^2 / 2``, to rounding.

    As in feature-sign search (Lee et al. 2007), the linear system of a support and its signs is solved exactly, a coefficient
    that would change its sign leaves, the feature that violates optimality most enters, and so on: each step lowers the
    objective. Where a few steps from ``start`` are not enough, or take long for want of ``data.gram``, coordinate descent
    (Friedman, Hastie & Tibshirani 2010) comes close first.

    Raises:
        SolverError: if that does not end.
    """
    found = None
    if start is not None and data.gram is not None:
        found = _settled(data, l1, l2, positive, start.copy(), _FEW)
    if found is None:
        w = _descended(data, l1, l2, positive, start)
        found = _settled(data, l1, l2, positive, w, 20 + 2 * len(w))
    if found is None:
        message = (
            f"An elastic net could not be solved at penalties l1={l1:.3g}, l2={l2:.3g}: its support did not settle. Raise the "
            f"lower bound of alpha, lower the upper bound of l1_ratio, or take out features that repeat others."
        )
        raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))
    return found


def _settled(
    data: Centered, l1: float, l2: float, positive: bool, w: np.ndarray, max_steps: int
) -> np.ndarray | None:
    """The solution, from ``w``; ``None`` after so many steps."""
    enough = l1 * (1 + _ACCURATE) + 1e-15 * np.abs(data.correlations).max()
    for _ in range(max_steps):
        support = np.flatnonzero(w)
        if len(support):
            signs = np.sign(w[support])
            side = data.correlations[support] - l1 * signs
            target = factor_on_support(data, support, l2).solve(side)
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
        if violation[worst] <= enough:
            return w
        entering = _first_step(data, worst, left[worst], l1, l2)
        if entering == 0.0:
            return w
        w[worst] = entering
    return None


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


def factor_on_support(data: Centered, support: np.ndarray, l2: float) -> Factor:
    """Of the Hessian on a support; columns that repeat others are told apart by a penalty just beyond rounding.

    Raises:
        SolverError: if that does not help.
    """
    matrix = _gram_of(data, support)
    sizes = matrix.diagonal() + l2
    for jitter in (0.0, 1e-13, 1e-12, 1e-11):
        matrix.flat[:: len(matrix) + 1] = (1 + jitter) * sizes
        factor, failed = Factor.of(matrix.copy())
        if not failed and bool((factor.pivots > 1e-14 * sizes).all()):
            return factor
    message = "The features of an elastic net's support depend linearly on each other: take some of them out."
    raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))


def _first_step(data: Centered, feature: int, correlation: float, l1: float, l2: float) -> float:
    """Coordinate descent's step of a coefficient that is zero."""
    if data.gram is None:
        square = float(data.x[:, feature] @ data.x[:, feature])
    else:
        square = float(data.gram[feature, feature])
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
    factor = torch.as_tensor(factor_on_support(data, support, float(l2.detach())).lower)
    w = w - torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    return w, support, mean_y - mean_x @ w


@dataclass(frozen=True)
class Solution:
    """An elastic net of weighted features, in arrays, and the slopes of what it predicts.

    With weights ``W = diag(w)``, penalties ``l1`` and ``l2`` and signs ``s``, on the support: ``W x^T (y - x W b) = l1 s + l2 b``. Of
    predictions ``x_test W b``, a slope ``q`` has the adjoint ``v = (W x^T x W + l2 I)^-1 W x_test^T q``, and the slopes
    ``-v^T s`` by ``l1``, ``-v^T b`` by ``l2`` and ``v (l1 s + 2 l2 b) / w`` by the weights.

    Attributes:
        data: The samples, with the weights.
        support: ``(s,)``.
        b: Coefficients there, ``(s,)``.
        w: Weights there, ``(s,)``.
        l1, l2: Penalties.
    """

    data: Centered
    support: np.ndarray
    b: np.ndarray
    w: np.ndarray
    l1: float
    l2: float

    @classmethod
    def of(
        cls,
        data: Centered,
        found: np.ndarray,
        l1: float,
        l2: float,
        scales: np.ndarray | None,
    ) -> Solution:
        support = np.flatnonzero(found)
        w = np.ones(len(support)) if scales is None else scales[support]
        return cls(data, support, found[support], w, l1, l2)

    def _columns(self, x_test: np.ndarray) -> np.ndarray:
        found: np.ndarray = x_test[:, self.support] - self.data.mean_x[self.support]
        return found

    def predicted(self, x_test: np.ndarray) -> np.ndarray:
        """``(m,)``."""
        found: np.ndarray = self._columns(x_test) @ (self.w * self.b) + self.data.mean_y
        return found

    def pulled(self, x_test: np.ndarray, slope: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Slopes by ``l1``, ``l2`` and all weights, ``(p,)``.

        Raises:
            SolverError: if features of the support depend linearly on each other.
        """
        by = np.zeros(len(self.data.correlations))
        if not len(self.support):
            return 0.0, 0.0, by
        right = self.w * (self._columns(x_test).T @ slope)
        v = factor_on_support(self.data, self.support, self.l2).solve(right)
        signs = np.sign(self.b)
        by[self.support] = v * (self.l1 * signs + 2 * self.l2 * self.b) / self.w
        return -float(v @ signs), -float(v @ self.b), by

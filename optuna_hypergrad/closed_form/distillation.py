"""A data set distilled into a few samples, through kernel ridge regression."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._errors import ProblemError
from ._inputs import checked_positive
from .kernel_ridge import kernel_ridge


def kernel_inducing_points(
    kernel: Callable[[Tensor, Tensor], Tensor],
    support_x: Tensor,
    support_y: Tensor,
    x: Tensor,
    penalty: Tensor | float = 1e-6,
) -> Tensor:
    """Predictions for ``x`` of kernel ridge regression that has only seen the support samples.

    Everything gets a gradient: support samples, their targets, the kernel's settings, the penalty. Their loss on real
    data, ``0.5 * (predictions - y).square().mean()`` or any other, is what distillation minimizes.

    Reference: Nguyen, Chen & Lee (2021), "Dataset meta-learning from kernel ridge-regression" (KIP; label solving
    where ``support_y`` is learned).

    Args:
        kernel: ``(a, b) -> K(a, b)``, ``(n, p), (m, p) -> (n, m)``; for example :func:`rbf_kernel`.
        support_x: ``(m, p)``.
        support_y: ``(m,)`` or ``(m, k)``.
        x: ``(n, p)``.
        penalty: Positive, relative to the mean diagonal entry of the support samples' kernel (as in the paper).

    Returns:
        ``(n,)`` or ``(n, k)``.

    Raises:
        HyperparameterError: if the penalty is not positive.
        ProblemError: if data are not finite or do not fit, or the kernel is not symmetric or not of these shapes.
        SolverError: if the support samples' system is singular to rounding.
    """
    among, across = kernel(support_x, support_x), kernel(x, support_x)
    m, n = support_x.shape[-2], x.shape[-2]
    if among.shape[-2:] != (m, m) or across.shape[-2:] != (n, m):
        raise ProblemError(
            f"kernel_inducing_points: kernel(a, b) gave shapes {tuple(among.shape)} and {tuple(across.shape)} for {m} "
            f"support samples and {n} others; it must give (len(a), len(b))."
        )
    penalty = checked_positive("kernel_inducing_points", "penalty", penalty, among)
    size = among.diagonal(dim1=-2, dim2=-1).mean(-1)
    coefficients = kernel_ridge(among, support_y, penalty * size)
    return across @ coefficients

"""Phantom gradients: a few relaxed steps in place of a linear solve."""

from __future__ import annotations

from dataclasses import dataclass

from .._arguments import check_count
from ..ihvp import Neumann
from ._base import check_relaxation


@dataclass(frozen=True)
class Phantom:
    """``u = tau sum_{t<k} (tau J^T + (1 - tau) I)^t b`` in place of ``(I - J^T)^-1 b``; or ``k`` steps, unrolled.

    With ``J`` the Jacobian of the map at the fixed point. Where ``tau J + (1 - tau) I`` contracts, the error falls by
    that factor with each step; where it does not, a few steps still give a usable direction. With ``F(w) = w - eta
    g_w(w)`` it is the Neumann series of the Hessian with ``alpha = tau eta``, and is computed by
    :class:`Neumann`. ``Phantom(1, 1.0)`` is the Jacobian-free gradient.

    References: Geng, Zhang, Bai, Wang & Lin (2021), "On training implicit models" (phantom gradient, in its unrolled and
    its Neumann form); Fung et al. (2022), "JFB: Jacobian-free backpropagation for implicit networks".

    Args:
        num_steps: ``k``: ``k - 1`` products with ``J^T``, or ``k`` steps of the map with their graphs.
        relaxation: ``tau`` in (0, 1], the paper's damping factor.
        unrolled: Backpropagation through ``k`` steps ``z <- tau F(z) + (1 - tau) z`` from the fixed point, in place of the
            sum. Equal to it at an exact fixed point; it can be differentiated again, and holds ``k`` graphs.
    """

    num_steps: int = 5
    relaxation: float = 0.5
    unrolled: bool = False

    def __post_init__(self) -> None:
        check_count("Phantom", "num_steps", self.num_steps, 1)
        check_relaxation("Phantom", self.relaxation)
        if not isinstance(self.unrolled, bool):
            raise ValueError(f"Phantom needs unrolled=True or False, got {self.unrolled!r:.80}.")

    def series(self) -> Neumann:
        """The sum, as a solver of ``(I - J^T) u = b``."""
        return Neumann(self.num_steps - 1, alpha=float(self.relaxation))

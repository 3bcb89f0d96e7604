"""SOBA with a moving average of the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .._typing import Params
from ._estimate import EstimatorState
from ._single_loop import check_theta, moving_average
from .soba import SOBA


@dataclass(frozen=True)
class MASOBA(SOBA):
    """SOBA whose estimate is ``h <- (1 - theta) h + theta (f_lam - M^T v)``.

    The average lets steps of one order of magnitude do for ``w``, ``v`` and ``lam``, and needs less smoothness than
    SOBA does: to ``|d_lam|^2 <= eps`` in ``O(eps^-2)`` steps, as for one level alone, with step sizes and ``theta`` of
    order ``num_steps^(-1/2)``. ``torch.optim.SGD(lr=alpha)`` as outer optimizer gives the paper's ``lam <- lam - alpha h``.

    Two details differ: ``h`` begins with the first direction and not with zero, and ``lam`` moves along the new
    ``h``, not the one before it.

    Reference: Chen, Xiao & Balasubramanian (2023), "Optimal algorithms for stochastic bilevel optimization
    under relaxed smoothness conditions", algorithm 1.

    Args:
        theta: In (0, 1]; 1 is SOBA. Smaller for noisier batches: 0.01 to 0.3.
    """

    name: ClassVar[str] = "ma_soba"
    theta: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_theta("MASOBA", self.theta)

    def _averaged(self, value: Params, state: EstimatorState) -> tuple[Params, Params]:
        return moving_average(value, state, self.theta)

"""Self-tuning networks: a response of the weights, learned while they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._arguments import check_count, is_number
from .._typing import Batch, Params
from ..inner import Adam, inner_solve
from ..problem import BilevelProblem
from ._around import Around
from ._estimate import EstimatorState
from ._proxy import AbstractProxy, WHat, packed, paired, unpacked

_SCALE_STEP = 0.03
"""Of Adam: a factor of about 1.03 at most for each estimate."""


@dataclass(frozen=True)
class DeltaSTN(AbstractProxy):
    """``w_hat(lam + delta) = w_0 + sum_k (V_k delta) * U_k``, fitted while ``inner_solver`` moves ``w_0``.

    Each row of a matrix-shaped inner parameter moves along its own ``U_k``, gated by a linear function of the
    displacement; vectors and numbers respond linearly without restriction. An estimate is: inner steps for ``w_0`` at the
    current ``lam``, steps of ``fit`` for the response on the inner objective at perturbed ``lam``, and then the derivative
    of ``f(w_hat(lam), lam)``. First derivatives only, about 2 gradient evaluations for a step of ``fit``, and memory
    for ``rank`` copies of the inner parameters and two moments of each.

    The response tends to ``-H^-1 M`` where ``rank`` allows for it (always with one hyperparameter), up to terms of order
    ``scale^2``; until it is learned, and where the gates cannot express it, the indirect term is biased. Hand its
    ``state`` on from step to step (``minimize_bilevel`` does): with a fresh one it starts from no response at all.

    References: MacKay, Vicol, Lorraine, Duvenaud & Grosse (2019), "Self-tuning networks";
    Bae & Grosse (2020), "Delta-STN: efficient bilevel optimization for neural networks using structured response Jacobians"
    (the centered parametrization; its linearization of the network is replaced by pairs of opposite
    perturbations, in which the terms that it removes cancel up to third order).

    Args:
        fit: A step solver for the response; its ``max_steps`` are those of one estimate. Descent, of about a quarter of the
            step size that suits the inner problem (its curvature counts once for each hyperparameter), comes to rest;
            Adam of constant step size hovers, and learned worse (``benchmarks/results/proxies.md``).
        scale: Standard deviation of the perturbations, in ``lam``, or in its logarithm. They know no bounds: name in ``log``
            what must stay positive.
        log: Names of positive hyperparameters that are perturbed in their logarithm.
        seed: Of the perturbations, and of the gates before any fit.
        max_hyperparameters: More entries of ``outer_params`` than this are refused.
        rank: Gated directions for each row; as many as hyperparameters can express any response (the gates before
            any fit are orthonormal).
        rows: The dimension of matrix-shaped inner parameters that counts rows: 0 for ``torch.nn.Linear`` (its outputs),
            1 for ``x @ w``.
        entropy: Tune the scale of each hyperparameter as well, by the outer objective at perturbed ``lam`` minus ``entropy``
            times the sum of the logarithms of the scales (MacKay et al.); ``None`` keeps it.
    """

    name: ClassVar[str] = "delta_stn"
    solves: ClassVar[bool] = True

    rank: int = 1
    rows: int = 0
    entropy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("DeltaSTN", "rank", self.rank, 1)
        if self.rows not in (0, 1) or isinstance(self.rows, bool):
            raise ValueError(f"DeltaSTN needs rows=0 or rows=1, got {self.rows!r:.80}.")
        if self.entropy is not None and not (is_number(self.entropy) and self.entropy > 0):
            raise ValueError(f"DeltaSTN needs entropy > 0 or None, got {self.entropy!r:.80}.")

    def start(self, inner_params: Params, around: Around) -> Params:
        generator = torch.Generator().manual_seed(self.seed)
        response: Params = {}
        for k, v in inner_params.items():
            if v.dim() < 2:
                response[f"jacobian/{k}"] = v.new_zeros(v.numel(), around.size)
                continue
            by_row = v.movedim(self.rows, 0).flatten(1)
            shape = self.rank, len(by_row), around.size
            response[f"gates/{k}"] = _drawn_gates(*shape, generator).to(v)
            response[f"directions/{k}"] = v.new_zeros(self.rank, *by_row.shape)
        return response

    def respond(self, fitted: Params, anchor: Params, offset: Tensor, delta: Tensor) -> Params:
        moved: Params = {}
        for k, v in anchor.items():
            if v.dim() < 2:
                moved[k] = v + (fitted[f"jacobian/{k}"] @ delta.to(v.dtype)).reshape(v.shape)
                continue
            gates = fitted[f"gates/{k}"] @ delta.to(v.dtype)  # (rank, rows)
            by_row = (gates.unsqueeze(-1) * fitted[f"directions/{k}"]).sum(0)
            moved[k] = v + by_row.reshape(v.movedim(self.rows, 0).shape).movedim(0, self.rows)
        return moved

    def scales(self, around: Around, state: EstimatorState) -> Tensor:
        if self.entropy is None or "log_scale" not in state.tensors:
            return super().scales(around, state)
        return state.tensors["log_scale"].exp()

    def tuned(
        self, problem: BilevelProblem, w_hat: WHat, around: Around, step: int, state: EstimatorState
    ) -> Params:
        """One step of Adam for the logarithm of each scale."""
        if self.entropy is None:
            return {}
        entropy = self.entropy

        def objective(scales: Params, _: Params, drawn: tuple[Batch, Tensor]) -> Tensor:
            batch, direction = drawn
            delta = scales["log_scale"].exp() * direction
            f = paired(problem.outer_objective, w_hat, around, batch, delta, "outer_objective")
            return f - entropy * scales["log_scale"].sum()

        def drawn(index: int) -> tuple[Batch, Tensor]:
            return problem.outer_batch(step), around.drawn(self.seed, 1, index)

        moved = inner_solve(
            BilevelProblem(objective, objective, drawn),
            Adam(_SCALE_STEP, max_steps=1),
            {"log_scale": self.scales(around, state).log()},
            {},
            start=int(state.numbers.get("num_fits", 0.0)),
            state=unpacked("scales/", state.tensors),
        )
        return {**moved.inner_params, **packed("scales/", moved.state)}


def _drawn_gates(rank: int, rows: int, size: int, generator: torch.Generator) -> Tensor:
    """``(rank, rows, size)``: for each row, gates of mean square one, orthonormal, or (``rank > size``) a tight frame.

    The first is one of random signs, so that a single gate sees every hyperparameter alike.
    """
    drawn = (
        torch.randint(0, 2, (rank, rows, size), generator=generator, device="cpu")
        .double()
        .mul_(2)
        .sub_(1)
    )
    drawn[1:].normal_(generator=generator)
    by_row = drawn.movedim(0, 1)  # (rows, rank, size)
    if rank <= size:
        q, r = torch.linalg.qr(by_row.mT)
        found = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
    else:
        found = torch.linalg.qr(by_row)[0].mul((rank / size) ** 0.5)
    gates: Tensor = found.movedim(
        1, 0
    ).contiguous()  # laid out as when it is read from a checkpoint
    return gates

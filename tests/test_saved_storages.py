"""What graphs keep alive is measured, also of objectives that call torch.func, and of those with sparse data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad._twice import nodes_of
from optuna_hypergrad.hypergradients._memory import _saved, storages, with_saved_storages

Params = dict[str, Tensor]
X, Y = randn(9, 4, seed=1), randn(9, seed=2)
SPARSE = X * (X.abs() > 0.7)
START = {"hidden": 0.5 * randn(4, 3, seed=3), "last": randn(3, seed=4)}
LAM = {"scale": randn(4, seed=5), "strength": torch.tensor(0.3, dtype=F64)}


def bent(w: Params, lam: Params, batch: Any) -> Tensor:
    """A network that is asked for slopes by its inputs, as those of differential equations are."""

    def at(x: Tensor) -> Tensor:
        return ((x * lam["scale"]) @ w["hidden"]).tanh() @ w["last"]

    slopes = torch.func.vmap(torch.func.grad(at))(X)
    return ((at(X) - Y) ** 2).mean() + lam["strength"] * (slopes**2).mean()


def of_data(layout: torch.layout) -> Any:
    data = SPARSE.to_sparse(layout=layout) if layout is not torch.strided else SPARSE

    def loss(w: Params, lam: Params, batch: Any) -> Tensor:
        hidden = (data @ (lam["scale"][:, None] * w["hidden"])).tanh()
        return ((hidden @ w["last"] - Y) ** 2).mean() + lam["strength"] * (w["last"] ** 2).sum()

    return loss


def outer(w: Params, lam: Params, batch: Any) -> Tensor:
    return ((X.flip(0) @ w["hidden"] @ w["last"] - Y) ** 2).mean()


def unrolled(inner: Any) -> Params:
    w, lam = START, {k: v.clone().requires_grad_() for k, v in LAM.items()}
    w = {k: v.clone().requires_grad_() for k, v in w.items()}
    for _ in range(4):
        slopes = torch.autograd.grad(inner(w, lam, None), list(w.values()), create_graph=True)
        w = {k: v - 0.1 * g for (k, v), g in zip(w.items(), slopes, strict=True)}
    found = torch.autograd.grad(outer(w, lam, None), list(lam.values()))
    return dict(zip(lam, found, strict=True))


@pytest.mark.parametrize(
    "estimator", [ohg.Unroll(), ohg.Unroll(recompute="never"), ohg.ForwardGradient(None, width=1)]
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor")
@pytest.mark.parametrize("data", ["torch.func", torch.sparse_coo, torch.sparse_csr])
def test_hypergradients_are_those_of_autograd(data: Any, estimator: Any) -> None:
    inner, dense = (bent, bent) if data == "torch.func" else (of_data(data), of_data(torch.strided))
    found = ohg.hypergradient(
        ohg.BilevelProblem(inner, outer),
        START,
        LAM,
        estimator=estimator,
        inner_solver=ohg.GradientDescent(0.1, 4),
    )
    assert relative_error(found.value, unrolled(dense)) < 1e-12


def test_a_graph_that_is_looked_through_keeps_what_hooks_see() -> None:
    w = {k: v.clone().requires_grad_() for k, v in START.items()}

    def build() -> list[Tensor]:
        value = of_data(torch.strided)(w, LAM, None)
        return list(torch.autograd.grad(value, list(w.values()), create_graph=True))

    built, held = with_saved_storages(build, lambda found: found)
    seen = storages(t for n in nodes_of(*built) for t in _saved(n))
    assert seen
    assert seen.items() <= held.items()
    assert sum(seen.values()) > 0.5 * sum(held.values())

"""What gradients through closed forms cost, beside plain autograd, fitting again, and implicit differentiation.

The unit is what the solution itself takes: the smaller one of the two Gram matrices, and its Cholesky factor. One
thread, CPU time, the least of several runs that take turns. ``python benchmarks/closed_form_cost.py`` writes
``results/closed_form_cost.md``; about two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import closed_form as cf

SHAPES = {"tall": (1600, 400), "wide": (400, 1600)}
ONE, ALL = ("penalty",), ("penalty", "sample_weight", "x", "y")
Given = dict[str, Tensor]


def data(n: int, p: int) -> Given:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, p, generator=rng, dtype=torch.float64)
    w = torch.randn(p, generator=rng, dtype=torch.float64) / p**0.5
    y = x @ w + torch.randn(n, generator=rng, dtype=torch.float64)
    weight = torch.rand(n, generator=rng, dtype=torch.float64) + 0.5
    penalty = 10 * torch.rand(p, generator=rng, dtype=torch.float64) + 1
    return {"x": x, "y": y, "penalty": penalty, "sample_weight": weight}


def unit(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> None:
    small = x.mT @ x if len(penalty) < len(y) else x @ x.mT
    small.diagonal().add_(1.0)
    torch.linalg.cholesky_ex(small)


def closed(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
    return cf.ridge(x, y, penalty, sample_weight=sample_weight).coefficients.square().sum()


def plain(solve: str) -> Callable[..., Tensor]:
    """The same system by torch alone; with the roots of the weights where the dual one is smaller."""

    def loss(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
        if len(penalty) < len(y):
            matrix = x.mT @ (sample_weight[:, None] * x) + torch.diag(penalty)
            side = x.mT @ (sample_weight * y)
        else:
            root = sample_weight.sqrt()
            matrix = (root[:, None] * x / penalty) @ (root[:, None] * x).mT
            matrix = matrix + torch.eye(len(y), dtype=x.dtype)
            side = root * y
        if solve == "cholesky":
            factor = torch.linalg.cholesky(matrix)
            found = torch.cholesky_solve(side[:, None], factor)[:, 0]
        else:
            found = torch.linalg.solve(matrix, side)
        w = found if len(penalty) < len(y) else x.mT @ (root * found) / penalty
        return w.square().sum()

    return loss


def implicit(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
    def inner(w: Given, lam: Given, batch: object) -> Tensor:
        misfit = (lam["sample_weight"] * (x @ w["w"] - y) ** 2).sum()
        return misfit + (lam["penalty"] * w["w"] ** 2).sum()

    lam = {"penalty": penalty, "sample_weight": sample_weight}
    w = ohg.solve(inner, {"w": torch.zeros(len(penalty), dtype=x.dtype)}, lam)["w"]
    return w.square().sum()


def leave_one_out(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
    held = cf.ridge_leave_one_out(x, y, penalty, intercept=True, sample_weight=sample_weight)
    return (held - y).square().mean()


def folds(number: int) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
        held = cf.ridge_k_fold(x, y, penalty, number, intercept=True, sample_weight=sample_weight)
        return (held - y).square().mean()

    return loss


def again(number: int) -> Callable[..., Tensor]:
    """``number`` fits, each by the closed form, to all but one of that many folds."""

    def loss(x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor) -> Tensor:
        fold, total = torch.arange(len(y)) * number // len(y), x.new_zeros(())
        for out in range(number):
            rest = fold != out
            model = cf.ridge(
                x[rest], y[rest], penalty, intercept=True, sample_weight=sample_weight[rest]
            )
            total = total + (model.predict(x[~rest]) - y[~rest]).square().sum()
        return total / len(y)

    return loss


def seconds(loss: Callable[..., object], given: Given, wanted: tuple[str, ...]) -> float:
    at = {k: v.clone().requires_grad_(k in wanted) for k, v in given.items()}
    begun = time.process_time()
    value = loss(**at)
    if wanted:
        assert isinstance(value, Tensor)
        torch.autograd.grad(value, [at[k] for k in wanted])
    return time.process_time() - begun


READING = """
Reading: all gradients of `ridge` together add about a tenth to its solution. Autograd adds between nothing (penalties
on a diagonal, through an LU solve) and twice the solution (through the factor and the Gram matrix) for penalties, and two to
three times the solution for all gradients. Leaving out takes products as
large as the Gram matrix, forth and back: a few units, whatever the number of folds, so that with five folds it is a gain of
two or three for the value and less for gradients, or (many features, gradients to the data) almost none; with forty it is a
factor of eight and more. `ohg.solve` iterates, and is there for inner problems that have no closed form.
"""


ROWS: dict[str, tuple[Callable[..., object], tuple[tuple[str, ...], ...]]] = {
    "`ridge`": (closed, ((), ONE, ALL)),
    "torch.linalg.cholesky, autograd": (plain("cholesky"), ((), ONE, ALL)),
    "torch.linalg.solve, autograd": (plain("lu"), ((), ONE, ALL)),
    "`ohg.solve` (its defaults)": (implicit, ((), ONE)),
    "`ridge_leave_one_out`": (leave_one_out, ((), ONE, ALL)),
    "`ridge_k_fold`, 5 folds": (folds(5), ((), ONE, ALL)),
    "5 fits by `ridge`": (again(5), ((), ONE, ALL)),
    "`ridge_k_fold`, 40 folds": (folds(40), ((), ONE, ALL)),
    "40 fits by `ridge`": (again(40), ((), ONE, ALL)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    lines = [
        "# What gradients through closed forms cost",
        "",
        "Made by `python benchmarks/closed_form_cost.py`: one thread, float64, CPU time, the least of "
        f"{repeats} runs that take turns. The unit is the smaller Gram matrix and its Cholesky factor; tall: 1600 samples "
        "with 400 features, wide: 400 with 1600. A penalty per feature and a weight per sample. Value alone / value and "
        "gradient to the penalties / to penalties, weights, samples and targets.",
        "",
        "| | tall | wide |",
        "|---|---|---|",
    ]
    cells: dict[str, list[str]] = {name: [] for name in ROWS}
    for shape in SHAPES.values():
        given = data(*shape)
        least: dict[tuple[str, tuple[str, ...]], float] = {}
        for _ in range(repeats):
            jobs = [("unit", unit, ())]
            jobs += [(name, loss, w) for name, (loss, all_w) in ROWS.items() for w in all_w]
            for name, loss, wanted in jobs:
                spent = seconds(loss, given, wanted)
                least[name, wanted] = min(spent, least.get((name, wanted), spent))
        for name, (_, all_w) in ROWS.items():
            ratios = (least[name, w] / least["unit", ()] for w in all_w)
            cells[name].append(" / ".join(f"{r:.1f}" for r in ratios))
    lines += [f"| {name} | {' | '.join(found)} |" for name, found in cells.items()]
    path = Path(__file__).parent / "results" / "closed_form_cost.md"
    path.write_text("\n".join(lines) + "\n" + READING)
    print(path.read_text())


if __name__ == "__main__":
    main()

"""What one outer step costs, in gradient evaluations, for every method that tunes while it trains.

Two tasks: an MLP 784-256-10 on a batch of 256 with a weight for each sample, and a small transformer (one layer, width 64, 64
characters, batch 16) with a mixture of four sources. A step of a method is all that ``minimize_bilevel`` does between two
values of ``lam``: one step of ``w`` included, its outer optimizer (SGD) too. The unit is one evaluation of the inner objective
and its gradient with respect to ``w``, by torch alone. CPU time of one thread, medians of interleaved repetitions, each of
ten steps; the first steps, in which torch and the methods prepare themselves, do not count.

    python benchmarks/single_loop_cost.py [--repetitions 15] [--output benchmarks/results/single_loop_cost.md]
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, linear, one_hot, relu
from tqdm import tqdm

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator, EstimatorState

Params = dict[str, Tensor]
ONE = ohg.GradientDescent(0.05, max_steps=1)
STEPS = 10
_settings: dict[str, float] = {"damping": 1.0}
METHODS: dict[str, AbstractHypergradientEstimator] = {
    "T1-T2": ohg.T1T2(),
    "SOBA": ohg.SOBA(**_settings),
    "MA-SOBA": ohg.MASOBA(**_settings),
    "BROS, one_sided, 25 % of the rows": ohg.BROS(**_settings),
    "BROS, one_sided, 10 % of the rows": ohg.BROS(rank=0.1, **_settings),
    "BROS, two_sketch, 25 % of the rows": ohg.BROS(correction="two_sketch", **_settings),
    "SAMA": ohg.SAMA(),
    "F2SA": ohg.F2SA(),
    "F2SA, central": ohg.F2SA(central=True),
    "PBGD": ohg.PBGD(),
    "BOME": ohg.BOME(),
    "Unroll, 1 step": ohg.Unroll(),
}


@dataclass(frozen=True)
class Case:
    problem: ohg.BilevelProblem
    inner_params: Params
    outer_params: Params

    def gradient(self) -> object:
        leaves = {k: v.clone().requires_grad_() for k, v in self.inner_params.items()}
        value = self.problem.inner_objective(leaves, self.outer_params, self.problem.inner_batch(0))
        return torch.autograd.grad(value, list(leaves.values()))


def mlp() -> Case:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 784, generator=rng), torch.randint(10, (256,), generator=rng)
    shapes = {"0": (256, 784), "0b": (256,), "1": (10, 256), "1b": (10,)}
    w = {k: torch.randn(s, generator=rng) / s[-1] ** 0.5 for k, s in shapes.items()}

    def losses(w: Params) -> Tensor:
        hidden = relu(linear(x, w["0"], w["0b"]))
        return cross_entropy(linear(hidden, w["1"], w["1b"]), y, reduction="none")

    problem = ohg.BilevelProblem(
        lambda w, lam, _: (lam["weight"].sigmoid() * losses(w)).mean(),
        lambda w, lam, _: losses(w).mean(),
    )
    return Case(problem, w, {"weight": torch.zeros(256)})


def transformer() -> Case:
    rng = torch.Generator().manual_seed(0)
    length, d, vocabulary = 64, 64, 96
    text = torch.randint(vocabulary, (16, length + 1), generator=rng)
    source = torch.arange(16) % 4
    shapes = {"embed": (vocabulary, d), "attend": (d, 3 * d), "join": (d, d), "hidden": (d, 4 * d)}
    shapes |= {"out": (4 * d, d), "read": (d, vocabulary)}
    w = {k: torch.randn(s, generator=rng) / s[0] ** 0.5 for k, s in shapes.items()}
    later = torch.ones(length, length).triu(1) * -1e9

    def losses(w: Params) -> Tensor:
        x = one_hot(text[:, :-1], vocabulary).to(w["embed"]) @ w["embed"]
        q, k, v = (
            t.unflatten(-1, (4, d // 4)).transpose(1, 2)
            for t in (layer_norm(x, (d,)) @ w["attend"]).chunk(3, dim=-1)
        )
        mixed = (q @ k.mT / math.sqrt(d // 4) + later).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ w["join"]
        x = x + torch.tanh(layer_norm(x, (d,)) @ w["hidden"]) @ w["out"]
        logits = layer_norm(x, (d,)) @ w["read"]
        each = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        return each.view(16, length).mean(1)

    problem = ohg.BilevelProblem(
        lambda w, lam, _: lam["mixture"].softmax(0)[source] @ losses(w) / 4,
        lambda w, lam, _: losses(w).mean(),
    )
    return Case(problem, w, {"mixture": torch.zeros(4)})


def steps_of(case: Case, estimator: AbstractHypergradientEstimator) -> Callable[[], object]:
    """Ten more steps of one run, at each call."""
    lam = {k: v.clone().requires_grad_() for k, v in case.outer_params.items()}
    optimizer = torch.optim.SGD(lam.values(), lr=1e-3)
    w, state, step = case.inner_params, EstimatorState(), 0

    def go() -> None:
        nonlocal w, state, step
        for _ in range(STEPS):
            found = estimator.estimate(case.problem, ONE, w, lam, step, state)
            found.result.raise_if_failed()
            for k, x in lam.items():
                x.grad = found.value[k]
            optimizer.step()
            w, state, step = found.inner_params, found.state, step + 1

    return go


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(case: Case, repetitions: int, label: str) -> dict[str, tuple[float, float, float]]:
    """Per step: the median and the quartiles of the ratios to the unit of the same repetition."""
    runs = {name: steps_of(case, estimator) for name, estimator in METHODS.items()}

    def unit() -> None:
        for _ in range(STEPS):
            case.gradient()

    for warm in (unit, *runs.values()):
        warm()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repetitions), desc=label):
        one = statistics.median(seconds(unit) for _ in range(3))
        for name, go in runs.items():
            found[name].append(seconds(go) / one)
    return {k: tuple(statistics.quantiles(v, n=4)) for k, v in found.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {"MLP": mlp(), "transformer": transformer()}
    found = {k: measure(case, args.repetitions, k) for k, case in cases.items()}
    lines = [
        "# One outer step in gradient evaluations",
        "",
        f"`python benchmarks/single_loop_cost.py --repetitions {args.repetitions}`: CPU time of one thread, median, quartiles in "
        f"brackets; torch {torch.__version__}. A step of `w` alone is 1.",
        "",
        f"| method | {' | '.join(cases)} |",
        f"|---|{'---|' * len(cases)}",
    ]
    cell = functools.partial("**{1:.1f}** ({0:.1f}-{2:.1f})".format)
    for name in METHODS:
        lines.append(f"| {name} | {' | '.join(cell(*found[k][name]) for k in cases)} |")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Proxies beside implicit differentiation, on a network that is tuned while it trains.

Digits, 200 training samples, a tanh network of 64-32-10, and one weight decay for each of its two layers. All methods
get ten inner steps between outer steps (Hypernetwork, which has none, fits more), start at the same decays, and stop at
one number of gradient evaluations. What counts is the loss of a new training at the decays that were found, on the
validation samples (that they were tuned on) and on others. ``python benchmarks/proxies.py`` writes ``results/proxies.md``.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
LOG = ("first", "last")
DESCENT = ohg.HeavyBall(0.2, max_steps=10, momentum=0.9)
FIT = ohg.HeavyBall(0.05, max_steps=10, momentum=0.9)
METHODS: dict[str, tuple[Any, float]] = {  # estimator, gradient evaluations of an outer step
    "T1-T2: `Implicit(Identity())`": (ohg.Implicit(ohg.Identity(), damping=1e-2), 13),
    "`Implicit(Neumann(10))`": (ohg.Implicit(ohg.Neumann(10), damping=1e-2), 35),
    "`Implicit(CG(30))`": (ohg.Implicit(ohg.CG(30), damping=1e-2), 75),
    "`DeltaSTN`, rank 1": (ohg.DeltaSTN(FIT, log=LOG), 33),
    "`DeltaSTN`, rank 1, rows=1": (ohg.DeltaSTN(FIT, log=LOG, rows=1), 33),
    "`DeltaSTN`, rank 2": (ohg.DeltaSTN(FIT, log=LOG, rank=2), 33),
    "`DeltaSTN`, rank 1, tuned scale": (ohg.DeltaSTN(FIT, log=LOG, entropy=1e-4), 35),
    "`DeltaSTN`, rank 1, fitted by Adam": (
        ohg.DeltaSTN(ohg.Adam(0.01, max_steps=10), log=LOG),
        33,
    ),
    "`Hypernetwork`, linear": (
        ohg.Hypernetwork(ohg.Adam(0.003, max_steps=16), log=LOG, scale=0.5),
        34,
    ),
}


READING = """
Reading: with as many gradient evaluations, proxies come to where implicit differentiation comes (with T1-T2, the cheapest, not
behind), but not always: one gate for each output unit cannot express how the weights respond to two decays at once, and one
seed of three ends elsewhere; two gates, or gates for the inputs, can. Fitted by Adam with a
constant step size, the same proxy did worst. What speaks for a proxy is that it takes first derivatives only.
"""


class Task:
    def __init__(self, seed: int) -> None:
        x, y = map(torch.from_numpy, load_digits(return_X_y=True))
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=rng)
        x, y = x[order] / 16, y[order]
        y = torch.where(torch.rand(len(y), generator=rng) < 0.2, y[order], y)  # a fifth at random
        self.train, self.valid, self.test = (
            (x[a:b], y[a:b]) for a, b in ((0, 200), (200, 700), (700, None))
        )
        sizes = {"first": (32, 64), "last": (10, 32)}
        self.start = {
            k: torch.randn(s, generator=rng, dtype=x.dtype) / s[1] ** 0.5 for k, s in sizes.items()
        }
        self.problem = ohg.BilevelProblem(self.inner, lambda w, lam, _: self.loss(w, self.valid))

    @staticmethod
    def loss(w: Params, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(torch.tanh(data[0] @ w["first"].mT) @ w["last"].mT, data[1])

    def inner(self, w: Params, lam: Params, batch: object) -> Tensor:
        decay = sum((lam[k] * w[k].square().sum() for k in w), torch.zeros(()))
        return self.loss(w, self.train) + 0.5 * decay

    def retrained(self, lam: Params) -> tuple[float, float]:
        solver = ohg.HeavyBall(0.2, max_steps=3000, momentum=0.9)
        w = ohg.inner_solve(self.problem, solver, self.start, lam).inner_params
        return float(self.loss(w, self.valid)), float(self.loss(w, self.test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=6000, help="gradient evaluations")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Proxies beside implicit differentiation",
        "",
        f"Made by `python benchmarks/proxies.py`: digits, a fifth of the labels at random, a network of 64-32-10 that is tuned "
        f"while it trains, a decay for each layer, {arguments.budget} gradient evaluations in all. Mean of "
        f"{arguments.seeds} seeds; losses of new trainings of 3,000 steps at the decays that were found.",
        "",
        "| | G a step | steps | decay, first | decay, last | validation loss | test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    tasks = [Task(seed) for seed in range(arguments.seeds)]
    first = {k: torch.tensor(1e-4, dtype=torch.float64) for k in LOG}
    rows = {"(the start)": (0.0, 0, [first] * len(tasks))}
    for name, (estimator, cost) in METHODS.items():
        steps = round(arguments.budget / cost)
        found = [
            ohg.minimize_bilevel(
                task.problem,
                task.start,
                first,
                inner_solver=DESCENT,
                estimator=estimator,
                optimizer=functools.partial(torch.optim.Adam, lr=0.1),
                bounds=dict.fromkeys(LOG, ohg.Domain(1e-6, 1.0, log=True)),
                num_steps=steps,
                burn_in=100,
            ).outer_params
            for task in tasks
        ]
        rows[name] = cost, steps, found
    for name, (cost, steps, found) in rows.items():
        losses = torch.tensor([t.retrained(lam) for t, lam in zip(tasks, found, strict=True)])
        decays = [torch.stack([lam[k] for lam in found]).log().mean().exp() for k in LOG]
        cells = [f"{cost:g}", str(steps), *(f"{d:.1e}" for d in decays)]
        cells += [f"{v:.3f}" for v in losses.mean(0).tolist()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "proxies.md"
    path.write_text("\n".join(lines) + "\n" + READING)


if __name__ == "__main__":
    main()

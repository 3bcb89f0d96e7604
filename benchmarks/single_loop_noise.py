"""How near SOBA, MA-SOBA and SABA come to the solution, from one sample at a time.

The quadratic bilevel problem of the tests (``tests/test_single_loop.py``: 6 inner and 4 outer variables, of which the solution
is a linear solve) with 64 samples of each objective: every step of ``minimize_bilevel`` sees one of each. What is plotted is
the squared relative error of ``lam``, the last row of the table its mean over the last tenth of the steps.

    PYTHONPATH=tests python benchmarks/single_loop_noise.py [--steps 40000] [--output benchmarks/results/single_loop_noise]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from test_single_loop import minimized, sampled
from torch import Tensor

import optuna_hypergrad as ohg

SAMPLES = 64
READING = (
    "## Reading",
    "",
    "The tables take the noise away: SABA falls linearly to rounding. Without them, steps of constant length end in a ball, and",
    "falling ones are at 1e-2 after 10,000 steps and hardly lower after 40,000. MA-SOBA's average (theta = 0.1, about ten steps) makes no",
    "difference here. One seed, one problem. The step sizes were not tuned for each method; the falling ones of `lam` were halved",
    "once, after a first run with 0.1 in place of 0.05 had ended at 1.6e-2.",
)


def falling(first: float) -> Callable[..., float]:
    return lambda *at: first * (1 + at[-1]) ** -0.5


class Descent(torch.optim.SGD):
    """SGD whose ``lr`` may fall as ``t^(-1/2)``, and which notes how far it is from ``best``."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, falls: bool, best: Tensor, errors: list[float]
    ) -> None:
        super().__init__(params, lr=lr)
        self.first, self.falls, self.best, self.errors = lr, falls, best, errors

    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        group["lr"] = self.first * ((1 + len(self.errors)) ** -0.5 if self.falls else 1.0)
        super().step(closure)
        distance = (group["params"][0].detach() - self.best).square().sum()
        self.errors.append(float(distance / self.best.square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    round_, best = sampled(SAMPLES)
    drawn, _ = sampled(SAMPLES, drawn=True)
    saba = ohg.SABA(num_inner_batches=SAMPLES, num_outer_batches=SAMPLES)
    constant, falls = ohg.GradientDescent(0.1, max_steps=1), ohg.GradientDescent(falling(0.2), 1)
    runs = {
        "SABA, constant steps": (round_, saba, constant, 0.01, False),
        "SOBA, constant steps": (drawn, ohg.SOBA(), constant, 0.01, False),
        "SOBA, falling steps": (drawn, ohg.SOBA(), falls, 0.05, True),
        "MASOBA, falling steps": (drawn, ohg.MASOBA(theta=0.1), falls, 0.05, True),
    }
    curves: dict[str, list[float]] = {}
    rows = []
    for name, (problem, estimator, solver, lr, lr_falls) in runs.items():
        errors = curves[name] = []
        minimized(
            problem,
            estimator,
            options.steps,
            inner_solver=solver,
            optimizer=functools.partial(
                Descent, lr=lr, falls=lr_falls, best=best["x"], errors=errors
            ),
        )
        late = errors[-max(1, options.steps // 10) :]
        marks = [errors[int(options.steps * share) - 1] for share in (0.025, 0.25, 1.0)]
        rows.append(
            f"| {name} | " + " | ".join(f"{e:.1e}" for e in (*marks, sum(late) / len(late))) + " |"
        )
        print(rows[-1], flush=True)
    if options.output is None:
        return
    at = [int(options.steps * share) for share in (0.025, 0.25, 1.0)]
    table = [
        "# One sample at a time",
        "",
        f"`PYTHONPATH=tests python benchmarks/single_loop_noise.py --steps {options.steps}`: squared relative error of the "
        f"hyperparameters, {SAMPLES} samples of each objective, one of each a step, float64.",
        "",
        f"| | after {at[0]:,} steps | {at[1]:,} | {at[2]:,} | mean of the last tenth |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"![curves]({options.output.name}.png)",
        "",
        *READING,
        "",
    ]
    options.output.with_suffix(".md").write_text("\n".join(table))
    draw(curves, options.output.with_suffix(".png"))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, errors in curves.items():
        every = max(1, len(errors) // 400)
        style = "--" if name.startswith("MASOBA") else "-"  # it lies upon SOBA's
        axes.plot(range(1, len(errors) + 1, every), errors[::every], style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("steps (one sample of each objective)")
    axes.set_ylabel("squared relative error of lam")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

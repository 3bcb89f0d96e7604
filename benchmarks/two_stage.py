"""Which pre-training tasks are worth it: their weights by hypergradients through pre-training and fine-tuning.

    python benchmarks/two_stage.py [--seeds 10 11 12] [--steps 40] [--results DIRECTORY]

Synthetic, after Raghu et al. (2021): a network with one hidden layer is pre-trained on 20 binary tasks of the same inputs,
ten of which are functions of the same two features as the target tasks, and ten are noise. Then it gets a new last layer
and is fine-tuned on 40 examples of the target tasks. The hyperparameters are the weights of the 20 tasks; they are judged
by the loss on a validation set after fine-tuning. Writes ``two_stage.md`` and ``.png``. A minute of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
Params = dict[str, Tensor]
NUM_TASKS, NUM_TARGETS, INPUTS, FEATURES, HIDDEN, EXAMPLES = 20, 10, 40, 2, 6, 150
DECAY, PRETRAINING = 1e-3, ohg.HeavyBall(0.3, max_steps=20, momentum=0.9)
FROM_SCRATCH, TUNING_STEPS = 400, 20


@dataclass(frozen=True)
class World:
    """Inputs and labels: of pre-training ``(n, tasks)``, and of the targets for tuning, validation and test."""

    pretraining: tuple[Tensor, Tensor]
    tuning: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    is_noise: Tensor


def directions(n: int, shift: float) -> Tensor:
    """``(2, n)``, evenly spread over the plane of the features, so that none is worth more than another."""
    angles = torch.pi * (torch.arange(n) + shift) / n
    return torch.stack([angles.cos(), angles.sin()])


def world(seed: int) -> World:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(INPUTS, FEATURES, generator=rng) / INPUTS**0.5
    relevant, targets = directions(NUM_TASKS // 2, 0.5), directions(NUM_TARGETS, 0.0)

    def labelled(n: int, readout: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, INPUTS, generator=rng)
        hidden = x @ features
        return x, (hidden @ readout > 0).float()

    x, y = labelled(EXAMPLES, relevant)
    noise = torch.randint(2, (EXAMPLES, NUM_TASKS // 2), generator=rng).float()
    order = torch.randperm(NUM_TASKS, generator=rng)
    return World(
        (x, torch.cat([y, noise], 1)[:, order]),
        labelled(40, targets),
        labelled(1000, targets),
        labelled(5000, targets),
        order >= NUM_TASKS // 2,
    )


def fresh(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {
        "body": torch.randn(INPUTS, HIDDEN, generator=rng) / INPUTS**0.5,
        "bias": torch.zeros(HIDDEN),
        "heads": torch.randn(HIDDEN, NUM_TASKS, generator=rng) / HIDDEN**0.5,
    }


def embedded(w: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["body"] + w["bias"])


def regularizer(w: Params, lam: Params, batch: None) -> Tensor:
    return DECAY * torch.stack([v.square().sum() for v in w.values()]).sum()


def weights_of(logit: Tensor) -> Tensor:
    """Positive, with a mean of 1: what all of them have in common would only scale the decay."""
    return NUM_TASKS * logit.softmax(0)


def problem_of(data: World) -> tuple[ohg.BilevelProblem, ohg.FineTuning, ohg.GaussNewton]:
    x, y = data.pretraining

    def outputs(w: Params, lam: Params, batch: None) -> Tensor:
        return embedded(w, x) @ w["heads"]

    def of_outputs(found: Tensor, lam: Params, batch: None) -> Tensor:
        each = cross_entropy(found, y, reduction="none").mean(0)  # (tasks,)
        return (weights_of(lam["logit"]) * each).mean()

    def target_loss(w: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(embedded(w, batch[0]) @ w["head"], batch[1])

    tuning = ohg.FineTuning(
        lambda w, lam, batch: target_loss(w, data.tuning) + DECAY * w["head"].square().sum(),
        ohg.HeavyBall(0.3, max_steps=TUNING_STEPS, momentum=0.9),
        start=lambda w, lam: {
            "body": w["body"],
            "bias": w["bias"],
            "head": torch.zeros(HIDDEN, NUM_TARGETS),
        },
    )
    problem = ohg.two_stage(
        lambda w, lam, batch: (
            of_outputs(outputs(w, lam, batch), lam, batch) + regularizer(w, lam, batch)
        ),
        lambda w, lam, batch: target_loss(w, data.validation),
        tuning,
    )
    return problem, tuning, ohg.GaussNewton(outputs, of_outputs, regularizer)


def judged(data: World, seed: int, logit: Tensor) -> float:
    """Test accuracy after pre-training from scratch with these weights, and fine-tuning."""
    problem, tuning, _ = problem_of(data)
    lam = {"logit": logit}
    w = ohg.inner_solve(problem, PRETRAINING, fresh(seed), lam, num_steps=FROM_SCRATCH).inner_params
    w = {k: v.detach() for k, v in tuning(w, lam).items()}
    x, y = data.test
    return float(((embedded(w, x) @ w["head"] > 0).float() == y).float().mean())


def learned(
    data: World, seed: int, estimator: AbstractHypergradientEstimator, num_steps: int
) -> list[Tensor]:
    """The logits before each outer step and after the last."""
    problem, _, _ = problem_of(data)
    seen: list[Tensor] = []

    def watched(w: Params, lam: Params, batch: int) -> Tensor:
        if len(seen) == batch:
            seen.append(lam["logit"].detach().clone())
        return problem.outer_objective(w, lam, None)

    found = ohg.minimize_bilevel(
        ohg.BilevelProblem(problem.inner_objective, watched, outer_batch=lambda step: step),
        fresh(seed),
        {"logit": torch.zeros(NUM_TASKS)},
        inner_solver=PRETRAINING,
        estimator=estimator,
        optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        bounds={"logit": (-5.0, 5.0)},
        burn_in=FROM_SCRATCH,
        num_steps=num_steps,
    )
    return [*seen[:num_steps], found.outer_params["logit"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[tuple[float, float | None]]] = {}
    paths: dict[int, tuple[World, list[Tensor]]] = {}
    for seed in arguments.seeds:
        data = world(seed)
        _, _, curvature = problem_of(data)
        whole = ohg.Implicit(ohg.CG(30), curvature=curvature)
        found = {
            "uniform": [torch.zeros(NUM_TASKS)],
            "learned (both terms)": learned(data, seed, whole, arguments.steps),
            "learned, identity for the inverse Hessian": learned(
                data, seed, ohg.Implicit(ohg.Identity(1.0)), arguments.steps
            ),
            "the ten relevant tasks alone (oracle)": [torch.where(data.is_noise, -30.0, 0.0)],
        }
        paths[seed] = data, found["learned (both terms)"]
        for name, path in found.items():
            area = roc_auc_score(~data.is_noise, path[-1]) if len(path) > 1 else None
            rows.setdefault(name, []).append((judged(data, seed, path[-1]), area))
            print(seed, name, rows[name][-1], flush=True)
    text = report(rows, arguments)
    (arguments.results / "two_stage.md").write_text(text, encoding="utf-8")
    figure(paths, arguments.results / "two_stage.png")
    print(text)


def report(rows: dict[str, list[tuple[float, float | None]]], arguments: argparse.Namespace) -> str:
    lines = [
        "# Weights of pre-training tasks",
        "",
        f"`python benchmarks/two_stage.py --seeds {' '.join(map(str, arguments.seeds))} --steps {arguments.steps}`, Python "
        f"{platform.python_version()}, torch {importlib.metadata.version('torch')}. {NUM_TASKS} pre-training tasks, half of "
        f"them noise; {TUNING_STEPS} steps of fine-tuning on 40 examples; {arguments.steps} outer steps, each after 20 more "
        f"steps of pre-training. Test accuracy on 5,000 examples of {NUM_TARGETS} target tasks, after pre-training *from scratch* with "
        "the final weights; mean and standard deviation of the seeds. *AUROC*: of the weights as a score of not being noise.",
        "",
        "| weights of the tasks | test accuracy, % | by seed | AUROC by seed |",
        "|---|---|---|---|",
    ]
    for name, found in rows.items():
        values = [100 * v for v, _ in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        areas = " ".join(f"{a:.2f}" for _, a in found if a is not None)
        lines.append(
            f"| {name} | {statistics.mean(values):.1f} ± {spread:.1f} | {' '.join(f'{v:.1f}' for v in values)} | {areas} |"
        )
    return "\n".join([*lines, "", READING])


READING = """## Reading (of the default run)

* All noise tasks end below all others in each seed (AUROC 1), and fine-tuning after pre-training from scratch with the
  learned weights is 1.4 to 1.6 points better than with equal ones. That is level with the oracle, which knows which tasks are
  noise, or better: among the relevant tasks, too, weights differ.
* Without the inverse Hessian (identity) the gain is about two thirds, and one seed ranks less well: signs and sizes of
  the weights' hypergradients are mostly right without it on this problem.
* How the setting came about: about twenty variants were tried on seeds 0 to 2; the seeds of the table were not looked at
  before. Two things mattered. Weights are normalized (softmax): without that, what all weights have in common trades
  against the decay and drowns the rest (AUROC .6 to 1). And the relevant tasks are spread evenly over two features:
  with random functions of three, some are redundant, and their weights fall like those of noise. On seeds 3 to 5 of that
  version the learned weights gained 2.3 points (88.0 against 85.7, oracle 86.0), at an AUROC of .95, .94 and .72 only.
"""


def figure(paths: dict[int, tuple[World, list[Tensor]]], path: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(
        1,
        len(paths),
        figsize=(2.6 * len(paths), 2.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, (seed, (data, weights)) in zip(axes[0], paths.items(), strict=True):
        curves = torch.stack([weights_of(v) for v in weights]).numpy()
        for k in np.argsort(~data.is_noise.numpy()):
            noise = bool(data.is_noise[k])
            ax.plot(
                curves[:, k],
                color="#9a9a9a" if noise else "#c1121f",
                lw=1,
                label="noise" if noise else "relevant",
            )
        ax.set(xlabel="outer step", title=f"seed {seed}")
    axes[0][0].set_ylabel("weight of the task")
    handles, labels = axes[0][0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes[0][0].legend(named.values(), named.keys(), frameon=False, fontsize=8)
    fig.savefig(path, dpi=160)


if __name__ == "__main__":
    main()

"""One decay per weight of an MLP on MNIST, 669,706 of them, beside the best single decay that TPE finds.

    python benchmarks/per_weight_decay.py --data DIR [--seeds 3] [--outer-steps 200]

``DIR`` holds MNIST's gzip files. A 784-512-512-10 network trains on 5,000 images by heavy ball, 1,500 steps on batches
of 128; decays are chosen by the loss on 5,000 other images; accuracy is on the 10,000 of the test set. Ours is
one call of ``minimize_bilevel``: 300 steps of burn-in, then an outer step of Adam after every 10 inner steps, warm
started, with five terms of the Neumann series; ``final_eval="retrain"`` trains anew with the decays found, from the same
initialization, and another training from another initialization says how far they depend on it.

TPE chooses one decay for all, within the same bounds, each trial a training of 1,500 steps; it gets at least as many
*gradient evaluations* as ours takes in all (the retraining included): the CPU time of ours divided by that of a gradient
evaluation on a batch, measured in the same run. Writes ``results/per_weight_decay.md`` and ``.png``. About ten
minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from condensation_task import load_mnist
from torch import Tensor
from torch.nn.functional import cross_entropy, relu
from tqdm.auto import tqdm

import optuna_hypergrad as ohg
from optuna_hypergrad.inner import inner_solve

Params = dict[str, Tensor]
RESULTS = Path(__file__).parent / "results"
NUM_TRAIN, NUM_VALID, BATCH, VALID_BATCH = 5_000, 5_000, 128, 512
STEPS, BURN_IN, INNER_STEPS, TERMS, STEP_SIZE = 1_500, 300, 10, 5, 0.02
WIDTHS, BOUNDS, START = (784, 512, 512, 10), (1e-6, 1e-1), 1e-3
ROWS = {
    "start": "one decay, 1e-3 (the start)",
    "tpe": "one decay, TPE",
    "tpe_accuracy": "one decay, TPE on the accuracy",
    "retrained": "**a decay per weight, retrained**",
    "fresh": "a decay per weight, another initialization",
    "warm": "a decay per weight, warm (no training of its own)",
    "both": "one decay (TPE's), trained on both sets",
}


@dataclass(frozen=True)
class Split:
    """Images ``(n, 784)``, standardized, and labels ``(n,)``."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, data: Path, seed: int) -> Split:
        mnist = load_mnist(data, 28)
        order = torch.randperm(len(mnist.labels), generator=torch.Generator().manual_seed(seed))

        def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return (images.flatten(1) - 0.1307) / 0.3081, labels

        train, valid = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_VALID]
        return cls(
            part(mnist.images[train], mnist.labels[train]),
            part(mnist.images[valid], mnist.labels[valid]),
            part(mnist.test_images, mnist.test_labels),
        )

    def both(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat(pair) for pair in zip(self.train, self.valid, strict=True))  # type: ignore[return-value]


def initial(seed: int) -> Params:
    generator, w = torch.Generator().manual_seed(seed), {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(WIDTHS)):
        w[f"{i}.weight"] = torch.randn(fan_in, fan_out, generator=generator) * (2 / fan_in) ** 0.5
        w[f"{i}.bias"] = torch.zeros(fan_out)
    return w


def outputs(w: Params, x: Tensor) -> Tensor:
    for i in range(len(WIDTHS) - 1):
        x = torch.addmm(w[f"{i}.bias"], x if i == 0 else relu(x), w[f"{i}.weight"])
    return x


def training_loss(w: Params, lam: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum((lam[k] * w[k].square()).sum() for k in w)
    return cross_entropy(outputs(w, batch[0]), batch[1]) + 0.5 * penalty


def validation_loss(w: Params, lam: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(outputs(w, batch[0]), batch[1])


def batches(part: tuple[Tensor, Tensor], size: int, seed: int) -> Any:
    """Step -> batch."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(part[1]), (size,), generator=generator)
        return part[0][chosen], part[1][chosen]

    return batch


def problem_of(train: tuple[Tensor, Tensor], split: Split, seed: int) -> ohg.BilevelProblem:
    return ohg.BilevelProblem(
        training_loss,
        validation_loss,
        batches(train, BATCH, 2 * seed),
        batches(split.valid, VALID_BATCH, 2 * seed + 1),
    )


def solver(num_steps: int) -> ohg.HeavyBall:
    return ohg.HeavyBall(STEP_SIZE, momentum=0.9, max_steps=num_steps)


def trained(problem: ohg.BilevelProblem, w: Params, lam: Params) -> Params:
    return inner_solve(problem, solver(STEPS), w, lam).inner_params


def everywhere(w: Params, decay: float) -> Params:
    return {k: torch.full_like(v, decay) for k, v in w.items()}


def judged(w: Params, split: Split) -> dict[str, float]:
    """Loss and accuracy (%) on the validation and the test set."""
    found = {}
    for name, (x, y) in (("valid", split.valid), ("test", split.test)):
        z = outputs(w, x)
        found[f"{name}_loss"] = float(cross_entropy(z, y))
        found[f"{name}_accuracy"] = 100 * float((z.argmax(1) == y).float().mean())
    return found


def gradient_seconds(problem: ohg.BilevelProblem, w: Params, lam: Params) -> float:
    """CPU time of one inner step, by the median of 30 x 10."""
    times = []
    for _ in range(30):
        begun = time.process_time()
        inner_solve(problem, solver(10), w, lam)
        times.append((time.process_time() - begun) / 10)
    return statistics.median(times)


def run(split: Split, seed: int, outer_steps: int) -> dict[str, Any]:
    w, problem = initial(seed), problem_of(split.train, split, seed)
    start = everywhere(w, START)
    found: dict[str, Any] = {"start": judged(trained(problem, w, start), split)}
    unit = gradient_seconds(problem, w, start)
    begun = time.process_time()
    result = ohg.minimize_bilevel(
        problem,
        w,
        start,
        inner_solver=solver(INNER_STEPS),
        num_steps=outer_steps,
        estimator=ohg.Implicit(ohg.Neumann(TERMS, alpha=STEP_SIZE)),
        optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        bounds={k: ohg.Domain(*BOUNDS, log=True) for k in start},
        burn_in=BURN_IN,
        final_eval="retrain",
        retrain_steps=STEPS,
        progress=True,
    )
    found["evaluations"] = (time.process_time() - begun) / unit
    inner = sum(h["seconds_inner"] for h in result.history)
    found["outer_per_inner"] = sum(h["seconds_backward"] for h in result.history) / inner
    assert result.retrained_params is not None
    found["retrained"] = judged(result.retrained_params, split)
    found["warm"] = judged(result.inner_params, split)
    found["fresh"] = judged(trained(problem, initial(seed + 1000), result.outer_params), split)
    found["pixels"] = result.outer_params["0.weight"].log10().mean(1).tolist()

    def objective(trial: optuna.Trial, judge: str) -> float:
        decay = trial.suggest_float("decay", *BOUNDS, log=True)
        values = judged(trained(problem, w, everywhere(w, decay)), split)
        for key, value in values.items():
            trial.set_user_attr(key, value)
        return values[judge]

    num_trials = math.ceil(found["evaluations"] / STEPS)
    for row, judge, direction in (
        ("tpe", "valid_loss", "minimize"),
        ("tpe_accuracy", "valid_accuracy", "maximize"),
    ):
        study = optuna.create_study(
            direction=direction, sampler=optuna.samplers.TPESampler(seed=seed)
        )
        study.enqueue_trial({"decay": START})
        study.optimize(functools.partial(objective, judge=judge), n_trials=num_trials)
        found[row] = {**study.best_trial.user_attrs, "decay": study.best_params["decay"]}
    found["num_trials"] = num_trials
    both = problem_of(split.both(), split, seed)
    found["both"] = judged(trained(both, w, everywhere(w, found["tpe"]["decay"])), split)
    return found


def report(runs: list[dict[str, Any]], outer_steps: int) -> str:
    trials = ", ".join(str(r["num_trials"]) for r in runs)
    cost = statistics.fmean(r["evaluations"] for r in runs)
    share = statistics.fmean(r["outer_per_inner"] for r in runs)
    lines = [
        "# A decay per weight, 669,706 of them",
        "",
        f"`python benchmarks/per_weight_decay.py --data DIR --seeds {len(runs)} --outer-steps {outer_steps}`, torch "
        f"{torch.__version__}, one thread. MLP 784-512-512-10, trained on {NUM_TRAIN:,} images of MNIST, decays chosen on {NUM_VALID:,} others. "
        f"Mean of {len(runs)} seeds (split, initialization, batches), test accuracies of each in brackets.",
        "",
        "| | test accuracy, % | test loss | validation accuracy, % | validation loss |",
        "|---|---|---|---|---|",
    ]
    for key, label in ROWS.items():
        mean = {k: statistics.fmean(r[key][k] for r in runs) for k in runs[0]["start"]}
        each = " ".join(f"{r[key]['test_accuracy']:.2f}" for r in runs)
        lines.append(
            f"| {label} | {mean['test_accuracy']:.2f} ({each}) | {mean['test_loss']:.4f} | "
            f"{mean['valid_accuracy']:.2f} | {mean['valid_loss']:.4f} |"
        )
    lines += [
        "",
        f"* Cost of ours, burn-in and retraining included: {cost:,.0f} gradient evaluations of a batch ({outer_steps} outer steps). "
        f"TPE has {trials} trials of {STEPS:,}, at least as many.",
        f"* An outer step (two gradients, {TERMS} Hessian-vector products, one mixed product, Adam's inputs) costs "
        f"**{share:.2f}** times the {INNER_STEPS} inner steps that it is interleaved with.",
        "* The value that counts is the retrained one. The validation set is fitted by the decays themselves, so its accuracy "
        "says nothing about new images; the test set does. What is learned belongs to the initialization: of another one the "
        "same decays mean other weights, and nothing of the gain is left. Decays that were chosen on validation images know "
        "something of them, and so does a network that is trained on them: the last row.",
    ]
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for place, (key, label) in enumerate(ROWS.items()):
        accuracies = [r[key]["test_accuracy"] for r in runs]
        color = "tab:blue" if "per weight" in label else "tab:gray"
        left.scatter(accuracies, [place] * len(runs), color=color, zorder=2)
    left.set_yticks(range(len(ROWS)), [v.strip("*") for v in ROWS.values()], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("test accuracy, %, a dot per seed", fontsize=8)
    left.grid(alpha=0.3, zorder=0)
    mean = torch.tensor([r["pixels"] for r in runs]).mean(0).view(28, 28)
    image = right.imshow(mean, cmap="magma")
    right.set_axis_off()
    right.set_title("log10 of the decay of a pixel's weights, mean", fontsize=9)
    figure.colorbar(image, ax=right, shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's gzip files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--raw", type=Path, help="keep and go on from all figures in this file")
    parser.add_argument("--output", type=Path, default=RESULTS / "per_weight_decay.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    raw = options.raw
    runs = json.loads(raw.read_text()) if raw is not None and raw.exists() else []
    for seed in tqdm(range(len(runs), options.seeds), "seeds"):
        runs.append(run(Split.of(options.data, seed), seed, options.outer_steps))
        if raw is not None:
            raw.write_text(json.dumps(runs))
    options.output.write_text(report(runs, options.outer_steps), encoding="utf-8")
    draw(runs, options.output.with_suffix(".png"))
    print(options.output.read_text())


if __name__ == "__main__":
    main()

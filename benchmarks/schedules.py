"""A learning rate for each of 100 steps and a momentum for each layer, learned by differentiating the training.

    python benchmarks/schedules.py --data DIR [--seeds 3] [--outer-steps 40] [--raw FILE]

``DIR`` holds MNIST's gzip files. The training is 100 steps of heavy ball on a 784-64-10 network (tanh), batches of
128 of 10,000 images; what is minimized is the loss on 2,000 others after the last step. 104 hyperparameters, by
``ohg.Reversible()`` and by ``ohg.Unroll()``, one outer step a trial of ``study.optimize``; beside them TPE over
a constant rate and one momentum, over a rate that a half cosine takes to zero and one momentum, and over all 104.

Tuned is the mean over three trainings (of one initialization, images and their order each): what is learned on one
alone is 0.05 worse in others. Reported is that mean, and the one over five *fresh* trainings with other
initializations, images and orders. The outer steps are those of the sampler's defaults, and of Adam at 0.1 in one
trajectory, which was chosen among five settings, as the three trainings were, on a seed (7) that is not reported.

*Equalized are gradient evaluations* of the training loss: differentiating a training costs ``Reversible`` 100 forth
and counts as 250 back, ``Unroll`` 100 and 140 (their docstrings say so); TPE, at 100, is given as many as
``Reversible`` has. All start from the same setting. Writes ``results/schedules.md`` and ``.png``. About half an
hour on one core.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import TPESampler
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

import optuna_hypergrad as ohg

RESULTS = Path(__file__).parent / "results"
NUM_STEPS, BATCH, WIDTH, NUM_TRAIN, NUM_VALID = 100, 128, 64, 10_000, 2_000
NUM_TUNED, NUM_FRESH = 3, 5
LAYERS = {
    "first.weight": (784, WIDTH),
    "first.bias": (WIDTH,),
    "last.weight": (WIDTH, 10),
    "last.bias": (10,),
}
START_RATE, START_MOMENTUM = 0.05, 0.5
RATES, MOMENTA = (1e-3, 2.0), (0.05, 0.99)
ESTIMATORS = {
    "Reversible": ohg.Reversible(),
    "Unroll": ohg.Unroll(),
    "Unroll, Adam": ohg.Unroll(),
}
COST = {"Reversible": 350, "Unroll": 240, "Unroll, Adam": 240}
"""Gradient evaluations for a training and its hypergradient."""
METHODS = {
    "start": "as it starts",
    "TPE, constant": "one rate, one momentum",
    "TPE, cosine": "first rate of a half cosine to zero, one momentum",
    "TPE, all": "100 rates, 4 momenta",
    "Unroll": "100 rates, 4 momenta",
    "Reversible": "100 rates, 4 momenta",
    "Unroll, Adam": "100 rates, 4 momenta",
}
COLORS = {"start": "0.6", "TPE, constant": "C0", "TPE, cosine": "C2", "TPE, all": "C4", "Unroll": "C1", "Reversible": "C3", "Unroll, Adam": "C5"}  # fmt: skip
Params = dict[str, Tensor]
Found = dict[str, list[float]]
"""``rates`` (a step) and ``momenta`` (a layer)."""


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(folder: Path) -> Data:
    def images(name: str) -> Tensor:
        pixels = np.frombuffer(gzip.decompress((folder / name).read_bytes())[16:], np.uint8)
        return torch.tensor(pixels.reshape(-1, 784).astype(np.float32) / 255.0)

    def labels(name: str) -> Tensor:
        raw = np.frombuffer(gzip.decompress((folder / name).read_bytes())[8:], np.uint8)
        return torch.tensor(raw.astype(np.int64))

    return Data(
        images("train-images-idx3-ubyte.gz"),
        labels("train-labels-idx1-ubyte.gz"),
        images("t10k-images-idx3-ubyte.gz"),
        labels("t10k-labels-idx1-ubyte.gz"),
    )


def network(w: Params, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w["first.weight"] + w["first.bias"])
    return hidden @ w["last.weight"] + w["last.bias"]


def per_layer(lam: Params, step: int) -> Params:
    """The solver's momentum: a factor for each inner parameter."""
    return dict(zip(LAYERS, lam["momenta"], strict=True))


@dataclass(frozen=True)
class Training:
    """An initialization and an order of batches; the validation images are the same for all of a seed."""

    data: Data
    seed: int
    number: int
    """The first ``NUM_TUNED`` are tuned; the others are fresh."""

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(self.seed))
        valid, rest = order[:NUM_VALID], order[NUM_VALID:]
        shift = self.number * NUM_TRAIN % (len(rest) - NUM_TRAIN)
        return rest[shift : shift + NUM_TRAIN], valid

    def start(self) -> Params:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.number)
        return {
            k: torch.randn(shape, generator=generator) / math.sqrt(shape[0])
            if len(shape) == 2
            else torch.zeros(shape)
            for k, shape in LAYERS.items()
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        train, _ = self.split
        generator = torch.Generator().manual_seed(10**6 * self.number + 1000 * self.seed + step)
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        return self.data.x[rows], self.data.y[rows]

    @staticmethod
    def loss(w: Params, lam: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(network(w, batch[0]), batch[1])

    def valid_loss(self, w: Params) -> Tensor:
        _, valid = self.split
        return cross_entropy(network(w, self.data.x[valid]), self.data.y[valid])

    def trained(self, found: Found) -> tuple[Params, list[float]]:
        """The last weights and the training loss of each step, in plain torch."""
        w = {k: v.requires_grad_() for k, v in self.start().items()}
        velocity = {k: torch.zeros_like(v) for k, v in w.items()}
        momenta, losses = dict(zip(LAYERS, found["momenta"], strict=True)), []
        for step, rate in enumerate(found["rates"]):
            loss = self.loss(w, {}, self.batch(step))
            losses.append(float(loss.detach()))
            gradient = torch.autograd.grad(loss, list(w.values()))
            with torch.no_grad():
                for (k, v), g in zip(w.items(), gradient, strict=True):
                    velocity[k].mul_(momenta[k]).add_(g)
                    v -= rate * velocity[k]
        return w, losses

    @torch.no_grad()
    def judged(self, w: Params) -> dict[str, float]:
        right = network(w, self.data.x_test).argmax(1) == self.data.y_test
        return {"loss": float(self.valid_loss(w)), "accuracy": float(right.float().mean())}


def constant(rate: float, momentum: float) -> Found:
    return {"rates": [rate] * NUM_STEPS, "momenta": [momentum] * len(LAYERS)}


def cosine(rate: float, momentum: float) -> Found:
    shares = 0.5 * (1 + np.cos(np.pi * np.arange(NUM_STEPS) / NUM_STEPS))
    return {"rates": (rate * shares).tolist(), "momenta": [momentum] * len(LAYERS)}


def learned(trainings: list[Training], method: str, num_trials: int) -> tuple[Found, list[float]]:
    """By hypergradients: what was found, and the value of each trial."""

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        lam = {
            "rates": trial.suggest_tensor("rates", (NUM_STEPS,), *RATES, log=True, init=START_RATE),
            "momenta": trial.suggest_tensor(
                "momenta", (len(LAYERS),), *MOMENTA, init=START_MOMENTUM
            ),
        }
        solver = ohg.HeavyBall("rates", max_steps=NUM_STEPS, momentum=per_layer)
        losses = []
        for training in trainings:
            w = ohg.solve(
                training.loss,
                training.start(),
                lam,
                solver=solver,
                estimator=ESTIMATORS[method],
                inner_batch=training.batch,
            )
            losses.append(training.valid_loss(w))
        return torch.stack(losses).mean()

    seed, sampler = trainings[0].seed, ohg.HypergradientSampler(seed=trainings[0].seed)
    if method.endswith("Adam"):
        adam = functools.partial(torch.optim.Adam, lr=0.1)
        sampler = ohg.HypergradientSampler(optimizer=adam, slice_steps=num_trials, seed=seed)
    study = optuna.create_study(sampler=sampler)
    values = _optimize(study, objective, num_trials, f"{method}, {seed}")
    return {k: v.tolist() for k, v in ohg.load_tensors(study).items()}, values


def searched(trainings: list[Training], method: str, num_trials: int) -> tuple[Found, list[float]]:
    """By TPE."""

    def setting(params: dict[str, float]) -> Found:
        if method == "TPE, all":
            rates = [params[f"rate_{i}"] for i in range(NUM_STEPS)]
            return {"rates": rates, "momenta": [params[f"momentum_{k}"] for k in LAYERS]}
        make = cosine if method == "TPE, cosine" else constant
        return make(params["rate"], params["momentum"])

    every = method == "TPE, all"
    rates = [f"rate_{i}" for i in range(NUM_STEPS)] if every else ["rate"]
    momenta = [f"momentum_{k}" for k in LAYERS] if every else ["momentum"]

    def objective(trial: optuna.Trial) -> float:
        params = {k: trial.suggest_float(k, *RATES, log=True) for k in rates}
        params |= {k: trial.suggest_float(k, *MOMENTA) for k in momenta}
        ends = [training.trained(setting(params))[0] for training in trainings]
        with torch.no_grad():
            return statistics.mean(
                float(training.valid_loss(w)) for training, w in zip(trainings, ends, strict=True)
            )

    study = optuna.create_study(sampler=TPESampler(seed=trainings[0].seed))
    study.enqueue_trial(dict.fromkeys(rates, START_RATE) | dict.fromkeys(momenta, START_MOMENTUM))
    values = _optimize(study, objective, num_trials, f"{method}, {trainings[0].seed}")
    return setting(study.best_params), values


def _optimize(study: optuna.Study, objective: Any, num_trials: int, label: str) -> list[float]:
    with tqdm(total=num_trials, desc=label, leave=False) as bar:

        def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            bar.set_postfix_str(f"best {study.best_value:.4g}", refresh=False)
            bar.update()

        study.optimize(objective, n_trials=num_trials, callbacks=[show])
    return [math.inf if t.value is None else t.value for t in study.trials]


def run(data: Data, method: str, seed: int, outer_steps: int) -> dict[str, Any]:
    trainings = [Training(data, seed, i) for i in range(NUM_TUNED + NUM_FRESH)]
    tuned, fresh = trainings[:NUM_TUNED], trainings[NUM_TUNED:]
    began = time.perf_counter()
    values: list[float] = []
    if method in ESTIMATORS:
        num_trials, cost = outer_steps, COST[method]
        found, values = learned(tuned, method, num_trials)
    elif method == "start":
        num_trials, cost = 1, NUM_STEPS
        found = constant(START_RATE, START_MOMENTUM)
    else:
        num_trials, cost = outer_steps * COST["Reversible"] // NUM_STEPS, NUM_STEPS
        found, values = searched(tuned, method, num_trials)
    seconds = time.perf_counter() - began
    fresh_losses = [t.trained(found)[1] for t in fresh]
    return {
        "method": method,
        "seed": seed,
        "found": found,
        "best": np.minimum.accumulate(values).tolist(),
        "trials": num_trials,
        "cost": NUM_TUNED * cost,
        "seconds": seconds,
        "tuned": [t.judged(t.trained(found)[0]) for t in tuned],
        "fresh": [t.judged(t.trained(found)[0]) for t in fresh],
        "losses": np.mean(fresh_losses, 0).tolist(),
    }


def _shown(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):{form}} ({low:{form}}-{high:{form}})"


def table(done: list[dict[str, Any]], outer_steps: int) -> str:
    seeds = sorted({d["seed"] for d in done})
    lines = [
        "# Learning-rate schedules and momenta",
        "",
        f"`python benchmarks/schedules.py --data DIR --seeds {len(seeds)} --outer-steps {outer_steps}`: MNIST, network "
        f"784-{WIDTH}-10, {NUM_STEPS} steps of heavy ball, batches of {BATCH} of {NUM_TRAIN:,} images; outer loss: "
        f"cross-entropy on {NUM_VALID:,} others after the last step. Mean of the seeds (lowest to highest). "
        f"*Tuned*: the {NUM_TUNED} trainings whose mean was tuned; *fresh*: {NUM_FRESH} with other initializations and "
        "other images in another order. Accuracy on the 10,000 test images. Equalized between Reversible and TPE are "
        "gradient evaluations, the way back of Reversible counted as 250 for 100 steps; Unroll takes as many outer "
        "steps as Reversible, and its way back counts as 140. *Adam*: outer steps of Adam at 0.1 in one trajectory; "
        "otherwise the sampler has its defaults. Training steps: those forth; s: of tuning, on a busy machine. All start at a rate of "
        f"{START_RATE} and a momentum of {START_MOMENTUM}.",
        "",
        "| method | tuned | seeds | trials | training steps | gradient evaluations | s | validation loss, tuned | validation "
        "loss, fresh | test accuracy, tuned | test accuracy, fresh |",
        "|---" * 11 + "|",
    ]
    for method, what in METHODS.items():
        some = [d for d in done if d["method"] == method]
        if not some:
            continue
        one = some[0]
        mean = {
            (which, k): [statistics.mean(f[k] for f in d[which]) for d in some]
            for which in ("tuned", "fresh")
            for k in ("loss", "accuracy")
        }
        lines.append(
            f"| {method} | {what} | {len(some)} | {one['trials']} | {one['trials'] * NUM_TUNED * NUM_STEPS:,} | "
            f"{one['trials'] * one['cost']:,} | {statistics.mean(d['seconds'] for d in some):.0f} | "
            f"{_shown(mean['tuned', 'loss'], '.4f')} | {_shown(mean['fresh', 'loss'], '.4f')} | "
            f"{_shown(mean['tuned', 'accuracy'], '.4f')} | {_shown(mean['fresh', 'accuracy'], '.4f')} |"
        )
    lines += ["", "What was found, seed 0: rates at some steps, and momenta by layer tensor.", ""]
    shown = [0, 9, 24, 49, 74, 89, 96, 98, 99]
    lines += [
        "| method | " + " | ".join(f"step {i + 1}" for i in shown) + " | momenta |",
        "|---" * (2 + len(shown)) + "|",
    ]
    for d in (d for m in METHODS for d in done if (d["method"], d["seed"]) == (m, 0)):
        rates, momenta = d["found"]["rates"], d["found"]["momenta"]
        lines.append(
            f"| {d['method']} | "
            + " | ".join(f"{rates[i]:.3g}" for i in shown)
            + " | "
            + ", ".join(f"{m:.2f}" for m in momenta)
            + " |"
        )
    return "\n".join(lines) + "\n"


def figure(done: list[dict[str, Any]], path: Path) -> None:
    """The schedules, the training loss along fresh trainings, and the tuning itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.0))
    for method, color in COLORS.items():
        some = [d for d in done if d["method"] == method]
        if not some:
            continue
        steps = np.arange(1, NUM_STEPS + 1)
        if method != "TPE, all":  # a cloud
            style = "--" if method == "Unroll" else "-"
            for d in some:
                left.plot(steps, d["found"]["rates"], color=color, linestyle=style, linewidth=1.1)
        smooth = np.convolve(np.mean([d["losses"] for d in some], 0), np.ones(5) / 5, mode="valid")
        middle.plot(steps[2:-2], smooth, color=color, label=method, linewidth=1.5)
        if some[0]["best"]:
            best = np.mean([d["best"] for d in some], 0)
            right.plot(np.arange(1, len(best) + 1) * some[0]["cost"], best, color=color)
    left.set(yscale="log", title="rate of each step, every seed", xlabel="step")
    left.set_ylim(5e-4, 2.5)
    middle.set(yscale="log", title="training loss, fresh (mean, 5 steps)", xlabel="step")
    right.set(
        xscale="log",
        yscale="log",
        title="best validation loss, tuned trainings",
        xlabel="gradient evaluations",
    )
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.title.set_fontsize(10)
    middle.legend(fontsize=8, frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="MNIST's gzip files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--raw", type=Path, help="results so far, a JSON line each; goes on from them"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    data = load(options.data)
    done: list[dict[str, Any]] = []
    if options.raw and options.raw.exists():
        done = [json.loads(line) for line in options.raw.read_text().splitlines()]
    known = {(d["method"], d["seed"]) for d in done}
    jobs = [(m, s) for s in range(options.seeds) for m in options.methods if (m, s) not in known]
    for method, seed in tqdm(jobs, desc="studies"):
        result = run(data, method, seed, options.outer_steps)
        done.append(result)
        tuned, fresh = (
            statistics.mean(f["loss"] for f in result[which]) for which in ("tuned", "fresh")
        )
        tqdm.write(
            f"{method:14s} {seed}: validation loss {tuned:.4f}, fresh {fresh:.4f}, "
            f"{result['seconds']:.0f} s"
        )
        if options.raw:
            with options.raw.open("a") as file:
                file.write(json.dumps(result) + "\n")
    text = table(done, options.outer_steps)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "schedules.md").write_text(text)
    figure(done, RESULTS / "schedules.png")


if __name__ == "__main__":
    main()

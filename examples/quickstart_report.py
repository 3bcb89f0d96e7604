"""What ``quickstart.py`` shows at its end: a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import optuna
from optuna.trial import TrialState
from torch import Tensor

import optuna_hypergrad as ohg

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, RED, GRAY, INK = "#1f6feb", "#d1495b", "#b8bec8", "#24292f"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def print_table(studies: Sequence[optuna.Study]) -> None:
    print(
        f"\n{'':17}{'tuned':>8}{'validation loss':>18}{'test accuracy':>16}{'AUROC of weights':>19}"
    )
    for study in studies:
        best, notes = study.best_trial, study.best_trial.user_attrs
        print(
            f"{study.study_name:17}{notes['num_tuned']:>8,}{best.value:>18.4f}"
            f"{notes['test_accuracy']:>16.1%}{notes['auroc']:>19.3f}"
        )
    print("Best trial by validation loss, retrained from scratch. No search has seen the test set.")


def draw(ours: optuna.Study, baseline: optuna.Study, clean: Tensor, path: Path) -> None:
    weights = ohg.load_tensors(ours, "bilevel")["bilevel"]["sample_weight"].numpy()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        _draw_losses(left, ours, baseline)
        _draw_weights(right, weights, clean.numpy(), ours.best_trial.user_attrs["auroc"])
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _draw_losses(axes: plt.Axes, ours: optuna.Study, baseline: optuna.Study) -> None:
    best, others = ours.best_trial, "other trials"
    for trial in ours.get_trials(states=[TrialState.COMPLETE]):
        steps, losses = zip(*sorted(trial.intermediate_values.items()), strict=True)
        if trial.number == best.number:
            axes.plot(steps, losses, color=BLUE, lw=2.4, zorder=3, label="best trial, as it trains")
        else:
            axes.plot(steps, losses, color=GRAY, lw=1, label=others)
            others = None
    axes.plot(steps[-1], best.value, "o", ms=8, c=BLUE, mec="white", clip_on=False, zorder=4)
    axes.annotate(
        "retrained\nfrom scratch",
        (steps[-1], best.value),
        (-8, 18),
        textcoords="offset points",
        ha="right",
        color=BLUE,
        arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.8},
    )
    axes.axhline(baseline.best_value, color=RED, lw=1.8, ls=(0, (5, 3)))
    label = "uniform weights and one decay, best trial"
    axes.annotate(
        label,
        (1, baseline.best_value),
        (0, 5),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        color=RED,
    )
    axes.set(yscale="log", xlim=(0, steps[-1]), xlabel="outer step", ylabel="validation loss")
    axes.set_title("Hypergradients at work")
    axes.legend(loc="lower left")


def _draw_weights(axes: plt.Axes, weights: np.ndarray, clean: np.ndarray, auroc: float) -> None:
    groups = [weights[clean], weights[~clean]]
    labels = [f"{clean.sum()} clean samples", f"{(~clean).sum()} corrupted samples"]
    axes.hist(groups, np.linspace(0, 1, 16), color=[BLUE, RED], label=labels, rwidth=0.9)
    axes.set(yscale="log", xlim=(0, 1), xlabel="learned weight of a sample", ylabel="samples")
    axes.set_title(f"Which labels are wrong? (AUROC {auroc:.3f})")
    axes.legend(loc="upper center")

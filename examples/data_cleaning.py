"""Which of 1,000 labels are wrong? A weight for each digit, learned while the classifier learns.

Four labels in ten are drawn at random. MA-SOBA moves the classifier, the solution of the linear system and the weights by
one step each, on batches, towards a low loss on 200 digits with clean labels. Nobody tells it which labels are wrong.
"""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params, Batch = dict[str, Tensor], tuple[Tensor, Tensor, Tensor]


def load_data() -> tuple[list[Batch], Tensor]:
    """Training, clean and test digits (pixels, labels, numbers), and which training labels are wrong."""
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    rng = torch.Generator().manual_seed(0)
    parts = torch.randperm(len(y), generator=rng).split([1000, 200, 597])
    train, clean, test = ((x[i].float() / 16, y[i], torch.arange(len(i))) for i in parts)
    drawn = torch.randint(10, (1000,), generator=rng)
    labels = torch.where(torch.rand(1000, generator=rng) < 0.4, drawn, train[1])
    return [(train[0], labels, train[2]), clean, test], labels != train[1]


def batch(part: Batch, size: int, seed: int, step: int) -> Batch:
    rng = torch.Generator().manual_seed(seed + 2 * step)
    chosen = torch.randint(len(part[1]), (size,), generator=rng)
    return part[0][chosen], part[1][chosen], part[2][chosen]


def clean_loss(w: Params, lam: Params, batch: Batch) -> Tensor:
    return cross_entropy(batch[0] @ w["w"], batch[1])


def weighted_loss(w: Params, lam: Params, batch: Batch) -> Tensor:
    each = cross_entropy(batch[0] @ w["w"], batch[1], reduction="none")
    return (lam["weight"][batch[2]].sigmoid() * each).mean() + 1e-3 * w["w"].square().sum()


def main(num_steps: int = 2000) -> float:
    torch.set_num_threads(1)  # the tensors are small
    (train, clean, test), wrong = load_data()
    draws = functools.partial(batch, train, 256, 0), functools.partial(batch, clean, 100, 1)
    w0, equal = {"w": torch.zeros(64, 10)}, {"weight": torch.zeros(1000)}
    found = ohg.minimize_bilevel(
        ohg.BilevelProblem(weighted_loss, clean_loss, *draws),
        w0,
        equal,
        inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        estimator=ohg.MASOBA(theta=0.1),
        optimizer=functools.partial(torch.optim.Adam, lr=0.02),
        num_steps=num_steps,
        progress=True,
    ).outer_params
    whole = ohg.BilevelProblem(weighted_loss, clean_loss, lambda _: train)
    for label, lam in ("equal weights", equal), ("the weights found", found):
        w = ohg.inner_solve(whole, ohg.LBFGS(max_steps=300), w0, lam).inner_params["w"]
        right = (test[0] @ w).argmax(1) == test[1]
        print(f"trained to the end with {label}: {right.float().mean():.1%} of new digits")
    weight = found["weight"].sigmoid()
    means = weight[~wrong].mean(), weight[wrong].mean()
    print(f"weights of right labels {means[0]:.2f}, of wrong ones {means[1]:.2f}, on average")
    auroc = float(roc_auc_score((~wrong).numpy(), weight.numpy()))
    print(f"AUROC of the weights: {auroc:.3f}")
    return 1.0 - auroc


if __name__ == "__main__":
    main()

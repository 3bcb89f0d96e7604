"""Six sources to pre-train on, three of them mislabeled: their weights by the loss after fine-tuning.

The hypergradient goes back through ten steps of fine-tuning on thirty images, and then through the solution of
pre-training (Raghu et al. 2021).
"""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
NUM_SOURCES, SIZE, MISLABELED = 6, 100, (1, 3, 4)


def main(num_steps: int = 40) -> float:
    torch.set_num_threads(1)  # the tensors are small
    rng = torch.Generator().manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=rng)
    x, y = x[order].float() / 16, y[order]
    ends = torch.tensor([NUM_SOURCES * SIZE, 30, 300]).cumsum(0).tolist()
    (sources, tune, validation, test) = zip(x.tensor_split(ends), y.tensor_split(ends), strict=True)
    labels = sources[1].clone().view(NUM_SOURCES, SIZE)
    for k in MISLABELED:
        labels[k] = torch.randint(10, (SIZE,), generator=rng)

    def pretraining_loss(w: Params, lam: Params, batch: None) -> Tensor:
        each = cross_entropy(sources[0] @ w["w"], labels.flatten(), reduction="none")
        weights = NUM_SOURCES * lam["source"].softmax(0)
        return (weights * each.view(NUM_SOURCES, SIZE).mean(1)).mean() + 1e-3 * (w["w"] ** 2).sum()

    def loss_on(data: tuple[Tensor, Tensor]) -> ohg.Objective:
        return lambda w, lam, batch: cross_entropy(data[0] @ w["w"], data[1])

    tuning = ohg.FineTuning(loss_on(tune), ohg.GradientDescent(0.2, max_steps=10))
    problem = ohg.two_stage(pretraining_loss, loss_on(validation), tuning)

    def accuracy(source: Tensor) -> float:
        w0, lam = {"w": torch.zeros(64, 10)}, {"source": source}
        w = tuning(ohg.solve(pretraining_loss, w0, lam), lam)["w"]
        return float(((test[0] @ w).argmax(1) == test[1]).float().mean())

    equal = torch.zeros(NUM_SOURCES)
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.zeros(64, 10)},
        {"source": equal},
        inner_solver=ohg.NewtonCG(),
        optimizer=functools.partial(torch.optim.Adam, lr=0.2),
        num_steps=num_steps,
        progress=True,
    )
    source = found.outer_params["source"]
    for k, weight in enumerate((NUM_SOURCES * source.softmax(0)).tolist()):
        print(f"source {k}: weight {weight:.2f}{', mislabeled' if k in MISLABELED else ''}")
    print(f"test accuracy, fine-tuned: {accuracy(equal):.1%} before, {accuracy(source):.1%} now")
    return found.outer_value


if __name__ == "__main__":
    main()

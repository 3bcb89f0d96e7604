"""Ten images that stand for 1,000: one digit per class, learned through the training run.

The hyperparameters are pixels. Each trial trains a small network on the ten images from scratch,
and ``Unroll`` differentiates its loss on real digits through all of the training steps.
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg

Params = dict[str, Tensor]


def network(w: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["first"]) @ w["last"]


def fresh(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    sizes = {"first": (64, 32), "last": (32, 10)}
    return {k: torch.randn(n, m, generator=rng) / n**0.5 for k, (n, m) in sizes.items()}


def main(num_trials: int = 40, storage: str | None = None) -> float:
    torch.set_num_threads(1)  # the tensors are small
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x, classes = x.float() / 16, torch.arange(10)
    real, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    start = torch.stack([x[y == c][0] for c in classes])  # a real one of each
    solver = ohg.HeavyBall(step_size=0.3, momentum=0.9, max_steps=30)

    def training_loss(w: Params, lam: Params, batch: None) -> Tensor:
        return cross_entropy(network(w, lam["images"]), classes)

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        lam = {"images": trial.suggest_tensor("images", start.shape, 0.0, 1.0, init=start)}
        losses = []
        for seed in range(4):  # several networks, so that the images suit any
            w = ohg.solve(training_loss, fresh(seed), lam, solver=solver, estimator=ohg.Unroll())
            losses.append(cross_entropy(network(w, real[0]), real[1]))
        return sum(losses) / len(losses)

    def accuracy(images: Tensor) -> float:
        """On digits that the search never sees, of networks that it has not seen either."""
        problem, num_right = ohg.BilevelProblem(training_loss, training_loss), 0
        for seed in range(100, 110):
            w = ohg.inner_solve(problem, solver, fresh(seed), {"images": images}).inner_params
            num_right += int((network(w, test[0]).argmax(1) == test[1]).sum())
        return num_right / (10 * len(test[1]))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)

    images = ohg.load_tensors(study)["images"]
    print(f"loss on real digits: {study.trials[0].value:.3f} before, {study.best_value:.3f} now")
    print(f"test accuracy: {accuracy(start):.1%} with ten real images, {accuracy(images):.1%} now")
    try:
        from matplotlib.image import imsave
    except ImportError:
        print("No picture: it takes matplotlib.")
        return study.best_value
    sheet = torch.stack([start, images]).view(2, 10, 8, 8).transpose(1, 2).reshape(16, 80)
    imsave("condensed_digits.png", sheet.kron(torch.ones(8, 8)), cmap="gray")
    print("condensed_digits.png: the real ones above, the learned ones below")
    return study.best_value


if __name__ == "__main__":
    main()

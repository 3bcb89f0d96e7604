"""Ten digits that stand for a thousand, through kernel ridge regression: nothing is trained at all.

The hyperparameters are pixels, the targets that belong to them, and a length scale for each pixel. A trial is
one linear system of size ten; its loss on real digits is differentiated exactly ("kernel inducing points").
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.closed_form import kernel_inducing_points, rbf_kernel

PENALTY = 1e-3  # of the mean diagonal entry of the kernel


def predict(support: dict[str, Tensor], x: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return rbf_kernel(a, b, length_scale=support["length_scale"])

    return kernel_inducing_points(kernel, support["images"], support["targets"], x, PENALTY)


def accuracy(support: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    return float((predict(support, x).argmax(1) == y).double().mean())


def main(num_trials: int = 150, storage: str | None = None) -> float:
    torch.set_num_threads(1)  # the tensors are small
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x, real, test = x / 16, slice(0, 1000), slice(1000, None)
    goal = torch.eye(10, dtype=x.dtype)[y] - 0.1  # a mean of zero, as in the paper
    first = torch.stack([(y == c).nonzero()[0, 0] for c in range(10)])  # a real one of each
    start = {
        "images": x[first],
        "targets": goal[first],
        "length_scale": torch.full((64,), 2.0, dtype=x.dtype),
    }

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        bounds = {"images": (0.0, 1.0), "targets": (-2.0, 2.0), "length_scale": (0.1, 100.0)}
        support = {
            k: trial.suggest_tensor(k, v.shape, *bounds[k], log=k == "length_scale", init=v)
            for k, v in start.items()
        }
        return 0.5 * (predict(support, x[real]) - goal[real]).square().sum(1).mean()

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, show_progress_bar=True)

    learned = ohg.load_tensors(study)
    print(f"loss on real digits: {study.trials[0].value:.3f} before, {study.best_value:.3f} now")
    before, now = (accuracy(s, x[test], y[test]) for s in (start, learned))
    print(f"test accuracy: {before:.1%} with ten real images, {now:.1%} with ten learned ones")
    try:
        from matplotlib.image import imsave
    except ImportError:
        print("No picture: it takes matplotlib.")
        return study.best_value
    sheet = torch.stack([start["images"], learned["images"]]).view(2, 10, 8, 8)
    sheet = torch.nn.functional.pad(sheet, (1, 1, 1, 1), value=0.5).transpose(1, 2).reshape(20, 100)
    imsave("kernel_distillation.png", sheet.kron(torch.ones(8, 8)), cmap="gray")
    print("kernel_distillation.png: the real ones above, the learned ones below")
    return study.best_value


if __name__ == "__main__":
    main()

"""What should a language model be trained on? The weights of three sources of text, learned while it is trained by BROS.

A small transformer reads characters of scikit-learn's descriptions of data sets, of its docstrings, and of descriptions in
which every other character is a random one. What counts is its loss on descriptions that it has not read. BROS moves its
weights, and the solution of the linear system, in random subspaces of a quarter of the rows.
"""

from __future__ import annotations

import functools

import sklearn.datasets
import sklearn.linear_model
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, one_hot

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
LENGTH, D = 32, 48


def texts() -> tuple[Tensor, Tensor]:
    """Characters below 128: of the sources ``(3, n)``, and of descriptions held out."""
    sets = ("iris", "digits", "wine", "breast_cancer", "diabetes", "linnerud")
    told = "".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in sets)
    models = (getattr(sklearn.linear_model, n) for n in sklearn.linear_model.__all__)
    written = "".join(model.__doc__ or "" for model in models)
    a, b = (torch.tensor(list(t.encode("ascii", "replace"))) for t in (told, written))
    held_out, n = a[-3000:], len(a) - 3000
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(32, 127, (n,), generator=rng)
    corrupted = torch.where(torch.rand(n, generator=rng) < 0.5, noise, a[:n])
    return torch.stack([a[:n], b[:n], corrupted]), held_out


def passages(text: Tensor, size: int, salt: int, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(salt + 2 * step)
    starts = torch.randint(text.shape[-1] - LENGTH, (size, 1), generator=rng)
    return text[..., starts + torch.arange(LENGTH + 1)]


def losses(w: Params, passage: Tensor) -> Tensor:
    """Of the next characters, one attention layer and one hidden layer: ``(...,)`` means over passages."""
    x = one_hot(passage[..., :-1], 128).to(w["embed"]) @ w["embed"] + w["place"]
    q, k, v = (layer_norm(x, (D,)) @ w["attend"]).chunk(3, dim=-1)
    scores = q @ k.mT / D**0.5 - 1e9 * torch.ones(LENGTH, LENGTH).triu(1)
    x = x + scores.softmax(-1) @ v
    x = x + torch.tanh(layer_norm(x, (D,)) @ w["hidden"]) @ w["out"]
    read = (layer_norm(x, (D,)) @ w["read"]).flatten(0, -2)
    each = cross_entropy(read, passage[..., 1:].flatten(), reduction="none")
    return each.reshape(*passage.shape[:-2], -1).mean(-1)


def main(num_steps: int = 500) -> float:
    sources, held_out = texts()
    rng = torch.Generator().manual_seed(1)
    shapes = {"embed": (128, D), "place": (LENGTH, D), "attend": (D, 3 * D)}
    shapes |= {"hidden": (D, 4 * D), "out": (4 * D, D), "read": (D, 128)}
    w0 = {k: torch.randn(s, generator=rng) / s[0] ** 0.5 for k, s in shapes.items()}
    problem = ohg.BilevelProblem(
        lambda w, lam, passage: lam["mixture"].softmax(0) @ losses(w, passage),
        lambda w, _, passage: losses(w, passage),
        functools.partial(passages, sources, 12, 0),
        functools.partial(passages, held_out, 32, 1),
    )
    found = ohg.minimize_bilevel(
        problem, w0, {"mixture": torch.zeros(3)}, inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        estimator=ohg.BROS(step_size=0.1, damping=0.1), num_steps=num_steps,
        optimizer=functools.partial(torch.optim.Adam, lr=0.02), progress=True,
    )  # fmt: skip
    a, b, c = found.outer_params["mixture"].softmax(0).tolist()
    print(f"after {num_steps} steps of 39,168 weights: loss {found.outer_value:.2f} on new text")
    print(f"descriptions {a:.0%}, docstrings {b:.0%}, corrupted descriptions {c:.0%}")
    return c


if __name__ == "__main__":
    main()

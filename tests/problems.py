"""Bilevel problems that own their exact hypergradient. All in float64.

Each builds a ``Case``: a problem, a start, and ``truth(lam)`` by a route that shares nothing with the
estimators under test (closed forms, Woodbury, finite differences with the inner problem solved again).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import optuna_hypergrad as ohg

F64 = torch.float64
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    problem: ohg.BilevelProblem
    inner_params: Params
    outer_params: Params
    truth: Callable[[Params], Params]
    solution: Callable[[Params], Params] | None = None
    step_size: float = 0.1
    properties: frozenset[str] = field(default_factory=frozenset)


def randn(*shape: int, seed: int) -> Tensor:
    """The same numbers on every device; on torch's default one."""
    rng = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=F64, device="cpu").to(
        torch.get_default_device()
    )


def relative_error(found: Params, exact: Params) -> float:
    assert found.keys() == exact.keys()
    squares = [((found[k] - exact[k]).norm() ** 2, exact[k].norm() ** 2) for k in exact]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt())


def ridge(n: int = 60, p: int = 12, seed: int = 0) -> Case:
    """GT1: ridge with one log-decay per weight, and a direct term."""
    x, xv = randn(n, p, seed=seed), randn(n, p, seed=seed + 1)
    w_true = randn(p, seed=seed + 2)
    y = x @ w_true + 0.5 * randn(n, seed=seed + 3)
    yv = xv @ w_true + 0.5 * randn(n, seed=seed + 4)

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        return (
            0.5 * ((x @ w["w"] - y) ** 2).mean()
            + 0.5 * (lam["log_decay"].exp() * w["w"] ** 2).sum()
        )

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return 0.5 * ((xv @ w["w"] - yv) ** 2).mean() + 0.01 * (lam["log_decay"] ** 2).sum()

    def matrix(lam: Params) -> Tensor:
        return x.T @ x / n + torch.diag(lam["log_decay"].exp())

    def solution(lam: Params) -> Params:
        return {"w": torch.linalg.solve(matrix(lam), x.T @ y / n)}

    def truth(lam: Params) -> Params:
        w = solution(lam)["w"]
        v = torch.linalg.solve(matrix(lam), xv.T @ (xv @ w - yv) / n)
        return {"log_decay": 0.02 * lam["log_decay"] - lam["log_decay"].exp() * w * v}

    lam = {"log_decay": -1.0 + 0.5 * randn(p, seed=seed + 5)}
    return Case(
        "ridge",
        ohg.BilevelProblem(inner, outer),
        {"w": torch.zeros(p, dtype=F64)},
        lam,
        truth,
        solution,
        step_size=0.3,
        properties=frozenset({"spd", "linear_model"}),
    )


def quadratic(p: int = 10, q: int = 6, seed: int = 20) -> Case:
    """GT3: quadratic in both levels, several tensors, a 0-d one among them."""
    root = randn(p, p, seed=seed)
    h = root @ root.T / p + 0.5 * torch.eye(p, dtype=F64)
    b = randn(p, q + 1, seed=seed + 1)
    c, t = randn(p, seed=seed + 2), randn(p, seed=seed + 3)

    def flat(lam: Params) -> Tensor:
        return torch.cat([lam["vector"].reshape(-1), lam["number"].reshape(1)])

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        u = torch.cat([w["a"].reshape(-1), w["b"]])
        return 0.5 * u @ h @ u - u @ (b @ flat(lam) + c)

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        u = torch.cat([w["a"].reshape(-1), w["b"]])
        return 0.5 * ((u - t) ** 2).sum() + 0.05 * (flat(lam) ** 2).sum()

    def solution(lam: Params) -> Params:
        u = torch.linalg.solve(h, b @ flat(lam) + c)
        return {"a": u[:4].reshape(2, 2), "b": u[4:]}

    def truth(lam: Params) -> Params:
        u = torch.linalg.solve(h, b @ flat(lam) + c)
        total = b.T @ torch.linalg.solve(h, u - t) + 0.1 * flat(lam)
        return {"vector": total[:q].reshape(2, 3), "number": total[q]}

    lam = {"vector": randn(2, 3, seed=seed + 4), "number": randn(1, seed=seed + 5)[0]}
    return Case(
        "quadratic",
        ohg.BilevelProblem(inner, outer),
        {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros(p - 4, dtype=F64)},
        lam,
        truth,
        solution,
        step_size=0.25,
        properties=frozenset({"spd", "linear_model"}),
    )


def logistic(n: int = 24, p: int = 6, classes: int = 3, seed: int = 40) -> Case:
    """Multinomial logistic regression: a decay per feature, a weight per sample. Truth by differences."""
    x, xv = randn(n, p, seed=seed), randn(n, p, seed=seed + 1)
    w_true = randn(p, classes, seed=seed + 2)
    y = (x @ w_true + randn(n, classes, seed=seed + 3)).argmax(1)
    yv = (xv @ w_true + randn(n, classes, seed=seed + 4)).argmax(1)
    loss = torch.nn.functional.cross_entropy

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        each = loss(x @ w["w"], y, reduction="none")
        decay = 0.5 * (lam["log_decay"].exp()[:, None] * w["w"] ** 2).sum()
        return (lam["weight"].sigmoid() * each).mean() + decay

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return loss(xv @ w["w"], yv)

    lam = {"log_decay": -2.0 + 0.3 * randn(p, seed=seed + 5), "weight": randn(n, seed=seed + 6)}
    w0 = {"w": torch.zeros(p, classes, dtype=F64)}
    return Case(
        "logistic",
        ohg.BilevelProblem(inner, outer),
        w0,
        lam,
        lambda at: finite_differences(inner, outer, w0, at),
        step_size=0.5,
        properties=frozenset({"spd", "linear_model"}),
    )


def network(seed: int = 60) -> Case:
    """A tanh network with a decay per layer and a shift of the targets: non-convex. Truth by differences."""
    n = 40
    x, xv = randn(n, 3, seed=seed), randn(n, 3, seed=seed + 1)
    y, yv = torch.sin(x.sum(1)), torch.sin(xv.sum(1))

    def predict(w: Params, at: Tensor) -> Tensor:
        return (at @ w["hidden"] + w["bias"]).tanh() @ w["head"]

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        decay = (lam["log_decay"].exp() * torch.stack([(v**2).sum() for v in w.values()])).sum()
        return ((predict(w, x) - y - lam["shift"]) ** 2).mean() + decay

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return ((predict(w, xv) - yv) ** 2).mean()

    w0 = {
        "hidden": 0.7 * randn(3, 4, seed=seed + 2),
        "bias": 0.1 * randn(4, seed=seed + 3),
        "head": 0.7 * randn(4, seed=seed + 4),
    }
    lam = {
        "log_decay": torch.tensor([-3.0, -3.5, -3.0], dtype=F64),
        "shift": torch.tensor(0.1, dtype=F64),
    }
    start = ohg.inner_solve(
        ohg.BilevelProblem(inner, outer), ohg.LBFGS(max_steps=3000), w0, lam
    ).inner_params
    return Case(
        "network",
        ohg.BilevelProblem(inner, outer),
        start,
        lam,
        lambda at: finite_differences(inner, outer, start, at),
        step_size=0.05,
        properties=frozenset(),
    )


def momentum_descent(num_steps: int = 12, seed: int = 80) -> Case:
    """GT7: the learning rate and momentum of an unfinished descent, and a decay. Truth by differences."""
    p = 5
    root = randn(p, p, seed=seed)
    h = root @ root.T / p + 0.2 * torch.eye(p, dtype=F64)
    c, t = randn(p, seed=seed + 1), randn(p, seed=seed + 2)

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        u = w["w"]
        return 0.5 * u @ h @ u - u @ c + 0.1 * (u**4).sum() + lam["decay"] * (u**2).sum()

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return 0.5 * ((w["w"] - t) ** 2).sum()

    def descend(lam: Params) -> Tensor:
        w, v = torch.zeros(p, dtype=F64), torch.zeros(p, dtype=F64)
        for _ in range(num_steps):
            gradient = h @ w - c + 0.4 * w**3 + 2 * lam["decay"] * w
            v = lam["momentum"] * v + gradient
            w = w - lam["lr"] * v
        return 0.5 * ((w - t) ** 2).sum()

    lam = {
        "lr": torch.tensor(0.15, dtype=F64),
        "momentum": torch.tensor(0.6, dtype=F64),
        "decay": torch.tensor(0.05, dtype=F64),
    }
    return Case(
        "momentum_descent",
        ohg.BilevelProblem(inner, outer),
        {"w": torch.zeros(p, dtype=F64)},
        lam,
        lambda at: differences(descend, at, h=2e-4),
        properties=frozenset({"solver_hyperparameters"}),
    )


def isotropic(p: int = 8, q: int = 5, seed: int = 100) -> Case:
    """A Hessian of 4 I, for methods that put a multiple of the identity in its place; a direct term."""
    b, t = randn(p, q, seed=seed), randn(p, seed=seed + 1)

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        return 2.0 * ((w["w"] - b @ lam["x"].sin()) ** 2).sum()

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return 0.25 * ((w["w"] - t) ** 4).sum() + 0.1 * (lam["x"] ** 2).sum()

    def truth(lam: Params) -> Params:
        slope = (b @ lam["x"].sin() - t) ** 3
        return {"x": lam["x"].cos() * (b.T @ slope) + 0.2 * lam["x"]}

    return Case(
        "isotropic",
        ohg.BilevelProblem(inner, outer),
        {"w": torch.zeros(p, dtype=F64)},
        {"x": randn(q, seed=seed + 2)},
        truth,
        lambda lam: {"w": b @ lam["x"].sin()},
        step_size=0.25,
        properties=frozenset({"spd", "linear_model"}),
    )


def finite_differences(inner: object, outer: object, w0: Params, lam: Params) -> Params:
    """Central differences (Richardson-extrapolated) of ``f(w*(lam), lam)``, the inner problem solved again."""

    def value(at: Params) -> Tensor:
        return outer(newton(inner, w0, at), at, None)  # type: ignore[operator]

    return differences(value, lam)


def differences(value: Callable[[Params], Tensor], lam: Params, h: float = 1e-3) -> Params:
    """Fourth-order central differences, entry by entry."""
    found = {}
    for k, v in lam.items():
        slope = torch.zeros(v.numel(), dtype=F64)
        for i in range(v.numel()):
            unit = torch.zeros(v.numel(), dtype=F64)
            unit[i] = 1.0
            unit = unit.reshape(v.shape)

            def at(scale: float, k: str = k, v: Tensor = v, unit: Tensor = unit) -> Tensor:
                return value({**lam, k: v + scale * unit})

            slope[i] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found[k] = slope.reshape(v.shape)
    return found


def newton(inner: object, w0: Params, lam: Params, steps: int = 50) -> Params:
    """Damped-free Newton from ``w0`` with dense Hessians: the independent inner solver."""
    shapes = {k: v.shape for k, v in w0.items()}
    u = torch.cat([v.reshape(-1) for v in w0.values()])

    def unflatten(u: Tensor) -> Params:
        parts = torch.split(u, [s.numel() for s in shapes.values()])
        return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}

    def g(u: Tensor) -> Tensor:
        return inner(unflatten(u), lam, None)  # type: ignore[operator]

    for _ in range(steps):
        gradient = torch.func.grad(g)(u)
        if gradient.norm() < 1e-12:
            break
        step = torch.linalg.solve(torch.func.hessian(g)(u), gradient)
        if step.norm() < 1e-14 * (1 + u.norm()):
            break
        u = u - step
    return unflatten(u)


def episodes(num_tasks: int = 3, n: int = 8, p: int = 5, seed: int = 120) -> Case:
    """GT4: linear-regression tasks pulled to a shared start by a learned strength."""
    tasks = []
    for i in range(num_tasks):
        x, xq = randn(n, p, seed=seed + 10 * i), randn(n, p, seed=seed + 10 * i + 1)
        w = randn(p, seed=seed + 10 * i + 2)
        y, yq = (a @ w + 0.3 * randn(n, seed=seed + 10 * i + 3 + k) for k, a in enumerate((x, xq)))
        tasks.append(((x, y), (xq, yq)))

    def loss(w: Params, lam: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return 0.5 * ((x @ w["slope"] + w["offset"] - y) ** 2).mean()

    def flat(lam: Params) -> Tensor:
        return torch.cat([lam["theta.slope"], lam["theta.offset"].reshape(1)])

    def with_ones(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)

    def truth(lam: Params) -> Params:
        """``d_theta = mean_i (I + H_i / s)^-1 b_i``, ``d_s = -mean_i (w_i - theta)^T (I + H_i / s)^-1 b_i / s``."""
        theta, s = flat(lam), lam["strength"]
        by_theta, by_strength = torch.zeros_like(theta), torch.zeros_like(s)
        for (x, y), (xq, yq) in tasks:
            a, aq = with_ones(x), with_ones(xq)
            h = a.T @ a / n
            w = torch.linalg.solve(h + s * torch.eye(p + 1, dtype=F64), a.T @ y / n + s * theta)
            b = aq.T @ (aq @ w - yq) / n
            v = torch.linalg.solve(torch.eye(p + 1, dtype=F64) + h / s, b)
            by_theta = by_theta + v / num_tasks
            by_strength = by_strength - (w - theta) @ v / s / num_tasks
        return {"theta.slope": by_theta[:p], "theta.offset": by_theta[p], "strength": by_strength}

    problem = ohg.Episodes(
        ohg.proximal(loss, "strength", "theta."), loss, lambda step: tasks, "theta."
    )
    lam = {
        "theta.slope": randn(p, seed=seed + 100),
        "theta.offset": torch.tensor(0.3, dtype=F64),
        "strength": torch.tensor(0.7, dtype=F64),
    }
    return Case("episodes", problem, problem.start(lam), lam, truth, step_size=0.25)


def two_stage(p: int = 6, seed: int = 160) -> Case:
    """GT6: quadratic pre-training, four steps of fine-tuning, hyperparameters in both. Truth by differences."""
    roots = [randn(p, p, seed=seed + i) for i in range(2)]
    h_pre, h_fine = (r @ r.T / p + 0.5 * torch.eye(p, dtype=F64) for r in roots)
    b, c, d, t = randn(p, 4, seed=seed + 2), *(randn(p, seed=seed + 3 + i) for i in range(3))
    step, num_steps = 0.15, 4

    def pretraining(w: Params, lam: Params, batch: object) -> Tensor:
        u = w["w"]
        return 0.5 * u @ h_pre @ u - u @ (b @ lam["mix"] + c) + 0.5 * lam["decay"] * u @ u

    def fine(w: Params, lam: Params, batch: object) -> Tensor:
        u = w["w"]
        return (
            0.5 * u @ h_fine @ u
            - u @ d
            + 0.5 * lam["decay"] * u @ u
            + 0.1 * lam["mix"].sum() * u[0]
        )

    def outer(w: Params, lam: Params, batch: object) -> Tensor:
        return 0.5 * ((w["w"] - t) ** 2).sum()

    def value(lam: Params) -> Tensor:
        eye = torch.eye(p, dtype=F64)
        w = torch.linalg.solve(h_pre + lam["decay"] * eye, b @ lam["mix"] + c)
        for _ in range(num_steps):
            shift = 0.1 * lam["mix"].sum() * eye[0]
            w = w - step * (h_fine @ w - d + lam["decay"] * w + shift)
        return 0.5 * ((w - t) ** 2).sum()

    problem = ohg.two_stage(
        pretraining,
        outer,
        ohg.FineTuning(fine, ohg.GradientDescent(step, max_steps=num_steps)),
    )
    lam = {"mix": randn(4, seed=seed + 6), "decay": torch.tensor(0.3, dtype=F64)}
    return Case(
        "two_stage",
        problem,
        {"w": torch.zeros(p, dtype=F64)},
        lam,
        lambda at: differences(value, at),
        step_size=0.2,
    )

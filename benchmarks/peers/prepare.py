"""Writes a task's arrays: data, an inner (near-)optimum, and the K-step hypergradients in float64."""

from __future__ import annotations

import argparse
import gzip
import math
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch_task import MOMENTUM, Batch, Objective, Params, objectives, unrolled

PRODUCTS = {"softmax": 20, "mlp": 10, "convnet": 10}
DECAY = {"softmax": 1e-4, "mlp": 1e-3, "convnet": 1e-3}
STEPS = 500
"""Adam steps of one round; there are as many rounds as the Hessian needs to be positive definite."""
MOST_ROUNDS = 5
STEP_SIZE = 0.05
LEAST_CURVATURE = 1e-3
"""Of every CG direction, relative to the largest eigenvalue: float32 then sees the same signs."""


class IndefiniteError(RuntimeError):
    """CG in float64 met a direction of too little curvature: the inner problem is not solved enough."""


def prepare(name: str, path: Path, data: Path | None) -> None:
    """Make the task ``name`` and write it to ``path`` (.npz)."""
    torch.manual_seed(0)
    inner, outer = objectives(name)
    train, valid = _batches(name, data)
    # What is differentiated are the float32 arrays that the peers get.
    train, valid = (train[0].float().double(), train[1]), (valid[0].float().double(), valid[1])
    w = _initial(name)
    lam = {k: torch.full_like(v, math.log(DECAY[name])).float().double() for k, v in w.items()}
    for rounds in range(1, MOST_ROUNDS + 1):
        w = _newton(inner, w, lam, train) if name == "softmax" else _adam(inner, w, lam, train)
        w = {k: v.detach().float().double() for k, v in w.items()}
        try:
            cg, neumann, alpha = _references(inner, outer, w, lam, train, valid, PRODUCTS[name])
            break
        except IndefiniteError:
            if rounds == MOST_ROUNDS:
                raise
    stored = {
        "products": PRODUCTS[name],
        "alpha": alpha,
        "x_train": train[0].float(),
        "y_train": train[1],
        "x_valid": valid[0].float(),
        "y_valid": valid[1],
        **{f"w/{k}": v.float() for k, v in w.items()},
        **{f"lam/{k}": v.float() for k, v in lam.items()},
        **{f"cg/{k}": v for k, v in cg.items()},
        **{f"neumann/{k}": v for k, v in neumann.items()},
    }
    np.savez(path, **{k: np.asarray(torch.as_tensor(v).detach()) for k, v in stored.items()})


def prepare_unrolling(name: str, path: Path, data: Path | None, num_steps: int) -> None:
    """The task ``name`` from a random initialization, and its hypergradients through ``num_steps`` steps."""
    torch.manual_seed(0)
    inner, outer = objectives(name)
    train, valid = _batches(name, data)
    train, valid = (train[0].float().double(), train[1]), (valid[0].float().double(), valid[1])
    w = {k: v.float().double() for k, v in _initial(name).items()}
    lam = {k: torch.full_like(v, math.log(DECAY[name])).float().double() for k, v in w.items()}
    stored = {
        "products": num_steps,
        "alpha": STEP_SIZE,
        "x_train": train[0].float(),
        "y_train": train[1],
        "x_valid": valid[0].float(),
        "y_valid": valid[1],
        **{f"w/{k}": v.float() for k, v in w.items()},
        **{f"lam/{k}": v.float() for k, v in lam.items()},
    }
    for solver, momentum in (("descent", 0.0), ("momentum", MOMENTUM)):
        by = {k: v.clone().requires_grad_(True) for k, v in lam.items()}
        end = unrolled(inner, w, by, train, num_steps, STEP_SIZE, momentum)
        found = torch.autograd.grad(outer(end, by, valid), tuple(by.values()))
        stored |= {f"{solver}/{k}": v for k, v in zip(by, found, strict=True)}
    np.savez(path, **{k: np.asarray(torch.as_tensor(v).detach()) for k, v in stored.items()})


def _batches(name: str, data: Path | None) -> tuple[Batch, Batch]:
    if name == "softmax":
        x, y = _digits()
        return (x[:300], y[:300]), (x[300:1000], y[300:1000])
    x, y = _images(data)
    size = 512 if name == "mlp" else 128
    x = x.flatten(1) if name == "mlp" else x
    return (x[:size], y[:size]), (x[size : 2 * size], y[size : 2 * size])


def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16.0)[order], torch.tensor(y)[order]


def _images(data: Path | None) -> tuple[Tensor, Tensor]:
    """``(n, 1, 28, 28)``: MNIST where ``data`` holds it, else digits enlarged (the cost is the same)."""
    if data is None:
        x, y = _digits()
        return interpolate(x.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear"), y
    pixels = np.frombuffer(
        gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    labels = np.frombuffer(
        gzip.decompress((data / "train-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
    )
    return torch.tensor(pixels.reshape(-1, 1, 28, 28)[:2000] / 255.0), torch.tensor(
        labels[:2000].astype(np.int64)
    )


def _initial(name: str) -> Params:
    shapes = {
        "softmax": {"weight": (64, 10)},
        "mlp": {"0.weight": (512, 784), "1.weight": (512, 512), "2.weight": (10, 512)},
        "convnet": {"0.weight": (16, 1, 3, 3), "1.weight": (32, 16, 3, 3), "2.weight": (10, 1568)},
    }[name]
    if name == "softmax":
        return {"weight": torch.zeros(shapes["weight"], dtype=torch.float64)}
    w: Params = {}
    for key, shape in shapes.items():
        scale = math.sqrt(2 / math.prod(shape[1:]))
        w[key] = scale * torch.randn(shape, dtype=torch.float64)
        w[key.replace("weight", "bias")] = torch.zeros(shape[0], dtype=torch.float64)
    return w


def _newton(inner: Objective, w: Params, lam: Params, batch: Batch) -> Params:
    """Damped by halving; the objective is convex."""
    ((key, at),) = w.items()

    def value(flat: Tensor) -> Tensor:
        return inner({key: flat.view(at.shape)}, lam, batch)

    flat = at.reshape(-1)
    for _ in range(50):
        slope = torch.func.grad(value)(flat)
        if slope.norm() < 1e-13:
            break
        step = torch.linalg.solve(torch.func.hessian(value)(flat), slope)
        length = 1.0
        while value(flat - length * step) > value(flat) and length > 1e-6:
            length /= 2
        flat = flat - length * step
    return {key: flat.view(at.shape)}


def _adam(inner: Objective, w: Params, lam: Params, batch: Batch) -> Params:
    batch = batch[0].float(), batch[1]
    lam = {k: v.float() for k, v in lam.items()}
    leaves = {k: v.float().requires_grad_(True) for k, v in w.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        inner(leaves, lam, batch).backward()
        optimizer.step()
        schedule.step()
    return {k: v.detach() for k, v in leaves.items()}


def _references(
    inner: Objective,
    outer: Objective,
    w: Params,
    lam: Params,
    train: Batch,
    valid: Batch,
    products: int,
) -> tuple[Params, Params, float]:
    """Textbook loops in float64, and ``alpha = 1 / lambda_max`` by power iteration."""
    at = [v.requires_grad_(True) for v in w.values()]
    by = [v.requires_grad_(True) for v in lam.values()]
    slope = torch.autograd.grad(inner(w, lam, train), at, create_graph=True)
    b = torch.autograd.grad(outer(w, lam, valid), at)
    sizes = [v.numel() for v in at]

    def flat(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def shaped(vector: Tensor) -> list[Tensor]:
        return [p.view_as(v) for p, v in zip(vector.split(sizes), at, strict=True)]

    def product(vector: Tensor) -> Tensor:
        return flat(torch.autograd.grad(slope, at, shaped(vector), retain_graph=True))

    def hypergradient(x: Tensor) -> Params:
        cross = torch.autograd.grad(slope, by, shaped(x), retain_graph=True)
        return {k: -c for k, c in zip(lam, cross, strict=True)}

    v = flat(b)
    largest = 0.0
    for _ in range(20):
        v = product(v / v.norm())
        largest = float(v.norm())
    alpha = 1 / (1.05 * largest)

    r = flat(b)
    p, x = r.clone(), torch.zeros_like(r)
    for _ in range(products):
        hp = product(p)
        curvature = p @ hp
        if not curvature > LEAST_CURVATURE * largest * (p @ p):
            raise IndefiniteError(f"curvature {float(curvature / (p @ p)):.1e} of {largest:.1e}")
        rr, step = r @ r, (r @ r) / curvature
        x, r = x + step * p, r - step * hp
        p = r + (r @ r) / rr * p
    v = total = flat(b)
    for _ in range(products):
        v = v - alpha * product(v)
        total = total + v
    return hypergradient(x), hypergradient(alpha * total), alpha


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(PRODUCTS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--unroll", type=int, help="so many inner steps, in place of products")
    options = parser.parse_args()
    if options.unroll is None:
        prepare(options.name, options.path, options.data)
    else:
        prepare_unrolling(options.name, options.path, options.data, options.unroll)

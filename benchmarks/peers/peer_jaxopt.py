"""jaxopt 0.8 under ``jax.jit``: ``root_vjp``, with its CG or a Neumann series written for it.

Its unit is the gradient evaluation of JAX, jitted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import measure
from jax import lax
from jaxopt.implicit_diff import root_vjp
from jaxopt.linear_solve import solve_cg

Arrays = dict[str, jax.Array]


def softmax_regression(w: Arrays, x: jax.Array) -> jax.Array:
    return x @ w["weight"]


def mlp(w: Arrays, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ w["0.weight"].T + w["0.bias"])
    x = jax.nn.relu(x @ w["1.weight"].T + w["1.bias"])
    return x @ w["2.weight"].T + w["2.bias"]


def convnet(w: Arrays, x: jax.Array) -> jax.Array:
    for layer in "01":
        x = lax.conv(x, w[f"{layer}.weight"], (1, 1), "SAME") + w[f"{layer}.bias"][:, None, None]
        n, c, rows, columns = x.shape
        x = jax.nn.relu(x).reshape(n, c, rows // 2, 2, columns // 2, 2).mean((3, 5))
    return x.reshape(len(x), -1) @ w["2.weight"].T + w["2.bias"]


MODELS = {"softmax": softmax_regression, "mlp": mlp, "convnet": convnet}


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[: options.threads])  # JAX counts these, not OMP_NUM_THREADS
    if options.float64:
        jax.config.update("jax_enable_x64", True)
    model = MODELS[task.name]
    train, valid = (tuple(map(jnp.asarray, part)) for part in (task.train, task.valid))
    w, lam = ({k: jnp.asarray(v) for k, v in part.items()} for part in (task.inner, task.outer))

    def cross_entropy(w: Arrays, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(model(w, x)), y[:, None], 1).mean()

    def inner(w: Arrays, lam: Arrays, x: jax.Array, y: jax.Array) -> jax.Array:
        penalty = sum((jnp.exp(lam[k]) * (v * v)).sum() for k, v in w.items())
        return cross_entropy(w, x, y) + 0.5 * penalty

    def neumann(product: Callable[[Arrays], Arrays], b: Arrays) -> Arrays:
        def step(_: int, carry: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
            v, total = carry
            v = jax.tree.map(lambda a, c: a - task.alpha * c, v, product(v))
            return v, jax.tree.map(jnp.add, total, v)

        _, total = lax.fori_loop(0, task.products, step, (b, b))
        return jax.tree.map(lambda a: task.alpha * a, total)

    solve = partial(solve_cg, tol=0.0, maxiter=task.products) if solver == "cg" else neumann

    @jax.jit
    def gradient(w: Arrays, lam: Arrays, x: jax.Array, y: jax.Array) -> Arrays:
        return jax.grad(inner)(w, lam, x, y)

    @jax.jit
    def hypergradient(w: Arrays, lam: Arrays, train: object, valid: object) -> Arrays:
        b = jax.grad(cross_entropy)(w, *valid)
        (found,) = root_vjp(lambda w, lam: jax.grad(inner)(w, lam, *train), w, (lam,), b, solve)
        return found

    return (
        lambda: jax.block_until_ready(gradient(w, lam, *train)),
        lambda: jax.block_until_ready(hypergradient(w, lam, train, valid)),
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    measure.main(build)

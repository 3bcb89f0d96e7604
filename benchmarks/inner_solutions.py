"""Inner problems of the benchmark tasks, solved to machine precision, differentiable in plain torch.

Each solver finds its solution without a graph and then takes one Newton step with one: at the
solution that step changes nothing but carries the exact implicit derivative.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_warm: dict[object, Tensor] = {}


def softmax_regression(
    x: Tensor, targets: Tensor, decay: Tensor, weights: Tensor | None = None, key: object = None
) -> Tensor:
    """argmin of ``sum_i weights_i CE_i + 0.5 sum decay w^2``; no bias.

    Args:
        x: (n, d). targets: one-hot (n, c). decay: broadcasts to (d, c). weights: (n,), default 1/n.
        key: Solutions of one key start from the last one (faster; the solution is the same).
    """
    n, d = x.shape
    c = targets.shape[1]
    weights = torch.full((n,), 1.0 / n, dtype=x.dtype) if weights is None else weights
    decay = decay.expand(d, c)

    def gradient(w: Tensor, weights: Tensor, decay: Tensor) -> Tensor:
        return x.T @ (weights[:, None] * (torch.softmax(x @ w, 1) - targets)) + decay * w

    def loss(w: Tensor) -> Tensor:
        ce = -(torch.log_softmax(x @ w, 1) * targets).sum(1)
        return weights @ ce + 0.5 * (decay * w * w).sum()

    differentiated = torch.is_grad_enabled()
    with torch.no_grad():
        w = _warm.get(key, torch.zeros(d, c, dtype=x.dtype))
        for _ in range(60):
            g = gradient(w, weights, decay)
            if not differentiated and float(g.abs().max()) < 1e-12:
                return w
            factor = torch.linalg.cholesky(_softmax_hessian(x, w, weights, decay))
            step = torch.cholesky_solve(g.reshape(-1, 1), factor).reshape(d, c)
            if float(g.abs().max()) < 1e-12 or float((g * step).sum()) < 1e-18:
                break
            length, now, slope = 1.0, loss(w), (g * step).sum()
            while float(loss(w - length * step)) > float(now - 1e-4 * length * slope) + 1e-15:
                length *= 0.5
                if length < 1e-4:
                    break
            w = w - length * step
            if length * float(step.abs().max()) < 1e-7:  # the next one would be its square
                break
        if key is not None:
            _warm[key] = w
    correction = torch.cholesky_solve(gradient(w, weights, decay).reshape(-1, 1), factor)
    return w - correction.reshape(d, c)


def _softmax_hessian(x: Tensor, w: Tensor, weights: Tensor, decay: Tensor) -> Tensor:
    d, c = w.shape
    p = torch.softmax(x @ w, 1)
    hessian = x.new_zeros(d, c, d, c)
    for a in range(c):
        for b in range(a, c):
            coupling = weights * p[:, a] * (float(a == b) - p[:, b])
            block = (x * coupling[:, None]).T @ x
            hessian[:, a, :, b] = block
            hessian[:, b, :, a] = block
    hessian = hessian.reshape(d * c, d * c)
    hessian.diagonal().add_(decay.reshape(-1))
    return hessian


def lasso(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """argmin of ``|x w - y|^2 / (2 n) + sum penalty |w|`` (d,); differentiable on its support."""
    n, d = x.shape
    with torch.no_grad():
        gram, moment = x.T @ x / n, x.T @ y / n
        rows, level = gram.numpy(), penalty.detach().numpy()
        now = np.zeros(d)
        for _ in range(2000):
            before = now.copy()
            for j in range(d):
                r = float(moment[j]) - rows[j] @ now + rows[j, j] * now[j]
                now[j] = np.sign(r) * max(abs(r) - level[j], 0.0) / rows[j, j]
            if np.abs(now - before).max() < 1e-10:
                break
        w = torch.tensor(now)
        support, sign = w != 0, torch.sign(w)
    on = torch.linalg.solve(
        gram[support][:, support], moment[support] - penalty[support] * sign[support]
    )
    return torch.zeros_like(w).masked_scatter(support, on)

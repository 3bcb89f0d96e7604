"""Equations in one periodic dimension, solved with NumPy's FFT: black boxes for ``pde_discovery.py``.

    Burgers      u_t + a u u_x = nu u_xx             u(x, 0) = -sin(pi x)
    Allen-Cahn   u_t = nu u_xx + r(x) (u - u^3)      u(x, 0) = x^2 cos(pi x)
    KdV          u_t + a u u_x = nu u_xx - d u_xxx   u(x, 0) = cos(pi x)

on ``-1 <= x < 1``, ``0 <= t <= 1``, as in Raissi, Perdikaris & Karniadakis (2019), "Physics-informed neural
networks". In Fourier space the linear part is diagonal and is taken exactly: ETDRK4 (Cox & Matthews 2002), its
coefficients by contour integrals (Kassam & Trefethen 2005), products dealiased by the 2/3 rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def etdrk4(
    linear: Array, nonlinear: Callable[[Array], Array], start: Array, num_steps: int
) -> Array:
    """``v_t = linear v + nonlinear(v)`` from 0 to 1; all states, ``(num_steps + 1, modes)``."""
    h = 1.0 / num_steps
    circle = np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
    z = h * linear[:, None] + circle  # (modes, 32)
    e, e2 = np.exp(h * linear), np.exp(0.5 * h * linear)

    def mean(values: Array) -> Array:
        found = h * values.mean(1)
        return found if np.iscomplexobj(linear) else found.real

    q = mean((np.exp(z / 2) - 1) / z)
    f1 = mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    f2 = 2 * mean((2 + z + np.exp(z) * (z - 2)) / z**3)
    f3 = mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)
    states = np.empty((num_steps + 1, len(start)), complex)
    v = states[0] = start
    for i in range(num_steps):
        nv = nonlinear(v)
        half = e2 * v
        a = half + q * nv
        na = nonlinear(a)
        b = half + q * na
        nb = nonlinear(b)
        nc = nonlinear(e2 * a + q * (2 * nb - nv))
        v = states[i + 1] = e * v + nv * f1 + (na + nb) * f2 + nc * f3
        if not np.isfinite(v[1]):
            raise FloatingPointError(f"The solution blew up at t = {(i + 1) * h:.3g}.")
    return states


@dataclass(frozen=True)
class Grid:
    """``num_points`` points of ``-1 <= x < 1``, and the modes that the 2/3 rule keeps."""

    num_points: int

    @property
    def x(self) -> Array:
        return -1.0 + 2.0 * np.arange(self.num_points) / self.num_points

    @property
    def wave_numbers(self) -> Array:
        return np.pi * np.arange(self.num_points // 3 + 1)

    def modes(self, values: Array) -> Array:
        return np.fft.rfft(values)[: self.num_points // 3 + 1]

    def values(self, modes: Array) -> Array:
        return np.fft.irfft(modes, self.num_points)

    def at(self, modes: Array, x: Array) -> Array:
        """The Fourier series ``(n, modes)``, each row at one of ``x``, ``(n,)``."""
        weights = np.full(modes.shape[1], 2.0 / self.num_points)
        weights[0] *= 0.5
        return ((modes * weights) * np.exp(1j * np.outer(x + 1.0, self.wave_numbers))).real.sum(1)


def dispersive_burgers(
    grid: Grid, num_steps: int, start: Array, advection: float, diffusion: float, dispersion: float
) -> Array:
    """``u_t + advection u u_x = diffusion u_xx - dispersion u_xxx``: Burgers and KdV are two ends of it."""
    k = grid.wave_numbers
    linear = -diffusion * k**2 + (0.0 if dispersion == 0.0 else 1j * dispersion * k**3)
    factor = -0.5j * advection * k
    return etdrk4(
        linear, lambda v: factor * grid.modes(grid.values(v) ** 2), grid.modes(start), num_steps
    )


def allen_cahn(
    grid: Grid, num_steps: int, start: Array, diffusion: float, reaction: float | Array
) -> Array:
    """``u_t = diffusion u_xx + reaction (u - u^3)``; ``reaction`` a number, or values on the grid."""
    linear = -diffusion * grid.wave_numbers**2

    def nonlinear(v: Array) -> Array:
        u = grid.values(v)
        return grid.modes(reaction * (u - u**3))

    return etdrk4(linear, nonlinear, grid.modes(start), num_steps)


def burgers_start(x: Array) -> Array:
    return -np.sin(np.pi * x)


def allen_cahn_start(x: Array) -> Array:
    return x**2 * np.cos(np.pi * x)


def kdv_start(x: Array) -> Array:
    return np.cos(np.pi * x)

"""What a probe of the curvature found: what follows from it, how it is printed and drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ._arguments import check_count, is_number
from ._errors import RequirementError

_MARGIN = 1.1
_NOISE = 30
"""Roundings of the largest eigenvalue, up to which nothing is told apart from 0."""


@dataclass(frozen=True)
class CurvatureReport:
    """What :func:`probe_curvature` found. ``print`` it, or :meth:`plot` the spectral density.

    The probed matrix ``H`` is the Hessian of the inner objective, or what stands for it, averaged over
    ``num_batches`` batches.

    Attributes:
        size: ``P``, the number of inner parameters.
        largest: Largest Ritz value: no more than the largest eigenvalue.
        largest_bound: Some eigenvalue is within this of it; no less than the rounding of the products.
        smallest: Smallest Ritz value: no less than the smallest eigenvalue.
        smallest_bound: Some eigenvalue is within this of it; likewise.
        rounding: Of the dtype of the products, relative.
        nodes: All Ritz values, of all start vectors.
        weights: The share of the spectrum that each stands for; of sum 1.
        num_products: Products spent, those with each batch counted.
        num_batches: Batches that were averaged.
        batch_size: Samples in one batch; ``None`` if nobody said.
        hessian_variance: ``s^2``, of an entry of the Hessian of one sample (of one batch, without a
            ``batch_size``); NaN from one batch.
    """

    size: int
    largest: float
    largest_bound: float
    smallest: float
    smallest_bound: float
    rounding: float
    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    num_products: int
    num_batches: int = 1
    batch_size: int | None = None
    hessian_variance: float = math.nan

    @property
    def negative_curvature(self) -> float:
        """The most negative Ritz value, 0 if none is negative beyond rounding: somewhere it curves down that much."""
        scale = max(abs(self.largest), abs(self.smallest))
        return self.smallest if self.smallest < -_NOISE * self.rounding * scale else 0.0

    @property
    def negative_share(self) -> float:
        """The share of eigenvalues that are negative beyond rounding, as the density has it."""
        scale = max(abs(self.largest), abs(self.smallest))
        return float(self.weights[self.nodes < -_NOISE * self.rounding * scale].sum())

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, as the density has it."""
        return self.size * float((self.nodes * self.weights).sum())

    @property
    def damping(self) -> float:
        """What makes ``H + damping I`` positive definite, a tenth more than that; 0 if ``H`` looks positive already."""
        if not self.negative_curvature:
            return 0.0
        return _MARGIN * (self.smallest_bound - self.smallest)

    @property
    def alpha(self) -> float:
        """Neumann's step length for ``H + damping I``: ``1 / lambda_max``; NaN if nothing curves upwards."""
        top = self.largest + self.largest_bound + self.damping
        return 1.0 / top if self.largest > 0 else math.nan

    @property
    def step_size(self) -> float:
        """For gradient descent on batches like these, half of what is stable: ``1 / lambda_max`` of one batch."""
        top = self.largest_at(self.batch_size) if self._knows_batches() else self.largest
        return 1.0 / (top + self.largest_bound) if self.largest > 0 else math.nan

    def largest_at(self, batch_size: int | None) -> float:
        """The largest eigenvalue to expect of the Hessian of one batch of this size; ``None`` for all data.

        ``lambda + (P / b) s^2 / lambda``, and at least the edge ``2 sqrt(P / b) s`` of what batches add at random,
        with ``lambda`` the eigenvalue for all data.

        Raises:
            RequirementError: if the report knows nothing about other batch sizes.

        Reference: Granziol, Zohren & Roberts (2022), "Learning rates as a function of batch size".
        """
        check_count("largest_at", "batch_size", batch_size, 1, none=True)
        if not self._knows_batches():
            raise RequirementError(
                "What other batch sizes do to the largest eigenvalue is known from how batches differ: call "
                "probe_curvature with num_batches=8, say, and batch_size=."
            )
        assert self.batch_size is not None
        seen = self.size * self.hessian_variance / (self.num_batches * self.batch_size)
        inside = max(self.largest**2 - 4 * seen, 0.0)
        bare = 0.5 * (self.largest + math.sqrt(inside))
        if batch_size is None:
            return bare
        added = self.size * self.hessian_variance / batch_size
        edge = math.sqrt(added)
        return bare + added / bare if bare > edge else 2 * edge

    def rescaled_step_size(
        self, step_size: float, batch_size: int, method: Literal["sgd", "adam"] = "sgd"
    ) -> float:
        """A step size that was right for batches like these, for batches of another size.

        ``"sgd"``: in proportion to the batch size, but it grows no more than ``1 / lambda_max`` of a batch does, which
        ends where the curvature of all data outgrows what a batch adds (if several batches were probed).
        ``"adam"``: in proportion to the square root of the batch size.

        Raises:
            RequirementError: if the report does not know the ``batch_size`` of its batches.
            ValueError: if an argument makes no sense.

        Reference: as for :meth:`largest_at`.
        """
        check_count("rescaled_step_size", "batch_size", batch_size, 1)
        if method not in ("sgd", "adam"):
            raise ValueError(f'rescaled_step_size needs method "sgd" or "adam", got {method!r}.')
        if not (is_number(step_size) and 0 < step_size < math.inf):
            raise ValueError(f"rescaled_step_size needs a positive step_size, got {step_size!r}.")
        if self.batch_size is None:
            raise RequirementError(
                "rescaled_step_size has to know the batch size that step_size was right for; give batch_size= to "
                "probe_curvature."
            )
        factor = batch_size / self.batch_size
        if method == "adam":
            return step_size * math.sqrt(factor)
        if self._knows_batches() and self.largest > 0:
            factor = min(factor, self.largest_at(self.batch_size) / self.largest_at(batch_size))
        return step_size * factor

    def density(self, num_points: int = 500, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The spectral density: ``x`` and the density there, both ``(num_points,)``; its integral is 1.

        Args:
            num_points: At least 2, evenly spaced over the spectrum.
            width: Standard deviation of the Gaussian that each Ritz value is drawn as; ``None`` for a
                two-hundredth of the spectrum.
        """
        check_count("density", "num_points", num_points, 2)
        if width is not None and not (is_number(width) and 0 < width < math.inf):
            raise ValueError(f"density needs width > 0 or None, got {width!r:.80}.")
        low, high = float(self.nodes.min()), float(self.nodes.max())
        sigma = width or max(0.005 * (high - low), 1e-3 * max(abs(low), abs(high)), 1e-300)
        x = torch.linspace(
            low - 6 * sigma, high + 6 * sigma, num_points, dtype=torch.float64, device="cpu"
        )
        bells = torch.exp(-0.5 * ((x[:, None] - self.nodes.cpu()) / sigma) ** 2)
        return x, bells @ self.weights.cpu() / (sigma * math.sqrt(2 * math.pi))

    def outline(self, num_points: int) -> tuple[Tensor, Tensor, float]:
        """The density as it is drawn on a logarithmic axis: ``x``, the density, and the floor, below which it is not."""
        x, y = self.density(num_points)
        floor = 0.1 * float(self.weights[self.weights > 0].min()) * float(y.max())
        floor = max(floor, 1e-8 * float(y.max()))
        return x, y.clamp_min(floor), floor

    def marks(self) -> list[tuple[float, str]]:
        """The eigenvalues that a figure names."""
        found = [(self.largest, "largest")]
        if self.negative_curvature:
            found.append((self.smallest, "most negative"))
        return found

    def plot(self, axes: Any = None) -> Any:
        """Draw the spectral density, and return the axes (``.figure.savefig("density.png")``).

        Args:
            axes: Matplotlib axes to draw on; ``None`` for new ones.

        Raises:
            RequirementError: if matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise RequirementError(
                    "CurvatureReport.plot draws with matplotlib, which is not installed (pip install matplotlib); "
                    "density() gives the numbers."
                ) from error
            axes = Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
        x, y, floor = self.outline(2000)
        axes.fill_between(x.numpy(), floor, y.numpy(), alpha=0.3, linewidth=0)
        axes.plot(x.numpy(), y.numpy(), linewidth=1)
        for value, label in self.marks():
            axes.axvline(value, color="0.3", linestyle=":", linewidth=1)
            axes.annotate(
                f"{label}\n{value:.3g}",
                (value, 0.97),
                xycoords=("data", "axes fraction"),
                ha="right" if label == "largest" else "left",
                va="top",
                fontsize="small",
            )
        axes.set_yscale("log")
        axes.set_ylim(floor, 3 * float(y.max()))
        axes.set_xlabel("eigenvalue of the inner Hessian")
        axes.set_ylabel("spectral density")
        return axes

    def __str__(self) -> str:
        rows = [
            ("largest eigenvalue", f"{self.largest:.4g} ± {self.largest_bound:.0e}"),
            ("smallest Ritz value", f"{self.smallest:.4g} ± {self.smallest_bound:.0e}"),
            ("trace", f"{self.trace:.4g}"),
            ("damping", f"{self.damping:.3g}"),
        ]
        if not math.isnan(self.alpha):
            rows += [
                ("alpha of Neumann", f"{self.alpha:.3g}"),
                ("step size of descent", f"{self.step_size:.3g}"),
            ]
        if not math.isnan(self.hessian_variance):
            of = "a sample's" if self.batch_size else "a batch's"
            rows.append((f"variance of {of} Hessian", f"{self.hessian_variance:.3g} an entry"))
        wide = max(len(name) for name, _ in rows)
        batches = f" of {self.num_batches} batches" if self.num_batches > 1 else ""
        head = f"Curvature of {self.size:,} inner parameters, from {self.num_products} products with the Hessian{batches}."
        return "\n".join([head, *(f"  {n.ljust(wide)}  {v}" for n, v in rows), *self.advice()])

    def advice(self) -> list[str]:
        """In sentences, what follows."""
        said = []
        if not self.largest > 0:
            said.append(
                "Nothing curves upwards here: no step length makes descent or the Neumann series converge. Start "
                "elsewhere, or look at the sign of the inner objective."
            )
        elif self.negative_curvature:
            said.append(
                f"Negative curvature: in some direction the inner objective curves downwards, by "
                f"{self.negative_curvature:.3g} (about {self.negative_share:.1%} of the spectrum is negative). "
                f"{self._cause()} Solve the inner problem further, or use Implicit(damping={self.damping:.2g}), a "
                f"bias, or the GaussNewton curvature. CG needs one of them; so does Neumann."
            )
        else:
            said.append(self._conditioning())
        if self.largest > 0 and self._knows_batches():
            assert self.batch_size is not None
            whole, one = self.largest_at(None), self.largest_at(self.batch_size)
            said.append(
                f"Batches: for all data the largest eigenvalue would be {whole:.3g}; one batch of "
                f"{self.batch_size} has {one:.3g}, one of {4 * self.batch_size} {self.largest_at(4 * self.batch_size):.3g}. "
                f"For four times the batch, multiply the step size of SGD by "
                f"{self.rescaled_step_size(1.0, 4 * self.batch_size):.2g}, that of Adam by 2."
            )
        return said

    def _cause(self) -> str:
        if not math.isnan(self.hessian_variance):
            samples = self.num_batches * (self.batch_size or 1)
            edge = 2 * math.sqrt(self.size * self.hessian_variance / samples)
            if -self.negative_curvature <= edge:
                return f"Differences between batches alone add up to {edge:.3g} of it: average more of them."
        return "This is no minimum."

    def _conditioning(self) -> str:
        top, least = self.largest + self.largest_bound, self.smallest
        if least <= max(2 * self.smallest_bound, _NOISE * self.rounding * top):
            return (
                f"The smallest eigenvalue is not told apart from 0 (condition at least {top / max(least, top * self.rounding):.1g}): "
                f"CG goes by the directions that matter first; Neumann at alpha={self.alpha:.2g} forgets those flatter than "
                f"1 / (alpha num_steps). damping={1e-3 * top:.2g} would bound the condition to 1,000; it is a bias."
            )
        condition = top / least
        return (
            f"Condition about {condition:.3g}: for six digits CG needs about {min(7 * math.sqrt(condition), self.size):.0f} products at most, "
            f"and Neumann at alpha={self.alpha:.2g} about {14 * condition:.0f}."
        )

    def _knows_batches(self) -> bool:
        return self.batch_size is not None and not math.isnan(self.hessian_variance)

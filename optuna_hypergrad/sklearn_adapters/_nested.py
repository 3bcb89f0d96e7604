"""Whether, and how far, vectors of hyperparameters may depart from all entries being equal: chosen by nested folds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from scipy.special import stdtrit  # type: ignore[import-untyped]
from torch import Tensor

from .._errors import SolverError
from .._typing import Params
from ..search_space import Domain
from ._adapter import Split
from ._cross_validated import CrossValidatedLoss
from ._descent import descend, scan

MAX_FOLDS = 5
TAUS = (10.0, 1.0, 0.1, 0.01, 0.0)
"""In units in which the penalty of a departure by a factor of e, in every entry, is the tied loss itself."""

_MAX_TIED, _MAX_FREE = 15, 25
"""Evaluations for the tied solution of a fold, and for each strength of the penalty."""

_HOPELESS = 0.1
"""A path is left where its loss is by so much, relatively, above that of its best point."""

_CONFIDENCE = 0.95
"""With which what departs from the tied solution is better than it."""


@dataclass(frozen=True)
class NestedChoice:
    """What nested cross-validation says of the departure of vectors from the tied solution, in which all entries are equal.

    Attributes:
        tau: Of the penalty ``tau / 2 * |departure|^2`` on the logarithms (or natural units) of the entries; ``None`` where
            the tied solution was chosen.
        taus: That were tried, from stiff to free.
        losses: Of each of them on the outer folds, whose samples no choice of hyperparameters has seen.
        tied_loss: Of the tied solution on the outer folds.
        loss: Of what was chosen: the nested estimate. (It is the best of a few, so that it is optimistic by a little.)
        fold_losses: Of each outer fold: of the tied solution, and of each of ``taus``.
        errors: Standard errors of how much less than ``tied_loss`` each of ``losses`` is.
    """

    tau: float | None
    taus: list[float]
    losses: list[float]
    tied_loss: float
    loss: float
    fold_losses: list[list[float]]
    errors: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For an attribute of a study: JSON has no infinity."""
        return cast("dict[str, Any]", _mapped(asdict(self), lambda v: None if v == math.inf else v))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NestedChoice:
        losses = {k: v for k, v in data.items() if k != "tau"}
        return cls(tau=data["tau"], **_mapped(losses, lambda v: math.inf if v is None else v))


def _mapped(data: Any, of: Callable[[Any], Any]) -> Any:
    """The same lists and dicts of other numbers."""
    if isinstance(data, dict):
        return {k: _mapped(v, of) for k, v in data.items()}
    if isinstance(data, list):
        return [_mapped(v, of) for v in data]
    return of(data)


@dataclass(frozen=True)
class Judged:
    """What one strength of the penalty has come to on the outer folds.

    Attributes:
        losses: ``(folds,)``; infinite where there is none.
        influences: Of each sample on the loss of each fold, times its share, ``(n_samples,)``; zero where it is not tested. See
            ``CrossValidatedLoss.with_influences``.
    """

    losses: np.ndarray
    influences: list[np.ndarray]

    def excess(self, other: Judged, folds: np.ndarray) -> tuple[float, float]:
        """How much more than another's its mean loss is, over folds where it is finite, and the standard error of that.

        There are two estimates of the error, and it is the larger one. The variance between folds has all that varies, models
        among it, and few degrees of freedom: five folds that agree by chance are common. The variance between samples has
        many, and leaves out that models vary. A sample that several folds test is one sample.
        """
        count, fitted = int(folds.sum()), np.isfinite(other.losses[folds]).all()
        if count < 2 or not fitted:
            return -math.inf, math.inf
        each = (self.losses - other.losses)[folds]
        differences = [self.influences[i] - other.influences[i] for i in np.flatnonzero(folds)]
        total = float(np.square(np.sum(differences, 0)).sum())
        between = float(each.std(ddof=1)) / count**0.5
        return float(each.mean()), max(between, total**0.5 / count)


@dataclass(frozen=True)
class Freedom:
    """Hyperparameters of a search with vectors, tied and free.

    Attributes:
        floats: Domains of the numbers.
        vectors: Domains of an entry of each vector.
        sizes: Of the vectors.
        more: A point to look at first: the estimator as the user gave it.
    """

    floats: dict[str, Domain]
    vectors: dict[str, Domain]
    sizes: dict[str, int]
    more: dict[str, float]

    @property
    def domains(self) -> dict[str, Domain]:
        return {**self.floats, **self.vectors}

    def untied(self, values: Mapping[str, Tensor]) -> Params:
        """Vectors with all entries equal, from one number each."""
        return {n: v.expand(self.sizes[n]) if n in self.sizes else v for n, v in values.items()}

    def departure(self, values: Mapping[str, Tensor], tied: Mapping[str, float]) -> Tensor:
        """``|log lam - log lam_tied|^2``, summed over the vectors; in natural units where not ``log``."""
        total = torch.zeros((), dtype=torch.float64)
        for name, domain in self.vectors.items():
            at = domain.to_internal(torch.tensor(tied[name], dtype=torch.float64))
            total = total + (domain.to_internal(values[name]) - at).square().sum()
        return total


def nested_choice(
    loss_of: Callable[[list[Split]], CrossValidatedLoss],
    splits: list[Split],
    usable: Callable[[Split], bool],
    chosen: Mapping[str, Any],
    freedom: Freedom,
    loss: float,
) -> NestedChoice | None:
    """Tune tied and free with the inner folds of each outer fold, and compare them on what was held out.

    The inner folds of an outer one are the others, without its test samples. So neither the test samples of an outer fold
    nor a model that was fitted to them has a part in choosing the hyperparameters that are judged by them.

    Of the strengths of the penalty, the stiffest is a candidate that is not worse than the best by more than a standard error.
    It is taken if it is better than the tied solution with a confidence of 95 % by a paired test, of which the standard error is
    the larger one of that between folds and that between samples. So a gain which rests on a few samples (where one of
    thousands that are to come could cost more, as by the log loss of a classifier that is too sure) is none. A single fold
    never unties.

    Reference: Stone (1974), "Cross-validatory choice and assessment of statistical predictions"; for the rule of one standard
    error, Breiman et al. (1984), "Classification and regression trees", section 3.4.3; for tests of paired differences between
    folds and samples, Dietterich (1998), "Approximate statistical tests for comparing supervised classification learning
    algorithms"; for their variances, Nadeau & Bengio (2003), "Inference for the generalization error".

    Args:
        loss_of: Makes the loss over other folds.
        splits: Of the search.
        usable: Whether a fold can be fitted and scored.
        chosen: Hyperparameters that are not differentiated.
        freedom: The others.
        loss: Of the tied solution of all data, which sets the scale of the penalty.

    Returns:
        ``None`` where no outer fold has inner ones.
    """
    folds = _outer_folds(splits, usable)
    if not folds:
        return None
    outer = [loss_of([split]) for split, _ in folds]
    inner = [loss_of(parts) for _, parts in folds]
    tied = [_tied(part, chosen, freedom) for part in inner]
    points = [freedom.untied(_tensors(t)) for t in tied]
    tests = [test for (_, test), _ in folds]
    size = 1 + max(int(test.max()) for test in tests)

    def judged() -> Judged:
        each = [_judged(o, chosen, p) for o, p in zip(outer, points, strict=True)]
        influences = [np.bincount(t, i, size) for t, (_, i) in zip(tests, each, strict=True)]
        return Judged(np.array([loss for loss, _ in each]), influences)

    base = judged()
    found: list[Judged] = []
    taus = [share * 2 * loss / sum(freedom.sizes.values()) for share in TAUS]
    for tau in taus:
        for i, part in enumerate(inner):
            points[i] = _free(part, chosen, freedom, points[i], tied[i], tau)
        found.append(judged())
        best = min(float(f.losses.mean()) for f in [base, *found])
        if not found[-1].losses.mean() <= (1 + _HOPELESS) * best:
            break
    return _decide(base, found, taus[: len(found)])


def can_nest(splits: list[Split], usable: Callable[[Split], bool]) -> bool:
    """Whether any fold has inner ones."""
    return bool(_outer_folds(splits, usable))


def _decide(base: Judged, found: list[Judged], taus: list[float]) -> NestedChoice:
    """The tied solution, unless another is surely better: the stiffest that is not worse than the best by more than an error."""
    losses = np.stack([base.losses, *(f.losses for f in found)], 1)  # (folds, 1 + taus)
    known = np.isfinite(base.losses)
    means = losses[known].mean(0) if known.any() else np.full(1 + len(found), math.inf)
    excesses = [base.excess(f, known) for f in found]
    best = found[int(means[1:].argmin())]
    taken = next((i for i, f in enumerate(found) if _is_as_good(f, best, known)), None)
    if taken is not None and not _is_sure(*excesses[taken], int(known.sum())):
        taken = None
    return NestedChoice(
        tau=None if taken is None else taus[taken],
        taus=taus,
        losses=means.tolist()[1:],
        tied_loss=float(means[0]),
        loss=float(means[0 if taken is None else 1 + taken]),
        fold_losses=losses.tolist(),
        errors=[error for _, error in excesses],
    )


def _is_as_good(some: Judged, best: Judged, folds: np.ndarray) -> bool:
    """Whether it is not worse by more than a standard error between folds (Breiman et al. 1984, section 3.4.3)."""
    if not np.isfinite(some.losses[folds]).all() or folds.sum() < 2:
        return False
    excess = (some.losses - best.losses)[folds]
    return bool(excess.mean() <= excess.std(ddof=1) / len(excess) ** 0.5)


def _is_sure(excess: float, error: float, num_folds: int) -> bool:
    """Student's test, one-sided, with the degrees of freedom of the folds."""
    return excess > float(stdtrit(num_folds - 1, _CONFIDENCE)) * error


def _judged(
    loss: CrossValidatedLoss, chosen: Mapping[str, Any], values: Params
) -> tuple[float, np.ndarray]:
    """Infinite where there is none, and then without influences."""
    try:
        ((value, influences),) = loss.with_influences(chosen, values)
    except SolverError:
        return math.inf, np.zeros(len(loss.splits[0][1]))
    return value, influences.numpy()


def _tied(
    loss: CrossValidatedLoss, chosen: Mapping[str, Any], freedom: Freedom
) -> dict[str, float]:
    def of(values: Params) -> Tensor:
        return loss(chosen, freedom.untied(values))

    def each(values: Mapping[str, Tensor], first: int, last: int) -> Tensor:
        return loss.each(chosen, freedom.untied(values), first, last, rough=True)

    start = scan(each, freedom.domains, freedom.more, len(loss.splits))
    try:
        best, _ = descend(of, freedom.domains, _tensors(start), _MAX_TIED)
    except SolverError:  # everywhere that was looked at
        return start
    return {n: float(v) for n, v in best.items()}


def _free(
    loss: CrossValidatedLoss,
    chosen: Mapping[str, Any],
    freedom: Freedom,
    start: Params,
    tied: Mapping[str, float],
    tau: float,
) -> Params:
    def of(values: Params) -> Tensor:
        return loss(chosen, values) + 0.5 * tau * freedom.departure(values, tied)

    try:
        return descend(of, freedom.domains, start, _MAX_FREE, tau)[0]
    except SolverError:
        return start


def _tensors(numbers: Mapping[str, float]) -> Params:
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}


def _outer_folds(
    splits: list[Split], usable: Callable[[Split], bool]
) -> list[tuple[Split, list[Split]]]:
    """Outer folds, at most five, with the inner ones of each."""
    merged = _merged(splits) if len(splits) > MAX_FOLDS else splits
    found = []
    for i, (train, test) in enumerate(merged):
        seen = np.setdiff1d(train, test)
        parts = []
        for j, (other_train, other_test) in enumerate(merged):
            part = np.intersect1d(other_train, seen), np.intersect1d(other_test, seen)
            if j != i and usable(part):
                parts.append(part)
        if parts and usable((train, test)):
            found.append(((train, test), parts))
    return found


def _merged(splits: list[Split]) -> list[Split]:
    """Five folds of many: some are left out together, where enough is left to train on; otherwise five of them."""
    count = len(splits)
    groups = np.array_split(np.arange(count), MAX_FOLDS)
    merged = []
    for group in groups:
        test = np.unique(np.concatenate([splits[i][1] for i in group]))
        train = splits[group[0]][0]
        for i in group[1:]:
            train = np.intersect1d(train, splits[i][0])
        merged.append((np.setdiff1d(train, test), test))
    typical = np.median([len(train) for train, _ in splits])
    if min(len(train) for train, _ in merged) >= 0.5 * typical:
        return merged
    return [splits[group[0]] for group in groups]

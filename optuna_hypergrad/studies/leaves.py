"""Suggested tensors: what defines them, and the leaves whose gradients are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import HyperparameterError, ObjectiveError, ZeroHypergradientError
from .._typing import Params
from ..search_space import Domain
from .points import Definition, dtype_name, flatten, nested

Shape = int | Sequence[int]


def checked_domain(name: str, low: Any, high: Any, log: bool, unit: float | None = None) -> Domain:
    """The domain, or a :class:`HyperparameterError` that names the hyperparameter."""
    if not isinstance(name, str) or not name or name.startswith("#"):
        raise HyperparameterError(
            f"{name!r} cannot name a hyperparameter; give a non-empty string that does not start "
            "with '#'."
        )
    bounds = []
    for label, bound in (("low", low), ("high", high)):
        if isinstance(bound, (bool, str)) or not _is_number(bound):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: {label}={bound!r} is not a number; give a float."
            )
        bounds.append(float(bound))
    domain = Domain(bounds[0], bounds[1], bool(log), unit)
    domain.check(name)
    return domain


def checked_init(name: str, domain: Domain, init: Any) -> float:
    """``init`` as a number within the bounds; the middle of the range for ``None``."""
    if init is None:
        return domain.midpoint()
    if isinstance(init, (bool, str)) or not _is_number(init):
        raise HyperparameterError(f"Hyperparameter {name!r}: init={init!r} is not a number.")
    value = float(init)
    if not domain.low <= value <= domain.high or value in (float("inf"), float("-inf")):
        raise HyperparameterError(
            f"Hyperparameter {name!r}: init={value} is outside [{domain.low}, {domain.high}]; "
            "move it inside, or widen the bounds."
        )
    return value


def tensor_start(
    name: str,
    domain: Domain,
    shape: Shape,
    init: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """The tensor at its start, or a :class:`HyperparameterError` that says what is wrong with it."""
    size = _checked_shape(name, shape)
    if dtype is None:
        dtype = init.dtype if isinstance(init, Tensor) else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise HyperparameterError(
            f"Hyperparameter {name!r}: dtype {dtype} has no gradient; use a floating-point dtype such "
            "as torch.float32, or suggest_int for integers."
        )
    domain.check_dtype(name, torch.empty(0, dtype=dtype, device="cpu"))
    if isinstance(init, np.ndarray):
        init = torch.from_numpy(np.ascontiguousarray(init))
        if not init.dtype.is_floating_point:
            raise HyperparameterError(
                f"Hyperparameter {name!r}: init has dtype {init.dtype}; give floating-point numbers."
            )
        init = init.to(dtype)
    if isinstance(init, Tensor):
        if init.dtype != dtype:
            raise HyperparameterError(
                f"Hyperparameter {name!r}: init has dtype {init.dtype}, not {dtype}; convert it with "
                f"init.to({dtype}), or pass dtype={init.dtype}."
            )
        if tuple(init.shape) != size:
            raise HyperparameterError(
                f"Hyperparameter {name!r}: init has shape {tuple(init.shape)}, not {size}; reshape it, "
                "or give one number for all entries."
            )
        start = init.detach().to(device=device, copy=True).contiguous()
        if not domain.contains(start):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: init has entries from {float(start.min()):.6g} to "
                f"{float(start.max()):.6g}, outside [{domain.low}, {domain.high}] or not finite; clamp "
                "them, or widen the bounds."
            )
        return start
    low, high = domain.bounds_as(torch.empty(0, dtype=dtype, device="cpu"))
    number = min(max(checked_init(name, domain, init), low), high)
    return domain.clamp(torch.full(size, number, dtype=dtype, device=device))


def tree_start(
    name: str, low: Any, high: Any, log: bool, params: Mapping[str, Tensor], init: Any
) -> tuple[Definition, Params]:
    """A tensor like each of ``params``, at its start."""
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    if not isinstance(params, Mapping) or not params:
        raise HyperparameterError(
            f"Hyperparameter {name!r}: give a non-empty dict of tensors, such as "
            f"dict(model.named_parameters()), not {type(params).__name__}."
        )
    for key, value in params.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: entry {key!r} is a {type(value).__name__}; give tensors by "
                "name."
            )
    lows, highs, starts = (
        _by_entry(name, label, given, params)
        for label, given in (("low", low), ("high", high), ("init", init))
    )
    values, domains = {}, {}
    for key, value in params.items():
        entry = f"{name}/{key}"
        domains[key] = checked_domain(entry, lows[key], highs[key], log)
        values[key] = tensor_start(
            entry, domains[key], tuple(value.shape), starts[key], value.dtype, value.device
        )
    return tree_definition(name, domains, values), values


def _by_entry(name: str, label: str, given: Any, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """One for all entries, or a dict with one for each."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(params, given)
    if given.keys() != params.keys():
        odd = sorted(map(str, given.keys() ^ params.keys()))[:3]
        raise HyperparameterError(
            f"Hyperparameter {name!r}: {label} and params differ in {odd}; give {label} the keys of params."
        )
    return dict(given)


def module_start(name: str, module: nn.Module) -> tuple[Definition, Params]:
    """The weights of ``module``, unbounded; a natural step is the root mean square of each."""
    if not isinstance(module, nn.Module):
        raise HyperparameterError(
            f"Hyperparameter {name!r}: suggest_module takes a torch.nn.Module, not a "
            f"{type(module).__name__}."
        )
    values = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
    if not values:
        raise HyperparameterError(
            f"Hyperparameter {name!r}: the module has no weights that require grad."
        )
    for key, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: weight {key!r} is not finite; initialize the module."
            )
    entries = sum(v.numel() for v in values.values())
    everywhere = sum(float(v.double().pow(2).sum()) for v in values.values()) / max(entries, 1)
    domains = {}
    for key, value in values.items():
        size = float(value.double().pow(2).mean().sqrt()) if value.numel() else 0.0
        domains[key] = Domain(unit=size or everywhere**0.5 or 1.0)
    return tree_definition(name, domains, values), values


def tensor_definition(name: str, domain: Domain, value: Tensor) -> Definition:
    dtype = dtype_name(value.dtype)
    return Definition(name, "tensor", {"": domain}, {"": tuple(value.shape)}, {"": dtype})


def tree_definition(name: str, domains: Mapping[str, Domain], values: Params) -> Definition:
    return Definition(
        name,
        "tree",
        dict(domains),
        {k: tuple(v.shape) for k, v in values.items()},
        {k: dtype_name(v.dtype) for k, v in values.items()},
    )


class Leaves:
    """The continuous hyperparameters of one running trial, as leaves of the autograd graph."""

    def __init__(self) -> None:
        self.definitions: dict[str, Definition] = {}
        self.tensors: Params = {}
        self._given: Params = {}
        self._versions: dict[str, int] = {}

    def check(self, definition: Definition) -> bool:
        """Whether it was suggested in this trial before; refuses another definition of its name."""
        old = self.definitions.get(definition.name)
        if old is None:
            taken = {definition.flat(k) for k in definition.domains} & self.tensors.keys()
            if taken:
                raise HyperparameterError(
                    f"Hyperparameter {definition.name!r}: an entry would be called {min(taken)!r}, as "
                    "another hyperparameter of this trial is; rename one of them."
                )
            return False
        difference = old.difference(definition, shapes=True)
        if difference is not None:
            raise HyperparameterError(
                f"Hyperparameter {definition.name!r} was suggested before in this trial, and {difference}; "
                "use another name."
            )
        return True

    def add(self, definition: Definition, values: Params) -> None:
        """Make leaves of external, flat ``values``."""
        self.definitions[definition.name] = definition
        for flat, value in values.items():
            leaf = value.detach().clone().requires_grad_(True)
            self.tensors[flat], self._given[flat] = leaf, value.detach()
            self._versions[flat] = leaf._version

    def of(self, name: str) -> Tensor | Params:
        return nested(self.definitions[name], self.tensors)

    def check_untouched(self) -> None:
        """Raises :class:`ObjectiveError` if the objective wrote into a leaf."""
        for flat, leaf in self.tensors.items():
            if leaf._version != self._versions[flat] or not torch.equal(
                leaf.detach(), self._given[flat]
            ):
                raise ObjectiveError(
                    f"The objective changed hyperparameter {flat!r} in place, so its hypergradient would "
                    "not be the one at the suggested value. Work on a copy: value.clone(), or "
                    "value + 0.0."
                )

    def gradient(self, loss: Tensor, allow_unused: bool) -> Params:
        """d(loss)/d(leaf), flat.

        Raises:
            ZeroHypergradientError: if the loss does not depend on a leaf and ``allow_unused`` is unset.
        """
        names = [n for n, t in self.tensors.items() if t.numel()]
        found = torch.autograd.grad(loss, [self.tensors[n] for n in names], allow_unused=True)
        unused = [n for n, g in zip(names, found, strict=True) if g is None]
        if unused and not allow_unused:
            raise ZeroHypergradientError(
                f"The loss does not depend on {_listed(unused)}, so the hypergradient would be zero by "
                "construction. Suggest it only where it is used; or pass it on as it was suggested (not "
                "float(x), x.item() or x.detach()); or, if it is used in some trials only, decorate "
                "with @differentiable(allow_unused=True)."
            )
        return {
            n: torch.zeros_like(self.tensors[n]) if g is None else g.detach()
            for n, g in zip(names, found, strict=True)
        } | {n: torch.zeros_like(t) for n, t in self.tensors.items() if not t.numel()}

    def cast(self, name: str, given: Any) -> Params:
        """A gradient from elsewhere (float, NumPy, torch), in the form of its hyperparameter."""
        definition = self.definitions[name]
        is_tree = isinstance(given, Mapping) and given.keys() == definition.domains.keys()
        if definition.kind == "tree" and not is_tree:
            raise ObjectiveError(
                f"What is given for {name!r} must be a dict with the keys "
                f"{_listed(sorted(definition.domains))}."
            )
        cast = {}
        for flat, value in flatten(definition, given).items():
            leaf = self.tensors[flat]
            try:
                tensor = torch.as_tensor(value).detach().to(leaf)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ObjectiveError(
                    f"What is given for {flat!r} is no tensor of numbers: {error}."
                ) from None
            if tensor.shape != leaf.shape and not (tensor.numel() == 1 and leaf.numel() == 1):
                raise ObjectiveError(
                    f"What is given for {flat!r} has shape {tuple(tensor.shape)}; it must have that of the "
                    f"hyperparameter, {tuple(leaf.shape)}."
                )
            cast[flat] = tensor.reshape(leaf.shape).clone()
        return cast


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else shape
    try:
        found = tuple(int(n) for n in sizes)
        good = all(n >= 1 for n in found) and all(f == n for f, n in zip(found, sizes, strict=True))
    except (TypeError, ValueError):
        found, good = (), False
    if not good or isinstance(shape, bool):
        raise HyperparameterError(
            f"Hyperparameter {name!r}: shape={shape!r} is not a shape of at least one entry; give "
            "positive integers."
        )
    return found

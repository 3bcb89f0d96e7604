"""Continuous hyperparameters of one trajectory: what each is, and all of them as one point."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor

from .._errors import HyperparameterError
from .._typing import Params
from ..search_space import Domain

Bounds = dict[str, float]

_DTYPES = {n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype)}
_MAX_NAME_BYTES = 31_000
"""A name is in the attribute that points to its tensors, which has room for so much."""


@dataclass(frozen=True)
class Definition:
    """A hyperparameter as one ``suggest_*`` call defined it.

    Args:
        name: As suggested.
        kind: A number, a tensor, or a dict of tensors.
        domains: Per entry: ``""`` for a number or a tensor, the keys of a dict.
        shapes: Per entry.
        dtypes: Per entry, such as ``"float32"``.
    """

    name: str
    kind: Literal["float", "tensor", "tree"]
    domains: dict[str, Domain]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def __post_init__(self) -> None:
        for key in self.domains:
            _check_name(self.name, key, self.kind)

    @classmethod
    def of_float(cls, name: str, domain: Domain) -> Definition:
        return cls(name, "float", {"": domain}, {"": ()}, {"": "float64"})

    def flat(self, key: str) -> str:
        """The name of an entry in a point."""
        return f"{self.name}/{key}" if self.kind == "tree" else self.name

    def difference(self, other: Definition, shapes: bool) -> str | None:
        """In words, what ``other`` defines differently (natural units aside), or ``None``."""
        if self.kind != other.kind:
            return f"it was a {_KINDS[self.kind]} and is now a {_KINDS[other.kind]}"
        if shapes and self.shapes != other.shapes:
            changed = [
                f"{self.flat(k)!r} from {self.shapes.get(k)} to {other.shapes.get(k)}"
                for k in sorted(self.shapes.keys() | other.shapes.keys())
                if self.shapes.get(k) != other.shapes.get(k)
            ]
            return f"shapes changed: {', '.join(changed[:3])}"
        for k in self.domains.keys() & other.domains.keys():
            old, new = self.domains[k], other.domains[k]
            if (old.low, old.high, old.log) != (new.low, new.high, new.log):
                return (
                    f"low={old.low}, high={old.high}, log={old.log} became "
                    f"low={new.low}, high={new.high}, log={new.log}"
                )
            if shapes and self.dtypes[k] != other.dtypes[k]:
                return f"dtype {self.dtypes[k]} became {other.dtypes[k]}"
        return None

    def to_json(self) -> dict[str, Any]:
        keys = sorted(self.domains)
        return {
            "kind": self.kind,
            "entries": {
                k: [self.domains[k].to_json(), list(self.shapes[k]), self.dtypes[k]] for k in keys
            },
        }

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any]) -> Definition:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: in words, for anything else.
        """
        kind, entries = data.get("kind"), data.get("entries")
        if kind not in ("tensor", "tree") or not isinstance(entries, dict) or not entries:
            raise ValueError(f"{name!r} is defined as neither a tensor nor a dict of tensors")
        if (kind == "tensor" and entries.keys() != {""}) or not name or name.startswith("#"):
            raise ValueError(f"{name!r} is defined as something that cannot be")
        domains, shapes, dtypes = {}, {}, {}
        for key, entry in entries.items():
            try:
                domain, shapes[key], dtypes[key] = entry
                domains[key] = _checked_domain(name, domain)
                _check_tensor(shapes[key], dtypes[key])
            except (TypeError, KeyError, ArithmeticError, ValueError) as error:
                raise ValueError(f"entry {key!r} of {name!r} is not defined: {error}") from error
        return cls(name, kind, domains, {k: tuple(s) for k, s in shapes.items()}, dtypes)


def _check_name(name: str, key: str, kind: str) -> None:
    """Refuse a name, or the key of an entry, under which nothing could be stored."""
    whole = name if not key else f"{name}/{key}"
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise HyperparameterError(
            f"Hyperparameter {whole[:60]!r} has a name without UTF-8 encoding ({error.reason}: a half of "
            "a surrogate pair, say). Rename it."
        ) from None
    if kind == "float":
        return
    if key == "__metadata__":
        raise HyperparameterError(
            f"Hyperparameter {name!r}: an entry cannot be named '__metadata__', which is reserved by "
            "safetensors. Rename it."
        )
    for text in (name, key):
        if len(text) > _MAX_NAME_BYTES // 12 and len(json.dumps(text)) > _MAX_NAME_BYTES:
            raise HyperparameterError(
                f"Hyperparameter {text[:60]!r}... has a name of {len(text)} characters, which take "
                f"{len(json.dumps(text))} bytes as JSON; the limit is {_MAX_NAME_BYTES}. Use a shorter "
                "one."
            )


def _checked_domain(name: str, data: dict[str, Any]) -> Domain:
    for field_name in ("low", "high", "unit"):
        if type(data[field_name]) not in (int, float, type(None)):
            raise ValueError(f"{field_name!r} is no number")
    if type(data["log"]) is not bool:
        raise ValueError("'log' is neither true nor false")
    domain = Domain.from_json(data)
    domain.check(name)
    return domain


def _check_tensor(shape: Any, dtype: Any) -> None:
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError("its shape is not a list of non-negative integers of 64 bits")
    if not dtype_named(dtype).is_floating_point:
        raise ValueError(f"{dtype} is no floating-point dtype")


_KINDS = {"float": "number", "tensor": "tensor", "tree": "dict of tensors"}


def domain_of(name: str, distribution: BaseDistribution) -> Domain:
    if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
        raise HyperparameterError(
            f"Hyperparameter {name!r} is {distribution}, which has no hypergradient; suggest it with "
            "suggest_float and without step=."
        )
    return Domain(distribution.low, distribution.high, distribution.log)


@dataclass
class PointSpace:
    """The continuous hyperparameters of one trajectory, as named tensors in internal coordinates.

    Numbers with equal domains are one float64 vector, so that a thousand of them cost a handful of
    tensor operations.

    Args:
        floats: Domain of each number.
        tensors: Definition of each tensor or dict of tensors.
    """

    floats: dict[str, Domain]
    tensors: dict[str, Definition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = sorted(self.floats)
        groups: dict[Domain, list[int]] = {}
        for i, name in enumerate(self.names):
            groups.setdefault(self.floats[name], []).append(i)
        self.domains: dict[str, Domain] = {}
        self._index: dict[str, np.ndarray] = {}
        for i, (domain, members) in enumerate(groups.items()):
            self.domains[f"#float:{i}"] = domain
            self._index[f"#float:{i}"] = np.array(members)
        self.lower: Bounds = {}
        self.upper: Bounds = {}
        for definition in self.tensors.values():
            for key, domain in definition.domains.items():
                self.domains[definition.flat(key)] = domain
        for name, domain in self.domains.items():
            self.lower[name], self.upper[name] = domain.internal_bounds()

    def why_not(self, point: Params) -> str | None:
        """In words, why ``point`` is no point of this space; ``None`` where it is one."""
        if point.keys() != self.domains.keys():
            odd = sorted(point.keys() ^ self.domains.keys())[:3]
            return f"its entries {odd} are not those of the trajectory"
        like: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            k: ((len(i),), torch.float64) for k, i in self._index.items()
        }
        for d in self.tensors.values():
            like |= {d.flat(k): (d.shapes[k], dtype_named(d.dtypes[k])) for k in d.domains}
        for name, (shape, dtype) in like.items():
            if tuple(point[name].shape) != shape or point[name].dtype != dtype:
                found = f"{tuple(point[name].shape)} {point[name].dtype}"
                return f"its entry {name!r} is {found} and not {shape} {dtype}"
        return None

    def pack(self, array: np.ndarray) -> Params:
        """Numbers in the order of ``names`` -> vectors, one for each domain."""
        return {k: torch.from_numpy(array[i]) for k, i in self._index.items()}

    def unpack(self, point: Mapping[str, Tensor]) -> np.ndarray:
        array = np.empty(len(self.names))
        for k, i in self._index.items():
            array[i] = point[k].numpy()
        return array

    def array(self, values: Mapping[str, Any], missing: float = math.nan) -> np.ndarray:
        return np.array([float(values.get(n, missing)) for n in self.names], dtype=np.float64)

    def to_internal(self, external: Params) -> Params:
        return {k: self.domains[k].to_internal(v) for k, v in external.items()}

    def to_external(self, point: Params) -> Params:
        return {k: self.domains[k].to_external(v) for k, v in point.items()}

    def internal_gradient(self, gradient: Params, external: Params) -> Params:
        return {k: self.domains[k].internal_gradient(g, external[k]) for k, g in gradient.items()}

    def float_values(self, external: Params) -> dict[str, float]:
        """External numbers by name: Python floats inside the bounds."""
        return dict(zip(self.names, self.unpack(external).tolist(), strict=True))

    def tensor_values(self, external: Params) -> Params:
        return {k: v for k, v in external.items() if k not in self._index}


def nested(definition: Definition, flat: Mapping[str, Tensor]) -> Tensor | Params:
    """A hyperparameter's own entries out of a flat dict: a tensor, or a dict of tensors."""
    if definition.kind == "tree":
        return {k: flat[definition.flat(k)] for k in definition.domains}
    return flat[definition.name]


def flatten(definition: Definition, value: Tensor | Mapping[str, Tensor]) -> Params:
    if isinstance(value, Mapping):
        return {definition.flat(k): v for k, v in value.items()}
    return {definition.name: value}


def place(state: Params, point: Params) -> Params:
    """State tensors on the devices of the entries that they are named after."""
    placed = {}
    for name, tensor in state.items():
        owner = next((p for n, p in point.items() if name == n or name.endswith("/" + n)), None)
        placed[name] = tensor if owner is None else tensor.to(owner.device)
    return placed


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise HyperparameterError(f"{name!r} is not a torch dtype.")
    return _DTYPES[name]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)

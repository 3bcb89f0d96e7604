"""A sub-package's methods by name, read off the classes that its ``__init__`` imports."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def registry(base: type[T], namespace: Mapping[str, Any]) -> Mapping[str, type[T]]:
    """Map ``cls.name -> cls`` for every concrete subclass of ``base`` in ``namespace``.

    Importing a class into the sub-package's ``__init__`` is the only act of registration.

    Raises:
        TypeError: if a class has no ``name``, or two classes share one.
    """
    found: dict[str, type[T]] = {}
    for candidate in namespace.values():
        if not (inspect.isclass(candidate) and issubclass(candidate, base)):
            continue
        if inspect.isabstract(candidate) or candidate is base:
            continue
        name = getattr(candidate, "name", None)
        if not isinstance(name, str):
            raise TypeError(f"{candidate.__name__} needs a class attribute `name: ClassVar[str]`.")
        if found.setdefault(name, candidate) is not candidate:
            raise TypeError(f"{candidate.__name__} and {found[name].__name__} are both {name!r}.")
    return MappingProxyType(found)


def look_up(registered: Mapping[str, type[T]], name: str, kind: str) -> type[T]:
    """The class registered as ``name``; a ``ValueError`` that lists the names otherwise."""
    try:
        return registered[name]
    except KeyError:
        known = ", ".join(repr(n) for n in sorted(registered))
        raise ValueError(f"There is no {kind} named {name!r}; there are {known}.") from None

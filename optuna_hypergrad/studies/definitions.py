"""One name, one hyperparameter: what trials of a study say of it has to agree."""

from __future__ import annotations

from .._errors import HyperparameterError
from .ledger import Ledger
from .points import Definition, PointSpace, domain_of


def check_definition(
    ledger: Ledger, space: PointSpace | None, definition: Definition, trial: int
) -> None:
    """Refuse a continuous hyperparameter that earlier trials of the study define otherwise.

    Args:
        space: Of the trajectory that the trial goes on with, where shapes have to agree as well.
        definition: By the trial with the number ``trial``.

    Raises:
        HyperparameterError: if they do.
    """
    name = definition.name
    if definition.kind == "float":
        old = ledger.distributions.get(name)
        if name not in ledger.owned or old is None:
            before = ledger.definitions.get(name)
        else:
            before = Definition.of_float(name, domain_of(name, old))
    else:
        before = ledger.definitions.get(name)
        if before is None and name in ledger.distributions:
            raise HyperparameterError(
                f"Hyperparameter {name!r} is a number in earlier trials of this study and a tensor in trial "
                f"{trial}; give it another name."
            )
        if space is not None:
            before = space.tensors.get(name, before)
    shapes = definition.kind != "float" and space is not None
    difference = None if before is None else before.difference(definition, shapes)
    if difference is not None:
        raise HyperparameterError(
            f"Hyperparameter {name!r} is defined otherwise than in earlier trials of this study: {difference}. "
            "Give it another name, or start another study."
        )

"""Which layers of a network a preconditioner covers, and what they are fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import _tree
from .._errors import RequirementError
from .._typing import Batch, Params
from ..operators import Flattener, InnerGraph


@dataclass
class Layer:
    """A ``Linear`` or ``Conv2d`` layer, and what one run of the model has shown of it.

    Attributes:
        name: Of the layer in the model.
        module: The layer.
        weight, bias: Names of its inner parameters; no bias where it has none, or a fixed one.
        shape: Of the weight.
        dtype: To accumulate in.
        square: ``(inputs, inputs)``, the sum of ``a a^T`` over places, a 1 appended for the bias.
        places: How many: samples, times positions in each.
        outputs: Per call, as the layer returned them.
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None
    shape: torch.Size
    dtype: torch.dtype
    square: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    places: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.shape.numel() + (self.shape[0] if self.bias is not None else 0)

    def see(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook. What goes on is a copy: an activation in place would change what is kept."""
        rows = self._input_rows(arguments[0].detach()).to(self.dtype)
        if self.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        self.square = rows.mT @ rows + self.square.to(rows)
        self.places += len(rows)
        self.outputs.append(output)
        return output.clone()

    def _input_rows(self, given: Tensor) -> Tensor:
        module = self.module
        if isinstance(module, nn.Linear):
            return given.reshape(-1, given.shape[-1])
        assert isinstance(module, nn.Conv2d)
        if given.ndim == 3:
            given = given[None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(given, module._reversed_padding_repeated_twice, mode)
        columns = nn.functional.unfold(
            padded, module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return columns.mT.reshape(-1, columns.shape[1])

    def rows_of(self, gradient: Tensor) -> Tensor:
        """``(places, outputs)`` of a gradient by an output."""
        if isinstance(self.module, nn.Linear):
            return gradient.reshape(-1, gradient.shape[-1])
        if gradient.ndim == 3:
            gradient = gradient[None]
        return gradient.movedim(1, -1).reshape(-1, gradient.shape[1])

    def matrix(self, parts: Params) -> Tensor:
        weight = parts[self.weight].reshape(self.shape[0], -1)
        return (
            weight if self.bias is None else torch.cat([weight, parts[self.bias][:, None]], dim=1)
        )

    def tensors(self, matrix: Tensor) -> Params:
        if self.bias is None:
            return {self.weight: matrix.reshape(self.shape)}
        return {self.weight: matrix[:, :-1].reshape(self.shape), self.bias: matrix[:, -1]}


class Settings(Protocol):
    """What a preconditioner has to say about the network."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def inputs(self) -> Callable[[Batch], Any]: ...
    @property
    def prefix(self) -> str: ...
    @property
    def uncovered(self) -> str: ...


AnyLayer = TypeVar("AnyLayer", bound=Layer)


def covered_layers(settings: Settings, layout: Flattener, kind: type[AnyLayer]) -> list[AnyLayer]:
    """The layers whose weights are inner parameters.

    Raises:
        RequirementError: naming a layer or parameter that is not covered, if those are refused.
    """
    model, prefix, owner = settings.model, settings.prefix, type(settings).__name__
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    layers: list[AnyLayer] = []
    owners: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        own = {
            k: prefix + (f"{name}.{k}" if name else k)
            for k, _ in module.named_parameters(recurse=False)
        }
        ours = {k: v for k, v in own.items() if v in shapes}
        reason = _refusal(module, ours)
        if ours and reason is None:
            weight, bias = ours["weight"], ours.get("bias")
            layers.append(kind(name, module, weight, bias, shapes[weight], layout.dtype))
        owners |= {
            v: f"{type(module).__name__} {name!r} ({reason})" for v in ours.values() if reason
        }
    covered = {k for layer in layers for k in (layer.weight, layer.bias)}
    missing = [k for k in shapes if k not in covered]
    if not layers:
        known = [prefix + k for k, _ in model.named_parameters()][:3]
        raise RequirementError(
            f"{owner} covers none of the inner parameters {list(shapes)[:3]}: the model's Linear and Conv2d layers "
            f"have parameters such as {known}. Name the inner parameters as dict(model.named_parameters()) does, or set "
            f"prefix=."
        )
    if missing and settings.uncovered == "refuse":
        whose = owners.get(missing[0], "no parameter of the model")
        raise RequirementError(
            f"{owner} does not cover the inner parameter {missing[0]!r}: {whose}. Use {owner}(uncovered='identity'), which "
            f"scales it by the mean curvature, or NystromPreconditioner, which covers any model."
        )
    return layers


def _refusal(module: nn.Module, ours: dict[str, str]) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return "only Linear and Conv2d layers are covered"
    if not ours.keys() <= {"weight", "bias"}:
        return "its weights are parametrized"
    if ours and "weight" not in ours:
        return "its weight is no inner parameter"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it has {module.groups} groups"
    return None


def run_model(settings: Settings, graph: InnerGraph, layers: Sequence[Layer]) -> Tensor:
    """The model's outputs on the inner batch at the inner parameters, with each layer watched.

    Raises:
        RequirementError: if the model does not run, or a layer is not reached.
    """
    model, prefix, owner = settings.model, settings.prefix, type(settings).__name__
    given = settings.inputs(graph.batch)
    arguments = given if isinstance(given, tuple) else (given,)
    known = {prefix + k: k for k, _ in model.named_parameters()}
    values = {known[k]: v for k, v in _tree.leaves(graph.inner_params).items() if k in known}
    buffers = {k: b.detach().clone() for k, b in model.named_buffers()}
    hooks = [layer.module.register_forward_hook(layer.see) for layer in layers]
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            outputs = torch.func.functional_call(model, (values, buffers), arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RequirementError(
            f"{owner} could not run the model on inputs(batch): {type(error).__name__}: {error}. Return what the model "
            f"takes, in the dtype of the inner parameters."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(outputs, Tensor):
        raise RequirementError(
            f"{owner} needs a model that returns one tensor; this one returned a {type(outputs).__name__}. Wrap it in a "
            f"module that returns the tensor which the loss is taken of."
        )
    for layer in layers:
        if not layer.outputs:
            raise RequirementError(
                f"{owner}: the layer {layer.name!r} has inner parameters, but the model does not use it (or not by calling "
                f"it). Take them out of the inner parameters, or use NystromPreconditioner."
            )
    return outputs

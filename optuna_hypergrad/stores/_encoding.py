"""Tensors to safetensors bytes and back, bit for bit and in order.

The format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, data).
Written here, because the library's writer copies three times and refuses tensors that share
memory; read by the library, which checks what a hostile file may say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from .._errors import HyperparameterError
from .._typing import Params

_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "C64": "complex64",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, name)
}
_INT64 = 2**63
_deserialize: Any = safetensors.deserialize  # has no annotations
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


Pieces = tuple[Any, ...]
"""Bytes of a file in turn: buffers of single bytes, some of which may be the memory of a tensor."""


class TensorSpec(NamedTuple):
    """What one stored tensor claims to be."""

    name: str
    dtype: str
    """The safetensors code, such as ``"F32"``."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


class DecodeError(ValueError):
    """These bytes are not the safetensors file that they should be."""


def check_text(text: str, what: str) -> None:
    """Refuse text that is not a ``str`` or has no UTF-8 encoding (lone surrogates).

    Raises:
        HyperparameterError: naming ``what``.
    """
    if not isinstance(text, str):
        raise HyperparameterError(f"The {what} must be a str, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HyperparameterError(
            f"The {what} {text[:60]!r} has no UTF-8 encoding ({error.reason}). Rename it."
        ) from None


def encode(tensors: Params) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """One safetensors file in memory, and what it holds; as :func:`encode_in_place`."""
    pieces, specs = encode_in_place(tensors)
    return b"".join(pieces), specs


def encode_in_place(tensors: Params) -> tuple[Pieces, tuple[TensorSpec, ...]]:
    """One safetensors file, and what it holds in the order of ``tensors``, whose memory it uses.

    Any shape (0-d and empty too), device, stride and aliasing; gradients are not followed.

    Raises:
        HyperparameterError: for an entry that is not a dense tensor of a dtype that safetensors
            knows, or a name that it cannot hold.
    """
    host = {name: _to_host(name, tensor) for name, tensor in tensors.items()}
    specs = tuple(TensorSpec(n, _CODES[t.dtype], tuple(t.shape)) for n, t in host.items())
    by_alignment = sorted(specs, key=lambda s: -host[s.name].element_size())
    offsets: dict[str, list[int]] = {}
    end = 0
    for spec in by_alignment:
        offsets[spec.name] = [end, end := end + spec.num_bytes]
    header = json.dumps(
        {
            s.name: {"dtype": s.dtype, "shape": s.shape, "data_offsets": offsets[s.name]}
            for s in specs
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    data = (host[s.name].reshape(-1).view(torch.uint8).numpy().data for s in by_alignment)
    return (len(header).to_bytes(8, "little") + header, *data), specs


def cut(pieces: Pieces, num_bytes: int) -> Iterator[list[memoryview]]:
    """``num_bytes`` at a time, as the parts they are made of, which are not copied; the last may be shorter."""
    parts: list[memoryview] = []
    room = num_bytes
    for piece in pieces:
        view, start = memoryview(piece).cast("B"), 0
        while start < len(view):
            part = view[start : start + room]
            parts.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                yield parts
                parts, room = [], num_bytes
    if parts:
        yield parts


def decode(data: bytes, device: str | torch.device = "cpu") -> Params:
    """The tensors of a safetensors file, in the order of its header, on ``device``.

    Raises:
        DecodeError: if ``data`` is anything else than a well-formed file.
    """
    try:
        entries = dict(_deserialize(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        order = [name for name in header if name != "__metadata__"]
        if set(order) != set(entries):
            raise DecodeError("its header names a tensor twice")
        return {name: _to_tensor(entries[name]).to(device) for name in order}
    except DecodeError:
        raise
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,  # of torch, for a shape that it cannot make, and of Python's recursion
    ) as error:
        raise DecodeError(f"it is not a safetensors file ({error})") from error


def specs_of(tensors: Params) -> tuple[TensorSpec, ...]:
    """What decoded tensors are."""
    return tuple(TensorSpec(n, _CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items())


def parse_specs(value: Any) -> tuple[TensorSpec, ...]:
    """Specs from the JSON of a pointer. Raises ``ValueError`` for anything else."""
    specs = []
    for name, dtype, shape in value:
        if not isinstance(name, str) or dtype not in _DTYPES or not isinstance(shape, list):
            raise ValueError("a tensor needs a name, a known dtype and a shape")
        entries = 1
        for n in shape:
            if type(n) is not int or n < 0:
                raise ValueError("a shape must be a list of non-negative integers")
            entries *= max(n, 1)
            if entries >= _INT64:  # stop here: a long list of such numbers takes hours to multiply
                raise ValueError("a shape has more entries than 64 bits can count")
        specs.append(TensorSpec(name, dtype, tuple(shape)))
    return tuple(specs)


def _to_host(name: str, tensor: Tensor) -> Tensor:
    check_text(name, "tensor name")
    if name == "__metadata__":
        raise HyperparameterError(
            "A tensor cannot be named '__metadata__': safetensors reserves that name. Rename it."
        )
    if not isinstance(tensor, Tensor):
        raise HyperparameterError(
            f"{name!r} must be a torch.Tensor to be stored, not {type(tensor).__name__}. "
            "Use torch.as_tensor."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise HyperparameterError(
            f"{name!r} is sparse or quantized and cannot be stored. "
            "Use .to_dense() or .dequantize()."
        )
    if tensor.device.type == "meta":
        raise HyperparameterError(f"{name!r} is on the meta device and has no values to store.")
    if tensor.dtype not in _CODES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _CODES)
        raise HyperparameterError(
            f"{name!r} has dtype {tensor.dtype}, which safetensors does not know. "
            f"Convert it to one of {known}."
        )
    return tensor.detach().resolve_conj().resolve_neg().cpu()


def _to_tensor(entry: dict[str, Any]) -> Tensor:
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    if dtype is None:
        raise DecodeError(f"it has the unknown dtype {entry['dtype']}")
    if not entry["data"]:
        return torch.empty(shape, dtype=dtype)
    data = entry["data"] if isinstance(entry["data"], bytearray) else bytearray(entry["data"])
    return torch.frombuffer(data, dtype=dtype).reshape(shape)

"""Momentum descent in whole numbers: each step can be undone, bit for bit.

``w`` and ``v`` are whole numbers times a power of two: 64-bit integers, or those below 2^52 in float64, with which a
CPU computes in half the time. Adding to them loses nothing. Multiplying ``v`` by a momentum ``n / d`` below 1 does:
the bits that fall out go to an information buffer ``B``,

    forth   B <- B d + (v mod d);  v <- v div d;  v <- v n + (B mod n);  B <- B div n
    back    B <- B n + (v mod n);  v <- v div n;  v <- v d + (B mod d);  B <- B div d

which grows by ``log2(d / n)`` bits a step. A full one is put aside, and fetched at the same step on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._typing import Params
from ._fixed_doubles import DENOMINATOR, divide, multiply
from ._fixed_doubles import SHIFT as _SHIFT
from ._fixed_doubles import add_times as _add_times

_MASK = DENOMINATOR - 1
_FULL = 2.0**36 - 2.0**10
"""What a buffer may reach: ``B d + (v mod d)`` stays below 2^52, and 40 bits hold it."""
_LIMIT = {torch.int64: 2.0**61, torch.float64: 2.0**52}
"""Of whole numbers, and of what is added to them, so that every sum is exact."""
_ROOM = 6
"""Bits left above the first velocity, and above a later one that did not fit any more."""
_PART = 1 << 17
"""Entries that each thread of a CPU works on at once, in some ten passes: 1 MB of each of the tensors."""
_FINEST = 100
"""Scale of a velocity of zero; float32 holds its power of two."""


class OutOfRangeError(Exception):
    """A number does not fit: ``value`` is infinite or NaN, or too large for the scale."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


class NotReversedError(Exception):
    """The way back has not met what the way forth had left."""


@dataclass(frozen=True)
class Rational:
    """A momentum ``n / d`` for each inner parameter.

    Attributes:
        numerators: ``n``: a number, or 1-D with as many entries as the parameter.
        smallest: Of them, by parameter.
        largest: Of all of them.
    """

    numerators: dict[str, int | Tensor]
    smallest: dict[str, int]
    largest: int


@dataclass(frozen=True)
class _Full:
    """The buffer of one tensor before a step, in 40 bits an entry."""

    position: int
    name: str
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class _Shifted:
    """The lowest bits of all velocities, cut off at a step."""

    position: int
    num_bits: int
    cut_off: Params


class FixedPoint:
    """Where a momentum descent is, exactly. Steps forth and back must be called in pairs, last first.

    Where all is float32 or narrower it begins in float64, and goes on in integers when ``w`` grows out of 52 bits.

    Args:
        inner_params: ``w_0``.
        velocity: ``v_0``.
        fraction_bits: ``w`` is held in multiples of ``2^-fraction_bits``. The scale of ``v`` adapts itself.
    """

    def __init__(self, inner_params: Params, velocity: Params, fraction_bits: int) -> None:
        self._w0, self._v0 = _tree.clone(inner_params), _tree.clone(velocity)
        self._bits = fraction_bits
        self._device = next(iter(inner_params.values())).device
        self._chunk = max(v.numel() for v in inner_params.values()) or 1
        if self._device.type == "cpu":
            self._chunk = min(self._chunk, _PART * torch.get_num_threads())
        self._scratch = torch.empty(self._chunk, dtype=torch.int64, device=self._device)
        self._wide = torch.empty(self._chunk, dtype=torch.float64, device=self._device)
        self._narrow = all(v.dtype.itemsize < 8 for v in (*self._w0.values(), *self._v0.values()))
        self.restart()

    def restart(self) -> None:
        """Go to the start.

        Raises:
            OutOfRangeError: if ``w_0`` does not fit.
        """
        self._w_bound, self._v_bound = _largest(self._w0), _largest(self._v0)
        self._whole = torch.float64
        if not (self._narrow and self._fits(self._w_bound)):
            self._whole = torch.int64
        if not self._fits(self._w_bound):
            raise OutOfRangeError(self._w_bound)
        self._v_bits = self._bits_for(self._v_bound)
        self._w = {k: self._encode(v, self._bits) for k, v in self._w0.items()}
        self._v = {k: self._encode(v, self._v_bits) for k, v in self._v0.items()}
        self._buffers = {k: torch.zeros_like(v) for k, v in self._v.items()}
        self._seen_w: Params | None = None
        self._seen_v: Params | None = None
        self._fill = dict.fromkeys(self._w, 0.0)
        self._full: list[_Full] = []
        self._shifted: list[_Shifted] = []

    def inner_params(self) -> Params:
        """``w``, in new tensors of the dtypes of ``w_0``, not to be written to."""
        if self._seen_w is None:
            self._seen_w = {k: _decode(self._w[k], self._bits, u) for k, u in self._w0.items()}
        return self._seen_w

    def velocity(self) -> Params:
        """``v``, likewise."""
        if self._seen_v is None:
            self._seen_v = {k: _decode(self._v[k], self._v_bits, u) for k, u in self._w0.items()}
        return self._seen_v

    def levels(self) -> float:
        """How many steps of the resolution lie below what ``w`` can have reached; infinite if it has not moved."""
        return self._w_bound * 2.0**self._bits or math.inf

    def num_bytes_aside(self) -> int:
        """Of what was put aside so far: all that grows with the number of steps."""
        full = [t for f in self._full for t in (f.low, f.high)]
        cut_off = [t for s in self._shifted for t in s.cut_off.values()]
        return sum(t.numel() * t.element_size() for t in (*full, *cut_off))

    def push(self, direction: Params, momentum: Rational, position: int) -> None:
        """``v <- momentum * v + direction``.

        Raises:
            OutOfRangeError: if ``direction`` is not finite.
        """
        bound = self._v_bound * momentum.largest / DENOMINATOR + _largest(direction)
        if not math.isfinite(bound):
            raise OutOfRangeError(bound)
        for k, smallest in momentum.smallest.items():
            growth = DENOMINATOR / smallest
            if (self._fill[k] + 1) * growth > _FULL:
                buffer = self._buffers[k]
                bits = buffer.to(torch.int64)
                self._full.append(
                    _Full(position, k, bits.to(torch.int32), (bits >> 32).to(torch.int8))
                )
                self._buffers[k], self._fill[k] = torch.zeros_like(buffer), 0.0
            self._fill[k] = (self._fill[k] + 1) * growth
        if bound * 2.0**self._v_bits > _LIMIT[self._whole]:
            self._coarsen(self._v_bits - self._bits_for(bound), position)
        self._v_bound = bound
        self._seen_v = None
        for k, n in momentum.numerators.items():
            for (v, buffer, part), m in self._parts(n, self._v[k], self._buffers[k], direction[k]):
                a = self._scratch[: len(v)]
                if self._whole is torch.int64:
                    _multiply(v, buffer, m, a)
                else:
                    multiply(v, buffer, m, a.view(self._whole))
                v.add_(self._rounded(part, 2.0**self._v_bits))

    def unpush(self, direction: Params, momentum: Rational, position: int) -> None:
        """Undo :meth:`push`.

        Raises:
            NotReversedError: if a buffer should be empty now, and is not.
        """
        self._seen_v = None
        for k, n in momentum.numerators.items():
            for (v, buffer, part), m in self._parts(n, self._v[k], self._buffers[k], direction[k]):
                a = self._scratch[: len(v)]
                v.sub_(self._rounded(part, 2.0**self._v_bits))
                if self._whole is torch.int64:
                    _divide(v, buffer, m, a)
                else:
                    divide(v, buffer, m, a.view(self._whole))
        while self._shifted and self._shifted[-1].position == position:
            shifted = self._shifted.pop()
            self._v_bits += shifted.num_bits
            for k, v in self._v.items():
                if self._whole is torch.int64:
                    v.bitwise_left_shift_(shifted.num_bits).bitwise_or_(shifted.cut_off[k])
                else:
                    v.mul_(2.0**shifted.num_bits).add_(shifted.cut_off[k])
        while self._full and self._full[-1].position == position:
            full = self._full.pop()
            if bool(self._buffers[full.name].any()):
                raise NotReversedError
            low = full.low.to(torch.int64).bitwise_and_(0xFFFFFFFF)
            bits = full.high.to(torch.int64).bitwise_left_shift_(32) + low
            self._buffers[full.name] = bits.to(self._whole)

    def move(self, step: Params | float) -> None:
        """``w <- w - step``; ``w - step v`` where it is a number.

        Raises:
            OutOfRangeError: if ``w`` leaves its range.
        """
        length = step * self._v_bound if isinstance(step, float) else _largest(step)
        if not self._fits(self._w_bound + length):  # as far as bounds can tell
            if isinstance(step, float):
                length = step * (_largest(self._v) * 2.0**-self._v_bits)
            self._w_bound = _largest(self._w) * 2.0**-self._bits
        if not self._fits(self._w_bound + length):
            self._go_on_in_integers()
        self._w_bound += length
        if not self._fits(self._w_bound):
            raise OutOfRangeError(self._w_bound)
        self._add(step, -1.0)

    def unmove(self, step: Params | float) -> None:
        """Undo :meth:`move`."""
        self._add(step, 1.0)

    def _add(self, step: Params | float, sign: float) -> None:
        self._seen_w = None
        if isinstance(step, float):
            steps, factor = self._v, math.ldexp(sign * step, self._bits - self._v_bits)
        else:
            steps, factor = step, sign * 2.0**self._bits
        for k, tensor in steps.items():
            for (w, part), _ in self._parts(1, self._w[k], tensor):
                w.add_(self._rounded(part, factor))

    def check_start(self) -> None:
        """See that everything is as it was before the first step, bit for bit.

        Raises:
            NotReversedError: if it is not.
        """
        for k, w0 in self._w0.items():
            arrived = (
                torch.equal(self._w[k], self._encode(w0, self._bits))
                and torch.equal(self._v[k], self._encode(self._v0[k], self._v_bits))
                and not bool(self._buffers[k].any())
            )
            if not arrived:
                raise NotReversedError

    def _parts(
        self, n: int | Tensor, *tensors: Tensor
    ) -> Iterator[tuple[list[Tensor], int | Tensor]]:
        """The tensors as vectors, in parts; and the part of ``n``."""
        flat = [t.reshape(-1) for t in tensors]
        for start in range(0, flat[0].numel(), self._chunk):
            part = slice(start, min(start + self._chunk, flat[0].numel()))
            yield [t[part] for t in flat], n if isinstance(n, int) else n[part]

    def _rounded(self, part: Tensor, factor: float) -> Tensor:
        """``factor`` times what is smaller than a chunk, as whole numbers, where the next ones will be."""
        wide = self._wide[: len(part)]
        if part.dtype == wide.dtype:
            torch.mul(part, factor, out=wide)
        else:
            wide.copy_(part).mul_(factor)
        wide.round_()
        return wide if self._whole is wide.dtype else self._scratch[: len(part)].copy_(wide)

    def _encode(self, value: Tensor, bits: int) -> Tensor:
        """Without a negative zero, which no step back would lead to."""
        return (value.double().reshape(-1) * 2.0**bits).round_().add_(0.0).to(self._whole)

    def _fits(self, bound: float) -> bool:
        """Whether ``w`` may reach ``bound``."""
        return bound * 2.0**self._bits <= _LIMIT[self._whole]

    def _go_on_in_integers(self) -> None:
        """All numbers are the same, and so are the steps back."""
        self._whole = torch.int64
        for numbers in (self._w, self._v, self._buffers):
            numbers.update({k: v.to(self._whole) for k, v in numbers.items()})

    def _bits_for(self, bound: float) -> int:
        """The finest scale of ``v`` that leaves room above ``bound``."""
        if bound == 0:
            return _FINEST
        limit = math.log2(_LIMIT[self._whole])
        return min(_FINEST, math.floor(limit - _ROOM - math.log2(bound)))

    def _coarsen(self, num_bits: int, position: int) -> None:
        # A bound decays to zero in time; what rounding has left in the velocities does not.
        if self._v_bound > 0 or any(bool(v.any()) for v in self._v.values()):
            most = 62 if self._whole is torch.int64 else 50
            for part in (most,) * (num_bits // most) + (num_bits % most,):
                kept_as = torch.int8 if part < 8 else torch.int64
                cut_off = {k: _cut(v, part).to(kept_as) for k, v in self._v.items()}
                self._shifted.append(_Shifted(position, part, cut_off))
        self._v_bits -= num_bits


def _cut(v: Tensor, num_bits: int) -> Tensor:
    """Cut the lowest bits off, in place, and give them."""
    if v.dtype == torch.int64:
        cut_off = v & ((1 << num_bits) - 1)
        v.bitwise_right_shift_(num_bits)
        return cut_off
    before = v.clone()
    return before.sub_(v.mul_(2.0**-num_bits).floor_(), alpha=2.0**num_bits)


def _multiply(v: Tensor, buffer: Tensor, n: int | Tensor, a: Tensor) -> None:
    """``v <- v n / d``, in place. ``a`` is overwritten."""
    buffer.bitwise_left_shift_(_SHIFT).bitwise_or_(torch.bitwise_and(v, _MASK, out=a))
    torch.div(buffer, n, rounding_mode="trunc", out=a)  # a buffer is never negative
    _add_times(buffer, v.bitwise_right_shift_(_SHIFT).sub_(a), n, out=v)  # v n + (B - a n)
    buffer.copy_(a)


def _divide(v: Tensor, buffer: Tensor, n: int | Tensor, a: Tensor) -> None:
    """``v <- v d / n``: undoes :func:`_multiply`."""
    above = (1 << 62) // n
    torch.div(
        torch.add(v, above * n, out=a), n, rounding_mode="trunc", out=a
    )  # not negative: faster
    a.sub_(above)
    _add_times(v, buffer.sub_(a), n, out=buffer)  # B n + (v - a n)
    torch.bitwise_left_shift(a, _SHIFT, out=v)
    v.bitwise_or_(torch.bitwise_and(buffer, _MASK, out=a))
    buffer.bitwise_right_shift_(_SHIFT)


def _decode(numbers: Tensor, bits: int, like: Tensor) -> Tensor:
    wide = numbers.to(torch.promote_types(like.dtype, torch.float32))
    return wide.mul_(2.0**-bits).to(like.dtype).reshape(like.shape)


def _largest(tree: Params) -> float:
    """The largest magnitude of all entries; NaN where there is one."""
    ends = [e.double() for v in tree.values() if v.numel() for e in torch.aminmax(v)]
    return torch.stack(ends).abs().max().item() if ends else 0.0

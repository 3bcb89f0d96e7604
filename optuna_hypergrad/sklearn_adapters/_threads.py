"""One thread for fits that are too small for many."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from ._process_wide import ProcessWide

_THREADS = ProcessWide(torch.get_num_threads, torch.set_num_threads)


@functools.cache
def _libraries() -> list[Any]:
    """Of linear algebra, as NumPy and SciPy have loaded them."""
    found = ThreadpoolController().lib_controllers
    return [library for library in found if library.user_api == "blas"]


def _set_blas_threads(numbers: list[int]) -> None:
    for library, number in zip(_libraries(), numbers, strict=True):
        library.set_num_threads(number)


_BLAS_THREADS = ProcessWide(
    lambda: [library.get_num_threads() for library in _libraries()], _set_blas_threads
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Fits of this size are faster on one thread of torch (and BLAS) than on many."""
    with _THREADS.changed(lambda now: 1), _BLAS_THREADS.changed(lambda now: [1] * len(now)):
        yield

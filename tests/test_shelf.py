"""Tensors in blocks of memory: equal copies, which nothing else writes to."""

from __future__ import annotations

import torch
from problems import randn

from optuna_hypergrad.hypergradients._shelf import Shelf


def test_copies_are_equal_and_stand_alone() -> None:
    shelf = Shelf(1e6)
    tensors = [
        randn(70, 30, seed=1),
        randn(2001, seed=2).float(),
        torch.arange(5000),
        randn(60, 40, seed=3).T,
        randn(3, seed=4),
        randn(400, 1000, seed=5),  # more than was foreseen
    ]
    copies = [shelf.put(t) for t in tensors]
    known = [t.clone() for t in tensors]
    for i in (0, 1, 2, 4):
        tensors[i].zero_()
    for copy, truth in zip(copies, known, strict=True):
        assert copy.dtype == truth.dtype
        assert torch.equal(copy, truth)
    assert copies[3] is tensors[3]
    assert (
        copies[4].data_ptr() - copies[2].data_ptr() == 8 * 5000
    )  # small ones lie beside the others

"""What a sampler may be set to."""

from __future__ import annotations

from optuna.samplers import BaseSampler, BruteForceSampler


def check_settings(
    base_sampler: BaseSampler | None,
    start: str,
    slice_steps: int,
    reduction: int,
    max_steps: int | None,
    patience: int | None,
    lease: float | None,
    publish: bool,
    seed: int | None,
) -> None:
    """Refuse arguments of ``HypergradientSampler`` that mean nothing.

    Raises:
        TypeError: if ``base_sampler`` is no sampler.
        ValueError: for settings out of range.
    """
    if base_sampler is not None and not isinstance(base_sampler, BaseSampler):
        raise TypeError(
            f"base_sampler={base_sampler!r} is not an Optuna sampler; give e.g. TPESampler()."
        )
    if isinstance(base_sampler, BruteForceSampler):
        raise ValueError(
            "BruteForceSampler reads every trial of a study as one branch of its tree, and this sampler "
            "shows one trial per trajectory. Use GridSampler, or TPESampler()."
        )
    if start not in ("best", "base", "init", "given"):
        raise ValueError(f'start={start!r} is not "best", "base", "init" or "given".')
    for name, number, least in (
        ("slice_steps", slice_steps, 1),
        ("reduction", reduction, 2),
        ("max_steps", max_steps, 1),
        ("patience", patience, 1),
    ):
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(f"{name}={number!r} must be an integer of at least {least}.")
    is_number = isinstance(lease, (int, float)) and not isinstance(lease, bool)
    if lease is not None and not (is_number and lease > 0):
        raise ValueError(f"lease={lease!r} must be a positive number of seconds, math.inf or None.")
    if not isinstance(publish, bool):
        raise ValueError(f"publish={publish!r} must be True or False.")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError(f"seed={seed!r} must be a non-negative integer or None.")

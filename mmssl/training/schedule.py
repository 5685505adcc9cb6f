"""Schedules as pure functions of the step, so that a resumed run needs no state for them."""

import math


def learning_rate(step: int, total: int, warmup: int, peak: float, least: float = 0.0, shape: str = "cosine") -> float:
    """Linear warm-up to ``peak`` over the first ``warmup`` steps, then down to ``least`` at step ``total``.

    Args:
        step: number of optimiser steps that are done, from 0.
        total: number of optimiser steps of the run.
        warmup: steps of warm-up; step 0 gets ``peak / warmup``, not 0.
        peak: greatest learning rate.
        least: last learning rate.
        shape: "cosine" (Loshchilov and Hutter, 2017) or "linear".
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done
    return least + (peak - least) * share


def weight_decay(step: int, total: int, start: float, end: float | None) -> float:
    """From ``start`` to ``end`` as a half cosine (Assran et al., I-JEPA, 2023); without an end it stays."""
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

"""Schedules as pure functions of the step, so that a resumed run needs no state for them."""

import math

from mmssl.training.arguments import TrainArguments


def rate_at(step: int, train: TrainArguments, total: int, planned: int) -> float:
    """The learning rate that the flags ask for.

    Args:
        step: number of optimiser steps that are done, from 0.
        train: the flags.
        total: number of optimiser steps of the run.
        planned: of how many steps the run was when it began. "wsd" and "infinite" warm up and cool down over shares of
            these, so that a run that is resumed to be longer has had the learning rates it should have had.
    """
    peak, least, shape = train.learning_rate, train.min_learning_rate, train.lr_scheduler_type
    anneal = anneal_step(train, total)
    if anneal is None:
        return learning_rate(step, total, round(train.warmup_ratio * total), peak, least, shape)
    warmup = round(train.warmup_ratio * planned)
    if shape == "wsd":
        return wsd(step, warmup, anneal, total, peak, least)
    constant = peak / 10 if train.constant_learning_rate is None else train.constant_learning_rate
    return infinite(step, warmup, round(train.cooldown_until * planned), anneal, total, peak, constant, least)


def anneal_step(train: TrainArguments, total: int) -> int | None:
    """Steps that are done when the anneal of "wsd" and "infinite" begins; the other schedules have none."""
    return round(train.constant_until * total) if train.lr_scheduler_type in ("wsd", "infinite") else None


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


def check_length(train: TrainArguments, step: int, planned: int, before: int, total: int) -> None:
    """Refuse to make a resumed run so long or so short that its anneal would begin in the past, or twice.

    Args:
        train: the flags.
        step: where the checkpoint stands.
        planned: of how many steps the run was when it began.
        before: of how many steps it was when the checkpoint was written.
        total: of how many steps it is now.

    Raises:
        ValueError: says where the anneals begin, and what to do.
    """
    old, new = anneal_step(train, before), anneal_step(train, total)
    if old is None or new is None or before == total:
        return
    if step > min(old, new):
        advice = f"resume from step_{old}, which was kept for this" if old < new else "choose more steps"
        raise ValueError(
            f"max_train_steps: found {total}, with which the anneal begins after step {new}, for a run of {before} "
            f"steps whose anneal begins after step {old} and which stands at step {step}; {advice}"
        )
    cooldown = round(train.cooldown_until * planned) if train.lr_scheduler_type == "infinite" else 0
    if new < max(cooldown, round(train.warmup_ratio * planned)):
        raise ValueError(
            f"max_train_steps: found {total}, with which the anneal begins after step {new}; but this run, which began "
            f"with {planned} steps, warms up and cools down over shares of these, until later: choose more steps"
        )


def wsd(step: int, warmup: int, anneal: int, total: int, peak: float, least: float = 0.0) -> float:
    """Warm-up, stable, decay (Hu et al., MiniCPM, 2024): linear to ``peak``, constant, linear to ``least``.

    Args:
        step: number of optimiser steps that are done, from 0.
        warmup: steps of warm-up.
        anneal: step at which the decay begins.
        total: step at which ``least`` is reached.
        peak: greatest learning rate.
        least: last learning rate.
    """
    if step < anneal:
        return learning_rate(step, total, warmup, peak, least=peak)
    return learning_rate(step - anneal, total - anneal, 0, peak, least, shape="linear")


def infinite(
    step: int, warmup: int, cooldown: int, anneal: int, total: int, peak: float, constant: float, least: float
) -> float:
    """The infinite schedule (Singh, Janson et al., CoLLAs 2025): nothing before its anneal depends on the run's length.

        step < warmup      linear to peak
        step < cooldown    half a cosine from peak to constant
        step < anneal      constant
        from there         constant * (least / constant) ** ((step - anneal) / (total - anneal))

    Args:
        step: number of optimiser steps that are done, from 0.
        warmup: step at which the warm-up ends; step 0 gets ``peak / warmup``, not 0.
        cooldown: step at which the cooldown ends.
        anneal: step at which the anneal begins.
        total: step at which ``least`` is reached.
        peak: greatest learning rate.
        constant: learning rate between cooldown and anneal.
        least: last learning rate, above 0.
    """
    if step < cooldown:
        return learning_rate(step, cooldown, warmup, peak, least=constant)
    return constant * (least / constant) ** min(max(step - anneal, 0) / max(total - anneal, 1), 1.0)


def weight_decay(step: int, total: int, start: float, end: float | None) -> float:
    """From ``start`` to ``end`` as a half cosine (Assran et al., I-JEPA, 2023); without an end it stays."""
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))

"""How a pretraining run is doing: what its features are worth now, beside those that it began with, and a verdict.

The loss alone does not tell: it falls when features collapse, too. So now and then the encoder, in evaluation mode,
reads a few fixed samples of the training data, and nothing else of the run is touched: no random number is drawn from
it, and nothing is trained. ``docs/health.md`` has the rules in words.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from tqdm.auto import tqdm

from mmssl.data import PreparedSamples
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.monitors import effective_rank, relative_spread, similarities
from mmssl.objectives.base import Objective
from mmssl.randomness import seed_of
from mmssl.tokens import Tokens
from mmssl.training.arguments import TrainArguments
from mmssl.training.metrics import MEASURING
from mmssl.training.streams import Stream

MOST = 256  # rows that are measured
SHOWN = 8  # samples in a picture
MOST_VIEWED = 64  # samples of which two views are compared
MOST_CLASSES, LEAST_LABELS = 10, 10  # classes that are probed, and labels that each of them has at least
FEWEST = 32  # with fewer samples, rows are tokens: a scene or a graph is one sample
MOST_BYTES = 2**28  # of prepared samples that are kept in memory, as far as FEWEST allow

FIRST_STEPS = 50  # before these, and before the warm-up is over, it is too early to say
LEARNT = 0.95  # of what the mean scores: a loss below it has learnt more than the mean
# Shares of what was measured at the start; less is a collapse:
FLAT, FLATTER = 1 / 5, 1 / 20  # of the spread: where the loss has learnt nothing, and in any case
NARROW = 1 / 3  # of the directions beyond the first one, unless the loss or a probe has learnt something
FORGOTTEN = 1 / 2  # of what the probes know beyond guessing


@dataclass
class Verdict:
    """What the measurements say, and why: "healthy", "collapsing" or "too early"."""

    verdict: str
    why: str


def judge(history: Sequence[dict[str, float]], warmup_steps: int) -> Verdict:
    """The verdict on the last of a run's measurements; the first one is of the encoder that the run began with.

    Args:
        history: of each measurement ``step``, ``std``, ``rank`` and, where they are known, ``knn``, ``linear`` and
            ``guess``, which is what guessing scores, and ``loss_over_trivial``.
        warmup_steps: steps over which the learning rate rises.
    """
    start, now = history[0], history[-1]
    if now["step"] < (first := max(FIRST_STEPS, warmup_steps)):
        return Verdict("too early", f"nothing is said before step {first}, nor before the warm-up is over")
    ratio = now.get("loss_over_trivial")
    probes = [name for name in ("knn", "linear") if name in now and name in start]
    if not now["std"] >= FLATTER * start["std"] or (
        now["std"] < FLAT * start["std"] and ratio is not None and ratio > LEARNT
    ):
        return Verdict(
            "collapsing",
            f"samples differ hardly any more (std {now['std']:.3g}, {start['std']:.3g} at the start): lower "
            "train.learning_rate, or raise a teacher's momentum, the batch or the weight of what keeps features apart",
        )
    learnt = (ratio is not None and ratio < LEARNT) or any(now[name] > start[name] for name in probes)
    if not now["rank"] - 1 >= NARROW * (start["rank"] - 1) and not learnt:
        return Verdict(
            "collapsing",
            f"features use few directions (rank {now['rank']:.3g}, {start['rank']:.3g} at the start): raise the weight "
            "of what decorrelates them or the number of negatives, or lower train.learning_rate",
        )
    known = [name for name in probes if start[name] > start["guess"]]
    if known and all(now[name] - now["guess"] < FORGOTTEN * (start[name] - start["guess"]) for name in known):
        scores = ", ".join(f"{name} {now[name]:.3f}, {start[name]:.3f} at the start" for name in known)
        return Verdict(
            "collapsing",
            f"labels are told far worse than at the start ({scores}): the objective is met without what they need; "
            "make views or masks harder, or lower train.learning_rate",
        )
    if ratio is not None and ratio > LEARNT:
        return Verdict("too early", f"the loss is {ratio:.3g} times what predicting the mean scores")
    return Verdict("healthy", "nothing points to a collapse")


class Health:
    """Measures a run at its first step, at every ``health_steps`` and at its last one; its history is in checkpoints.

    All processes read the same samples, as a model may be spread over them; the first one alone looks at the features.

    Args:
        accelerator: its device and precision.
        objective: what is trained.
        streams: the training data of each modality.
        train: how often to measure.
        total_steps: optimiser steps of the run.

    Attributes:
        history: measurements of each modality, the first one of the encoder that the run began with.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        streams: dict[str, Stream],
        train: TrainArguments,
        total_steps: int,
    ):
        self.accelerator, self.objective, self.streams = accelerator, objective, streams
        self.every, self.seed, self.total_steps = train.health_steps, train.seed, total_steps
        self.metric, self.pictures = train.metric_for_best_model, takes_pictures(train.report_to)
        self.warmup_steps = round(train.warmup_ratio * total_steps)
        self.history: dict[str, list[dict[str, float]]] = {}
        self.probes: dict[str, ProbeSet] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def begin(self, step: int) -> None:
        """Measure what the run begins with, if no checkpoint knows it."""
        if self.every is not None:
            for name, stream in self.streams.items():
                self.probes[name] = ProbeSet(stream.dataset, stream.batch_size)
                if name not in self.history:
                    self.history[name] = [{"step": step, **self.measured(name, step)}]
                start = self.history[name][0]
                if self.metric and self.accelerator.is_main_process and self.metric not in start:
                    raise ValueError(
                        f"train.metric_for_best_model: found {self.metric}, which needs {name} samples with labels, at "
                        f"least {LEAST_LABELS} of a class; measured are {', '.join(list(start)[1:])}"
                    )

    def due(self, step: int) -> bool:
        """Whether this is a step to measure at."""
        return self.every is not None and (step % self.every == 0 or step == self.total_steps)

    def measure(self, step: int, loss_over_trivial: float | None = None) -> dict[str, Any]:
        """Measure, judge, and print a line for each modality; returns what metrics.jsonl holds of it."""
        begun = time.perf_counter()
        found: dict[str, Any] = {}
        for name in self.streams:
            numbers = self.measured(name, step)
            if self.accelerator.is_main_process:
                if loss_over_trivial is not None and len(self.streams) == 1:
                    numbers["loss_over_trivial"] = loss_over_trivial
                self.history[name].append({"step": step, **numbers})
                tqdm.write(f"Step {step}: {self.line(name)}")
                found |= self.logged(name)
        return found | {MEASURING: time.perf_counter() - begun}

    def is_best(self) -> bool:
        """Whether the last value of ``metric_for_best_model`` is the greatest of all; asked by all processes."""
        best = False
        if self.metric and self.accelerator.is_main_process:
            together = zip(*self.history.values(), strict=True)
            sums = [sum(each[self.metric] for each in measured) for measured in together]
            best = sums[-1] > max(sums[:-1])
        return bool(self.accelerator.reduce(torch.tensor(float(best), device=self.accelerator.device)))

    def measured(self, name: str, step: int) -> dict[str, float]:
        """The numbers of a modality as the encoder is now; nothing but the first process's is of use.

        Trackers get pictures of what is measured, and of a few samples and what the objective makes of them.
        """
        model, probe, device = self.objective.trained, self.probes[name], self.accelerator.device
        adapter = self.objective.model.adapters[name]
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        with torch.no_grad(), self.accelerator.autocast():
            features = probe.features(model, device)
            views = probe.views(model, adapter, device, seed_of(self.seed, "health"))
            shown = self.shown(probe, adapter) if self.pictures else {}
        for module, mode in modes:
            module.training = mode
        if not self.accelerator.is_main_process:
            return {}
        if self.pictures:
            from mmssl.training.pictures import draw_pictures, log_pictures  # matplotlib, for trackers alone

            pictures = draw_pictures(adapter, shown, features, probe.labels, views)
            end = f"/{name}" if len(self.streams) > 1 else ""
            log_pictures(self.accelerator, {f"{title}{end}": each for title, each in pictures.items()}, step)
        return probe.numbers(features, views)

    def shown(self, probe: "ProbeSet", adapter: Modality) -> dict[str, Tokens]:
        """A few samples, and what the objective makes of them; of a sharded one the samples alone."""
        device = self.accelerator.device
        tokens = adapter.tokenize({name: value.to(device) for name, value in probe.few.items()})
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return {"original": tokens}
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, "shown"))
        return self.objective.shown(adapter, tokens, generator)

    def logged(self, name: str) -> dict[str, Any]:
        """The last measurement, with what the run began with beside it."""
        end = f"/{name}" if len(self.streams) > 1 else ""
        start, now = self.history[name][0], self.history[name][-1]
        own = [key for key in now if key not in ("step", "loss_over_trivial")]  # which the line has already
        found: dict[str, Any] = {f"health/{key}{end}": now[key] for key in own}
        found |= {f"health/{key}_start{end}": start[key] for key in ("std", "rank", "knn", "linear") if key in start}
        return found | {f"health/verdict{end}": self.verdict(name).verdict}

    def verdict(self, name: str) -> Verdict:
        """On the last measurement of a modality."""
        return judge(self.history[name], self.warmup_steps)

    def line(self, name: str) -> str:
        """The last verdict and what it rests on."""
        start, now, verdict = self.history[name][0], self.history[name][-1], self.verdict(name)
        shown = [f"{key} {now[key]:.3g} (start {start[key]:.3g})" for key in ("std", "rank")]
        if "view_similarity" in now:
            shown.append(f"views alike {now['view_similarity']:.3f}, samples alike {now['other_similarity']:.3f}")
        for key in ("knn", "linear"):
            if key in now:
                shown.append(f"{key} {now[key]:.3f} (start {start[key]:.3f}, raw {now[f'{key}_raw']:.3f})")
        if "loss_over_trivial" in now:
            shown.append(f"loss {now['loss_over_trivial']:.2f} times the mean's")
        which = f"{name} " if len(self.streams) > 1 else ""
        why = "" if verdict.verdict == "healthy" else f": {verdict.why}"
        return f"{which}{verdict.verdict}{why} [{'; '.join(shown)}]"

    def summary(self) -> dict[str, Any]:
        """For run.json: the last verdict on each modality, why, and the numbers."""
        found = {}
        if self.accelerator.is_main_process:
            for name, history in self.history.items():
                found[name] = asdict(self.verdict(name)) | {"start": history[0], "end": history[-1]}
        return found

    def report(self) -> None:
        """At the end of a run: its last verdicts once more."""
        if self.accelerator.is_main_process:
            for name in self.history:
                print(f"Health of the run: {self.line(name)}")


def takes_pictures(report_to: str | list[str] | None) -> bool:
    """Whether one of the trackers shows pictures."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return any(name in ("all", "tensorboard", "trackio", "wandb") for name in names)


class ProbeSet:
    """A few samples of a run's own training data, always the same ones and, of large samples, the same parts.

    Args:
        dataset: the training data.
        batch_size: samples that the encoder reads at a time.

    Attributes:
        batches: the samples, on the CPU.
        few: the first of them, for pictures.
        rows: which samples, or of few large ones which valid tokens, are measured.
        labels: of the rows, for probes; None where there are none, or too few of them.
    """

    def __init__(self, dataset: PreparedSamples, batch_size: int):
        samples = dataset.samples
        plain = PreparedSamples(samples, dataset.modality, dataset.on_error)
        self.by_token = len(samples) < FEWEST
        labels = None if self.by_token else samples.labels
        first = plain[0][0]
        size = max(1, sum(value.nbytes for value in first.values()))
        most = min(MOST, max(FEWEST, MOST_BYTES // size))
        # In an order without meaning, so that the first ones stand for all.
        chosen = np.random.RandomState(0).permutation(choose(labels, len(samples), most))
        items = [(position, plain[int(position)]) for position in chosen]
        items = [(position, item) for position, item in items if not item[1]]  # others stand in for unreadable samples
        groups = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        self.batches: list[Batch] = [plain.collate([item for _, item in group])["inputs"] for group in groups]
        self.few: Batch = plain.collate([item for _, item in items[:SHOWN]])["inputs"]
        self.labels = None if labels is None else labels[[position for position, _ in items]]
        self.rows = np.arange(len(items))
        if self.by_token:
            counts = [int(plain.modality.tokenize(batch).valid.sum()) for batch in self.batches]
            if samples.token_labels is not None:
                labels = np.concatenate([samples.token_labels[position] for position, _ in items])
                labels = labels if len(labels) == sum(counts) else None  # a part of a sample has lost its labels
            self.rows = choose(labels, sum(counts), MOST)
            self.labels = None if labels is None else labels[self.rows]
        self.labels = probed(self.labels)
        self.modality = plain.modality
        self.raw: dict[str, float] = {}

    def raw_features(self) -> np.ndarray:
        """What the probes read without any model."""
        if self.by_token:
            tokens = [self.modality.tokenize(batch) for batch in self.batches]
            found = [each.content[each.valid].flatten(1) for each in tokens]
        else:
            found = [self.modality.raw_features(batch) for batch in self.batches]
        return torch.cat(found).float().nan_to_num().numpy()[self.rows]

    def features(self, model: MMSSLModel, device: torch.device) -> Tensor:
        """(rows, D) the model's pooled output for each sample, or its output for each token."""
        prefix, found = model.encoder.num_prefix_tokens, []
        for batch in self.batches:
            out = model(**{name: value.to(device) for name, value in batch.items()})
            tokens = out.last_hidden_state[:, prefix:][out.token_mask[:, prefix:]]
            found.append((tokens if self.by_token else out.pooler_output).float().cpu())
        return torch.cat(found)[torch.from_numpy(self.rows)]

    def views(
        self, model: MMSSLModel, modality: Modality, device: torch.device, seed: int
    ) -> tuple[Tensor, Tensor] | None:
        """Features (n, D) of one view and of another one of the first samples, the same views each time."""
        if self.by_token or not modality.offers("view"):
            return None
        generator = torch.Generator(device).manual_seed(seed)
        pairs: list[list[Tensor]] = [[], []]
        for batch in self.batches:
            if sum(map(len, pairs[0])) < MOST_VIEWED:
                batch = {name: value.to(device) for name, value in batch.items()}
                for found in pairs:
                    found.append(model(**modality.view(batch, generator).batch).pooler_output.float().cpu())
        return torch.cat(pairs[0]), torch.cat(pairs[1])

    def numbers(self, features: Tensor, views: tuple[Tensor, Tensor] | None) -> dict[str, float]:
        """What is measured of the features."""
        found = {"std": float(relative_spread(features)), "rank": float(effective_rank(features))}
        if views is not None:
            found["view_similarity"], found["other_similarity"] = map(float, similarities(*views))
        if self.labels is not None and features.isfinite().all():
            self.raw = self.raw or scores(self.raw_features(), self.labels)  # once
            found |= scores(features.numpy(), self.labels) | {"guess": guess(self.labels)}
            found |= {f"{name}_raw": score for name, score in self.raw.items()}
        return found


def choose(labels: np.ndarray | None, count: int, most: int) -> np.ndarray:
    """At most so many of ``count`` positions, evenly spaced; of labelled ones, of a few classes, as many of each."""
    if labels is not None and labels.dtype.kind in "iu":
        classes, counts = np.unique(labels[labels >= 0], return_counts=True)
        classes = classes[counts >= LEAST_LABELS]
        if len(classes) >= 2:
            classes = classes[evenly(len(classes), MOST_CLASSES)]
            members = [np.flatnonzero(labels == number) for number in classes]
            return np.sort(np.concatenate([each[evenly(len(each), most // len(classes))] for each in members]))
    return evenly(count, most)


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many numbers from 0 to below ``count``, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def probed(labels: np.ndarray | None) -> np.ndarray | None:
    """The labels, if a probe can be fitted on half of them and tested on the other half."""
    if labels is None:
        return None
    if labels.dtype.kind == "f":
        return labels if len(labels) >= 2 * LEAST_LABELS and labels.std() > 0 else None
    counts = np.unique(labels, return_counts=True)[1]
    return labels if len(counts) >= 2 and (labels >= 0).all() and counts.min() >= LEAST_LABELS // 2 else None


def guess(labels: np.ndarray) -> float:
    """What guessing scores: the share of the largest class; of quantities the mean has an R² of 0."""
    return 0.0 if labels.dtype.kind == "f" else float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def scores(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy or R² of two probes that are fitted on one half and tested on the other; nothing is chosen."""
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    from mmssl.probes import linear_probe, quantities

    classes = None if quantities(labels) else labels
    fit, test, fit_labels, test_labels = train_test_split(
        features, labels, test_size=0.5, random_state=0, stratify=classes
    )
    linear, grid = linear_probe(labels)
    ((name, strengths),) = grid.items()
    linear.set_params(**{name: strengths[2]})  # the third of four or five
    knn = (KNeighborsRegressor if classes is None else KNeighborsClassifier)(5, metric="cosine")
    return {
        "knn": float(knn.fit(fit, fit_labels).score(test, test_labels)),
        "linear": float(linear.fit(fit, fit_labels).score(test, test_labels)),
    }

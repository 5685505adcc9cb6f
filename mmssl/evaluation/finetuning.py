"""Fine-tuning for classes or quantities: encoder and a linear head, beside the same from an untrained encoder."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from mmssl.data import DataArguments, PreparedSamples, Samples
from mmssl.evaluation.evaluate import Score
from mmssl.evaluation.features import Pooling, pooled
from mmssl.evaluation.models import fresh, load_model, pick_modality
from mmssl.evaluation.splits import check_labels, labelled_pair
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.probes import quantities
from mmssl.randomness import keyed_generator


def finetune(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    test: DataArguments | None = None,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    batch_size: int = 64,
    pooling: Pooling = "mean",
    modality: str | None = None,
) -> list[Score]:
    """Train encoder and head together, from checkpoints that differ in their seed alone and from untrained encoders.

    A stratified fifth of the training data is held out: the epoch that is best on it is what is tested.

    Args:
        checkpoints: folders or Hub names of pretrained models, one for each seed.
        data: labelled samples to train on.
        test: those to test on. None: as in ``evaluate``.
        epochs: passes over the training data.
        learning_rate: greatest one, of AdamW; a tenth of the steps warm up, then it falls as a cosine.
        weight_decay: AdamW's.
        batch_size: samples in a batch.
        pooling: from tokens to samples, as in ``evaluate``.
        modality: which modality of a model that has several.

    Raises:
        ValueError: no labels, or labels of tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_model(checkpoint) for checkpoint in checkpoints]
    adapter = models[0].adapters[pick_modality(models[0], modality)]
    train, held_out = labelled_pair(data, test, adapter)
    if train.token_labels is not None:
        raise ValueError("data: found labels of tokens; fine-tuning is of samples: use mmssl evaluate for tokens")
    labels = check_labels(train, "data")
    classes = None if quantities(labels) else labels
    fit, choose = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=classes)
    parts = [train.select(fit), train.select(choose), held_out]
    metric = "accuracy" if classes is not None else "R²"
    scores = []
    for row, starts in (("untrained", [fresh(m, seed) for seed, m in enumerate(models)]), ("pretrained", models)):
        score = Score("fine-tuned", row, [], len(labels), len(held_out), metric)
        for seed, model in enumerate(starts):
            learner = Learner(copy.deepcopy(model), pooling, parts[0], adapter, seed).to(device)
            learner.learn(parts[0], parts[1], epochs, learning_rate, weight_decay, batch_size, seed, row)
            score.values.append(learner.score(parts[2], batch_size))
        scores.append(score)
    return scores


class Learner(nn.Module):
    """A model, and a linear head on its pooled output: logits of classes, or one quantity, standardised."""

    def __init__(self, model: MMSSLModel, pooling: Pooling, train: Samples, modality: Modality, seed: int):
        super().__init__()
        assert train.labels is not None
        self.model, self.modality = model, modality
        self.read = pooled(model, pooling)
        self.regresses = quantities(train.labels)
        self.mean, self.std = (float(train.labels.mean()), float(train.labels.std())) if self.regresses else (0.0, 1.0)
        dataset = PreparedSamples(train, modality)
        with torch.no_grad():
            width = self.read(dataset.collate([dataset[0]])["inputs"]).shape[1]
        self.head = nn.Linear(width, 1 if self.regresses else int(train.labels.max()) + 1)
        nn.init.normal_(self.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.read(batch).to(self.head.weight.dtype))

    def batches(self, samples: Samples, size: int, order: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
        """Samples in this order, with their labels."""
        assert samples.labels is not None
        dataset, device = PreparedSamples(samples, self.modality), self.head.weight.device
        chosen = [list(order[start : start + size]) for start in range(0, len(order), size)]
        loader = DataLoader(dataset, batch_sampler=chosen, collate_fn=dataset.collate)
        for index, batch in zip(chosen, loader, strict=True):
            inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
            yield inputs, torch.from_numpy(samples.labels[index]).to(device)

    def learn(
        self,
        train: Samples,
        validation: Samples,
        epochs: int,
        peak: float,
        weight_decay: float,
        batch_size: int,
        seed: int,
        title: str,
    ) -> None:
        """Train, and keep the epoch that is best on the validation data."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=peak, weight_decay=weight_decay)
        total = epochs * -(-len(train) // batch_size)
        schedule = get_cosine_schedule_with_warmup(optimizer, total // 10, total)
        best, kept = -np.inf, copy.deepcopy(self.state_dict())
        bar = tqdm(total=total, desc=f"fine-tune {title} {seed}", unit="step", mininterval=5)
        for epoch in range(epochs):
            self.train()
            generator = keyed_generator(torch.device("cpu"), seed, "finetune", epoch)
            for batch, labels in self.batches(
                train, batch_size, torch.randperm(len(train), generator=generator).tolist()
            ):
                if self.regresses:
                    loss = nn.functional.mse_loss(self(batch)[:, 0], ((labels - self.mean) / self.std).float())
                else:
                    loss = nn.functional.cross_entropy(self(batch), labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            score = self.score(validation, batch_size)
            bar.set_postfix_str(f"validation {score:.3f}")
            if score > best:
                best, kept = score, copy.deepcopy(self.state_dict())
        bar.close()
        self.load_state_dict(kept)

    @torch.inference_mode()
    def score(self, samples: Samples, batch_size: int) -> float:
        """Accuracy, or R²."""
        self.eval()
        found = [(self(batch), truth) for batch, truth in self.batches(samples, 4 * batch_size, range(len(samples)))]
        outputs, labels = (torch.cat(each) for each in zip(*found, strict=True))
        if not self.regresses:
            return float((outputs.argmax(dim=1) == labels).float().mean())
        guesses = outputs[:, 0].double() * self.std + self.mean
        return float(1 - (guesses - labels).square().sum() / (labels - labels.mean()).square().sum())

"""What is said when a run has ended."""

import json
from pathlib import Path

from accelerate import PartialState

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.evaluation.evaluate import evaluate
from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.evaluation.tables import print_scores, write_scores
from mmssl.objectives.base import Objective

MOST = 10_000  # labelled samples for a closing probe: it should not outlast the training


def closing_words(run: Path, objective: Objective, data: DataArguments) -> None:
    """Say where the model is and how to look at it, draw reconstructions if it makes any, and probe it if it can.

    Args:
        run: folder of a finished run.
        objective: what it trained, as ``load_objective`` returns it.
        data: the samples to look at; those of further modalities are the ones that the run was trained on.
    """
    if not PartialState().is_main_process:
        return
    print(f'\nThe model is in {run}. To load it: import mmssl; AutoModel.from_pretrained("{run}")')
    print(f"To look at it, at its curves, samples, embeddings and attention: mmssl report {run}")
    record = json.loads((run / "run.json").read_text())
    look(run, objective, data, next(iter(record["modality"])), "reconstructions.png")
    for name, source in record.get("also", {}).items():
        look(run, objective, DataArguments(**source["data"]), name, f"reconstructions_{name}.png")
    if (hub := record["train"].get("hub_model_id")) and any(run.glob("scores*.json")):
        print(f"To put these scores on the card of {hub}: mmssl push {run} {hub}")


def look(run: Path, objective: Objective, data: DataArguments, name: str, picture: str) -> None:
    """Draw and probe one modality."""
    modality = objective.model.adapters[name]
    samples = load_samples(data, modality)
    few = PreparedSamples(samples, modality, data.on_error, seed=0)  # parts of what is too large
    batch = few.collate([few[i] for i in range(min(8, len(few)))])["inputs"]
    if path := draw_reconstructions(objective, batch, run / picture):
        print(f"Originals, what the encoder saw of them, and reconstructions: {path}")
    if samples.labels is None and samples.token_labels is None:
        return
    count = len(samples) if samples.token_labels is None else sum(map(len, samples.token_labels))
    if count > MOST:  # the first ones alone would be of the first classes, where files are sorted by class
        flags = f"--data {data.source}" + (f" --modality {name}" if len(objective.model.adapters) > 1 else "")
        print(f"Probes of {count:,} labels take a while: mmssl evaluate {run} {flags}")
        return
    try:
        scores = evaluate([run], data, modality=name)
        print_scores(scores, title=f"{run}: {name}")
        write_scores(scores, (run / picture.replace("reconstructions", "scores")).with_suffix(".json"))
    except ValueError as error:
        print(f"The labels do not allow a probe: {error}")

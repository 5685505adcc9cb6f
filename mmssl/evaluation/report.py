"""What one wants to see when a run has ended."""

from pathlib import Path

from accelerate import PartialState

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.evaluation.evaluate import evaluate, print_scores
from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.objectives.base import Objective
from mmssl.objectives.masked_reconstruction import MaskedReconstruction

MOST = 10_000  # labelled samples for a closing probe: it should not outlast the training


def report(run: Path, objective: Objective, data: DataArguments) -> None:
    """Say where the model is, draw reconstructions if it makes any, and probe it if the data have labels.

    Args:
        run: folder of a finished run.
        objective: what it trained, as ``load_objective`` returns it.
        data: the samples to look at.
    """
    if not PartialState().is_main_process:
        return
    print(f'\nThe model is in {run}. To load it: import mmssl; AutoModel.from_pretrained("{run}")')
    (modality,) = objective.model.adapters.values()
    samples = load_samples(data, modality)
    if isinstance(objective, MaskedReconstruction):
        few = PreparedSamples(samples, modality, data.on_error)
        batch = few.collate([few[i] for i in range(min(8, len(few)))])["inputs"]
        picture = draw_reconstructions(objective, batch, run / "reconstructions.png")
        print(f"Originals, what the encoder saw of them, and reconstructions: {picture}")
    if samples.labels is None:
        return
    if len(samples) > MOST:  # the first ones alone would be of the first classes, where files are sorted by class
        print(f"Probes of {len(samples):,} labelled samples take a while: mmssl evaluate {run} --data {data.source}")
        return
    try:
        print_scores(evaluate([run], data), title=str(run))
    except ValueError as error:
        print(f"The labels do not allow a probe: {error}")

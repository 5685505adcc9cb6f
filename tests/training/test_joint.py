"""Several modalities in one run: what is drawn, what is trained, what is reported, and exact resume."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from transformers import AutoModel, AutoProcessor

from mmssl.data import DataArguments
from mmssl.evaluation import closing_words
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import Source, TrainArguments, load_objective, pretrain
from mmssl.training.checkpoint import step_folders
from mmssl.training.streams import count_steps, draw, open_stream
from tests.training.joint import SPEECH, Watched, run_joint, sounds
from tests.training.test_processes import launch
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics

DIGITS = Source(Image(image_size=8, patch_size=2, num_channels=1), DataArguments("digits", max_samples=60))


def modalities(lines: list[dict[str, float]]) -> list[str]:
    """The modality of each step, from lines that hold one step each."""
    drawn = [[name.removeprefix("loss/") for name in line if name.startswith("loss/")] for line in lines]
    assert all(len(names) == 1 for names in drawn)
    return [name for (name,) in drawn]


def test_weights_are_the_shares_of_the_steps() -> None:
    weights = {"image": 1.0, "speech": 3.0, "graph": 0.5}
    count = 4000
    drawn = Counter(draw(weights, 0, step) for step in range(count))
    for name, weight in weights.items():
        share = weight / 4.5
        assert drawn[name] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5), name


def test_a_draw_depends_on_seed_and_step_and_shares_alone() -> None:
    first = [draw({"image": 1.0, "speech": 2.0}, 0, step) for step in range(50)]
    torch.manual_seed(7)
    assert [draw({"speech": 4.0, "image": 2.0}, 0, step) for step in range(50)] == first
    assert [draw({"image": 1.0, "speech": 2.0}, 1, step) for step in range(50)] != first


def test_a_joint_run_leaves_one_model_that_embeds_each_modality(tmp_path: Path) -> None:
    lines = run_joint(tmp_path / "run", max_train_steps=8)
    assert set(modalities(lines)) == {"image", "speech"}
    model, processor = AutoModel.from_pretrained(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    images = processor([torch.rand(8, 8).numpy()] * 2, modality="image")
    clip = np.sin(np.arange(2000))
    speech = processor([clip], modality="speech", sampling_rate=8000)
    objective = load_objective(tmp_path / "run")
    for batch, count in ((images, 2), (speech, 1)):
        assert model(**batch).pooler_output.shape == (count, 16)
        assert torch.equal(model(**batch).pooler_output, objective.model(**batch).pooler_output)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(record["modality"]) == ["image", "speech"] and record["modality"]["speech"]["num_mels"] == 20
    assert record["data"]["source"] == "digits" and record["samples"] == 60
    speech_record = record["also"]["speech"]
    assert speech_record["data"]["source"] == str(tmp_path / "sounds") and speech_record["samples"] == 20
    assert speech_record["weight"] == 1.0 and speech_record["per_device_train_batch_size"] == 4


def test_the_report_looks_at_each_modality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digits have labels; the sounds have none."""
    run_joint(tmp_path / "run", max_train_steps=2)
    monkeypatch.setitem(closing_words.__globals__, "MOST", 10)
    closing_words(tmp_path / "run", load_objective(tmp_path / "run"), DIGITS.data)
    printed = capsys.readouterr().out
    assert f"mmssl evaluate {tmp_path / 'run'} --data digits --modality image" in printed
    assert "modality speech" not in printed
    for picture in ("reconstructions.png", "reconstructions_speech.png"):
        assert (tmp_path / "run" / picture).is_file()


def test_each_modality_learns(tmp_path: Path) -> None:
    lines = run_joint(tmp_path / "run", max_train_steps=80)
    for name in ("image", "speech"):
        losses = [line[f"loss/{name}"] for line in lines if f"loss/{name}" in line]
        assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6]), name


def test_a_line_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    each = run_joint(tmp_path / "each", max_train_steps=13)
    some = run_joint(tmp_path / "some", max_train_steps=13, logging_steps=5)
    assert [line["step"] for line in some] == [5, 10, 13]
    for line, steps in zip(some, (each[:5], each[5:10], each[10:]), strict=True):
        assert line["loss"] == pytest.approx(np.mean([step["loss"] for step in steps]))
        drawn = modalities(steps)
        for name in ("image", "speech"):
            losses = [step["loss"] for step, other in zip(steps, drawn, strict=True) if other == name]
            assert (f"loss/{name}" in line) == (f"samples_per_second/{name}" in line) == bool(losses)
            if losses:
                assert line[f"loss/{name}"] == pytest.approx(np.mean(losses))
                assert line[f"samples_per_second/{name}"] > 0
        samples = sum(8 if name == "image" else 4 for name in drawn)
        rates = {name: line.get(f"samples_per_second/{name}", np.inf) for name in ("image", "speech")}
        seconds = sum((8 if name == "image" else 4) / rates[name] for name in drawn)
        assert samples / line["samples_per_second"] >= seconds  # the rest went into writing


def test_a_step_changes_what_its_modality_uses_and_nothing_else(tmp_path: Path) -> None:
    """Also with momentum and weight decay, and with batches accumulated: all those of a step are of one modality."""
    Watched.seen.clear()
    Watched.wrong.clear()
    lines = run_joint(tmp_path / "run", objective=Watched, gradient_accumulation_steps=2)
    assert not Watched.wrong
    assert Watched.seen[::2] == Watched.seen[1::2] == modalities(lines)
    assert set(Watched.seen) == {"image", "speech"}


@pytest.mark.parametrize(
    "train",
    [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}],
    ids=["plain", "accumulation", "workers"],
)
def test_resumed_joint_run_is_equal_to_the_bit(tmp_path: Path, train: dict[str, Any]) -> None:
    """From the middle of an epoch of each modality; several epochs of speech are over by the end."""
    flags = {"checkpointing_steps": 9, "checkpoints_total_limit": None, "max_train_steps": 20, **train}
    whole = run_joint(tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_18")
    for file in ("model.safetensors", "objective.safetensors"):
        (tmp_path / "cut" / file).unlink()
    resumed = run_joint(tmp_path / "cut", **flags | {"resume_from_checkpoint": "latest"})
    assert [path.name for path in step_folders(tmp_path / "cut")] == ["step_9", "step_18"]
    assert exact(resumed) == exact(whole) and modalities(resumed) == modalities(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_resuming_with_another_weight_is_refused(tmp_path: Path) -> None:
    run_joint(tmp_path / "run", max_train_steps=2, checkpointing_steps=2)
    with pytest.raises(ValueError, match=r"also\.speech\.weight: 1\.0 in the checkpoint, 2\.0 now"):
        run_joint(tmp_path / "run", weight=2.0, resume_from_checkpoint="latest")


def test_two_sources_of_one_modality_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two sources of the modality image"):
        pretrain(
            DIGITS.modality, MaskedReconstruction, data=DIGITS.data, train=TrainArguments(str(tmp_path)), also=[DIGITS]
        )


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight of image: found .*; expected a number above 0"):
        Source(DIGITS.modality, DIGITS.data, weight)


def test_unreadable_files_are_counted_for_each_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sounds(tmp_path / "sounds", 8)
    (folder / "03.wav").write_text("this is no sound")
    pretrain(
        DIGITS.modality,
        lambda model: MaskedReconstruction(model, views=False, decoder_layers=1, decoder_hidden_size=16),
        data=DIGITS.data,
        train=TrainArguments(str(tmp_path / "run"), per_device_train_batch_size=8, max_train_steps=6),
        also=[Source(SPEECH, DataArguments(str(folder), on_error="skip"))],
    )
    printed = capsys.readouterr().out
    assert "speech: 1 of 8 samples could not be read" in printed and "03.wav" in printed and "image:" not in printed


def test_epochs_are_those_of_the_first_modality(tmp_path: Path) -> None:
    """Speech takes three quarters of the steps, so seven batches of images are over in 28 steps."""
    train = TrainArguments(per_device_train_batch_size=8, num_train_epochs=3)
    speech = Source(SPEECH, DataArguments(str(sounds(tmp_path / "sounds", 8))), weight=3.0)
    streams = {source.modality.name: open_stream(source, train, Accelerator()) for source in (DIGITS, speech)}
    assert count_steps(streams, "image", train, processes=1) == 3 * 28
    assert count_steps({"image": streams["image"]}, "image", train, processes=1) == 3 * 7
    assert count_steps(streams, "image", TrainArguments(max_train_steps=5), processes=1) == 5


def test_excerpts_know_the_epoch_that_is_resumed() -> None:
    """Accelerate tells data sets the epoch only where batches are neither sharded nor skipped."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0))
    stream = open_stream(DIGITS, TrainArguments(per_device_train_batch_size=8), accelerator)
    stream.loader = accelerator.prepare(stream.loader)
    stream.load_state_dict({"epoch": 3, "batch": 6})
    stream.next_inputs()
    assert int(stream.dataset.epoch) == 3 and (stream.epoch, stream.batch) == (3, 7)
    stream.next_inputs()
    assert int(stream.dataset.epoch) == 4 and (stream.epoch, stream.batch) == (4, 1)


@pytest.mark.slow
def test_two_processes_train_the_same_modality_and_resume_to_the_bit(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"checkpointing_steps": 7, "checkpoints_total_limit": None, "max_train_steps": 12}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sounds(tmp_path / "sounds", 20)  # before there are two processes that would both write them
    launch("tests.training.joint", str(whole), json.dumps(flags))
    notes = [json.loads((whole / f"watched{rank}.json").read_text()) for rank in (0, 1)]
    assert notes[0] == notes[1] and notes[0]["wrong"] == []
    assert notes[0]["seen"] == modalities(metrics(whole)) and set(notes[0]["seen"]) == {"image", "speech"}
    shutil.copytree(whole, cut)
    (cut / "model.safetensors").unlink()
    launch("tests.training.joint", str(cut), json.dumps(flags | {"resume_from_checkpoint": "latest"}))
    assert len(metrics(cut)) == 12 and exact(metrics(cut)) == exact(metrics(whole))
    assert_same_weights(whole, cut)

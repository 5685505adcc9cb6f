"""The loop's edges: folders, sizes, optimiser groups, what is written, what is skipped."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import mmssl
from mmssl import MMSSLConfig, MMSSLModel
from mmssl.data import DataArguments
from mmssl.encoder import EncoderConfig
from mmssl.modalities.image import Image
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.training import TrainArguments, load_objective, pretrain
from mmssl.training.setup import make_optimizer
from tests.training.tiny import metrics, run


def test_a_run_leaves_a_model_a_processor_its_heads_and_its_record(tmp_path: Path) -> None:
    lines = run(tmp_path, max_train_steps=3)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["samples_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["processes"] == 1 and record["steps"] == 3 and record["samples"] == 60
    assert record["objective"]["MaskedReconstruction"]["mask_ratio"] == 0.5
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    objective = load_objective(tmp_path)
    assert all(torch.equal(value, objective.model.state_dict()[name]) for name, value in model.state_dict().items())
    batch = processor([torch.rand(8, 8).numpy()] * 2)
    assert torch.equal(model(**batch).pooler_output, objective.model(**batch).pooler_output)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".bin", ".pt")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_keeps_what_it_has_prepared_learns_the_same(workers: int, tmp_path: Path) -> None:
    losses = {}
    for cache in (0, 0.02, 256):  # nothing, about a dozen of the digits, all
        out = tmp_path / str(cache)
        pretrain(
            Image(image_size=8, patch_size=2, num_channels=1),
            partial(MaskedReconstruction, decoder_layers=1, decoder_hidden_size=16),
            EncoderConfig(16, 1, 2),
            DataArguments("digits", max_samples=24, cache_mb=cache),
            TrainArguments(
                str(out),
                max_train_steps=9,
                per_device_train_batch_size=8,
                logging_steps=1,
                dataloader_num_workers=workers,
            ),
        )
        losses[cache] = [line["loss"] for line in metrics(out)]
    assert losses[0] == losses[0.02] == losses[256] and len(set(losses[0])) == 9


def test_training_changes_the_weights_and_lowers_the_loss(tmp_path: Path) -> None:
    lines = run(tmp_path, max_train_steps=60)
    assert sum(line["loss"] for line in lines[-5:]) < 0.8 * sum(line["loss"] for line in lines[:5])
    torch.manual_seed(0)
    fresh = MMSSLModel(MMSSLConfig.from_pretrained(tmp_path)).state_dict()
    trained = load_file(tmp_path / "model.safetensors")
    assert all(not torch.equal(value, trained[name]) for name, value in fresh.items())


def test_pretrain_is_at_hand_in_the_package() -> None:
    assert mmssl.pretrain is pretrain
    with pytest.raises(AttributeError, match="no attribute 'pretain'"):
        _ = mmssl.pretain


def test_trackers_get_the_same_numbers(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = run(tmp_path, max_train_steps=3, report_to="tensorboard")
    events = accumulators.EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .*file is a file; expected a folder"):
        run(tmp_path / "file")


def test_another_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first = run(tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match="holds another run"):
        run(tmp_path, max_train_steps=2)
    assert len(run(tmp_path, max_train_steps=2, overwrite_output_dir=True)) == len(first)


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found 60 samples, and one batch needs 64.*per_device_train_batch_size"):
        run(tmp_path, per_device_train_batch_size=64)


def test_diverging_run_stops_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+; lower train.learning_rate"):
        run(tmp_path, learning_rate=1e30, warmup_ratio=0.0)


def test_unreadable_files_are_named_counted_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(16):
        PILImage.new("L", (8, 8), 15 * number).save(folder / f"{number:02}.png")
    (folder / "07.png").write_text("this is no image")

    def train(on_error: str) -> None:
        pretrain(
            Image(image_size=8, patch_size=4, num_channels=1),
            partial(MaskedReconstruction, views=False, decoder_layers=1, decoder_hidden_size=16),
            EncoderConfig(16, 1, 2),
            DataArguments(str(folder), on_error=on_error),  # type: ignore[arg-type]
            TrainArguments(str(tmp_path / on_error), per_device_train_batch_size=8, num_train_epochs=2),
        )

    with pytest.raises(ValueError, match=r"07\.png: not a readable image"):
        train("raise")
    train("skip")
    printed = capsys.readouterr().out
    assert "1 of 16 samples could not be read and were skipped" in printed and "07.png" in printed


def test_only_weight_matrices_decay() -> None:
    config = MMSSLConfig(
        modalities={"image": {}}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, class_token=True,
        layer_scale_init=0.1,
    )  # fmt: skip
    module = MaskedReconstruction(MMSSLModel(config), decoder_layers=1, decoder_hidden_size=16)
    optimizer = make_optimizer(module, TrainArguments(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(module.named_parameters())
    assert len(decay) == len(parameters)
    for name, parameter in parameters.items():
        matrix = name.endswith(".weight") and "norm" not in name
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name


def test_weight_decay_ends_where_it_is_told(tmp_path: Path) -> None:
    """To the bit as a constant one where it ends as it began; with another end, the same only at the first step."""
    constant = run(tmp_path / "a", weight_decay=0.1)
    assert [line["loss"] for line in run(tmp_path / "b", weight_decay=0.1, final_weight_decay=0.1)] == [
        line["loss"] for line in constant
    ]
    rising = run(tmp_path / "c", weight_decay=0.1, final_weight_decay=0.9)
    assert rising[0]["loss"] == constant[0]["loss"] and rising[-1]["loss"] != constant[-1]["loss"]

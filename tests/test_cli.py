"""The command: what it shows, what wins over what, and what it says to wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.cli import main, parse_pretrain, refused_cells
from mmssl.data import DataArguments, load_samples
from mmssl.discovery import find_all, names
from mmssl.objectives.base import Objective
from mmssl.objectives.masked_reconstruction import MaskedReconstruction

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
DIGITS = str(ROOT / "examples" / "recipes" / "mae_digits.yaml")
JOINT = str(ROOT / "examples" / "recipes" / "joint.yaml")
IMAGES = "modality: Image, data: {source: digits}"


def mmssl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mmssl", *arguments])
    main()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained digits model, saved as a run would."""
    folder = tmp_path_factory.mktemp("run")
    options = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    config = MMSSLConfig(modalities={"image": options}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    MMSSLModel(config).save_pretrained(folder)
    return folder


def test_list_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mmssl(monkeypatch, "list")
    printed = capsys.readouterr().out
    for name in ("Image", "Speech", "MaskedReconstruction", "knn", "linear", "few_shot", "digits", "espeak_digits"):
        assert name in printed


def test_list_says_why_a_cell_of_the_matrix_is_refused() -> None:
    """Nodes and groups have neither an order nor places in common, columns of a table no order."""
    without_order = {"graph", "point_cloud"}
    expected = {
        "Autoregressive": without_order,
        "EmbeddingMixup": without_order,
        "PositionPrediction": {*without_order, "tabular"},
        "TransformPrediction": {"graph", "tabular"},
    }
    cells = refused_cells()
    assert {name for name, _ in cells} == set(find_all("objectives", Objective)) - {"Sum", "FeatureMatching"}
    assert {modality for _, modality in cells} == set(names("modalities"))
    for (objective, modality), reason in cells.items():
        assert bool(reason) == (modality in expected.get(objective, ()))
        assert not reason or (objective in reason and modality in reason)


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults() -> None:
    arguments = parse_pretrain(["--config", DIGITS, "--objective.mask_ratio", "0.6", "--train.max_train_steps", "7"])
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MMSSLConfig(modalities={"image": arguments["modality"].options()}, **sizes)
    objective = arguments["objective"](MMSSLModel(config))
    assert isinstance(objective, MaskedReconstruction)
    assert objective.mask_ratio == 0.6 and objective.decoder_layers == 1 and objective.corruption == "drop"
    assert arguments["train"].max_train_steps == 7 and arguments["train"].learning_rate == 2e-3
    assert arguments["train"].weight_decay == 0.05


def test_further_modalities_are_a_list_in_a_recipe_or_a_flag() -> None:
    also = parse_pretrain(["--config", JOINT])["also"]
    assert [source.modality.name for source in also] == ["speech", "point_cloud", "graph"]
    assert also[0].modality.num_mels == 80 and also[0].data.source == "espeak_digits"
    assert [source.weight for source in also] == [1.0, 1.0, 0.5]
    flag = "[{modality: {class_path: Speech, init_args: {num_mels: 20}}, data: {source: here}, weight: 2}]"
    (source,) = parse_pretrain(["--config", DIGITS, "--also", flag])["also"]
    assert (source.modality.num_mels, source.data.source, source.weight) == (20, "here", 2.0)
    assert not parse_pretrain(["--config", DIGITS])["also"]


def test_data_is_short_for_its_source() -> None:
    assert parse_pretrain(["--config", DIGITS, "--data", "here"])["data"].source == "here"
    assert parse_pretrain(["--config", DIGITS, "--data=there"])["data"].source == "there"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_objective(recipe: Path) -> None:
    """On the meta device, so that large ones cost nothing."""
    import torch

    arguments = parse_pretrain(["--config", str(recipe)])
    modalities = [arguments["modality"], *(source.modality for source in arguments["also"])]
    for modality in modalities:
        if modality.name == "tabular":  # its columns come from the data
            modality.fit(load_samples(DataArguments("diabetes"), modality))
    options = {modality.name: modality.options() for modality in modalities}
    with torch.device("meta"):
        objective = arguments["objective"](MMSSLModel(MMSSLConfig(modalities=options, **vars(arguments["encoder"]))))
    assert sum(parameter.numel() for parameter in objective.parameters()) > 1000
    header = recipe.read_text().split("modality:")[0]
    for word in ("accelerate launch", "Hardware", "Minutes", "spread"):
        assert word in header, f"the header of {recipe.name} does not state: {word}"


def test_published_sizes() -> None:
    """ViT-B/16 without its head has 85,798,656 parameters; TERA base 21.33 M (SUPERB's table)."""
    import torch

    counts = {}
    for name in ("mae_vit_base_imagenet", "tera_base"):
        arguments = parse_pretrain(["--config", str(ROOT / "examples" / "recipes" / f"{name}.yaml")])
        modality = arguments["modality"]
        with torch.device("meta"):
            model = MMSSLModel(
                MMSSLConfig(modalities={modality.name: modality.options()}, **vars(arguments["encoder"]))
            )
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    # 85.8 M less the table of 197 positions, which sines and cosines do without
    assert counts["mae_vit_base_imagenet"] == 85_798_656 - 197 * 768
    assert counts["tera_base"] == pytest.approx(21.33e6, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["evaluate", "RUN", "--data", "nowhere/at/all/"], "cannot load|nothing|found"),
        (["evaluate", "RUN", "--data", "FLAT"], "found no labels"),
        (["evaluate", "RUN", "--data", "ONE_CLASS"], "found one class only"),
        (["evaluate", "RUN", "--data", "digits", "--protocol", "horoscope"], "found horoscope; expected some of knn"),
        (["evaluate", "EMPTY", "--data", "digits"], "holds no model"),
        (["evaluate", "RUN", "--data", "EMPTY"], r"found no image file in .*expected files ending in"),
        (["pretrain", "--config", DIGITS, "--data", "EMPTY"], "found no image file"),
        (["pretrain", "--config", DIGITS, "--objective.mask_ratio", "1"], "mask_ratio: found 1.0; expected a share"),
        (["pretrain", "--config", DIGITS, "--objective.mask_ratio", "0"], "mask_ratio: found 0.0; expected a share"),
        (["pretrain", "--config", DIGITS, "--modality.patch_size", "3"], "make image_size a multiple of patch_size"),
        (["pretrain", "--config", DIGITS, "--also", f"[{{{IMAGES}}}]"], "two sources of the modality image"),
        (["pretrain", "--config", DIGITS, "--also", f"[{{{IMAGES}, weight: 0}}]"], "weight of image: found 0.0"),
    ],
)
def test_wrong_input_gets_one_clear_line(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    folders = {"RUN": run_folder, "FLAT": tmp_path / "flat", "ONE_CLASS": tmp_path / "one", "EMPTY": tmp_path / "empty"}
    for folder in (folders["FLAT"], folders["ONE_CLASS"] / "cats", folders["EMPTY"]):
        folder.mkdir(parents=True)
    for folder in (folders["FLAT"], folders["ONE_CLASS"] / "cats"):
        for number in range(5):
            PILImage.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        mmssl(monkeypatch, *[str(folders.get(word, word)) for word in arguments])
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--objective.mask_rati", "mask_rati"), ("--train.lerning_rate", "lerning_rate"), ("--modality.colour", "colour")],
)
def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str], flag: str, named: str) -> None:
    with pytest.raises(SystemExit):
        parse_pretrain(["--config", DIGITS, flag, "0.1"])
    assert named in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_pretrain(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimiser steps; wins over num_train_epochs" in printed and "peak learning rate" in printed
    assert "further modalities that share the encoder" in printed
    with pytest.raises(SystemExit):
        parse_pretrain(["--also.help"])
    assert "relative to the first one, whose weight is 1" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        parse_pretrain(["--objective.help", "MaskedReconstruction"])
    assert "share of the valid tokens that is hidden" in " ".join(capsys.readouterr().out.split())


def test_evaluate_prints_three_rows_and_writes_them(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    mmssl(monkeypatch, "evaluate", str(run_folder), "--data", "digits", "--protocol", "knn", "--output", str(output))
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("raw features", "untrained encoder", "pretrained encoder"))
    scores = {score["row"]: score for score in json.loads(output.read_text())["scores"]}
    assert scores["raw"]["n_train"] == 1437 and scores["raw"]["n_test"] == 360
    assert scores["raw"]["values"][0] > 0.95  # nearest neighbours on the pixels of digits
    assert np.isfinite([value for score in scores.values() for value in score["values"]]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "processes"), [("image", 1), ("image", 2), ("speech", 1), ("speech", 2)])
def test_examples_run_under_accelerate_launch(tmp_path: Path, script: str, processes: int) -> None:
    """With two processes there really are two, and the run is recorded as such."""
    flags = {"train.output_dir": tmp_path / "run", "train.max_train_steps": 4, "train.per_device_train_batch_size": 8}
    words = [f"examples/pretrain_{script}.py", *(f"--{name}={value}" for name, value in flags.items())]
    printed = accelerate_launch(processes, *words)
    assert "pretrained encoder" in printed and (tmp_path / "run" / "reconstructions.png").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == processes


def accelerate_launch(processes: int, *words: str) -> str:
    """What ``accelerate launch`` prints, on the CPU."""
    several = ["--multi_gpu"] if processes > 1 else []
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *several),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *words,
        ],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_joint_recipe_trains_and_each_modality_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    """The graph is one sample, too few for two processes: there the list of further modalities is a shorter one."""
    run = tmp_path / "run"
    words = ["-m", "mmssl", "pretrain", "--config", JOINT, f"--train.output_dir={run}", "--train.max_train_steps=6"]
    if processes > 1:
        speech = {"class_path": "Speech", "init_args": {"sampling_rate": 8000, "n_fft": 200, "win_length": 200}}
        source = {"modality": speech, "data": {"source": "espeak_digits"}, "per_device_train_batch_size": 8}
        words.append(f"--also={json.dumps([source])}")
    assert f"The model is in {run}" in accelerate_launch(processes, *words, "--train.logging_steps=1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(name.startswith("loss/") for name in line) == 1 for line in lines) and len(lines) == 6
    record = json.loads((run / "run.json").read_text())
    assert record["processes"] == processes
    for modality, data in {"image": "digits", "speech": "espeak_digits"}.items():
        mmssl(monkeypatch, "evaluate", str(run), "--modality", modality, "--data", data, "--protocol", "knn")
        assert "pretrained encoder" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="say which one the data are of"):
        mmssl(monkeypatch, "evaluate", str(run), "--data", "digits")

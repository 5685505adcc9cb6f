"""A run on the Hugging Face Hub: what goes up and what stays, the card, uploads while it trains, and what can fail."""

import ast
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from mmssl import MMSSLConfig, MMSSLFeatureExtractor, MMSSLModel, MMSSLProcessor
from mmssl.cli import main, parse_pretrain
from mmssl.data import DataArguments
from mmssl.discovery import find_all, names
from mmssl.evaluation import closing_words
from mmssl.hub import Uploads, check_model, picture_of, push
from mmssl.model_card import card, without_paths
from mmssl.objectives.base import Objective
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.objectives.position_prediction import PositionPrediction
from mmssl.objectives.weighted_sum import Sum
from mmssl.training import TrainArguments, load_objective
from tests import hub_server
from tests.hub_server import Hub
from tests.training import tiny
from tests.videos import encode, noise

ROOT = Path(__file__).parents[1]
TOKEN, READER, WRONG = "hf_aVerySecretTokenForTests", "hf_aTokenThatMayOnlyRead", "hf_aTokenThatNobodyHas"
UPLOADED = {
    "config.json", "model.safetensors", "processor_config.json", "recipe.yaml", "metrics.jsonl", "curves.png",
    "README.md", ".gitattributes",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Hub:
    return hub_server.start(**{TOKEN: ("tester", "write"), READER: ("tester", "read")})


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that this process talks to, with a token that may write."""
    server.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("mmssl.hub.picture_of", lambda *_: b"curves")  # which takes long to draw
    yield server
    server.fail.clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("secretplace") / "digits"
    tiny.run(run, max_train_steps=2, checkpointing_steps=1)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What goes up.


def test_a_push_is_one_commit_of_the_model_and_what_describes_it(hub: Hub, run: Path) -> None:
    (run / "nonfinite").mkdir()
    (run / "nonfinite" / "step_1.json").write_text("{}")
    (run / "failed_samples.jsonl").write_text("{}\n")
    assert (run / "step_2").is_dir() and (run / "objective.safetensors").is_file() and (run / "run.json").is_file()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    url = push(run, "tester/digits", commit_message="The first one")
    commits = hub.commits("tester/digits")
    assert [commit.title for commit in commits] == ["initial commit", "The first one"] and commits[-1].oid in url
    files = hub.files("tester/digits")
    assert set(files) == UPLOADED
    for name in ("config.json", "model.safetensors", "processor_config.json", "metrics.jsonl"):
        assert files[name] == (run / name).read_bytes()
    assert files["curves.png"] == b"curves"
    assert not hub.repos["tester/digits"].private
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_second_push_is_a_commit_on_top_and_says_so(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("tester/digits", theirs__txt=b"mine")
    push(run, "tester/digits")
    assert "has files already (theirs.txt): this is a new commit" in capsys.readouterr().out
    assert hub.files("tester/digits")["theirs.txt"] == b"mine"
    assert len(hub.commits("tester/digits")) == 2
    uploads = len(hub.puts)
    push(run, "tester/digits", license="mit")
    assert len(hub.commits("tester/digits")) == 3
    assert len(hub.puts) == uploads  # the large files were there


def test_a_revision_leaves_main_alone(hub: Hub, run: Path) -> None:
    push(run, "tester/digits", revision="long")
    push(run, "tester/digits", revision="long", license="mit")  # the branch is there now
    assert set(hub.files("tester/digits")) == {".gitattributes"}
    assert set(hub.files("tester/digits", "long")) == UPLOADED
    assert (
        'from_pretrained("tester/digits", revision="long")' in hub.files("tester/digits", "long")["README.md"].decode()
    )


def test_private_is_never_public(hub: Hub, run: Path) -> None:
    push(run, "tester/mine", private=True)
    assert hub.repos["tester/mine"].private
    push(run, "tester/mine", license="mit")  # stays as it is
    hub.add_repo("tester/public")
    with pytest.raises(ValueError, match="tester/public is public, and private was asked for"):
        push(run, "tester/public", private=True)
    assert set(hub.files("tester/public")) == set()


def test_no_folder_of_this_machine_and_no_token_go_up(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "run.json").read_text())
    place = str(run.parent)
    record["data"] |= {"source": f"{place}/photos of mine", "guide": "~/guides/clusters.npz", "filter": f"p={place}/a"}
    record["train"] |= {"output_dir": str(run), "resume_from_checkpoint": "latest", "overwrite_output_dir": True}
    record["model"]["init_from"] = "../other/first"
    (run / "run.json").write_text(json.dumps(record))
    score: dict[str, Any] = {
        "protocol": "knn",
        "row": f"pretrained {place}/digits",
        "values": [0.5],
        "metric": "accuracy",
    }
    score |= {"n_train": 8, "n_test": 2, "half_width": 0.1}
    (run / "scores.json").write_text(json.dumps({"scores": [score], "comparisons": []}))
    push(run, "tester/digits")
    files = hub.files("tester/digits")
    assert set(files) == UPLOADED | {"scores.json"}
    for secret in (place, TOKEN, "guides", "../other", "secretplace"):
        assert not [each[:300] for each in hub.received if secret.encode() in each], secret
        assert secret not in capsys.readouterr().out or secret == place
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert recipe["data"]["source"] == "photos of mine" and recipe["data"]["guide"] == "clusters.npz"
    assert recipe["train"]["output_dir"] == "runs/digits" and recipe["model"]["init_from"] == "first"
    assert "overwrite_output_dir" not in recipe["train"] and "resume_from_checkpoint" not in recipe["train"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/a b/x.csv", "x.csv"),
        ("/data/*.parquet", "*.parquet"),
        ("/home/me/photos/", "photos"),
        ("~/x", "x"),
        ("~bob/photos", "photos"),
        ("../../d/e", "e"),
        ("./e", "e"),
        ("a=/abs/x y", "a=x y"),
        ("file:///a/b", "b"),
        ("pyg:/abs/Cora", "pyg:Cora"),
        ("user/name", "user/name"),
        ("https://host/x", "https://host/x"),
        ("hf://datasets/u/n", "hf://datasets/u/n"),
        ("pyg:Planetoid:Cora", "pyg:Planetoid:Cora"),
        ("a rate of 1/2, or 1 / 2", "a rate of 1/2, or 1 / 2"),
        (str(ROOT / "README.md"), "README.md"),
    ],
)
def test_names_of_paths(text: str, expected: str) -> None:
    assert without_paths({"a": [text]}) == {"a": [expected]}


def test_a_relative_folder_that_is_there_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clients" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_paths(["clients/photos", "clients/other"]) == ["photos", "clients/other"]


def test_curves_are_a_picture(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    with PILImage.open(io.BytesIO(picture_of(run, record) or b"")) as picture:
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 10
    (run / "metrics.jsonl").unlink()
    assert picture_of(run, record) is None


# The recipe.


def test_the_recipe_is_the_run(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "tester/digits")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(hub.files("tester/digits")["recipe.yaml"])
    found = parse_pretrain(["--config", str(path), "--data", "digits"])
    record = json.loads((run / "run.json").read_text())
    assert json.loads(json.dumps(found["modality"].options())) == record["modality"]["image"]
    assert json.loads(json.dumps(vars(found["encoder"]))) == record["encoder"]
    assert json.loads(json.dumps(vars(found["data"]))) == record["data"]
    free = {"output_dir", "resume_from_checkpoint"}
    assert {k: v for k, v in vars(found["train"]).items() if k not in free} == {
        k: v for k, v in record["train"].items() if k not in free
    }
    model = MMSSLModel(MMSSLConfig(modalities=record["modality"], **record["encoder"]))
    objective = found["objective"](model)
    options = record["objective"][type(objective).__name__]
    assert options == {name: json.loads(json.dumps(getattr(objective, name))) for name in options}


def test_the_recipe_of_a_joint_run_and_of_a_sum(hub: Hub, run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    terms = {
        name: {"class_path": cls, "init_args": {"views": False}} for name, cls in
        (("rebuild", "MaskedReconstruction"), ("place", "PositionPrediction"))
    }  # fmt: skip
    record["objective"] = {"Sum": {"terms": terms, "weights": {"place": 0.5}}}
    speech = MMSSLConfig(modalities={"speech": {"num_mels": 8}}).modalities
    assert speech is not None
    record["modality"] |= speech
    record["also"] = {"speech": {"data": record["data"], "samples": 3, "weight": 0.5, "per_device_train_batch_size": 4}}
    (run / "run.json").write_text(json.dumps(record))
    save_tiny(run, record["modality"])
    push(run, "tester/joint")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(hub.files("tester/joint")["recipe.yaml"])
    found = parse_pretrain(["--config", str(path)])
    (also,) = found["also"]
    assert also.modality.name == "speech" and also.modality.num_mels == 8
    assert (also.weight, also.per_device_train_batch_size) == (0.5, 4)
    model = MMSSLModel(MMSSLConfig(modalities=record["modality"], hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2))  # fmt: skip
    objective = found["objective"](model)
    assert {type(term).__name__ for term in objective.members()} == {"MaskedReconstruction", "PositionPrediction"}
    papers = hub.files("tester/joint")["README.md"].decode()
    assert all(line in papers for each in (Sum, MaskedReconstruction, PositionPrediction) for line in each.references)


# The card.


def parts(text: str) -> dict[str, str]:
    """The sections of a card by their headings."""
    found = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {"": found[0]} | dict(zip(found[1::2], found[2::2], strict=True))


def cells(section: str) -> dict[str, list[str]]:
    """The rows of a table by their first cells."""
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_card_says_what_the_run_was(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    made = card(run, "tester/digits", license="mit")
    found, about = parts(made.text), made.data.to_dict()
    assert (about["library_name"], about["license"]) == ("mmssl", "mit")
    assert "image" in about["tags"] and "MaskedReconstruction" in about["tags"]
    assert about["pipeline_tag"] == "feature-extraction" and "model-index" not in about
    assert "image data" in found[""] and "without labels" in found[""]
    assert cells(found["Data"])["image"] == ["digits", "split train, max_samples 60", "60", "1.0"]
    options = cells(found["Objective"])
    assert options["mask_ratio"] == ["0.5"] and options["average_layers"] == ["[]"]
    assert set(options) - {"option", "---"} == set(record["objective"]["MaskedReconstruction"])
    model = MMSSLModel.from_pretrained(run)
    assert cells(found["Encoder"])["parameters"] == [f"{sum(p.numel() for p in model.parameters()):,}"]
    assert cells(found["Encoder"])["hidden_size"] == ["16"]
    training = cells(found["Training"])
    assert training["optimiser steps"] == ["2"] and training["samples of a step"] == ["8"]
    assert training["device"] == [record["device"]] and training["processes"] == ["1"]
    assert training["mixed precision"] == ["no"] and torch.__version__.split("+")[0] in training["versions"][0]
    assert float(training["minutes"][0]) == pytest.approx(record["minutes"], abs=0.005)
    assert "**too early** at step 2" in found["Health"] and "curves.png" in found["Health"]
    assert cells(found["Health"])["std"][1] == f"{record['health']['image']['end']['std']:.3g}"
    assert "Not measured" in found["Probes"] and "not measured" in found["Limits"]
    assert "mit" in found["Licence"]
    assert all(line in found["Papers"] for line in MaskedReconstruction.references)


def test_what_is_not_known_is_said_to_be_so(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    change(run / "run.json", health={}, reads_labels=True, total_steps=9, model={"init_from": "google/vit"})
    (run / "metrics.jsonl").unlink()
    made = card(run, "tester/digits")
    found = parts(made.text)
    assert "license" not in made.data.to_dict() and "None is stated" in found["Licence"]
    assert "Not measured" in found["Health"] and "curves.png" not in found["Health"]
    assert "collapsed was not measured" in found["Limits"]
    assert "Labels were read in training" in found["Data"] and "with labels" in found[""]
    assert f"after step {record['steps']} of 9" in found[""] and "google/vit" in found[""]
    assert f"seed {record['train']['seed']}" in found["Limits"]


def test_early_runs_have_cards_too(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    for name in ("reads_labels", "model", "health"):
        del record[name]
    (run / "run.json").write_text(json.dumps(record))
    text = card(run, "tester/digits").text
    assert "without labels" in text and "collapsed was not measured" in text


def test_the_card_shows_the_scores_of_the_closing_words(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a table beside raw features and an untrained encoder, and in the form of the Hub's own tables."""
    record = json.loads((run / "run.json").read_text())
    change(run / "run.json", train=record["train"] | {"hub_model_id": "tester/digits"})
    closing_words(run, load_objective(run), DataArguments("digits", max_samples=60))
    assert f"on the card of tester/digits: mmssl push {run} tester/digits" in capsys.readouterr().out
    scores = json.loads((run / "scores.json").read_text())["scores"]
    push(run, "tester/digits")
    uploaded = ModelCard(hub.files("tester/digits")["README.md"].decode())
    rows = cells(parts(uploaded.text)["Probes"])
    columns = rows["features"]
    assert {"raw features", "untrained encoder", "pretrained encoder"} <= set(rows)
    for score in scores:
        label = {"raw": "raw features"}.get(score["row"], f"{score['row']} encoder")
        assert rows[label][columns.index(f"{score['protocol']} {score['metric']}")].startswith(
            f"{score['values'][0]:.3f}"
        )
    data: Any = uploaded.data
    results = {each.metric_name: each for each in data.eval_results}
    for score in scores:
        if score["row"] == "pretrained":
            result = results[f"{score['protocol']} {score['metric']}"]
            assert (result.metric_value, result.dataset_name) == (score["values"][0], "digits")
    assert len(results) == sum(score["row"] == "pretrained" for score in scores)
    assert data.model_name == "digits"
    assert json.loads(hub.files("tester/digits")["scores.json"])["scores"] == scores


def save_tiny(folder: Path, modalities: dict[str, dict[str, Any]]) -> None:
    """A model and a processor of these modalities, as a run saves them."""
    torch.manual_seed(0)
    config = MMSSLConfig(modalities=modalities, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    MMSSLModel(config).save_pretrained(folder)
    MMSSLProcessor(MMSSLFeatureExtractor(config.modalities)).save_pretrained(folder)


def sample_of(name: str, folder: Path) -> None:
    """A file of one modality, where and as the snippet of a card expects it."""
    random = np.random.default_rng(0)
    if name == "image":
        PILImage.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "sample.png")
    elif name == "speech":
        import soundfile

        soundfile.write(folder / "sample.wav", random.uniform(-1, 1, 16000), 16000)
    elif name == "point_cloud":
        np.save(folder / "sample.npy", random.standard_normal((2048, 3)))
    elif name == "graph":
        edges = np.array([[0, 1, 2], [1, 2, 0]])
        np.savez(folder / "sample.npz", edge_index=edges, x=random.standard_normal((3, 4)).astype(np.float32))
    elif name == "time_series":
        values = random.standard_normal((64, 1))
        np.savetxt(folder / "sample.csv", values, header="a", comments="", delimiter=",")
    elif name == "video":
        (folder / "sample.mp4").write_bytes(encode(noise(16, 16, 16)))


TINY: dict[str, dict[str, Any]] = {
    "image": {"image_size": 8, "patch_size": 2},
    "speech": {},
    "point_cloud": {"num_groups": 8, "group_size": 8, "num_points": 128},
    "graph": {"num_features": 4},
    "time_series": {"patch_length": 8},
    "video": {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2},
    "tabular": {
        "schema": [
            {"name": "age", "kind": "numerical", "missing": 0.0, "mean": 41.5, "std": 9.0, "min": 1.0, "max": 90.0},
            {"name": 'the "kind"', "kind": "categorical", "missing": 0.1, "categories": ["a'b", "c"]},
            {"name": "town", "kind": "categorical", "missing": 0.1, "buckets": 5},
        ]
    },
}


@pytest.mark.parametrize("modalities", [*([name] for name in TINY), ["image", "tabular"]], ids="+".join)
def test_the_snippet_of_the_card_runs(
    run: Path, modalities: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(TINY) == set(names("modalities"))
    record = json.loads((run / "run.json").read_text())
    config = MMSSLConfig(modalities={name: TINY[name] for name in modalities})
    assert config.modalities is not None
    record["modality"] = {name: config.modalities[name] for name in modalities}
    record["also"] = {name: {"data": record["data"], "samples": 1, "weight": 1.0} for name in modalities[1:]}
    (run / "run.json").write_text(json.dumps(record))
    save_tiny(run, config.modalities)
    for name in modalities:
        sample_of(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card(run, str(run)).text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["output"].pooler_output.shape == (1, 16) and found["output"].last_hidden_state.isfinite().all()
    assert snippet.count("model(") == len(modalities)
    check_model(run)


def test_every_objective_names_its_papers() -> None:
    """As its file does: with the first author and the year."""
    objectives: dict[str, Any] = dict(find_all("objectives", Objective))
    for name, objective in objectives.items():
        assert objective.references and isinstance(objective.references, tuple), name
        source = Path(sys.modules[objective.__module__].__file__ or "").read_text()
        docstring = ast.get_docstring(ast.parse(source)) or ""
        for line in objective.references:
            author, title, year = re.fullmatch(r'(\S+?)(?: and .*| et al\.|, .*?), "(.+)".*, .*?(\d{4})', line).groups()  # type: ignore[union-attr]
            assert title and author.strip(",") in docstring, (name, line)
            assert year in docstring, (name, line)


# What can be wrong.


def untouched(hub: Hub, repo: str = "tester/digits") -> bool:
    return repo not in hub.repos or len(hub.commits(repo)) == 1


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        (None, "tester/digits", "found no token.*hf auth login"),
        (WRONG, "tester/digits", r"does not accept the token \(401\)"),
        (READER, "tester/digits", r"may not write there \(403\)"),
        (TOKEN, "other/digits", r"may not write there \(403\)"),
        (TOKEN, "digits", "expected user/name"),
        (TOKEN, "a/b/c", "expected user/name"),
        (TOKEN, "tester/my digits!", "expected user/name"),
    ],
)
def test_a_push_that_is_not_allowed(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, expected: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys, "argv", ["mmssl", "push", str(run), repo])
    for name in ("read", "there"):
        if name == "there" and repo.count("/") == 1 and "!" not in repo:
            hub.add_repo(repo)  # no more is allowed where it is there already
        with pytest.raises((ValueError, OSError), match=expected) as raised:
            push(run, repo)
        with pytest.raises(SystemExit, match=expected):
            main()
        assert "\n" not in str(raised.value) and "hf_a" not in str(raised.value)
        assert untouched(hub, repo)


def test_a_private_repository_of_others_is_not_there(hub: Hub, run: Path) -> None:
    hub.add_repo("other/digits", private=True)
    with pytest.raises(OSError, match="403"):
        push(run, "other/digits")
    assert untouched(hub, "other/digits")


def test_no_network(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(OSError, match=f"could not reach {address} for tester/digits"):
        push(run, "tester/digits")


def test_no_finished_run(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no finished run.*config\.json"):
        push(tmp_path / "nothing", "tester/digits")
    with pytest.raises(ValueError, match="no finished run"):
        push(run / "step_2", "tester/digits")
    record = json.loads((run / "run.json").read_text())
    del record["steps"]
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["mmssl", "push", str(run), "tester/digits"])
    with pytest.raises(SystemExit, match="one has begun there"):
        main()
    assert untouched(hub)


@pytest.mark.parametrize("damage", ["cut", "head", "empty", "garbage"])
def test_damaged_weights_are_refused_before_upload_and_at_load(hub: Hub, run: Path, damage: str) -> None:
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"cut": whole[:-100], "head": whole[:20], "empty": b"", "garbage": b"\0" * 4000}[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged"):
        push(run, "tester/digits")
    assert untouched(hub)
    with pytest.raises(ValueError, match=rf"{run}.*model\.safetensors is cut off or damaged"):
        AutoModel.from_pretrained(run)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(hub: Hub, run: Path) -> None:
    weights = run / "model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    for changed, expected in (
        ({each: value for each, value in state.items() if each != name}, f"of {name} found the shape None"),
        ({**state, "other": torch.zeros(2)}, r"of other found the shape \[2\], expected None"),
        ({**state, name: torch.full_like(state[name], math.nan)}, f"not finite in {name}"),
    ):
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{expected}"):
            push(run, "tester/digits")
    assert untouched(hub)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "many", "hidden_size.*int.*many"),
        ("hidden_size", "16", "hidden_size.*int"),
        ("hidden_size", None, "hidden_size"),
        ("class_token", 3, "class_token.*bool"),
        ("drop_path_rate", "half", "drop_path_rate.*float"),
        ("norm_position", "middle", "norm_position.*middle"),
        ("modalities", ["image"], "modalities"),
        ("modalities", {"smell": {}}, "smell"),
        ("modalities", {"image": {"size": 3}}, "size"),
    ],
)
def test_a_config_of_wrong_types_is_refused_by_name(run: Path, field: str, value: Any, expected: str) -> None:
    change(run / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"{run}/config\.json: .*{expected}"):
        AutoModel.from_pretrained(run)
    with pytest.raises(ValueError, match=rf"config\.json: .*{expected}"):
        MMSSLModel.from_pretrained(run)
    with pytest.raises(ValueError, match=rf"config\.json: .*{expected}"):
        push(run, "tester/digits")


def test_a_config_may_say_0_for_a_float(run: Path) -> None:
    change(run / "config.json", drop_path_rate=0, layer_scale_init=1)
    assert MMSSLConfig.from_pretrained(run).drop_path_rate == 0


def test_a_processor_that_is_no_json_is_refused(hub: Hub, run: Path) -> None:
    (run / "processor_config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match=r"processor_config\.json"):
        push(run, "tester/digits")
    assert untouched(hub)


# Uploads while a run trains.

HUB: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "tester/digits"}


def same(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """The same numbers, but for those of the clock."""
    clock = {"samples_per_second", "tokens_per_second", "data_wait", "mfu", "memory_gib", "health/seconds"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines] == [
        {k: v for k, v in line.items() if k not in clock} for line in others
    ]


def test_a_run_uploads_checkpoints_and_its_end(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each upload ends before the next checkpoint, which is else a matter of speed.
    begun = Uploads.checkpoint

    def patient(self: Uploads, *given: Any) -> None:
        begun(self, *given)
        assert self.future is not None
        self.future.result()

    monkeypatch.setattr(Uploads, "checkpoint", patient)
    lines = tiny.run(tmp_path / "a", max_train_steps=6, checkpointing_steps=2, hub_private_repo=True, **HUB)
    titles = [commit.title for commit in hub.commits("tester/digits")]
    assert titles[1:] == [f"MaskedReconstruction, {step} steps" for step in (2, 4, 6)]
    assert hub.repos["tester/digits"].private
    second = {path: hub.blobs[blob] for path, blob in hub.commits("tester/digits")[1].files.items()}
    assert "after step 2 of 6" in second["README.md"].decode()
    assert [json.loads(line)["step"] for line in second["metrics.jsonl"].splitlines()] == [1, 2]
    last = hub.files("tester/digits")
    assert set(last) == UPLOADED and "goes on" not in last["README.md"].decode()
    assert last["model.safetensors"] == (tmp_path / "a" / "model.safetensors").read_bytes()
    assert second["model.safetensors"] != last["model.safetensors"]
    (tmp_path / "second").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "second" / name).write_bytes(second[name])
    model = AutoModel.from_pretrained(tmp_path / "second")
    checkpoint = load_file(next((tmp_path / "a" / "step_4").glob("model*.safetensors")))
    assert not torch.equal(next(model.parameters()), checkpoint[f"model.{next(iter(dict(model.named_parameters())))}"])
    assert not (tmp_path / "a" / ".hub").exists()
    assert f"The model is on the Hub: {hub.url}" in capsys.readouterr().out

    monkeypatch.undo()
    assert same(lines, tiny.run(tmp_path / "b", max_train_steps=6, checkpointing_steps=2))


def test_failing_uploads_are_said_and_change_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    hub.fail["/commit/"] = 413
    run = tmp_path / "a"
    with pytest.raises(OSError) as raised:
        tiny.run(run, max_train_steps=2, checkpointing_steps=1, **HUB)
    assert f"The run is whole in {run}; to try again: mmssl push {run} tester/digits" in str(raised.value)
    assert "(413)" in str(raised.value) and "\n" not in str(raised.value)
    said = [line for line in capsys.readouterr().out.splitlines() if "could not be uploaded" in line]
    assert len(said) == 1 and said[0].startswith("Step 1 could not be uploaded to tester/digits; the run goes on")
    assert same(tiny.metrics(run), tiny.metrics(finished))
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert {path.name for path in run.iterdir()} == {path.name for path in finished.iterdir()}
    hub.fail.clear()
    push(run, "tester/digits")
    assert set(hub.files("tester/digits")) == UPLOADED


def test_the_hub_is_asked_before_anything_else(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.training.loop.open_stream", lambda *_: pytest.fail("data were read"))
    for token, expected in ((WRONG, "401"), (READER, "403"), (READER, "403")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match=expected):
            tiny.run(tmp_path / "a", max_train_steps=2, **HUB)
        assert not (tmp_path / "a").exists()
        if token == READER:
            hub.add_repo("tester/digits")  # which all may read


def test_an_upload_is_left_out_while_another_one_runs(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uploads = Uploads(Accelerator(), run, "tester/digits", None)
    uploads.future = Future()
    record = json.loads((run / "run.json").read_text())
    written: list[int] = []

    def write(state: Any, folder: Path, said: Any) -> None:
        written.append(said["steps"])
        raise OSError("No space left on device")

    uploads.checkpoint(torch.nn.Linear(1, 1), record, write)
    assert written == [] and uploads.future is not None
    uploads.step = 7
    uploads.future.set_exception(OSError("the line\nwent dead"))
    uploads.checkpoint(torch.nn.Linear(1, 1), record, write)
    assert written == [2] and uploads.future is None
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Step 7 could not be uploaded") and "the line went dead" in first
    assert second.startswith("Step 2 could not be uploaded") and "No space left" in second
    uploads.checkpoint(torch.nn.Linear(1, 1), record | {"model": {"peft_type": "lora"}}, write)
    Uploads(Accelerator(), run, None, None).checkpoint(torch.nn.Linear(1, 1), record, write)
    assert written == [2] and not hub.calls


def test_a_run_may_be_resumed_with_uploads(hub: Hub, run: Path) -> None:
    tiny.run(run, max_train_steps=2, resume_from_checkpoint=str(run / "step_1"), checkpointing_steps=1, **HUB)
    assert set(hub.files("tester/digits")) == UPLOADED


@pytest.mark.parametrize(
    "flags", [{"push_to_hub": True}, {"hub_model_id": "tester/a"}, {"hub_private_repo": True}], ids=str
)
def test_flags_that_go_together(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="push_to_hub"):
        TrainArguments(**flags)


# The whole way, in processes of their own.

LOAD = """
import sys, numpy as np, mmssl
from transformers import AutoModel, AutoProcessor
def features(name, **options):
    model, processor = (each.from_pretrained(name, **options) for each in (AutoModel, AutoProcessor))
    return model, processor, model(**processor(list(np.load("samples.npy")))).last_hidden_state.detach().numpy()
model, processor, found = features("tester/trained")
np.save("features.npy", found)
model.push_to_hub("tester/own")
processor.push_to_hub("tester/own")
assert (features("tester/own")[2] == found).all()
assert features("tester/trained", revision="again")[2].shape == found.shape
"""


@pytest.mark.slow
def test_from_training_to_another_machine(
    hub: Hub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train and push; break off another push, and go on with it; load; download. The token is nowhere."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    said = ""

    def call(*command: str, expected: int = 0) -> str:
        nonlocal said
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        said += done.stdout + done.stderr
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout + done.stderr

    recipe = str(ROOT / "examples" / "recipes" / "mae_digits.yaml")
    train = {"max_train_steps": 2, "checkpointing_steps": 1, "per_device_train_batch_size": 8, "output_dir": "trained"}
    train |= {"push_to_hub": "true", "hub_model_id": "tester/trained", "hub_private_repo": "true"}
    flags = [f"--train.{name}={value}" for name, value in train.items()]
    mmssl = [sys.executable, "-m", "mmssl"]
    out = call(*mmssl, "pretrain", "--config", recipe, "--data.max_samples=60", "--encoder.hidden_size=16", *flags)
    assert "The model is on the Hub" in out
    assert hub.repos["tester/trained"].private and set(hub.files("tester/trained")) == UPLOADED
    trained = tmp_path / "trained"

    # An upload of two large files is killed in the middle: the second push uploads what is missing.
    hub.puts.clear()
    hub.hold_after = 1
    again = [*mmssl, "push", str(finished), "tester/trained", "--revision", "again"]
    with subprocess.Popen(again, env=environment, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        assert hub.held.wait(120)
        process.send_signal(signal.SIGKILL)
        said += "".join(process.communicate())
    hub.hold_after = None
    assert len(hub.puts) == 1 and len(hub.commits("tester/trained", "again")) == len(hub.commits("tester/trained"))
    monkeypatch.setattr("mmssl.hub.picture_of", picture_of)
    push(finished, "tester/trained", revision="again")
    assert len(hub.puts) == len(set(hub.puts)) == 2
    files = hub.files("tester/trained", "again")
    assert files["model.safetensors"] == (finished / "model.safetensors").read_bytes()

    samples = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "samples.npy", samples)
    call(sys.executable, "-c", LOAD)
    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    expected = model(**processor(list(samples))).last_hidden_state.detach().numpy()
    assert (np.load(tmp_path / "features.npy") == expected).all()  # to the bit

    hf = shutil.which("hf") or str(Path(sys.executable).with_name("hf"))
    call(hf, "download", "tester/trained", "--local-dir", "downloaded")
    for name in UPLOADED - {".gitattributes"}:
        assert (tmp_path / "downloaded" / name).read_bytes() == hub.files("tester/trained")[name]

    del environment["HF_TOKEN"]
    assert "tester/trained" in call(hf, "download", "tester/trained", "--local-dir", "stolen", expected=1)

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert TOKEN not in said and len(said) > 1000
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [each[:300] for each in (*hub.received, *hub.blobs.values()) if TOKEN.encode() in each]
    assert not [each[:300] for each in hub.blobs.values() if str(tmp_path).encode() in each]


ELSEWHERE = """
import sys, numpy as np

class NoMmssl:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmssl":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoMmssl())
from transformers import AutoModel, AutoProcessor
name, revision = sys.argv[1:]
asked = {"revision": revision, "trust_remote_code": True}
model, processor = (each.from_pretrained(name, **asked) for each in (AutoModel, AutoProcessor))
assert type(model).__module__.startswith("transformers_modules."), type(model)
np.save("found.npy", model(**processor(list(np.load("samples.npy")))).pooler_output.detach().numpy())
"""


@pytest.mark.slow
def test_with_its_code_it_loads_from_the_hub_where_mmssl_is_not(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmssl", "push", str(run), "tester/alone", "--self_contained", "true"])
    main()
    files = hub.files("tester/alone")
    assert set(files) > UPLOADED and {"modeling.py", "processing.py", "image.py"} < set(files)
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    for name in ("config.json", "processor_config.json"):
        assert json.loads(files[name]).pop("auto_map")
        kept = json.loads((run / name).read_text())
        assert kept.items() <= (json.loads(files[name]) | {"feature_extractor": kept.get("feature_extractor")}).items()
    assert b"trust_remote_code=True" in files["README.md"]
    assert not [
        name for name, content in files.items() if str(tmp_path).encode() in content or b"secretplace" in content
    ]
    samples = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "samples.npy", samples)
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    newest = hub.commits("tester/alone")[-1].oid
    subprocess.run([sys.executable, "-c", ELSEWHERE, "tester/alone", newest], env=environment, cwd=tmp_path, check=True)
    model, processor = AutoModel.from_pretrained(run), AutoProcessor.from_pretrained(run)
    expected = model(**processor(list(samples))).pooler_output.detach().numpy()
    assert (np.load(tmp_path / "found.npy") == expected).all()  # to the bit

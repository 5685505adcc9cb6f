"""Encoders for programs without mmssl: loaded there, each computes what the encoder computes."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_imports

from mmssl import MMSSLConfig, MMSSLFeatureExtractor, MMSSLForSequenceClassification, MMSSLModel
from mmssl.cli import main
from mmssl.discovery import names
from mmssl.encoder import EncoderConfig
from mmssl.export import export, self_contained, to_onnx, to_timm, to_transformers
from mmssl.export.plain_models import NEEDED
from mmssl.modeling import make_modality
from mmssl.remote_code import code_of, without_demands
from tests.matrix.cases import MODALITIES

IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
VIDEO: dict[str, Any] = {"num_frames": 4, "tubelet_size": 2, "image_size": 16, "patch_size": 8}


def make_model(modalities: dict[str, dict[str, Any]], kind: Any = MMSSLModel, **options: Any) -> Any:
    """With no parameter at its start value."""
    shape: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = kind(MMSSLConfig(modalities=modalities, **{**shape, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def photo(side: int = 16) -> PILImage.Image:
    return PILImage.fromarray(load_sample_image("china.jpg")).crop((100, 100, 420, 420)).resize((side, side))


# With the code beside the weights

ELSEWHERE = """
import sys

class NoMmssl:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmssl", "modalities", "objectives"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoMmssl())
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForImageClassification, AutoProcessor

try:
    import mmssl
    raise SystemExit("mmssl was found")
except ModuleNotFoundError:
    pass
found = {}
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    batch = load_file(f"{folder}.safetensors")
    found[name] = model(**batch).last_hidden_state.detach()
    (modality,) = model.modalities.values()
    assert modality.name == name, modality.name
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    if name == "image":
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        found["pixels"] = processor(images=f"{folder}.png")["pixel_values"]
        classifier = AutoModelForImageClassification.from_pretrained(
            f"{sys.argv[1]}/classifier", trust_remote_code=True
        )
        found["logits"] = classifier(**batch).logits.detach()
save_file(found, f"{sys.argv[1]}/found.safetensors")
"""


@pytest.mark.slow
def test_a_self_contained_model_is_the_same_where_mmssl_cannot_be_imported(tmp_path: Path) -> None:
    cases = {name: (options, samples) for name, (options, samples) in MODALITIES.items() if name != "image"}
    cases["image"] = ({**IMAGE, "position_embedding": "learned"}, lambda count: [photo(32)] * count)
    photo(32).save(tmp_path / "image.png")
    expected = {}
    for name, (options, samples) in cases.items():
        batch = dict(MMSSLFeatureExtractor({name: options})(samples(2)))
        model = make_model({name: options}, class_token=True)
        self_contained(model, tmp_path / name)
        save_file({key: value.contiguous() for key, value in batch.items()}, tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            expected[name] = model(**batch).last_hidden_state
            if name == "image":
                expected["pixels"] = batch["pixel_values"][:1]
                classifier = make_model({name: options}, MMSSLForSequenceClassification, num_labels=3)
                self_contained(classifier, tmp_path / "classifier")
                expected["logits"] = classifier(**batch).logits
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), *cases],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", names("modalities"))
def test_the_code_of_a_modality_is_complete_and_demands_little(name: str, tmp_path: Path) -> None:
    """transformers reads the imports of each file, and refuses those of libraries that are not installed."""
    code = code_of([make_modality(name, MODALITIES[name][0])])
    assert {"modeling", "processing", "task_models", "discovery", name} <= set(code)
    demanded = set()
    for file, text in code.items():
        (tmp_path / f"{file}.py").write_text(text)
        demanded |= set(get_imports(tmp_path / f"{file}.py"))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in code, f"{file} imports {node.module}"
    with_transformers = {"transformers", "numpy", "huggingface_hub", "safetensors"}
    assert demanded - set(sys.stdlib_module_names) <= {"torch", "einops", "PIL", *with_transformers}
    assert not re.search(r"^\s*(from|import) mmssl", "".join(code.values()), flags=re.MULTILINE)


def test_late_imports_are_wrapped_and_others_stay() -> None:
    source = (
        "import torch\n\n\ndef read():\n    import io\n    from mmssl.samples import Samples\n"
        "    from av.stream import (\n        Disposition,\n    )\n\n"
        "    try:\n        import kornia\n    except ImportError:\n        pass\n    return Disposition\n"
    )
    expected = (
        "import torch\n\n\ndef read():\n    import io\n    from mmssl.samples import Samples\n    try:\n"
        "        from av.stream import (\n            Disposition,\n        )\n    finally:\n        pass\n\n    try:\n"
        "        import kornia\n    except ImportError:\n        pass\n    return Disposition\n"
    )
    assert without_demands(source) == expected


def test_where_mmssl_is_imported_its_own_classes_load_it(tmp_path: Path) -> None:
    self_contained(make_model({"image": IMAGE}), tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is MMSSLModel
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling.MMSSLModel"


# As plain models of transformers


def load_plain(folder: Path, **options: Any) -> PreTrainedModel:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("position_embedding", ["sincos", "learned"])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_plain_image_models_are_the_same(
    class_token: bool, qkv_bias: bool, position_embedding: str, tmp_path: Path
) -> None:
    options = {"class_token": class_token, "qkv_bias": qkv_bias, "intermediate_size": 40, "hidden_act": "relu"}
    model = make_model({"image": {**IMAGE, "position_embedding": position_embedding}}, **options)
    to_transformers(model, tmp_path)
    plain = load_plain(tmp_path, **({"add_pooling_layer": False} if class_token else {}))
    assert type(plain).__name__ == ("ViTModel" if class_token else "SiglipVisionModel")
    assert type(plain).__module__.startswith("transformers.models.")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    own = MMSSLFeatureExtractor({"image": IMAGE})(photo())
    torch.testing.assert_close(pixels, own["pixel_values"], atol=1e-6, rtol=1e-5)
    found, expected = plain(pixels).last_hidden_state, model(**own).last_hidden_state
    assert found.shape == (1, 16 + class_token, 24)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_photo_of_another_size_is_read_almost_the_same(tmp_path: Path) -> None:
    """Pillow rounds resized pixels to 1/255, once for each axis; dividing by a deviation of 0.2 makes 0.02 of that."""
    to_transformers(make_model({"image": IMAGE}), tmp_path)
    whole = PILImage.fromarray(load_sample_image("china.jpg")).crop((0, 0, 600, 400))
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(whole, return_tensors="pt")["pixel_values"]
    own = MMSSLFeatureExtractor({"image": IMAGE})(whole)["pixel_values"]
    assert (pixels - own).abs().max() < 0.04
    assert (pixels - own).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"num_register_tokens": 2, "layer_scale_init": 0.1}, "Dinov2WithRegistersModel"),
        ({"num_register_tokens": 1, "qkv_bias": False}, "Dinov2WithRegistersModel"),
        ({"layer_scale_init": 0.1, "intermediate_size": 48}, "Dinov2Model"),
    ],
)
@pytest.mark.parametrize("position_embedding", ["sincos", "learned"])
@torch.no_grad()
def test_layer_scale_and_registers_are_those_of_dinov2(
    position_embedding: str, options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = make_model({"image": {**IMAGE, "position_embedding": position_embedding}}, class_token=True, **options)
    to_transformers(model, tmp_path)
    plain = load_plain(tmp_path)
    assert type(plain).__name__ == kind
    pixels = torch.randn(3, 3, 16, 16)
    found, expected = plain(pixels).last_hidden_state, model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_width_of_the_feed_forward_that_dinov2_lacks_is_refused(tmp_path: Path) -> None:
    model = make_model({"image": IMAGE}, class_token=True, num_register_tokens=1, intermediate_size=40)
    with pytest.raises(ValueError, match=r"intermediate_size: found 40; .*multiples of hidden_size, 24, alone"):
        to_transformers(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "position_embedding"),
    [
        ({"class_token": True}, "sincos"),
        ({"class_token": True, "qkv_bias": False}, "learned"),
        ({"class_token": True}, "index"),
        ({}, "index"),
        ({"qkv_bias": False, "final_norm": False, "intermediate_size": 40, "hidden_act": "relu"}, "index"),
    ],
)
@torch.no_grad()
def test_a_plain_video_model_is_the_same(options: dict[str, Any], position_embedding: str, tmp_path: Path) -> None:
    """VideoMAE's keys have no bias; ours is not 0, and changes nothing."""
    model = make_model({"video": {**VIDEO, "position_embedding": position_embedding}, "image": IMAGE}, **options)
    assert "qkv_bias" in options or model.encoder.layers[0].attention.qkv.bias[24:48].abs().min() > 1e-4
    to_transformers(model, tmp_path, modality="video")
    plain = load_plain(tmp_path, **({"add_pooling_layer": False} if "class_token" in options else {}))
    assert type(plain).__name__ == ("VivitModel" if "class_token" in options else "VideoMAEModel")
    frames = [np.roll(np.asarray(photo()), shift, axis=1) for shift in range(4)]
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(frames, return_tensors="pt")["pixel_values"]
    own = MMSSLFeatureExtractor({"video": {**VIDEO, "frame_stride": 1}})(np.stack(frames))
    torch.testing.assert_close(pixels.transpose(1, 2), own["pixel_values_videos"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plain(pixels).last_hidden_state, model(**own).last_hidden_state, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, Any] = {
    "residual": False,
    "feed_forward": False,
    "position_every_block": True,
    "norm_position": "post",
    "final_norm": False,
    "layer_scale_init": 0.1,
    "causal_attention": True,
    "num_register_tokens": 2,
}


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_what_plain_classes_lack_is_refused_by_name(option: str, tmp_path: Path) -> None:
    carried = option in ("layer_scale_init", "num_register_tokens")  # with a class token, by DINOv2
    model = make_model({"image": IMAGE}, class_token=not carried, **{option: REFUSED[option]})
    with pytest.raises(ValueError, match=f"{option}: found {REFUSED[option]}; .* Use self_contained"):
        to_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_option_of_the_encoder_is_carried_over_or_refused() -> None:
    """A new option belongs into one of these."""
    carried = {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
        "qkv_bias",
        "class_token",
    }
    training = {
        "drop_path_rate",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer",
        "initializer_range",
    }
    options = {field.name for field in fields(EncoderConfig)}
    assert options == carried | training | set(NEEDED)
    assert set(REFUSED) == set(NEEDED)
    for name, needed in NEEDED.items():
        assert EncoderConfig.__dataclass_fields__[name].default == needed


@pytest.mark.parametrize(
    ("modalities", "options", "message"),
    [
        ({"speech": MODALITIES["speech"][0]}, {}, "speech: plain classes of transformers do not read its tokens"),
        ({"graph": MODALITIES["graph"][0]}, {}, "graph: plain classes of transformers do not"),
        ({"video": VIDEO}, {}, "position_embedding: found sincos; expected index, or an encoder with a class token"),
        ({"video": {**VIDEO, "position_embedding": "learned"}}, {}, "position_embedding: found learned"),
        ({"image": {**IMAGE, "image_size": (16, 8)}}, {}, "image_size: found 16x8"),
        ({"image": {**IMAGE, "patch_size": (4, 8)}}, {}, "patch_size: found 4x8"),
        ({"image": {**IMAGE, "scattering_scales": 1}}, {}, "scattering_scales: found 1"),
        ({"image": IMAGE, "video": VIDEO}, {}, "modality: found None; the model has image, video"),
        ({"image": IMAGE}, {"modality": "video"}, "modality: found video; the model has image"),
    ],
)
def test_what_has_no_plain_class_is_refused(
    modalities: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "scattering_scales" in message:
        pytest.importorskip("kymatio", reason="scattering needs kymatio")
    with pytest.raises(ValueError, match=message):
        to_transformers(make_model(modalities), tmp_path, **options)


# For timm and for ONNX


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": True, "intermediate_size": 40, "qkv_bias": False},
        {"class_token": True, "num_register_tokens": 2, "layer_scale_init": 0.1},
        {"num_register_tokens": 1, "final_norm": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_timm_loads_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    learned = {"position_embedding": "learned" if "num_register_tokens" in options else "sincos"}
    model = make_model({"image": {**IMAGE, "image_size": (16, 24), "patch_size": (4, 8), **learned}}, **options)
    to_timm(model, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(3, 3, 16, 24)
    out = model(pixel_values=pixels)
    torch.testing.assert_close(plain.forward_features(pixels), out.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(pixels), out.pooler_output, atol=1e-5, rtol=1e-5)
    about = timm.data.resolve_model_data_config(plain)
    assert [*about["mean"], *about["std"]] == [*IMAGE["image_mean"], *IMAGE["image_std"]]


@torch.no_grad()
def test_the_weights_for_timm_make_the_same_model_by_hand(tmp_path: Path) -> None:
    """Without timm: its vision transformer, written out from the names of its weights."""
    options = {"class_token": True, "num_register_tokens": 2, "layer_scale_init": 0.1}
    model = make_model({"image": IMAGE}, **options)
    to_timm(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    used = set()

    def read(name: str) -> torch.Tensor:
        used.add(name)
        return saved[name]

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ read(f"{name}.weight").T + read(f"{name}.bias")

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(values, (24,), read(f"{name}.weight"), read(f"{name}.bias"), 1e-6)

    pixels = torch.randn(3, 3, 16, 16)
    hidden = torch.nn.functional.conv2d(pixels, read("patch_embed.proj.weight"), read("patch_embed.proj.bias"), 4)
    hidden = hidden.flatten(2).mT + read("pos_embed")
    prefix = torch.cat([read("cls_token"), read("reg_token")], dim=1).expand(3, -1, -1)
    hidden = torch.cat([prefix, hidden], dim=1)
    for block in ("blocks.0", "blocks.1"):
        query, key, value = (
            linear(f"{block}.attn.qkv", norm(f"{block}.norm1", hidden)).unflatten(2, (3, 2, 12)).unbind(2)
        )
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / 12**0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value).flatten(2)
        hidden = hidden + linear(f"{block}.attn.proj", mixed) * read(f"{block}.ls1.gamma")
        inner = torch.nn.functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", hidden)))
        hidden = hidden + linear(f"{block}.mlp.fc2", inner) * read(f"{block}.ls2.gamma")
    expected = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(norm("norm", hidden), expected, atol=1e-5, rtol=1e-5)
    assert used == set(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("norm_position", "post"), ("residual", False)],
)
def test_what_timm_lacks_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: found {value}; timm's vision transformers have"):
        to_timm(make_model({"image": IMAGE}, **{name: value}), tmp_path)
    with pytest.raises(ValueError, match="video: found an encoder of clips"):
        to_timm(make_model({"video": VIDEO}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_onnx_computes_the_same(class_token: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = make_model({"image": IMAGE}, class_token=class_token)
    to_onnx(model, tmp_path)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 2, 5):
        pixels = torch.randn(count, 3, 16, 16)
        found = session.run(["last_hidden_state", "pooler_output"], {"pixel_values": pixels.numpy()})
        out = model(pixel_values=pixels)
        np.testing.assert_allclose(found[0], out.last_hidden_state, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(found[1], out.pooler_output, atol=1e-5, rtol=1e-4)
    assert list(AutoImageProcessor.from_pretrained(tmp_path).image_mean) == IMAGE["image_mean"]


def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmssl.export.plain_models.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        to_onnx(make_model({"image": IMAGE}), tmp_path)


# The command


def test_the_command_writes_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model({"image": IMAGE}, MMSSLForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "run")
    for name, expected in {
        "self_contained": "MMSSLForSequenceClassification",
        "transformers": "SiglipVisionModel",
        "timm": None,
    }.items():
        output = tmp_path / name
        monkeypatch.setattr(
            sys, "argv", ["mmssl", "export", str(tmp_path / "run"), "--format", name, "--output", str(output)]
        )
        main()
        about = json.loads((output / "config.json").read_text())
        assert about.get("architectures", [None]) == [expected]
        assert (output / "model.safetensors").is_file()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    make_model({"image": IMAGE}).save_pretrained(tmp_path / "run")
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    with pytest.raises(ValueError, match="run is not empty; expected a new folder"):
        export(run, run, "transformers")
    with pytest.raises(ValueError, match="holds no model"):
        export(str(tmp_path), other)
    with pytest.raises(ValueError, match="modality: found image; a self_contained model keeps all"):
        export(run, other, modality="image")
    to_transformers(make_model({"image": IMAGE}), tmp_path / "plain")
    with pytest.raises(ValueError, match="found a model of type siglip_vision_model; expected one of mmssl"):
        export(str(tmp_path / "plain"), other)
    assert not Path(other).exists()


@torch.no_grad()
def test_the_snippets_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here where mmssl is imported; that it need not be is tested above."""
    model = make_model({"image": IMAGE}, class_token=True)
    self_contained(model, tmp_path / "self_contained")
    to_transformers(model, tmp_path / "plain")
    for name in ("seven.png", "photo.png"):
        photo().save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    expected = model(**MMSSLFeatureExtractor({"image": IMAGE})(photo())).pooler_output
    for snippet in snippets:
        found: dict[str, Any] = {}
        exec(snippet, found)
        torch.testing.assert_close(found["features"], expected, atol=1e-5, rtol=1e-5)

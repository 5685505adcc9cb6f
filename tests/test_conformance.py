"""The tests that transformers has for its own models, run on ours; they come with its source distribution."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import transformers

from tests.test_modeling import each_modality, make_batch, make_model

HERE = Path(__file__).parent

# Each of these fails, for each model. A test that no longer fails must go from here.
CANNOT_APPLY = {
    "test_model_get_set_embeddings": "asks for a table of input embeddings; modalities embed tokens by layers",
    "test_resize_tokens_embeddings": "resizes that table, to another vocabulary",
    "test_load_with_mismatched_shapes": "wants weights not to fit when the vocabulary changes; there is none",
    "test_model_main_input_name": "wants it to be forward's first argument; forward takes any modality's, by name",
    "test_model_outputs_equivalence": "subtracts outputs, and token_mask is boolean; compared below instead",
}

# Of these at least one case has run and passed, so that a green run says something. All others pass or are skipped.
WHAT_MATTERS = (
    "test_save_load",
    "test_torch_save_load",
    "test_correct_missing_keys",
    "test_can_init_all_missing_weights",
    "test_can_be_initialized_on_meta",
    "test_determinism",
    "test_batching_equivalence",
    "test_hidden_states_output",
    "test_attention_outputs",
    "test_retain_grad_hidden_states_attentions",
    "test_training",
    "test_training_gradient_checkpointing",
    "test_can_set_attention_dynamically",
    "test_eager_matches_sdpa_inference_00_fp16_pad_left_sdpa_kernels",
    "test_eager_matches_sdpa_inference_08_fp32_pad_left_sdpa_kernels",
    "test_eager_matches_sdpa_inference_16_bf16_pad_left_sdpa_kernels",
)


def pip(*arguments: str | Path) -> None:
    """Run pip; skips the test where it fails, for most often there is no index to be reached."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--retries", "0", "--timeout", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not get transformers' tests: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture
def transformers_tests(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """A folder with transformers' package ``tests``, as far as it is needed, and what that imports."""
    version = transformers.__version__
    assert pytestconfig.cache is not None
    cached = pytestconfig.cache.mkdir(f"transformers-{version}-tests")
    common = cached / "test_modeling_common.py"
    if not common.exists():
        pip("install", "--target", cached, "parameterized")
        # Of a source distribution pip reads the metadata with the setuptools that are here; it builds nothing.
        source = ("--no-binary", "transformers", "--no-build-isolation")
        pip("download", f"transformers=={version}", *source, "--dest", tmp_path)
        with tarfile.open(tmp_path / f"transformers-{version}.tar.gz") as archive:
            member = archive.extractfile(f"transformers-{version}/tests/{common.name}")
            assert member is not None
            common.write_bytes(member.read())  # last, so that where it lies all else does
    tests = tmp_path / "tests"
    for folder in (tests, tests / "exporters", tests / "generation"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    # What the mixin imports of other packages of tests, of exports and of generation, which are not distributed.
    (tests / "exporters" / "test_export.py").write_text("class ExportTesterMixin:\n    pass\n")
    (tests / "generation" / "test_utils.py").write_text("class GenerationTesterMixin:\n    pass\n")
    shutil.copy(common, tests)
    shutil.copytree(cached / "parameterized", tmp_path / "parameterized")
    return tests


@pytest.mark.slow
def test_what_transformers_asks_of_its_own_models(transformers_tests: Path) -> None:
    """In a process of its own, since its package is called ``tests`` too; on the CPU, without a network."""
    shutil.copy(HERE / "conformance" / "model_tests.py", transformers_tests / "test_modeling_mmssl.py")
    folder = transformers_tests.parent
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{HERE.parent}", "TRANSFORMERS_TEST_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", "--rootdir=.", "tests"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (folder / "report.xml").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    passed: dict[str, set[str]] = defaultdict(set)
    failed: dict[str, dict[str, str | None]] = defaultdict(dict)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        model, name = case.attrib["classname"].rpartition(".")[2], case.attrib["name"]
        problems = [each for each in case if each.tag in ("failure", "error")]
        if problems:
            failed[model][name] = problems[0].get("message")
        elif case.find("skipped") is None:
            passed[model].add(name)
    assert set(passed) == {"ImageModelTest", "SeriesModelTest"}, done.stdout[-2000:]
    for model in passed:
        unexpected = {name: why for name, why in failed[model].items() if name not in CANNOT_APPLY}
        assert unexpected == {}, f"{model}, with transformers {transformers.__version__}"
        assert set(CANNOT_APPLY) - set(failed[model]) == set(), f"{model} passes what the table says it cannot"
        assert set(WHAT_MATTERS) - passed[model] == set(), f"{model} has not passed these"


@each_modality
@torch.no_grad()
def test_a_tuple_holds_the_same_outputs(modality: str) -> None:
    model, batch = make_model(attn_implementation="eager"), make_batch(modality)
    for asked in ({}, {"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
        out = model(**batch, **asked)
        found = model(**batch, **asked, return_dict=False)
        assert isinstance(found, tuple)
        assert len(found) == 3 + len(asked)
        for values, name in zip(found, out, strict=True):
            torch.testing.assert_close(values, out[name], atol=0, rtol=0)

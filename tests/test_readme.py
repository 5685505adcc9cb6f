"""The README is true: its Python runs, and its commands are taken with the flags that it shows."""

import re
import shlex
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from mmssl import MMSSLConfig, MMSSLFeatureExtractor, MMSSLModel, MMSSLProcessor
from mmssl.cli import COMMANDS, parse_pretrain

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
TAKEN = [line for line in LINES if re.match(r"mmssl |accelerate launch examples/", line) and "..." not in line]
DOES = {  # what a command calls when its flags have been read
    "evaluate": "mmssl.evaluation.evaluate",
    "finetune": "mmssl.evaluation.finetuning.finetune",
    "forecast": "mmssl.evaluation.forecasting.forecast",
    "cka": "mmssl.evaluation.cka.layer_cka",
    "embed": "mmssl.evaluation.embed",
    "push": "mmssl.hub.push",
}


class Reached(Exception):
    """The flags were fine."""


def stops(function: Callable) -> Callable:
    @wraps(function)  # so that the flags are still those of the function
    def stop(*given: Any, **options: Any) -> None:
        raise Reached

    return stop


@pytest.mark.parametrize("line", TAKEN)
def test_commands_of_the_readme_are_taken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "accelerate":
        (recipe,) = re.findall(r'"recipes" / "(\w+\.yaml)"', (ROOT / words[2]).read_text())
        parse_pretrain(words[3:], ROOT / "examples" / "recipes" / recipe)
        return
    name, flags = words[1], words[2:]
    if name == "pretrain" and not any("help" in flag for flag in flags):
        parse_pretrain(flags)
    elif name in DOES:
        module, _, function = DOES[name].rpartition(".")
        monkeypatch.setattr(DOES[name], stops(getattr(import_module(module), function)))
        with pytest.raises(Reached):
            COMMANDS[name](flags)
    else:
        assert name in COMMANDS


def test_the_readme_shows_every_command() -> None:
    assert set(re.findall(r"`?mmssl (\w+)", TEXT)) & set(COMMANDS) == set(COMMANDS)


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a checkpoint and pictures; the pretraining does one step of a small batch."""
    monkeypatch.chdir(tmp_path)
    options = {"image": {"image_size": 8, "patch_size": 2}}
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MMSSLModel(MMSSLConfig(modalities=options, **shape)).save_pretrained("runs/mae_digits")
    MMSSLProcessor(MMSSLFeatureExtractor(options)).save_pretrained("runs/mae_digits")
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", *(f"photos/{i}.png" for i in range(4))):
        PILImage.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(name)
    load, pretrain = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    found: dict[str, Any] = {}
    exec(load, found)
    assert found["output"].last_hidden_state.shape == (2, 16, 16) and found["output"].pooler_output.shape == (2, 16)
    assert "num_train_epochs=50" in pretrain
    exec(pretrain.replace("num_train_epochs=50", "max_train_steps=1, per_device_train_batch_size=4"), found)
    assert (found["run"] / "model.safetensors").is_file()

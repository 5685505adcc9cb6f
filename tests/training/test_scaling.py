"""Sharded, compiled and launched in other ways: the same losses, and the same files in the end."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModel

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.encoder import EncoderLayer
from mmssl.training import TrainArguments, load_objective
from mmssl.training.checkpoint import read_record
from mmssl.training.prepare import compile_blocks, prepare, set_up_sharding
from tests.training.test_processes import launch
from tests.training.test_resume import assert_same_weights, exact
from tests.training.tiny import metrics, run

CONFIGS = Path(__file__).parents[2] / "examples" / "launch"


@pytest.mark.slow
def test_a_sharded_objective_is_the_unsharded_one(tmp_path: Path) -> None:
    launch("tests.training.two_processes_sharded", str(tmp_path))
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    unsharded = torch.load(tmp_path / "unsharded.pt", weights_only=True)
    assert sharded.keys() == unsharded.keys() and len(sharded) >= 14
    assert any(name.startswith("teacher.module.") for found in sharded.values() for name in found)
    for cell, found in sharded.items():
        assert found.keys() == unsharded[cell].keys()
        for name, value in found.items():
            close = {"norm": 1e-5, "read": 1e-5, "loss": 2e-6}.get(name, 1e-6)  # sums of many terms
            alone = unsharded[cell][name].double()
            assert ((value.double() - alone).abs() <= close + close * alone.abs()).all(), f"{cell} {name}"

    ddp, fsdp, resumed = (tmp_path / name for name in ("ddp", "fsdp", "resumed"))
    assert read_record(fsdp)["processes"] == 2 and read_record(fsdp)["mixed_precision"] == "bf16"
    for name in ("loss", "grad_norm", "health/std", "health/rank"):
        one, two = ([line[name] for line in metrics(folder) if name in line] for folder in (ddp, fsdp))
        assert len(one) == (3 if "health" in name else 6) and two == pytest.approx(one, rel=1e-5)
    for file in ("model.safetensors", "objective.safetensors"):
        weights, others = load_file(fsdp / file), load_file(ddp / file)
        assert weights.keys() == others.keys()
        assert not [name for name in weights if "_orig_mod" in name or name.startswith("module.")]
        for name, value in weights.items():
            torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-5)
    assert AutoModel.from_pretrained(fsdp).state_dict().keys() == load_file(fsdp / "model.safetensors").keys()
    assert load_objective(fsdp).get_buffer("queue.features").shape == (20, 8)

    assert list((fsdp / "step_3").rglob("__1_0.distcp"))  # each process has written its part
    assert exact(metrics(resumed)) == exact(metrics(fsdp))[3:]
    assert_same_weights(fsdp, resumed)


@pytest.mark.parametrize(
    ("setting", "found", "expected"),
    [("version", 1, "2"), ("cpu_ram_efficient_loading", True, "false"), ("activation_checkpointing", True, "false")],
)
def test_settings_of_fsdp_that_would_do_harm_are_refused(setting: str, found: Any, expected: str) -> None:
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False)
    name = "fsdp_version" if setting == "version" else setting
    vars(plugin)[name] = found
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=f"^fsdp_{setting}: found {str(found).lower()}; expected {expected}, as "):
        set_up_sharding(accelerator)


def test_deepspeed_is_told_the_flags_that_it_cannot_see() -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"gradient_clipping": "auto"}),
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
        prepare=lambda *both: both,
    )
    nothing: Any = None
    for norm, told in ((None, 0.0), (0.5, 0.5)):
        prepare(accelerator, nothing, nothing, TrainArguments(per_device_train_batch_size=24, max_grad_norm=norm))
        config = accelerator.deepspeed_plugin.deepspeed_config
        assert config == {"gradient_clipping": told, "train_micro_batch_size_per_gpu": 24}
    with pytest.raises(ValueError, match=r"on_nonfinite: found skip; expected stop, as DeepSpeed"):
        prepare(accelerator, nothing, nothing, TrainArguments(on_nonfinite="skip"))


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a backend that needs no C++ compiler, and keeps the order in which random numbers are drawn."""
    flags: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "queue": True}
    flags |= {"activation_checkpointing": True}
    plain = run(tmp_path / "plain", **flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()
    counters.clear()
    compiled = run(tmp_path / "compiled", **flags)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["unimplemented"]
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-5)

    resume = str(tmp_path / "compiled" / "step_2")
    resumed = run(tmp_path / "resumed", **flags, resume_from_checkpoint=resume)
    assert AcceleratorState().dynamo_plugin.backend == DynamoBackend.AOT_EAGER
    assert exact(resumed) == exact(compiled)[2:]
    assert_same_weights(tmp_path / "resumed", tmp_path / "compiled")
    for file in ("model.safetensors", "objective.safetensors", "step_2/model.safetensors"):
        assert load_file(tmp_path / "compiled" / file).keys() == load_file(tmp_path / "plain" / file).keys()
    weights = load_file(tmp_path / "compiled" / "model.safetensors")
    assert AutoModel.from_pretrained(tmp_path / "compiled").state_dict().keys() == weights.keys()
    AcceleratorState._reset_state(reset_partial_state=True)  # or what is run next would be compiled too
    GradientState._reset_state()


@pytest.mark.slow
def test_blocks_of_different_drop_path_rates_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are more than torch compiles of one piece of code if it is not told to, which it says in a warning alone."""
    config = MMSSLConfig(
        modalities={"image": {"image_size": 4, "patch_size": 2, "num_channels": 1}}, hidden_size=8,
        num_hidden_layers=10, num_attention_heads=2, drop_path_rate=0.2,
    )  # fmt: skip
    model = MMSSLModel(config).train()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # torch's own
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, backend="eager")
    model(pixel_values=torch.rand(2, 1, 4, 4))
    assert counters["stats"]["unique_graphs"] >= 10 and not counters["unimplemented"]


def launch_arguments(config: Path) -> argparse.Namespace:
    """What ``accelerate launch`` makes of a config."""
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "x.py"])
    )
    return arguments


@pytest.mark.parametrize(
    ("config", "kind", "processes", "machines", "precision"),
    [
        ("one_gpu", "NO", 1, 1, "bf16"),
        ("eight_gpus", "MULTI_GPU", 8, 1, "bf16"),
        ("two_machines", "MULTI_GPU", 16, 2, "bf16"),
        ("fsdp2", "FSDP", 8, 1, "bf16"),
        ("deepspeed_zero2", "DEEPSPEED", 8, 1, None),
        ("two_cpu_processes", "MULTI_GPU", 2, 1, "no"),
    ],
)
def test_configs_are_read_by_accelerate(
    config: str, kind: str, processes: int, machines: int, precision: str | None
) -> None:
    read = load_config_from_file(str(CONFIGS / f"{config}.yaml"))
    assert (read.distributed_type.value, read.num_processes, read.num_machines) == (kind, processes, machines)
    assert read.mixed_precision == precision and read.use_cpu is False
    arguments = launch_arguments(CONFIGS / f"{config}.yaml")
    assert (arguments.num_processes, arguments.mixed_precision) == (processes, precision or "no")
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        kind == "MULTI_GPU", kind == "FSDP", kind == "DEEPSPEED"
    )  # fmt: skip


def test_every_config_is_tested() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) == 6


def test_the_config_of_two_machines_starts_eight_processes_on_each() -> None:
    arguments = launch_arguments(CONFIGS / "two_machines.yaml")
    arguments.main_process_ip, arguments.machine_rank = "10.0.0.1", 1
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_the_config_of_fsdp_wraps_blocks_and_passes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_arguments(CONFIGS / "fsdp2.yaml")
    arguments.main_process_port = 0
    environment = prepare_multi_gpu_env(arguments)
    for name in [name for name in environment if name.startswith("FSDP_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.transformer_cls_names_to_wrap == [EncoderLayer.__name__]
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.reshard_after_forward is True
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    set_up_sharding(accelerator)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy()


def test_the_config_of_deepspeed_is_zero_stage_2_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast DeepSpeed would cast all weights, and the inputs would be of another type."""
    read = load_config_from_file(str(CONFIGS / "deepspeed_zero2.yaml"))
    monkeypatch.chdir(CONFIGS.parents[1])
    plugin = DeepSpeedPlugin(hf_ds_config=read.deepspeed_config["deepspeed_config_file"])
    plugin.set_mixed_precision("no")
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and not settings["bf16"]["enabled"]


@pytest.mark.slow
def test_the_config_of_two_cpu_processes_starts_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGS / "two_cpu_processes.yaml"), "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "-m", "tests.training.tiny", str(tmp_path), '{"max_train_steps": 2}'],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_record(tmp_path)["processes"] == 2 and len(metrics(tmp_path)) == 2

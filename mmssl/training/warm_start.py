"""The weights that a run begins with: those of an earlier run, or of a model of transformers."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import cached_file

from mmssl.encoder import EncoderConfig
from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
from mmssl.objectives.base import Objective
from mmssl.positions import GridPositions
from mmssl.teacher import Teacher
from mmssl.training.checkpoint import RECORD, read_record
from mmssl.training.run import HEADS
from mmssl.training.vision_weights import VISION_MODELS, blank_tokens, read_vision_model, refusal

# With another value of one of these, the same weights are another function, or none.
FIXED = (
    "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "position_every_block", "residual",
    "feed_forward", "norm_position", "final_norm", "layer_norm_eps", "qkv_bias",
)  # fmt: skip
CHANNELS_LAST = ("image", "video")  # modalities whose content of a token ends with its channels


@dataclass
class Found:
    """What a checkpoint has, by the names that it would have here.

    Attributes:
        kind: what it is of, for people.
        encoder: options of its encoder.
        modalities: options of its modalities.
        model: weights of the encoder and of the modalities.
        fixed: options of the encoder that must be the same here.
        steps: optimiser steps that it was trained for. None: it does not say.
        heads: weights of its objective.
        classes: of its objective, and of the terms of a sum, by how the names of their weights begin.
        remarks: what has no weights here, and what was done about it.
    """

    kind: str
    encoder: dict[str, Any]
    modalities: dict[str, dict[str, Any]]
    model: dict[str, Tensor]
    fixed: tuple[str, ...] = FIXED
    steps: int | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    remarks: list[tuple[str, str, str]] = field(default_factory=list)


class WarmStart:
    """Gives a new model, and then its objective, the weights of a checkpoint as far as they fit.

    Args:
        init_from: a folder, or a name on the Hub.
        config: of the model that begins with it.

    Attributes:
        outcomes: of each weight, here or there: loaded, adapted, new (not in the checkpoint) or left out; and why.

    Raises:
        ValueError: no checkpoint, of a kind that is not known, or of an encoder of another shape.
    """

    def __init__(self, init_from: str, config: MMSSLConfig):
        self.init_from, self.config = init_from, config
        self.encoder = {name: getattr(config, name) for name in asdict(EncoderConfig())}
        with torch.random.fork_rng(devices=[]):  # building a model to read into draws numbers
            self.found = read(init_from)
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.sizes: dict[str, int] = {}
        self.check_shape()

    def check_shape(self) -> None:
        """Refuse an encoder whose blocks are others; how many they are may differ.

        Raises:
            ValueError: the options that differ, as the flags to give.
        """
        flags = []
        for name in self.found.fixed:
            there, here = (resolved(options, name) for options in (self.found.encoder, self.encoder))
            if there != here:
                flags.append(f"--encoder.{name} {str(there).lower()} (found {str(here).lower()})")
        scaled = [each.get("layer_scale_init") is not None for each in (self.found.encoder, self.encoder)]
        if scaled[0] != scaled[1]:
            flags.append(f"--encoder.layer_scale_init {self.found.encoder.get('layer_scale_init')}".lower())
        if flags:
            raise ValueError(
                f"init_from: the encoder of {self.init_from} ({self.found.kind}) has another shape than the one here; "
                f"to begin with its weights, give {' '.join(flags)}"
            )

    @torch.no_grad()
    def load_model(self, model: MMSSLModel) -> None:
        """Before an objective is built on the model, so that teachers begin as copies of it."""
        own = model.state_dict()
        for name, value in own.items():
            self.sizes[name] = value.numel()
            self.outcomes[name] = self.load_one(name, value, self.found.model.get(name))
        for name, value in self.found.model.items():
            if name not in own:
                self.sizes[name] = value.numel()
                self.outcomes[name] = ("left out", "no such weight here")

    def load_one(self, name: str, own: Tensor, given: Tensor | None) -> tuple[str, str]:
        """Write ``given`` into ``own``, which is a weight of the model, if it fits; what has become of it, and why."""
        room, modality = name.split(".")[:2]
        there, here = (
            (options.get(modality) or {}) if room == "modalities" else {}
            for options in (self.found.modalities, self.config.modalities or {})
        )
        places = modality in CHANNELS_LAST and name.endswith(".position.grid_tokens") and bool(there)
        if given is None and not places:
            return "new", "not in the checkpoint"
        if different := [key for key in layout(here) if layout(there)[key] != layout(here)[key]]:
            return "left out", f"of another {' and '.join(different)}"
        if places and (given is None or given.shape != own.shape):
            return self.copy_places(modality, own, given)
        assert given is not None
        shapes = f"{tuple(given.shape)} there, {tuple(own.shape)} here"
        same_prefix = self.found.encoder["class_token"] == self.encoder["class_token"] and own.shape == given.shape
        if name == "encoder.prefix_tokens" and not same_prefix:
            self.copy_prefix(own, given)
            return "adapted", f"class token to class token, registers to registers; {shapes}"
        if own.shape == given.shape:
            own.copy_(given)
            return "loaded", others(there, here)
        if modality in CHANNELS_LAST and name.endswith(".projection.weight"):
            old, new = there["num_channels"], here["num_channels"]
            if old != new and own.shape[1] * old == given.shape[1] * new:
                # Each channel gets the mean of the old ones; where all are equal, the sum is what it was.
                mean = given.unflatten(1, (-1, old)).mean(dim=-1, keepdim=True) * (old / new)
                own.copy_(mean.expand(-1, -1, new).flatten(1))
                return "adapted", f"each of {new} channels has the mean of {old}, times {old}/{new}"
        return "left out", f"shape {shapes}"

    def copy_places(self, modality: str, own: Tensor, given: Tensor | None) -> tuple[str, str]:
        """What the checkpoint adds to the tokens of an input of the size here, be it learned there or computed."""
        there, here = self.found.modalities[modality], (self.config.modalities or {})[modality]
        reader, like = (cast(Any, make_modality(modality, options)) for options in (there, here))
        with torch.random.fork_rng(devices=[]):  # the start values that a table would have
            positions = reader.positions(own.shape[-1])
        if isinstance(positions, GridPositions):
            if given is None:
                return "new", "not in the checkpoint"
            positions.grid_tokens = nn.Parameter(given)
        own.copy_(positions(blank_tokens(reader, like).coords).view_as(own))
        return "adapted", f"what the checkpoint adds at these places; {others(there, here)}"

    def copy_prefix(self, own: Tensor, given: Tensor) -> None:
        """Class token to class token, register tokens to register tokens."""
        old, new = (int(options["class_token"]) for options in (self.found.encoder, self.encoder))
        if old and new:
            own[:, 0] = given[:, 0]
        count = min(own.shape[1] - new, given.shape[1] - old)
        own[:, new : new + count] = given[:, old : old + count]

    @torch.no_grad()
    def load_heads(self, objective: Objective) -> None:
        """The objective's own weights, of it or of those terms of a sum that are of a class of the checkpoint's.

        Parameters alone: queues, centres and the like begin anew. Teachers of heads become copies of them.
        """
        modules = dict(objective.named_modules())
        members = {f"{name}." * bool(name): each for name, each in modules.items() if isinstance(each, Objective)}
        copies = tuple(f"{name}." for name, each in modules.items() if isinstance(each, MMSSLModel | Teacher))
        sources = {prefix: self.source_of(prefix, type(member).__name__) for prefix, member in members.items()}
        used = set()
        for name, value in objective.named_parameters():
            if name.startswith(copies):
                continue
            prefix = max((each for each in members if name.startswith(each)), key=len)
            source = sources[prefix]
            theirs = None if source is None else source + name.removeprefix(prefix)
            given = self.found.heads.get(theirs) if theirs is not None else None
            label = f"objective.{name}"
            self.sizes[label] = value.numel()
            if given is None:
                why = f"its objective is {self.found.classes.get('', 'unknown')}" if source is None else "not in it"
                self.outcomes[label] = ("new", why if self.found.classes else "the checkpoint has no objective")
            elif given.shape != value.shape:
                self.outcomes[label] = ("new", f"shape {tuple(given.shape)} there, {tuple(value.shape)} here")
            else:
                value.copy_(given)
                used.add(theirs)
                self.outcomes[label] = ("loaded", "")
        for member in members.values():
            for name, child in member.named_children():
                if isinstance(child, Teacher) and (followed := name.removeprefix("teacher_")) != name:
                    child.module.load_state_dict(getattr(member, followed).state_dict())
        state = {name for name, _ in objective.named_buffers()}
        for name in sorted(self.found.heads.keys() - used):
            copied = name.startswith(copies) or any(part in ("teacher", "model") for part in name.split("."))
            if not copied and "teacher_" not in name:
                why = "what it remembers begins anew" if name in state else "no such weight here"
                self.sizes[f"objective.{name}"] = self.found.heads[name].numel()
                self.outcomes.setdefault(f"objective.{name}", ("left out", why))

    def source_of(self, prefix: str, class_name: str) -> str | None:
        """How names begin, in the checkpoint, of the weights of an objective of this class: of the same term first."""
        if self.found.classes.get(prefix) == class_name:
            return prefix
        return next((each for each, other in self.found.classes.items() if other == class_name), None)

    def record(self) -> dict[str, Any]:
        """For run.json: where the run began, and what became of each weight."""
        weights = {name: f"{what}: {why}" if why else what for name, (what, why) in sorted(self.outcomes.items())}
        remarks = {what: f"{status}: {why}" for what, status, why in self.found.remarks}
        return {"source": self.init_from, "kind": self.found.kind, "steps": self.found.steps, "weights": weights} | (
            {"remarks": remarks} if remarks else {}
        )

    def show(self) -> None:
        """Print what became of the weights, those of one kind together."""
        steps = "" if self.found.steps is None else f", {self.found.steps} steps"
        table = Table(title=f"Weights from {self.init_from} ({self.found.kind}{steps})", title_justify="left")
        for column in ("weights", "tensors", "numbers", "what became of them"):
            table.add_column(column, justify="right" if column in ("tensors", "numbers") else "left", overflow="fold")
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, (what, why) in self.outcomes.items():
            groups.setdefault((group_of(name), what, why), []).append(name)
        for (group, what, why), names in groups.items():
            numbers = sum(self.sizes[name] for name in names)
            table.add_row(group, str(len(names)), f"{numbers:,}", f"{what}: {why}" if why else what)
        for what, status, why in self.found.remarks:
            table.add_row(what, "", "", f"{status}: {why}")
        Console().print(table)


def read(init_from: str) -> Found:
    """What there is to begin with.

    Raises:
        ValueError: no checkpoint, or of a kind that is not known.
    """
    folder = Path(init_from)
    if (folder / RECORD).is_file() and not (folder / "config.json").is_file():
        return read_checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(init_from)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"init_from: found no model at {init_from} ({str(error).splitlines()[0]}); expected the folder of a "
            "finished run, a checkpoint step_<n> of a run, or a name on the Hub"
        ) from error
    if isinstance(config, MMSSLConfig):
        return read_run(init_from, config)
    if reason := refusal(config):
        raise ValueError(f"init_from: {init_from} ({config.model_type}) cannot be the encoder here: {reason}")
    if config.model_type in VISION_MODELS:
        kind, encoder, modalities, model, remarks = read_vision_model(init_from, config)
        registers = ("num_register_tokens",) if encoder["num_register_tokens"] else ()  # further ones may begin here
        fixed = (*FIXED, "class_token", *registers, "causal_attention")
        return Found(kind, encoder, modalities, model, fixed, remarks=remarks)
    known = ", ".join(("mmssl", *VISION_MODELS))
    raise ValueError(f"init_from: {init_from} is a model of the type {config.model_type}; expected one of {known}")


def read_checkpoint(folder: Path) -> Found:
    """A checkpoint step_<n>: of the weights of the objective, those of the model that the run would save."""
    record = read_record(folder)
    if (record.get("model") or {}).get("peft_type"):
        raise ValueError(
            f"init_from: {folder} is a checkpoint of a run with peft_type, whose additions are not merged yet; resume "
            "that run, and begin with the folder it leaves at its end"
        )
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"init_from: {folder} has no model.safetensors; begin with the folder of a finished run")
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        # What wraps a module stands before its name where it was trained in several processes, or compiled.
        weights[name.removeprefix("module.").replace("_orig_mod.", "")] = value
    trained = record.get("trained", "model.")
    return Found(
        "checkpoint of a run",
        record["encoder"],
        record["modality"],
        {name.removeprefix(trained): value for name, value in weights.items() if name.startswith(trained)},
        steps=int(folder.name.rpartition("_")[2]) if folder.name.rpartition("_")[2].isdigit() else None,
        heads={name: value for name, value in weights.items() if not name.startswith(trained)},
        classes=classes_of(record),
    )


def read_run(init_from: str, config: MMSSLConfig) -> Found:
    """A model as a run leaves it, with or without its record and its objective's weights."""
    load: Any = MMSSLModel.from_pretrained  # with information, it returns two things
    model, info = load(init_from, dtype=torch.float32, output_loading_info=True)
    absent = set(info["missing_keys"])
    files = [cached_file(init_from, file, _raise_exceptions_for_missing_entries=False) for file in (RECORD, HEADS)]
    record = read_record(Path(files[0]).parent) if files[0] else {}
    return Found(
        "model of a run",
        {name: getattr(config, name) for name in asdict(EncoderConfig())},
        config.modalities or {},
        {name: value for name, value in model.state_dict().items() if name not in absent},
        steps=record.get("steps"),
        heads=load_file(files[1]) if files[1] else {},
        classes=classes_of(record) if files[1] else {},
    )


def classes_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Classes of a run's objective and of its terms, by how the names of their weights begin."""
    ((name, options),) = record["objective"].items()
    terms = options.get("terms") or {}
    return {"": name} | {f"objectives.{term}.": about["class_path"] for term, about in terms.items()}


def resolved(options: Mapping[str, Any], name: str) -> Any:
    """An option of an encoder; widths that follow from others as numbers."""
    if name == "intermediate_size" and options[name] is None:
        return 4 * options["hidden_size"]
    return options[name]


def layout(options: Mapping[str, Any]) -> dict[str, Any]:
    """What an input of a modality's weights means, where the shapes of the weights do not tell."""
    found = {name: list(options[name]) for name in ("patch_size",) if isinstance(options.get(name), list | tuple)}
    found |= {name: options[name] for name in ("tubelet_size",) if name in options}
    if options.get("schema"):
        meaning = ("name", "kind", "categories", "buckets")
        found["schema"] = [{key: column.get(key) for key in meaning} for column in options["schema"]]
    return found


def others(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The options of a modality that differ, of those that the checkpoint tells."""
    pairs = [(name, there[name], here[name]) for name in here if name in there and name != "schema"]
    listed = [(name, *(list(each) if isinstance(each, tuple) else each for each in pair)) for name, *pair in pairs]
    return ", ".join(f"{name} was {old}, is {new}" for name, old, new in listed if old != new)


def group_of(name: str) -> str:
    """Weights that go into one line of the table; of a sum, those of each term."""
    parts = name.split(".")
    return ".".join(["objective", *parts[2:4]] if parts[:2] == ["objective", "objectives"] else parts[:2])


def origin(checkpoint: Path) -> dict[str, Any] | None:
    """Where the run of a checkpoint began."""
    return copy.deepcopy(read_record(checkpoint).get("started_from"))


def untouched(started_from: Mapping[str, Any]) -> Iterator[str]:
    """Names of the weights that are exactly those of the checkpoint that a run began with."""
    return (name for name, what in started_from["weights"].items() if what.partition(":")[0] == "loaded")

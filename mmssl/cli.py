"""The ``mmssl`` command: pretrain, evaluate, finetune, forecast, cka, embed, report, push, export, list."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from mmssl.discovery import find_all

SEEDS = "Folders or Hub names; several are seeds of one recipe."


def pretrain_parser() -> ArgumentParser:
    """Flags of a pretraining run: those of ``mmssl.training.pretrain``, and of whatever it is given."""
    from mmssl.modalities.base import Modality
    from mmssl.objectives.base import Objective
    from mmssl.training import pretrain

    find_all("modalities", Modality), find_all("objectives", Objective)  # so that their names are known
    parser = ArgumentParser(
        prog="mmssl pretrain",
        description="Pretrain an encoder. Flags win over the recipe, the recipe over the defaults.",
    )
    parser.add_argument("--config", action="config", help="A recipe: a YAML file with any of the flags below.")
    parser.add_function_arguments(pretrain, as_positional=False, fail_untyped=False)
    return parser


def parse_pretrain(arguments: Sequence[str] | None = None, recipe: str | Path | None = None) -> dict[str, Any]:
    """Keyword arguments of ``pretrain`` from flags; ``recipe`` gives the defaults where ``--config`` is not used."""
    parser = pretrain_parser()
    given = with_source(sys.argv[1:] if arguments is None else arguments)
    if recipe is not None and not any(flag.partition("=")[0] == "--config" for flag in given):
        given = ["--config", str(recipe), *given]
    config = parser.instantiate(parser.parse_args(given))
    return {name: value for name, value in vars(config).items() if name != "config"}


def with_source(arguments: Sequence[str]) -> list[str]:
    """``--data PATH`` is short for ``--data.source PATH``, and so is ``--test``."""
    short = {"--data": "--data.source", "--test": "--test.source"}
    return [short.get(flag, flag) + equals + value for flag, equals, value in (a.partition("=") for a in arguments)]


def evaluate_command(arguments: Sequence[str]) -> None:
    """Probe checkpoints beside raw features and untrained encoders."""
    from mmssl.data import DataArguments
    from mmssl.evaluation import PROTOCOLS, evaluate, print_scores
    from mmssl.evaluation.dense import DENSE_PROTOCOLS
    from mmssl.evaluation.features import Pooling
    from mmssl.evaluation.tables import checked, write_scores

    parser = ArgumentParser(prog="mmssl evaluate", description=evaluate_command.__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="Folders or Hub names. Seeds of one recipe make one row, other recipes rows of their own.",
    )
    parser.add_class_arguments(DataArguments, "data")
    parser.add_class_arguments(DataArguments, "test")
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=None,
        help=f"Some of {', '.join(PROTOCOLS)}. None: knn, linear, and few_shot if there are enough labels. Where "
        f"pixels or points have labels, of {', '.join(DENSE_PROTOCOLS)}.",
    )
    parser.add_argument("--pooling", type=Pooling, default="mean", help="From tokens to samples.")
    parser.add_argument("--layers", type=list[int] | None, default=None, help="Blocks that dense_* read. None: four.")
    parser.add_argument("--modality", default=None, help="Which modality, of a model that has several.")
    parser.add_argument("--output", nargs="+", default=[], help="Files to write the table to: .json, .md or .tex.")
    config = parser.instantiate(parser.parse_args(with_source(arguments)))
    outputs = [checked(path) for path in config.output]
    choices = (config.protocol, config.modality, config.pooling, config.layers)
    scores = evaluate(config.checkpoint, config.data, config.test, *choices)
    print_scores(scores, title=" ".join(config.checkpoint))
    for path in outputs:
        write_scores(scores, path)


def finetune_command(arguments: Sequence[str]) -> None:
    """Train a pretrained encoder and a head on labels, beside an untrained encoder."""
    from mmssl.evaluation import print_scores
    from mmssl.evaluation.finetuning import finetune
    from mmssl.evaluation.tables import checked, write_scores

    parser = ArgumentParser(prog="mmssl finetune", description=finetune_command.__doc__)
    parser.add_argument("checkpoints", nargs="+", help=SEEDS)
    parser.add_function_arguments(finetune, skip={"checkpoints"})
    parser.add_argument("--output", nargs="+", default=[], help="Files to write the table to: .json, .md or .tex.")
    config = vars(parser.instantiate(parser.parse_args(with_source(arguments))))
    outputs = [checked(path) for path in config.pop("output")]
    scores = finetune(**config)
    print_scores(scores, title=" ".join(config["checkpoints"]))
    for path in outputs:
        write_scores(scores, path)


def forecast_command(arguments: Sequence[str]) -> None:
    """Forecast a long series with a pretrained encoder, beside its raw windows and untrained encoders."""
    from mmssl.evaluation.forecasting import forecast, print_forecasts

    parser = ArgumentParser(prog="mmssl forecast", description=forecast_command.__doc__)
    parser.add_argument("checkpoints", nargs="+", help=SEEDS)
    parser.add_function_arguments(forecast, skip={"checkpoints"})
    parser.add_argument("--output", default=None, help="JSON file to write the result to.")
    config = vars(parser.instantiate(parser.parse_args(with_source(arguments))))
    output = config.pop("output")
    found = forecast(**config)
    print_forecasts(found, title=" ".join(config["checkpoints"]))
    if output:
        Path(output).write_text(json.dumps([asdict(each) for each in found], indent=2))


def cka_command(arguments: Sequence[str]) -> None:
    """Compare the layers of one or two encoders on the same samples, by linear CKA."""
    from mmssl.evaluation.cka import checked, layer_cka, print_cka, write_cka

    parser = ArgumentParser(prog="mmssl cka", description=cka_command.__doc__)
    parser.add_argument("checkpoint", help="Folder or Hub name: the rows.")
    parser.add_argument(
        "other",
        nargs="?",
        default=None,
        help='The columns: another one; "untrained", the same architecture with start values; or the same one.',
    )
    parser.add_function_arguments(layer_cka, skip={"checkpoint", "other"})
    parser.add_argument("--output", nargs="+", default=[], help="Files to write: .png, .pdf, .svg or .json.")
    config = vars(parser.instantiate(parser.parse_args(with_source(arguments))))
    outputs = [checked(path) for path in config.pop("output")]
    names = config["checkpoint"], config["other"] or config["checkpoint"]
    found = layer_cka(**config)
    print_cka(found, *names)
    for path in outputs:
        write_cka(found, *names, path)


def embed_command(arguments: Sequence[str]) -> None:
    """Write an embedding of each sample to a file."""
    from mmssl.evaluation import embed

    parser = ArgumentParser(prog="mmssl embed", description=embed_command.__doc__)
    parser.add_function_arguments(embed, as_positional=True, skip={"layers"})
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int | Literal["all"],
        default=[],
        help="Hidden layers in place of the output, such as 4 8, or all: 0 is what goes into the first block.",
    )
    path = embed(**vars(parser.instantiate(parser.parse_args(with_source(arguments)))))
    print(f"The embeddings are in {path}")


def report_command(arguments: Sequence[str]) -> None:
    """Write a page of a finished run: curves, samples, embeddings, attention."""
    from mmssl.data import DataArguments
    from mmssl.evaluation.report import write_report
    from mmssl.training import load_objective

    parser = ArgumentParser(prog="mmssl report", description=report_command.__doc__)
    parser.add_argument("run", help="Folder of a finished run.")
    parser.add_class_arguments(DataArguments, "data")
    parser.add_argument("--max_samples", type=int, default=1000, help="How many samples are embedded for the map.")
    parser.add_argument("--output", default=None, help="File to write. None: report.html in the folder of the run.")
    config = parser.instantiate(parser.parse_args(with_source(arguments)))
    data = config.data if config.data.source is not None else None
    path = write_report(config.run, load_objective(config.run), data, config.max_samples, config.output)
    print(f"The page is {path}, its pictures for papers are in {path.with_suffix('')}")


def push_command(arguments: Sequence[str]) -> None:
    """Upload a finished run to the Hugging Face Hub, with a card that says what it is."""
    from mmssl.hub import push

    parser = ArgumentParser(prog="mmssl push", description=push_command.__doc__)
    parser.add_function_arguments(push, as_positional=True)
    print(f"The model is on the Hub: {push(**vars(parser.instantiate(parser.parse_args(list(arguments)))))}")


def export_command(arguments: Sequence[str]) -> None:
    """Write an encoder for programs without mmssl: with its code, as a plain model, for timm or ONNX."""
    from mmssl.export import export

    parser = ArgumentParser(prog="mmssl export", description=export_command.__doc__)
    parser.add_argument("checkpoint", help="Folder of a finished run, or a Hub name.")
    parser.add_function_arguments(export, skip={"checkpoint", "output"})
    parser.add_argument("--output", required=True, help="New or empty folder to write to.")
    config = vars(parser.instantiate(parser.parse_args(list(arguments))))
    export(**config)
    print(f"The model is in {config['output']}")


def list_command(arguments: Sequence[str]) -> None:
    """Show the modalities, objectives, protocols and data sets there are."""
    from rich.console import Console
    from rich.table import Table

    from mmssl.data.builtin import BUILTIN
    from mmssl.evaluation import PROTOCOLS
    from mmssl.evaluation.dense import DENSE_PROTOCOLS
    from mmssl.modalities.base import Modality
    from mmssl.objectives.base import Objective

    ArgumentParser(prog="mmssl list", description=list_command.__doc__).parse_args(list(arguments))
    table = Table("kind", "name", "what it is")
    kinds: dict[str, dict[str, Any]] = {
        "modality": find_all("modalities", Modality),
        "objective": find_all("objectives", Objective),
        "protocol": PROTOCOLS | DENSE_PROTOCOLS,
        "data set": dict(BUILTIN),
    }
    for kind, members in kinds.items():
        for name, member in members.items():
            table.add_row(kind, name, (member.__doc__ or "").strip().splitlines()[0])
        table.add_section()
    Console().print(table)

    refusals = refused_cells()
    modalities = list(dict.fromkeys(modality for _, modality in refusals))
    matrix = Table(title="Which objective, with its defaults, runs on which modality")
    matrix.add_column("objective", no_wrap=True)
    for modality in modalities:
        matrix.add_column(modality.replace("_", " "), overflow="fold")
    reasons: list[str] = []
    for objective in dict.fromkeys(objective for objective, _ in refusals):
        cells = []
        for modality in modalities:
            if reason := refusals[objective, modality]:
                reasons.append(f"- {reason}")
            cells.append("no" if reason else "yes")
        matrix.add_row(objective, *cells)
    Console().print(matrix, *reasons, sep="\n")


def refused_cells() -> dict[tuple[str, str], str]:
    """Of each objective, with its defaults, and each modality: why they do not go together. Empty: they do."""
    import torch

    from mmssl.data.builtin import BUILTIN
    from mmssl.discovery import names
    from mmssl.modeling import MMSSLConfig, MMSSLModel, make_modality
    from mmssl.objectives.base import Objective

    def build(objective: type, modality: str, options: dict[str, Any], causal: bool) -> str:
        shape: dict[str, Any] = {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "causal_attention": causal,
        }
        try:
            with torch.device("meta"):  # without memory or arithmetic
                objective(MMSSLModel(MMSSLConfig(modalities={modality: options}, **shape)))
        except ValueError as error:
            return str(error)
        return ""

    found = {}
    for name in names("modalities"):
        modality = make_modality(name, {})
        if not modality.columns:  # a sample is a whole row of a table, so columns must be known
            with redirect_stdout(None):
                modality.fit(BUILTIN["diabetes"]("train"))
        for title, objective in find_all("objectives", Objective).items():
            wanted = [option for option in signature(objective).parameters.values() if option.default is option.empty]
            if len(wanted) > 1:  # more than the model: Sum runs where its terms do, and others have no defaults either
                continue
            plain, causal = (build(objective, name, modality.options(), causal) for causal in (False, True))
            found[title, name] = plain and causal
    return found


def pretrain_command(arguments: Sequence[str]) -> None:
    """Pretrain an encoder on unlabelled data."""
    from accelerate import PartialState

    from mmssl.training import pretrain

    run = pretrain(**parse_pretrain(arguments))
    PartialState().print(f"The model is in {run}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "pretrain": pretrain_command,
    "evaluate": evaluate_command,
    "finetune": finetune_command,
    "forecast": forecast_command,
    "cka": cka_command,
    "embed": embed_command,
    "report": report_command,
    "push": push_command,
    "export": export_command,
    "list": list_command,
}


def main() -> None:
    """Entry point of the ``mmssl`` command."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help"):
        print("usage: mmssl {" + ",".join(COMMANDS) + "} ...   (mmssl COMMAND --help shows its flags)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:10} {function.__doc__}")
        return
    if command not in COMMANDS:
        sys.exit(f"mmssl: unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
    with clear_errors(f"mmssl {command}"):
        COMMANDS[command](arguments)


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """What is wrong with the input or the machine is said without a traceback; our own mistakes keep theirs."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"{name}: {error}")

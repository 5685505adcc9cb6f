"""What is written of a run for others: a card that says what it is, and a recipe that runs it again."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from mmssl.discovery import find, find_all
from mmssl.modalities.base import Modality
from mmssl.modeling import MMSSLConfig, make_modality
from mmssl.objectives.base import Objective

RECORD, METRICS = "run.json", "metrics.jsonl"
RECIPE, CURVES, SCORES = "recipe.yaml", "curves.png", "scores*.json"
LOCAL = (  # flags of the machine and of the session, which a recipe does not repeat
    "overwrite_output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo",
)  # fmt: skip


def read_record(run: Path) -> dict[str, Any]:
    """What a run says of itself. Early ones do not say what there was not yet."""
    return {"reads_labels": False, "model": {}, "health": {}, **json.loads((run / RECORD).read_text())}


def without_paths(value: Any) -> Any:
    """A record whose paths of this machine have become names: of each the last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    return name_of(value) if isinstance(value, str) else value


PATH = re.compile(r"(?<![\w./])(?:file:/*|~\w*|\.\.?)?/(?=[^\s/])\S*")  # not the slashes of user/name or https://


def name_of(text: str) -> str:
    """Without the folders of this machine; names on the Hub, addresses and other text stay as they are."""
    if PATH.match(text) or ("/" in text and os.path.exists(text)):  # all of it is a path, spaces too
        return Path(text).name
    return PATH.sub(lambda found: Path(found[0]).name, text)


def recipe(record: Mapping[str, Any]) -> str:
    """A recipe that ``mmssl pretrain --config`` runs again, but for the data and the folder of the run."""
    first, *others = record["modality"]
    ((objective, options),) = record["objective"].items()
    train = {name: value for name, value in record["train"].items() if name not in LOCAL}
    train["output_dir"] = f"runs/{Path(train['output_dir']).name}"
    found: dict[str, Any] = {
        "modality": class_of(first, record),
        "objective": {"class_path": objective, "init_args": options},
        "encoder": record["encoder"],
        "data": record["data"],
        "train": train,
    }
    if model := {name: value for name, value in record["model"].items() if value is not None}:
        found["model"] = model
    if others:
        found["also"] = [{"modality": class_of(name, record), **record["also"][name]} for name in others]
        for source in found["also"]:
            source.pop("samples")
    flags = f"--num_processes {record['processes']} --mixed_precision {record['mixed_precision']}"
    command = f"# accelerate launch {flags} -m mmssl pretrain --config {RECIPE} --data YOUR_DATA\n"
    return command + yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def class_of(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A modality as a recipe says it."""
    return {"class_path": find("modalities", name, Modality).__name__, "init_args": record["modality"][name]}


def card(
    run: str | Path,
    repo_id: str,
    revision: str | None = None,
    license: str | None = None,
    self_contained: bool = False,
) -> ModelCard:
    """The card of a run: what it is, how to load it, what it was trained on, what was measured and what was not.

    Args:
        run: folder of the run.
        repo_id: where it is to be loaded from.
        revision: branch, if it is not on main.
        license: of the model, if any is stated.
        self_contained: whether its code is beside it.
    """
    run = Path(run)
    record = without_paths(read_record(run))
    scores = {path.stem: json.loads(path.read_text())["scores"] for path in sorted(run.glob(SCORES))}
    scores = {title_of(stem, record): without_paths(each) for stem, each in scores.items() if each}
    ((objective, _),) = record["objective"].items()
    data = ModelCardData(
        library_name="mmssl",
        pipeline_tag="feature-extraction",
        license=license,
        tags=["self-supervised-learning", *(name.replace("_", "-") for name in record["modality"]), objective],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results(scores) or None,
    )
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        what_it_is(record, objective),
        f"## Use\n\n{how_to_load(run, record, repo_id, revision, self_contained)}",
        f"## Data\n\n{about_data(record)}",
        f"## Objective\n\n{table(('option', 'value'), record['objective'][objective].items(), objective)}",
        f"## Encoder\n\n{table(('', ''), [('parameters', f'{parameters(run):,}'), *record['encoder'].items()])}",
        f"## Training\n\n{about_training(record)}\n\nAll options are in [{RECIPE}]({RECIPE}).",
        f"## Health\n\n{about_health(record, (run / METRICS).is_file())}",
        f"## Probes\n\n{about_scores(scores, repo_id)}",
        f"## Limits\n\n{about_limits(record, scores)}",
        "## Licence\n\n" + (f"{license}." if license else "None is stated: ask the owner before you use the model."),
        f"## Papers\n\n{papers(record['objective'])}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def parameters(run: Path) -> int:
    """How many numbers the model has, those of its modalities too."""
    with safe_open(run / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def what_it_is(record: Mapping[str, Any], objective: str) -> str:
    kinds = " and ".join(name.replace("_", " ") for name in record["modality"])
    labels = "with labels" if record["reads_labels"] else "without labels"
    begun = f" It began with the weights of {record['model']['init_from']}." if record["model"].get("init_from") else ""
    unfinished = ""
    if "total_steps" in record:
        of = f"{record['steps']:,} of {record['total_steps']:,}"
        unfinished = f" Its training goes on: these are the weights after step {of}."
    return f"A transformer encoder of {kinds} data, pretrained {labels} by mmssl's {objective}.{begun}{unfinished}"


def how_to_load(run: Path, record: Mapping[str, Any], repo_id: str, revision: str | None, self_contained: bool) -> str:
    """Python that runs where mmssl is installed and the samples are there, and what differs where it is not."""
    where = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    lines = [
        "import mmssl  # registers the classes with transformers",
        "from transformers import AutoModel, AutoProcessor",
        "",
        f"model = AutoModel.from_pretrained({where})",
        f"processor = AutoProcessor.from_pretrained({where})",
    ]
    many, options = len(record["modality"]) > 1, MMSSLConfig.from_pretrained(run).modalities or {}
    for name in record["modality"]:
        modality = make_modality(name, options[name])
        which = f', modality="{name}"' if many else ""
        lines += ["", f"output = model(**processor({example(modality)}{which}))"]
        lines += ["output.last_hidden_state, output.pooler_output  # (1, tokens, width), (1, width)"]
    about = f"With mmssl {record['versions']['mmssl']}, and paths, or what else the processor takes, of your own:"
    shown = about + "\n\n```python\n" + "\n".join(lines) + "\n```"
    if self_contained:
        shown += (
            "\n\nWithout mmssl, leave out the first line, and give both `from_pretrained` the argument "
            "`trust_remote_code=True`: that runs the Python files of this repository, so read them first, and name the "
            "commit that you have read by `revision`."
        )
    return shown


def example(modality: Modality) -> str:
    """A sample in Python: the name of a file, or of a modality without files a row of its table."""
    if modality.extensions:
        return f'"sample{modality.extensions[0]}"'
    return repr({column["name"]: some_value(column) for column in modality.options()["schema"]})


def some_value(column: Mapping[str, Any]) -> Any:
    """A value that a column of a table may have."""
    if column["kind"] == "numerical":
        return round(column["mean"], 6)
    return next(iter(column.get("categories", ["any text"])), None)


def about_data(record: Mapping[str, Any]) -> str:
    first, *others = record["modality"]
    sources = {first: {"data": record["data"], "samples": record["samples"], "weight": 1.0}}
    sources |= {name: record["also"][name] for name in others}
    asked = ("config_name", "split", "column", "filter", "max_samples")
    rows = []
    for name, source in sources.items():
        options = [f"{key} {source['data'][key]}" for key in asked if source["data"].get(key) is not None]
        samples = "a stream" if source["data"].get("streaming") else f"{source['samples']:,}"
        rows.append([name, source["data"]["source"], ", ".join(options), samples, source["weight"]])
    shown = table(("modality", "source", "options", "samples", "weight of its steps"), rows)
    read = "Labels were read in training." if record["reads_labels"] else "No labels were read in training."
    return f"{shown}\n\n{read}"


def about_training(record: Mapping[str, Any]) -> str:
    train = record["train"]
    batch = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * record["processes"]
    rows = {
        "optimiser steps": record["steps"],
        "samples of a step": batch,
        "peak learning rate": train["learning_rate"],
        "weight decay": train["weight_decay"],
        "seed": train["seed"],
        "minutes": round(record["minutes"], 2),
        "device": record["device"],
        "processes": record["processes"],
        "mixed precision": record["mixed_precision"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return table(("", ""), rows.items())


def about_health(record: Mapping[str, Any], curves: bool) -> str:
    found = []
    for name, each in record["health"].items():
        found.append(f"{name}: **{each['verdict']}** at step {each['end']['step']:,}, {each['why']}.")
        measured = [key for key in each["end"] if key != "step"]
        rows = [(key, *(short(each[when].get(key)) for when in ("start", "end"))) for key in measured]
        found.append(table(("of the training data", "start", "end"), rows))
    return "\n\n".join((found or ["Not measured in this run."]) + [f"![The curves of the run]({CURVES})"] * curves)


def title_of(stem: str, record: Mapping[str, Any]) -> str:
    """What the labels of a file of scores are of: scores.json the run's data; scores_<name>.json what it is named."""
    name = stem.removeprefix("scores").strip("_")
    if not name:
        return str(record["data"]["source"])
    return str(record["also"][name]["data"]["source"]) if name in record["also"] else name


def about_scores(scores: Mapping[str, Sequence[Mapping[str, Any]]], repo_id: str) -> str:
    """A table of each file of scores."""
    from mmssl.evaluation.tables import LEGEND, label

    if not scores:
        return f"Not measured. With labels of your own: `mmssl evaluate {repo_id} --data LABELLED`."
    found = []
    for title, each in scores.items():
        columns = list(dict.fromkeys(f"{score['protocol']} {score['metric']}" for score in each))
        rows = []
        for row in dict.fromkeys(score["row"] for score in each):
            own = {f"{score['protocol']} {score['metric']}": score for score in each if score["row"] == row}
            rows.append([label(row), *(cell(own.get(column)) for column in columns)])
        tested = max(score["n_test"] for score in each)
        found.append(f"On {tested:,} labels of {title}. {LEGEND}.\n\n{table(('features', *columns), rows)}")
    return "\n\n".join(found)


def cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    if len(score["values"]) > 1:
        return f"{np.mean(score['values']):.3f} ± {np.std(score['values'], ddof=1):.3f}"
    width = "" if score.get("half_width") is None else f" ({score['half_width']:.3f})"
    return f"{score['values'][0]:.3f}{width}"


def results(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[EvalResult]:
    """The rows of the pretrained encoder, for the Hub's own tables."""
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=title,
            dataset_name=title,
            metric_type=score["metric"].lower().replace("²", "2"),
            metric_name=f"{score['protocol']} {score['metric']}",
            metric_value=float(np.mean(score["values"])),
        )
        for title, each in scores.items()
        for score in each
        if score["row"] == "pretrained"
    ]


def about_limits(record: Mapping[str, Any], scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What is not known of the model."""
    found = []
    if not scores:
        found.append("What its features are worth on labels was not measured, nor beside raw features.")
    rows = {score["row"] for each in scores.values() for score in each}
    if scores and not {"raw", "untrained"} <= {row.split(" ")[0] for row in rows}:
        found.append("Scores stand without those of raw features and of an untrained encoder.")
    found.append(
        f"It is one run, of seed {record['train']['seed']}: how far another one would differ was not measured."
    )
    if not record["health"]:
        found.append("Whether its features have collapsed was not measured.")
    if "total_steps" in record:
        found.append("It is not fully trained.")
    found.append(
        "Other data than those above, fine-tuning, robustness, and biases of the data it was trained on were not "
        "measured."
    )
    return "\n".join(f"- {line}" for line in found)


def papers(objective: Mapping[str, Any]) -> str:
    """The papers of an objective and of those that it is made of."""
    names = [*objective, *(inner["class_path"].rpartition(".")[2] for inner in terms_of(objective))]
    known: dict[str, Any] = dict(find_all("objectives", Objective))
    lines = dict.fromkeys(line for name in names for line in known[name].references)
    if not lines:
        return "The objective names none."
    return "Those of the objective; its options above say which of them it follows.\n\n" + "\n".join(
        f"- {line}" for line in lines
    )


def terms_of(options: Any) -> Iterator[Mapping[str, Any]]:
    """Objectives among the options of an objective."""
    if isinstance(options, Mapping):
        if "class_path" in options:
            yield options
        for inner in options.values():
            yield from terms_of(inner)


def table(header: Sequence[str], rows: Any, first: str = "") -> str:
    """A table in Markdown; ``first`` stands in a line above it."""
    lines = [list(header), ["---"] * len(header), *([text(each) for each in row] for row in rows)]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{first}\n\n{shown}" if first else shown


def text(value: Any) -> str:
    """A cell: on one line, and without what would end it."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace("null", "none")
    return " ".join(written.split()).replace("|", "\\|").replace("<", "&lt;")


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""

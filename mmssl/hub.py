"""A run on the Hugging Face Hub: what goes up, the card that says what it is, and uploads while it trains.

Of a run go up the model, its processor, a recipe, the curves, the scores and a card; its checkpoints, the objective's
own weights and whatever names files of this machine stay here. The token is Hugging Face's own business (`hf auth
login`, or the environment variable HF_TOKEN): nothing here stores or prints it.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmssl.model_card import CURVES, METRICS, RECIPE, RECORD, SCORES, card, read_record, recipe, without_paths
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.processing import MMSSLProcessor
from mmssl.remote_code import add_code

CONFIGS = ("config.json", "processor_config.json")
MODEL = (*CONFIGS, "model.safetensors")


def push(
    run: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    self_contained: bool = False,
) -> str:
    """Put a finished run on the Hub, in one commit; what the repository had before stays in its history.

    Args:
        run: folder of the finished run, or its folder "best".
        repo_id: where to, "user/name"; it is made if it is not there.
        private: whether only its owner sees it. None: as it is, or for a new one as the owner's settings say.
        revision: branch to put it on, made if it is not there. None: main.
        license: of the model, by its name on the Hub, such as "mit" or "cc-by-4.0". None: the card says there is none.
        commit_message: what the history says. None: the number of steps.
        self_contained: put the code of the model and its processor beside it, for those who have transformers and not
            mmssl, and load it with ``trust_remote_code=True``.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no finished run, damaged weights, a malformed name, or a public repository that was to be private.
        OSError: no token, no right to write, or no connection.
    """
    run = Path(run)
    record = read_finished(run)
    check_model(run)
    if earlier := prepare_repo(repo_id, private, revision):
        shown = ", ".join(earlier[:5]) + ", ..." * (len(earlier) > 5)
        print(f"{repo_id} has files already ({shown}): this is a new commit on top, earlier ones stay in its history")
    return upload(run, record, repo_id, revision, license, commit_message, self_contained)


def read_finished(run: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        ValueError: the folder holds none.
    """
    for name in (*MODEL, RECORD):
        if not (run / name).is_file():
            raise ValueError(f"{run} is no finished run (it has no {name}); expected the output_dir of one")
    record = read_record(run)
    if "steps" not in record:
        raise ValueError(
            f"{run} is no finished run ({RECORD} says that one has begun there); go on with "
            "--train.resume_from_checkpoint latest"
        )
    return record


def check_model(run: Path) -> None:
    """See that the model can be loaded.

    Raises:
        ValueError: files that are damaged or do not fit each other, by name.
    """
    config, path = MMSSLConfig.from_pretrained(run, name_or_path=str(run)), run / "model.safetensors"
    with torch.device("meta"):
        expected = {name: list(value.shape) for name, value in MMSSLModel(config).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            bad = [name for name in found if not file.get_tensor(name).isfinite().all()]
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); nothing was uploaded") from error
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = different[0]
        raise ValueError(
            f"{path} does not fit config.json: of {name} found the shape {found.get(name)}, expected "
            f"{expected.get(name)} ({len(different)} differ); nothing was uploaded"
        )
    if bad:
        raise ValueError(f"{path}: found numbers that are not finite in {', '.join(bad[:3])}; nothing was uploaded")
    MMSSLProcessor.from_pretrained(run)


def prepare_repo(repo_id: str, private: bool | None, revision: str | None = None) -> list[str]:
    """Make the repository and the branch if they are not there, and see that this token may write to them.

    Returns:
        The files that are there already.

    Raises:
        ValueError: a malformed name, or a public repository that was to be private, or the other way round.
        OSError: no token, no right to write, or no connection.
    """
    api = HfApi()
    with explained(repo_id):
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError(f"{repo_id!r} is no name of a repository; expected user/name")
        if get_token() is None:
            raise OSError("found no token of the Hugging Face Hub; log in by `hf auth login`, or set HF_TOKEN")
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
        elif private is not None and api.model_info(repo_id).private != private:
            there, asked = ("public", "private") if private else ("private", "public")
            raise ValueError(
                f"{repo_id} is {there}, and {asked} was asked for; change that in its settings on the Hub, or leave "
                "the flag out"
            )
        api.auth_check(repo_id, write=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return sorted(set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes"})


def upload(
    run: Path,
    record: Mapping[str, Any],
    repo_id: str,
    revision: str | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    self_contained: bool = False,
) -> str:
    """Commit the files of a run and what is made of them; returns the address of the commit."""
    record = without_paths(record)
    files: dict[str, str | bytes] = {name: str(run / name) for name in (*MODEL, METRICS) if (run / name).is_file()}
    files[RECIPE] = recipe(record).encode()
    if (curves := picture_of(run, record)) is not None:
        files[CURVES] = curves
    for path in sorted(run.glob(SCORES)):
        files[path.name] = json.dumps(without_paths(json.loads(path.read_text())), indent=2).encode()
    files["README.md"] = str(card(run, repo_id, revision, license, self_contained)).encode()
    if self_contained:
        files |= with_code(run)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    message = commit_message or f"{next(iter(record['objective']))}, {record['steps']} steps"
    with explained(repo_id):
        return HfApi().create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def with_code(run: Path) -> dict[str, bytes]:
    """The configurations of a run's model and processor, and the code that they name."""
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            shutil.copy(run / name, folder)
        add_code(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way to it as one line each."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository; expected user/name ({error})") from error
    except (HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of one large file
        endpoint = HfApi().endpoint
        if not isinstance(cause, HTTPError | OfflineModeIsEnabled):
            raise OSError(f"could not upload to {repo_id} at {endpoint} ({cause})") from error
        if not isinstance(cause, HfHubHTTPError):
            raise OSError(f"could not reach {endpoint} for {repo_id} ({type(cause).__name__}: {cause})") from error
        code = cause.response.status_code
        said = " ".join((cause.server_message or str(cause).splitlines()[0]).split())
        reasons = {
            401: "it does not accept the token (401); log in by `hf auth login`, or set HF_TOKEN to one that is valid",
            403: "the token may not write there (403); use one with the role write, of a member of its owner",
        }
        raise OSError(f"{endpoint} refused {repo_id}: {reasons.get(code, f'({code})')} ({said})") from error


class Uploads:
    """A run's way to the Hub while it trains; does nothing where none is asked for.

    Args:
        accelerator: its first process uploads.
        run: folder of the run.
        repo_id: where to. None: nowhere.
        private: whether only its owner sees it.
    """

    def __init__(self, accelerator: Accelerator, run: Path, repo_id: str | None, private: bool | None):
        self.accelerator, self.run, self.repo_id, self.private = accelerator, run, repo_id, private
        self.copy = run / ".hub"  # what a background upload reads; it is not written while one runs
        self.api = HfApi()  # with a thread of its own
        self.future: Future[str] | None = None
        self.step = 0

    def begin(self) -> None:
        """Before anything is computed: is the repository there, and may this token write to it?

        Raises:
            ValueError, OSError: no.
        """
        if self.repo_id and self.accelerator.is_main_process:
            prepare_repo(self.repo_id, self.private)

    def checkpoint(
        self,
        module: nn.Module,
        record: Mapping[str, Any],
        write: Callable[[dict[str, Tensor], Path, Mapping[str, Any]], None],
    ) -> None:
        """Upload the model as it is now, in the background. All processes have to call this at the same step.

        Nothing that goes wrong here stops the run. Where an upload takes longer than from one checkpoint to the next,
        the next one is left out. Additions of peft are merged at the end, so that there is no model before.

        Args:
            module: the objective, as Accelerate has prepared it.
            record: what run.json would say of the run now.
            write: writes the model and its processor of these weights to a folder, with this record.
        """
        if not self.repo_id or record["model"].get("peft_type"):
            return
        self.notice()
        busy = [self.future is not None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(busy)  # as the first process says
        if busy[0]:
            return
        state = self.accelerator.get_state_dict(module)  # by all processes, as each may have a part of it
        if not self.accelerator.is_main_process:
            return
        self.step = record["steps"]
        try:
            shutil.rmtree(self.copy, ignore_errors=True)
            self.copy.mkdir()
            write(state, self.copy, record)
            if (self.run / METRICS).is_file():
                shutil.copy(self.run / METRICS, self.copy / METRICS)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk
            self.say(error)
            return
        disable_progress_bars()  # theirs would run through the run's own
        self.future = self.api.run_as_future(upload, self.copy, record, self.repo_id)

    def notice(self, wait: bool = False) -> None:
        """Say if the last upload has failed, once it has ended."""
        if self.future is not None and (wait or self.future.done()):
            if (error := self.future.exception()) is not None:
                self.say(error)
            self.future = None

    def say(self, error: BaseException) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"Step {self.step} could not be uploaded to {self.repo_id}; the run goes on without ({reason})")

    def finish(self) -> None:
        """Upload the finished run.

        Raises:
            OSError: it could not be uploaded; says how to try again.
        """
        if not self.repo_id or not self.accelerator.is_main_process:
            return
        self.notice(wait=True)
        shutil.rmtree(self.copy, ignore_errors=True)
        enable_progress_bars()
        try:
            print(f"The model is on the Hub: {push(self.run, self.repo_id, self.private)}")
        except (OSError, ValueError) as error:
            raise OSError(
                f"{' '.join(str(error).split())}. The run is whole in {self.run}; to try again: "
                f"mmssl push {self.run} {self.repo_id}"
            ) from error


def picture_of(run: Path, record: Mapping[str, Any]) -> bytes | None:
    """The curves of a run as a PNG. None: there are none."""
    from mmssl.evaluation.report.curves import draw, panels_of, read_metrics

    if not (run / METRICS).is_file() or not (panels := panels_of(read_metrics(run), list(record["modality"]))):
        return None
    picture = io.BytesIO()
    draw(panels).savefig(picture, format="png", dpi=120)
    return picture.getvalue()

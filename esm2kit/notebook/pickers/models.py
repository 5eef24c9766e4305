"""Picker for models: official ones, those that were trained here, and files."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets

from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.models.checkpoint import read_metadata
from esm2kit.models.config import SIZES, ESM2Config, complete_model_name
from esm2kit.models.hub import LICENCE, fetch_in_time, is_cached
from esm2kit.notebook.pickers.shapes import format_bytes, format_count, format_shape, format_size_table
from esm2kit.notebook.runs.manifest import read_runs
from esm2kit.notebook.widgets import LABEL, WIDE, View, format_definitions

AUTO = "auto"
AUTO_MODEL = "esm2_t6_8M_UR50D"
SECONDS_TO_FETCH = 60.0
RUNS = "../papermill_runs"


class TrainedModel(NamedTuple):
    """A model of notebook 02.

    Args:
        name: for people, such as `run sample-20261127-054750`.
        folder: folder with pretrain.json and the checkpoints.
    """

    name: str
    folder: Path


def list_trained(work_dir: Path | str, runs_dir: Path | str = RUNS) -> list[TrainedModel]:
    """List the models that notebook 02 made: the one of the work folder, then those of runs, newest first.

    Args:
        work_dir: folder that a notebook writes to.
        runs_dir: folder of the headless runs, such as those of `make walkthrough`.

    Returns:
        The models. Runs whose notebook 02 has not finished are left out.
    """
    own = expand_path(work_dir) / "pretrain"
    found = [TrainedModel("notebook 02", own)] if (own / "pretrain.json").exists() else []
    for name, manifest in read_runs(expand_path(runs_dir)).items():
        folder = expand_path(runs_dir) / name / "artefacts" / "pretrain"
        trained = manifest.notebooks.get("02_pretrain")
        finished = trained is not None and trained.status == "done" and (folder / "pretrain.json").exists()
        if finished and folder.resolve() != own.resolve():
            found.append(TrainedModel(f"run {name}", folder))
    return found


def model_picker(model: str, work_dir: Path | str, runs_dir: Path | str = RUNS, sizes: bool = True) -> View:
    """Choose a model: parameter `model`.

    Args:
        model: `auto` for the official 8M model if the cache has it or it can be downloaded within a minute, and
            otherwise the model that was trained here; empty for the model that was trained here: notebook 02's in
            work_dir, or else that of the newest run; or an official name, or a path.
        work_dir: folder that contains the run of notebook 02.
        runs_dir: folder of the headless runs; their models are listed.
        sizes: add the folded table of the official models.

    Returns:
        A view whose value is an argument of `load_model`.
    """
    model = complete_model_name(model)
    options = [
        ("auto: the official 8M, or else the model trained here", AUTO),
        ("the model trained here (notebook 02, or else the newest run)", ""),
        *((f"{trained.name}: trained here", str(trained.folder)) for trained in list_trained(work_dir, runs_dir)),
        *((f"{name}: official, {'on disk' if is_cached(name) else _describe_download(name)}", name) for name in SIZES),
    ]
    if model not in [value for _, value in options]:
        options.append((model, model))
    choice = ipywidgets.Dropdown(options=options, value=model, description="Model", style=LABEL, layout=WIDE)
    path = ipywidgets.Text(
        description="or a file", placeholder="path of a checkpoint or model folder, relative to the notebook",
        style=LABEL, layout=WIDE, continuous_update=False,
    )  # fmt: skip

    def choose_path(given: str) -> None:
        given = complete_model_name(given)
        if given and given not in [value for _, value in choice.options]:
            choice.options = (*choice.options, (given, given))
        choice.value = given or choice.value

    path.observe(lambda change: choose_path(change["new"].strip()), "value")
    fetch = cache(lambda: fetch_auto())  # once per picker: a second try would wait again

    def resolve(given: dict[str, str]) -> tuple[str, str]:
        value, card = _resolve_model(given["model"], work_dir, runs_dir, fetch)
        return value, card + (format_size_table(value) if sizes else "")

    return View({"model": choice}, resolve, extras=(path,))


def fetch_auto(seconds: float = SECONDS_TO_FETCH) -> str:
    """Get the model of `auto` from the cache or from the hub, and print a line if that takes time.

    Args:
        seconds: time limit of the download.

    Returns:
        An empty text if the model is on disk now; otherwise the reason why it is not.
    """
    line = f"auto: downloading the official {AUTO_MODEL} (30 MB, licence {LICENCE}), at most {seconds:.0f} seconds"
    return fetch_in_time(AUTO_MODEL, seconds, lambda: print(line))


def compared_models(model: str, work_dir: Path | str, runs_dir: Path | str = RUNS) -> dict[str, str]:
    """Name the chosen model, and add the other one of the official 8M and the model trained here if both are on disk.

    Args:
        model: the value of `model_picker`.
        work_dir: folder that contains the run of notebook 02.
        runs_dir: folder of the headless runs.

    Returns:
        Label -> argument of `load_model`; the chosen model is first.
    """
    models = {label_model(model): model}
    if model not in SIZES:
        return models | ({label_model(AUTO_MODEL): AUTO_MODEL} if is_cached(AUTO_MODEL) else {})
    trained = list_trained(work_dir, runs_dir)
    return models | ({"trained here": str(find_best(trained[0].folder)[0])} if trained else {})


def label_model(model: str) -> str:
    """Name a model for a chart: `official 8M`, `trained here`, or the name of a file.

    Args:
        model: an argument of `load_model`.

    Returns:
        The label.
    """
    if model in SIZES:
        return f"official {model.split('_')[2]}"
    path = Path(model)
    return "trained here" if path.parent.name == "checkpoints" else path.stem or str(path)


def _describe_download(name: str) -> str:
    return f"a download of {format_bytes(4 * SIZES[name].num_parameters)}"


def _resolve_model(model: str, work_dir: Path | str, runs_dir: Path | str, fetch: Callable[[], str]) -> tuple[str, str]:
    if model == AUTO:
        why_not = fetch()
        if not why_not:
            official = f"the official {AUTO_MODEL}, from the cache; licence {LICENCE}"
            return AUTO_MODEL, format_definitions({"auto": official})
        reason = escape(f"the official {AUTO_MODEL} is not used, because {why_not}")
        return _resolve_trained("", work_dir, runs_dir, {"auto": reason})
    if not model or (Path(model) / "pretrain.json").exists():
        return _resolve_trained(model, work_dir, runs_dir)
    if model not in SIZES and not expand_path(model).exists():
        near = get_close_matches(model, list(SIZES), 1, 0.5)
        raise InputError(
            f"model {model!r} is not an official name{f' (did you mean {near[0]}?)' if near else ''}, and no such file "
            f"or folder exists in {Path.cwd()}",
            code="model.absent",
            name=model,
        )
    own = "" if model in SIZES else format_definitions({"path": escape(str(expand_path(model)))})
    return model, own


def _resolve_trained(
    folder: str, work_dir: Path | str, runs_dir: Path | str, first_rows: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Find the best checkpoint of a folder; without a folder, that of the work folder or of the newest run."""
    trained = list_trained(work_dir, runs_dir)
    chosen = [each for each in trained if not folder or str(each.folder) == folder][:1]
    if not chosen:
        chosen = [TrainedModel(folder or "notebook 02", Path(folder) if folder else Path(work_dir) / "pretrain")]
    best, rows = find_best(chosen[0].folder)
    rows = {**(first_rows or {}), "trained by": escape(chosen[0].name)} | rows
    return str(best), format_definitions(rows)


def find_best(folder: Path) -> tuple[Path, dict[str, str]]:
    """Find the best checkpoint of a run of notebook 02 and describe it.

    Args:
        folder: folder with pretrain.json.

    Returns:
        Path of the checkpoint; name -> HTML with its file, shape and training state.

    Raises:
        InputError: the checkpoint does not exist, or its shape differs from pretrain.json.
    """
    trained = folder / "pretrain.json"
    if not trained.exists():
        raise InputError(
            f"{trained} does not exist: run 02_pretrain first, or choose an official model",
            code="notebook.needs",
            path=str(trained),
            notebook="02_pretrain",
        )
    result = read_sealed_json(trained, "run 02_pretrain again")
    best = Path(result["best"])
    # a work folder that was moved or copied still contains its checkpoint
    best = best if best.exists() else folder / "checkpoints" / best.name
    if not best.exists():
        raise InputError(
            f"{trained} names {best.name}, which does not exist: run 02_pretrain again",
            code="checkpoint.missing",
            path=str(best),
        )
    metadata = read_metadata(best)
    found = ESM2Config(**metadata["model"])
    recorded = ESM2Config(**result["model"]) if "model" in result else found  # absent from older runs
    if found != recorded:
        raise InputError(
            f"{best.name} has {format_shape(found)}, but {trained.name} records {format_shape(recorded)}: "
            "the checkpoint belongs to another run. Run 02_pretrain again.",
            code="checkpoint.another-shape",
            found=format_shape(found),
            recorded=format_shape(recorded),
        )
    perplexity = result["val_perplexity"]
    quality = "not validated yet" if perplexity is None else f"the best by validation: perplexity {perplexity:.2f}"
    rows = {
        "file": escape(best.name),
        "shape": f"{format_shape(found)}, {format_count(found.num_parameters)} parameters",
        "state": f"update {metadata['step']:,} of {result['step']:,}, {quality}",
    }
    return best, rows

"""Picker of models: models trained here and by runs, official ones from a local hub, and `auto`."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.errors import refused
from support.hub import Hub, serve

from esm2kit.core.checksums import write_sealed_json
from esm2kit.models import hub as hub_module
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.hub import OFFICIAL_MODELS, fetch_in_time, is_cached
from esm2kit.models.load import load_model
from esm2kit.notebook.pickers.models import (
    AUTO_MODEL,
    compared_models,
    fetch_auto,
    label_model,
    list_trained,
    model_picker,
)

OFFICIAL = OFFICIAL_MODELS[AUTO_MODEL]
SMALL = ESM2Config(2, 64, 4)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small model, which stand for those of the official one."""
    path = tmp_path_factory.mktemp("official")
    save_hf(ESM2.initialised(SMALL, seed=5), path)
    return path


@pytest.fixture
def hub(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local hub that serves a small model under the name and revision of the official 8M."""
    with serve(official, OFFICIAL.repo, OFFICIAL.revision, tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def write_trained(folder: Path, perplexity: float | None = 14.368, step: int = 700) -> Path:
    """Write the checkpoint and pretrain.json of a finished notebook 02."""
    best = folder / "pretrain" / "checkpoints" / "step=1.safetensors"
    best.parent.mkdir(parents=True)
    tensors = {f"model.{name}": tensor for name, tensor in ESM2.initialised(SMALL, 0).state_dict().items()}
    write_checkpoint(best, tensors, {"model": dataclasses.asdict(SMALL), "step": step})
    result = {"best": str(best), "step": 1200, "val_perplexity": perplexity, "model": dataclasses.asdict(SMALL)}
    write_sealed_json(folder / "pretrain" / "pretrain.json", result)
    return best


def write_run(runs: Path, name: str, status: str = "done") -> Path:
    """Write a headless run whose notebook 02 has a status."""
    best = write_trained(runs / name / "artefacts")
    entry = {"status": status, "seconds": 2.0, "figures": {}, "parameters": {}}
    manifest = {"tier": "t", "created": f"2026-01-{name[-2:]}T00:00:00", "notebooks": {"02_pretrain": entry}}
    (runs / name / "manifest.json").write_text(json.dumps(manifest))
    return best


def text(view: object) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", view.card.value).split())


def test_auto_downloads_the_official_model_once_and_names_size_and_licence(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_cached(AUTO_MODEL)
    view = model_picker("auto", tmp_path / "work", tmp_path / "runs")
    assert view.value == AUTO_MODEL
    assert is_cached(AUTO_MODEL)
    assert capsys.readouterr().out.splitlines() == [
        f"auto: downloading the official {AUTO_MODEL} (30 MB, licence MIT), at most 60 seconds"
    ]
    assert f"auto the official {AUTO_MODEL}, from the cache; licence MIT" in text(view)
    requests = len(hub.requests)
    assert model_picker("auto", tmp_path / "work", tmp_path / "runs").value == AUTO_MODEL
    assert len(hub.requests) == requests, "a model in the cache needs no network"
    assert capsys.readouterr().out == ""


def test_the_fetched_model_is_the_one_that_the_stages_load(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_in_time(AUTO_MODEL) == ""
    monkeypatch.setitem(OFFICIAL_MODELS, AUTO_MODEL, OFFICIAL._replace(sha256=None))
    loaded, _ = load_model(AUTO_MODEL)
    assert loaded.config == SMALL
    damaged = OFFICIAL._replace(sha256="0" * 64)
    monkeypatch.setitem(OFFICIAL_MODELS, AUTO_MODEL, damaged)
    with refused("hub.digest"):  # the pinned digest is still checked
        load_model(AUTO_MODEL)


def test_a_slow_download_ends_after_the_time_limit_and_the_trained_model_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = write_trained(tmp_path / "work")
    hub.seconds = 300.0
    monkeypatch.setattr("esm2kit.notebook.pickers.models.SECONDS_TO_FETCH", 60.0)
    monkeypatch.setattr("esm2kit.notebook.pickers.models.fetch_in_time", lambda name, *_: fetch_in_time(name, 3.0))
    started = time.monotonic()
    view = model_picker("auto", tmp_path / "work", tmp_path / "runs")
    assert view.value == str(best)
    assert time.monotonic() - started < 30, "the time limit was not applied"
    shown = text(view)
    assert f"the official {AUTO_MODEL} is not used, because the download takes longer than 3 seconds" in shown
    assert "trained by notebook 02" in shown
    assert label_model(view.value) == "trained here"


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_auto_falls_back_at_once_and_says_so_in_one_line(
    offline: bool, no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    best = write_run(tmp_path / "runs", "sample-02")
    started = time.monotonic()
    view = model_picker("auto", tmp_path / "work", tmp_path / "runs")
    assert view.value == str(best)
    assert time.monotonic() - started < hub_module.SECONDS_TO_CONNECT + 30
    reason = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 cannot be reached"
    assert f"is not used, because {reason} trained by run sample-02" in text(view)
    with refused("notebook.needs", notebook="02_pretrain"):
        _ = model_picker("auto", tmp_path / "work", tmp_path / "none").value


def test_a_host_name_that_does_not_resolve_is_given_up_in_time(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup of a name can take longer than the timeout of the request."""
    monkeypatch.setattr(hub_module, "SECONDS_TO_CONNECT", 0.2)
    monkeypatch.setattr(hub_module.requests, "head", lambda *given, **more: time.sleep(120))
    started = time.monotonic()
    assert fetch_in_time(AUTO_MODEL) == "http://127.0.0.1:9 cannot be reached"
    assert time.monotonic() - started < 60, "the time limit was not applied"


def test_models_of_finished_runs_are_listed_newest_first_after_the_work_folder(tmp_path: Path, no_hub: None) -> None:
    work, runs = tmp_path / "work", tmp_path / "runs"
    older, newer = write_run(runs, "sample-01"), write_run(runs, "sample-03")
    write_run(runs, "sample-04", status="failed")
    assert [each.name for each in list_trained(work, runs)] == ["run sample-03", "run sample-01"]
    view = model_picker("", work, runs)
    assert view.value == str(newer)
    assert "trained by run sample-03" in text(view)
    offered = [value for _, value in view.controls["model"].options]
    assert offered[:2] == ["auto", ""]
    assert [Path(value).parts[-3] for value in offered[2:4]] == ["sample-03", "sample-01"]
    assert offered[4:] == list(SIZES)
    view.controls["model"].value = offered[3]
    assert view.value == str(older)
    assert "trained by run sample-01" in text(view)
    assert model_picker(offered[3], work, runs).value == str(older), "the choice can be saved and read again"

    own = write_trained(work)
    assert model_picker("", work, runs).value == str(own), "the model of this work folder comes first"
    within = model_picker("", runs / "sample-01" / "artefacts", runs)
    assert [each.name for each in list_trained(runs / "sample-01" / "artefacts", runs)] == [
        "notebook 02", "run sample-03"
    ]  # fmt: skip
    assert within.value == str(older)


def test_a_file_can_be_typed(tmp_path: Path, no_hub: None) -> None:
    own = write_trained(tmp_path / "elsewhere")
    view = model_picker("esm2_t6_8M_UR50D", tmp_path / "work", tmp_path / "runs")
    view.extras[0].value = f" {own} "
    assert view.parameters == {"model": str(own)}
    assert view.value == str(own)
    view.extras[0].value = "nowhere.pt"
    with refused("model.absent", name="nowhere.pt"):
        _ = view.value


def test_a_model_that_was_stopped_before_its_first_validation_is_described(tmp_path: Path, no_hub: None) -> None:
    write_trained(tmp_path, perplexity=None, step=30)
    assert "update 30 of 1,200, not validated yet" in text(model_picker("", tmp_path, tmp_path / "runs"))


def test_the_two_models_are_compared_where_both_are_on_disk(hub: Hub, tmp_path: Path) -> None:
    work, runs = tmp_path / "work", tmp_path / "runs"
    best = str(write_trained(work))
    assert compared_models(best, work, runs) == {"trained here": best}, "the official model is not on disk"
    assert fetch_auto(60) == ""
    both = {"official 8M": AUTO_MODEL, "trained here": best}
    assert compared_models(AUTO_MODEL, work, runs) == both
    assert list(compared_models(AUTO_MODEL, work, runs)) == ["official 8M", "trained here"]
    assert compared_models(best, work, runs) == both
    assert list(compared_models(best, work, runs)) == ["trained here", "official 8M"]
    assert compared_models(AUTO_MODEL, tmp_path / "none", runs) == {"official 8M": AUTO_MODEL}
    assert list(compared_models("my/model.pt", work, runs)) == ["model", "official 8M"]

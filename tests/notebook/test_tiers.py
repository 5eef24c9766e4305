"""Tiers: names, types, choices and files are checked before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.errors import refused
from support.measurements import write_measurements

from esm2kit.cli.commands import STAGES
from esm2kit.cli.main import main
from esm2kit.models.config import SIZES
from esm2kit.notebook.runs.headless import read_parameters
from esm2kit.notebook.runs.tiers import check_parameters, find_tier, plan_tier
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.sources import find_split_names

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "papermill_runs").glob("*.yaml"))


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """Parameters of every notebook and their defaults."""
    return {path.stem: read_parameters(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


@pytest.mark.parametrize("name", ["sample", "small", "full"])
def test_models_tasks_and_splits_of_a_tier_exist(name: str, known: dict[str, dict[str, Any]]) -> None:
    """Models are published sizes, tasks and splits are in FLIP or in the sample."""
    plan = plan_tier(ROOT, find_tier(ROOT, name))
    assert list(plan) == list(known)
    for notebook, given in plan.items():
        values = known[notebook] | given
        assert values.get("model", "") in ("", "auto", "custom", *SIZES), f"{notebook}: model {values['model']}"
        tasks = [values["task"], *filter(None, values["others"].split(","))] if "others" in values else []
        for task in [*tasks, *([values["task"]] if notebook == "05_finetune" else [])]:
            folder = ROOT / "notebooks" / values["data_dir"] / task
            assert task in TASKS or folder.is_dir(), f"{notebook}: task {task} does not exist"
            splits = TASKS[task].splits if task in TASKS else find_split_names(folder)
            assert task != values["task"] or values["split"] in ("", *splits), f"{notebook}: split {values['split']}"


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_prints_every_parameter_and_runs_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = set((ROOT / "papermill_runs").iterdir())
    assert main(["run", "--tier", name, "--dry_run", "-p", "lr=2e-3", "-p", "seed=7"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["05_finetune", "lr", "0.002", "given"] in rows, "YAML reads 2e-3 as a string; the parameter is a number"
    assert ["01_preprocess", "seed", "7", "given"] in rows
    assert ["02_pretrain", "work_dir", "artefacts/", "of", "the", "run"] in rows
    assert "nothing was run" in " ".join(rows[-1])
    given = yaml.safe_load((ROOT / "papermill_runs" / f"{name}.yaml").read_text())
    for notebook, parameters in given.items():
        for parameter in set(parameters) - {"lr", "seed"}:
            assert any(row[:2] == [notebook, parameter] and row[-1] == "given" for row in rows)
    assert set((ROOT / "papermill_runs").iterdir()) <= before


@pytest.mark.parametrize(
    ("notebook", "given", "code", "hint"),
    [
        ("02_pretrain", {"max_steps": "many"}, "parameter.type", "must be of type int, such as 800"),
        ("02_pretrain", {"max_steps": -5}, "option.range", "02_pretrain: max_steps must be at least 1, found -5"),
        ("02_pretrain", {"warmup_steps": -1}, "option.range", "02_pretrain: warmup_steps must be at least 0"),
        ("04_benchmark", {"resamples": 5}, "option.range", "at least 100"),
        ("05_finetune", {"epochs": -2}, "option.range", "05_finetune: epochs must be above 0"),
        ("02_pretrain", {"max_steps": 1.5}, "parameter.type", ""),
        ("02_pretrain", {"max_steps": True}, "parameter.type", ""),
        ("02_pretrain", {"lr": "high"}, "parameter.type", ""),
        ("02_pretrain", {"lr": float("nan")}, "parameter.type", ""),
        ("02_pretrain", {"lr": None}, "parameter.type", ""),
        ("01_preprocess", {"overwrite": "yes"}, "parameter.type", ""),
        ("04_benchmark", {"split": 3}, "parameter.type", ""),
        ("05_finetune", {"mode": "lorra"}, "parameter.choice", "did you mean 'lora'?"),
        ("03_embed", {"long_proteins": "crop"}, "parameter.choice", "choose one of error, "),
        ("03_embed", {"fasta": "nowhere.fasta"}, "parameter.file", ""),
        ("03_embed", {"fasta": "../data/sample"}, "parameter.file", ""),
        ("04_benchmark", {"data_dir": "../nowhere/flip"}, "parameter.folder", ""),
        ("06_know_how", {"device": 2}, "parameter.unknown", "did you mean 'devices'?"),
    ],
)
def test_an_invalid_value_is_refused(
    notebook: str, given: dict[str, Any], code: str, hint: str, known: dict[str, dict[str, Any]]
) -> None:
    with refused(code, notebook=notebook, name=next(iter(given))) as caught:
        check_parameters(ROOT, notebook, given, known[notebook])
    assert hint in str(caught.value)


def test_valid_values(known: dict[str, dict[str, Any]]) -> None:
    # the notebook reads 0 as "all proteins", which is None in the stage
    assert check_parameters(ROOT, "05_finetune", {"limit": 0}, known["05_finetune"]) == {"limit": 0}
    pretrain = check_parameters(ROOT, "02_pretrain", {"lr": 1, "must_reach": "9e-1"}, known["02_pretrain"])
    assert pretrain == {"lr": 1.0, "must_reach": 0.9}
    assert type(pretrain["lr"]) is float
    # the download creates FLIP's folder; an optional file may be omitted
    assert check_parameters(ROOT, "04_benchmark", {"data_dir": "../flip"}, known["04_benchmark"]) == {
        "data_dir": "../flip"
    }
    assert check_parameters(ROOT, "01_preprocess", {"mapping": ""}, known["01_preprocess"]) == {"mapping": ""}


def test_a_string_parameter_on_the_command_line_stays_a_string(tmp_path: Path) -> None:
    tier = tmp_path / "mine.yaml"
    tier.write_text("04_benchmark: {seeds: 2}")
    plan = plan_tier(ROOT, tier, ["split=1e3", "04_benchmark.seeds=4"])
    assert plan == {"04_benchmark": {"seeds": 4, "split": "1e3"}}


def test_own_measurements_replace_the_task(tmp_path: Path, known: dict[str, dict[str, Any]]) -> None:
    files = write_measurements(tmp_path, 10, 1)
    given = {"fasta": str(files.fasta), "labels": str(files.labels)}
    for notebook in ("04_benchmark", "05_finetune"):
        assert check_parameters(ROOT, notebook, given, known[notebook]) == given
        with refused("option.labels", notebook=notebook):
            check_parameters(ROOT, notebook, {"fasta": str(files.fasta)}, known[notebook])
        with refused("parameter.file", notebook=notebook, name="labels"):
            check_parameters(ROOT, notebook, {"labels": "absent.csv"}, known[notebook])
    sheet = {"labels": f"{files.labels}:Sheet1"}
    assert check_parameters(ROOT, "04_benchmark", sheet, known["04_benchmark"]) == sheet


@pytest.mark.parametrize(("text", "code"), [("04_benchmark: 3", "tier.form"), ("a: [", "tier.not-yaml")])
def test_a_file_that_is_not_a_tier_is_refused(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with refused(code, path=str(tmp_path / "bad.yaml")):
        plan_tier(ROOT, tmp_path / "bad.yaml")


def test_every_notebook_but_the_first_and_last_has_a_stage(known: dict[str, dict[str, Any]]) -> None:
    assert {name for name in known if name.partition("_")[2] in STAGES} == set(known) - {"00_start_here", "06_know_how"}

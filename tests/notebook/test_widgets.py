"""Views of parameters: values, errors, output without a front end, and tiers saved from them."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused
from support.measurements import write_measurements
from support.reports import report, row, score

from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.report import Comparison, Report, ReportRow
from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.notebook import live, widgets
from esm2kit.notebook.display import explain_finetuning, summary, verdict
from esm2kit.notebook.pickers import maps as map_pickers
from esm2kit.notebook.pickers import models as model_pickers
from esm2kit.notebook.pickers import shapes as shape_pickers
from esm2kit.notebook.pickers import tasks as pickers
from esm2kit.notebook.pickers.runs import run_browser
from esm2kit.notebook.runs.history import HEADLESS
from esm2kit.notebook.runs.manifest import identify_process
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.data import load_labels
from esm2kit.tasks.flip import TASKS
from esm2kit.training.layout import BatchLayout

NUMBERS = st.integers(1, 64)


def text(view: widgets.View) -> str:
    """Text of the card, without tags."""

    class TextParser(HTMLParser):
        found = ""

        def handle_data(self, data: str) -> None:
            self.found += f" {data}"

    parser = TextParser()
    parser.feed(view.card.value)
    return " ".join(parser.found.split())


@pytest.fixture
def tasks(sample: Path) -> Path:
    return sample / "tasks"


@pytest.mark.parametrize("task", TASKS)
def test_every_flip_task_and_split_can_be_picked(task: str, tasks: Path) -> None:
    for split, spec in TASKS[task].splits.items():
        view = pickers.task_picker(task, split, tasks)
        assert view.value[:2] == (task, split)
        assert view.parameters == {"task": task, "split": split}
        if spec.test is not None:
            assert f"test {spec.test:,}" in text(view)
        assert f" {spec.light}: " in text(view)


def test_a_local_task_is_read_for_its_numbers(tasks: Path) -> None:
    view = pickers.task_picker("domain_of_life", "", tasks)
    assert view.value[:2] == ("domain_of_life", "")
    assert "3 classes per protein" in text(view)
    records = (tasks / "domain_of_life" / "sampled.fasta").read_text()
    tested = records.count("SET=test")
    assert f"test {tested:,}" in text(view)


def test_a_task_that_changed_or_is_damaged_is_read_again(tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    records = (tasks / "domain_of_life" / "sampled.fasta").read_text()
    (folder / "sampled.fasta").write_text(records)
    before = f"test {records.count('SET=test'):,}"
    assert before in text(pickers.task_picker("mine", "", tmp_path))
    (folder / "sampled.fasta").write_text(records.replace("SET=test", "SET=nan", 1))
    os.utime(folder / "sampled.fasta", ns=(0, 2**62))
    assert before not in text(pickers.task_picker("mine", "", tmp_path))
    (folder / "other.zip").write_bytes(b"PK\3\4 nothing")
    assert "other.zip is damaged" in text(pickers.task_picker("mine", "", tmp_path))


def test_another_task_offers_its_splits_and_starts_with_the_default(tasks: Path) -> None:
    view = pickers.task_picker("gb1", "sampled", tasks)
    assert "overestimates" in text(view)
    view.controls["task"].value = "meltome"
    assert view.value[:2] == ("meltome", "")
    offered = [value for _, value in view.controls["split"].options]
    assert offered == ["", *TASKS["meltome"].splits]
    assert "test 3,134" in text(view)


def test_own_measurements_need_two_paths(tmp_path: Path) -> None:
    files = write_measurements(tmp_path)
    view = pickers.task_picker("gb1", "", tmp_path, str(files.fasta), str(files.labels))
    assert view.parameters == {"fasta": str(files.fasta), "labels": str(files.labels), "id": "", "target": ""}
    choice = view.value
    assert choice.task == "measurements_Tm"
    assert choice.settings == {"fasta": files.fasta, "labels": files.labels, "id": None, "target": None}
    assert "a value (C) per protein, scored by spearman" in text(view)
    assert "id column 'Protein', target 'Tm (C)'" in text(view)
    sizes = load_labels(files.labels, files.fasta).sizes
    assert f"train {sizes['train']}, validation {sizes['validation']}, test {sizes['test']}" in text(view)
    config = BenchmarkConfig(model="m", **choice.settings)
    assert (config.labels, config.fasta) == (files.labels, files.fasta)
    view.controls["target"].value = "Organism"
    assert view.value.task == "measurements_Organism"
    assert "3 classes per protein" in text(view)
    view.controls["labels"].value = str(tmp_path / "absent.csv")
    assert 'role="alert"' in view.card.value
    view.controls["labels"].value = ""
    with refused("option.labels"):
        _ = view.value


def test_folders_are_named_after_task_split_and_model(tmp_path: Path) -> None:
    choice = pickers.TaskChoice.of("gb1", tmp_path)
    assert choice.settings == {"task": "gb1", "data_dir": tmp_path}
    assert choice.folder_name() == "gb1"
    assert choice._replace(split="sampled").folder_name("official 8M") == "gb1_sampled_official 8M"
    assert choice._replace(task="/data/gb1").folder_name() == "-data-gb1"


def test_an_unknown_task_or_split_is_shown_and_raised_when_read(tasks: Path) -> None:
    for view, code in (
        (pickers.task_picker("gb1", "four_vs_rest", tasks), "task.no-split"),
        (pickers.task_picker("gb2", "", tasks), "task.unknown"),
    ):
        assert 'role="alert"' in view.card.value
        with refused(code) as caught:
            _ = view.value
        assert str(caught.value) in text(view)


def test_the_model_picker_shows_the_published_sizes(tmp_path: Path) -> None:
    view = model_pickers.model_picker("esm2_t33_650M_UR50D", tmp_path)
    assert view.value == "esm2_t33_650M_UR50D"
    assert "33 × 1280 651.0M 2.6 GB 10 GB" in text(view)
    assert all(name in text(view) for name in SIZES)


def test_the_table_of_official_models_is_folded_and_shown_once(tmp_path: Path) -> None:
    shown, without = (
        model_pickers.model_picker("esm2_t6_8M_UR50D", tmp_path, sizes=sizes).card.value for sizes in (True, False)
    )
    assert shown.count("<details>") == 1
    assert "<details" not in without


def test_the_trained_checkpoint_requires_notebook_02(tmp_path: Path) -> None:
    view = model_pickers.model_picker("", tmp_path)
    with refused("notebook.needs", notebook="02_pretrain"):
        _ = view.value
    best = pretrained(tmp_path, ESM2Config(1, 16, 2))
    assert view.value == str(best), "the value is computed when it is read"
    shown = text(model_pickers.model_picker("", tmp_path))
    assert "update 700 of 1,200, the best by validation: perplexity 14.37" in shown
    assert "1 layer × 16" in shown
    with refused("model.absent", name="esm2_t6_8M") as caught:
        _ = model_pickers.model_picker("esm2_t6_8M", tmp_path).value
    assert "did you mean esm2_t6_8M_UR50D?" in str(caught.value)


def pretrained(work_dir: Path, size: ESM2Config, recorded: ESM2Config | None = None) -> Path:
    """Write the checkpoint and pretrain.json of notebook 02, with the same or another recorded size."""
    best = work_dir / "pretrain" / "checkpoints" / "step=1.safetensors"
    best.parent.mkdir(parents=True, exist_ok=True)
    model = ESM2.initialised(size, 0)
    write_checkpoint(
        best,
        {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        {"model": dataclasses.asdict(size), "step": 700},
    )
    result = {"best": str(best), "step": 1200, "val_perplexity": 14.368, "model": dataclasses.asdict(recorded or size)}
    write_sealed_json(work_dir / "pretrain" / "pretrain.json", result)
    return best


def test_a_model_of_the_default_size_is_found(dataset: Path, tmp_path: Path) -> None:
    """`esm2kit pretrain` without a model option, and with the size of other weights."""
    default = PretrainConfig(
        data=dataset, out_dir=tmp_path / "a" / "pretrain", max_steps=1, global_batch_size=1, accelerator="cpu"
    )
    first = pretrained(tmp_path / "first", ESM2Config(1, 16, 2)).rename(tmp_path / "first.safetensors")
    second = dataclasses.replace(default, out_dir=tmp_path / "b" / "pretrain", init_from=str(first))
    for config, shape in ((default, "6 layers × 320"), (second, "1 layer × 16")):
        assert config.model is None
        best = pretrain(config)["best"]
        view = model_pickers.model_picker("", config.out_dir.parent)
        assert view.value == str(best)
        assert shape in text(view)
    result = config.out_dir / "pretrain.json"
    content = {key: value for key, value in json.loads(result.read_text()).items() if key not in ("model", "sha256")}
    write_sealed_json(result, content)
    assert model_pickers.model_picker("", config.out_dir.parent).value == str(best), (
        "an older run does not record the shape"
    )


def test_a_stale_checkpoint_is_recognised(tmp_path: Path) -> None:
    """A checkpoint with another size than in pretrain.json, a missing one, and one in a moved folder."""
    best = pretrained(tmp_path / "a", ESM2Config(1, 16, 2), recorded=ESM2Config(4, 128, 4))
    view = model_pickers.model_picker("", tmp_path / "a")
    with refused("checkpoint.another-shape", found="1 layer × 16", recorded="4 layers × 128"):
        _ = view.value
    assert 'role="alert"' in view.card.value
    assert best.exists(), "no file is deleted"

    pretrained(tmp_path / "b", ESM2Config(1, 16, 2))
    (tmp_path / "b").rename(tmp_path / "c")
    moved = tmp_path / "c" / "pretrain" / "checkpoints" / "step=1.safetensors"
    assert model_pickers.model_picker("", tmp_path / "c").value == str(moved)
    moved.unlink()
    with refused("checkpoint.missing", path=str(moved)):
        _ = model_pickers.model_picker("", tmp_path / "c").value


def test_a_file_is_read_immediately(sample: Path, tmp_path: Path) -> None:
    path = sample / "uniref50_valid.fasta"
    view = pickers.file_picker(str(path))
    sequences = [part.split("\n", 1)[1].replace("\n", "") for part in path.read_text().split(">")[1:]]
    lengths = [len(sequence) for sequence in sequences]
    assert view.value == path
    median = f"{np.median(lengths):,.0f}"
    assert f"records {len(lengths)} residues {min(lengths):,} to {max(lengths):,}, median {median}" in text(view)

    bad = tmp_path / "bad.fasta"
    bad.write_text(">one\nMKV\n>two\nMK1V\n")
    view.controls["fasta"].value = str(bad)
    with pytest.raises(InputError, match="two"):
        _ = view.value
    for chosen, code, hint in (
        (tmp_path / "nowhere.fasta", "fasta.absent", "has bad.fasta"),
        (tmp_path, "fasta.folder", ""),
        (Path("/nowhere/at/all.fasta"), "fasta.absent", "nor does /nowhere/at"),
    ):
        view.controls["fasta"].value = str(chosen)
        with refused(code) as caught:
            _ = view.value
        assert hint in str(caught.value)
        assert 'role="alert"' in view.card.value
    bad.write_text(">one\nMKV\n")
    view.controls["fasta"].value = str(bad)
    assert view.value == bad, "a corrected file is read again"


@given(size=NUMBERS, devices=NUMBERS, tensor=NUMBERS, turns=NUMBERS)
def test_the_layout_picker_agrees_with_the_library(size: int, devices: int, tensor: int, turns: int) -> None:
    view = shape_pickers.layout_picker(size, devices, tensor, turns)
    try:
        expected = BatchLayout.of(
            devices=devices, tensor_model_parallel_size=tensor, accumulate_grad_batches=turns, global_batch_size=size
        )
    except InputError as error:
        with pytest.raises(InputError, match=re.escape(str(error))):
            _ = view.value
        assert "Cannot be used" in text(view)
    else:
        assert view.value == expected
        assert expected.equation in text(view)
        assert expected.global_batch_size == size


def test_heads_that_are_not_divisible_are_an_error() -> None:
    size = shape_pickers.size_picker("custom", 2, 48, 6)
    view = shape_pickers.layout_picker(8, 4, 4, 1, size)
    with refused("layout.heads", attention_heads=6, tensor_model_parallel_size=4):
        _ = view.value
    view.controls["tensor_model_parallel_size"].value = 2
    assert view.value.data_parallel_size == 2


@pytest.mark.parametrize("name", SIZES)
def test_the_layout_follows_the_chosen_model_not_the_custom_one(name: str) -> None:
    """6 heads of the custom model are divisible by 3 but not by 4; 20 or 40 of a published model by 4 but not by 3."""
    size = shape_pickers.size_picker("custom", 2, 48, 6)
    four, three = (shape_pickers.layout_picker(12, devices, devices, 1, size) for devices in (4, 3))
    assert "attention_heads 6 is not divisible" in text(four)
    size.controls["model"].value = name
    assert four.value.tensor_model_parallel_size == 4
    assert "Cannot be used" not in text(four), "the card must follow the model immediately"
    heads = SIZES[name].attention_heads
    assert f"attention_heads {heads} is not divisible by tensor_model_parallel_size 3" in text(three)
    size.controls["model"].value = "custom"
    assert three.value.tensor_model_parallel_size == 3


def test_the_size_picker_agrees_with_the_library() -> None:
    view = shape_pickers.size_picker("custom", 4, 128, 4)
    assert view.value == ESM2Config(4, 128, 4)
    assert "0.8M" in text(view)
    assert not view.controls["embed_dim"].disabled
    view.controls["embed_dim"].value = 130
    with refused("model.heads", embed_dim=130, attention_heads=4):
        _ = view.value
    view.controls["model"].value = "esm2_t33_650M_UR50D"
    assert view.value == SIZES["esm2_t33_650M_UR50D"]
    assert "33 layers × 1280, 20 heads of 64 channels parameters 651.0M to train 10 GB" in text(view)
    assert view.controls["embed_dim"].disabled, "a published size has a fixed width"
    with refused("model.unknown-size", name="esm2_t7"):
        _ = shape_pickers.size_picker("esm2_t7", 4, 128, 4).value


def test_a_stage_without_tensor_parallelism_has_no_such_control() -> None:
    view = shape_pickers.layout_picker(8, 2, None, 2)
    assert view.parameters == {"global_batch_size": 8, "devices": 2, "accumulate_grad_batches": 2}
    assert view.value.micro_batch_size == 2


def test_the_run_browser_shows_the_newest_finished_run(tmp_path: Path) -> None:
    assert run_browser("", tmp_path).value is None
    for name, status, figure in (("a-1", "done", 1.5), ("b-2", "done", 2.5), ("c-3", "failed", 3.5)):
        (tmp_path / name).mkdir()
        entry = {"status": status, "seconds": 2.0, "figures": {"loss_at_end": figure}, "parameters": {}}
        manifest = {
            "tier": "t",
            "created": f"2026-01-0{name[-1]}T00:00:00",
            "git_commit": None,
            "notebooks": {"02_x": entry},
        }
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    view = run_browser("", tmp_path)
    assert view.value == tmp_path / "b-2"
    assert "02 final loss 2.5" in text(view)
    assert f'href="{(tmp_path / "b-2" / "index.html").as_posix()}"' in view.card.value
    view.controls["run"].value = "c-3"
    assert view.value == tmp_path / "c-3"
    with refused("run.unknown", name="d-4"):
        _ = run_browser("d-4", tmp_path).value


def test_the_page_of_a_headless_run_does_not_freeze_the_list_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = run_browser("", tmp_path)
    assert "No run has finished yet" in view._repr_mimebundle_()["text/html"]
    monkeypatch.setenv(HEADLESS, "1")
    assert view._repr_mimebundle_()["text/plain"] == "In JupyterLab, one of your runs can be chosen here."


def test_without_a_front_end_a_view_shows_its_value_and_no_widget(tasks: Path) -> None:
    assert not widgets.has_front_end()
    shown = pickers.task_picker("gb1", "sampled", tasks)._repr_mimebundle_()
    assert set(shown) == {"text/plain", "text/html"}
    assert shown["text/plain"] == "task = 'gb1' · split = 'sampled'"
    assert "overestimates" in shown["text/html"]


def test_with_a_front_end_it_is_a_widget(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widgets, "has_front_end", lambda: True)
    shown = pickers.task_picker("gb1", "", tasks)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown


def test_choices_are_saved_as_a_tier_on_top_of_sample(root: Path, tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "papermill_runs"
    folder.mkdir()
    (folder / "sample.yaml").write_text((root / "papermill_runs" / "sample.yaml").read_text())
    view = pickers.task_picker("gb1", "two_vs_rest", tasks)
    export = widgets.Export("04_benchmark", view, folder=folder)
    assert yaml.safe_load(repr(export)) == {"04_benchmark": {"task": "gb1", "split": "two_vs_rest"}}
    path = export.save("mine")
    tier = yaml.safe_load(path.read_text())
    assert list(tier) == list(yaml.safe_load((folder / "sample.yaml").read_text()))
    assert tier["04_benchmark"] == {"task": "gb1", "split": "two_vs_rest"}

    widgets.Export("02_pretrain", shape_pickers.layout_picker(8, 2, 1, 2), folder=folder).save("mine")
    tier = yaml.safe_load(path.read_text())
    assert tier["02_pretrain"]["devices"] == 2
    assert tier["04_benchmark"]["task"] == "gb1", "saving one notebook's choices dropped another's"

    for name, code in (("sample", "tier.shipped"), ("../up", "tier.name"), ("", "tier.name")):
        with refused(code, name=name):
            export.save(name)
    view.controls["split"].options = ["nosuch"]
    with refused("task.no-split"):
        export.save("mine")
    export.button.click()
    assert "Cannot be used" in export.message.value


def test_curves_are_thinned_and_retain_their_end() -> None:
    rows = [{"step": str(step), "train_loss": str(3 - step / 1e4), "val_loss": ""} for step in range(1, 5001)]
    found = live.extract_points(rows, "train_loss")
    assert len(found) <= live.MAX_POINTS + 60
    assert found[0] == (1.0, 2.9999)
    assert found[-1] == (5000.0, 2.5)
    assert live.extract_points(rows, "val_loss") == []


def test_the_live_view_plots_metrics_csv(tmp_path: Path) -> None:
    view = live.TrainingView("pretrain", tmp_path, 100, guide_loss=2.9)
    assert "validation: none yet" in view.render()
    (tmp_path / "metrics.csv").write_text(
        "step,train_loss,val_loss,val_perplexity,lr,grad_norm,tokens,tokens_per_s,seconds\n"
        "50,3.0,,,0.001,1,10,1500,1\n100,2.5,,,0.0005,1,10,1600,2\n100,,2.75,15.64,,,,,3\n"
    )
    page = view.render()
    labels = re.findall(r'aria-label="([^"]+)"', page)
    assert labels == [
        "training loss 2.5, validation 2.75",
        "validation perplexity 15.6",
        "learning rate 5.0e-04",
        "tokens/s 1,600",
    ]
    assert "unigram guess 2.90" in page
    first = re.search(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', page)
    x0, y0, x1, y1 = map(float, first.groups())
    assert x1 > x0, "later updates are to the right"
    assert y1 > y0, "a lower loss is plotted lower"


def test_an_empty_choice_is_shown_with_its_meaning(tasks: Path, tmp_path: Path) -> None:
    pretrained(tmp_path, ESM2Config(1, 16, 2))
    task, model = pickers.task_picker("gb1", "", tasks), model_pickers.model_picker("", tmp_path)
    assert repr(task) == "task = 'gb1' · split = '' (the default)"
    assert repr(model) == "model = '' (the model trained here (notebook 02, or else the newest run))"
    assert "the model trained here" in model._repr_mimebundle_()["text/html"]
    assert repr(run_browser("", tmp_path)) == "run = '' (the newest finished run)"
    assert repr(map_pickers.protein_picker("", [Record("P1", "P1", "MKV")])) == "protein = '' (P1 (the first))"
    export = widgets.Export("04_benchmark", task, model)
    assert yaml.safe_load(repr(export)) == {"04_benchmark": {"task": "gb1", "split": "", "model": ""}}
    assert "split: ''  # the default" in repr(export)
    task.controls["split"].value = "sampled"
    assert repr(task) == "task = 'gb1' · split = 'sampled'"


def test_the_run_browser_shows_running_and_interrupted_runs(tmp_path: Path) -> None:
    """Notebook 00 lists runs while its own run is running; a killed run is shown as interrupted."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, process in (("a", identify_process()), ("b", identify_process() | {"pid": ended.pid})):
        (tmp_path / name).mkdir()
        manifest = {
            "tier": "t",
            "created": f"2026-01-01T00:00:0{name == 'a':d}",
            "planned": ["00_x", "01_y"],
            "process": process,
            "notebooks": {"00_x": {"status": "running", "parameters": {}}},
        }
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    view = run_browser("", tmp_path)
    assert view.value is None
    assert text(view) == "a is running 00_x; b is interrupted in 00_x. No run has finished yet."


def test_the_live_view_plots_the_downstream_task_if_it_is_probed(tmp_path: Path) -> None:
    view = live.TrainingView("pretrain", tmp_path, 100)
    (tmp_path / "metrics.csv").write_text(
        "step,train_loss,val_loss,val_perplexity,downstream_accuracy,downstream_peak_gib,lr,grad_norm,tokens,"
        "tokens_per_s,seconds\n50,3.0,,,,,0.001,1,10,1500,1\n50,,2.75,15.64,0.41,0.5,,,,,3\n"
    )
    labels = re.findall(r'aria-label="([^"]+)"', view.render())
    assert labels[1:3] == ["validation perplexity 15.6", "downstream task, accuracy 0.41"]
    assert len(labels) == 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_with_other_settings_is_reported_with_notebook_parameters_or_overwritten(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = []

    def train(stage: str, config: PretrainConfig, show: object) -> dict[str, int]:
        resumed.append(config.resume_if_exists)
        if config.resume_if_exists:
            changed = {"path": "run/last.safetensors", "changed": "lr was 1 and is now 2"}
            raise InputError("message of the command", code="resume.another-run", **changed)
        return {"step": 3}

    monkeypatch.setattr(live.launch, "train", train)
    config = PretrainConfig(tmp_path, out_dir=tmp_path / "run", max_steps=1, global_batch_size=1)
    if overwrite:
        assert live.train("pretrain", config, overwrite=True) == {"step": 3}
        assert resumed == [True, False]
    else:
        with refused("resume.another-run", changed="lr was 1 and is now 2") as caught:
            live.train("pretrain", config)
        assert "Set overwrite to True" in str(caught.value), "parameters of the notebook, not options of the command"
        assert resumed == [True]


def scored(kind: str, name: str, value: float | None, **more: object) -> ReportRow:
    return row(kind, name, {"accuracy": score(value, value, value)}, **more)


def compared(first: ReportRow, others: dict[str, tuple[float, float, float]]) -> Report:
    """A report of a first row and its paired differences from its baselines."""
    kinds = {"p_step3, cnn": "probe", "untrained p_step3, cnn": "untrained"}
    values = {"majority": 0.4, "composition": 0.55, "onehot_cnn": 0.5}
    rows = [scored(kinds.get(name, "baseline"), name, values.get(name, 0.6)) for name in others]
    pairs = [Comparison(first.name, name, "accuracy", *difference, "") for name, difference in others.items()]
    return report("accuracy", [first, *rows], pairs, train=280)


BETTER, LEVEL, WORSE = (0.1, 0.05, 0.15), (0.01, -0.02, 0.04), (-0.1, -0.15, -0.05)
OTHERS = {"majority": BETTER, "composition": LEVEL, "onehot_cnn": BETTER}


def test_a_verdict_names_the_best_baseline_whichever_it_is() -> None:
    probe = scored("probe", "p_step3, cnn", 0.6)
    assert verdict(compared(probe, {"untrained p_step3, cnn": WORSE} | OTHERS)) == (
        "The CNN probe on the frozen encoder has 0.600: worse than the same probe on an untrained encoder by 0.100 "
        "[0.050, 0.150]; no clear difference from the best baseline, composition (0.550): +0.010 [-0.020, +0.040]."
    )
    found = compared(probe, OTHERS)
    found = replace(found, rows=[probe, scored("baseline", "majority", 0.9), *found.rows[2:]])
    assert "better than the best baseline, majority class (0.900), by 0.100 [0.050, 0.150]" in verdict(found)


def test_a_verdict_reports_missing_scores() -> None:
    found = compared(scored("probe", "p_step3, ridge", None), {"mean": (None, None, None)})
    assert verdict(found).endswith(
        "has no score: no score to compare with the best baseline, training-set mean (0.600)."
    )
    found = compared(scored("probe", "p_step3, ridge", 0.5), {"onehot_cnn": (0.25, None, None)})
    assert "+0.250 compared with the best baseline, one-hot CNN (0.500), in every bootstrap" in verdict(found)
    found = replace(found, comparisons=[replace(found.comparisons[0], metric="rmse", low=-0.1, high=0.5)])
    assert verdict(found).endswith(": +0.250 [-0.100, +0.500] (positive means a lower error).")


OVERFITTED = [1.0, 0.7, 0.5, 0.6, 0.7, 0.8]


def test_all_tasks_in_one_sentence() -> None:
    good, level = (compared(scored("probe", "p_step3, cnn", 0.6), {"composition": each}) for each in (BETTER, LEVEL))
    scores = "accuracy 0.600; the best baseline, composition, has 0.550."
    beat = "beat every baseline"
    assert summary({"a": level, "b": good}) == f"The vectors {beat} on 1 of 2 tasks, b: {scores}"
    assert summary({"a": level}) == f"The vectors do not clearly {beat} on a: {scores}"
    assert summary({"b": good}) == f"The vectors {beat} on b: {scores}"
    assert (
        summary({"a": level, "c": level})
        == f"The vectors clearly {beat} on 0 of 2 tasks, with the smallest gap on a: {scores}"
    )


@pytest.mark.parametrize(
    ("pair", "validation", "mode", "text"),
    [
        (BETTER, OVERFITTED, "full", "It was worth it: 280 labelled proteins were enough"),
        (WORSE, OVERFITTED, "full", "not worth it at these settings.* Overfitting: .* lowest at validation 3 of 6"),
        (WORSE, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], "full", "not worth it.* still falling at the end: train for more"),
        (LEVEL, [1.0] * 6, "lora", "do not show a clear gain.* levelled off"),
        (LEVEL, [1.0] * 6, "frozen", "Only the head was trained"),
        ((0.0, None, None), [1.0] * 6, "full", "do not separate it from the probe .* too few, or too easy"),
    ],
)
def test_the_explanation_of_fine_tuning_follows_the_scores(
    pair: tuple[float, float, float], validation: list[float], mode: str, text: str
) -> None:
    train = [1.0, 0.8, 0.7, 0.6, 0.5, 0.4]
    history = {"train_loss": [[loss] for loss in train], "validation_loss": [[loss] for loss in validation]}
    first = scored(
        "finetuned", f"p_step3, fine-tuned ({mode}, cnn)", 0.6, config={"mode": mode}, selected={"epoch": [6]},
        history=history,
    )  # fmt: skip
    found = explain_finetuning(compared(first, {"p_step3, cnn": pair} | OTHERS))
    assert re.search(text, found)
    assert "lower `lr`" not in found
    assert "no probe on the frozen encoder" in explain_finetuning(compared(first, OTHERS))

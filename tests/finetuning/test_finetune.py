"""Fine-tuning: one loss curve for every layout, exact resuming, mode frozen equals the probe, and planted signal."""

import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import SHAPE, write_tasks, write_tiny_model

from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.report import Report
from esm2kit.core.errors import InputError
from esm2kit.finetuning import finetune as stage
from esm2kit.finetuning.config import lr_factor, resolve_defaults
from esm2kit.finetuning.data import LabelledBatches
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.heads import HeadSpec, KeyedDropout, LabelModel, hash_to_uniforms
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.module import LabelTrainer, freeze_parameters, group_by_learning_rate, loss_sum, training_flops
from esm2kit.finetuning.report import _sum_seconds
from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.load import find_model
from esm2kit.models.lora import add_lora
from esm2kit.models.weights import Weights
from esm2kit.sequences.alphabet import encode
from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.packing import LabelledProteins, batch_windows, build_labels, load_tokens
from esm2kit.training import launch
from esm2kit.training.layout import BatchLayout

STEPS = 10
PRECISIONS = ("bf16-mixed", "bf16-true")
CUT = "cut"  # the worker interrupts the first run in a folder of this name before its fifth update
# layouts of two processes that must give the same curve as one device
LAYOUTS = {"ddp2": {"devices": 2}, "fsdp2": {"devices": 2, "strategy": "fsdp2"}}
# A residue task with masks and a convolution, a protein task with attention, a frozen encoder, and adapters.
KINDS = {
    "residue": {"task": "residue_class", "head": "cnn", "mode": "full"},
    "protein": {"task": "protein_value", "head": "light_attention", "mode": "last_n", "layer_lr_decay": 0.5},
    "frozen": {"task": "residue_value", "head": "fnn", "mode": "frozen"},
    "lora": {"task": "protein_class", "head": "fnn", "mode": "lora", "class_weights": True},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def settings(tasks: Path, tiny: Path, out_dir: Path, **given: object) -> dict[str, object]:
    common = {"data_dir": tasks, "model": str(tiny), "out_dir": out_dir, "accelerator": "cpu", "benchmark": False}
    common |= {"lr": 1e-3, "log_every_n_steps": 1, "max_steps": STEPS, "resamples": 100}
    return common | given


def run_in_processes(processes: int, runs: list[dict[str, object]], *more: str) -> int:
    """Run configurations one after another in one group of processes; return the exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [[f"--{name}={value}" for name, value in run.items()] for run in runs]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(Path(__file__).parents[1] / "support" / "finetune_worker.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [json.dumps(arguments), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def column(out_dir: Path, name: str) -> list[float]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def final_tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / "checkpoints" / "last.safetensors")[0]


def layout_runs(tasks: Path, tiny: Path, out_dir: Path, **layout: object) -> list[dict[str, object]]:
    return [
        settings(
            *(tasks, tiny, out_dir / f"{kind}-{accumulate}"),
            global_batch_size=8,
            accumulate_grad_batches=accumulate,
            dropout=0.3,
            gradient_clip_val=0.3,
            val_check_interval=5,
            **KINDS[kind],
            **layout,
        )
        for kind in KINDS
        for accumulate in (1, 2)
    ]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, tasks, tiny) -> Path:
    out_dir = tmp_path_factory.mktemp("one")
    for run in layout_runs(tasks, tiny, out_dir):
        finetune(FinetuneConfig(**run))
    return out_dir


def bf16_runs(precision: str, tasks: Path, tiny: Path, out_dir: Path, **layout: object) -> list[dict[str, object]]:
    runs = layout_runs(tasks, tiny, out_dir / precision, precision=precision, **layout)
    return [run for run in runs if Path(run["out_dir"]).name in ("residue-2", "lora-2")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tasks, tiny) -> Path:
    """Run everything that needs two processes in a single launch."""
    out_dir, runs = tmp_path_factory.mktemp("two"), []
    for name, chosen in LAYOUTS.items():
        runs += layout_runs(tasks, tiny, out_dir / name, **chosen)
        for precision in PRECISIONS:
            runs += bf16_runs(precision, tasks, tiny, out_dir / name, **chosen)
        given = {"task": "residue_class", "dropout": 0.3, "val_check_interval": 3, "global_batch_size": 6} | chosen
        full, cut = (settings(tasks, tiny, out_dir / name / run, **given) for run in ("full", CUT))
        runs += [full, cut, cut]
    run_in_processes(2, runs)
    return out_dir


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("train_loss", "grad_norm", "val_loss"):
        curve, reference = (torch.tensor(column(run, name)) for run in (found, expected))
        torch.testing.assert_close(curve, reference, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    tensors, others = final_tensors(found), final_tensors(expected)
    assert tensors.keys() == others.keys()
    for name in others:
        # softmax ignores a shift of all attention scores, so the gradient of this bias is rounding that Adam amplifies
        if not name.startswith("optimizer.") and name != "head.bias_attend":
            torch.testing.assert_close(tensors[name], others[name], rtol=0, atol=2e-5, msg=lambda t, n=name: f"{n}:{t}")


def test_accumulation_gives_the_same_curve(one_device) -> None:
    for kind in KINDS:
        assert_same_run(one_device / f"{kind}-2", one_device / f"{kind}-1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_curve_of_one_device(layout: str, one_device, two_processes) -> None:
    for kind in KINDS:
        for accumulate in (1, 2):
            assert_same_run(two_processes / layout / f"{kind}-{accumulate}", one_device / f"{kind}-1")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_gives_one_curve_on_all_layouts(precision: str, tmp_path, tasks, tiny, one_device, two_processes) -> None:
    """The first update matches one device; later updates match within bf16 rounding; float32 is close."""
    for run in bf16_runs(precision, tasks, tiny, tmp_path):
        finetune(FinetuneConfig(**run))
    for kind in ("residue", "lora"):
        folders = {"one": tmp_path} | {name: two_processes / name for name in LAYOUTS}
        curves = {name: column(path / precision / f"{kind}-2", "train_loss") for name, path in folders.items()}
        wide = column(one_device / f"{kind}-1", "train_loss")
        for name in LAYOUTS:
            # FSDP2 gathers bfloat16 under either precision
            close = 1e-3 if (name, precision) == ("fsdp2", "bf16-mixed") else 1e-6
            assert curves[name][0] == pytest.approx(curves["one"][0], rel=close), (kind, name)
            assert curves[name][0] != pytest.approx(wide[0], rel=2e-6), f"{name}: bf16 gives the loss of float32"
            np.testing.assert_allclose(curves[name][:4], curves["one"][:4], rtol=2e-2, err_msg=f"{kind}, {name}")
            np.testing.assert_allclose(curves[name], curves["one"], rtol=0.1, err_msg=f"{kind}, {name}")
        np.testing.assert_allclose(curves["one"], wide, rtol=0.1, err_msg=kind)


def test_settings_affect_the_curves(one_device, tasks, tiny, tmp_path) -> None:
    """Gradients exceed the clipping norm, the loss falls, and dropout and a larger global batch change the curve."""
    for kind in KINDS:
        assert max(column(one_device / f"{kind}-1", "grad_norm")) > 0.3
    losses = column(one_device / "residue-1", "train_loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.02
    for name, change in (("larger", {"global_batch_size": 16}), ("dry", {"dropout": 0.0})):
        run = layout_runs(tasks, tiny, tmp_path)[0] | {"out_dir": tmp_path / name} | change
        finetune(FinetuneConfig(**run))
        differing = np.abs(np.array(column(tmp_path / name, "train_loss")) - losses)
        assert differing.max() > 1e-3


def test_loss_is_the_mean_over_the_global_batch(tasks, tiny, tmp_path) -> None:
    """Compare with one sequence at a time, without packing or Lightning; masks make label counts very unequal."""
    config = FinetuneConfig(
        **settings(
            tasks,
            tiny,
            tmp_path,
            task="residue_class",
            max_steps=1,
            global_batch_size=8,
            dropout=0.0,
            seeds=[4],
            standardize=False,
        )
    )
    finetune(config)
    data = load_task("residue_class", None, tasks)
    labels = build_labels(data, True, False)
    proteins = LabelledProteins(data, labels, tmp_path / "other", 1022)
    batch = LabelledBatches(proteins, BatchLayout(8, 1, 1, 1), 0, 4, 1)[0][0]
    model = LabelModel(ESM2.initialised(SHAPE, 0), HeadSpec("cnn", "residue", 32, 3, 32, 0.0, False), 4)
    total, count = 0.0, 0
    for protein in batch.proteins:
        scored = data.scored[data.offsets[protein] : data.offsets[protein + 1]]
        tokens, num_tokens = proteins.pack(proteins.windows(np.array([protein])))
        outputs = model(tokens, num_tokens)[torch.from_numpy(scored)]
        targets = torch.from_numpy(data.targets[data.offsets[protein] : data.offsets[protein + 1]][scored])
        total += torch.nn.functional.cross_entropy(outputs, targets, reduction="sum").item()
        count += len(targets)
    assert len({int(data.scored[data.protein_of_target == protein].sum()) for protein in batch.proteins}) > 3
    assert column(tmp_path, "train_loss")[0] == pytest.approx(total / count, rel=1e-5)


def test_dropout_depends_only_on_the_sample() -> None:
    """A protein has the same mask in every batch, another one in another epoch, and the mask has the right rate."""
    head = HeadSpec("cnn", "residue", 32, 3, 64, 0.4, False)
    model = LabelModel(None, head).train()
    rows = torch.randn(50, 32)
    keys = torch.tensor([11, -7, 12345678901234567])
    together = model.label(rows, [20, 12, 18], keys).split([18, 10, 16])
    alone = model.label(rows[20:32], [12], keys[1:2])
    torch.testing.assert_close(together[1], alone, rtol=0, atol=1e-6)
    assert (model.label(rows[20:32], [12], keys[1:2] + 1) - alone).abs().max() > 1e-3
    keep = hash_to_uniforms(torch.arange(2000), 50)
    assert keep.min() >= 0
    assert keep.max() < 1
    assert abs(keep.mean().item() - 0.5) < 0.005
    assert abs(np.corrcoef(keep[:-1].flatten(), keep[1:].flatten())[0, 1]) < 0.02
    assert isinstance(model.head, KeyedDropout)


@pytest.mark.parametrize(("death", "mode"), [({"update": 4}, "lora"), ({"save": 2}, "full")])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(death, mode, tmp_path, tasks, tiny) -> None:
    """After SIGKILL before an update or during a save, the resumed run is bit-identical."""
    given = {"task": "residue_class", "dropout": 0.3, "val_check_interval": 3, "global_batch_size": 6, "mode": mode}
    full, cut = (settings(tasks, tiny, tmp_path / name, **given) for name in ("full", "cut"))
    finetune(FinetuneConfig(**full))
    assert run_in_processes(1, [cut], json.dumps(death)) == -signal.SIGKILL
    stopped = column(tmp_path / "cut", "step")
    assert len(stopped) < len(column(tmp_path / "full", "step"))
    result = finetune(FinetuneConfig(**cut))
    assert result["finished"]
    assert_identical(tmp_path)
    best = [read_checkpoint(tmp_path / name / "finetuned.safetensors")[0] for name in ("full", "cut")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def assert_identical(folder: Path) -> None:
    expected, found = final_tensors(folder / "full"), final_tensors(folder / CUT)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("step", "train_loss", "grad_norm", "val_loss", "val_accuracy"):
        assert column(folder / CUT, name) == column(folder / "full", name), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_is_exact_on_every_layout(layout, two_processes) -> None:
    """Both ranks are interrupted before their fifth update, and the same command resumes from the third."""
    assert (two_processes / layout / CUT / "cut_off_after").read_text() == "updates 4, checkpoint 3"
    assert_identical(two_processes / layout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_the_same_command_resumes_it(number, tmp_path, tasks, tiny, monkeypatch) -> None:
    full, cut = (settings(tasks, tiny, tmp_path / name, task="protein_value") for name in ("full", "cut"))
    finetune(FinetuneConfig(**full))
    step = LabelTrainer.training_step

    def interrupted_step(self: LabelTrainer, *arguments: object) -> None:
        if self.step == 3:
            os.kill(os.getpid(), number)
        step(self, *arguments)

    monkeypatch.setattr(LabelTrainer, "training_step", interrupted_step)
    first = finetune(FinetuneConfig(**cut))
    assert not first["finished"]
    assert first["runs"][0]["step"] in (4, 5)
    assert not (tmp_path / "cut" / "finetuned.safetensors").exists()
    monkeypatch.undo()
    assert finetune(FinetuneConfig(**cut))["finished"]
    expected, found = final_tensors(tmp_path / "full"), final_tensors(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tasks, tiny) -> None:
    finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, task="protein_value", max_steps=1)))
    with refused("resume.another-run", changed="mode was full and is now lora"):
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, task="protein_value", max_steps=1, mode="lora")))
    with refused("resume.another-run") as caught:
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, task="protein_value", max_steps=1, limit=10)))
    assert "the data's sha256 was" in caught.value.values["changed"]


@pytest.mark.parametrize("task", ["protein_class", "protein_value", "residue_class", "residue_value"])
def test_planted_signal_is_found_and_shuffled_labels_have_none(task, tmp_path, tasks, tiny) -> None:
    """The interval is above chance with a signal, and contains chance without one."""
    metric = {"protein_class": "mcc", "residue_class": "mcc"}.get(task, "spearman")
    given = {"task": task, "max_steps": 150, "lr": 3e-3, "val_check_interval": 25, "log_every_n_steps": 25}
    found = finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "signal", **given, resamples=300)))
    score = found["test"][metric]
    # a perfect score is equal in all bootstrap replicates, so it has no interval
    assert score["value"] == 1 if score["low"] is None else score["low"] > 0.2
    shuffled = write_tasks(tmp_path / "shuffled", shuffled=True)
    none = finetune(FinetuneConfig(**settings(shuffled, tiny, tmp_path / "none", **given, resamples=300)))
    if none["test"][metric]["low"] is not None:  # a constant has no rank correlation
        assert none["test"][metric]["low"] < 0.1


@pytest.mark.parametrize(
    ("task", "head", "probe"),
    [
        ("protein_value", "fnn", "fnn"),
        ("protein_class", "light_attention", "light_attention"),
        ("residue_class", "cnn", "cnn"),
    ],
)
def test_mode_frozen_equals_the_probe(task, head, probe, tmp_path, tasks, tiny) -> None:
    """With batches of the complete set, the same head, seed, moments and optimizer give the same predictions."""
    epochs, data = 8, load_task(task, None, tasks)
    size = len(data.rows("train"))
    given = {"task": task, "mode": "frozen", "head": head, "dropout": 0.0, "seeds": [3], "max_steps": epochs}
    given |= {"global_batch_size": size, "val_check_interval": 1, "gradient_clip_val": 0.0, "schedule": "constant"}
    result = finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given, warmup_steps=0)))
    esm2 = ESM2.initialised(SHAPE, 0).eval()
    proteins = LabelledProteins(data, build_labels(data, True, False), tmp_path / "cache", 1022)
    rows = []
    for number in range(len(data.ids)):
        tokens, num_tokens = proteins.pack(proteins.windows(np.array([number])))
        with torch.no_grad():
            hidden_TD = esm2.encode(tokens, Packed(num_tokens))[1:-1]
        rows.append(hidden_TD if head != "fnn" else hidden_TD.mean(0, keepdim=True))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in rows])])
    features = Features(torch.cat(rows).numpy(), offsets)
    probe_config = ProbeConfig(probe, dropout=0.0, epochs=epochs, batch_size=size, patience=None)
    fitted = fit_probe(features, ProbeTargets.from_task(data), probe_config, (3,))
    validation = [row[0] for row in fitted.history["validation_loss"]]
    np.testing.assert_allclose(column(tmp_path, "val_loss"), validation, rtol=2e-5)
    with np.load(tmp_path / "predictions.npz") as stored:
        predicted = stored[f"predicted/{result['name']}"]
    if data.task.target == "value":
        np.testing.assert_allclose(predicted, fitted.test_SM, atol=2e-4)
    else:
        assert (predicted == fitted.test_SM).mean() > 0.999


def test_modes_train_the_documented_parameters() -> None:
    data_spec = HeadSpec("fnn", "protein", 32, 1, 8, 0.0, False)

    def trained(**given: object) -> set[str]:
        model = LabelModel(ESM2.initialised(ESM2Config(4, 32, 4), 0), data_spec)
        freeze_parameters(model, FinetuneConfig(**given))
        return {
            ".".join(name.split(".")[:3]) for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    head = {"head.weight_in", "head.bias_in", "head.weight_out", "head.bias_out"}
    norm = {"esm2.emb_layer_norm_after.weight", "esm2.emb_layer_norm_after.bias"}
    layers = [f"esm2.layers.{number}" for number in range(4)]
    assert trained(mode="frozen") == head
    assert trained(mode="last_n", last_n=2) == head | norm | set(layers[2:])
    assert trained(mode="last_n", last_n=4) == head | norm | set(layers)
    with refused("option.range", name="last_n", found=99, at_most=4):
        trained(mode="last_n", last_n=99)
    assert trained(mode="full") == head | norm | set(layers) | {"esm2.embed_tokens.weight"}


@pytest.mark.parametrize("mode", ["full", "last_n", "lora", "frozen"])
def test_training_flops_match_torchs_counter(mode) -> None:
    """Torch's counter omits attention on the CPU, so the sequences have two tokens and almost no attention."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, config = ESM2Config(4, 64, 4), FinetuneConfig(mode=mode, last_n=2, head="fnn")
    model = LabelModel(ESM2.initialised(shape, 0), HeadSpec("fnn", "residue", 64, 1, 1, 0.0, False))
    if mode == "lora":
        add_lora(model.esm2, 1, 1.0, ["q_proj"])
    freeze_parameters(model, config)
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.randint(4, 24, (100,)), [2] * 50, torch.zeros(50, dtype=torch.int64)).sum()
        loss.backward()
    assert training_flops(shape, [2] * 50, config) == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_learning_rates_decrease_from_the_top_layer_down() -> None:
    model = LabelModel(ESM2.initialised(ESM2Config(3, 32, 4), 0), HeadSpec("fnn", "protein", 32, 1, 8, 0.0, False))
    config = FinetuneConfig(mode="full", lr=1e-3, head_lr=1e-2, layer_lr_decay=0.5)
    freeze_parameters(model, config)
    rates = {
        id(parameter): rate for rate, group in group_by_learning_rate(model, config).items() for parameter in group
    }
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in rates}
    assert found["head.weight_in"] == 1e-2
    assert found["esm2.emb_layer_norm_after.weight"] == 1e-3
    assert [found[f"esm2.layers.{number}.fc1.weight"] for number in range(3)] == [2.5e-4, 5e-4, 1e-3]
    assert found["esm2.embed_tokens.weight"] == 1.25e-4


def test_schedules() -> None:
    config = dataclasses.replace(FinetuneConfig(), warmup_steps=4, max_steps=104, schedule="linear")
    assert [lr_factor(step, config) for step in (0, 3, 4, 54)] == [0.25, 1.0, 1.0, 0.5]
    assert lr_factor(54, dataclasses.replace(config, schedule="cosine")) == pytest.approx(0.5)
    assert lr_factor(103, dataclasses.replace(config, schedule="constant")) == 1.0


def test_early_stopping_keeps_the_best_checkpoint(tmp_path, tasks, tiny) -> None:
    """With a learning rate that is far too high the run stops early and keeps the best checkpoint."""
    given = {"task": "protein_value", "lr": 0.3, "max_steps": 60, "val_check_interval": 2, "patience": 3}
    result = finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))
    losses = column(tmp_path, "val_loss")
    run = result["runs"][0]
    assert result["finished"]
    assert run["step"] < 60
    assert len(losses) == int(np.argmin(losses)) + 1 + 3
    assert run["best_step"] == 2 * (int(np.argmin(losses)) + 1)
    assert run["val_loss"] == pytest.approx(min(losses))
    again = finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))
    assert again["runs"][0]["step"] == run["step"]


def test_seeds_are_separate_runs_in_one_report(tmp_path, tasks, tiny) -> None:
    given = {"task": "protein_class", "seeds": [1, 2], "benchmark": True, "max_steps": 6}
    result = finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    report = Report.read(tmp_path)
    kinds = [row.kind for row in report.rows]
    assert kinds[:3] == ["finetuned", "probe", "untrained"]
    assert kinds.count("baseline") >= 3
    first = report.first
    assert first.name == "tiny, fine-tuned (full, fnn)"
    assert first.metrics["accuracy"].value == pytest.approx(result["test"]["accuracy"]["value"])
    assert [pair.theirs for pair in report.comparisons] == [row.name for row in report.rows[1:]]
    assert "fine-tuned (full, fnn)" in (tmp_path / "report.html").read_text()
    alone = finetune(
        FinetuneConfig(**settings(tasks, tiny, tmp_path / "alone", **given | {"seeds": [2], "benchmark": False}))
    )
    assert alone["test"]["accuracy"]["value"] == result["test"]["accuracy"]["seeds"][1]
    np.testing.assert_array_equal(
        *(
            read_checkpoint(folder / "finetuned.safetensors")[0]["head.weight_in"].numpy()
            for folder in (tmp_path / "alone", tmp_path / "seed=2")
        )
    )


def test_random_weights_need_no_download(tmp_path, tasks) -> None:
    """With untrained_seed and an official name the report contains a probe of the initial random weights."""
    given = {"task": "protein_value", "model": "esm2_t6_8M_UR50D", "untrained_seed": 5, "max_steps": 2}
    given |= {"global_batch_size": 2, "benchmark": True, "val_check_interval": 2, "limit": 8}
    finetune(FinetuneConfig(**settings(tasks, tmp_path, tmp_path / "run") | given))
    rows = Report.read(tmp_path / "run").rows
    assert [row.kind for row in rows[:2]] == ["finetuned", "probe"]
    assert rows[0].name.startswith("esm2_t6_8M_UR50D_untrained, fine-tuned")
    assert rows[1].name.startswith("esm2_t6_8M_UR50D_untrained")
    assert all(row.kind != "untrained" for row in rows)


def test_class_weights_of_a_value_task_are_refused(tmp_path, tasks, tiny) -> None:
    with refused("finetune.class-weights", task="protein_value"):
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, task="protein_value", class_weights=True)))


def test_a_head_with_another_number_of_classes_is_refused(tmp_path, tasks, tiny) -> None:
    finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "three", task="residue_class", head="fnn", max_steps=1)))
    given = {"task": "protein_class", "head": "fnn", "head_from": tmp_path / "three"}
    with refused("head.outputs", found=3, expected=2):
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "two", **given)))
    given = {"task": "residue_class", "head": "cnn", "head_from": tmp_path / "three"}
    with refused("checkpoint.tensor", name="bias_in"):
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "other", **given, hidden=16)))
    given["head"] = "fnn"
    finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "same", **given, max_steps=1, lr=1e-9, head_lr=1e-9)))
    heads = [load_finetuned(tmp_path / name).labels.head.weight_in for name in ("three", "same")]
    torch.testing.assert_close(*heads, rtol=0, atol=1e-6)


def test_a_missing_flip_task_is_downloaded(tmp_path, tasks, tiny, monkeypatch) -> None:
    downloads = []

    def copy_task(task: str, data_dir: Path, split: str | None) -> None:
        downloads.append((task, split))
        (data_dir / task).mkdir(parents=True)
        shutil.copy(tasks / "protein_value" / "own.fasta", data_dir / task / "two_vs_rest.fasta")

    monkeypatch.setattr(stage, "download_flip", copy_task)
    given = {"data_dir": tmp_path / "flip", "split": "two_vs_rest", "max_steps": 1}
    run = settings(tasks, tiny, tmp_path / "run", task="gb1") | given
    with pytest.raises(InputError, match="gb1"):
        finetune(FinetuneConfig(**run | {"download": False}))
    assert not downloads
    assert finetune(FinetuneConfig(**run))["finished"]
    finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path / "own", task="protein_value", max_steps=1)))
    assert downloads == [("gb1", "two_vs_rest")], "only FLIP tasks are downloaded"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"task": "protein_class", "head": "cnn"}, "head.level"),
        ({"task": "residue_class", "head": "light_attention"}, "head.level"),
        ({"task": "protein_class", "global_batch_size": 9, "micro_batch_size": 4}, "layout.equation"),
        ({"task": "protein_class", "export_hf": True}, "head.no-hf-class"),
    ],
)
def test_settings_that_do_not_match_are_refused(given, code, tmp_path, tasks, tiny) -> None:
    with refused(code):
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "protein_class", "head_from": "nowhere.safetensors"}, "nowhere.safetensors: the checkpoint"),
        ({"task": "protein_class", "mode": "lora", "lora_targets": ["fc3"]}, "unknown target 'fc3'"),
    ],
)
def test_errors_have_one_line(given, message, tmp_path, tasks, tiny) -> None:
    with pytest.raises(InputError, match=message) as error:
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "code", "values"),
    [
        ({"seeds": [1, 1]}, "option.seeds", {"found": [1, 1]}),
        ({"max_steps": 0}, "option.range", {"name": "max_steps", "at_least": 1}),
        ({"epochs": -1.0}, "option.range", {"name": "epochs", "above": 0}),
        ({"warmup_steps": -1}, "option.range", {"name": "warmup_steps", "found": -1, "at_least": 0}),
        ({"head_lr": 0.0}, "option.range", {"name": "head_lr", "above": 0}),
        ({"dropout": 1.0}, "option.range", {"name": "dropout", "at_least": 0, "below": 1}),
    ],
)
def test_invalid_settings_are_refused(given, code, values) -> None:
    with refused(code, **values):
        FinetuneConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "Lora"}, "mode cannot be 'Lora'; did you mean 'lora'"),
        ({"schedule": "lin"}, "schedule cannot be 'lin'; did you mean 'linear'"),
        ({"preset": "schmirle"}, "preset cannot be 'schmirle'; did you mean 'schmirler'"),
    ],
)
def test_a_mistyped_choice_is_refused_with_the_closest_one(given, message) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**given)


def test_a_loss_that_is_not_finite_is_reported_with_its_sequences(tmp_path, tasks, tiny) -> None:
    given = {"task": "protein_value", "lr": 1e30, "gradient_clip_val": 0.0, "warmup_steps": 0}
    with refused("run.diverged", update=2) as caught:
        finetune(FinetuneConfig(**settings(tasks, tiny, tmp_path, **given)))
    names = caught.value.values["sequences"]
    assert len(names) > 1
    assert all(name.startswith("p") for name in names)


@pytest.mark.parametrize("preset", ["esm2kit", "schmirler"])
@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
def test_help_texts_contain_the_defaults_of_the_presets(preset: str, mode: str) -> None:
    texts = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", inspect.getdoc(FinetuneConfig), re.M | re.S))
    config, derived = FinetuneConfig(preset=preset, mode=mode), ("max_steps", "head_lr", "val_check_interval")
    for task in ("gb1", "secondary_structure"):
        filled = resolve_defaults(config, TASKS[task], 1000)
        names = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None]
        for name in names:
            value = getattr(filled, name)
            if value is None or name in derived or (name, preset) == ("warmup_steps", "esm2kit"):
                continue
            own, _, published = " ".join(texts[name].split()).partition("Default: ")[2].partition("(schmirler: ")
            default = own if preset == "esm2kit" else published
            numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", default)]
            if isinstance(value, str | bool):
                assert str(value).lower() in default, name
            else:
                assert value in numbers or (" to " in default and numbers[0] <= value <= numbers[1]), name


def test_published_recipe() -> None:
    """Schmirler et al. 2024, table S12: 2,691 train proteins of gb1 in batches of 8, five validations an epoch."""
    config = resolve_defaults(FinetuneConfig(preset="schmirler"), TASKS["gb1"], 2691)
    assert (config.head, config.lr, config.layout.global_batch_size, config.epochs) == ("hf", 2e-5, 8, 20)
    assert (config.max_steps, config.val_check_interval, config.schedule) == (6728, 67, "constant")
    lora = resolve_defaults(FinetuneConfig(preset="schmirler", mode="lora"), TASKS["gb1"], 2691)
    assert (lora.lr, lora.lora_rank, lora.epochs, lora.lora_biases) == (3e-4, 4, 50, True)
    residue = resolve_defaults(FinetuneConfig(preset="schmirler", lr=1e-4), TASKS["secondary_structure"], 9712)
    assert (residue.layout.global_batch_size, residue.epochs, residue.lr) == (1, 5, 1e-4)


def test_bf16_and_checkpointing_stay_close_to_float32(tmp_path, tasks, tiny) -> None:
    curves = {}
    for name, given in (
        ("plain", {}),
        ("again", {"activation_checkpointing": True}),
        ("bf16", {"precision": "bf16-mixed"}),
    ):
        run = settings(tasks, tiny, tmp_path / name, task="protein_value", **given, lr=1e-4)
        finetune(FinetuneConfig(**run))
        curves[name] = column(tmp_path / name, "train_loss")
    assert curves["again"] == curves["plain"]
    np.testing.assert_allclose(curves["bf16"], curves["plain"], rtol=0.01)
    assert curves["bf16"] != curves["plain"]


def test_token_budget_and_windows(tasks, tmp_path) -> None:
    data = load_task("residue_class", None, tasks)
    proteins = LabelledProteins(data, build_labels(data, True, False), tmp_path, 20)
    windows = proteins.windows(data.rows("test"))
    for batch in batch_windows(windows, 64):
        assert len(batch) == 1 or sum(window.stop - window.start + 2 for window in batch) <= 64
    for row in data.rows("test"):
        covered = {place for w in windows if w.protein == row for place in range(w.start, w.stop)}
        assert covered == set(range(data.num_residues[row]))
        assert all(w.stop - w.start <= 20 for w in windows)
    sample = proteins.sample(0, 1, int(np.argmax(data.num_residues)))
    assert sample.stop - sample.start == 20


def test_ranks_that_tokenise_concurrently_read_the_same_file(tmp_path, monkeypatch) -> None:
    """One rank writes the file while another rank writes and reads it; a file of another task is not used."""
    sequences, save, unlink = ["MKV", "AC"], np.save, Path.unlink
    others, deleted = [], []
    assert load_tokens(["GG"], tmp_path, "0" * 64).tolist() == encode("GG").tolist()

    def save_late(file, array) -> None:
        if not others:
            others.append(None)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                others.append(load_tokens(sequences, tmp_path, "1" * 64))
        save(file, array)

    monkeypatch.setattr(np, "save", save_late)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (deleted.append(path), unlink(path, missing_ok)))
    mine = load_tokens(sequences, tmp_path, "1" * 64)
    assert mine.tolist() == others[1].tolist() == encode("MKVAC").tolist()
    assert {path.suffix for path in deleted} == {".part"}, "finished files are not deleted, as ranks may read them"
    assert load_tokens(["GG"], tmp_path, "0" * 64).tolist() == encode("GG").tolist()


def test_class_weights_give_all_classes_the_same_weight(tasks) -> None:
    data = load_task("residue_class", None, tasks)
    labels = build_labels(data, False, True)
    train = torch.from_numpy(data.target_rows("train"))
    sums = [labels.weights[train][labels.targets[train] == place].sum().item() for place in range(3)]
    assert sums == pytest.approx([len(train) / 3] * 3, rel=1e-4)
    assert build_labels(data, False, False).weights.unique().tolist() == [1.0]


def test_loss_of_binary_labels_is_the_mean_over_labels() -> None:
    task = TASKS["bind"]
    outputs, targets = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets) * 5
    assert loss_sum(outputs, targets, torch.ones(5, 3), task).item() == pytest.approx(expected.item())


@pytest.mark.shared
def test_the_readmes_example(shared_data, tiny, tmp_path) -> None:
    """secondary_structure on two devices with accumulation, launched as from a notebook."""
    given = {"task": "secondary_structure", "limit": 16, "max_steps": 3, "val_check_interval": 3, "micro_batch_size": 4}
    common = settings(shared_data / "flip", tiny, tmp_path / "two") | given
    lines: list[str] = []
    result = launch.train("finetune", FinetuneConfig(**common, accumulate_grad_batches=2, devices=2), lines.append)
    assert result["finished"]
    message = "global_batch_size 16 = micro_batch_size 4 x accumulate_grad_batches 2 x data_parallel_size 2"
    assert any(message in line for line in lines)
    assert any("update 3/3  loss" in line for line in lines)
    finetune(FinetuneConfig(**common | {"out_dir": tmp_path / "one"}, accumulate_grad_batches=4))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_training_time_includes_all_processes_of_a_resumed_run() -> None:
    assert _sum_seconds([{"seconds": text} for text in ("1.5", "4", "0.5", "2", "3")]) == 7.0
    assert _sum_seconds([]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_reads_one_tensor_at_a_time(kind: str, tasks, tiny, tmp_path, one_device, monkeypatch) -> None:
    """With FSDP2 no process loads the whole encoder, and the curve is that of one device; here with one process."""
    read, sizes = Weights.read, []

    def count(weights: Weights, names) -> dict[str, torch.Tensor]:
        found = read(weights, names)
        sizes.append(sum(tensor.numel() for tensor in found.values()))
        return found

    def fail(*arguments) -> None:
        raise AssertionError("the whole encoder is loaded")

    run = next(
        run for run in layout_runs(tasks, tiny, tmp_path, strategy="fsdp2") if run["out_dir"].name == f"{kind}-1"
    )
    monkeypatch.setattr(Weights, "read", count)
    monkeypatch.setattr(stage, "load_model", fail)
    finetune(FinetuneConfig(**run))
    assert_same_run(tmp_path / f"{kind}-1", one_device / f"{kind}-1")
    config = find_model(tiny).config
    layer = 12 * config.embed_dim**2 + 13 * config.embed_dim + config.head_dim // 2
    assert 0 < max(sizes) <= layer, "a layer for the moments of the inputs, otherwise a tensor"

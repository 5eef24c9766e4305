"""The downstream probe of pretraining: its score, all layouts, bounded memory, and no effect on the training."""

import csv
import gc
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import refused
from support.layouts import LAYOUTS, arguments, train_in_process, train_with_torchrun

from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.scores import compute_headline
from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.load import load_model
from esm2kit.pretraining import downstream
from esm2kit.pretraining.downstream import DownstreamProbe
from esm2kit.pretraining.pretrain import MaskedLM, PretrainConfig, pretrain
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.tasks.data import load_task
from esm2kit.tasks.task_data import TaskData

SHAPE = ESM2Config(2, 32, 4)
TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 8, "lr": 1e-3, "warmup_steps": 4, "log_every_n_steps": 1, "max_steps": 8}
# one task per kind: residue class with a mask, protein class, protein value
TASKS = {"secondary_structure_pdb": "accuracy", "domain_of_life": "accuracy", "helix_content_pdb": "spearman"}


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir: Path, name: str) -> dict[int, str]:
    return {int(row["step"]): row[name] for row in rows(out_dir) if row.get(name)}


def config(dataset: Path, out_dir: Path, tasks: Path, **given: object) -> PretrainConfig:
    settings = RUN | {"val_check_interval": 2, "downstream_task": "domain_of_life", "downstream_data": tasks}
    return PretrainConfig(data=dataset, out_dir=out_dir, **settings | {"downstream_limit": 40} | given)


@pytest.fixture(scope="module")
def tasks(sample: Path) -> Path:
    return sample / "tasks"


def score_with_benchmark_probe(esm2: ESM2, data: TaskData) -> float:
    """Embed full proteins one by one and score the probe of the benchmark."""
    parts = []
    for sequence in data.sequences:
        tokens_T = torch.tensor([BOS_IDX, *encode(sequence).tolist(), EOS_IDX])
        with torch.no_grad():
            hidden_TD = esm2.encode(tokens_T, Packed([len(tokens_T)]))[1:-1]
        parts.append(hidden_TD if data.task.level == "residue" else hidden_TD.mean(0, keepdim=True))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    probe = "ridge" if data.task.target == "value" else "logistic"
    fitted = fit_probe(Features(torch.cat(parts).numpy(), offsets), ProbeTargets.from_task(data), ProbeConfig(probe))
    return compute_headline(data.task, data.targets[data.target_rows("validation")], fitted.validation_SM[0])


@pytest.mark.parametrize("task", TASKS)
def test_the_score_equals_the_benchmarks_probe_on_validation(task: str, dataset, tasks, tmp_path) -> None:
    run = config(dataset, tmp_path, tasks, downstream_task=task, max_steps=2, downstream_limit=60)
    result = pretrain(run)
    esm2 = load_model(result["last"])[0]
    expected = score_with_benchmark_probe(esm2, load_task(task, None, tasks).limit_proteins(60))
    found = float(column(tmp_path, f"downstream_{TASKS[task]}")[2])
    assert found == pytest.approx(expected, abs=0.02)
    assert 0.05 < found < 1


@pytest.fixture(scope="module")
def probed_run(tmp_path_factory, dataset, tasks) -> Path:
    out_dir = tmp_path_factory.mktemp("probed")
    pretrain(config(dataset, out_dir, tasks, downstream_every=2))
    return out_dir


def test_the_probe_does_not_change_the_training(dataset, tasks, probed_run, tmp_path) -> None:
    pretrain(config(dataset, tmp_path, tasks, downstream_task=None))
    assert len(column(probed_run, "train_loss")) == 8
    for name in ("train_loss", "grad_norm", "lr", "val_loss"):
        assert column(probed_run, name) == column(tmp_path, name)
    found, expected = (read_checkpoint(run / "checkpoints" / "last.safetensors")[0] for run in (probed_run, tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_probe_runs_at_every_kth_validation(probed_run) -> None:
    assert list(column(probed_run, "val_loss")) == [2, 4, 6, 8]
    assert list(column(probed_run, "downstream_accuracy")) == [4, 8]
    assert all(0.05 < float(value) < 64 for value in column(probed_run, "downstream_peak_gib").values())


def test_a_resumed_run_equals_the_uninterrupted_run(dataset, tasks, probed_run, tmp_path, monkeypatch) -> None:
    step = MaskedLM.training_step

    def stop_at(update: int) -> None:
        def training_step(self: MaskedLM, *given: object) -> None:
            if self.step == update:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, *given)

        monkeypatch.setattr(MaskedLM, "training_step", training_step)

    stop_at(3)
    assert pretrain(config(dataset, tmp_path, tasks, downstream_every=2))["step"] in (4, 5)
    stop_at(5)
    # a resumed run may omit the probe, and the next one may use it again
    assert pretrain(config(dataset, tmp_path, tasks, downstream_task=None))["step"] in (6, 7)
    monkeypatch.undo()
    assert pretrain(config(dataset, tmp_path, tasks, downstream_every=2))["step"] == 8
    for name in ("train_loss", "val_loss", "downstream_accuracy"):
        assert column(tmp_path, name) == column(probed_run, name), name
    held, expected = (read_checkpoint(run / "checkpoints" / "last.safetensors")[0] for run in (tmp_path, probed_run))
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


def test_all_layouts_give_the_same_score(dataset, tasks, tmp_path) -> None:
    """Ranks share the proteins, and sharded models embed them without being gathered."""
    given = {"downstream_task": "helix_content_pdb", "downstream_data": tasks, "downstream_limit": 40, "max_steps": 2}
    given |= {"val_check_interval": 2}
    runs = {name: LAYOUTS[name][1] for name in ("ddp2", "fsdp2", "tp2")}
    train_with_torchrun(2, [arguments(tmp_path / name, dataset, **given, **layout) for name, layout in runs.items()])
    train_in_process([arguments(tmp_path / "one", dataset, **given)])
    expected = float(column(tmp_path / "one", "downstream_spearman")[2])
    assert abs(expected) > 0.05
    for name in runs:
        assert float(column(tmp_path / name, "downstream_spearman")[2]) == pytest.approx(expected, abs=0.02), name


def probe_and_model(data: TaskData, cache: Path) -> tuple[DownstreamProbe, ESM2]:
    return DownstreamProbe(data, cache, SHAPE.embed_dim, 1022, 4096), ESM2.initialised(SHAPE, 0).eval()


def evaluate(probe: DownstreamProbe, esm2: ESM2) -> dict[str, float]:
    with torch.no_grad():
        encode_rows = lambda tokens_N, num_tokens: esm2.encode(tokens_N, Packed(num_tokens))  # noqa: E731
        return probe.evaluate(encode_rows, torch.device("cpu"), None, 0, 1, True)


def test_memory_is_bounded_and_freed(tasks, tmp_path, monkeypatch) -> None:
    data = load_task("secondary_structure_pdb", None, tasks)
    scored = len(data.target_rows("train"))
    monkeypatch.setattr(downstream, "MAX_FEATURE_BYTES", 4 * SHAPE.embed_dim * 1000)
    probe, esm2 = probe_and_model(data, tmp_path)
    kept = np.array([len(rows) for rows in probe.targets.proteins.values()])
    assert scored > 4000
    assert (kept <= 1000).all()
    assert (kept > 500).all(), "rows are dropped evenly, and no more than needed"
    random = torch.get_rng_state()
    first = evaluate(probe, esm2)
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    again = [evaluate(probe, esm2) for _ in range(4)]
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= tensors
    assert all(later["downstream_accuracy"] == first["downstream_accuracy"] for later in again)
    assert again[-1]["downstream_peak_gib"] < first["downstream_peak_gib"] + 0.1
    assert torch.equal(torch.get_rng_state(), random)


def test_long_proteins_are_embedded_in_windows(tasks, tmp_path) -> None:
    """All scored residues are embedded, also with short windows."""
    data = load_task("helix_content_pdb", None, tasks).limit_proteins(30)
    esm2 = ESM2.initialised(SHAPE, 0).eval()
    probe = DownstreamProbe(data, tmp_path, SHAPE.embed_dim, 50, 256)
    assert max(map(len, data.sequences)) > 100
    assert np.isfinite(evaluate(probe, esm2)["downstream_spearman"])


def test_a_flip_task_is_probed(dataset, tasks, tmp_path) -> None:
    (tmp_path / "flip" / "gb1").mkdir(parents=True)
    shutil.copy(tasks / "helix_content_pdb" / "sampled.fasta", tmp_path / "flip" / "gb1" / "two_vs_rest.fasta")
    given = {"downstream_task": "gb1", "downstream_data": tmp_path / "flip", "downstream_split": "two_vs_rest"}
    pretrain(config(dataset, tmp_path / "run", tasks, max_steps=2, **given))
    assert list(column(tmp_path / "run", "downstream_spearman")) == [2]


def test_target_type_and_level_of_an_own_task(dataset, tasks, tmp_path) -> None:
    """Few different integers are read as classes unless the settings say that they are values."""
    sequences = load_task("helix_content_pdb", None, tasks).sequences[:24]
    lines = ["sequence,tm,set"]
    for number, sequence in enumerate(sequences):
        lines.append(f"{sequence},{number % 7},{('train', 'train', 'val', 'test')[number // 7 % 4]}")
    (tmp_path / "melting.csv").write_text("\n".join(lines), encoding="utf-8")
    given = {"downstream_task": "melting", "downstream_data": tmp_path, "downstream_target": "tm", "max_steps": 2}
    for target_type, metric in (("value", "spearman"), ("class", "accuracy"), (None, "accuracy")):
        run = tmp_path / str(target_type)
        pretrain(config(dataset, run, tasks, downstream_target_type=target_type, **given))
        assert list(column(run, f"downstream_{metric}")) == [2]
    with refused("task.label-count"):
        pretrain(config(dataset, tmp_path / "residue", tasks, downstream_level="residue", **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"downstream_task": "domain_of_live"}, "unknown task 'domain_of_live'"),
        ({"downstream_task": "gb1"}, "esm2kit download flip gb1"),
        ({"downstream_every": 0}, "downstream_every must be at least 1, found 0"),
    ],
)
def test_invalid_settings_are_reported_before_training(given, message, dataset, tasks, tmp_path) -> None:
    with pytest.raises(InputError, match=message) as error:
        pretrain(config(dataset, tmp_path / "run", tasks, **given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.csv").exists()

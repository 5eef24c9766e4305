"""A task probed while pretraining: the figure by another way, on every layout, in bounded memory, and training as if it
had not been."""

import csv
import gc
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support.layouts import LAYOUTS, arguments, train_here, train_together

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
from esm2kit.tasks.data import TaskData, load_task

SHAPE = ESM2Config(2, 32, 4)
TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 8, "lr": 1e-3, "warmup_steps": 4, "log_every_n_steps": 1, "max_steps": 8}
# one a kind: residue class with a mask, protein class, protein value
TASKS = {"secondary_structure_pdb": "accuracy", "domain_of_life": "accuracy", "helix_content_pdb": "spearman"}


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir: Path, name: str) -> dict[int, str]:
    return {int(row["step"]): row[name] for row in rows(out_dir) if row.get(name)}


def config(dataset: Path, out_dir: Path, tasks: Path, **given: object) -> PretrainConfig:
    settings = RUN | {"val_check_interval": 2, "downstream_task": "domain_of_life", "downstream_data": tasks}
    return PretrainConfig(data=dataset, out_dir=out_dir, **settings | {"downstream_limit": 40} | given)


@pytest.fixture(scope="module")
def tasks(sample: Path) -> Path:
    return sample / "tasks"


def by_another_way(esm2: ESM2, data: TaskData) -> float:
    """One protein at a time, whole, and the benchmark's own probe."""
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
def test_the_figure_is_the_benchmarks_probe_on_validation(task: str, dataset, tasks, tmp_path) -> None:
    run = config(dataset, tmp_path, tasks, downstream_task=task, max_steps=2, downstream_limit=60)
    result = pretrain(run)
    esm2 = load_model(result["last"])[0]
    expected = by_another_way(esm2, load_task(task, None, tasks).limit_proteins(60))
    found = float(column(tmp_path, f"downstream_{TASKS[task]}")[2])
    assert found == pytest.approx(expected, abs=0.02)
    assert 0.05 < found < 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory, dataset, tasks) -> Path:
    out_dir = tmp_path_factory.mktemp("watched")
    pretrain(config(dataset, out_dir, tasks, downstream_every=2))
    return out_dir


def test_training_is_what_it_would_be_without(dataset, tasks, watched, tmp_path) -> None:
    pretrain(config(dataset, tmp_path, tasks, downstream_task=None))
    assert len(column(watched, "train_loss")) == 8
    for name in ("train_loss", "grad_norm", "lr", "val_loss"):
        assert column(watched, name) == column(tmp_path, name)
    with_probe, without = (read_checkpoint(run / "checkpoints" / "last.safetensors")[0] for run in (watched, tmp_path))
    assert with_probe.keys() == without.keys()
    assert all(torch.equal(with_probe[name], tensor) for name, tensor in without.items())


def test_it_is_probed_at_every_kth_validation(watched) -> None:
    assert list(column(watched, "val_loss")) == [2, 4, 6, 8]
    assert list(column(watched, "downstream_accuracy")) == [4, 8]
    assert all(0.05 < float(value) < 64 for value in column(watched, "downstream_peak_gib").values())


def test_stopped_and_gone_on_is_the_uninterrupted_run(dataset, tasks, watched, tmp_path, monkeypatch) -> None:
    step = MaskedLM.training_step

    def told_at(update: int) -> None:
        def told(self: MaskedLM, *given: object) -> None:
            if self.step == update:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, *given)

        monkeypatch.setattr(MaskedLM, "training_step", told)

    told_at(3)
    assert pretrain(config(dataset, tmp_path, tasks, downstream_every=2))["step"] in (4, 5)
    told_at(5)
    # a resumption may leave the probe out, and the next one take it up again
    assert pretrain(config(dataset, tmp_path, tasks, downstream_task=None))["step"] in (6, 7)
    monkeypatch.undo()
    assert pretrain(config(dataset, tmp_path, tasks, downstream_every=2))["step"] == 8
    for name in ("train_loss", "val_loss", "downstream_accuracy"):
        assert column(tmp_path, name) == column(watched, name), name
    held, expected = (read_checkpoint(run / "checkpoints" / "last.safetensors")[0] for run in (tmp_path, watched))
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


def test_every_layout_tells_the_same(dataset, tasks, tmp_path) -> None:
    """Ranks share the proteins; sharded models embed without being gathered."""
    given = {"downstream_task": "helix_content_pdb", "downstream_data": tasks, "downstream_limit": 40, "max_steps": 2}
    given |= {"val_check_interval": 2}
    runs = {name: LAYOUTS[name][1] for name in ("ddp2", "fsdp2", "tp2")}
    train_together(2, [arguments(tmp_path / name, dataset, **given, **layout) for name, layout in runs.items()])
    train_here([arguments(tmp_path / "one", dataset, **given)])
    expected = float(column(tmp_path / "one", "downstream_spearman")[2])
    assert abs(expected) > 0.05
    for name in runs:
        assert float(column(tmp_path / name, "downstream_spearman")[2]) == pytest.approx(expected, abs=0.02), name


def probe_and_model(data: TaskData, cache: Path) -> tuple[DownstreamProbe, ESM2]:
    return DownstreamProbe(data, cache, SHAPE.embed_dim, 1022, 4096), ESM2.initialised(SHAPE, 0).eval()


def figures(probe: DownstreamProbe, esm2: ESM2) -> dict[str, float]:
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
    assert (kept > 500).all(), "evenly thinned, no more than need be"
    random = torch.get_rng_state()
    first = figures(probe, esm2)
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    again = [figures(probe, esm2) for _ in range(4)]
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= tensors
    assert all(later["downstream_accuracy"] == first["downstream_accuracy"] for later in again)
    assert again[-1]["downstream_peak_gib"] < first["downstream_peak_gib"] + 0.1
    assert torch.equal(torch.get_rng_state(), random)


def test_long_proteins_are_read_by_windows(tasks, tmp_path) -> None:
    """Every residue that counts is read, however short the windows are."""
    data = load_task("helix_content_pdb", None, tasks).limit_proteins(30)
    esm2 = ESM2.initialised(SHAPE, 0).eval()
    probe = DownstreamProbe(data, tmp_path, SHAPE.embed_dim, 50, 256)
    assert max(map(len, data.sequences)) > 100
    assert np.isfinite(figures(probe, esm2)["downstream_spearman"])


def test_a_flip_task(dataset, tasks, tmp_path) -> None:
    (tmp_path / "flip" / "gb1").mkdir(parents=True)
    shutil.copy(tasks / "helix_content_pdb" / "sampled.fasta", tmp_path / "flip" / "gb1" / "two_vs_rest.fasta")
    given = {"downstream_task": "gb1", "downstream_data": tmp_path / "flip", "downstream_split": "two_vs_rest"}
    pretrain(config(dataset, tmp_path / "run", tasks, max_steps=2, **given))
    assert list(column(tmp_path / "run", "downstream_spearman")) == [2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"downstream_task": "domain_of_live"}, "unknown task 'domain_of_live'"),
        ({"downstream_task": "gb1"}, "esm2kit download flip gb1"),
        ({"downstream_every": 0}, "downstream_every must be at least 1, found 0"),
    ],
)
def test_what_does_not_fit_is_told_before_training(given, told, dataset, tasks, tmp_path) -> None:
    with pytest.raises(InputError, match=told) as error:
        pretrain(config(dataset, tmp_path / "run", tasks, **given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.csv").exists()

"""Pretraining on one device: the recipe, the loss, learning, second-stage pretraining, and faults."""

import csv
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import read_metadata
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.load import load_model
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.pretraining.data import BERT, GlobalBatches, Masking, ValidationBatches
from esm2kit.pretraining.pretrain import MaskedLM, PretrainConfig, lr_at, pretrain
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.sequences.alphabet import MASK_IDX, STANDARD_RESIDUES
from esm2kit.sequences.batching import split_micro_batches
from esm2kit.sequences.clusters import ClusterIndex
from esm2kit.sequences.store import SequenceStore
from esm2kit.training.layout import BatchLayout

TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}


def test_published_recipe_is_the_default(tmp_path: Path) -> None:
    config = PretrainConfig(data=tmp_path, out_dir=tmp_path)
    assert config.model_config == ESM2Config(6, 320, 20)
    assert lr_at(0, config) == pytest.approx(4e-4 / 2000)
    assert lr_at(1999, config) == pytest.approx(4e-4)
    assert lr_at(2000 + 224_000 - 1, config) == pytest.approx(4e-4 * 0.55)
    assert lr_at(450_000 - 1, config) == pytest.approx(4e-5)
    assert lr_at(499_999, config) == pytest.approx(4e-5)
    assert PretrainConfig(data=tmp_path, out_dir=tmp_path, model="esm2_t48_15B_UR50D").peak_lr == 1.6e-4


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"model": "esm2_t6_8M"}, "model.unknown-size"),
        ({"model": "custom", "num_layers": 2}, "model.custom-shape"),
        ({"num_layers": 2}, "model.not-custom"),
        ({"micro_batch_size": 3, "global_batch_size": 8}, "layout.equation"),
    ],
)
def test_contradictory_settings_raise_an_error(settings: dict, code: str, dataset: Path, tmp_path: Path) -> None:
    with refused(code):
        pretrain(PretrainConfig(data=dataset, out_dir=tmp_path / "run", max_steps=1, **settings))


@pytest.mark.parametrize(
    ("name", "found", "bounds"),
    [
        ("max_steps", 0, {"at_least": 1}),
        ("log_every_n_steps", 0, {"at_least": 1}),
        ("save_top_k", -1, {"at_least": 0}),
        ("max_tokens", 2, {"at_least": 3}),
        ("eps", -1.0, {"at_least": 0}),
        ("mask_prob", 0.0, {"above": 0, "at_most": 1}),
        ("mask_prob", 15.0, {"above": 0, "at_most": 1}),
        ("lr", -1e-4, {"above": 0}),
        ("beta2", 1.0, {"at_least": 0, "below": 1}),
    ],
)
def test_settings_out_of_range_raise_an_error(name: str, found: float, bounds: dict, tmp_path: Path) -> None:
    with refused("option.range", name=name, found=found, **bounds):
        PretrainConfig(data=tmp_path, out_dir=tmp_path, **{name: found})


def test_a_folder_without_a_dataset_refers_to_preprocess(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="esm2kit preprocess"):
        pretrain(PretrainConfig(data=tmp_path, out_dir=tmp_path / "run", max_steps=1, **TINY))


def test_an_epoch_samples_each_cluster_once(dataset: Path) -> None:
    index = ClusterIndex.open(dataset)
    clusters = index.num_clusters
    batches = GlobalBatches(TrainingSet.open(dataset), BatchLayout(clusters, 1, 1, 1), 0, 3, 2, 1022, BERT)
    of_row = {int(row): cluster for cluster in range(clusters) for row in index.members(cluster)}
    orders = [[of_row[sample.row] for sample in batches.samples(epoch)] for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(clusters))
    assert orders[0] != orders[1]


def test_micro_batches_have_equal_sizes_and_nearly_equal_token_counts() -> None:
    tokens = np.random.default_rng(0).lognormal(5.5, 0.7, 128).astype(int).tolist()
    micro_batches = split_micro_batches(tokens, 8)
    assert sorted(position for part in micro_batches for position in part) == list(range(128))
    assert {len(part) for part in micro_batches} == {16}
    sums = [sum(tokens[position] for position in part) for part in micro_batches]
    assert max(sums) < 1.1 * min(sums)


def test_validation_does_not_depend_on_ranks_and_token_budget(dataset: Path) -> None:
    valid = TrainingSet.open(dataset).valid

    def scored_tokens(ranks: int, budget: int) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for rank in range(ranks):
            for batch in ValidationBatches(valid, rank, ranks, 0, 1022, budget, Masking(0.15, 1, 0)):
                starts = np.concatenate(([0], np.cumsum(batch.num_tokens)))
                for place, row in enumerate(batch.store_rows):
                    here = (batch.rows_M >= starts[place]) & (batch.rows_M < starts[place + 1])
                    if here.any():
                        pairs = zip(
                            (batch.rows_M[here] - starts[place]).tolist(), batch.targets_M[here].tolist(), strict=True
                        )
                        found[row] = list(pairs)
                assert (batch.tokens_N[batch.rows_M] == MASK_IDX).all(), "hidden validation masks all scored residues"
        return found

    expected = scored_tokens(1, 4096)
    assert len(expected) == 70
    assert scored_tokens(3, 1024) == expected


def test_more_ranks_validate_in_fewer_batches(dataset: Path) -> None:
    """With one budget for all ranks together, most of many ranks would have no sequence."""
    valid = TrainingSet.open(dataset).valid
    single, *four = (
        ValidationBatches(valid, rank, ranks, 0, 1022, 1024, Masking(1.0))
        for rank, ranks in ((0, 1), (0, 4), (1, 4), (2, 4), (3, 4))
    )
    assert len(four[0]) < len(single) / 3
    assert all(len(batch.targets_M) for part in four for batch in map(part.__getitem__, range(len(part) - 1)))


def test_unigram_perplexity_equals_a_direct_count(dataset: Path) -> None:
    index, train = ClusterIndex.open(dataset), SequenceStore.open(dataset / "train.arrow")
    letters = "".join(bytes(train.residues(int(row))).decode() for row in index.representative_rows)
    valid = SequenceStore.open(dataset / "valid.arrow")
    held_out = "".join(bytes(valid.residues(row)).decode() for row in range(len(valid)))
    counts = {letter: letters.count(letter) + 1 for letter in "LAGVSERTIDPKQNFYMHWCXBUZO"}
    bits = [math.log(counts[letter] / sum(counts.values())) for letter in held_out]
    assert TrainingSet.open(dataset).unigram.perplexity == pytest.approx(math.exp(-sum(bits) / len(bits)), rel=1e-9)


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_three_residue_proteins(path: Path, count: int, seed: int) -> Path:
    """Write a FASTA of proteins with three random residue types each; overall the 20 types are equally frequent."""
    generator = random.Random(seed)
    proteins = ("".join(generator.choices(generator.sample(STANDARD_RESIDUES, 3), k=40)) for _ in range(count))
    path.write_text("".join(f">{number}\n{protein}\n" for number, protein in enumerate(proteins)), encoding="utf-8")
    return path


def test_the_model_learns_more_than_frequencies(tmp_path: Path) -> None:
    """A model that reads the context chooses among 3 residues, and one that does not among 20.

    Validation masks all scored residues, so a model that copies residues or knows only frequencies cannot beat the
    unigram baseline.
    """
    train, valid = (write_three_residue_proteins(tmp_path / f"{count}.fasta", count, count) for count in (400, 50))
    data = tmp_path / "data"
    preprocess(PreprocessConfig(train_fasta=train, valid_fasta=valid, out_dir=data, leakage_identity=0.0))
    shape = TINY | {"num_layers": 1, "embed_dim": 64}
    recipe = {"lr": 1e-2, "warmup_steps": 10, "global_batch_size": 16, "micro_batch_size": 16}
    config = PretrainConfig(
        data=data, out_dir=tmp_path, max_steps=80, val_check_interval=80, log_every_n_steps=5, **recipe, **shape
    )
    result = pretrain(config)
    assert result["unigram_perplexity"] > 19
    assert result["val_perplexity"] < 0.5 * result["unigram_perplexity"]
    assert float(rows(tmp_path)[0]["train_loss"]) > math.log(20)
    written = json.loads((tmp_path / "pretrain.json").read_text())
    assert written["provenance"]["config"]["seed"] == 0
    assert written["provenance"]["versions"]["torch"] == torch.__version__


def test_the_first_loss_is_the_mean_over_masked_tokens(dataset: Path, tmp_path: Path) -> None:
    """The logged loss equals that of a direct forward pass over the global batch."""
    settings = {"global_batch_size": 12, "micro_batch_size": 4, "max_steps": 1, "log_every_n_steps": 1, **TINY}
    config = PretrainConfig(data=dataset, out_dir=tmp_path, **settings)
    pretrain(config)
    batches = GlobalBatches(TrainingSet.open(dataset), config.layout, 0, 0, 1, 1022, BERT)[0]
    esm2 = ESM2.initialised(config.model_config, 0)
    losses = []
    for batch in batches:
        logits_NV = esm2.lm_head(esm2.encode(batch.tokens_N, Packed(batch.num_tokens)))
        losses.append(F.cross_entropy(logits_NV[batch.rows_M], batch.targets_M, reduction="none"))
    expected = torch.cat(losses).mean().item()
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(expected, rel=1e-6)


def test_second_stage_starts_from_the_weights_of_the_first(dataset: Path, tmp_path: Path) -> None:
    common = {"data": dataset, "global_batch_size": 8, "log_every_n_steps": 1, "lr": 1e-4, "warmup_steps": 1}
    first = pretrain(PretrainConfig(out_dir=tmp_path / "first", max_steps=3, **common, **TINY))
    path = str(first["last"])
    second = pretrain(PretrainConfig(out_dir=tmp_path / "second", max_steps=1, init_from=path, **common))
    before, after = load_model(first["last"])[0], load_model(second["last"])[0]
    moved = max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < moved < 2e-4
    with refused("resume.another-run", changed=f"init_from was {path} and is now None"):
        pretrain(PretrainConfig(out_dir=tmp_path / "second", max_steps=2, **common))
    with refused("model.other-shape", path=path, name="esm2_t6_8M_UR50D"):
        pretrain(PretrainConfig(out_dir=tmp_path / "third", init_from=path, **common | {"model": "esm2_t6_8M_UR50D"}))


def test_best_checkpoints_are_kept(dataset: Path, tmp_path: Path) -> None:
    settings = {"global_batch_size": 4, "max_steps": 6, "val_check_interval": 1, "save_top_k": 2, **TINY}
    result = pretrain(PretrainConfig(data=dataset, out_dir=tmp_path, **settings))
    kept = sorted((tmp_path / "checkpoints").glob("step=*"))
    losses = sorted(float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"])
    assert sorted(read_metadata(path)["val_loss"] for path in kept) == losses[:2]
    assert read_metadata(result["best"])["val_loss"] == losses[0]
    assert read_metadata(result["last"])["step"] == 6


def test_an_infinite_loss_reports_the_update_and_the_sequences(dataset: Path, tmp_path: Path) -> None:
    settings = {"global_batch_size": 2, "max_steps": 50, "warmup_steps": 1, **TINY}
    with refused("run.diverged") as caught:
        pretrain(PretrainConfig(data=dataset, out_dir=tmp_path, lr=1e18, gradient_clip_val=0.0, **settings))
    values = caught.value.values
    assert values["update"] > 1
    assert all(name.startswith("UR") for name in values["sequences"])


def test_weights_without_a_finite_validation_loss_are_not_saved(dataset: Path, tmp_path: Path) -> None:
    """Update 1 ruins the weights: its own loss is finite, but the next validation loss is not."""
    settings = {"global_batch_size": 2, "max_steps": 4, "warmup_steps": 0, "val_check_interval": 1, **TINY}
    with refused("run.validation-loss", update=1):
        pretrain(PretrainConfig(data=dataset, out_dir=tmp_path, lr=1e30, gradient_clip_val=0.0, **settings))
    assert not list((tmp_path / "checkpoints").glob("*"))


SMALL = TINY | {"global_batch_size": 4, "log_every_n_steps": 1}


def command(out_dir: Path, data: Path, **settings: object) -> list[str]:
    settings = SMALL | {"data": data, "out_dir": out_dir} | settings
    return [sys.executable, "-m", "esm2kit", "pretrain", *(f"--{name}={value}" for name, value in settings.items())]


def test_a_full_disk_keeps_the_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """A limit on the file size replaces a full disk: both stop the write half way."""
    pretrain(PretrainConfig(data=dataset, out_dir=tmp_path, max_steps=2, **SMALL))
    last = tmp_path / "checkpoints" / "last.safetensors"
    before = last.read_bytes()

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    arguments = command(tmp_path, dataset, max_steps=4)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, preexec_fn=small_files)
    assert done.returncode == 2
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "still holds an earlier update" in done.stderr.splitlines()[-1]
    assert last.read_bytes() == before


def test_a_killed_rank_ends_the_job(dataset: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, dataset, max_steps=100_000, devices=2)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 90
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < end:
        time.sleep(0.1)
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    workers = [int(line.split()[0]) for line in listing.splitlines()[1:] if int(line.split()[1]) == process.pid]
    assert len(workers) >= 2
    os.kill(max(workers), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - killed < 60
    assert "Signal 9 (SIGKILL)" in output
    assert str(max(workers)) in output


def test_a_second_run_in_the_same_folder_raises_an_error(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    """The second run starts during an update of the first and does not change it."""
    config = PretrainConfig(data=dataset, out_dir=tmp_path, max_steps=2, **SMALL)
    step, steps = MaskedLM.training_step, []

    def start_second_run(self: MaskedLM, *arguments: object) -> None:
        with refused("file.locked"):
            pretrain(config)
        steps.append(self.step)
        step(self, *arguments)

    monkeypatch.setattr(MaskedLM, "training_step", start_second_run)
    assert pretrain(config)["step"] == 2
    assert steps == [0, 1]

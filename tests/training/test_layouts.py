"""The loss curve depends on the global batch, not on the layout: all layouts equal one device, on gloo."""

import csv
import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused
from support.layouts import COMMON, LAYOUTS, arguments, train_in_process, train_with_torchrun

from esm2kit.models.checkpoint import read_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.initialise import build_meta_model, materialise, sample_weights
from esm2kit.models.load import load_model
from esm2kit.pretraining.data import BERT, GlobalBatches
from esm2kit.pretraining.pretrain import PretrainConfig, _initial_model, pretrain
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.training.layout import BatchLayout

STEPS = 20
ACCUMULATIONS = (1, 2, 4)
MICRO_BATCH_TOKENS = 1100
PRECISIONS = ("bf16-mixed", "bf16-true")


def column(out_dir: Path, name: str) -> list[float]:
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def first_gradients(out_dir: Path) -> dict[str, torch.Tensor]:
    """Read the clipped gradients: after one update AdamW's gradient average is (1 - beta1) times the gradient."""
    tensors, _ = read_checkpoint(out_dir / "checkpoints" / "last.safetensors", "optimizer.")
    return {name: tensor / 0.1 for name, tensor in tensors.items() if name.endswith("exp_avg")}


def both_runs(out_dir: Path, data: Path, **settings: object) -> list[list[str]]:
    """Arguments of a run of one update, to compare gradients, and of a run of 20, to compare losses."""
    return [
        arguments(out_dir / "first", data, max_steps=1, **settings),
        arguments(out_dir / "curve", data, max_steps=STEPS, val_check_interval=STEPS, **settings),
    ]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, dataset) -> Path:
    out_dir = tmp_path_factory.mktemp("one")
    train_in_process(both_runs(out_dir, dataset, accumulate_grad_batches=1))
    return out_dir


def layout_runs(layout: str, out_dir: Path, data: Path) -> list[list[str]]:
    runs = []
    for accumulate in ACCUMULATIONS:
        # one of the three runs recomputes its activations, which must give the same numbers
        settings = LAYOUTS[layout][1] | {"activation_checkpointing": accumulate == 2}
        runs += both_runs(out_dir / layout / str(accumulate), data, accumulate_grad_batches=accumulate, **settings)
    given = LAYOUTS[layout][1] | {"micro_batch_tokens": MICRO_BATCH_TOKENS}
    return runs + both_runs(out_dir / layout / "tokens", data, **given)


def bf16_run(precision: str, out_dir: Path, data: Path, layout: str = "one") -> list[str]:
    common = {"precision": precision, "accumulate_grad_batches": 2, "max_steps": STEPS, "val_check_interval": STEPS}
    return arguments(out_dir / precision / layout, data, **common, **LAYOUTS.get(layout, (1, {}))[1])


def second_stage(first: Path) -> dict[str, object]:
    """Settings of a run of one update that starts from the weights, and with the size, of another run."""
    common = {name: value for name, value in COMMON.items() if not name.endswith(("model", "layers", "dim", "heads"))}
    return common | {"init_from": str(first / "first" / "checkpoints" / "last.safetensors"), "max_steps": 1}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, dataset, one_device) -> Path:
    """Run all layouts of two processes in one group, because starting a group is slow."""
    out_dir, names = tmp_path_factory.mktemp("two"), [name for name in LAYOUTS if LAYOUTS[name][0] == 2]
    runs = [run for name in names for run in layout_runs(name, out_dir, dataset)]
    runs += [bf16_run(precision, out_dir, dataset, name) for precision in PRECISIONS for name in names]
    sharded = second_stage(one_device) | {"devices": 2, "strategy": "fsdp2", "data": dataset}
    runs.append([f"--{name}={value}" for name, value in (sharded | {"out_dir": out_dir / "second"}).items()])
    train_with_torchrun(2, runs)
    return out_dir


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory, dataset) -> Path:
    out_dir = tmp_path_factory.mktemp("four")
    train_with_torchrun(4, layout_runs("2x2", out_dir, dataset), str(out_dir / "result"))
    return out_dir


def assert_same_run(out_dir: Path, reference: Path) -> None:
    for name in ("train_loss", "grad_norm", "val_loss"):
        found, expected = (torch.tensor(column(run / "curve", name)) for run in (out_dir, reference))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    gradients = first_gradients(reference / "first")
    for name, found in first_gradients(out_dir / "first").items():
        torch.testing.assert_close(found, gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_device(layout: str, request: pytest.FixtureRequest, one_device) -> None:
    out_dir = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[LAYOUTS[layout][0]])
    for division in (*ACCUMULATIONS, "tokens"):
        assert_same_run(out_dir / layout / str(division), one_device)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_is_the_same_on_every_layout(precision: str, tmp_path, dataset, one_device, two_processes) -> None:
    """The first update agrees to the last bits under DDP and within bf16 rounding for sharded models.

    FSDP2 gathers bfloat16 under both precisions, and tensor-parallel ranks round their partial sums. The curve is close
    to the float32 curve, but not equal.
    """
    train_in_process([bf16_run(precision, tmp_path, dataset)])
    one = tmp_path / precision / "one"
    expected = {name: torch.tensor(column(one, name)) for name in ("train_loss", "grad_norm", "val_loss")}
    wide = torch.tensor(column(one_device / "curve", "train_loss"))
    torch.testing.assert_close(expected["train_loss"], wide, rtol=5e-4, atol=0)
    for name in ("ddp2", "fsdp2", "tp2"):
        out_dir = two_processes / precision / name
        for metric, tolerance in (("train_loss", 3e-4), ("grad_norm", 5e-3), ("val_loss", 3e-4)):
            found = torch.tensor(column(out_dir, metric))
            torch.testing.assert_close(
                found, expected[metric], rtol=tolerance, atol=0, msg=lambda t, n=name: f"{n}: {t}"
            )
        first = column(out_dir, "train_loss")[0]
        assert first == pytest.approx(float(expected["train_loss"][0]), rel=2e-6 if name == "ddp2" else 2e-5)
        assert first != pytest.approx(float(wide[0]), rel=2e-6), f"{name}: the run did not use bf16"
    tensors, _ = read_checkpoint(two_processes / precision / "fsdp2" / "checkpoints" / "last.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, "checkpoints hold float32 weights"


def test_accumulation_and_workers_equal_one_device(tmp_path, dataset, one_device) -> None:
    for accumulate, workers in ((2, 1), (4, 0)):
        first, curve = both_runs(tmp_path / str(accumulate), dataset, accumulate_grad_batches=accumulate)
        train_in_process([first, [*curve, f"--num_workers={workers}"]])
        assert_same_run(tmp_path / str(accumulate), one_device)
    runs = both_runs(tmp_path / "tokens", dataset, micro_batch_tokens=MICRO_BATCH_TOKENS)
    train_in_process(runs)
    assert_same_run(tmp_path / "tokens", one_device)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_token_budget_gives_updates_different_numbers_of_micro_batches(ranks: int, dataset) -> None:
    """The ranks of an update have equal numbers of them, and together hold the same masked samples as one device."""
    layout = BatchLayout.of(devices=ranks, global_batch_size=16, micro_batch_tokens=MICRO_BATCH_TOKENS)
    training_set, counts = TrainingSet.open(dataset), set()
    whole = GlobalBatches(training_set, BatchLayout.of(global_batch_size=16), 0, 0, STEPS, 1022, BERT)
    parts = [GlobalBatches(training_set, layout, rank, 0, STEPS, 1022, BERT) for rank in range(ranks)]
    for step in range(STEPS):
        (expected,), found = whole[step], [part[step] for part in parts]
        counts.add(len(found[0]))
        assert len(set(map(len, found))) == 1
        micro_batches = [batch for part in found for batch in part]
        assert all(Packed(batch.num_tokens, bucketed=True).num_rows <= MICRO_BATCH_TOKENS for batch in micro_batches)
        rows = [row for batch in micro_batches for row in batch.store_rows]
        assert sorted(rows) == sorted(expected.store_rows)
        targets = torch.cat([batch.targets_M for batch in micro_batches])
        assert torch.equal(targets.sort().values, expected.targets_M.sort().values)
    assert len(counts) > 1


def test_filling_a_sharded_model_equals_sharding_a_filled_model(four_processes) -> None:
    """FSDP2, tensor parallelism and both have the same shards, tied head, loss and gradients."""
    assert (four_processes / "result").read_text() == "equal"


def test_a_second_stage_starts_equally_on_sharded_ranks(tmp_path, dataset, one_device, two_processes) -> None:
    config = PretrainConfig(data=dataset, out_dir=tmp_path, **second_stage(one_device))
    sharded = dataclasses.replace(config, devices=2, strategy="fsdp2")
    shape, weights = _initial_model(sharded, None)
    assert all(tensor.is_meta for tensor in shape.parameters())
    expected = dict(load_model(config.init_from)[0].named_parameters())
    assert {name: torch.equal(tensor, expected[name]) for name, tensor in weights if name in expected} == dict.fromkeys(
        expected, True
    )
    pretrain(config)
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(two_processes / "second", name) == pytest.approx(column(tmp_path, name), rel=1e-5), name


@pytest.mark.parametrize(("seed", "shape"), [(0, ESM2Config(2, 32, 4)), (7, ESM2Config(3, 48, 4))])
def test_weights_initialised_one_by_one_equal_those_of_the_model(seed: int, shape: ESM2Config) -> None:
    filled, expected = build_meta_model(shape), ESM2.initialised(shape, seed).state_dict()
    seen: list[weakref.ref] = []
    alive = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in sample_weights(shape, seed):
            seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            alive.append(sum(ref() is not None for ref in seen))

    random = torch.get_rng_state()
    materialise(filled, watched(), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random)
    assert filled.lm_head.weight is filled.embed_tokens.weight
    assert filled.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in filled.state_dict().items())
    assert max(alive) <= 2, "at most the current tensor and the one before"


def test_gradients_are_clipped_and_the_loss_falls(dataset, one_device) -> None:
    """The comparison of layouts relies on both."""
    assert min(column(one_device / "curve", "grad_norm")) > COMMON["gradient_clip_val"]
    losses = column(one_device / "curve", "train_loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2]))
def test_any_subset_of_the_sizes_gives_the_rest(nodes: int, micro: int, accumulate: int, tensor: int) -> None:
    whole = {"micro_batch_size": micro, "accumulate_grad_batches": accumulate}
    whole["global_batch_size"] = micro * accumulate * nodes * 2 // tensor
    expected = BatchLayout.of(2, nodes, tensor, **whole)
    assert expected.global_batch_size == whole["global_batch_size"]
    for name in whole:
        partial = {key: value for key, value in whole.items() if key != name}
        assert BatchLayout.of(2, nodes, tensor, **partial) == expected
    size = whole["global_batch_size"]
    with refused("layout.equation", requested=size + 1, found=size):
        BatchLayout.of(2, nodes, tensor, **whole | {"global_batch_size": size + 1})


def test_a_token_budget_and_a_number_of_sequences_raise_an_error() -> None:
    assert BatchLayout.of(devices=2, micro_batch_tokens=4096).global_batch_size == 16, "8 per rank, as without a budget"
    layout = BatchLayout.of(devices=4, micro_batch_tokens=4096, global_batch_size=64)
    assert layout.equation.startswith("global_batch_size 64 = 16 sequences per rank x data_parallel_size 4")
    for name in ("micro_batch_size", "accumulate_grad_batches"):
        with refused("layout.two-divisions", micro_batch_tokens=4096, name=name, found=2):
            BatchLayout.of(micro_batch_tokens=4096, global_batch_size=64, **{name: 2})
    with refused("layout.equation", requested=7, found=6):
        BatchLayout.of(devices=2, micro_batch_tokens=4096, global_batch_size=7)
    with refused("layout.size"):
        BatchLayout.of(micro_batch_tokens=0)


def test_devices_that_do_not_form_groups_raise_an_error() -> None:
    with refused("layout.groups", devices=3, tensor_model_parallel_size=2):
        BatchLayout.of(devices=3, tensor_model_parallel_size=2)

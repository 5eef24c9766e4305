"""The global batch decides the loss curve, not its layout: every layout against one device, on gloo."""

import csv
import dataclasses
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm2kit.checkpoint import load_esm2, read_checkpoint
from esm2kit.errors import InputError
from esm2kit.model import ESM2, ESM2Config
from esm2kit.parallel import BatchLayout
from esm2kit.pretrain import PretrainConfig, _initial_model, pretrain
from esm2kit.sharded_weights import drawn, materialise, without_weights

STEPS = 20
COMMON = {
    "model": "custom",
    "num_layers": 2,
    "embed_dim": 32,
    "attention_heads": 4,
    "global_batch_size": 16,
    "warmup_steps": 4,
    "lr": 1e-3,
    "log_every_n_steps": 1,
    "accelerator": "cpu",
    # so tight that every update is clipped: a norm that is wrong in one layout shows in its losses
    "gradient_clip_val": 0.5,
}
# name -> (processes, settings)
LAYOUTS = {
    "ddp2": (2, {"devices": 2}),
    "fsdp2": (2, {"devices": 2, "strategy": "fsdp2"}),
    "tp2": (2, {"devices": 2, "tensor_model_parallel_size": 2}),
    "2x2": (4, {"devices": 4, "tensor_model_parallel_size": 2}),
}
ACCUMULATIONS = (1, 2, 4)


def arguments(out_dir: Path, data: Path, **settings: object) -> list[str]:
    settings = COMMON | {"data": data, "out_dir": out_dir} | settings
    return [f"--{name}={value}" for name, value in settings.items()]


def train_together(processes: int, runs: list[list[str]]) -> None:
    """Run configurations in one process group of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(Path(__file__).parent / "layout_worker.py")]
    done = subprocess.run(
        [*command, json.dumps(runs)], capture_output=True, text=True, timeout=600, env={**_environment()}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1"}


def column(out_dir: Path, name: str) -> list[float]:
    with open(out_dir / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def first_gradients(out_dir: Path) -> dict[str, torch.Tensor]:
    """After one update AdamW's average is (1 - beta1) times the clipped gradient."""
    tensors, _ = read_checkpoint(out_dir / "checkpoints" / "last.safetensors", "optimizer.")
    return {name: tensor / 0.1 for name, tensor in tensors.items() if name.endswith("exp_avg")}


def both_runs(out_dir: Path, data: Path, **settings: object) -> list[list[str]]:
    """A run of one update, whose gradients are looked at, and one of twenty, whose losses are."""
    return [
        arguments(out_dir / "first", data, max_steps=1, **settings),
        arguments(out_dir / "curve", data, max_steps=STEPS, val_check_interval=STEPS, **settings),
    ]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, dataset) -> Path:
    out_dir = tmp_path_factory.mktemp("one")
    train_together(1, both_runs(out_dir, dataset, accumulate_grad_batches=1))
    return out_dir


def assert_same_run(out_dir: Path, reference: Path) -> None:
    for name in ("train_loss", "grad_norm", "val_loss"):
        found, expected = (torch.tensor(column(run / "curve", name)) for run in (out_dir, reference))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    gradients = first_gradients(reference / "first")
    for name, found in first_gradients(out_dir / "first").items():
        torch.testing.assert_close(found, gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_device(layout: str, tmp_path, dataset, one_device) -> None:
    processes, settings = LAYOUTS[layout]
    runs = []
    for accumulate in ACCUMULATIONS:
        runs += both_runs(tmp_path / str(accumulate), dataset, accumulate_grad_batches=accumulate, **settings)
    train_together(processes, runs)
    for accumulate in ACCUMULATIONS:
        assert_same_run(tmp_path / str(accumulate), one_device)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_the_same_on_every_layout(precision: str, tmp_path, dataset, one_device) -> None:
    """DDP to the last bits of the first update, shards within bf16's rounding; float32's curve close by, not the same.

    FSDP2 gathers bfloat16 under either precision; tensor-parallel ranks round their partial sums.
    """
    common = {"precision": precision, "accumulate_grad_batches": 2, "max_steps": STEPS, "val_check_interval": STEPS}
    names = ("ddp2", "fsdp2", "tp2")
    train_together(2, [arguments(tmp_path / name, dataset, **common, **LAYOUTS[name][1]) for name in names])
    train_together(1, [arguments(tmp_path / "one", dataset, **common)])
    expected = {name: torch.tensor(column(tmp_path / "one", name)) for name in ("train_loss", "grad_norm", "val_loss")}
    wide = torch.tensor(column(one_device / "curve", "train_loss"))
    torch.testing.assert_close(expected["train_loss"], wide, rtol=5e-4, atol=0)
    for name in names:
        for figure, tolerance in (("train_loss", 3e-4), ("grad_norm", 5e-3), ("val_loss", 3e-4)):
            found = torch.tensor(column(tmp_path / name, figure))
            torch.testing.assert_close(
                found, expected[figure], rtol=tolerance, atol=0, msg=lambda t, n=name: f"{n}: {t}"
            )
        first = column(tmp_path / name, "train_loss")[0]
        assert first == pytest.approx(float(expected["train_loss"][0]), rel=2e-6 if name == "ddp2" else 2e-5)
        assert first != pytest.approx(float(wide[0]), rel=2e-6), f"{name}: bf16 was asked for"
    tensors, _ = read_checkpoint(tmp_path / "fsdp2" / "checkpoints" / "last.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, "checkpoints hold the masters"


def test_accumulation_and_workers_equal_one_device(tmp_path, dataset, one_device) -> None:
    runs = []
    for accumulate in (2, 4):
        runs += both_runs(tmp_path / str(accumulate), dataset, accumulate_grad_batches=accumulate, num_workers=1)
    train_together(1, runs)
    for accumulate in (2, 4):
        assert_same_run(tmp_path / str(accumulate), one_device)


def test_filled_after_it_is_laid_out_is_laid_out_filled(tmp_path) -> None:
    """FSDP2, tensor parallel and both: the same shards, tied head, loss and gradients, without a whole model."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [sys.executable, *launcher, str(Path(__file__).parent / "sharded_worker.py"), str(tmp_path / "told")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "told").read_text() == "equal"


def test_a_second_stage_begins_alike_and_whole_on_no_rank(tmp_path, dataset, one_device) -> None:
    first = one_device / "first" / "checkpoints" / "last.safetensors"
    second = {name: value for name, value in COMMON.items() if not name.endswith(("layers", "dim", "heads"))}
    second |= {"model": None, "data": dataset, "init_from": str(first), "max_steps": 1}
    config = PretrainConfig(out_dir=tmp_path / "one", **second)
    sharded = dataclasses.replace(config, out_dir=tmp_path / "fsdp2", devices=2, strategy="fsdp2")
    shape, weights = _initial_model(sharded, None)
    assert all(tensor.is_meta for tensor in shape.parameters())
    expected = dict(load_esm2(first)[0].named_parameters())
    assert {name: torch.equal(tensor, expected[name]) for name, tensor in weights if name in expected} == dict.fromkeys(
        expected, True
    )

    pretrain(config)
    asked = {name: value for name, value in second.items() if value is not None}
    told = asked | {"out_dir": sharded.out_dir, "devices": 2, "strategy": "fsdp2"}
    train_together(2, [[f"--{name}={value}" for name, value in told.items()]])
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert column(sharded.out_dir, name) == pytest.approx(column(config.out_dir, name), rel=1e-5), name


@pytest.mark.parametrize(("seed", "shape"), [(0, ESM2Config(2, 32, 4)), (7, ESM2Config(3, 48, 4))])
def test_weights_drawn_one_by_one_are_the_models(seed: int, shape: ESM2Config) -> None:
    filled, expected = without_weights(shape), ESM2.initialised(shape, seed).state_dict()
    seen: list[weakref.ref] = []
    alive = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in drawn(shape, seed):
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
    assert max(alive) <= 2, "one at a time, and the one before"


def test_the_batch_is_unequal_and_the_curve_moves(dataset, one_device) -> None:
    """What the comparison rests on: clipping bites, and losses change from update to update."""
    assert min(column(one_device / "curve", "grad_norm")) > COMMON["gradient_clip_val"]
    losses = column(one_device / "curve", "train_loss")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2]))
def test_any_subset_of_the_equation_gives_the_rest(nodes: int, micro: int, accumulate: int, tensor: int) -> None:
    whole = {"micro_batch_size": micro, "accumulate_grad_batches": accumulate}
    whole["global_batch_size"] = micro * accumulate * nodes * 2 // tensor
    expected = BatchLayout.of(2, nodes, tensor, **whole)
    assert expected.global_batch_size == whole["global_batch_size"]
    for name in whole:
        partial = {key: value for key, value in whole.items() if key != name}
        assert BatchLayout.of(2, nodes, tensor, **partial) == expected
    with pytest.raises(InputError, match="x data_parallel_size"):
        BatchLayout.of(2, nodes, tensor, **whole | {"global_batch_size": whole["global_batch_size"] + 1})


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="does not divide into groups of tensor_model_parallel_size 2"):
        BatchLayout.of(devices=3, tensor_model_parallel_size=2)

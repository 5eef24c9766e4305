"""Settings that depend on the hardware. No test needs a GPU: what torch reports about one is replaced."""

import logging
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.finetuning.data import FinetuneData
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.models import packing
from esm2kit.models.checkpoint import read_metadata
from esm2kit.models.config import SIZES
from esm2kit.models.memory import estimate_training
from esm2kit.pretraining.data import PretrainingData
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.pretraining.training_set import TrainingSet
from esm2kit.tasks.data import load_task
from esm2kit.tasks.packing import LabelledProteins, build_labels
from esm2kit.training import defaults, memory
from esm2kit.training.layout import BatchLayout
from esm2kit.training.trainer import check_devices, resolve_accelerator

TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4}
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch) -> types.SimpleNamespace:
    """Replace what torch reports about a GPU; nothing may be computed on it."""
    found = types.SimpleNamespace(bfloat16=True, memory=80 * GIB, others=[])
    for module in (defaults, memory):
        monkeypatch.setattr(module, "resolve_accelerator", lambda config: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found.others) + 1)
    monkeypatch.setattr(
        defaults, "resolve_precision", lambda requested, device: "bfloat16" if found.bfloat16 else "float32"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: types.SimpleNamespace(total_memory=[found.memory, *found.others][index]),
    )
    monkeypatch.setattr(defaults, "count_cores", lambda: 16)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/usr/bin/esm2kit", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    return found


def test_a_processor_keeps_its_defaults(tmp_path: Path) -> None:
    config = PretrainConfig(data=tmp_path, out_dir=tmp_path, accelerator="cpu", global_batch_size=64, **TINY)
    resolved = defaults.resolve_micro_batches(defaults.resolve_hardware(config), config.model_config)
    assert (resolved.precision, resolved.compile, resolved.num_workers) == ("32-true", False, 0)
    assert resolved.layout == BatchLayout(64, 1, 1, 1)


def test_a_gpu_gets_bf16_compiled_layers_workers_and_a_token_budget(gpu, tmp_path, caplog) -> None:
    config = PretrainConfig(data=tmp_path, out_dir=tmp_path, model="650M", global_batch_size=2048)
    with caplog.at_level(logging.INFO, "esm2kit"):
        resolved = defaults.resolve_micro_batches(defaults.resolve_hardware(config), config.model_config)
    assert (resolved.precision, resolved.compile, resolved.num_workers) == ("bf16-mixed", True, 4)
    assert resolved.layout == BatchLayout(2048, 1, 1, 1, 16_384)
    (line,) = caplog.messages
    assert line == "training on H100: precision bf16-mixed, compiled layers, 4 data workers per device"
    gpu.bfloat16 = False
    assert defaults.resolve_hardware(config).precision == "32-true", "such as a T4"


def test_settings_of_the_user_are_kept_on_a_gpu(gpu, tmp_path) -> None:
    given = {"precision": "32-true", "compile": False, "num_workers": 0, "micro_batch_size": 32}
    config = PretrainConfig(data=tmp_path, out_dir=tmp_path, global_batch_size=64, **given)
    assert defaults.resolve_micro_batches(defaults.resolve_hardware(config), config.model_config) == config
    for name in ("accumulate_grad_batches", "micro_batch_tokens"):
        config = PretrainConfig(data=tmp_path, out_dir=tmp_path, global_batch_size=64, **{name: 2})
        assert defaults.resolve_micro_batches(config, config.model_config) == config


@pytest.mark.parametrize(
    ("size", "memory", "tokens"),
    [("8M", 80, 65_536), ("150M", 80, 65_536), ("650M", 80, 16_384), ("650M", 24, 2048), ("650M", 8, 1024)],
)
def test_micro_batches_fit_the_memory_of_the_gpu(size: str, memory: int, tokens: int, gpu, tmp_path) -> None:
    gpu.memory = memory * GIB
    config = PretrainConfig(data=tmp_path, out_dir=tmp_path, model=size, precision="bf16-mixed", global_batch_size=64)
    shape = config.model_config
    assert defaults.resolve_micro_batches(config, shape).micro_batch_tokens == tokens
    share = estimate_training(shape, defaults.describe_memory(config, tokens)).total / gpu.memory
    twice = estimate_training(shape, defaults.describe_memory(config, 2 * tokens)).total / gpu.memory
    assert tokens in (1024, 65_536) or share < 0.7 < twice


def test_ranks_of_a_node_with_different_gpus_divide_the_batch_for_the_smallest(gpu, tmp_path) -> None:
    given = {"data": tmp_path, "out_dir": tmp_path, "model": "650M", "precision": "bf16-mixed"}

    def tokens(devices: int, *memory: int) -> int:
        gpu.memory, *gpu.others = (GIB * each for each in memory)
        config = PretrainConfig(**given, devices=devices, global_batch_size=64)
        return defaults.resolve_micro_batches(config, config.model_config).micro_batch_tokens

    assert tokens(2, 80, 24) == tokens(2, 24, 80) == tokens(2, 24, 24) < tokens(2, 80, 80)
    assert tokens(1, 80, 24) == 16_384, "a GPU that is not used does not count"


def test_ranks_whose_defaults_differ_are_refused(dataset, tmp_path, monkeypatch) -> None:
    """As on a node with other GPUs: the ranks would divide the batch differently, or wait for each other forever."""
    monkeypatch.setattr("esm2kit.training.loop.gather_strings", lambda items: [*items, "bf16-mixed"])
    given = TINY | {"data": dataset, "out_dir": tmp_path, "accelerator": "cpu", "max_steps": 1, "warmup_steps": 1}
    with refused("layout.ranks-differ", name="precision", found=["32-true", "bf16-mixed"]):
        pretrain(PretrainConfig(**given))


def test_what_needs_less_memory_gets_larger_micro_batches(gpu, tmp_path) -> None:
    shape, given = SIZES["esm2_t33_650M_UR50D"], {"model": "650M", "precision": "bf16-mixed", "out_dir": tmp_path}
    given |= {"task": "gb1", "global_batch_size": 64}

    def tokens(**settings: object) -> int:
        return defaults.resolve_micro_batches(FinetuneConfig(**given, **settings), shape).micro_batch_tokens

    assert tokens(activation_checkpointing=True) > tokens()
    assert tokens(mode="frozen") > tokens()
    assert tokens(devices=8, strategy="fsdp2") >= tokens(devices=8)


@pytest.mark.parametrize(
    ("device", "devices", "cores", "expected"),
    [("cuda", 1, 16, 4), ("cuda", 8, 16, 1), ("cuda", 1, 3, 2), ("cuda", 2, 2, 0), ("cpu", 1, 16, 0), ("mps", 1, 8, 0)],
)
def test_workers_leave_a_core_to_each_training_process(device, devices, cores, expected, gpu, monkeypatch) -> None:
    monkeypatch.setattr(defaults, "count_cores", lambda: cores)
    assert defaults.choose_workers(device, devices) == expected


def test_a_script_that_calls_the_api_gets_no_workers_by_default(gpu, monkeypatch) -> None:
    """Each worker would import the script, and train again, unless the script protects its calls."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/data/me/train.py")
    assert defaults.choose_workers("cuda", 1) == 0
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="esm2kit.__main__"))
    assert defaults.choose_workers("cuda", 1) == 4, "python -m esm2kit"


def test_the_resolved_precision_is_recorded_and_compared(dataset, tmp_path, monkeypatch) -> None:
    given = TINY | {"data": dataset, "out_dir": tmp_path, "accelerator": "cpu", "global_batch_size": 2}
    given |= {"warmup_steps": 1}
    pretrain(PretrainConfig(**given, max_steps=1))
    last = tmp_path / "checkpoints" / "last.safetensors"
    assert read_metadata(last)["provenance"]["config"]["precision"] == "32-true"
    monkeypatch.setattr(defaults, "choose_precision", lambda device: "bf16-mixed")  # as on a GPU
    with refused("resume.precision", path=str(last), before="32-true", now="bf16-mixed"):
        pretrain(PretrainConfig(**given, max_steps=2))
    assert pretrain(PretrainConfig(**given, max_steps=2, precision="32-true"))["step"] == 2
    # a precision that the user names is a choice, as before
    assert pretrain(PretrainConfig(**given, max_steps=3, precision="bf16-mixed"))["step"] == 3
    assert read_metadata(last)["provenance"]["config"]["precision"] == "bf16-mixed"


def test_a_resumed_fine_tuning_compares_the_precision(tmp_path, monkeypatch) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.safetensors")
    given = {"task": "protein_value", "data_dir": write_tasks(tmp_path / "tasks"), "model": tiny, "accelerator": "cpu"}
    given |= {"out_dir": tmp_path / "run", "benchmark": False, "resamples": 100}
    finetune(FinetuneConfig(**given, max_steps=1))
    monkeypatch.setattr(defaults, "choose_precision", lambda device: "bf16-mixed")
    with refused("resume.precision", before="32-true", now="bf16-mixed"):
        finetune(FinetuneConfig(**given, max_steps=2))


def test_an_apple_gpu_is_one_device(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ESM2KIT_DEVICE", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    given = {"data": tmp_path, "out_dir": tmp_path}
    config = PretrainConfig(**given)
    assert resolve_accelerator(config) == "mps"
    assert defaults.resolve_hardware(config).precision == "32-true"
    assert resolve_accelerator(PretrainConfig(**given, devices=2)) == "cpu"
    with refused("devices.missing", found=1, requested=2):
        check_devices(PretrainConfig(**given, devices=2, accelerator="mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with refused("device.absent"):
        resolve_accelerator(PretrainConfig(**given, accelerator="mps"))


# FlashAttention 4


@pytest.fixture
def flash(monkeypatch, caplog) -> types.SimpleNamespace:
    """Replace the package, the GPU and torch's switch."""
    state = types.SimpleNamespace(
        installed=True, capabilities=[(9, 0), (10, 0)], error=None, activated=[], caplog=caplog
    )

    def activate(name: str) -> None:
        if state.error:
            raise state.error
        state.activated.append(name)

    find_spec = packing.importlib.util.find_spec
    monkeypatch.setattr(
        packing.importlib.util,
        "find_spec",
        lambda name: (object() if state.installed else None) if name == packing.FLASH_ATTENTION_4 else find_spec(name),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(state.capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: state.capabilities[index])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    packing.activate_flash_attention_4.cache_clear()
    caplog.set_level(logging.INFO, "esm2kit")
    yield state
    packing.activate_flash_attention_4.cache_clear()


def test_flash_attention_4_is_used_once_where_it_is_installed(flash) -> None:
    assert packing.activate_flash_attention_4()
    assert packing.activate_flash_attention_4()
    assert flash.activated == ["FA4"]
    assert flash.caplog.messages == ["attention: FlashAttention 4"]


@pytest.mark.parametrize("lack", [{"installed": False}, {"capabilities": [(9, 0), (8, 0)]}, {"capabilities": []}])
def test_without_the_package_or_on_another_gpu_nothing_happens(lack: dict, flash) -> None:
    vars(flash).update(lack)
    assert not packing.activate_flash_attention_4()
    assert flash.activated == []
    assert flash.caplog.messages == []


def test_flash_attention_4_that_fails_is_left_out_with_one_line(flash) -> None:
    flash.error = RuntimeError("undefined symbol\nin a library")
    assert not packing.activate_flash_attention_4()
    (line,) = flash.caplog.messages
    assert "undefined symbol" in line
    assert "\n" not in line


def test_the_package_is_absent_here(flash, monkeypatch) -> None:
    """The counter-example: the real look-up of a package that is not installed finds nothing, and raises nothing."""
    monkeypatch.undo()
    monkeypatch.setattr(packing, "FLASH_ATTENTION_4", "no_such_package.cute.interface")
    assert not packing.activate_flash_attention_4()


# data loaders


def make_data(name: str, dataset: Path, folder: Path, num_workers: int):
    layout = BatchLayout.of(global_batch_size=6, micro_batch_tokens=900)
    if name == "pretrain":
        data = PretrainingData(TrainingSet.open(dataset), layout, 3, 5, num_workers=num_workers)
    else:
        task = load_task("residue_class", None, write_tasks(folder / "tasks"))
        proteins = LabelledProteins(task, build_labels(task, False, False), folder, 60)
        data = FinetuneData(proteins, layout, 3, 5, 0, 256, num_workers)
    data.trainer = types.SimpleNamespace(strategy=types.SimpleNamespace(
        root_device=torch.device("cpu"), distributed_sampler_kwargs={"rank": 0, "num_replicas": 1}
    ))  # fmt: skip
    return data


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_workers_prepare_the_same_batches(name: str, dataset, tmp_path) -> None:
    """Training and validation; a budget of tokens gives updates different numbers of micro-batches."""
    alone, workers = (make_data(name, dataset, tmp_path, count) for count in (0, 1))
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(alone, loader)(), getattr(workers, loader)(), strict=True))
        assert len(pairs) > 1
        for expected, found in pairs:
            expected, found = ([each] if hasattr(each, "_fields") else each for each in (expected, found))
            assert len(expected) == len(found)
            for left, right in zip(expected, found, strict=True):
                for field in left._fields:
                    first, second = getattr(left, field), getattr(right, field)
                    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
                    assert same, field


def test_only_a_cuda_gpu_gets_pinned_memory(dataset, tmp_path) -> None:
    for name in ("pretrain", "finetune"):
        data = make_data(name, dataset, tmp_path, 0)
        assert not data.train_dataloader().pin_memory
        data.trainer.strategy.root_device = torch.device("cuda", 0)
        assert data.train_dataloader().pin_memory
        assert data.val_dataloader().pin_memory


def test_batches_are_copied_without_waiting(dataset, tmp_path, monkeypatch) -> None:
    """Also those of fine-tuning; lists of numbers, which a GPU does not need, stay as they are."""
    to, copies = torch.Tensor.to, []

    def record(self: torch.Tensor, *given: object, **how: object) -> torch.Tensor:
        copies.append(how)
        return to(self, *given, **how)

    for name in ("pretrain", "finetune"):
        data = make_data(name, dataset, tmp_path, 0)
        copies.clear()
        batches = next(iter(data.train_dataloader()))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", record)
            moved = data.transfer_batch_to_device(batches, torch.device("meta"), 0)
        assert copies
        assert all(how == {"non_blocking": True} for how in copies)
        for before, after in zip(batches, moved, strict=True):
            assert after.num_tokens == before.num_tokens
            assert {each.device.type for each in after if isinstance(each, torch.Tensor)} == {"meta"}


def test_a_worker_receives_no_copy_of_the_token_file(tmp_path) -> None:
    """The tokens of a large task are hundreds of megabytes; a worker maps the file instead."""
    task = load_task("residue_class", None, write_tasks(tmp_path / "tasks"))
    proteins = LabelledProteins(task, build_labels(task, False, False), tmp_path, 60)
    assert proteins.tokens.tobytes() not in pickle.dumps(proteins)
    copied = pickle.loads(pickle.dumps(proteins))
    assert (copied.tokens == proteins.tokens).all()
    assert Path(copied.tokens.filename) == Path(proteins.tokens.filename)

"""Checkpoints survive a round trip; damaged and foreign files are rejected."""

import dataclasses
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.models.checkpoint import DTYPES, gather, read_checkpoint, read_metadata, save_tensors, write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.models.load import load_model

CONFIG = ESM2Config(2, 32, 4)


@pytest.fixture
def saved(tmp_path):
    model = ESM2.initialised(CONFIG, seed=3)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["optimizer.step"] = torch.tensor(7.0)
    write_checkpoint(tmp_path / "last.safetensors", tensors, {"model": to_json(CONFIG), "step": 7})
    return tmp_path / "last.safetensors", model


def test_round_trip(saved) -> None:
    path, model = saved
    again, found = load_model(path)
    assert read_metadata(path)["step"] == 7
    assert found.sha256 == read_metadata(path)["sha256"]
    assert again.config == CONFIG
    assert again.lm_head.weight is again.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert read_checkpoint(path, "optimizer.")[0]["optimizer.step"] == 7


def test_the_safetensors_package_reads_tensors_of_all_kinds(tmp_path) -> None:
    """All dtypes, empty tensors, scalars, strides, and sizes that are not aligned in the order of names."""
    tensors = {f"a.{dtype}": torch.arange(3).to(dtype) for dtype in DTYPES}
    tensors |= {"b": torch.tensor(7.0), "c": torch.zeros(0, 4), "d": torch.arange(12.0).view(3, 4).T}
    tensors |= {"shared": tensors["d"], "ü": torch.tensor([True, False])}
    save_tensors(tmp_path / "any", tensors, {"note": "“yes”"})
    found = load_file(tmp_path / "any")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)  # also compares dtypes
    with safe_open(tmp_path / "any", "pt") as file:
        assert file.metadata() == {"note": "“yes”"}
    save_tensors(tmp_path / "none", {}, {})
    assert load_file(tmp_path / "none") == {}


def test_a_file_has_the_default_permissions(tmp_path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "tensors", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_one_tensor_is_gathered_at_a_time(tmp_path) -> None:
    """Every rank gathers shards in the same order and releases each tensor before the next one but one."""
    gathered, alive = [], []

    class Shard:
        """The part of DTensor's interface that writing uses."""

        dtype, itemsize, shape = torch.float32, 4, torch.Size([100])

        def __init__(self, value: float) -> None:
            self.value = value

        def numel(self) -> int:
            return 100

        def detach(self) -> "Shard":
            return self

        def full_tensor(self) -> torch.Tensor:
            alive[:] = [ref for ref in alive if ref() is not None]
            full = torch.full((100,), self.value)
            gathered.append((self.value, len(alive)))
            alive.append(weakref.ref(full))
            return full

    shards = {f"model.{value}": Shard(value) for value in (3.0, 1.0, 2.0, 4.0)} | {"model.lm_head.weight": Shard(0.0)}
    write_checkpoint(tmp_path / "last", shards, {})
    assert [value for value, _ in gathered] == [1.0, 2.0, 3.0, 4.0], "in the order of names, without the tied head"
    assert max(others for _, others in gathered) <= 1
    assert read_checkpoint(tmp_path / "last")[0]["model.3.0"].tolist() == [3.0] * 100
    written = [value for value, _ in gathered]
    gathered.clear()
    gather(shards)
    assert [value for value, _ in gathered] == written


def test_every_flipped_byte_is_detected(saved) -> None:
    path, _ = saved
    content = path.read_bytes()
    for position in range(11, len(content), len(content) // 60):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(InputError):
            read_checkpoint(path)
    path.write_bytes(content[: len(content) // 2])
    with refused("checkpoint.damaged"):
        read_checkpoint(path)


def test_missing_and_foreign_files_are_rejected(tmp_path) -> None:
    with refused("checkpoint.absent"):
        read_checkpoint(tmp_path / "absent")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with refused("checkpoint.not-esm2kit"):
        read_checkpoint(tmp_path / "other")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": print}))
    with refused("checkpoint.damaged"):
        read_checkpoint(tmp_path / "pickle")


def test_a_model_of_another_size_is_rejected(saved, tmp_path) -> None:
    _, model = saved
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "wrong", tensors, {"model": to_json(ESM2Config(3, 32, 4))})
    with refused("checkpoint.tensor", name="contact_head.regression.weight"):
        load_model(tmp_path / "wrong")


def test_a_failed_write_leaves_the_old_checkpoint(saved, monkeypatch) -> None:
    path, _ = saved
    before = path.read_bytes()

    def full_disk(tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esm2kit.models.checkpoint._to_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {"model.x": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_vectors_do_not_depend_on_the_length_of_the_metadata(tmp_path: Path) -> None:
    config = ESM2Config(2, 64, 4)
    state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(config, 0).state_dict().items()}
    tokens_N = tokenize(["MKTAYIAKQRQISFVKSHFSRQ" * 8])[0]
    found, alignments = [], set()
    for length in range(0, 64, 4):
        path = tmp_path / f"{length}.safetensors"
        write_checkpoint(path, state, {"model": dataclasses.asdict(config), "note": "x" * length})
        model, _ = load_model(path)
        alignments.add(model.layers[0].fc1.weight.data_ptr() % 64)
        found.append(Encoder(model).encode(tokens_N, [len(tokens_N)], [2])[2])
    assert len(alignments) == 1, "tensors have the same alignment for any header"
    assert all(torch.equal(hidden_ND, found[0]) for hidden_ND in found)

"""A checkpoint comes back as it went, or is refused in one line."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from esm2kit.checkpoint import load_esm2, read_checkpoint, write_checkpoint
from esm2kit.errors import InputError
from esm2kit.model import ESM2, ESM2Config
from esm2kit.provenance import to_json

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
    again, metadata = load_esm2(path)
    assert metadata["step"] == 7
    assert again.config == CONFIG
    assert again.lm_head.weight is again.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert read_checkpoint(path, "optimizer.")[0]["optimizer.step"] == 7


def test_every_flipped_byte_is_refused(saved) -> None:
    path, _ = saved
    whole = path.read_bytes()
    for position in range(11, len(whole), len(whole) // 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError):
            read_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_checkpoint(path)


def test_what_is_not_ours_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="not an esm2kit checkpoint"):
        read_checkpoint(tmp_path / "other")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_checkpoint(tmp_path / "pickle")


def test_another_size_is_refused(saved, tmp_path) -> None:
    _, model = saved
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "wrong", tensors, {"model": to_json(ESM2Config(3, 32, 4))})
    with pytest.raises(InputError, match=r"is \(1, 8\), this model of 3 layers x 32 wants \(1, 12\)"):
        load_esm2(tmp_path / "wrong")


def test_a_failing_write_leaves_the_old_checkpoint(saved, monkeypatch) -> None:
    path, _ = saved
    before = path.read_bytes()

    def full_disk(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esm2kit.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {"model.x": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]

"""A model that is divided over processes: its values, its memory, and when it is chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.test_layerwise import esm2, write_model
from support.errors import refused

from esm2kit.core.processes import Launch
from esm2kit.models import sharded
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.lora import add_lora, list_adapters, merge_layers, merge_lora
from esm2kit.models.memory import InferenceSettings, count_layer_parameters, estimate_inference
from esm2kit.models.sharded import choose_sharding

__all__ = ["esm2"]
SUPPORT = Path(__file__).parents[1] / "support"


def test_two_processes_give_the_numbers_of_one_and_hold_half(esm2: ESM2, tmp_path: Path) -> None:
    path = write_model(esm2, tmp_path / "a.safetensors")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(SUPPORT / "sharded_worker.py"), str(path), str(tmp_path / "done")]
    done = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"done.{rank}").read_text() for rank in (0, 1)] == ["equal", "equal"]


def test_adapters_are_merged_into_one_tensor_at_a_time() -> None:
    config = ESM2Config(2, 32, 4)
    esm2 = ESM2.initialised(config, 1)
    plain = {name: tensor.clone() for name, tensor in esm2.state_dict().items()}
    add_lora(esm2, 2, 4.0, biases=True)
    parameters = dict(esm2.named_parameters())
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(parameters[name].shape, generator=generator) for name in list_adapters(esm2)}
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    expected = merge_lora(esm2).state_dict()
    change = merge_layers(config, state, "a file", 2, 4.0, biases=True)
    changed = 0
    for name, tensor in plain.items():
        if name.startswith("layers."):
            _, index, own = name.split(".", 2)
            found = {own: tensor}
            change(int(index), found)
            assert list(found) == [own]
            torch.testing.assert_close(found[own], expected[name])
            changed += not torch.equal(found[own], tensor)
    assert changed == 2 * (6 + 8), "matrices, and the biases of linear layers and LayerNorms"


def launch(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(sharded, "read_launch", lambda: Launch("torchrun", 0, ranks, 0, ranks))


def test_auto_divides_a_model_that_fits_on_all_gpus_but_not_on_one(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level("INFO", logger="esm2kit")
    config, gpu = SIZES["esm2_t48_15B_UR50D"], torch.device("cuda")
    whole, part = (
        estimate_inference(config, InferenceSettings(tokens=32_768, precision="float32", device="cuda", shards=ranks))
        for ranks in (1, 8)
    )
    layers = 48 * count_layer_parameters(config)
    assert whole.weights - part.weights == pytest.approx(4 * layers * 7 / 8)
    assert part.copies == 4 * 2 * count_layer_parameters(config)
    assert part.activations == whole.activations
    launch(monkeypatch, 8)
    for free, expected in (
        (whole.total / 0.9 + 1, False),
        (whole.total / 0.9 - 1, True),
        (part.total / 0.9 + 1, True),
        (part.total / 0.9 - 1, False),
    ):
        caplog.clear()
        monkeypatch.setattr(sharded, "read_free_memory", lambda device, free=free: int(free))
        assert choose_sharding("auto", config, "15B", "float32", gpu) is expected
        assert caplog.text.count("15B takes about") == expected
        assert not choose_sharding(False, config, "15B", "float32", gpu)
        assert choose_sharding(True, config, "15B", "float32", gpu)
        for chosen in (True, False):
            assert not choose_sharding("auto", config, "15B", "float32", gpu, layer_by_layer=chosen)
        assert not choose_sharding("auto", config, "15B", "float32", torch.device("cpu")), "its memory is shared"
    assert "is divided over 8 devices" in caplog.text
    launch(monkeypatch, 1)
    assert not choose_sharding("auto", config, "15B", "float32", gpu)
    with refused("shard.one-device"):
        choose_sharding(True, config, "15B", "float32", gpu)

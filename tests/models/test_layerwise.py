"""A model that is read layer by layer gives the numbers of the complete model, from every format, in bounded memory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.errors import refused

from esm2kit.models import layerwise
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.layerwise import LayerwiseEncoder, load_encoder
from esm2kit.models.load import ModelFile, find_model
from esm2kit.models.lora import weights_sha256
from esm2kit.models.memory import InferenceSettings, estimate_inference, format_gib
from esm2kit.models.packing import Packed
from esm2kit.sequences.batching import split_within_budget

CONFIG = ESM2Config(3, 48, 4)


@pytest.fixture(autouse=True)
def one_thread():
    """Products of several threads can differ in the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def esm2() -> ESM2:
    model = ESM2.initialised(CONFIG, 7).eval()
    with torch.no_grad():  # LayerNorms and biases start as constants
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def write_model(esm2: ESM2, path: Path, **changed: torch.Tensor) -> Path:
    state = {f"model.{name}": tensor for name, tensor in (esm2.state_dict() | changed).items()}
    write_checkpoint(path, state, {"model": dataclasses.asdict(esm2.config)})
    return path


@pytest.fixture(scope="module")
def files(esm2: ESM2, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFile]:
    """The same model in every format."""
    folder = tmp_path_factory.mktemp("formats")
    paths = {"esm2kit": write_model(esm2, folder / "a.safetensors")}
    save_fair_esm(esm2, folder / "esm2_a.pt")
    save_hf(esm2, folder / "hf")
    save_hf(esm2, folder / "bin")
    state = {f"wrapped.{name}": tensor for name, tensor in esm2.state_dict().items()}
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "bin" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    paths |= {"fair-esm": folder / "esm2_a.pt", "hf": folder / "hf", "bin": folder / "bin", "dcp": folder / "dcp"}
    return {name: find_model(path) for name, path in paths.items()}


def random_batch(count: int = 40, longest: int = 90) -> tuple[torch.Tensor, list[int]]:
    """Token ids of sequences in decreasing length, one of them with <mask>."""
    generator = torch.Generator().manual_seed(0)
    sizes = sorted(torch.randint(3, longest, (count,), generator=generator).tolist(), reverse=True)
    parts = [torch.cat([torch.tensor([0]), torch.randint(4, 24, (n - 2,), generator=generator), torch.tensor([2])])
             for n in sizes]  # fmt: skip
    parts[3][2] = 32
    return torch.cat(parts), sizes


def encode_in_batches(encoder: Encoder, tokens_N: torch.Tensor, sizes: list[int], budget: int, layers: list[int]):
    """Encode with the ordinary encoder, batch by batch."""
    found = []
    for part in split_within_budget(torch.tensor(sizes).numpy(), budget):
        start = sum(sizes[: part.start])
        rows = tokens_N[start : start + sum(sizes[part])]
        found.append(encoder.encode(rows, sizes[part], layers))
    return {layer: torch.cat([each[layer] for each in found]) for layer in layers}


@pytest.mark.parametrize("name", ["esm2kit", "fair-esm", "hf", "bin", "dcp"])
def test_every_format_gives_exactly_the_numbers_of_the_complete_model(name: str, files, esm2: ESM2) -> None:
    file, (tokens_N, sizes) = files[name], random_batch()
    expected = encode_in_batches(Encoder(esm2), tokens_N, sizes, 300, [0, 1, 2, 3])
    weights = file.open()
    encoder = LayerwiseEncoder(weights, batch_tokens=300, workers=2)
    for _ in range(2):  # the second call starts with the layer that the first one read ahead
        found = encoder.encode(tokens_N, sizes, [0, 1, 2, 3])
        for layer, rows_ND in expected.items():
            assert torch.equal(found[layer], rows_ND), layer
    assert torch.equal(encoder.encode(tokens_N, sizes, [1])[1], expected[1]), "layers above the last one are not read"
    assert torch.equal(encoder.logits(found[3]), torch.cat([Encoder(esm2).logits(x) for x in found[3].split(300)]))
    assert weights.sha256() == weights_sha256(esm2)
    encoder.close()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_approximate_precisions_are_those_of_the_complete_model(precision: str, files, esm2: ESM2) -> None:
    tokens_N, sizes = random_batch()
    expected = encode_in_batches(Encoder(esm2, precision), tokens_N, sizes, 300, [3])[3]
    encoder = LayerwiseEncoder(files["esm2kit"].open(), precision, batch_tokens=300, workers=1)
    assert torch.equal(encoder.encode(tokens_N, sizes, [3])[3], expected)
    assert not torch.equal(expected, encode_in_batches(Encoder(esm2), tokens_N, sizes, 300, [3])[3])


def test_the_path_of_gpus_gives_the_numbers_of_the_model(files, esm2: ESM2) -> None:
    """On a GPU the layers are the modules of the model; here the same code runs on the CPU."""
    tokens_N, sizes = random_batch()
    encoder = LayerwiseEncoder(files["esm2kit"].open(), batch_tokens=300)
    encoder.is_fused = False
    found = encoder.encode(tokens_N, sizes, [0, 2, 3])
    with torch.no_grad():
        expected = esm2.encode(tokens_N, Packed(sizes), (0, 2, 3))
    for layer, rows_ND in expected.items():
        torch.testing.assert_close(found[layer], rows_ND, atol=1e-6, rtol=1e-6)


def test_a_sequence_does_not_depend_on_its_batch_or_group(files) -> None:
    tokens_N, sizes = random_batch()
    encoder = LayerwiseEncoder(files["esm2kit"].open(), batch_tokens=200)
    together = encoder.encode(tokens_N, sizes, [3])[3].split(sizes)
    for index, rows in list(enumerate(tokens_N.split(sizes)))[::7]:
        torch.testing.assert_close(encoder.encode(rows, [len(rows)], [3])[3], together[index], atol=1e-6, rtol=0)


def test_random_weights_of_a_seed_are_sampled_layer_by_layer() -> None:
    file = ModelFile("8M", "esm2_t6_8M_UR50D", "size", untrained_seed=3)
    small = dataclasses.replace(file)
    small.__dict__["config"] = CONFIG
    torch.manual_seed(11)
    state = torch.get_rng_state()
    weights = small.open()
    tokens_N, sizes = random_batch(8)
    encoder = LayerwiseEncoder(weights, batch_tokens=100, workers=1)
    expected = encode_in_batches(Encoder(ESM2.initialised(CONFIG, 3).eval()), tokens_N, sizes, 100, [3])[3]
    for _ in range(2):
        assert torch.equal(encoder.encode(tokens_N, sizes, [3])[3], expected)
    encoder._reader.shutdown()
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers do not change"


def test_damaged_changed_and_incomplete_files_are_refused(esm2: ESM2, tmp_path: Path) -> None:
    tokens_N, sizes = random_batch(8)
    path = write_model(esm2, tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with refused("checkpoint.digest"):
        find_model(tmp_path / "damaged.safetensors").open()
    bias = "layers.1.fc1.bias"
    broken = write_model(esm2, tmp_path / "nan.safetensors", **{bias: torch.full((192,), torch.nan)})
    encoder = LayerwiseEncoder(find_model(broken).open())
    with refused("checkpoint.not-finite", name=bias):
        encoder.encode(tokens_N, sizes, [3])
    short = write_model(esm2, tmp_path / "short.safetensors", **{bias: torch.zeros(5)})
    with refused("checkpoint.tensor", name=bias, found=(5,), expected=(192,)):
        LayerwiseEncoder(find_model(short).open()).encode(tokens_N, sizes, [3])
    encoder = LayerwiseEncoder(find_model(path).open())
    write_model(ESM2.initialised(CONFIG, 8), path)
    with refused("model.changed", path=str(path)):
        for _ in range(2):
            encoder.encode(tokens_N, sizes, [3])


def test_progress_lines_name_the_layer(files, caplog, monkeypatch) -> None:
    monkeypatch.setattr(layerwise, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO", logger="esm2kit")
    tokens_N, sizes = random_batch(8)
    LayerwiseEncoder(files["esm2kit"].open()).encode(tokens_N, sizes, [3])
    lines = [f"layer {number} of 3, for a group of {len(tokens_N)} tokens" for number in (1, 2, 3)]
    assert [record.message for record in caplog.records] == lines


def test_a_model_that_does_not_fit_runs_layer_by_layer_and_one_line_says_so(files, caplog, monkeypatch) -> None:
    file, caplog_lines = files["esm2kit"], lambda: [record.message for record in caplog.records]
    caplog.set_level("INFO", logger="esm2kit")
    needed = int(estimate_inference(CONFIG, InferenceSettings(tokens=1024)).total)
    assert needed > 4 * CONFIG.num_parameters
    for free, expected in ((needed * 2, Encoder), (needed, LayerwiseEncoder), (None, Encoder)):
        caplog.clear()
        monkeypatch.setattr(layerwise, "read_free_memory", lambda device, free=free: free)
        assert type(load_encoder(file)) is expected, free
        assert len(caplog_lines()) == (expected is LayerwiseEncoder)
        assert type(load_encoder(file, layer_by_layer=False)) is Encoder
        assert type(load_encoder(file, layer_by_layer=True)) is LayerwiseEncoder
    monkeypatch.setattr(layerwise, "read_free_memory", lambda device: needed)
    load_encoder(file)
    size = format_gib(needed)
    assert f"a takes about {size}, and {size} of memory are free on cpu: it runs layer by layer" in caplog_lines()[0]


MEASURE = """
import sys
import torch
from esm2kit.core.hardware import read_memory_use
from esm2kit.models.layerwise import LayerwiseEncoder, load_encoder
from esm2kit.models.load import find_model
torch.set_num_threads(1)
cpu = torch.device("cpu")
path, layer_by_layer = sys.argv[1:]
sizes = [52] * 40
tokens_N = torch.randint(4, 24, (sum(sizes),), generator=torch.Generator().manual_seed(0))
load_encoder(find_model(sys.argv[1].replace("large", "small")), layer_by_layer=True).encode(tokens_N, sizes, [1])
before = read_memory_use(cpu)
encoder = load_encoder(find_model(path), layer_by_layer=layer_by_layer == "true", batch_tokens=520, workers=2)
hidden = encoder.encode(tokens_N, sizes, [24])[24]
print(read_memory_use(cpu, peak=True) - before, float(hidden.double().abs().sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak memory from /proc")
def test_the_peak_memory_is_that_of_a_few_layers(tmp_path: Path) -> None:
    """24 layers of 512 dimensions are 303 MB in float32, and one layer is 13 MB."""
    config = ESM2Config(24, 512, 8)
    path = write_model(ESM2.initialised(config, 0), tmp_path / "large.safetensors")
    write_model(ESM2.initialised(ESM2Config(2, 512, 8), 0), tmp_path / "small.safetensors")
    peaks, sums = {}, {}
    for choice in ("true", "false"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), choice], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peaks[choice], sums[choice] = map(float, done.stdout.split())
    assert sums["true"] == pytest.approx(sums["false"], rel=1e-9)
    weights = 4 * config.num_parameters
    assert peaks["false"] > weights
    assert peaks["true"] < 0.4 * weights, f"{peaks['true'] / 1e6:.0f} MB of {weights / 1e6:.0f} MB"

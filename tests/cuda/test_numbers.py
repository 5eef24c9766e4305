"""The network on a device equals float64 on the CPU: encoder, batches, logits, contacts, gradients, every precision.

The bounds on a GPU are about three times what an H100 showed (docs/measured.md).
"""

import copy

import numpy as np
import pytest
import torch
from support.devices import CUDA, MPS, on_devices, relative_difference

from esm2kit.models.checkpoint import copy_to_host
from esm2kit.models.config import SIZES
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, Packed, tokenize
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX
from esm2kit.training.precision import precision_context

CONFIG = SIZES["esm2_t6_8M_UR50D"]
NUM_TOKENS = [3, 33, 33, 120, 260, 400]
# float32 and bfloat16 differ from float64 by at most this, relative to the largest value
BOUNDS = {"float32": 3e-6, "bfloat16": 3e-2}
GRADIENT_BOUNDS = {"32-true": 3e-6, "bf16-mixed": 3e-2, "bf16-true": 3e-2}


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.initialised(CONFIG, 0).eval()


@pytest.fixture(scope="module")
def tokens_N() -> torch.Tensor:
    generator = np.random.default_rng(0)
    parts = [np.r_[BOS_IDX, generator.integers(4, 24, count - 2), EOS_IDX] for count in NUM_TOKENS]
    return torch.from_numpy(np.concatenate(parts))


@pytest.fixture(scope="module")
def exact_ND(model: ESM2, tokens_N: torch.Tensor) -> torch.Tensor:
    """The last layer in float64 on the CPU."""
    with torch.inference_mode():
        return copy.deepcopy(model).double().encode(tokens_N, Packed(NUM_TOKENS))


@on_devices(MPS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_encoder_equals_float64(device: str, precision: str, model, tokens_N, exact_ND) -> None:
    if (device, precision) == ("mps", "bfloat16"):
        pytest.skip("bfloat16 is for CPUs and CUDA GPUs")
    encoder, last = Encoder(copy.deepcopy(model), precision, device), CONFIG.num_layers
    found_ND = encoder.encode(tokens_N, NUM_TOKENS, [last])[last]
    assert relative_difference(found_ND, exact_ND) < BOUNDS[precision] * (1 if device != "mps" else 10)
    rounded = relative_difference(exact_ND.bfloat16(), exact_ND)
    assert (relative_difference(found_ND, exact_ND) > rounded / 4) == (precision == "bfloat16"), "it is not float32"


@on_devices()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_protein_alone_and_in_a_batch(device: str, precision: str, model, tokens_N, exact_ND) -> None:
    encoder, last = Encoder(copy.deepcopy(model), precision, device), CONFIG.num_layers
    together_ND = encoder.encode(tokens_N, NUM_TOKENS, [last])[last].cpu()
    alone = [encoder.encode(part, [len(part)], [last])[last].cpu() for part in tokens_N.split(NUM_TOKENS)]
    difference = relative_difference(torch.cat(alone), together_ND)
    # bfloat16 was identical on an H100; products on the CPU may be divided differently
    assert difference <= (0 if (device, precision) == ("cuda", "bfloat16") else BOUNDS[precision])
    order = list(reversed(range(len(NUM_TOKENS))))
    turned = torch.cat([tokens_N.split(NUM_TOKENS)[place] for place in order])
    found = encoder.encode(turned, [NUM_TOKENS[place] for place in order], [last])[last].cpu()
    back = torch.cat(found.split([NUM_TOKENS[place] for place in order])[::-1])
    assert relative_difference(back, together_ND) <= BOUNDS[precision]


@on_devices(MPS)
def test_padded_logits_and_contacts_equal_float64(device: str, model: ESM2) -> None:
    generator = np.random.default_rng(1)
    proteins = ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), size)) for size in (12, 90, 55)]
    tokens_BT = tokenize(proteins)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(tokens_BT, return_contacts=True)
        found = copy.deepcopy(model).to(device)(tokens_BT.to(device), return_contacts=True)
    bound = 3e-6 if device != "mps" else 3e-5
    for name in ("logits", "contacts"):
        for place, protein in enumerate(proteins):
            rows = slice(0, len(protein) + (2 if name == "logits" else 0))
            part = found[name][place, rows] if name == "logits" else found[name][place, rows, rows]
            right = expected[name][place, rows] if name == "logits" else expected[name][place, rows, rows]
            assert relative_difference(part, right) < bound, name


def masked_loss(model: ESM2, tokens_N: torch.Tensor, device: str) -> torch.Tensor:
    rows_M = torch.arange(1, len(tokens_N), 7)
    hidden = tokens_N.clone()
    hidden[rows_M] = MASK_IDX
    packed = Packed(NUM_TOKENS, device)
    logits_MV = model.masked_logits(hidden.to(device), packed, rows_M.to(device))
    logits_MV = logits_MV.double() if logits_MV.dtype == torch.float64 else logits_MV.float()
    return torch.nn.functional.cross_entropy(logits_MV, tokens_N[rows_M].to(device))


@on_devices()
@pytest.mark.parametrize("precision", GRADIENT_BOUNDS)
def test_gradients_equal_float64(device: str, precision: str, model: ESM2, tokens_N: torch.Tensor) -> None:
    exact, trained = copy.deepcopy(model).double().train(), copy.deepcopy(model).to(device).train()
    masked_loss(exact, tokens_N, "cpu").backward()
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")
    with precision_context(trained, precision), autocast:
        masked_loss(trained, tokens_N, device).backward()
    found = {name: parameter.grad for name, parameter in trained.named_parameters() if parameter.grad is not None}
    expected = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    flat, right = (torch.cat([each[name].flatten().cpu().double() for name in expected]) for each in (found, expected))
    assert float((flat - right).norm() / right.norm()) < GRADIENT_BOUNDS[precision]


@pytest.mark.parametrize("device", [CUDA])
def test_compiled_layers_equal_the_others(device: str, model: ESM2, tokens_N: torch.Tensor) -> None:
    """On a CPU, tests/models/test_esm2.py compiles a layer."""
    plain, compiled = copy.deepcopy(model).to(device), copy.deepcopy(model).to(device)
    for layer in compiled.layers:
        layer.compile(dynamic=True)
    losses = [masked_loss(each, tokens_N, device) for each in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert relative_difference(losses[1], losses[0]) < 1e-5
    for one, two in zip(plain.layers.parameters(), compiled.layers.parameters(), strict=True):
        assert relative_difference(two.grad, one.grad) < 1e-4


@on_devices()
def test_a_snapshot_is_in_host_memory(device: str, model: ESM2) -> None:
    """On a GPU in pinned memory, complete when the function returns, and independent of later updates."""
    weights = {f"model.{name}": tensor.to(device, copy=True) for name, tensor in model.state_dict().items()}
    copies = copy_to_host(weights, {})
    for tensor in weights.values():
        tensor.zero_()
    expected = model.state_dict()
    assert copies.keys() == {f"model.{name}" for name in expected} - {"model.lm_head.weight"}
    for name, tensor in copies.items():
        assert torch.equal(tensor, expected[name.removeprefix("model.")]), name
        assert tensor.is_pinned() == (device == "cuda" and tensor.nbytes >= 1 << 20), name

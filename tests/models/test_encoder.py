"""The fast encoder equals fair-esm with the same random weights; results do not depend on the batch."""

import esm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.fair_esm import build_pair

from esm2kit.models import encoder as inference
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder, resolve_precision
from esm2kit.models.esm2 import ESM2
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX

SHAPES = [ESM2Config(2, 32, 4), ESM2Config(3, 120, 5), ESM2Config(2, 128, 2, token_dropout=False)]


def pair(config: ESM2Config, std: float = 0.03) -> tuple[Encoder, esm.ESM2]:
    model, reference = build_pair(config, std)
    return Encoder(model), reference


def random_tokens(num_tokens: list[int], seed: int = 0, mask_share: float = 0.0) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    sequences = []
    for count in num_tokens:
        tokens = generator.integers(4, 29, count)
        tokens[generator.random(count) < mask_share] = MASK_IDX
        tokens[0], tokens[-1] = BOS_IDX, EOS_IDX
        sequences.append(torch.from_numpy(tokens))
    return sequences


def encode(encoder: Encoder, sequences: list[torch.Tensor], layers: list[int]) -> list[dict[int, torch.Tensor]]:
    """Encode sequences in one batch and split the result."""
    num_tokens = [len(tokens) for tokens in sequences]
    found = encoder.encode(torch.cat(sequences), num_tokens, layers)
    parts = {layer: hidden_ND.split(num_tokens) for layer, hidden_ND in found.items()}
    return [{layer: parts[layer][index] for layer in layers} for index in range(len(sequences))]


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("mask_share", [0.0, 0.3])
def test_equals_fair_esm_at_every_layer(config: ESM2Config, mask_share: float) -> None:
    encoder, reference = pair(config)
    # below, at and above every threshold: runs of equal length, one block of heads, blocks of rows, SDPA
    num_tokens = [3, 3, 31, 32, 32, 33, 200, 600, inference.LONG_TOKENS - 1, inference.LONG_TOKENS, 1024]
    layers = list(range(config.num_layers + 1))
    sequences = random_tokens(num_tokens, mask_share=mask_share)
    for tokens, found in zip(sequences, encode(encoder, sequences, layers), strict=True):
        with torch.no_grad():
            expected = reference(tokens[None], repr_layers=layers)
        for layer in layers:
            torch.testing.assert_close(found[layer], expected["representations"][layer][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.logits(found[layers[-1]]), expected["logits"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_some_rows_equal_those_of_all_rows(config: ESM2Config) -> None:
    encoder, _ = pair(config, std=0.2)
    num_tokens = [3, 31, 40, 40, 200, inference.LONG_TOKENS]
    tokens_N = torch.cat(random_tokens(num_tokens, mask_share=0.2))
    last = config.num_layers
    whole_ND = encoder.encode(tokens_N, num_tokens, [last])[last]
    for rows in ([0], [5, 6, 7, 33], [80, 74, 113, 114, len(tokens_N) - 1], range(len(tokens_N))):
        rows_M = torch.tensor(sorted(rows))
        found_MD = encoder.encode_rows(tokens_N, num_tokens, rows_M)
        torch.testing.assert_close(found_MD, whole_ND[rows_M], atol=1e-5, rtol=1e-5)


def test_rotary_frequencies_are_loaded_from_the_model() -> None:
    # larger weights, so that attention depends on positions
    encoder, reference = pair(SHAPES[0], std=0.3)
    tokens = random_tokens([1000])[0]
    exact = encoder.encode(tokens, [1000], [2])[2]
    encoder.inv_freq_P = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    with torch.no_grad():
        expected = reference(tokens[None], repr_layers=[2])["representations"][2][0]
    assert (encoder.encode(tokens, [1000], [2])[2] - expected).abs().max() > 1e-3, "the test detects other frequencies"
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.lists(st.integers(3, 150) | st.integers(3, 40), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    cut=st.integers(1, 12),
)
def test_a_representation_does_not_depend_on_the_batch(num_tokens: list[int], order, cut: int) -> None:
    encoder, _ = pair(SHAPES[1])
    sequences = random_tokens(num_tokens, seed=len(num_tokens))
    alone = [encode(encoder, [tokens], [0, 2, 3])[0] for tokens in sequences]
    shuffled = list(range(len(sequences)))
    order.shuffle(shuffled)
    for start in range(0, len(shuffled), cut):
        group = shuffled[start : start + cut]
        for index, found in zip(group, encode(encoder, [sequences[i] for i in group], [0, 2, 3]), strict=True):
            for layer in (0, 2, 3):
                torch.testing.assert_close(found[layer], alone[index][layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("std", [2.0, 20.0])
def test_scores_too_large_for_the_fast_softmax_use_sdpa(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 60, 4, 8, generator=torch.Generator().manual_seed(0)).mul(std).unbind()
    out, fast = torch.empty(60, 4, 8), []
    original = inference._attend_sequence
    monkeypatch.setattr(inference, "_attend_sequence", lambda *views: fast.append(original(*views)) or fast[-1])
    inference._attend(query, key, value, out, 1, torch.empty(inference.SCORES_PER_BLOCK))
    scores = torch.einsum("qhk,nhk->hqn", query.double(), key.double()).softmax(-1)
    expected = torch.einsum("hqn,nhk->qhk", scores, value.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-4 * std, rtol=1e-4)
    assert fast == [std == 2.0], "the fast softmax is rejected if and only if exponentials overflow"


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.05), ("int8", 0.2)])
def test_approximate_precisions_stay_within_bounds(precision: str, bound: float) -> None:
    exact, _ = pair(SHAPES[1])
    approximate = Encoder(exact.model, precision)
    sequences = random_tokens([40, 90, 150])
    tokens, counts = torch.cat(sequences), [40, 90, 150]
    difference = (approximate.encode(tokens, counts, [3])[3] - exact.encode(tokens, counts, [3])[3]).abs()
    assert 1e-5 < difference.max() < bound


def test_int8_scales_each_row_separately() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(20, 32, generator=generator) * torch.logspace(-3, 3, 20)[:, None]
    linear = inference.LINEARS["int8"](weight, bias)
    together, exact = linear.multiply(x, torch.empty(20, 48)), x.double() @ weight.double().T
    alone = torch.cat([linear.multiply(row[None], torch.empty(1, 48)) for row in x])
    torch.testing.assert_close(together, alone, atol=0, rtol=0)
    residual = torch.ones(20, 48)
    linear.multiply_add(x, residual)
    torch.testing.assert_close(residual, together + 1)
    # half a quantisation step of input and weight, for a product of 32 terms
    bound = x.abs().amax(1, keepdim=True) * weight.abs().amax(1) * 32 / 127
    assert ((together - bias - exact).abs() < bound + 1e-4).all()


def test_int8_without_onednn_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = pair(SHAPES[0])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with refused("precision.missing", name="int8"):
        Encoder(exact.model, "int8")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_does_not_change_when_its_encoder_moves_to_a_gpu(precision: str, monkeypatch) -> None:
    """Fine-tuning trains the model afterwards: it must not be in bfloat16 then. The meta device stands for a GPU."""
    monkeypatch.setattr(inference, "resolve_precision", lambda requested, device: requested)
    model = ESM2.initialised(ESM2Config(2, 32, 4), 0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    encoder = Encoder(model, precision, "meta")
    assert dict(model.named_parameters()) == parameters, "the same objects, which an optimizer may hold"
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name
    moved = encoder.model.state_dict()
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    kept = {name for name, tensor in moved.items() if tensor.dtype != getattr(torch, precision)}
    assert kept == (set() if precision == "float32" else {name for name in moved if name.endswith("inv_freq")})
    shared = inference._share_tensors(model)
    assert shared.lm_head.weight is shared.embed_tokens.weight is not model.embed_tokens.weight
    assert shared.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr(), "no memory is needed"


def test_negative_layers_count_from_the_last() -> None:
    encoder, _ = pair(SHAPES[1])
    assert encoder.config.resolve_layers([-1, 0, -4, 2]) == [3, 0, 0, 2]
    for layer in (4, -5):
        with refused("model.layer", allowed=3):
            encoder.config.resolve_layers([layer])


def test_threads_do_not_share_buffers() -> None:
    from concurrent.futures import ThreadPoolExecutor

    encoder, _ = pair(SHAPES[0])
    sequences = random_tokens(list(range(3, 163)), seed=1)
    expected = [encode(encoder, [tokens], [2])[0][2] for tokens in sequences]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tokens: encode(encoder, [tokens], [2])[0][2], sequences))
    for hidden_ND, expected_ND in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden_ND, expected_ND, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "auto", "refuses"),
    [
        ("cpu", False, "float32", []),
        ("cuda", True, "bfloat16", ["int8"]),
        ("cuda:1", False, "float32", ["int8", "bfloat16"]),
        ("mps", False, "float32", ["int8", "bfloat16"]),
    ],
)
def test_auto_is_bfloat16_where_a_cuda_gpu_computes_in_it(
    device: str, has_bfloat16: bool, auto: str, refuses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_computes_bfloat16", lambda device: has_bfloat16)
    assert resolve_precision("auto", device) == auto
    for precision in ("float32", "bfloat16", "int8"):
        if precision in refuses:
            with refused("precision.device", name=precision, device=torch.device(device).type):
                resolve_precision(precision, device)
        else:
            assert resolve_precision(precision, device) == precision


def test_the_encoder_names_the_precision_that_auto_chose(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = pair(SHAPES[0])
    assert Encoder(exact.model, "auto").precision == "float32"
    with caplog.at_level("INFO", "esm2kit"):
        inference.log_precision("bfloat16", "bfloat16", "cuda")
        inference.log_precision("auto", "float32", "cpu")
        assert not caplog.messages, "what the user asked for, or what was always so, needs no line"
        monkeypatch.setattr(inference, "_computes_bfloat16", lambda device: True)
        inference.log_precision("auto", "bfloat16", "cuda")
    (line,) = caplog.messages
    assert "bfloat16" in line
    assert "--precision float32" in line


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no GPU of an Apple chip")
@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_mps_equals_the_cpu(config: ESM2Config) -> None:
    encoder, _ = pair(config)
    num_tokens, layers = [3, 3, 33, 200, 1024], list(range(config.num_layers + 1))
    sequences = random_tokens(num_tokens, mask_share=0.1)
    expected = encode(encoder, sequences, layers)
    on_gpu = Encoder(encoder.model, "auto", "mps")
    assert on_gpu.precision == "float32"
    for found, right in zip(encode(on_gpu, sequences, layers), expected, strict=True):
        for layer in layers:
            torch.testing.assert_close(found[layer], right[layer], atol=1e-4, rtol=1e-4)

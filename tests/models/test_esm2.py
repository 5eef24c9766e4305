"""ESM2 equals fair-esm with the same random weights, for all outputs, padded and packed."""

import esm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen

from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2, Packed, rotary_tables, rotate, tokenize
from esm2kit.models.packing import attention
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, PAD_IDX, RESIDUE_LETTERS, TOKENS, VOCAB_SIZE
from esm2kit.training.precision import precision_context

SHAPES = {"tiny": ESM2Config(2, 32, 4), "8M": SIZES["esm2_t6_8M_UR50D"], "35M": SIZES["esm2_t12_35M_UR50D"]}
# a shape unlike the published ones: narrow, with 12 channels per head
SHAPES["narrow"] = ESM2Config(5, 24, 2)


def pair(config: ESM2Config) -> tuple[ESM2, esm.ESM2]:
    """Build both models with the same random parameters, at the scale of initial weights.

    Biases and LayerNorms are random too, so that an omission shows. With larger weights the rounding errors of both
    models exceed 1e-5.
    """
    reference = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads, "ESM-1b", config.token_dropout)
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.02)
    model = ESM2(config)
    model.load_state_dict(reference.state_dict())
    return model.eval(), reference.eval()


def random_tokens(num_residues: list[int], seed: int, every_token: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    block_BT = torch.full((len(num_residues), max(num_residues) + 2), PAD_IDX)
    block_BT[:, 0] = BOS_IDX
    for tokens_T, count in zip(block_BT, num_residues, strict=True):
        tokens_T[1 : count + 1] = torch.randint(4, 29, (count,), generator=generator)
        is_mask = torch.rand(count, generator=generator) < 0.15
        tokens_T[1 : count + 1][is_mask] = MASK_IDX
        tokens_T[count + 1] = EOS_IDX
    if every_token:
        # all 33 tokens, with <pad>, <eos> and <cls> within the sequence
        block_BT[0, 3 : 3 + VOCAB_SIZE] = torch.arange(VOCAB_SIZE)
    return block_BT


def assert_same(found: dict, expected: dict) -> None:
    for layer, hidden_BTD in expected["representations"].items():
        torch.testing.assert_close(found["representations"][layer], hidden_BTD, atol=1e-5, rtol=1e-5)
    for name in ("logits", "attentions", "contacts"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_residues", [[60, 31, 7, 1], [1], [40, 40]], ids=str)
@torch.inference_mode()
def test_equals_fair_esm_padded(shape: str, num_residues: list[int]) -> None:
    model, reference = pair(SHAPES[shape])
    tokens_BT = random_tokens(num_residues, seed=1, every_token=num_residues[0] > 35)
    layers = range(SHAPES[shape].num_layers + 1)
    for contacts in (False, True):
        assert_same(
            model(tokens_BT, layers, return_contacts=contacts), reference(tokens_BT, layers, return_contacts=contacts)
        )


@torch.inference_mode()
def test_equals_fair_esm_at_1022_residues() -> None:
    model, reference = pair(SHAPES["8M"])
    tokens_BT = random_tokens([1022], seed=2, every_token=True)
    assert_same(model(tokens_BT, range(7), return_contacts=True), reference(tokens_BT, range(7), return_contacts=True))


@torch.inference_mode()
def test_without_token_dropout_equals_fair_esm() -> None:
    config = ESM2Config(2, 32, 4, token_dropout=False)
    model, reference = pair(config)
    tokens_BT = random_tokens([20, 9], seed=3)
    assert_same(model(tokens_BT, [0, 1, 2]), reference(tokens_BT, [0, 1, 2]))


@torch.inference_mode()
def test_rotary_frequencies_are_loaded_from_the_checkpoint() -> None:
    """Meta's checkpoints contain frequencies rounded to float16; exact ones give different results."""
    model, reference = pair(SHAPES["8M"])
    state = reference.state_dict()
    for name in state:
        if name.endswith("inv_freq"):
            state[name] = state[name].half().float()
    reference.load_state_dict(state)
    tokens_BT = random_tokens([400, 30], seed=6)
    exact = model(tokens_BT, [6])["representations"][6]
    model.load_state_dict(state)
    assert_same(model(tokens_BT, range(7), return_contacts=True), reference(tokens_BT, range(7), return_contacts=True))
    assert (model(tokens_BT, [6])["representations"][6] - exact).abs().max() > 1e-4
    inv_freq = model.layers[0].self_attn.rot_emb.inv_freq
    assert model.bfloat16().layers[0].self_attn.rot_emb.inv_freq is inv_freq


def test_gradients_equal_fair_esm() -> None:
    model, reference = pair(SHAPES["tiny"])
    tokens_BT = random_tokens([30, 11], seed=4)
    for each in (model, reference):
        logits = each(tokens_BT)["logits"]
        (logits[tokens_BT == MASK_IDX].logsumexp(-1).mean() + logits[0, 5:9, 3].sum()).backward()
    found, expected = (
        {name: parameter.grad for name, parameter in each.named_parameters() if parameter.grad is not None}
        for each in (model, reference)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_state_dict_equals_fair_esm() -> None:
    model, reference = pair(SHAPES["8M"])
    state = model.state_dict()
    assert list(state) == list(reference.state_dict())
    reference.load_state_dict(state, strict=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    inv_freq = reference.state_dict()["layers.0.self_attn.rot_emb.inv_freq"]
    torch.testing.assert_close(ESM2(SHAPES["8M"]).state_dict()["layers.0.self_attn.rot_emb.inv_freq"], inv_freq)


MODEL, _ = pair(SHAPES["tiny"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 99))
def test_packed_padded_and_single_sequences_are_equal(num_residues: list[int], seed: int) -> None:
    tokens_BT = random_tokens(num_residues, seed)
    packed = Packed([count + 2 for count in num_residues])
    tokens_N = tokens_BT[tokens_BT != PAD_IDX]
    with torch.inference_mode():
        padded = MODEL(tokens_BT, [0, 1, 2])["representations"]
        rows = MODEL.encode(tokens_N, packed, [0, 1, 2])
        for layer in (0, 1, 2):
            torch.testing.assert_close(rows[layer], padded[layer][tokens_BT != PAD_IDX], atol=1e-5, rtol=1e-5)
        alone = [MODEL(tokens_T[tokens_T != PAD_IDX][None], [2])["representations"][2][0] for tokens_T in tokens_BT]
    torch.testing.assert_close(rows[2], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_padded() -> None:
    tokens_BT = random_tokens([30, 11, 11, 1], seed=5)
    keep_BT = tokens_BT != PAD_IDX
    model, _ = pair(SHAPES["tiny"])
    model(tokens_BT, [2])["representations"][2][keep_BT].square().sum().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.encode(tokens_BT[keep_BT], Packed([32, 13, 13, 3])).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4)


def test_num_parameters_counts_trained_parameters() -> None:
    for config in (SHAPES["tiny"], SHAPES["8M"], SHAPES["35M"]):
        model = ESM2(config)
        contact = sum(parameter.numel() for parameter in model.contact_head.parameters())
        assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters()) - contact


def test_initial_weights_depend_only_on_the_seed() -> None:
    first, again, other = (ESM2.initialised(SHAPES["tiny"], seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.layers[0].fc1.weight, other.layers[0].fc1.weight)


def test_tokenize_equals_fair_esm() -> None:
    sequences = [RESIDUE_LETTERS, "MKT", "A"]
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    assert tuple(alphabet.all_toks) == TOKENS
    _, _, expected_BT = alphabet.get_batch_converter()([(str(i), sequence) for i, sequence in enumerate(sequences)])
    assert torch.equal(tokenize(sequences), expected_BT)


def test_invalid_input_is_rejected() -> None:
    with refused("model.heads", embed_dim=30, attention_heads=4):
        ESM2Config(2, 30, 4)
    with refused("model.shape"):
        ESM2Config(0, 32, 4)
    with refused("sequence.letter"):
        tokenize(["MKJ"])
    with refused("model.layer", found=[3], allowed=2):
        MODEL(tokenize(["MK"]), [3])


def test_bfloat16_attention_on_the_cpu_is_rounded_float32_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 37, 16).to(torch.bfloat16).requires_grad_() for _ in range(3))
    wide = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = attention(query, key, value)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.to(torch.bfloat16))
    (expected,) = torch.autograd.grad(wide.sum(), query)
    (found,) = torch.autograd.grad(narrow.float().sum(), query)
    assert torch.equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(3, 90), min_size=1, max_size=9))
def test_bucketed_rows_change_no_result(num_tokens: list[int]) -> None:
    model = ESM2.initialised(ESM2Config(2, 32, 4), 0)
    tokens_N = torch.randint(4, 33, (sum(num_tokens),), generator=torch.Generator().manual_seed(sum(num_tokens)))
    plain, bucketed = Packed(num_tokens), Packed(num_tokens, bucketed=True)
    assert bucketed.num_rows - plain.num_rows <= 0.032 * plain.num_rows
    results = []
    for packed in (plain, bucketed):
        hidden = model.encode(tokens_N, packed, repr_layers=(0, 1, 2))
        model.zero_grad()
        sum(layer.square().mean() for layer in hidden.values()).backward()
        results.append((hidden, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (hidden, grads), (hidden_bucketed, grads_bucketed) = results
    for layer in hidden:
        assert hidden_bucketed[layer].shape == hidden[layer].shape
        torch.testing.assert_close(hidden_bucketed[layer], hidden[layer], atol=1e-5, rtol=1e-5)
    for one, other in zip(grads, grads_bucketed, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)


def test_bucketing_leaves_few_sizes() -> None:
    assert len({Packed([count], bucketed=True).num_rows for count in range(4096, 8192)}) == 33
    assert all(Packed([count], bucketed=True).num_rows == count for count in range(1, 64))


def test_rotation_and_its_gradient() -> None:
    cos, sin = rotary_tables(torch.tensor([1.0, 0.1, 0.01]), 5)
    x = torch.randn(5, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = cos.double(), sin.double()
    as_complex = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((as_complex.real, as_complex.imag), -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, cos, sin), (x,))


@pytest.mark.parametrize("one_kernel", [True, False])
def test_a_layer_compiles_to_one_graph(one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one kernel for attention, as on a GPU; on a CPU the calls by length stay out of the graphs."""

    def attend(self: Packed, query_NHK: torch.Tensor, key_NHK: torch.Tensor, value_NHK: torch.Tensor) -> torch.Tensor:
        same_NN = self.sequence_N[:, None] == self.sequence_N
        query, key, value = (x.transpose(0, 1) for x in (query_NHK, key_NHK, value_NHK))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, same_NN).transpose(0, 1)

    layer = ESM2.initialised(SHAPES["tiny"], 0).layers[0]
    packed = Packed([9, 9, 5])
    cos, sin = (table[packed.position_N] for table in rotary_tables(layer.self_attn.rot_emb.inv_freq, 9))
    x_ND = torch.randn(packed.num_rows, 32, generator=torch.Generator().manual_seed(0))
    expected_ND = layer(x_ND, cos, sin, packed)
    if one_kernel:
        monkeypatch.setattr(Packed, "attend", attend)
    counter = CompileCounter()
    compiled = torch.compile(layer.forward, backend=counter, fullgraph=one_kernel)
    torch.testing.assert_close(compiled(x_ND, cos, sin, packed), expected_ND, atol=1e-5, rtol=1e-5)
    assert (counter.frame_count == 1) == one_kernel


@pytest.mark.parametrize(("channels", "calls"), [(8, 2), (256, 2), (4, 0), (12, 0), (264, 0)])
def test_a_gpu_update_runs_with_all_tensors_on_one_device(channels: int, calls: int, monkeypatch) -> None:
    """Uses the meta device, which rejects CPU tensors as a GPU does.

    The variable-length kernel requires 16-bit floats, heads of 8, 16, ... 256 channels, and int32 offsets.
    """
    kernel, calls_seen = varlen.varlen_attn, []

    def record_call(*arguments):
        calls_seen.append([part.dtype for part in arguments if torch.is_tensor(part)])
        return kernel(*arguments)

    monkeypatch.setattr(varlen, "varlen_attn", record_call)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    with torch.device("meta"):
        model = ESM2(ESM2Config(2, 2 * channels, 2))
    packed = Packed([20, 12, 30], "meta", bucketed=True)
    tokens_N, rows_M = torch.zeros(62, dtype=torch.long, device="meta"), torch.arange(5, device="meta")
    with precision_context(model, "bf16-true"):
        logits_MV = model.masked_logits(tokens_N, packed, rows_M)
        torch.nn.functional.cross_entropy(logits_MV.float(), rows_M, reduction="sum").backward()
    assert calls_seen == [[torch.bfloat16] * 3 + [torch.int32] * 2] * calls
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("contact_head")}

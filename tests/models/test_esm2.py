"""ESM2 against fair-esm's own, at equal random weights: every number it gives, padded and packed."""

import esm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

from esm2kit.core.errors import InputError
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2, Packed, rotary_tables, rotate, tokenize
from esm2kit.models.packing import attention
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, PAD_IDX, RESIDUE_LETTERS, TOKENS, VOCAB_SIZE
from esm2kit.training.precision import precision_context

SHAPES = {"tiny": ESM2Config(2, 32, 4), "8M": SIZES["esm2_t6_8M_UR50D"], "35M": SIZES["esm2_t12_35M_UR50D"]}
# heads of odd shares, deep and narrow: what the published sizes never ask for
SHAPES["narrow"] = ESM2Config(5, 24, 2)


def pair(config: ESM2Config) -> tuple[ESM2, esm.ESM2]:
    """Ours and fair-esm's with the same random weights, of the size that training starts from.

    Biases and LayerNorms are random too, so that nothing can be left out unseen. At larger weights both drift as far
    from the float64 answer, and from each other, as 1e-5 and more.
    """
    theirs = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads, "ESM-1b", config.token_dropout)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.02)
    ours = ESM2(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


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
        # all 33 in a row, <pad>, <eos> and <cls> in the middle included
        block_BT[0, 3 : 3 + VOCAB_SIZE] = torch.arange(VOCAB_SIZE)
    return block_BT


def assert_same(ours: dict, theirs: dict) -> None:
    for layer, expected in theirs["representations"].items():
        torch.testing.assert_close(ours["representations"][layer], expected, atol=1e-5, rtol=1e-5)
    for name in ("logits", "attentions", "contacts"):
        if name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_residues", [[60, 31, 7, 1], [1], [40, 40]], ids=str)
@torch.inference_mode()
def test_equals_fair_esm_padded(shape: str, num_residues: list[int]) -> None:
    ours, theirs = pair(SHAPES[shape])
    tokens_BT = random_tokens(num_residues, seed=1, every_token=num_residues[0] > 35)
    layers = range(SHAPES[shape].num_layers + 1)
    for contacts in (False, True):
        assert_same(
            ours(tokens_BT, layers, return_contacts=contacts), theirs(tokens_BT, layers, return_contacts=contacts)
        )


@torch.inference_mode()
def test_equals_fair_esm_at_1022_residues() -> None:
    ours, theirs = pair(SHAPES["8M"])
    tokens_BT = random_tokens([1022], seed=2, every_token=True)
    assert_same(ours(tokens_BT, range(7), return_contacts=True), theirs(tokens_BT, range(7), return_contacts=True))


@torch.inference_mode()
def test_without_token_dropout_equals_fair_esm() -> None:
    config = ESM2Config(2, 32, 4, token_dropout=False)
    ours, theirs = pair(config)
    tokens_BT = random_tokens([20, 9], seed=3)
    assert_same(ours(tokens_BT, [0, 1, 2]), theirs(tokens_BT, [0, 1, 2]))


@torch.inference_mode()
def test_rotary_frequencies_are_the_checkpoints_own() -> None:
    """Meta's checkpoints hold them rounded to float16; recomputing them would drift with the position."""
    ours, theirs = pair(SHAPES["8M"])
    state = theirs.state_dict()
    for name in state:
        if name.endswith("inv_freq"):
            state[name] = state[name].half().float()
    theirs.load_state_dict(state)
    tokens_BT = random_tokens([400, 30], seed=6)
    exact = ours(tokens_BT, [6])["representations"][6]
    ours.load_state_dict(state)
    assert_same(ours(tokens_BT, range(7), return_contacts=True), theirs(tokens_BT, range(7), return_contacts=True))
    assert (ours(tokens_BT, [6])["representations"][6] - exact).abs().max() > 1e-4
    kept = ours.layers[0].self_attn.rot_emb.inv_freq
    assert ours.bfloat16().layers[0].self_attn.rot_emb.inv_freq is kept


def test_gradients_equal_fair_esm() -> None:
    ours, theirs = pair(SHAPES["tiny"])
    tokens_BT = random_tokens([30, 11], seed=4)
    for model in (ours, theirs):
        logits = model(tokens_BT)["logits"]
        (logits[tokens_BT == MASK_IDX].logsumexp(-1).mean() + logits[0, 5:9, 3].sum()).backward()
    found, expected = (
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        for model in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_state_dict_is_fair_esms() -> None:
    ours, theirs = pair(SHAPES["8M"])
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    inv_freq = theirs.state_dict()["layers.0.self_attn.rot_emb.inv_freq"]
    torch.testing.assert_close(ESM2(SHAPES["8M"]).state_dict()["layers.0.self_attn.rot_emb.inv_freq"], inv_freq)


MODEL, _ = pair(SHAPES["tiny"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 99))
def test_packed_equals_padded_equals_alone(num_residues: list[int], seed: int) -> None:
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


def test_num_parameters_counts_what_trains() -> None:
    for config in (SHAPES["tiny"], SHAPES["8M"], SHAPES["35M"]):
        model = ESM2(config)
        contact = sum(parameter.numel() for parameter in model.contact_head.parameters())
        assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters()) - contact


def test_initialised_is_a_function_of_the_seed() -> None:
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ESM2Config(2, 30, 4), "does not divide into 4 heads"),
        (lambda: ESM2Config(0, 32, 4), "must be 1 or more"),
        (lambda: tokenize(["MKJ"]), "letter 'J' at residue 3"),
        (lambda: MODEL(tokenize(["MK"]), [3]), "layers 0 to 2"),
    ],
)
def test_bad_input_is_one_clear_line(make, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_attention_in_bfloat16_on_the_cpu_is_float32s_rounded_once() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 37, 16).to(torch.bfloat16).requires_grad_() for _ in range(3))
    wide = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = attention(query, key, value)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.to(torch.bfloat16))
    (wanted,) = torch.autograd.grad(wide.sum(), query)
    (found,) = torch.autograd.grad(narrow.float().sum(), query)
    assert torch.equal(found, wanted)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(3, 90), min_size=1, max_size=9))
def test_rows_that_recur_change_no_number(num_tokens: list[int]) -> None:
    model = ESM2.initialised(ESM2Config(2, 32, 4), 0)
    tokens_N = torch.randint(4, 33, (sum(num_tokens),), generator=torch.Generator().manual_seed(sum(num_tokens)))
    plain, filled = Packed(num_tokens), Packed(num_tokens, bucketed=True)
    assert filled.num_rows - plain.num_rows <= 0.032 * plain.num_rows
    results = []
    for packed in (plain, filled):
        hidden = model.encode(tokens_N, packed, repr_layers=(0, 1, 2))
        model.zero_grad()
        sum(layer.square().mean() for layer in hidden.values()).backward()
        results.append((hidden, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (hidden, grads), (hidden_filled, grads_filled) = results
    for layer in hidden:
        assert hidden_filled[layer].shape == hidden[layer].shape
        torch.testing.assert_close(hidden_filled[layer], hidden[layer], atol=1e-5, rtol=1e-5)
    for one, other in zip(grads, grads_filled, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)


def test_few_numbers_of_rows_occur() -> None:
    assert len({Packed([count], bucketed=True).num_rows for count in range(4096, 8192)}) == 33
    assert all(Packed([count], bucketed=True).num_rows == count for count in range(1, 64))


def test_rotary_turn_and_its_gradient() -> None:
    cos, sin = rotary_tables(torch.tensor([1.0, 0.1, 0.01]), 5)
    x = torch.randn(5, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = cos.double(), sin.double()
    as_complex = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((as_complex.real, as_complex.imag), -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_a_layer_compiles_into_one_graph() -> None:
    """On a GPU the pieces between two graphs cost what compiling is to win."""
    layer = ESM2.initialised(SHAPES["tiny"], 0).layers[0]
    packed = Packed([9, 9, 5])
    cos, sin = (table[packed.position_N] for table in rotary_tables(layer.self_attn.rot_emb.inv_freq, 9))
    x_ND = torch.randn(packed.num_rows, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_ND, cos, sin, packed), layer(x_ND, cos, sin, packed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("channels", "calls"), [(8, 2), (256, 2), (4, 0), (12, 0), (264, 0)])
def test_a_gpus_update_leaves_no_tensor_behind(channels: int, calls: int, monkeypatch) -> None:
    """On torch's device of shapes alone, which refuses a tensor of the CPU's as a GPU does.

    The kernel for sequences end to end takes 16-bit floats in heads of 8, 16, ... 256 channels, and int32 offsets.
    """
    kernel, taken = varlen.varlen_attn, []

    def noted(*arguments):
        taken.append([part.dtype for part in arguments if torch.is_tensor(part)])
        return kernel(*arguments)

    monkeypatch.setattr(varlen, "varlen_attn", noted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    with torch.device("meta"):
        model = ESM2(ESM2Config(2, 2 * channels, 2))
    packed = Packed([20, 12, 30], "meta", bucketed=True)
    tokens_N, rows_M = torch.zeros(62, dtype=torch.long, device="meta"), torch.arange(5, device="meta")
    with precision_context(model, "bf16-true"):
        logits_MV = model.masked_logits(tokens_N, packed, rows_M)
        torch.nn.functional.cross_entropy(logits_MV.float(), rows_M, reduction="sum").backward()
    assert taken == [[torch.bfloat16] * 3 + [torch.int32] * 2] * calls
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("contact_head")}

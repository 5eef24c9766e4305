"""LoRA adapters start at the base model, merge with equal outputs, train alone, and are checked against the base."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.finetune_fixtures import SHAPE, write_tasks, write_tiny_model

from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.heads import HeadSpec, LabelModel
from esm2kit.finetuning.model_file import load_finetuned
from esm2kit.finetuning.module import freeze_parameters
from esm2kit.models.checkpoint import read_checkpoint, read_metadata
from esm2kit.models.config import LORA_TARGETS, SIZES, ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, Packed, tokenize
from esm2kit.models.load import load_model
from esm2kit.models.lora import LoraLinear, add_lora, list_adapters, load_adapters, merge_lora, weights_sha256

SEQUENCES = ["MKTLLVAGG", "ACDEFGHIKLMNPQRSTVWY", "MA"]


def adapted(seed: int = 0, **given: object) -> ESM2:
    """Build an ESM-2 whose adapters are not zero."""
    esm2 = add_lora(ESM2.initialised(SHAPE, seed), given.pop("rank", 4), given.pop("alpha", 8.0), **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in esm2.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return esm2.eval()


def rows(esm2: ESM2) -> torch.Tensor:
    tokens = tokenize(SEQUENCES)
    counts = [len(sequence) + 2 for sequence in SEQUENCES]
    packed = torch.cat([tokens_T[:count] for tokens_T, count in zip(tokens, counts, strict=True)])
    with torch.no_grad():
        return esm2.encode(packed, Packed(counts))


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 8),
    st.floats(2, 16),
    st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True),
)
def test_merged_equals_unmerged(rank, alpha, targets) -> None:
    esm2, base = adapted(rank=rank, alpha=alpha, targets=targets), ESM2.initialised(SHAPE, 0)
    before = rows(esm2)
    assert (before - rows(base)).abs().max() > 1e-3
    merged = merge_lora(esm2)
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(rows(merged), before, rtol=1e-5, atol=1e-5)


def test_new_adapters_change_nothing_and_trained_ones_follow_the_formula() -> None:
    base, esm2 = ESM2.initialised(SHAPE, 0), add_lora(ESM2.initialised(SHAPE, 0), 4, 8.0)
    torch.testing.assert_close(rows(esm2), rows(base), rtol=0, atol=0)
    layer = adapted().layers[0].fc1
    x = torch.randn(5, SHAPE.embed_dim)
    expected = x @ (layer.weight + 8.0 / 4 * layer.lora_b @ layer.lora_a).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_head_and_adapters_of_the_same_seed_are_independent() -> None:
    head = LabelModel(None, HeadSpec("fnn", "protein", 32, 1, 32, 0.0, False), seed=5).head.weight_in.flatten()
    first = add_lora(ESM2.initialised(SHAPE, 0), 8, 8.0, seed=5).layers[0].self_attn.k_proj.lora_a.flatten()
    assert abs(torch.corrcoef(torch.stack([head[: len(first)], first]))[0, 1]) < 0.2


def test_only_adapters_and_head_have_gradients() -> None:
    model = LabelModel(add_lora(ESM2.initialised(SHAPE, 0), 2, 4.0), HeadSpec("fnn", "protein", 32, 1, 8, 0.0, False))
    freeze_parameters(model, FinetuneConfig(mode="lora"))
    tokens = torch.randint(4, 24, (24,))
    model(tokens, [10, 14], torch.tensor([1, 2])).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {
        name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("head.")
    }
    assert len([name for name in with_gradient if "lora_" in name]) == 2 * len(LORA_TARGETS) * SHAPE.num_layers


def test_biases_are_trained_on_request() -> None:
    esm2 = add_lora(ESM2.initialised(SHAPE, 0), 2, 4.0, ["q_proj"], biases=True)
    kinds = {name.rpartition(".")[2] for name in list_adapters(esm2)}
    assert kinds == {"lora_a", "lora_b", "bias"}
    assert "layers.1.final_layer_norm.bias" in set(list_adapters(esm2))


def test_adapters_of_the_650m_model_are_a_few_megabytes() -> None:
    """Rank 4 for all six matrices, in float32."""
    with torch.device("meta"):
        esm2 = ESM2(SIZES["esm2_t33_650M_UR50D"])
    numbers = sum(4 * (module.in_features + module.out_features) for module in _linears(esm2))
    assert numbers * 4 / 1e6 == pytest.approx(12.2, abs=0.1)


def _linears(esm2: ESM2) -> list[torch.nn.Linear]:
    return [module for layer in esm2.layers for module in layer.modules() if isinstance(module, torch.nn.Linear)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny, tasks = write_tiny_model(folder / "tiny.safetensors"), write_tasks(folder / "tasks")
    config = FinetuneConfig(
        task="protein_value",
        data_dir=tasks,
        model=str(tiny),
        out_dir=folder / "run",
        mode="lora",
        lora_biases=True,
        merge=True,
        lr=1e-2,
        max_steps=12,
        accelerator="cpu",
        benchmark=False,
        resamples=100,
    )
    finetune(config)
    return folder


def test_adapters_are_saved_without_the_base_and_reload_on_it(trained) -> None:
    path = trained / "run" / "finetuned.safetensors"
    tensors, metadata = read_checkpoint(path)
    assert {name.split(".")[0] for name in tensors} == {"adapter", "head"}
    assert not any(name.endswith("proj.weight") for name in tensors)
    base, _ = load_model(str(trained / "tiny.safetensors"))
    assert metadata["finetune"]["base"]["sha256"] == weights_sha256(base)
    esm2 = add_lora(base, 8, 16.0, biases=True)
    load_adapters(esm2, {n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}, "x")
    encoder = Encoder(load_finetuned(path).esm2)
    counts = [len(sequence) + 2 for sequence in SEQUENCES]
    packed = torch.cat([row[:count] for row, count in zip(tokenize(SEQUENCES), counts, strict=True)])
    found = encoder.encode(packed, counts, [SHAPE.num_layers])[SHAPE.num_layers]
    torch.testing.assert_close(found, rows(esm2.eval()), rtol=1e-5, atol=1e-5)


def test_another_base_is_rejected(trained, tmp_path) -> None:
    other = write_tiny_model(tmp_path / "other.safetensors", seed=1)
    with refused("lora.other-base"):
        load_finetuned(trained / "run", base=str(other))
    moved = write_tiny_model(tmp_path / "moved.safetensors")  # the same weights in another file are the same base
    load_finetuned(trained / "run", base=str(moved))


def test_a_file_with_only_adapters_is_not_a_model(trained) -> None:
    with refused("checkpoint.adapters-only"):
        load_model(str(trained / "run" / "finetuned.safetensors"))


def test_a_merged_file_does_not_require_the_base(trained) -> None:
    adapted, merged = (load_finetuned(trained / "run" / f"{name}.safetensors") for name in ("finetuned", "merged"))
    for found, expected in zip(merged.outputs(SEQUENCES), adapted.outputs(SEQUENCES), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    with refused("finetuned.base-unused"):
        load_finetuned(trained / "run" / "merged.safetensors", base=str(trained / "tiny.safetensors"))
    esm2, _ = load_model(str(trained / "run" / "merged.safetensors"))
    torch.testing.assert_close(rows(esm2), rows(adapted.esm2), rtol=1e-5, atol=1e-5)


def test_checkpoints_do_not_contain_the_base(trained) -> None:
    last = trained / "run" / "checkpoints" / "last.safetensors"
    names = read_checkpoint(last)[0].keys()
    assert {name.split(".")[0] for name in names} == {"adapter", "head", "optimizer"}
    assert read_metadata(last)["finetune"]["lora"]["rank"] == 8
    assert json.dumps(read_metadata(last)["finetune"]["task"]["name"]) == '"protein_value"'


@pytest.mark.parametrize(("rank", "targets"), [(0, ["fc1"]), (2, []), (2, ["fc9"])])
def test_invalid_settings_are_rejected(rank, targets) -> None:
    with refused("lora.settings"):
        add_lora(ESM2.initialised(SHAPE, 0), rank, 1.0, targets)


def test_adapters_of_another_rank_are_rejected() -> None:
    state = {name: parameter.detach() for name, parameter in adapted(rank=2).named_parameters() if "lora" in name}
    with refused("checkpoint.tensor", name="layers.0.fc1.lora_a"):
        load_adapters(add_lora(ESM2.initialised(SHAPE, 0), 4, 8.0), state, "file")


def test_the_digest_depends_on_the_weights_only() -> None:
    esm2 = ESM2.initialised(SHAPE, 0)
    digest = weights_sha256(esm2)
    assert digest == weights_sha256(add_lora(ESM2.initialised(SHAPE, 0), 2, 4.0))
    with torch.no_grad():
        esm2.layers[1].fc2.bias[0] += 1e-6
    assert digest != weights_sha256(esm2)
    assert digest != weights_sha256(ESM2.initialised(ESM2Config(2, 32, 2), 1))


def test_matrix_a_has_the_distribution_of_torch_linear_layers() -> None:
    sample = add_lora(ESM2.initialised(SHAPE, 0), 64, 8.0, seed=2).layers[0].fc2.lora_a
    assert sample.abs().max() <= 1 / math.sqrt(sample.shape[1])
    assert sample.std().item() == pytest.approx(1 / math.sqrt(3 * sample.shape[1]), rel=0.03)
    again = add_lora(ESM2.initialised(SHAPE, 0), 64, 8.0, seed=2).layers[0].fc2.lora_a
    assert torch.equal(sample, again)

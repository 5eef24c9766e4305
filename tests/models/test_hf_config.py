"""Every field of transformers' EsmConfig: equal numbers, or a refusal that names the field."""

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.errors import refused
from transformers import EsmConfig, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm2kit.core.errors import InputError
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.models.formats.hf_config import (
    FIXED_FIELDS,
    READ_FIELDS,
    UNUSED_FIELDS,
    build_hf_config,
    parse_hf_config,
)
from esm2kit.models.load import load_model
from esm2kit.sequences.alphabet import PAD_IDX, RESIDUE_LETTERS, TOKENS

# `ESM2KIT_HF_CONFIG_DRAWS=200` runs more configurations than the suite does.
DRAWS = int(os.environ.get("ESM2KIT_HF_CONFIG_DRAWS", "40"))
BASE = build_hf_config(ESM2Config(2, 16, 2))
FIELDS = [field.name for field in dataclasses.fields(EsmConfig)]
# Values to draw for every field. The first is usual; a tuple of one value has no other that transformers accepts.
VALUES: dict[str, tuple[Any, ...]] = {
    "transformers_version": ("5.23.0", "4.40.0"),
    "architectures": (["EsmForMaskedLM"], None, ["EsmModel"]),
    "output_hidden_states": (False, True),
    "return_dict": (True,),
    "dtype": ("float32", "float16", "bfloat16", None),
    "chunk_size_feed_forward": (0, 4),
    "is_encoder_decoder": (False, True),
    "id2label": ({0: "a", 1: "b"}, {0: "a"}, {0: "a", 1: "b", 2: "c"}),
    "label2id": ({"a": 0, "b": 1}, {"a": 0}),
    "problem_type": (None, "regression", "single_label_classification"),
    "vocab_size": (33, 34, 64),
    "mask_token_id": (32, 31, 5, None),
    "pad_token_id": (1, 0, 20, None),
    "hidden_size": (16, 24, 32, 18),
    "num_hidden_layers": (2, 1, 3),
    "num_attention_heads": (2, 4, 1),
    "intermediate_size": (None, 40),
    "hidden_dropout_prob": (0.0, 0.1, 0.5),
    "attention_probs_dropout_prob": (0.0, 0.1, 0.5),
    "max_position_embeddings": (1026, 32, 2050),
    "rope_theta": (10000.0, 500.0, 1e6),
    "initializer_range": (0.02, 0.5),
    "layer_norm_eps": (1e-5, 1e-12, 1e-3, 0.5),
    "position_embedding_type": ("rotary", "absolute", None),
    "use_cache": (True, False),
    "emb_layer_norm_before": (False, None, True),
    "token_dropout": (True, False, None),
    "is_folding_model": (False, None),
    "esmfold_config": (None,),
    "vocab_list": (None, list(TOKENS), list(TOKENS[::-1])),
    "is_decoder": (False, True),
    "add_cross_attention": (False, True),
    "tie_word_embeddings": (True, False),
    "bos_token_id": (None, 0, 3),
    "eos_token_id": (2, None, 7),
}
CLASSES = (EsmForMaskedLM, EsmModel, EsmForSequenceClassification, EsmForTokenClassification)


def test_every_field_of_transformers_is_read_or_fixed_or_without_effect() -> None:
    tables = (set(READ_FIELDS), set(FIXED_FIELDS), set(UNUSED_FIELDS))
    known = set.union(*tables)
    assert sum(map(len, tables)) == len(known), "a field is in two tables"
    written = set(FIELDS) | EsmConfig(vocab_size=33).to_dict().keys()
    assert not written - known, "decide whether these fields of transformers change the numbers"
    assert set(VALUES) == set(FIELDS), "the random configurations must cover every field"
    defaults = EsmConfig(vocab_size=33).to_dict()
    assert {name: defaults[name] for name in READ_FIELDS} == READ_FIELDS, "a missing field has transformers' default"


def draw_fields(generator: random.Random) -> dict[str, Any]:
    """Draw all fields: most are usual, and in half of the configurations all that must be are."""
    share = generator.choice([0.03, 0.3])
    fields = {}
    for name, values in VALUES.items():
        harmless = name in UNUSED_FIELDS or name in READ_FIELDS
        change = generator.random() < (0.5 if harmless else share)
        fields[name] = generator.choice(values) if change else values[0]
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    return fields


def build(fields: dict[str, Any], kind: type, folder: Path, seed: int) -> None:
    """Save a model of transformers with random weights, biases and LayerNorm parameters included."""
    torch.manual_seed(seed)
    model = kind(EsmConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rotary" not in name:
                parameter.normal_(mean=float("orm." in name and "weight" in name), std=0.3)
    model.to(getattr(torch, fields["dtype"] or "float32")).save_pretrained(folder)


def refused_field(folder: Path) -> str | None:
    """Return the field that the refusal of a model names, or None for a model that loads."""
    try:
        load_model(folder)
    except InputError as error:
        return "hidden_size" if error.code == "model.heads" else error.values.get("name", error.code)
    return None


def worst_difference(folder: Path, kind: type) -> float:
    """Compare the vectors, and the logits of an LM head, with transformers in float32."""
    model, _ = load_model(folder)
    reference = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokens_BT = tokenize([RESIDUE_LETTERS, "MKTAYL", "G"])
    tokens_BT[0, 3] = TOKENS.index("<mask>")
    real_BT = tokens_BT.ne(PAD_IDX)
    with torch.inference_mode():
        found = reference(tokens_BT, attention_mask=real_BT.long(), output_hidden_states=True)
        ours = model(tokens_BT, [model.config.num_layers])
    hidden_BTD = ours["representations"][model.config.num_layers]
    pairs = [(hidden_BTD, found.hidden_states[-1])]
    if kind is EsmForMaskedLM and model.config.lm_head:
        pairs.append((ours["logits"], found.logits))
    packed = Encoder(model).encode(tokens_BT[real_BT], real_BT.sum(1).tolist(), [model.config.num_layers])
    pairs.append((packed[model.config.num_layers], found.hidden_states[-1][real_BT]))
    worst = 0.0
    for one, other in pairs:
        keep = real_BT if one.ndim == 3 else torch.ones(len(one), dtype=torch.bool)
        scale = max(1.0, other[keep].abs().max().item())
        worst = max(worst, (one[keep] - other[keep]).abs().max().item() / scale)
    return worst


def test_drawn_configurations_give_equal_numbers_or_a_refusal_that_names_the_field(tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    generator, counts, worst = random.Random(15), {"equal": 0, "refused": 0, "transformers": 0}, 0.0
    for draw in range(DRAWS):
        fields, kind, folder = draw_fields(generator), generator.choice(CLASSES), tmp_path / str(draw)
        usual = {name: values[0] for name, values in VALUES.items()} | {"intermediate_size": 4 * fields["hidden_size"]}
        unusual = {name for name in FIELDS if fields[name] != usual[name]}
        try:
            build(fields, kind, folder, draw)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # such as cross attention without decoder
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({"model_type": "esm"} | fields))
            assert refused_field(folder) in unusual | {"checkpoint.no-weights"}, fields
            counts["transformers"] += 1
            continue
        if name := refused_field(folder):
            assert name in unusual, f"draw {draw}: {name} is usual, {fields}"
            counts["refused"] += 1
            continue
        difference = worst_difference(folder, kind)
        assert difference < 1e-5, f"draw {draw} differs by {difference}: {kind.__name__} {fields}"
        counts["equal"] += 1
        worst = max(worst, difference)
    print(f"{DRAWS} configurations: {counts}, largest relative difference {worst:.1e}")
    assert min(counts["equal"], counts["refused"]) >= DRAWS // 5, counts


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in FIXED_FIELDS for value in ("other", 5, True) if name not in ("model_type",)],
)
def test_a_fixed_field_with_another_value_is_refused_by_name(name: str, value: object) -> None:
    with refused("checkpoint.not-esm2", name=name, found=value):
        parse_hf_config(BASE | {name: value}, "config.json")


def test_missing_fields_have_the_defaults_of_transformers() -> None:
    shape = {"model_type": "esm", "vocab_size": 33, "position_embedding_type": "rotary"}
    found = parse_hf_config(shape, "config.json").model
    assert found == ESM2Config(12, 768, 12, token_dropout=False, layer_norm_eps=1e-12)
    with refused("checkpoint.not-esm2", name="position_embedding_type", found="absolute"):
        parse_hf_config({"model_type": "esm", "vocab_size": 33}, "config.json")


@pytest.mark.parametrize("value", ["16", 16.0, None, [16]])
def test_a_field_of_the_wrong_type_is_refused_by_name(value: object) -> None:
    with refused("checkpoint.not-esm2", name="hidden_size", found=value):
        parse_hf_config(BASE | {"hidden_size": value}, "config.json")


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_layer_norm_eps_must_be_positive(eps: float) -> None:
    with refused("model.layer-norm-eps"):
        parse_hf_config(BASE | {"layer_norm_eps": eps}, "config.json")


def test_an_unknown_field_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_hf_config(BASE | {"my_note": "x"}, "config.json").model == ESM2Config(2, 16, 2)
    assert "my_note" in caplog.text
    caplog.clear()
    parse_hf_config(EsmConfig(**BASE).to_dict(), "config.json")
    assert not caplog.records, "a plain configuration of transformers logs nothing"


def test_layer_norm_eps_is_kept_in_checkpoints_and_exports(tmp_path: Path) -> None:
    from esm2kit.models.checkpoint import write_checkpoint
    from esm2kit.models.formats.fair_esm import save_fair_esm
    from esm2kit.models.formats.huggingface import save_hf

    model = ESM2.initialised(ESM2Config(2, 16, 2, layer_norm_eps=0.1), seed=0).eval()
    usual = ESM2.initialised(ESM2Config(2, 16, 2), seed=0).eval()
    save_hf(model, tmp_path / "hf")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "own.safetensors", state, {"model": model.config})
    tokens_BT = tokenize([RESIDUE_LETTERS])
    expected = model(tokens_BT)["logits"].detach().numpy()
    assert np.abs(expected - usual(tokens_BT)["logits"].detach().numpy()).max() > 0.01
    for path in (tmp_path / "hf", tmp_path / "own.safetensors"):
        loaded, source = load_model(path)
        assert loaded.config.layer_norm_eps == 0.1
        np.testing.assert_array_equal(loaded(tokens_BT)["logits"].detach().numpy(), expected)
        untrained, other = load_model(path, untrained_seed=0)
        np.testing.assert_array_equal(untrained(tokens_BT)["logits"].detach().numpy(), expected)
    with refused("export.layer-norm-eps", found=0.1):
        save_fair_esm(model, tmp_path / "esm2_a.pt")
    # the digest tells apart two folders with the same tensors and another eps
    save_hf(usual, tmp_path / "usual")
    assert load_model(tmp_path / "usual")[1].sha256 != load_model(tmp_path / "hf")[1].sha256
    assert load_model(tmp_path / "usual", 0)[1].sha256 != other.sha256 != source.sha256

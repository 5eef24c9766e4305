"""Models as users report them: encoders without LM head, adapters, wrappers' names, git-lfs pointers.

Sources: huggingface/transformers#709, #585, #39063, #8497; huggingface/peft#309;
RSchmirler/data-repo_plm-finetune-eval#4; Synthyra/FastPLMs#3.
"""

import json
from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import refused
from transformers import AutoModel, EsmConfig, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.config import ESM2Config, ExportConfig
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.models.export import export
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.load import load_model
from esm2kit.models.masked_scores import compute_masked_log_probs
from esm2kit.sequences.alphabet import RESIDUE_LETTERS

CONFIG = ESM2Config(2, 32, 4)
SEQUENCE = f"M{RESIDUE_LETTERS}"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 31356616\n"


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.initialised(CONFIG, seed=3).eval()


@torch.inference_mode()
def vectors(model: ESM2) -> np.ndarray:
    return model(tokenize([SEQUENCE]), [2])["representations"][2][0].numpy()


def assert_same_vectors(path: Path, model: ESM2, lm_head: bool = True) -> None:
    loaded, _ = load_model(path)
    assert loaded.config.lm_head is lm_head
    np.testing.assert_array_equal(vectors(loaded), vectors(model))
    if lm_head:
        tokens_BT = tokenize([SEQUENCE])
        assert torch.equal(loaded(tokens_BT)["logits"], model(tokens_BT)["logits"])


@pytest.mark.parametrize("kind", [EsmModel, EsmForSequenceClassification, EsmForTokenClassification])
def test_encoders_without_lm_head_are_embedded_and_logits_are_refused(tmp_path: Path, kind: type) -> None:
    torch.manual_seed(0)
    reference = kind(EsmConfig(**build_hf_config(CONFIG) | {"layer_norm_eps": 1e-3}, num_labels=3)).eval()
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "in.fasta").write_text(f">a\n{SEQUENCE}\n")
    settings = {"device": "cpu", "workers": 1, "per_residue": True}
    embed(EmbedConfig(tmp_path / "in.fasta", tmp_path / "out", model=str(tmp_path / "hf"), **settings))
    with torch.inference_mode():
        states = reference(tokenize([SEQUENCE]), output_hidden_states=True).hidden_states
    with EmbeddingReader(tmp_path / "out" / "in_hiddens.h5") as reader:
        np.testing.assert_allclose(reader["a"], states[-1][0, 1:-1].numpy(), atol=1e-5)
    loaded, _ = load_model(tmp_path / "hf")
    with refused("model.no-lm-head"):
        compute_masked_log_probs(loaded, SEQUENCE)
    with refused("model.no-lm-head"):
        embed(
            EmbedConfig(tmp_path / "in.fasta", tmp_path / "out2", model=str(tmp_path / "hf"), logits=True, **settings)
        )
    assert not list((tmp_path / "out2").glob("*")), "refused before any work"
    with refused("model.no-lm-head"):
        export(ExportConfig(str(tmp_path / "hf"), tmp_path / "esm2_a.pt", "fair-esm"))
    export(ExportConfig(str(tmp_path / "hf"), tmp_path / "again"))
    assert_same_vectors(tmp_path / "again", loaded, lm_head=False)
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        found = again(tokenize([SEQUENCE])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(found, vectors(loaded), atol=1e-5)
    # a model with part of its LM head is damaged, not an encoder
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(state | {"lm_head.bias": torch.zeros(33)}, tmp_path / "hf" / "model.safetensors")
    with refused("checkpoint.tensor"):
        load_model(tmp_path / "hf")


def test_old_tensors_of_the_hub_do_not_matter(tmp_path: Path, model: ESM2) -> None:
    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {
        "esm.embeddings.position_embeddings.weight": torch.ones(1026, 32),
        "esm.embeddings.position_ids": torch.arange(1026)[None],
        "esm.pooler.dense.weight": torch.ones(32, 32),
        "esm.pooler.dense.bias": torch.ones(32),
    }
    save_file(state, tmp_path / "model.safetensors")
    assert_same_vectors(tmp_path, model)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model._orig_mod.", "module.model.net."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_names_of_wrappers_are_read(tmp_path: Path, model: ESM2, prefix: str, key: str | None) -> None:
    def wrap(state: dict) -> dict:
        named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        return named if key is None else {key: named, "epoch": 3}

    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(wrap(state), tmp_path / "pytorch_model.bin")
    assert_same_vectors(tmp_path, model)
    # the same with fair-esm's names, whose settings follow from the shapes
    torch.save(wrap(model.state_dict()), tmp_path / "last.ckpt")
    assert_same_vectors(tmp_path / "last.ckpt", model)
    # without config.json, Hugging Face's names do not say the settings
    torch.save(wrap(state), tmp_path / "hf.pt")
    with refused("checkpoint.no-config"):
        load_model(tmp_path / "hf.pt")
    # an own head beside the encoder is not used, an unknown tensor inside it is refused
    torch.save({"state_dict": {f"model.{name}": each for name, each in state.items()} | {"head.weight": torch.ones(2)}},
               tmp_path / "pytorch_model.bin")  # fmt: skip
    assert_same_vectors(tmp_path, model)
    torch.save(wrap(state | {"esm.encoder.layer.0.extra": torch.ones(2)}), tmp_path / "pytorch_model.bin")
    with refused("checkpoint.tensor", name="esm.encoder.layer.0.extra"):
        load_model(tmp_path)


def test_adapters_of_peft_are_named(tmp_path: Path, model: ESM2) -> None:
    adapters = {"base_model.model.esm.encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(8, 32)}
    save_file(adapters, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with refused("checkpoint.adapter", path=tmp_path):
        load_model(tmp_path)
    with refused("checkpoint.not-esm2kit", name=next(iter(adapters))):
        load_model(tmp_path / "adapter_model.safetensors")
    save_hf(model, tmp_path)  # transformers would apply the adapters to the complete model beside them
    with refused("checkpoint.adapter", path=tmp_path):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    state = load_file(tmp_path / "model.safetensors")
    merged = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    save_file(merged, tmp_path / "model.safetensors")
    assert_same_vectors(tmp_path, model)
    save_file(merged | adapters, tmp_path / "model.safetensors")
    with refused("checkpoint.adapter"):
        load_model(tmp_path)


def test_git_lfs_pointers_are_named_in_every_file(tmp_path: Path, model: ESM2) -> None:
    folder = tmp_path / "hf"
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        save_hf(model, folder)
        if name != "config.json":
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(POINTER)
        with refused("file.git-lfs", path=folder / name):
            load_model(folder)
        (folder / name).unlink()
    save_hf(model, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(POINTER)
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with refused("file.git-lfs", path=folder / "b.safetensors"):
        load_model(folder)
    # also where the pointer is too small for the configuration
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(POINTER)
    (folder / "config.json").write_text(json.dumps(build_hf_config(ESM2Config(4, 128, 4))))
    with refused("file.git-lfs", path=folder / "model.safetensors"):
        load_model(folder)
    for name in ("esm2_a.pt", "own.safetensors", "last.ckpt"):
        (tmp_path / name).write_bytes(POINTER)
        with refused("file.git-lfs", path=tmp_path / name):
            load_model(tmp_path / name)
    dcp = tmp_path / "dcp"
    torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=dcp, no_dist=True)
    assert_same_vectors(dcp, model)
    shard = next(dcp.glob("*.distcp"))
    shard.write_bytes(POINTER)
    with refused("file.git-lfs", path=shard):
        load_model(dcp)
    (dcp / ".metadata").write_bytes(POINTER)
    with refused("file.git-lfs", path=dcp / ".metadata"):
        load_model(dcp)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, model: ESM2, number: float) -> None:
    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["esm.encoder.layer.1.intermediate.dense.weight"][3, 4] = number
    save_file(state, tmp_path / "model.safetensors")
    with refused("checkpoint.not-finite", name="layers.1.fc1.weight"):
        load_model(tmp_path)
    # large but finite numbers, whose sum is not, are read
    state["esm.encoder.layer.1.intermediate.dense.weight"][:] = 3e38
    save_file(state, tmp_path / "model.safetensors")
    assert load_model(tmp_path)[0].layers[1].fc1.weight.isfinite().all()


def test_another_vocabulary_is_refused(tmp_path: Path, model: ESM2) -> None:
    save_hf(model, tmp_path)
    assert_same_vectors(tmp_path, model)
    tokens = (tmp_path / "vocab.txt").read_text().split()
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    with refused("checkpoint.vocabulary", found=4):
        load_model(tmp_path)


def test_fair_esm_opens_an_export_under_the_weights_only_default(tmp_path: Path, model: ESM2) -> None:
    save_fair_esm(model, tmp_path / "esm2_a.pt")
    assert torch.load(tmp_path / "esm2_a.pt", weights_only=True)["cfg"]["model"].encoder_layers == 2
    peer, _ = esm.pretrained.load_model_and_alphabet(str(tmp_path / "esm2_a.pt"))
    with torch.inference_mode():
        found = peer.eval()(tokenize([SEQUENCE]), [2])["representations"][2][0].numpy()
    np.testing.assert_allclose(found, vectors(model), atol=1e-5)
    assert_same_vectors(tmp_path / "esm2_a.pt", model)


def test_the_weights_in_a_folder_are_read_with_their_config(tmp_path: Path, model: ESM2) -> None:
    save_hf(model, tmp_path)
    assert_same_vectors(tmp_path / "model.safetensors", model)

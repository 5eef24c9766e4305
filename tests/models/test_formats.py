"""Conversion to and from the formats of fair-esm and Hugging Face without loss; damaged and hostile files."""

import dataclasses
import json
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import esm
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import refused
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, EsmConfig, EsmForMaskedLM

from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.models.formats import shards
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import HF_LAYER_INV_FREQ, HF_STARRED_INV_FREQ, save_hf
from esm2kit.models.load import load_model
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, TOKENS

CONFIG = ESM2Config(3, 40, 5)
TOKENS_BT = tokenize([RESIDUE_LETTERS, "MKTAYL", "G"])
TOKENS_BT[0, 3] = TOKENS.index("<mask>")


def random_model(config: ESM2Config = CONFIG) -> ESM2:
    """Build a model with random parameters, and with rotary frequencies rounded to float16 as in Meta's files."""
    model = ESM2(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.half())
    return model.eval()


def assert_same_weights(first: ESM2, second: ESM2) -> None:
    assert first.config == second.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert second.lm_head.weight is second.embed_tokens.weight, "the output matrix is tied"


def load(path: Path) -> ESM2:
    return load_model(path)[0]


@torch.no_grad()
def load_with_fair_esm(path: Path) -> esm.ESM2:
    """Load with fair-esm; its files contain argparse.Namespace, which torch allows only on request."""
    with torch.serialization.safe_globals([Namespace]):
        return esm.pretrained.load_model_and_alphabet_local(path)[0].eval()


@torch.no_grad()
def test_fair_esm_loads_an_export_with_equal_outputs(tmp_path: Path) -> None:
    model = random_model()
    save_fair_esm(model, tmp_path / "esm2_t3.pt")
    reference = load_with_fair_esm(tmp_path / "esm2_t3.pt")
    layers = [0, 1, 2, 3]
    expected = reference(TOKENS_BT, repr_layers=layers)
    encoder = Encoder(model)
    for row, tokens_T in enumerate(TOKENS_BT):
        count = int(tokens_T.ne(1).sum())
        found = encoder.encode(tokens_T[:count], [count], layers)
        for layer in layers:
            hidden_TD = expected["representations"][layer][row, :count]
            torch.testing.assert_close(found[layer], hidden_TD, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.logits(found[3]), expected["logits"][row, :count], atol=1e-5, rtol=1e-5)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert_same_weights(model, load(tmp_path / "esm2_t3.pt"))


@torch.no_grad()
def test_fair_esm_files_load_with_and_without_a_contact_head(tmp_path: Path, caplog) -> None:
    reference = esm.ESM2(3, 40, 5).eval()
    shape = Namespace(encoder_layers=3, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True, arch="x")
    state = {name: tensor for name, tensor in reference.state_dict().items() if "contact_head" not in name}
    contact = {name: tensor for name, tensor in reference.state_dict().items() if "contact_head" in name}
    torch.save({"cfg": {"model": shape, "task": None}, "model": state}, tmp_path / "esm2_x.pt")
    bare = load(tmp_path / "esm2_x.pt")
    assert "All contact probabilities will be 0.5." in caplog.text
    torch.testing.assert_close(bare(TOKENS_BT, return_contacts=True)["contacts"], torch.full((3, 25, 25), 0.5))
    torch.save({"model": contact}, tmp_path / "esm2_x-contact-regression.pt")
    model = load(tmp_path / "esm2_x.pt")
    found, expected = model(TOKENS_BT, return_contacts=True), reference(TOKENS_BT, return_contacts=True)
    for name in ("logits", "contacts"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare(TOKENS_BT)["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_loads_an_export_with_equal_outputs(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path)
    visible_BT = TOKENS_BT.ne(1)
    reference = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    logits_BTV = reference(TOKENS_BT, visible_BT.long()).logits
    hidden_BTD = AutoModel.from_pretrained(tmp_path).eval()(TOKENS_BT, visible_BT.long()).last_hidden_state
    encoder, num_tokens = Encoder(model), visible_BT.sum(1).tolist()
    hidden_ND = encoder.encode(TOKENS_BT[visible_BT], num_tokens, [3])[3]
    torch.testing.assert_close(hidden_ND, hidden_BTD[visible_BT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.logits(hidden_ND), logits_BTV[visible_BT], atol=1e-5, rtol=1e-5)
    found, expected = reference.esm.contact_head.state_dict(), model.contact_head.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert_same_weights(model, load(tmp_path))


def test_transformers_tokenizer_equals_tokenize(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for sequence in (RESIDUE_LETTERS, "M", "MKTAYLXBUZO"):
        assert tokenizer(sequence)["input_ids"] == tokenize([sequence])[0].tolist()
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(33)] == list(TOKENS)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id) == (
        32,
        1,
        0,
        2,
    )


@torch.no_grad()
@pytest.mark.parametrize("form", ["single", "sharded", "bin", "old"])
def test_transformers_folders_load(tmp_path: Path, form: str) -> None:
    config = EsmConfig(**build_hf_config(CONFIG))
    reference = EsmForMaskedLM(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form in ("bin", "old"):
        state = load_file(tmp_path / "model.safetensors")
        if form == "old":  # frequencies per layer and position buffers, as in the files on the hub
            frequencies = state.pop(HF_STARRED_INV_FREQ)
            state |= {HF_LAYER_INV_FREQ.format(layer): frequencies for layer in range(3)}
            state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
            state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 40)
            state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert len(shards.weight_files(tmp_path)) == (1 if form != "sharded" else len(list(tmp_path.glob("model-*"))))
    logits = reference(TOKENS_BT[:1]).logits
    torch.testing.assert_close(load(tmp_path)(TOKENS_BT[:1])["logits"], logits, atol=1e-5, rtol=1e-5)


def test_conversion_through_all_formats_changes_nothing(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path / "a")
    save_fair_esm(load(tmp_path / "a"), tmp_path / "esm2_b.pt")
    save_hf(load(tmp_path / "esm2_b.pt"), tmp_path / "c")
    assert_same_weights(model, load(tmp_path / "c"))


def test_rotary_frequencies_that_differ_between_layers_are_rejected(tmp_path: Path) -> None:
    model = random_model()
    model.layers[1].self_attn.rot_emb.inv_freq.mul_(2)
    with refused("export.frequencies"):
        save_hf(model, tmp_path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("echo this must never run > evil.txt",)


def test_a_pt_with_code_is_rejected_and_the_code_does_not_run(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for payload in ({"cfg": {"model": Evil()}, "model": {}}, Evil(), {"model": {"a": Evil()}}):
        torch.save(payload, tmp_path / "esm2_evil.pt")
        with refused("checkpoint.code", found="posix.system"):
            load(tmp_path / "esm2_evil.pt")
    assert not (tmp_path / "evil.txt").exists()
    assert torch.load(tmp_path / "esm2_evil.pt", weights_only=False) is not None, "without the check the code would run"
    assert (tmp_path / "evil.txt").exists()


def test_a_pt_is_memory_mapped(tmp_path: Path) -> None:
    save_fair_esm(random_model(), tmp_path / "esm2_a.pt")
    model = load(tmp_path / "esm2_a.pt")
    spans = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if "esm2_a.pt" in line
    ]
    for name, parameter in model.named_parameters():
        if not name.startswith("contact_head."):
            assert any(int(first, 16) <= parameter.data_ptr() < int(stop, 16) for first, stop in spans), name


@pytest.mark.parametrize("way", ["compressed", "duplicated"])
def test_a_pt_with_content_larger_than_the_file_is_rejected(tmp_path: Path, way: str) -> None:
    torch.save({"cfg": {}, "model": {"a": torch.zeros(1 << 18)}}, tmp_path / "plain.pt")
    bomb = tmp_path / "esm2_bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED if way == "compressed" else None)
        if way == "duplicated":
            packed.filelist += [max(packed.filelist, key=lambda member: member.file_size)] * 9
            packed._didModify = True
    with refused("checkpoint.damaged"):
        load(bomb)


@pytest.mark.parametrize(
    ("content", "code", "values"),
    [
        ([1, 2], "checkpoint.not-tensors", {"found": "list"}),
        ({"model": 3}, "checkpoint.not-tensors", {"found": "int"}),
        ({"model": {"contact_head.regression.weight": 3}}, "checkpoint.not-tensors", {}),
        ({"model": {"a": torch.zeros(3, device="meta")}}, "checkpoint.not-tensors", {"name": "a"}),
        ({"model": {"a": torch.zeros(1).expand(1 << 36)}}, "checkpoint.not-tensors", {"name": "a"}),
        ({"model": {3: torch.zeros(3)}}, "checkpoint.tensor", {"name": "3"}),
    ],
)
def test_a_file_without_plain_tensors_is_rejected(tmp_path: Path, content: object, code: str, values: dict) -> None:
    save_fair_esm(random_model(), tmp_path / "esm2_a.pt")
    torch.save(content, tmp_path / "esm2_a-contact-regression.pt")
    with refused(code, **values):
        load(tmp_path / "esm2_a.pt")


def test_a_configuration_larger_than_its_files_is_refused_before_it_is_built(tmp_path: Path) -> None:
    layers = 10**9
    shape = Namespace(encoder_layers=layers, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True)
    torch.save({"cfg": {"model": shape}, "model": random_model().state_dict()}, tmp_path / "esm2_a.pt")
    with refused("checkpoint.too-small"):
        load(tmp_path / "esm2_a.pt")
    save_hf(random_model(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(build_hf_config(CONFIG) | {"num_hidden_layers": layers}))
    with refused("checkpoint.too-small"):
        load(tmp_path / "hf")
    tensors = {f"model.{name}": tensor for name, tensor in random_model().state_dict().items()}
    write_checkpoint(tmp_path / "own", tensors, {"model": dataclasses.replace(CONFIG, num_layers=layers)})
    with refused("checkpoint.too-small"):
        load_model(tmp_path / "own")


def test_bad_files_are_rejected(tmp_path: Path) -> None:
    model = random_model()
    save_fair_esm(model, tmp_path / "esm2_a.pt")
    saved = (tmp_path / "esm2_a.pt").read_bytes()
    cases: list[tuple[bytes | dict, str, dict]] = [
        (saved[: len(saved) // 2], "checkpoint.damaged", {}),
        (b"hello", "model.not-weights", {"found": "a text file"}),
        ({"args": {}, "model": {}}, "checkpoint.not-esm2", {}),
        ({"cfg": {"model": Namespace(encoder_layers=3)}, "model": {}}, "checkpoint.not-esm2", {}),
    ]
    shape = Namespace(encoder_layers=3, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True)
    state = model.state_dict()
    wrong = state | {"layers.2.fc1.bias": torch.zeros(7)}
    cases.append(({"cfg": {"model": shape}, "model": wrong}, "checkpoint.tensor", {"name": "layers.2.fc1.bias"}))
    missing = {name: tensor for name, tensor in state.items() if name != "layers.1.fc2.weight"}
    cases.append(({"cfg": {"model": shape}, "model": missing}, "checkpoint.tensor", {"name": "layers.1.fc2.weight"}))
    for content, code, values in cases:
        if isinstance(content, bytes):
            (tmp_path / "esm2_bad.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "esm2_bad.pt")
        with refused(code, **values) as caught:
            load(tmp_path / "esm2_bad.pt")
        assert "esm2_bad.pt" in str(caught.value)
    with refused("export.name"):
        save_fair_esm(model, tmp_path / "mine.pt")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3, "b": "x"}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "code.py"}}',
    ],
)
def test_an_index_of_shards_may_list_only_files_in_its_folder(tmp_path: Path, index: str) -> None:
    save_hf(random_model(), tmp_path / "inner")
    save_hf(random_model(), tmp_path)
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json: the index ") as caught:
        load(tmp_path / "inner")
    assert caught.value.code in ("shards.index", "shards.elsewhere")


def test_bad_folders_are_rejected(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    state = load_file(tmp_path / "model.safetensors")
    for name, value in [
        ("model_type", "bert"),
        ("position_embedding_type", "absolute"),
        ("is_folding_model", True),
        ("intermediate_size", 100),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(settings | {name: value}))
        with refused("checkpoint.not-esm2", name=name):
            load(tmp_path)
    for layers, message in [
        (4, r"tensor 'esm\.encoder\.layer\.3\..* is missing"),
        (2, r"no tensor 'esm\.encoder\.layer\.2"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": layers}))
        with pytest.raises(InputError, match=message):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(state | {"lm_head.decoder.weight": torch.zeros(33, 40)}, tmp_path / "model.safetensors")
    with refused("checkpoint.not-esm2", name="lm_head.decoder.weight"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with refused("checkpoint.damaged"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with refused("shards.absent", name="x.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with refused("checkpoint.no-weights"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("checkpoint.config"):
        load(tmp_path)


def test_a_torch_archive_that_claims_another_version_is_damaged(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(2)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 240  # the version that is needed to unpack
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged zip archive"):
        load_model(str(path))

"""Weights to fair-esm's and Hugging Face's form and back: read by fair-esm and transformers, nothing lost."""

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
from esm2kit.models.formats.huggingface import HF_LAYER_INV_FREQ, HF_STARRED_INV_FREQ, build_hf_config, save_hf
from esm2kit.models.load import load_model
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, TOKENS

CONFIG = ESM2Config(3, 40, 5)
TOKENS_BT = tokenize([RESIDUE_LETTERS, "MKTAYL", "G"])
TOKENS_BT[0, 3] = TOKENS.index("<mask>")


def random_model(config: ESM2Config = CONFIG) -> ESM2:
    """Every tensor random, biases and norms too; rotary frequencies rounded to float16, as Meta's are."""
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
    assert second.lm_head.weight is second.embed_tokens.weight, "tied, as ESM-2 is"


def loaded(path: Path) -> ESM2:
    return load_model(path)[0]


@torch.no_grad()
def theirs_of(path: Path) -> esm.ESM2:
    """fair-esm's own loading, with the one class its files name allowed."""
    with torch.serialization.safe_globals([Namespace]):
        return esm.pretrained.load_model_and_alphabet_local(path)[0].eval()


@torch.no_grad()
def test_fair_esm_opens_ours_and_gives_the_same_numbers(tmp_path: Path) -> None:
    model = random_model()
    save_fair_esm(model, tmp_path / "esm2_t3.pt")
    theirs = theirs_of(tmp_path / "esm2_t3.pt")
    layers = [0, 1, 2, 3]
    expected = theirs(TOKENS_BT, repr_layers=layers)
    encoder = Encoder(model)
    for row, tokens_T in enumerate(TOKENS_BT):
        count = int(tokens_T.ne(1).sum())
        ours = encoder.encode(tokens_T[:count], [count], layers)
        for layer in layers:
            wanted = expected["representations"][layer][row, :count]
            torch.testing.assert_close(ours[layer], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.logits(ours[3]), expected["logits"][row, :count], atol=1e-5, rtol=1e-5)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert_same_weights(model, loaded(tmp_path / "esm2_t3.pt"))


@torch.no_grad()
def test_fair_esm_files_come_in_with_and_without_the_contact_head(tmp_path: Path, caplog) -> None:
    theirs = esm.ESM2(3, 40, 5).eval()
    shape = Namespace(encoder_layers=3, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True, arch="x")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "contact_head" not in name}
    contact = {name: tensor for name, tensor in theirs.state_dict().items() if "contact_head" in name}
    torch.save({"cfg": {"model": shape, "task": None}, "model": state}, tmp_path / "esm2_x.pt")
    bare = loaded(tmp_path / "esm2_x.pt")
    assert "contacts will be 0.5 everywhere" in caplog.text
    torch.testing.assert_close(bare(TOKENS_BT, return_contacts=True)["contacts"], torch.full((3, 25, 25), 0.5))
    torch.save({"model": contact}, tmp_path / "esm2_x-contact-regression.pt")
    ours = loaded(tmp_path / "esm2_x.pt")
    found, expected = ours(TOKENS_BT, return_contacts=True), theirs(TOKENS_BT, return_contacts=True)
    for name in ("logits", "contacts"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare(TOKENS_BT)["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_opens_ours_and_gives_the_same_numbers(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path)
    visible_BT = TOKENS_BT.ne(1)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    logits_BTV = theirs(TOKENS_BT, visible_BT.long()).logits
    hidden_BTD = AutoModel.from_pretrained(tmp_path).eval()(TOKENS_BT, visible_BT.long()).last_hidden_state
    encoder, num_tokens = Encoder(model), visible_BT.sum(1).tolist()
    ours_ND = encoder.encode(TOKENS_BT[visible_BT], num_tokens, [3])[3]
    torch.testing.assert_close(ours_ND, hidden_BTD[visible_BT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.logits(ours_ND), logits_BTV[visible_BT], atol=1e-5, rtol=1e-5)
    contact, ours = theirs.esm.contact_head.state_dict(), model.contact_head.state_dict()
    assert all(torch.equal(contact[name], ours[name]) for name in ours)
    assert_same_weights(model, loaded(tmp_path))


def test_transformers_tokenizer_reads_as_we_do(tmp_path: Path) -> None:
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
@pytest.mark.parametrize("form", ["whole", "sharded", "bin", "old"])
def test_transformers_folders_come_in(tmp_path: Path, form: str) -> None:
    config = EsmConfig(**build_hf_config(CONFIG))
    theirs = EsmForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form in ("bin", "old"):
        state = load_file(tmp_path / "model.safetensors")
        if form == "old":  # frequencies a layer, position buffers: as the files on the hub are
            frequencies = state.pop(HF_STARRED_INV_FREQ)
            state |= {HF_LAYER_INV_FREQ.format(layer): frequencies for layer in range(3)}
            state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
            state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 40)
            state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert len(shards.weight_files(tmp_path)) == (1 if form != "sharded" else len(list(tmp_path.glob("model-*"))))
    logits = theirs(TOKENS_BT[:1]).logits
    torch.testing.assert_close(loaded(tmp_path)(TOKENS_BT[:1])["logits"], logits, atol=1e-5, rtol=1e-5)


def test_a_way_round_through_every_form_changes_nothing(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path / "a")
    save_fair_esm(loaded(tmp_path / "a"), tmp_path / "esm2_b.pt")
    save_hf(loaded(tmp_path / "esm2_b.pt"), tmp_path / "c")
    assert_same_weights(model, loaded(tmp_path / "c"))


def test_frequencies_that_differ_by_layer_are_refused_rather_than_lost(tmp_path: Path) -> None:
    model = random_model()
    model.layers[1].self_attn.rot_emb.inv_freq.mul_(2)
    with refused("export.frequencies"):
        save_hf(model, tmp_path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("echo this must never run > evil.txt",)


def test_a_pt_with_code_is_refused_in_one_line_and_nothing_runs(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for payload in ({"cfg": {"model": Evil()}, "model": {}}, Evil(), {"model": {"a": Evil()}}):
        torch.save(payload, tmp_path / "esm2_evil.pt")
        with refused("checkpoint.code", found="posix.system") as caught:
            loaded(tmp_path / "esm2_evil.pt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil.txt").exists()
    assert torch.load(tmp_path / "esm2_evil.pt", weights_only=False) is not None, "the file would have run its code"
    assert (tmp_path / "evil.txt").exists()


def test_a_pt_is_mapped_and_not_read(tmp_path: Path) -> None:
    """So that the ranks of a node share what none of them changes."""
    save_fair_esm(random_model(), tmp_path / "esm2_a.pt")
    model = loaded(tmp_path / "esm2_a.pt")
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "esm2_a.pt" in line
    ]
    for name, parameter in model.named_parameters():
        if not name.startswith("contact_head."):
            assert any(int(first, 16) <= parameter.data_ptr() < int(stop, 16) for first, stop in spans), name


@pytest.mark.parametrize("way", ["deflated", "the same bytes many times"])
def test_a_pt_that_would_unpack_to_more_than_its_bytes_is_refused(tmp_path: Path, way: str) -> None:
    torch.save({"cfg": {}, "model": {"a": torch.zeros(1 << 18)}}, tmp_path / "plain.pt")
    bomb = tmp_path / "esm2_bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED if way == "deflated" else None)
        if way != "deflated":
            packed.filelist += [max(packed.filelist, key=lambda member: member.file_size)] * 9
            packed._didModify = True
    with refused("checkpoint.damaged"):
        loaded(bomb)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds list where tensors by name should be"),
        ({"model": 3}, "holds int where"),
        ({"model": {"contact_head.regression.weight": 3}}, "'contact_head.regression.weight' is no plain tensor"),
        ({"model": {"a": torch.zeros(3, device="meta")}}, "'a' is no plain tensor"),
        ({"model": {"a": torch.zeros(1).expand(1 << 36)}}, "'a' is more than its bytes hold"),
        ({"model": {3: torch.zeros(3)}}, "tensor '3' has shape"),
    ],
)
def test_a_file_without_plain_tensors_is_one_line(tmp_path: Path, content: object, told: str) -> None:
    save_fair_esm(random_model(), tmp_path / "esm2_a.pt")
    torch.save(content, tmp_path / "esm2_a-contact-regression.pt")
    with pytest.raises(InputError, match=told) as caught:
        loaded(tmp_path / "esm2_a.pt")
    assert "\n" not in str(caught.value)


def test_a_configuration_larger_than_its_files_is_refused_before_it_is_built(tmp_path: Path) -> None:
    layers = 10**9
    shape = Namespace(encoder_layers=layers, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True)
    torch.save({"cfg": {"model": shape}, "model": random_model().state_dict()}, tmp_path / "esm2_a.pt")
    with refused("checkpoint.too-small"):
        loaded(tmp_path / "esm2_a.pt")
    save_hf(random_model(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(build_hf_config(CONFIG) | {"num_hidden_layers": layers}))
    with refused("checkpoint.too-small"):
        loaded(tmp_path / "hf")
    tensors = {f"model.{name}": tensor for name, tensor in random_model().state_dict().items()}
    write_checkpoint(tmp_path / "ours", tensors, {"model": dataclasses.replace(CONFIG, num_layers=layers)})
    with refused("checkpoint.too-small"):
        load_model(tmp_path / "ours")


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    model = random_model()
    save_fair_esm(model, tmp_path / "esm2_a.pt")
    whole = (tmp_path / "esm2_a.pt").read_bytes()
    cases: list[tuple[bytes | dict, str]] = [
        (whole[: len(whole) // 2], "not a whole file of torch.save"),
        (b"hello", "not a whole file of torch.save"),
        ({"args": {}, "model": {}}, "not fair-esm's ESM-2"),
        ({"cfg": {"model": Namespace(encoder_layers=3)}, "model": {}}, "not fair-esm's ESM-2"),
    ]
    shape = Namespace(encoder_layers=3, encoder_embed_dim=40, encoder_attention_heads=5, token_dropout=True)
    state = model.state_dict()
    cases.append(
        (
            {"cfg": {"model": shape}, "model": state | {"layers.2.fc1.bias": torch.zeros(7)}},
            "'layers.2.fc1.bias' has shape",
        )
    )
    state.pop("layers.1.fc2.weight")
    cases.append(({"cfg": {"model": shape}, "model": state}, r"layers\.1\.fc2\.weight' is missing"))
    for content, message in cases:
        if isinstance(content, bytes):
            (tmp_path / "esm2_bad.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "esm2_bad.pt")
        with pytest.raises(InputError, match=message) as caught:
            loaded(tmp_path / "esm2_bad.pt")
        assert "\n" not in str(caught.value)
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
def test_an_index_of_shards_names_files_beside_it_or_is_refused(tmp_path: Path, index: str) -> None:
    save_hf(random_model(), tmp_path / "inner")
    save_hf(random_model(), tmp_path)
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json: (no readable index|names .* no shard beside it)") as caught:
        loaded(tmp_path / "inner")
    assert "\n" not in str(caught.value)


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    state = load_file(tmp_path / "model.safetensors")
    for change, message in [
        ({"model_type": "bert"}, "model_type is 'bert', ESM-2 has 'esm'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"is_folding_model": True}, "a folding model"),
        ({"intermediate_size": 100}, "intermediate_size is 100, ESM-2 has 160"),
        ({"num_hidden_layers": 4}, r"tensor esm\.encoder\.layer\.3\..* is absent"),
        ({"num_hidden_layers": 2}, r"tensor esm\.encoder\.layer\.2\..* is none of ESM-2's"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(state | {"lm_head.decoder.weight": torch.zeros(33, 40)}, tmp_path / "model.safetensors")
    with refused("checkpoint.not-esm2", name="lm_head.decoder.weight"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with refused("checkpoint.damaged"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with refused("shards.absent", name="x.safetensors"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with refused("checkpoint.no-weights"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("checkpoint.config"):
        loaded(tmp_path)

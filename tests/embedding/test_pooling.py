"""Poolings of a protein: values against the residue vectors, long proteins, files and names, one pass for all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.embedding_fixtures import CONFIG, random_proteins, write_fasta, write_model
from support.errors import refused

from esm2kit.embedding.batch import Output, embed_batch, embed_on_device, pack_batch
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.load import load_model
from esm2kit.models.pooling import pool_packed
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode
from esm2kit.sequences.windows import Windowing

FILES = {"mean": "", "max": "max_", "bos": "bos_", "mean+max": "mean_max_"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.safetensors")


def pool_residues(rows_TD: np.ndarray, bos_D: np.ndarray) -> dict[str, np.ndarray]:
    """Pool the residue vectors of a protein by NumPy."""
    found = {"mean": rows_TD.mean(0), "max": rows_TD.max(0), "bos": bos_D}
    return found | {"mean+max": np.concatenate([found["mean"], found["max"]])}


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("long_proteins", ["window", "truncate"])
def test_each_pooling_is_that_of_the_residue_vectors(
    model: Path, tmp_path: Path, monkeypatch, layer_by_layer: bool, long_proteins: str
) -> None:
    """Rows of a long protein are averaged over its windows first, and so are the vectors of BOS."""
    passes, encode = [], Encoder.encode

    def count(encoder: Encoder, tokens_N, num_tokens, repr_layers, on_device=True):
        passes.append(list(repr_layers))
        return encode(encoder, tokens_N, num_tokens, repr_layers, on_device)

    monkeypatch.setattr(Encoder, "encode", count)
    proteins = random_proteins([1, 9, 20, 57])
    config = EmbedConfig(
        write_fasta(tmp_path / "a.fasta", proteins), tmp_path, model=str(model), repr_layers=[0, 1, 2],
        pooling=list(FILES), per_residue=True, long_proteins=long_proteins, max_residues=20, window_overlap=8,
        batch_tokens=1000, layer_by_layer=layer_by_layer, device="cpu",
    )  # fmt: skip
    result = embed(config)
    assert len(result.files) == 15
    assert result.embeddings == tmp_path / "a_layer0_embeddings.h5", "the first pooling of the first layer"
    if not layer_by_layer:
        one_pass = {"window": 2, "truncate": 1}[long_proteins]  # the short proteins, and the windows of the long one
        assert passes == [[0, 1, 2]] * one_pass, "one pass for all layers and poolings"
    plain = load_model(model)[0]
    for layer in (0, 1, 2):
        residues = EmbeddingReader(tmp_path / f"a_layer{layer}_hiddens.h5")
        for pooling, prefix in FILES.items():
            reader = EmbeddingReader(tmp_path / f"a_layer{layer}_{prefix}embeddings.h5")
            assert (reader.level, reader.embed_dim) == ("protein", 64 if pooling == "mean+max" else 32)
            assert (reader.attributes["pooling"], reader.attributes["layer"]) == (pooling, layer)
            for name, sequence in proteins.items():
                spans = [(0, 20), (12, 32), (24, 44), (36, 56), (37, 57)] if name == "p3" else [(0, len(sequence))]
                if long_proteins == "truncate":
                    spans = [(0, min(20, len(sequence)))]
                packed = [torch.tensor(_tokens(sequence[slice(*span)])) for span in spans]
                with torch.no_grad():
                    firsts = [plain(row[None], repr_layers=[layer])["representations"][layer][0, 0] for row in packed]
                expected = pool_residues(residues[name], torch.stack(firsts).mean(0).numpy())[pooling]
                np.testing.assert_allclose(reader[name], expected, atol=2e-6, err_msg=f"{layer} {pooling} {name}")


def _tokens(sequence: str) -> list[int]:
    return [BOS_IDX, *encode(sequence).tolist(), EOS_IDX]


@pytest.mark.parametrize("pooling", list(FILES))
def test_the_device_pools_as_the_cpu_does(pooling: str) -> None:
    """A batch on a device is pooled by other functions; they run on the CPU here."""
    esm2 = ESM2.initialised(dataclasses.replace(CONFIG, num_layers=1), seed=0)
    encoder = Encoder(esm2, "float32", torch.device("cpu"))
    sequences = list(random_proteins([40, 30, 7, 1]).values())
    output, windowing = Output("x", 1, pooling, 64 if pooling == "mean+max" else 32), Windowing(20, 8, 100)
    (expected,) = embed_batch(encoder, sequences, [output], windowing, "float32")
    packed = pack_batch(sequences, windowing)
    (parts,) = embed_on_device(encoder, packed, [output], "float32")
    found = torch.cat(parts).numpy()
    assert found.shape == (4, output.width)
    for row, place in zip(found, packed.places, strict=True):
        np.testing.assert_allclose(row, expected[place], atol=1e-6)


def test_the_maximum_ignores_bos_eos_and_other_proteins() -> None:
    hidden_ND = torch.full((7, 2), 9.0)  # BOS, two residues, EOS; BOS, one residue, EOS
    hidden_ND[1:3] = torch.tensor([[1.0, -5.0], [-2.0, -3.0]])
    hidden_ND[5] = torch.tensor([-7.0, 4.0])
    assert pool_packed(hidden_ND, [4, 3], "max").tolist() == [[1.0, -3.0], [-7.0, 4.0]]
    assert pool_packed(hidden_ND, [4, 3], "mean+max").tolist() == [[-0.5, -4.0, 1.0, -3.0], [-7.0, 4.0, -7.0, 4.0]]


def test_a_file_of_another_pooling_is_added_and_the_first_is_kept(model: Path, tmp_path: Path) -> None:
    config = EmbedConfig(write_fasta(tmp_path / "a.fasta", random_proteins([5, 9])), tmp_path, model=str(model))
    first = embed(config)
    made = first.embeddings.stat().st_mtime_ns
    both = embed(dataclasses.replace(config, pooling=["mean", "max"]))
    assert [path.name for path in both.files] == ["a_embeddings.h5", "a_max_embeddings.h5"]
    assert (both.embeddings, both.embeddings.stat().st_mtime_ns) == (first.embeddings, made)
    largest = embed(dataclasses.replace(config, pooling=["max"]))
    assert largest.embeddings == both.files[1]
    start = embed(dataclasses.replace(config, pooling=["bos"], bos=True))
    assert [path.name for path in start.files] == ["a_bos_embeddings.h5"], "two names of one file"


def test_poolings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    given = {"fasta": tmp_path, "model": "8M"}
    with refused("option.pooling", found=["maximum"]):
        EmbedConfig(**given, pooling=["maximum"])
    with refused("option.pooling", found=[]):
        EmbedConfig(**given, pooling=[])
    with refused("option.pooling-twice", found=["max", "max"]):
        EmbedConfig(**given, pooling=["max", "max"])
    with refused("embed.pooling-unused", pooling=["max"]):
        EmbedConfig(**given, pooling=["max"], per_protein=False, per_residue=True)

"""`esm2kit convert`: the same vectors in the formats of other programs."""

import csv
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit import ConvertConfig, EmbedConfig, EmbeddingReader, convert, embed
from esm2kit.embedding import convert as convert_module
from esm2kit.sequences.alphabet import TOKENS

SEQUENCES = {"P1": "MKTAYIAK", "P2": "GSHMLEDPVD", "P3": "ACDEF", "P4": "MKVLAAGIC"}


@pytest.fixture(params=["datasets", "packed"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """Embeddings of four proteins: kind -> file."""
    (tmp_path / "my.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in SEQUENCES.items()))
    (tmp_path / "measured.csv").write_text("name,Tm,organism\nP3,41.5,yeast\nP1,50,human\nP4,,human\n")
    write_tiny_model(tmp_path / "tiny.safetensors")
    config = EmbedConfig(
        tmp_path / "my.fasta", tmp_path, model=str(tmp_path / "tiny.safetensors"), per_residue=True, logits=True,
        layout=request.param,
    )  # fmt: skip
    embed(config)
    return {kind: tmp_path / f"my_{kind}.h5" for kind in ("embeddings", "hiddens", "logits")}


def read_back(made: dict) -> tuple[list[str], list[int] | None, np.ndarray]:
    """Read a converted file with the program that its users have: ids, numbers of the residues, vectors."""
    out = made["out"]
    if out.suffix == ".npy":
        index = pd.read_csv(made["files"][1], sep="\t")
        vectors = np.load(out, mmap_mode="r")
    elif out.suffix == ".csv":
        index = pd.read_csv(out)
        vectors = index.filter(regex=r"^dim_\d+$").to_numpy(np.float32)
    elif out.suffix == ".parquet":
        index = pd.read_parquet(out)
        vectors = np.stack(index["vector"])
    else:
        data = anndata.read_h5ad(out)
        index, vectors = data.obs, data.X
    residues = list(index["residue"]) if "residue" in index else None
    return list(index["id"]), residues, np.asarray(vectors)


@pytest.mark.parametrize("format", ["npy", "csv", "parquet", "h5ad"])
@pytest.mark.parametrize("values_per_block", [1, 150, 4_000_000])
def test_other_programs_read_the_same_vectors(
    files: dict[str, Path], format: str, values_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "VALUES_PER_BLOCK", values_per_block)
    ids, residues, vectors = read_back(made := convert(ConvertConfig(files["embeddings"], format)))
    with EmbeddingReader(files["embeddings"]) as reader:
        np.testing.assert_array_equal(vectors, reader.matrix())
    assert (ids, residues) == (list(SEQUENCES), None)
    assert made["out"] == files["embeddings"].with_suffix(f".{format}")
    assert (made["num_proteins"], made["num_vectors"]) == (4, 4)

    ids, residues, vectors = read_back(made := convert(ConvertConfig(files["hiddens"], format)))
    with EmbeddingReader(files["hiddens"]) as reader:
        np.testing.assert_array_equal(vectors, np.concatenate([reader[name] for name in SEQUENCES]))
    assert ids == [name for name, text in SEQUENCES.items() for _ in text]
    assert residues == [number + 1 for text in SEQUENCES.values() for number in range(len(text))]
    assert made["num_vectors"] == sum(map(len, SEQUENCES.values()))


@pytest.mark.parametrize("format", ["npy", "csv", "parquet", "h5ad"])
def test_columns_of_a_table_stand_next_to_the_ids(files: dict[str, Path], format: str) -> None:
    made = convert(ConvertConfig(files["embeddings"], format, labels=files["embeddings"].parent / "measured.csv"))
    if format == "h5ad":
        index = anndata.read_h5ad(made["out"]).obs
    elif format == "parquet":
        index = pd.read_parquet(made["out"])
    else:
        index = pd.read_csv(made["files"][-1], sep="\t" if format == "npy" else ",")
    np.testing.assert_array_equal(index["Tm"].to_numpy(float), [50, np.nan, 41.5, np.nan])
    assert [None if pd.isna(value) else value or None for value in index["organism"]] == [
        "human", None, "yeast", "human",
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["npy", "csv", "parquet"])
def test_columns_keep_their_text_where_it_is_no_number(files: dict[str, Path], format: str) -> None:
    folder = files["embeddings"].parent
    (folder / "codes.csv").write_text("name,code,count\nP1,007,42\nP2,012,5\nP3,1,6\nP4,2,7\n")
    made = convert(ConvertConfig(files["embeddings"], format, labels=folder / "codes.csv"))
    if format == "parquet":
        index = pd.read_parquet(made["out"])
        assert index["count"].tolist() == [42.0, 5.0, 6.0, 7.0]
    else:
        index = pd.read_csv(made["files"][-1], sep="\t" if format == "npy" else ",", dtype=str)
        assert index["count"].tolist() == ["42", "5", "6", "7"]
    assert index["code"].tolist() == ["007", "012", "1", "2"]


@pytest.mark.parametrize(
    ("kind", "format", "name"),
    [("embeddings", "npy", "id"), ("hiddens", "csv", "residue"), ("embeddings", "csv", "dim_0"),
     ("embeddings", "parquet", "vector"), ("logits", "csv", "A")],
)  # fmt: skip
def test_a_column_of_the_table_does_not_replace_one_of_the_output(
    files: dict[str, Path], kind: str, format: str, name: str
) -> None:
    folder = files[kind].parent
    (folder / "taken.csv").write_text(f"name,{name}\nP1,x\nP2,y\nP3,z\nP4,w\n")
    with refused("convert.column", name=name):
        convert(ConvertConfig(files[kind], format, labels=folder / "taken.csv"))
    assert not files[kind].with_suffix(f".{format}").exists()


def test_columns_of_logits_are_named_after_the_tokens(files: dict[str, Path]) -> None:
    out = convert(ConvertConfig(files["logits"], "csv"))["out"]
    with open(out, encoding="utf-8", newline="") as file:
        header, first = list(csv.reader(file))[:2]
    assert header == ["id", "residue", *TOKENS]
    with EmbeddingReader(files["logits"]) as reader:
        np.testing.assert_array_equal(np.array(first[2:], dtype=np.float32), reader["P1"][0])


def test_provenance_is_kept(files: dict[str, Path]) -> None:
    made = convert(ConvertConfig(files["embeddings"], "h5ad"))
    with EmbeddingReader(files["embeddings"]) as reader:
        assert anndata.read_h5ad(made["out"]).uns["input_sha256"] == reader.attributes["input_sha256"]


def test_consecutive_rows_equal_those_by_id(files: dict[str, Path]) -> None:
    with EmbeddingReader(files["hiddens"]) as reader:
        assert reader.count_rows().tolist() == [len(text) for text in SEQUENCES.values()]
        np.testing.assert_array_equal(reader.rows(range(1, 3)), np.concatenate([reader["P2"], reader["P3"]]))
        assert reader.rows(range(2, 2)).shape == (0, reader.embed_dim)


def test_refused_before_anything_is_written(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = files["embeddings"]
    before = sorted(source.parent.iterdir())
    with refused("convert.suffix", format="npy"):
        convert(ConvertConfig(source, "npy", source.parent / "vectors.csv"))
    with refused("embeddings.absent"):
        convert(ConvertConfig(source.parent / "other.h5", "csv"))
    with refused("labels.no-id"):
        convert(ConvertConfig(source, "csv", labels=source.parent / "measured.csv", id="organism"))
    monkeypatch.setitem(sys.modules, "anndata", None)
    with refused("convert.missing", name="anndata"):
        convert(ConvertConfig(source, "h5ad"))
    assert sorted(source.parent.iterdir()) == before
    convert(ConvertConfig(source, "npy"))
    with refused("convert.exists"):
        convert(ConvertConfig(source, "npy"))
    source.with_suffix(".npy").unlink()
    with refused("convert.exists"):  # the table of ids may belong to other vectors
        convert(ConvertConfig(source, "npy"))


def test_damaged_values_leave_no_file(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are checked while they are read; what was written until then disappears."""
    source = files["hiddens"]
    with EmbeddingReader(source) as reader:
        starts, _, _ = reader.locate_rows(["P4"])
    content = bytearray(source.read_bytes())
    content[int(starts[0]) + 5] ^= 1
    source.write_bytes(content)
    monkeypatch.setattr(convert_module, "VALUES_PER_BLOCK", 1)
    before = sorted(source.parent.iterdir())
    for format in ("npy", "csv", "parquet", "h5ad"):
        with refused("file.damaged"):
            convert(ConvertConfig(source, format))
        assert sorted(source.parent.iterdir()) == before, format

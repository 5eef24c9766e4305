"""The FASTA reader compared with Biopython, and its errors."""

import gzip
import hashlib
import io
import threading
from pathlib import Path

import pytest
import zstandard
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import RESIDUE_LETTERS
from esm2kit.sequences.fasta import MAX_RESIDUES, FastaReader, Record, find_fasta_files, read_fasta, strip_fasta_suffix

PACK = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.ZstdCompressor(write_checksum=True).compress}

headers = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1, max_size=12)
sequences = st.text(RESIDUE_LETTERS + RESIDUE_LETTERS.lower(), min_size=1, max_size=90)


@st.composite
def fasta_texts(draw) -> str:
    """Generate FASTA text with any wrapping, CRLF, blank lines, descriptions, stops and trailing blanks."""
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    lines = draw(st.lists(st.just(""), max_size=2))
    for _ in range(draw(st.integers(1, 8))):
        header = draw(headers) + draw(st.sampled_from(["", " with a description", "\tafter a tab  ", " "]))
        sequence, wrap = draw(sequences) + draw(st.sampled_from(["", "", "*"])), draw(st.integers(1, 95))
        wrapped = [sequence[start : start + wrap] for start in range(0, len(sequence), wrap)]
        lines += [">" + header, *(line + draw(st.sampled_from(["", "", " "])) for line in wrapped)]
        lines += draw(st.lists(st.just(""), max_size=1))
    return newline.join(lines) + draw(st.sampled_from(["", newline, newline * 2]))


def read_with_biopython(text: str) -> list[Record]:
    parsed = SimpleFastaParser(io.StringIO(text.replace("\r\n", "\n")))
    return [Record(title.split()[0], title, sequence.upper().removesuffix("*")) for title, sequence in parsed]


def write(folder: Path, text: str | bytes, packed: str = "plain") -> Path:
    path = folder / "input.fasta"
    path.write_bytes(PACK[packed](text.encode() if isinstance(text, str) else text))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fasta")


@settings(max_examples=300, deadline=None)
@given(text=fasta_texts(), packed=st.sampled_from(list(PACK)), block_bytes=st.sampled_from([1, 2, 3, 7, 64, 1 << 21]))
def test_records_agree_with_biopython(folder, text, packed, block_bytes):
    reader = FastaReader(write(folder, text, packed), block_bytes)
    records = [Record(*row) for block in reader for row in zip(*(column.to_pylist() for column in block), strict=True)]
    assert records == read_with_biopython(text)
    assert reader.num_records == len(records)


def read_or_error(path: Path, block_bytes: int) -> list[tuple] | str:
    """Read the records, or return the error message."""
    try:
        return [
            row
            for block in FastaReader(path, block_bytes)
            for row in zip(*(column.to_pylist() for column in block), strict=True)
        ]
    except InputError as error:
        return str(error)


pieces = st.sampled_from([b">", b"a", b"M", b"KV", b"*", b"J", b"\n", b"\r\n", b" ", b"\xff", b"\0"])


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=30).map(lambda parts: b">" + b"".join(parts))),
    block_bytes=st.sampled_from([1, 5, 64]),
)
def test_any_bytes_give_records_or_a_one_line_error(folder, content, block_bytes):
    path = write(folder, content)
    found = read_or_error(path, 1 << 21)
    if isinstance(found, str):
        assert found.startswith(str(path))
        assert "\n" not in found
        assert isinstance(read_or_error(path, block_bytes), str)
    else:
        assert all(name and sequence and set(sequence) <= set(RESIDUE_LETTERS) for name, _, sequence in found)
        assert read_or_error(path, block_bytes) == found, "block size changes the result"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no records"),
        (b"\n \n", "no records"),
        (b"MKV\n>a\nMKV\n", "text before the first '>' ('MKV')"),
        (b"\0\1\2binary", "does not start with text"),
        (b"\xff\xfe>\0a\0", "the file is UTF-16. Save it as UTF-8."),
        (b">\0a\0\n\0M\0", "the file is UTF-16. Save it as UTF-8."),
        (b"BZh91AY", "bzip2"),
        (b">a\nMK\n> \nMKV\n", "record 2 has no id"),
        (b">a\nMK\n>b\n>c\nMKV\n", "record b (2): has no sequence"),
        (b">a\nMK\n>b\n*\n", "record b (2): has no sequence"),
        (b">a\nMK\n>b\nMKV\nMJ\n", "record b (2): letter 'J' at residue 5"),
        (b">a\nMK\n>b\nmk-v\n", "record b (2): the gap '-' at residue 3"),
        (b">a\nM*K\n", "record a (1): letter '*' at residue 2"),
        (b">a\nMK\xc3\xa9\n", "record a (1): byte 0xc3 at residue 3 is not text"),
        (b">a \xff\nMK\n", "header of record 1: byte 0xff at column 4 is not UTF-8"),
        (b">a\0b\nMK\n", "header of record 1: byte 0x00 is not text"),
        (b">a\rMKV\r>b\rMKV", "end with CR only"),
        (b">long\n" + b"A" * (MAX_RESIDUES + 1) + b"\n>b\nM\n", "record long (1): has 100,001 residues"),
        (b">endless\n" + b"A\n" * (1 << 24), "record 1 is longer than 16 MiB"),
    ],
)
def test_an_error_is_one_line_with_file_and_record(tmp_path, content, found):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        list(read_fasta(path))
    assert found in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_the_longest_allowed_record_is_read(tmp_path):
    [record] = read_fasta(write(tmp_path, b">long\n" + b"A" * MAX_RESIDUES))
    assert len(record.sequence) == MAX_RESIDUES


def test_byte_order_mark_and_inner_blanks(tmp_path):
    text = b"\xef\xbb\xbf>a\nMKVLA MKVLA\n  GG\n"
    assert list(read_fasta(write(tmp_path, text))) == [Record("a", "a", "MKVLAMKVLAGG")]


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_concatenated_compressed_parts_are_one_file(tmp_path, packed):
    path = tmp_path / "input.fasta"
    path.write_bytes(PACK[packed](b">a\nMKV\n") + PACK[packed](b">b\nGGG\n"))
    assert [record.id for record in read_fasta(path)] == ["a", "b"]


@pytest.mark.parametrize(("packed", "name"), [("gzip", "gzip"), ("zstd", "Zstandard")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_incomplete_compressed_data_are_an_error(folder, packed, name, data):
    whole = PACK[packed](b"".join(b">r%d\nMKVLAGGSTE\n" % number for number in range(400)))
    cut = data.draw(st.integers(6, len(whole) - 1))
    path = folder / "cut.fasta"
    path.write_bytes(whole[:cut])
    with refused("file.cut-short"):
        list(read_fasta(path))


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_damaged_compressed_data_are_an_error(tmp_path, packed):
    whole = bytearray(PACK[packed](b"".join(b">r%d\nMKVLAGGSTE\n" % number for number in range(4000))))
    for place in range(len(whole) // 2, len(whole) // 2 + 8):
        whole[place] ^= 0xFF
    path = tmp_path / "input.fasta"
    path.write_bytes(whole)
    with refused("file.damaged"):
        list(read_fasta(path))


def test_hash_and_size_are_those_of_the_file(tmp_path):
    path = write(tmp_path, ">a\nMKV\n" * 1000, "gzip")
    reader = FastaReader(path)
    assert sum(len(block.ids) for block in reader) == 1000
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.bytes_read == path.stat().st_size


def test_an_abandoned_reader_leaves_no_thread(tmp_path):
    path = write(tmp_path, ">a\nMKV\n" * 200_000)
    before = threading.active_count()
    blocks = iter(FastaReader(path, 1 << 12))
    next(blocks)
    assert threading.active_count() == before + 1
    blocks.close()
    assert threading.active_count() == before


def test_fasta_files(tmp_path):
    for name in ("b.fa", "a.fasta.gz", "c.FASTA", "notes.txt"):
        (tmp_path / name).write_text(">a\nM\n")
    assert [path.name for path in find_fasta_files(tmp_path)] == ["a.fasta.gz", "b.fa", "c.FASTA"]
    assert find_fasta_files([tmp_path / "b.fa", str(tmp_path / "notes.txt")]) == [
        tmp_path / "b.fa",
        tmp_path / "notes.txt",
    ]
    (tmp_path / "empty").mkdir()
    for wrong, found in (
        (tmp_path / "none.fa", "no such file"),
        (tmp_path / "empty", "no FASTA file"),
        ([], "Pass at least"),
    ):
        with pytest.raises(InputError, match=found):
            find_fasta_files(wrong)


@pytest.mark.shared
def test_real_sequences_agree_with_biopython(shared_data):
    path = shared_data / "uniprot_mini" / "ur90_ur50_sampler.fasta"
    records = list(read_fasta(path))
    assert len(records) == 19_504
    assert records == read_with_biopython(path.read_text())


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("my.liver.fasta", "my.liver"),
        ("a.FA.gz", "a"),
        ("x/a.b.faa.zst", "a.b"),
        ("uniref50", "uniref50"),
        ("a.v2", "a.v2"),
        (".fasta", ".fasta"),
    ],
)
def test_only_fasta_suffixes_are_stripped(name: str, bare: str) -> None:
    assert strip_fasta_suffix(Path(name)) == bare

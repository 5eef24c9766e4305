"""Alignments, complexes, comments, nucleic acids and git-lfs pointers are recognised by every reader of sequences."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.embedding.plan import Table
from esm2kit.preprocessing.ingest import ingest
from esm2kit.sequences.fasta import FastaReader, find_fasta_files, read_fasta
from esm2kit.sequences.letters import LetterCounts
from esm2kit.tasks.data import load_task

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
DNA = "ATGGCCAAAGTTCTGGCAGCTAACTGATCCGGATTACCAGTCAAGCTGGTACGTTAACCGATGC"
PROTEIN = "MKVLAAGGSTNCATGAC"


def read_records(path: Path) -> list:
    return list(read_fasta(path))


def read_table(path: Path) -> Table:
    folder = path.parent / "table"
    folder.mkdir()
    return Table.build([path], folder)


def read_staged(path: Path) -> object:
    folder = path.parent / "work"
    folder.mkdir()
    return ingest("train_fasta", [path], folder)


def read_task(path: Path) -> object:
    """Read the records as a task: a target and a set in each header."""
    lines = path.read_text(encoding="utf-8").split("\n")
    sets = iter(("train", "train VALIDATION=True", "test"))
    lines = [f"{line} TARGET=1.5 SET={next(sets)}" if line.startswith(">") else line for line in lines]
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_task(str(path), None, path.parent)


READERS = [read_records, read_table, read_staged, read_task]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        (">query\nMKVLA\n>hit1\nMK-LAggg\n", "sequence.alignment", {"found": "-", "residue": 3}),
        (">query\nMKVLA\n>hit1\n..MKLA\n", "sequence.alignment", {"found": ".", "residue": 1}),
        (">query\nM-KVLA:MK.\n", "sequence.alignment", {"found": "-"}),
        (">complex\nMKVL:MKVV\n", "sequence.complex", {"chains": 2}),
        (">complex\nMKVL/MKVV\n/MKLA\n", "sequence.complex", {"chains": 3}),
        (">gi|1|dbj|X1.1| A\n;comment\nGGHVNPAVTF\n", "sequence.comment", {}),
        (";a comment\n>p\nGGHVNPAVTF\n", "sequence.comment", {}),
        ("#5\t1\n>101\nMKVLA\n", "file.format", {"found": "an alignment of ColabFold"}),
        ("#5,9\t1,1\n>101\nMKVLA\n", "file.format", {"found": "an alignment of a complex, from ColabFold"}),
        ("# STOCKHOLM 1.0\n\nq MKV-LA\n//\n", "file.format", {"found": "an alignment in Stockholm format"}),
        ("CLUSTAL W (1.83) multiple sequence alignment\n\nq MKV\n", "file.format", {}),
        (" 2 5\nq    MKVLA\nh    MK-LA\n", "file.format", {"found": "an alignment in PHYLIP format"}),
        ("@read1\nACGT\n+\nIIII\n", "file.format", {"found": "a FASTQ file of sequencing reads"}),
        ("LOCUS       SCU49845\n", "file.format", {"found": "a GenBank file"}),
        ("MKVLAAGG\nMKV\n", "file.format", {"found": "a sequence without a header"}),
        ("id,sequence\na,MKV\n", "file.format", {"found": "a table"}),
        ("<!DOCTYPE html>\n<html>\n", "file.format", {"found": "a web page or XML"}),
        (f">g\n{DNA}\n>h\n{DNA[::-1]}NNN\n", "sequence.nucleic", {"found": "DNA"}),
        (f">g\n{DNA.replace('T', 'u')}\n", "sequence.nucleic", {"found": "RNA"}),
        (f">g\n{PROTEIN[:5]}\n" + f">h\n{DNA}\n" * 2, "sequence.nucleic", {"found": "DNA"}),
        (f">a\n{'CCCHHHHHHHHEEEEECC' * 3}\n>b\n{'CHHHHEEEEC' * 3}\n", "sequence.structure", {"found": "CEH"}),
        (f">a\n{'GHIBESTCCCHHHHHHHHEEEEECC' * 3}\n", "sequence.structure", {"found": "BCEGHIST"}),
        (LFS, "file.git-lfs", {}),
    ],
)
def test_other_formats_are_named(tmp_path: Path, read, text: str, code: str, values: dict) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(text)
    with refused(code, path=path, **values) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (">a\nMKJL\n", "J stands for leucine or isoleucine"),
        (">a\nMK*L\n", "stop codon"),
        (">a\nMK?L\n", "write X for an unknown residue"),
        (">a\nMK<mask>L\n", "write X for an unknown residue"),
        (">a\nA24G\n", "instead of a mutation such as A24G, write the complete sequence"),
        (">a\n  1 mkvla\n  6 aggst\n", "Remove the numbers of residues"),
        (">a\n0011100\n", "Digits alone are labels or a mask"),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_the_advice_fits_the_letter(tmp_path: Path, read, text: str, found: str) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(text)
    with pytest.raises(InputError, match=found) as caught:
        read(path)
    assert caught.value.code in ("fasta.sequence", "task.residue")


def test_the_command_of_the_advice_makes_a_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "an alignment.a3m"
    path.write_text("#5\t1\n>101\nMKVLA\n>hit-1.a\nMK-LAggg\n>hit2\n.M-\n-A..\n")
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            read_records(path)
        command = str(caught.value).split("`")[1]
        assert command.startswith("sed ")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        path.write_text(path.read_text().partition("\n")[2])
    records = [(record.id, record.sequence) for record in read_records(tmp_path / "proteins.fasta")]
    assert records == [("101", "MKVLA"), ("hit-1.a", "MKLAGGG"), ("hit2", "MA")]


def test_headers_with_such_characters_are_ordinary(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">M07480:75:000:1\nMKVL\n>sp|Q99966|CITE1_HUMAN Cbp/p300 a-b.c;d\nMKVL\n>#5\nmkvl*\n")
    assert [(record.id, record.sequence) for record in read_records(path)] == [
        ("M07480:75:000:1", "MKVL"),
        ("sp|Q99966|CITE1_HUMAN", "MKVL"),
        ("#5", "MKVL"),
    ]


def test_a_sequence_in_the_header_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">mkvlaaggst\n")
    with refused("fasta.sequence", record=1) as caught:
        read_records(path)
    assert "Its header looks like the sequence" in str(caught.value)
    path.write_text(">P69905\n>b\nMKV\n")
    with refused("fasta.sequence", record=1) as caught:
        read_records(path)
    assert "Add its residues" in str(caught.value)


@pytest.mark.parametrize("cell", ["MK-LA", "MKVL:MKVV", "MK;LA"])
def test_cells_of_tables(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"id,sequence,target,set\na,MKV,1.5,train\nb,{cell},2.5,test\n")
    codes = {"-": "sequence.alignment", ":": "sequence.complex", ";": "task.residue"}
    with refused(next(code for letter, code in codes.items() if letter in cell), record="b") as caught:
        load_task("t", None, tmp_path)
    assert "sed" not in str(caught.value)


def test_proteins_of_the_letters_of_dna_are_read(tmp_path: Path) -> None:
    """Silk and elastin have many A and G, antifreeze proteins many A and T, and peptides are short."""
    path = tmp_path / "x.fasta"
    for text in (
        "GAGAGA" * 20,
        "AATAATAAGT" * 10,
        "ATGC",
        "NNNNNNNNNNNNNNNNNNNNNNN",
        "CGGCGGSPACTAGTCAYKW" * 3,
        DNA[:59],
        "GGGGS" * 20,
    ):
        path.write_text(f">a\n{text}\n")
        assert read_records(path)[0].sequence == text


def test_all_records_of_a_small_file_decide(tmp_path: Path) -> None:
    """The first block of a small file has all records but the last."""
    path = tmp_path / "x.fasta"
    for first, others in ((DNA, ["MKVLAAGGSTNCATGAC" * 3]), ("CEH" * 30, ["MKVLW"])):
        path.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate([first, *others])))
        assert [record.sequence for record in read_records(path)] == [first, *others]
    path.write_text(f">a\n{'LIVFMW' * 20_000}\n>b\n{DNA * 5000}\n")  # more letters than are counted
    with refused("fasta.sequence", record=1):
        read_records(path)
    path.write_text(f">a\n{'LIVFMW' * 10_000}\n>b\n{DNA * 1000}\n>c\n{DNA * 1000}\n")
    assert len(read_records(path)) == 3


@pytest.mark.parametrize(
    "text", [">P1;CRAB_ANAPL\nALPHA CRYSTALLIN B\nMDITIHNPLI\n*\n", ">F1;x\r\n\r\nMKV*\r\n>P1;y\n\nMK*"]
)
def test_pir_is_not_read_as_fasta(tmp_path: Path, text: str) -> None:
    path = tmp_path / "two words.pir"
    path.write_text(text, newline="")
    for _ in range(2):
        with refused("file.format", path=path, found="PIR format") as caught:
            read_records(path)
    command = str(caught.value).split("`")[1].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_records(tmp_path / "proteins.fasta")[0].sequence in ("MDITIHNPLI", "MKV")


def test_headers_that_start_like_pir_are_ordinary(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(">P1;a\nMKV\n>P1;b\nMK*\n")
    assert [record.id for record in read_records(path)] == ["P1;a", "P1;b"]
    path.write_text(">sp|P1;b\nMKV*\n")
    assert [record.id for record in read_records(path)] == ["sp|P1;b"]


@pytest.mark.parametrize("read", READERS[1:3])
def test_a_few_such_sequences_are_counted(tmp_path: Path, read, caplog) -> None:
    records = [PROTEIN * 9] * 30 + [DNA, "ACGT", "XXX", "X" * 40, "G" * 10, "G" * 9, "X" * 12 + "A"]
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">p{number}\n{record}\n" for number, record in enumerate(records)))
    read(path)
    assert "2 of 37 sequences contain only A, C, G, T, U and N" in caplog.text
    assert "2 of 37 sequences contain only X" in caplog.text


def test_both_ways_of_counting_agree(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sequences = [
        "".join(generator.choice(list(letters), generator.integers(1, 16)))
        for letters in ("ACGT", "X", "XA", "ACGTL", "ACGTUN", "LK")
        for _ in range(60)
    ]
    path = tmp_path / "x.fasta"
    path.write_text(
        "".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(["LLLLKKKK" * 500, *sequences]))
    )
    one, all_at_once = LetterCounts(), LetterCounts()
    for block in FastaReader(path, block_bytes=1000):
        all_at_once.add_all(block.sequences)
    for record in read_records(path):
        one.add(record.sequence)
    assert vars(all_at_once) == vars(one)
    assert one.num_sequences == 361
    assert min(one.num_nucleic, one.num_unknown) > 40


def test_a_task_notes_sequences_that_are_no_proteins(tmp_path: Path) -> None:
    rows = [("MKVLA", 1.5), ("LLMKV", 2.5), ("XXX", 0.5), ("A" * 12, 1.25), ("MKVLG", 1), ("GGMKV", 3)]
    sets = ("train", "train", "train", "val", "test", "test")
    lines = [f"{sequence},{target},{name}" for (sequence, target), name in zip(rows, sets, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["sequence,target,set", *lines]))
    notes = " ".join(load_task("t", None, tmp_path).notes)
    assert "1 of 6 sequences contain only X" in notes
    assert "1 of 6 sequences contain only A, C, G, T, U and N" in notes


def test_one_rule_for_hidden_files_and_subfolders(tmp_path: Path, caplog) -> None:
    for name in ("b.fasta", ".hid.fasta", "._b.fasta", "sub/c.fa.gz", "sub/.d.fasta", ".git/e.fasta", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(">a\nMKV\n")
    assert find_fasta_files(tmp_path) == [tmp_path / "b.fasta"]
    assert "skipped hidden files (._b.fasta, .hid.fasta)" in caplog.text
    assert "skipped FASTA files in subfolders (sub/c.fa.gz)" in caplog.text
    caplog.clear()
    assert find_fasta_files(tmp_path / ".hid.fasta") == [tmp_path / ".hid.fasta"]  # a file that is named is read
    assert find_fasta_files(tmp_path / "sub") == [tmp_path / "sub" / "c.fa.gz"]
    assert "subfolders" not in caplog.text
    (tmp_path / "b.fasta").unlink()
    with refused("fasta.none", path=tmp_path, nested=("sub/c.fa.gz",)):
        find_fasta_files(tmp_path)


@pytest.mark.parametrize("header", ["id,name,sequence", "Seq;id", "Protein\tsequence", "id\tseq"])
def test_the_command_for_a_table_makes_a_file_that_is_read(tmp_path: Path, header: str) -> None:
    delimiter = next(letter for letter in ",;\t" if letter in header)
    columns = header.lower().split(delimiter)
    cells = {"id": "p1", "protein": "p1", "name": "x"}
    row = delimiter.join(cells.get(name, "MKVLA") for name in columns)
    path = tmp_path / "a table.csv"
    path.write_text(f"{header}\n{row}\n", encoding="utf-8")
    with refused("file.format", path=path, found="a table") as caught:
        read_records(path)
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True, cwd=tmp_path)
    assert [(record.id, record.sequence) for record in read_records(tmp_path / "proteins.fasta")] == [("p1", "MKVLA")]


@pytest.mark.parametrize("text", [";first\n>p\nMKV\n", ">p\n;middle\nMKV\n"])
def test_the_command_for_comments_makes_a_file_that_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "it's mine.fasta"
    path.write_text(text)
    with refused("sequence.comment", path=path) as caught:
        read_records(path)
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True, cwd=tmp_path)
    assert [(record.id, record.sequence) for record in read_records(tmp_path / "proteins.fasta")] == [("p", "MKV")]


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d" / "x.fasta"
    path.parent.mkdir()
    path.write_text(">a\nMKV\n", encoding="utf-8")
    (tmp_path / "link.fasta").symlink_to(path)
    for others in ([path], [path.parent], [tmp_path / "link.fasta"]):
        with refused("fasta.twice", path=path):
            find_fasta_files([path, *others])
    (tmp_path / "copy.fasta").write_text(">a\nMKV\n", encoding="utf-8")  # another file with the same records is read
    assert len(find_fasta_files([path, tmp_path / "copy.fasta"])) == 2


def test_a_sequence_in_place_of_a_path_is_said() -> None:
    with refused("fasta.absent") as caught:
        find_fasta_files("MKVLAAGGSTRL")
    assert "It looks like a sequence" in str(caught.value)
    with refused("fasta.absent") as caught:
        find_fasta_files("proteins")
    assert "Check the path" in str(caught.value)

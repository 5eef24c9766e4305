"""Ids of real-world headers, read alike by every reader."""

from pathlib import Path

import pytest

from esm2kit.embedding import maps
from esm2kit.sequences.fasta import FastaReader, read_fasta
from esm2kit.sequences.headers import Header, find_control_character, parse_header

# header without '>' -> id, text after it
HEADERS = {
    "p1": ("p1", ""),
    "p1 ": ("p1", ""),
    " p1 a blank after '>'": ("p1", "a blank after '>'"),
    "p1\tafter a tab": ("p1", "after a tab"),
    "p1 \t two blanks": ("p1", "two blanks"),
    # NCBI: nr with Ctrl-A between the headers of identical proteins, gi numbers, a PDB chain
    "WP_000000001.1 protein A [Escherichia]\x01WP_000000002.1 protein B [Shigella]\x01XYZ99": (
        "WP_000000001.1",
        "protein A [Escherichia]",
    ),
    "WP_000000001.1\x01WP_000000002.1 protein B": ("WP_000000001.1", ""),
    "gi|15674171|ref|NP_268346.1| ribosomal protein S18": ("gi|15674171|ref|NP_268346.1|", "ribosomal protein S18"),
    "pdb|4HHB|A Chain A, HEMOGLOBIN": ("pdb|4HHB|A", "Chain A, HEMOGLOBIN"),
    # UniProt, UniRef, UniParc, AlphaFold DB
    "sp|P69905|HBA_HUMAN Hemoglobin subunit alpha OS=Homo sapiens OX=9606 GN=HBA1 PE=1 SV=2": (
        "sp|P69905|HBA_HUMAN",
        "Hemoglobin subunit alpha OS=Homo sapiens OX=9606 GN=HBA1 PE=1 SV=2",
    ),
    "sp|Q99966|CITE1_HUMAN Cbp/p300": ("sp|Q99966|CITE1_HUMAN", "Cbp/p300"),
    "UniRef50_P69905 Hemoglobin n=12 Tax=Catarrhini": ("UniRef50_P69905", "Hemoglobin n=12 Tax=Catarrhini"),
    "UPI0000000001 status=active": ("UPI0000000001", "status=active"),
    "AFDB:AF-P69905-F1 Hemoglobin UA=P69905": ("AFDB:AF-P69905-F1", "Hemoglobin UA=P69905"),
    # PDB, CATH, Pfam, MGnify, ColabFold, Illumina, biotrainer
    "4HHB_1|Chains A, C|Hemoglobin subunit alpha|Homo sapiens (9606)": (
        "4HHB_1|Chains",
        "A, C|Hemoglobin subunit alpha|Homo sapiens (9606)",
    ),
    "4hhb_A mol:protein length:141  HEMOGLOBIN": ("4hhb_A", "mol:protein length:141  HEMOGLOBIN"),
    "cath|4_3_0|1a3aA00/4-148": ("cath|4_3_0|1a3aA00/4-148", ""),
    "PF00042.25;HBA_HUMAN/7-107": ("PF00042.25;HBA_HUMAN/7-107", ""),
    "MGYP000000000001 PL=10 UP=0": ("MGYP000000000001", "PL=10 UP=0"),
    "101\t102": ("101", "102"),
    "M07480:75:000:1": ("M07480:75:000:1", ""),
    "Sequence0 TARGET=-1.5 SET=train VALIDATION=False": ("Sequence0", "TARGET=-1.5 SET=train VALIDATION=False"),
    # text outside ASCII: a no-break space is a part of the id, as only the three bytes end it
    "β-lactamase Ångström": ("β-lactamase", "Ångström"),
    "a\u00a0b c": ("a\u00a0b", "c"),
    "名前\u3000x y": ("名前\u3000x", "y"),
    "seq,1;'\"<&>": ("seq,1;'\"<&>", ""),
}


@pytest.mark.parametrize("line", HEADERS)
def test_header_is_split_into_id_and_text(line: str) -> None:
    assert parse_header(line) == Header(*HEADERS[line])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_fasta_reader_agrees_with_the_definition(tmp_path: Path, newline: str, block_bytes: int) -> None:
    path = tmp_path / "real.fasta"
    path.write_bytes("".join(f">{line}{newline}MKV{newline}" for line in HEADERS).encode())
    ids = [name for block in FastaReader(path, block_bytes) for name in block.ids.to_pylist()]
    assert ids == [name for name, _ in HEADERS.values()]
    assert [record.description for record in read_fasta(path)] == [line.rstrip(" ") for line in HEADERS]


def test_no_id() -> None:
    for line in ("", " ", "\t", " \t \x01"):
        assert parse_header(line).id == ""


def test_fields_of_the_first_of_joined_headers_colour_a_map() -> None:
    joined = "p OS=Escherichia coli OX=562\x01q OS=Shigella GN=x"
    assert maps.header_fields(joined) == {"OS": "Escherichia coli", "OX": "562"}


def test_control_characters() -> None:
    assert find_control_character("a\tb\x01c d é") is None
    assert find_control_character("a\x02b\x00") == "\x02"
    assert find_control_character("a\x7f") == "\x7f"

"""Recognise files and records that look like protein FASTA and are something else: alignments, complexes, comments."""

import re
import shlex
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.sequences.alphabet import IS_RESIDUE_BYTE

GAPS, CHAIN_BREAKS, COMMENT = "-.", ":/", ";"
# a text of residue letters that is as long as this is probably a sequence
MIN_SEQUENCE = 6
# what the first line of a file matches -> name of the format, what to do; FILE stands for the file
_EASEL = "Convert it with `esl-reformat fasta FILE > proteins.fasta`, which also removes the gaps."
_SED = "`sed '/^#/d; /^>/!s/[-.]//g' FILE > proteins.fasta`"
_STARTS = (
    (r"# STOCKHOLM", "an alignment in Stockholm format", _EASEL),
    (r"CLUSTAL|MUSCLE \(|PROBCONS", "an alignment in Clustal format", _EASEL),
    (r"!!AA_MULTIPLE_ALIGNMENT|PileUp", "an alignment in MSF format", _EASEL),
    (r"\d+\s+\d+\s*$", "an alignment in PHYLIP format", _EASEL),
    (r"#NEXUS", "an alignment in NEXUS format", "Export it as FASTA without gaps."),
    (r"#\d+\t\d+$", "an alignment of ColabFold", f"Remove its first line and the gaps with {_SED}."),
    (r"#\d+(,\d+)+\t\d+(,\d+)+$", "an alignment of a complex, from ColabFold", "Pass each chain as a record."),
    (r"@\S+", "a FASTQ file of sequencing reads", "Translate the reads to proteins and pass a FASTA file."),
    (r"LOCUS\s", "a GenBank file", "Download the proteins as FASTA."),
    (r"ID {3}\S", "a flat file of UniProt or EMBL", "Download the proteins as FASTA."),
    (r"(HEADER|TITLE|ATOM|CRYST1|REMARK) ", "a PDB file of a structure", "Download its sequences as FASTA."),
    (r"data_\w+$", "an mmCIF file of a structure", "Download its sequences as FASTA."),
    (r"(?i)<(!doctype|html|\?xml)", "a web page or XML", "Download the file itself, as FASTA."),
    (r"[{\[]", "JSON", "Save the proteins as FASTA."),
)
# the header of PIR (NBRF), which MODELLER reads: the kind of the sequence, and a name
_PIR = re.compile(rb">(P1|F1|D[LC]|R[LC]|N[13]|XX);")


def check_first_line(line: str, path: Path) -> None:
    """Check that the first line of a file is not that of another format.

    Args:
        line: The first line that is not blank, without its line ending.
        path: The file.

    Raises:
        InputError: The line starts a known format that is not FASTA, or it is a comment.
    """
    check_comment(line, str(path), path)
    for pattern, name, remedy in _STARTS:
        if re.match(pattern, line):
            raise InputError(
                f"{path}: this is {name}, not a FASTA file. {remedy.replace('FILE', shlex.quote(str(path)))}",
                code="file.format",
                path=path,
                found=name,
            )
    if len(line) >= MIN_SEQUENCE and line.isascii() and IS_RESIDUE_BYTE[list(line.upper().encode())].all():
        raise InputError(
            f"{path}: a sequence without a header. Write a line with '>' and a name above each sequence.",
            code="file.format",
            path=path,
            found="a sequence without a header",
        )
    delimiter = max(",;\t", key=line.count)
    columns = [name.strip().strip('"').lower() for name in line.split(delimiter)]
    if len(columns) > 1 and (sequence := next((name for name in columns if name.startswith("seq")), None)):
        at, number = columns.index(sequence) + 1, (columns.index("id") if "id" in columns else 0) + 1
        option = f"'{delimiter}'" if delimiter != "\t" else "'\\t'"
        convert = (
            f"""awk -F{option} 'NR>1 {{print ">"${number}"\\n"${at}}}' {shlex.quote(str(path))} > proteins.fasta"""
        )
        raise InputError(
            f"{path}: this is a table, not a FASTA file. Convert it with `{convert}`.",
            code="file.format",
            path=path,
            found="a table",
        )


def check_first_record(text: bytes, path: Path) -> None:
    """Check that a file that starts with '>' is not in PIR format, where a line of description follows the header.

    Args:
        text: The start of the file.
        path: The file.

    Raises:
        InputError: The first header has a code of PIR, and its record ends with '*' as in PIR.
    """
    if _PIR.match(text) and text.partition(b"\n>")[0].rstrip().endswith(b"*"):
        convert = f"""python -c "from Bio import SeqIO; SeqIO.convert('{path}', 'pir', 'proteins.fasta', 'fasta')\""""
        raise InputError(
            f"{path}: this is in PIR format, not a FASTA file. Convert it with `{convert}`.",
            code="file.format",
            path=path,
            found="PIR format",
        )


def check_comment(line: str, place: str, path: Path, record: str | int | None = None) -> None:
    """Check that a line of a FASTA file is not a comment.

    Args:
        line: The line.
        place: The file and the place in it, for the message.
        path: The file.
        record: Id or number of the record, if the line belongs to one.

    Raises:
        InputError: The line starts with ';'.
    """
    if line.startswith(COMMENT):
        raise InputError(
            f"{place}: a line starts with ';', which is a comment of Pearson's FASTA format. Remove such lines with "
            f"`grep -v '^;' {shlex.quote(str(path))} > proteins.fasta`.",
            code="sequence.comment",
            path=path,
            record=record,
        )


def check_sequence_format(place: str, letters: str, path: Path, record: str | int, is_table: bool = False) -> None:
    """Check that a sequence with a letter that is not a residue is not that of another format.

    Args:
        place: The file and the record, for the message.
        letters: The sequence in upper case, with all its characters.
        path: The file.
        record: Id or number of the record.
        is_table: Whether the sequence is a cell of a table.

    Raises:
        InputError: The sequence has a comment, is a part of an alignment, or is a complex of chains.
    """
    found = {letter for letter in letters if ord(letter) > 127 or not IS_RESIDUE_BYTE[ord(letter)]}
    if COMMENT in found and not is_table:
        check_comment(COMMENT, place, path, record)
    if found and found <= set(CHAIN_BREAKS):
        chains = len(list(filter(None, re.split(f"[{CHAIN_BREAKS}]", letters))))
        if chains > 1:
            raise InputError(
                f"{place}: a complex of {chains} chains ('{min(found)}' separates them). Write each chain as a record "
                "of its own, because ESM-2 reads single chains.",
                code="sequence.complex",
                path=path,
                record=record,
                chains=chains,
            )
    if found & set(GAPS) and found <= {*GAPS, *CHAIN_BREAKS, "*", "J"}:
        at = min(letters.index(gap) for gap in found & set(GAPS))
        remedy = "from the column of sequences" if is_table else f"with {_SED.replace('FILE', shlex.quote(str(path)))}"
        raise InputError(
            f"{place}: the gap '{letters[at]}' at residue {at + 1:,} belongs to an alignment. Remove "
            f"the gaps {remedy}.",
            code="sequence.alignment",
            path=path,
            record=record,
            found=letters[at],
            residue=at + 1,
        )


def advise_on_letter(letter: str, sequence: str) -> str:
    """Return what to do about a letter that is not a residue, and the sequence that has it."""
    if sequence.isdigit():
        return "Digits alone are labels or a mask: pass the FASTA file of the sequences."
    if letter == "J":
        return "J stands for leucine or isoleucine, and ESM-2 has no token for it: write L or I, or X for unknown."
    if letter == "*":
        return "It is a stop codon: end the sequence there, or remove the record."
    if letter.isdigit():
        return "Remove the numbers of residues; instead of a mutation such as A24G, write the complete sequence."
    if letter in GAPS + "?~_<":
        return "It is not a residue: remove it, or write X for an unknown residue."
    return ""

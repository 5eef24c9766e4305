"""Read the protein chains of PDB and mmCIF files, align them to sequences, and write values as B factors.

Biopython parses the files. It is imported in the functions, because that takes a moment.
"""

import gzip
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.core.paths import expand_path
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.text import TextReader

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
MAX_BYTES = 1 << 30  # of text; the largest entries of the Protein Data Bank have a few hundred megabytes
BLOCK_BYTES = 1 << 20
# Adjacent residues have CA atoms 3.8 Angstrom apart, or 2.9 with a cis peptide bond.
MAX_BOND = 4.2
# The smallest share of equal letters among the aligned residues, and of the shorter sequence that must be aligned.
MIN_IDENTITY, MIN_ALIGNED = 0.9, 0.5
WORD = 5  # letters of the words by which unrelated sequences are recognised without an alignment
MIN_SHARED_WORDS = 0.2
WATERS = ("HOH", "WAT", "DOD", "SOL", "TIP", "TP3")
_PDB_RECORDS = (
    "HEADER", "TITLE ", "COMPND", "SOURCE", "KEYWDS", "EXPDTA", "AUTHOR", "REVDAT", "REMARK", "DBREF ", "SEQRES",
    "CRYST1", "ORIGX1", "SCALE1", "MODEL ", "ATOM  ", "HETATM", "PARENT", "SSBOND", "HELIX ", "SHEET ",
)  # fmt: skip
_COORDINATES_END = 54  # the column where the coordinates of an atom end in a PDB file
_PDB_B_FACTORS = (-99.99, 999.99)  # that six columns with two decimals hold


class Chain(NamedTuple):
    """The observed residues of a protein chain, in the order of the file.

    Args:
        name: the chain's name, as the authors gave it.
        sequence: one letter per residue; modified residues have the letter of their parent (M for MSE), and unknown
            ones X.
        numbers: number of each residue in the file, with its insertion code, such as "52A".
        ca_C3: (C, 3) coordinates of the CA atoms in Angstrom.
        cb_C3: (C, 3) coordinates of the CB atoms, of CA for glycine; NaN where the atom is missing.
        modified: number of modified residues.
        alternatives: number of residues with alternative positions, of which the one with the highest occupancy is
            used.
    """

    name: str
    sequence: str
    numbers: tuple[str, ...]
    ca_C3: np.ndarray
    cb_C3: np.ndarray
    modified: int
    alternatives: int

    @property
    def breaks(self) -> np.ndarray:
        """Indices of the residues before which the chain is broken: their CA is too far from the one before."""
        return np.flatnonzero(np.linalg.norm(np.diff(self.ca_C3, axis=0), axis=1) > MAX_BOND) + 1


class Structure(NamedTuple):
    """The protein chains of a file.

    Args:
        path: the file.
        format: "pdb" or "mmcif".
        chains: those of the first model that have protein residues.
        num_models: number of models, such as those of NMR.
    """

    path: Path
    format: str
    chains: tuple[Chain, ...]
    num_models: int

    @property
    def id(self) -> str:
        """The name of the file without its suffixes: `1abc.pdb.gz` -> `1abc`."""
        return strip_structure_suffix(self.path)

    def select(self, names: Sequence[str] = ()) -> tuple[Chain, ...]:
        """Select chains by name.

        Args:
            names: of the chains; empty for all.

        Returns:
            The chains in the order of the names.

        Raises:
            InputError: there is no such chain.
        """
        by_name = {chain.name: chain for chain in self.chains}
        for name in names:
            if name not in by_name:
                raise InputError(
                    f"{self.path} has no protein chain '{name}'; its chains are {', '.join(map(repr, by_name))}.",
                    code="structure.chain",
                    path=self.path,
                    found=name,
                    allowed=tuple(by_name),
                )
        return tuple(by_name[name] for name in names) if names else self.chains


class ChainFit(NamedTuple):
    """The alignment of a chain to a protein.

    Args:
        rows_T: (T,) index of the chain's residue for each residue of the protein; -1 where it was not observed.
        identity: share of equal letters among the aligned residues.
        num_outside: residues of the chain that the protein does not have, such as those of a tag.
    """

    rows_T: np.ndarray
    identity: float
    num_outside: int

    def take_from_chain(self, values_C: np.ndarray) -> np.ndarray:
        """Arrange values of the chain's residues (C, ...) by the protein's residues (T, ...), with NaN in the gaps."""
        values = np.asarray(values_C, dtype=np.float64)[np.maximum(self.rows_T, 0)]
        values[self.rows_T < 0] = np.nan
        return values

    def place_on_chain(self, values_T: np.ndarray, num_residues: int) -> np.ndarray:
        """Arrange values of the protein's residues by the chain's residues, as `write_b_factors` takes them.

        Args:
            values_T: (T,) values.
            num_residues: number C of residues of the chain.

        Returns:
            (C,) values, NaN for residues outside the protein.
        """
        values = np.full(num_residues, np.nan)
        values[self.rows_T[self.rows_T >= 0]] = np.asarray(values_T, dtype=np.float64)[self.rows_T >= 0]
        return values


def is_structure_name(name: str) -> bool:
    """Return whether a file in a folder is a structure by its name."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES) and not name.startswith(".")


def strip_structure_suffix(path: Path) -> str:
    """Return the name of a file without the suffixes of structures and compression."""
    name = Path(path).name
    for suffixes in ((".gz", ".zst"), SUFFIXES):
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
        name = name[: len(name) - len(suffix)] or name
    return name


def find_structures(path: Path) -> list[Path]:
    """Find structure files.

    Args:
        path: a file, or a folder whose files are found by their suffix.

    Returns:
        The files, sorted by name.

    Raises:
        InputError: the path does not exist, or the folder has no structure.
    """
    path = expand_path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder. Check the path.", code="structure.absent", path=path)
    found = sorted(file for file in path.iterdir() if file.is_file() and is_structure_name(file.name))
    if not found:
        raise InputError(
            f"{path}: no structure in this folder. Names must end in {', '.join(SUFFIXES)} (.gz).",
            code="structure.none",
            path=path,
        )
    return found


def read_structure(path: Path) -> Structure:
    """Read the protein chains of a PDB or mmCIF file.

    Residues are those of the polymer: also modified ones, which files list as HETATM, but neither ligands nor water. Of
    alternative residues and positions, the one with the highest occupancy is used. Of several models, the first one is
    used.

    Args:
        path: a plain, gzip or Zstandard file; the format is detected from the content.

    Returns:
        The structure.

    Raises:
        InputError: the file cannot be read completely, or has no protein chain.
    """
    path = expand_path(path)
    text = _read_text(path)
    format = _detect_format(text, path)
    parsed = _parse(text, format, path)
    models = list(parsed)
    chains = [_read_chain(chain) for chain in models[0]] if models else []
    found = tuple(chain for chain in chains if chain is not None)
    if not found:
        raise InputError(
            f"{path}: no protein chain (no residue has a CA atom). Pass the structure of a protein.",
            code="structure.no-protein",
            path=path,
        )
    if broken := next((chain for chain in found if not np.isfinite(chain.ca_C3).all()), None):
        _raise_unreadable(path, f"a coordinate of chain '{broken.name}' is not a finite number")
    return Structure(path, format, found, len(models))


def _read_text(path: Path) -> str:
    reader, data, num_bytes = TextReader(path), [], 0
    for chunk in reader.chunks(BLOCK_BYTES):
        data.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > MAX_BYTES:
            _raise_unreadable(path, f"it has more than {MAX_BYTES >> 20:,} MiB of text")
    content = b"".join(data)
    if not content.strip():
        _raise_unreadable(path, "it is empty")
    if b"\0" in content:
        _raise_unreadable(path, "it is not text (BinaryCIF and MMTF are not supported)")
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _raise_unreadable(path: Path, found: str) -> NoReturn:
    raise InputError(
        f"{path}: cannot read the structure: {found}. Pass a complete PDB or mmCIF file.",
        code="structure.unreadable",
        path=path,
        found=found,
    ) from None


def _detect_format(text: str, path: Path) -> str:
    """Return "pdb" or "mmcif", after a check that the parser will read all of the file."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    first = next((line for line in lines if not line.startswith("#")), "")
    if first.lower().startswith("data_"):
        _check_mmcif(lines, path)
        return "mmcif"
    if not any(line.ljust(6)[:6] in _PDB_RECORDS for line in lines[:50]):
        _raise_unreadable(path, f"it is neither PDB nor mmCIF (it starts with '{first.strip()[:30]}')")
    _check_pdb(lines, text.endswith("\n"), path)
    return "pdb"


def _check_mmcif(lines: Sequence[str], path: Path) -> None:
    blocks, in_text = [], False
    for place, line in enumerate(lines):
        if line.startswith(";"):
            in_text = not in_text
        elif not in_text and line[:5].lower() == "data_":
            blocks.append(place)
    if len(blocks) > 1:
        _raise_unreadable(path, f"it has {len(blocks)} data blocks, of which each must be a file")
    # programs that end the first line's category by '#' also end the last one with it
    if lines[blocks[0] + 1 : blocks[0] + 2] == ["#"] and lines[-1] != "#":
        _raise_unreadable(path, "it was cut short (its last line is not '#')")


def _check_pdb(lines: Sequence[str], is_complete: bool, path: Path) -> None:
    atoms = [place for place, line in enumerate(lines) if line.startswith(("ATOM  ", "HETATM"))]
    # the Protein Data Bank writes a HEADER and, at the end, an END
    if lines[0].startswith("HEADER") and not any(line.startswith("END") for line in lines[-5:]):
        _raise_unreadable(path, "it was cut short (it has a HEADER but no END)")
    unfinished = not is_complete and atoms[-1:] == [len(lines) - 1] and len(lines[-1]) < len(lines[atoms[0]])
    if unfinished or any(len(lines[place]) < _COORDINATES_END for place in atoms):
        _raise_unreadable(path, "it was cut short (a line of an atom is not complete)")
    end = next((place for place, line in enumerate(lines) if line == "END" or line.startswith("CONECT")), len(lines))
    if atoms and atoms[-1] > end:
        _raise_unreadable(path, "it has atoms after its END or CONECT, as of several structures, each of which must be "
                          "a file")  # fmt: skip


def _parse(text: str, format: str, path: Path) -> Any:
    """Parse the text with Biopython; anything that would lose residues is an error."""
    from Bio.PDB import MMCIFParser, PDBParser

    if format == "pdb":
        text = _drop_waters(text)
    parser = (PDBParser if format == "pdb" else MMCIFParser)(QUIET=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parsed = parser.get_structure("", io.StringIO(text))
        except Exception as error:  # of many kinds, for content that the parser does not expect
            if format == "mmcif":
                _check_atom_table(text, path)  # its message is clearer
            if isinstance(error, KeyError):
                _raise_unreadable(path, f"it has no {error.args[0]}")
            _raise_unreadable(path, _describe_error(error))
    lost = (" ".join(str(each.message).split()) for each in caught if "Exception ignored" in str(each.message))
    for message in lost:
        found = message.removeprefix("PDBConstructionException: ").partition(". Exception ignored")[0]
        # neither column decides about a residue: the occupancy is then 1
        if not found.startswith(("Invalid or missing occupancy", "Invalid or missing B factor")):
            _raise_unreadable(path, found[0].lower() + found[1:])
    return parsed


def _describe_error(error: Exception) -> str:
    """Return an error of Biopython's as a clause of one line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text[0].lower() + text[1:]


def _drop_waters(text: str) -> str:
    """Replace water molecules, whose numbers may occur twice in files of simulations; the lines keep their numbers."""
    return "\n".join(
        "REMARK" if line.startswith(("ATOM", "HETATM")) and line[17:20] in WATERS else line for line in text.split("\n")
    )


def _read_table(text: str, path: Path) -> Any:
    """Read the items of an mmCIF file by name."""
    from Bio.PDB.MMCIF2Dict import MMCIF2Dict

    try:
        return MMCIF2Dict(io.StringIO(text))
    except Exception as error:  # of many kinds, for content that the parser does not expect
        _raise_unreadable(path, _describe_error(error))


def _check_atom_table(text: str, path: Path) -> None:
    """Check that the table of atoms exists and that its last row is complete."""
    columns = {name: values for name, values in _read_table(text, path).items() if name.startswith("_atom_site.")}
    if not columns:
        _raise_unreadable(path, "it is mmCIF without atoms (no _atom_site)")
    if len(set(map(len, columns.values()))) > 1:
        _raise_unreadable(path, "it was cut short (the last row of _atom_site is not complete)")


class _Candidate(NamedTuple):
    """A residue of Biopython's, or one of several alternative residues at a position."""

    residue: Any
    occupancy: float


def _read_chain(chain: Any) -> Chain | None:
    """Convert a chain of Biopython's; None if it has no protein residue."""
    positions: dict[tuple[int, str], list[_Candidate]] = {}
    for each in chain:
        alternatives = each.disordered_get_list() if each.is_disordered() == 2 else [each]
        for residue in alternatives:
            if residue.id[0] != "W" and (ca := _find_carbon(residue, "CA")) is not None:
                occupancy = 1.0 if ca.occupancy is None else float(ca.occupancy)
                positions.setdefault(each.id[1:], []).append(_Candidate(residue, occupancy))
    chosen = [max(candidates, key=lambda candidate: candidate.occupancy) for candidates in positions.values()]
    several = [len(candidates) > 1 for candidates in positions.values()]
    residues = [candidate.residue for candidate in chosen]
    ca_C3 = np.array([_find_carbon(residue, "CA").coord for residue in residues], dtype=np.float64).reshape(-1, 3)
    kept = [index for index in range(len(residues)) if _is_in_polymer(residues, ca_C3, index)]
    if not kept:
        return None
    rows = [residues[index] for index in kept]
    alternatives = sum(several[index] or residues[index].is_disordered() > 0 for index in kept)
    letters = [_find_letter(residue) for residue in rows]
    return Chain(
        name=chain.id.strip(),
        sequence="".join(letters),
        numbers=tuple(f"{residue.id[1]}{residue.id[2].strip()}" for residue in rows),
        ca_C3=ca_C3[kept],
        cb_C3=np.array([_find_cb(residue) for residue in rows]),
        modified=sum(residue.get_resname().strip() not in _standard_names() for residue in rows),
        alternatives=alternatives,
    )


@cache
def _standard_names() -> frozenset[str]:
    from Bio.Data.PDBData import protein_letters_3to1

    return frozenset(protein_letters_3to1)


def _find_letter(residue: Any) -> str:
    """Return the letter of a residue; a modified one has that of its parent, an unknown one has X."""
    from Bio.Data.PDBData import protein_letters_3to1_extended

    letter = protein_letters_3to1_extended.get(residue.get_resname().strip(), "X")
    return letter if letter in STANDARD_RESIDUES + "UO" else "X"


def _find_carbon(residue: Any, name: str) -> Any:
    """Return a carbon atom of a residue by its name, None if there is none; the CA of a calcium ion is not one."""
    atom = residue[name] if residue.has_id(name) else None
    return atom if atom is not None and (atom.element or "C") == "C" else None


def _find_cb(residue: Any) -> np.ndarray:
    name = "CA" if residue.get_resname().strip() == "GLY" else "CB"
    atom = _find_carbon(residue, name)
    return np.full(3, np.nan) if atom is None else np.asarray(atom.coord, dtype=np.float64)


def _is_in_polymer(residues: Sequence[Any], ca_C3: np.ndarray, index: int) -> bool:
    """Return whether a residue with a CA atom is in the chain, and not a ligand such as a free amino acid."""
    from Bio.Data.PDBData import protein_letters_3to1_extended

    residue = residues[index]
    name = residue.get_resname().strip()
    if residue.id[0] == " " or (name in protein_letters_3to1_extended and name not in _standard_names()):
        return True
    near = [other for other in (index - 1, index + 1) if 0 <= other < len(residues)]
    return bool(near) and min(np.linalg.norm(ca_C3[near] - ca_C3[index], axis=1)) <= MAX_BOND


def align_chain(chain: Chain, sequence: str, place: str = "the protein") -> ChainFit:
    """Align the observed residues of a chain to the sequence of a protein.

    A chain that lacks residues is placed by its residue numbers where these agree with the sequence, and by a pairwise
    alignment elsewhere; gaps are placed where the chain is broken.

    Args:
        chain: the chain.
        sequence: the protein's residues.
        place: name of the protein, for the message.

    Returns:
        The alignment.

    Raises:
        InputError: too few of the residues agree.
    """
    rows_T = _align_by_text(chain.sequence, sequence)
    if rows_T is None:
        rows_T = _align_by_numbers(chain, sequence)
    if rows_T is None and _share_words(chain.sequence, sequence):
        rows_T = _align_pairwise(chain, sequence)
    placed = np.flatnonzero(rows_T >= 0) if rows_T is not None else np.empty(0, dtype=np.int64)
    equal = sum(chain.sequence[rows_T[residue]] in (sequence[residue], "X") for residue in placed.tolist())
    identity = equal / max(len(placed), 1)
    if identity < MIN_IDENTITY or len(placed) < MIN_ALIGNED * min(len(sequence), len(chain.sequence)):
        found = f"{equal} of its {len(chain.sequence)} residues agree" if len(placed) else "no part of it agrees"
        raise InputError(
            f"chain '{chain.name}' of the structure does not fit {place} with {len(sequence)} residues ({found}). Pass "
            "the structure of this protein.",
            code="structure.fit",
            chain=chain.name,
            agree=equal,
            found=len(chain.sequence),
            residues=len(sequence),
        )
    assert rows_T is not None
    return ChainFit(rows_T, identity, len(chain.sequence) - len(placed))


def _align_by_text(observed: str, sequence: str) -> np.ndarray | None:
    """Place a chain without gaps that occurs once in the sequence."""
    start = sequence.find(observed)
    if start < 0 or sequence.find(observed, start + 1) >= 0:
        return None
    rows_T = np.full(len(sequence), -1)
    rows_T[start : start + len(observed)] = np.arange(len(observed))
    return rows_T


def _align_by_numbers(chain: Chain, sequence: str) -> np.ndarray | None:
    """Place each residue by its number, if one shift makes all letters agree."""
    if not all(re.fullmatch(r"-?\d+", number) for number in chain.numbers):
        return None
    numbers_C = np.array([int(number) for number in chain.numbers])
    if (np.diff(numbers_C) < 1).any():
        return None
    observed_C = np.frombuffer(chain.sequence.encode(), dtype=np.uint8)
    sequence_T = np.frombuffer(sequence.encode(), dtype=np.uint8)
    span = int(numbers_C[-1] - numbers_C[0])
    fits = []
    for start in range(len(sequence) - span):
        places_C = numbers_C - numbers_C[0] + start
        if ((sequence_T[places_C] == observed_C) | (observed_C == ord("X"))).all():
            fits.append(places_C)
    if len(fits) != 1:
        return None
    rows_T = np.full(len(sequence), -1)
    rows_T[fits[0]] = np.arange(len(numbers_C))
    return rows_T


def _share_words(observed: str, sequence: str) -> bool:
    """Return whether two sequences have enough words in common to be worth an alignment."""
    words = {observed[start : start + WORD] for start in range(len(observed) - WORD + 1)}
    known = {sequence[start : start + WORD] for start in range(len(sequence) - WORD + 1)}
    smaller = min(len(words), len(known))
    return not smaller or len(words & known) >= MIN_SHARED_WORDS * smaller


def _align_pairwise(chain: Chain, sequence: str) -> np.ndarray:
    """Align with affine gaps, which are free at the ends, and move each gap of the chain to where it is broken."""
    from Bio.Align import PairwiseAligner

    aligner = PairwiseAligner(
        mode="global", match_score=5, mismatch_score=-4, open_gap_score=-12, extend_gap_score=-0.5, end_gap_score=0
    )
    best = aligner.align(sequence, chain.sequence)[0]
    places_C = np.full(len(chain.sequence), -1)
    for (first, last), (start, stop) in zip(*best.aligned, strict=True):
        places_C[start:stop] = np.arange(first, last)
    jumps_C = np.append(0.0, np.linalg.norm(np.diff(chain.ca_C3, axis=0), axis=1))
    for row in range(1, len(places_C)):
        if places_C[row - 1] >= 0 and places_C[row] > places_C[row - 1] + 1:
            _move_gap(places_C, row, chain.sequence, sequence, jumps_C)
    rows_T = np.full(len(sequence), -1)
    aligned = np.flatnonzero(places_C >= 0)
    rows_T[places_C[aligned]] = aligned
    return rows_T


def _move_gap(places_C: np.ndarray, row: int, observed: str, sequence: str, jumps_C: np.ndarray) -> None:
    """Move the gap before a residue to the equivalent place with the longest jump between adjacent CA atoms.

    The letters of G---GA and GG---A are the same, and only the coordinates show which residue is missing.
    """
    size = int(places_C[row] - places_C[row - 1]) - 1
    shifts = [0]
    right = 0
    while row + right + 1 < len(places_C) and places_C[row + right] == places_C[row] + right:
        if sequence[places_C[row + right] - size] != observed[row + right]:
            break
        right += 1
        shifts.append(right)
    left = 1
    while row - left > 0 and places_C[row - left] == places_C[row - 1] - left + 1:
        if sequence[places_C[row - left] + size] != observed[row - left]:
            break
        shifts.append(-left)
        left += 1
    best = max(shifts, key=lambda shift: (jumps_C[row + shift], -abs(shift)))
    places_C[row : row + max(best, 0)] -= size
    places_C[row + min(best, 0) : row] += size


def find_chain(chains: Iterable[Chain], sequence: str) -> tuple[Chain, ChainFit] | None:
    """Find the chain that fits a protein best.

    Args:
        chains: the chains to choose from.
        sequence: the protein's residues.

    Returns:
        The chain with the largest number of observed residues and its alignment; None if no chain fits.
    """
    best: tuple[int, Chain, ChainFit] | None = None
    for chain in chains:
        try:
            fit = align_chain(chain, sequence)
        except InputError:
            continue
        observed = int((fit.rows_T >= 0).sum())
        if best is None or observed > best[0]:
            best = observed, chain, fit
    return best[1:] if best else None


def write_b_factors(structure: Structure, out: Path, values: Mapping[str, np.ndarray], missing: float = 0.0) -> Path:
    """Write a copy of a structure with values in the column of B factors, complete or not at all.

    Every atom of a residue gets the residue's value, in all models. The remaining content is kept; Biopython formats an
    mmCIF file anew.

    Args:
        structure: as `read_structure` returned it; its file is read again.
        out: the copy, in the same format, compressed if its name ends in .gz.
        values: name of a chain -> (C,) values of its residues, finite or NaN.
        missing: value of the other atoms, and of residues whose value is NaN.

    Returns:
        `out`.

    Raises:
        InputError: there is no such chain, an array has another size, or a value does not fit the column of a PDB file.
    """
    by_residue: dict[tuple[str, str], float] = {}
    for name, values_C in values.items():
        (chain,) = structure.select([name])
        array = np.asarray(values_C, dtype=np.float64)
        if array.shape != (len(chain.sequence),):
            raise InputError(
                f"chain '{name}' of {structure.path} has {len(chain.sequence)} residues, but found values of shape "
                f"{array.shape}. Pass one value per residue.",
                code="structure.values",
                chain=name,
                found=array.shape,
                residues=len(chain.sequence),
            )
        by_residue |= {
            (name, number): float(value)
            for number, value in zip(chain.numbers, array, strict=True)
            if not np.isnan(value)
        }
    low, high = _PDB_B_FACTORS
    for (name, number), value in [*by_residue.items(), (("", ""), missing)]:
        if not np.isfinite(value) or (structure.format == "pdb" and not low <= value <= high):
            raise InputError(
                f"the value {value} of residue {number} of chain '{name}' does not fit the column of B factors, which "
                f"holds {low} to {high}. Scale the values.",
                code="structure.value",
                chain=name,
                residue=number,
                found=value,
            )
    text = _read_text(structure.path)
    if structure.format == "pdb":
        text = "\n".join(_replace_in_pdb(line, by_residue, missing) for line in text.split("\n"))
    else:
        text = _replace_in_mmcif(text, structure.path, by_residue, missing)
    data = text.encode("utf-8")
    out = Path(out)
    with atomic_path(out) as part:
        # without a date, so that equal content gives equal files
        part.write_bytes(gzip.compress(data, mtime=0) if out.name.endswith(".gz") else data)
    return out


def _replace_in_pdb(line: str, by_residue: Mapping[tuple[str, str], float], missing: float) -> str:
    if not line.startswith(("ATOM  ", "HETATM")):
        return line
    number = f"{line[22:26].strip()}{line[26:27].strip()}"
    value = by_residue.get((line[21:22].strip(), number), missing)
    line = line.ljust(66)
    occupancy = line[54:60] if line[54:60].strip() else "  1.00"
    return f"{line[:54]}{occupancy}{value:6.2f}{line[66:]}"


def _replace_in_mmcif(text: str, path: Path, by_residue: Mapping[tuple[str, str], float], missing: float) -> str:
    from Bio.PDB.mmcifio import MMCIFIO

    table = _read_table(text, path)
    numbers = table.get("_atom_site.auth_seq_id", table["_atom_site.label_seq_id"])
    codes = table["_atom_site.pdbx_PDB_ins_code"]
    keys = (
        (chain, number if code in (".", "?") else f"{number}{code}")
        for chain, number, code in zip(table["_atom_site.auth_asym_id"], numbers, codes, strict=True)
    )
    table["_atom_site.B_iso_or_equiv"] = [f"{by_residue.get(key, missing):.3f}" for key in keys]
    writer, stream = MMCIFIO(), io.StringIO()
    writer.set_dict(table)
    writer.save(stream)
    return stream.getvalue()

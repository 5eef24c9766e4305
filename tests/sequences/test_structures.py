"""Chains of PDB and mmCIF files: which residues they have, how they fit a protein, and values as B factors."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from Bio.PDB import MMCIFParser, PDBParser
from support.errors import refused
from support.structure_files import FORMATS, Atom, build_chain, format_mmcif, format_pdb, write_structure

from esm2kit.sequences.structures import (
    align_chain,
    find_chain,
    find_structures,
    read_structure,
    strip_structure_suffix,
    write_b_factors,
)

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDG"
BOTH = pytest.mark.parametrize("suffix", list(FORMATS))


@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_a_chain_has_its_sequence_numbers_and_coordinates(suffix: str, packed: bool, tmp_path: Path) -> None:
    path = write_structure(tmp_path / f"1abc.{suffix}", build_chain(SEQUENCE, first=5) + build_chain("MKV", "B"))
    if packed:
        path = tmp_path / f"1abc.{suffix}.gz"
        path.write_bytes(gzip.compress((tmp_path / f"1abc.{suffix}").read_bytes()))
    found = read_structure(path)
    assert (found.id, found.num_models) == ("1abc", 1)
    first, second = found.chains
    assert (first.name, first.sequence, second.name, second.sequence) == ("A", SEQUENCE, "B", "MKV")
    assert first.numbers == tuple(str(number) for number in range(5, 5 + len(SEQUENCE)))
    expected = np.array([[3.8 * place, 0 if letter == "G" else 1.5, 0] for place, letter in enumerate(SEQUENCE)])
    np.testing.assert_allclose(first.cb_C3, expected, atol=1e-3)
    assert first.breaks.size == 0
    assert found.select(["B"]) == (second,)
    with refused("structure.chain", found="C", allowed=("A", "B")):
        found.select(["C"])


@BOTH
def test_modified_residues_belong_to_the_chain_and_ligands_do_not(suffix: str, tmp_path: Path) -> None:
    atoms = [atom._replace(residue="MSE", hetero=True) if atom.number == 3 else atom for atom in build_chain("GAMAV")]
    far = build_chain("G", first=99)  # a free glycine, calcium and water, as crystals have them
    atoms += [atom._replace(hetero=True, xyz=(0.0, 30.0, 0.0)) for atom in far]
    atoms += [Atom("CA", "CA", "A", 100, (15.2, 2.0, 1.0), hetero=True, element="CA")]
    # simulations number their waters twice
    waters = (101, 101) if suffix == "pdb" else (101, 102)
    atoms += [Atom("O", "HOH", "A", number, (0, 9, 1), hetero=True, element="O") for number in waters]
    (chain,) = read_structure(write_structure(tmp_path / f"a.{suffix}", atoms)).chains
    assert (chain.sequence, chain.modified) == ("GAMAV", 1)
    # a residue that no dictionary knows is X where it is bonded to the chain
    atoms = [atom._replace(residue="QQQ", hetero=True) if atom.number == 2 else atom for atom in build_chain("GAMAV")]
    (chain,) = read_structure(write_structure(tmp_path / f"b.{suffix}", atoms)).chains
    assert chain.sequence == "GXMAV"
    assert align_chain(chain, "GAMAV").identity == 1


@BOTH
def test_of_alternatives_the_one_with_the_highest_occupancy_is_used(suffix: str, tmp_path: Path) -> None:
    atoms = build_chain("GAV")
    moved = [
        atom._replace(altloc=altloc, occupancy=occupancy, xyz=(atom.xyz[0], atom.xyz[1], z))
        for atom in atoms
        if atom.number == 2
        for altloc, occupancy, z in (("A", 0.3, 1.0), ("B", 0.7, 5.0))
    ]
    rest = [atom for atom in atoms if atom.number != 2]
    ordered = [*rest[:3], *moved, *rest[3:]]
    (chain,) = read_structure(write_structure(tmp_path / f"a.{suffix}", ordered)).chains
    assert (chain.sequence, chain.alternatives) == ("GAV", 1)
    np.testing.assert_allclose(chain.cb_C3[1], [3.8, 1.5, 5.0], atol=1e-3)
    # two different residues at one position
    mutant = [
        atom._replace(altloc=altloc, occupancy=occupancy, residue=name)
        for name, altloc, occupancy in (("SER", "A", 0.6), ("ALA", "B", 0.4))
        for atom in atoms
        if atom.number == 2
    ]
    (chain,) = read_structure(write_structure(tmp_path / f"b.{suffix}", [*rest[:3], *mutant, *rest[3:]])).chains
    assert (chain.sequence, chain.alternatives) == ("GSV", 1)


@BOTH
def test_insertion_codes_models_and_missing_atoms(suffix: str, tmp_path: Path) -> None:
    atoms = build_chain("MKTA")
    inserted = [atom._replace(number=2, insertion="A") if atom.number == 3 else atom for atom in atoms]
    inserted = [atom for atom in inserted if not (atom.name == "CB" and atom.number == 4)]
    (chain,) = read_structure(write_structure(tmp_path / f"a.{suffix}", inserted)).chains
    assert (chain.sequence, chain.numbers) == ("MKTA", ("1", "2", "2A", "4"))
    assert np.isnan(chain.cb_C3).all(1).tolist() == [False, False, False, True]
    second = [atom._replace(model=2, xyz=(0.0, 0.0, float(atom.number))) for atom in atoms]
    found = read_structure(write_structure(tmp_path / f"b.{suffix}", atoms + second))
    assert (found.num_models, found.chains[0].ca_C3[1, 0]) == (2, pytest.approx(3.8, abs=1e-3))


@pytest.mark.parametrize(
    ("sequence", "missing"),
    [
        (SEQUENCE, (0, 1, 5, 6, 7, 40)),
        ("MKTGGGGGGAYIAKQRQISFVKSHFSRQLEERL", (4, 5, 6)),  # any three of the glycines by the letters alone
        ("MKTGGGGGGAYIAKQRQISFVKSHFSRQLEERL", (3, 4)),
        ("MKTGGGGGGAYIAKQRQISFVKSHFSRQLEERL", (7, 8)),
    ],
)
@pytest.mark.parametrize("numbered", [True, False])
def test_missing_residues_are_placed_where_the_chain_is_broken(
    sequence: str, missing: tuple[int, ...], numbered: bool, tmp_path: Path
) -> None:
    atoms = build_chain(sequence, missing=missing)
    if not numbered:  # numbers without gaps, as some programs write them
        new = {number: place for place, number in enumerate(dict.fromkeys(atom.number for atom in atoms), 1)}
        atoms = [atom._replace(number=new[atom.number]) for atom in atoms]
    (chain,) = read_structure(write_structure(tmp_path / "a.pdb", atoms)).chains
    fit = align_chain(chain, sequence)
    observed = [place for place in range(len(sequence)) if place not in missing]
    assert fit.rows_T.tolist() == [observed.index(place) if place in observed else -1 for place in range(len(sequence))]
    assert (fit.identity, fit.num_outside) == (1, 0)
    assert np.isnan(fit.take_from_chain(chain.cb_C3)[list(missing)]).all()
    placed = fit.place_on_chain(np.arange(len(sequence)), len(chain.sequence))
    assert placed.tolist() == observed


def test_tags_and_mutations_fit_and_another_protein_does_not(tmp_path: Path) -> None:
    tagged = "HHHHHHSS" + SEQUENCE[:10] + "W" + SEQUENCE[11:]
    (chain,) = read_structure(write_structure(tmp_path / "a.pdb", build_chain(tagged))).chains
    fit = align_chain(chain, SEQUENCE)
    assert fit.rows_T.tolist() == list(range(8, 8 + len(SEQUENCE)))
    assert fit.identity == pytest.approx(1 - 1 / len(SEQUENCE))
    assert fit.num_outside == 8
    assert np.isnan(fit.place_on_chain(np.zeros(len(SEQUENCE)), len(tagged))).sum() == 8
    other = SEQUENCE[::-1]
    with refused("structure.fit", chain="A", agree=0, residues=len(other)):
        align_chain(chain, other)
    third = "".join("W" if place % 3 == 0 else letter for place, letter in enumerate(SEQUENCE))
    with refused("structure.fit"):  # two of three residues are too few
        align_chain(chain, third)
    assert find_chain([chain], other) is None
    (short,) = read_structure(write_structure(tmp_path / "b.pdb", build_chain(SEQUENCE[:30]))).chains
    assert find_chain([short, chain], SEQUENCE)[0] is chain


@BOTH
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_values_are_written_as_b_factors_and_read_back(suffix: str, packed: str, tmp_path: Path) -> None:
    atoms = build_chain("MKGA") + build_chain("MKV", "B")
    atoms[3:3] = [Atom("CA", "CA", "A", 50, (0, 30, 0), hetero=True, element="CA")]
    structure = read_structure(write_structure(tmp_path / f"a.{suffix}", atoms))
    values = np.array([1.5, -2.25, np.nan, 99.5])
    out = write_b_factors(structure, tmp_path / f"out.{suffix}{packed}", {"A": values}, missing=-1)
    plain = tmp_path / f"plain.{suffix}"
    plain.write_bytes(gzip.decompress(out.read_bytes()) if packed else out.read_bytes())
    parser = {"pdb": PDBParser, "cif": MMCIFParser}[suffix](QUIET=True)
    expected = {("A", 1): 1.5, ("A", 2): -2.25, ("A", 4): 99.5}
    seen = 0
    for atom in parser.get_structure("", str(plain)).get_atoms():
        residue = atom.get_parent()
        assert atom.bfactor == expected.get((residue.get_parent().id, residue.id[1]), -1)
        seen += 1
    assert seen == len(atoms)
    again = read_structure(out)
    assert [chain.sequence for chain in again.chains] == ["MKGA", "MKV"]
    np.testing.assert_array_equal(again.chains[0].cb_C3, structure.chains[0].cb_C3)


def test_values_that_do_not_fit_write_nothing(tmp_path: Path) -> None:
    structure = read_structure(write_structure(tmp_path / "a.pdb", build_chain("MKGA")))
    out = tmp_path / "out.pdb"
    with refused("structure.values", chain="A", found=(3,), residues=4):
        write_b_factors(structure, out, {"A": np.zeros(3)})
    with refused("structure.value", chain="A", residue="2", found=1000.0):
        write_b_factors(structure, out, {"A": np.array([0, 1000, 0, 0])})
    with refused("structure.value", found=np.inf):
        write_b_factors(structure, out, {"A": np.array([0, np.inf, 0, 0])})
    with refused("structure.chain", found="Z"):
        write_b_factors(structure, out, {"Z": np.zeros(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pdb"]


PDB, MMCIF = format_pdb(build_chain(SEQUENCE)), format_mmcif(build_chain(SEQUENCE))
BAD = {
    "empty": "",
    "blank": "\n \n",
    "fasta": f">a\n{SEQUENCE}\n",
    "html": "<!DOCTYPE html><html><body>404</body></html>",
    "cut in a line of PDB": PDB[:1000],
    "cut after the coordinates": PDB[: 79 * 12 + 60],
    "HEADER without END": "HEADER    HYDROLASE                               01-JAN-00   1ABC\n" + PDB[:-4],
    "letters in a coordinate": PDB.replace("   3.800", "   abcde", 1),
    "not a number": PDB.replace("   3.800", "     nan", 1),
    "a number that is a word": PDB.replace("ALA A   4", "ALA A   x", 1),
    "two residues at one place": format_pdb(
        [*build_chain("MK"), *(atom._replace(number=2, residue="TRP") for atom in build_chain("M"))]
    ),
    "no CA": format_pdb([Atom("P", "DA", "A", 1, (0, 0, 0), element="P")]),
    "cut in a row of mmCIF": MMCIF[: len(MMCIF) // 2],
    "cut between rows of mmCIF": "\n".join(MMCIF.splitlines()[:60]) + "\n",
    "two structures in a PDB file": PDB + format_pdb(build_chain("MKV", "B")),
    "atoms after CONECT": PDB.replace("END\n", "CONECT    1    2\n") + format_pdb(build_chain("MKV", "B")),
    "two blocks of mmCIF": MMCIF + format_mmcif(build_chain("MKV", "B")),
    "mmCIF without atoms": "data_X\n#\n_entry.id X\n#\n",
    "mmCIF without chains": MMCIF.replace("_atom_site.auth_asym_id", "_atom_site.other"),
    "mmCIF with a bad number": MMCIF.replace(" 3.800 ", " x ", 1),
    "mmCIF with an open quote": MMCIF.replace("_entry.id TEST", "_entry.id 'TEST", 1),
    "mmCIF with an open text": "data_X\n_a.b\n;text\n",
    "binary": "data_\0\1",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_completely_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pdb"
    path.write_text(BAD[name], encoding="utf-8")
    with refused("structure.no-protein" if name == "no CA" else "structure.unreadable", path=path):
        read_structure(path)


def test_bad_paths_and_damaged_archives_are_one_line(tmp_path: Path) -> None:
    with refused("structure.absent", path=tmp_path / "none"):
        find_structures(tmp_path / "none")
    with refused("structure.none", path=tmp_path):
        find_structures(tmp_path)
    with refused("file.unreadable"):
        read_structure(tmp_path / "none.pdb")
    cut = tmp_path / "cut.pdb.gz"
    cut.write_bytes(gzip.compress(PDB.encode())[:-40])
    with refused("file.cut-short"):
        read_structure(cut)
    (tmp_path / ".hidden.pdb").touch()
    (tmp_path / "b.CIF.gz").touch()
    assert [path.name for path in find_structures(tmp_path)] == ["b.CIF.gz", "cut.pdb.gz"]
    assert strip_structure_suffix(Path("x/1a.b.ent.gz")) == "1a.b"


def test_a_file_of_a_program_that_writes_no_last_separator_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "pymol.cif"  # as PyMOL writes it: '#' only before a category
    text = format_mmcif(build_chain(SEQUENCE), end="").replace("data_TEST\n#\n", "# generated\n#\ndata_TEST\n")
    path.write_text(text, encoding="utf-8")
    assert read_structure(path).chains[0].sequence == SEQUENCE
    path.write_text(PDB.replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert read_structure(path).chains[0].sequence == SEQUENCE


def test_columns_after_the_coordinates_may_be_missing(tmp_path: Path) -> None:
    short = "\n".join(line[:54] for line in PDB.splitlines()) + "\n"
    path = tmp_path / "short.pdb"
    path.write_text(short, encoding="utf-8")
    structure = read_structure(path)
    assert structure.chains[0].sequence == SEQUENCE
    out = write_b_factors(structure, tmp_path / "out.pdb", {"A": np.arange(len(SEQUENCE))})
    found = [atom.bfactor for atom in PDBParser(QUIET=True).get_structure("", str(out)).get_atoms() if atom.id == "CA"]
    assert found == list(range(len(SEQUENCE)))

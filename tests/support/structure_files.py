"""Small PDB and mmCIF files with chosen CB positions, written without esm2kit."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAMES = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY", "H": "HIS",
    "I": "ILE", "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER", "T": "THR", "W": "TRP",
    "Y": "TYR", "V": "VAL",
}  # fmt: skip
LETTERS = {name: letter for letter, name in NAMES.items()}


class Atom(NamedTuple):
    name: str
    residue: str  # three letters
    chain: str
    number: int
    xyz: tuple[float, float, float]
    hetero: bool = False
    altloc: str = ""
    insertion: str = ""
    occupancy: float = 1.0
    element: str = "C"
    model: int = 1


def build_chain(
    sequence: str, chain: str = "A", first: int = 1, missing: Iterable[int] = (), cb_T3: np.ndarray | None = None
) -> list[Atom]:
    """N, CA, C and CB of a straight chain along x, whose CB are at cb_T3 or 1.5 Angstrom beside their CA.

    `missing` are places in the sequence, from 0, that are left out; the others keep their numbers and coordinates.
    """
    atoms = []
    for place, letter in enumerate(sequence):
        if place in set(missing):
            continue
        ca = np.array([3.8 * place, 0.0, 0.0])
        cb = ca + np.array([0, 1.5, 0]) if cb_T3 is None else cb_T3[place]
        if letter == "G" and cb_T3 is not None:
            ca = cb
        back, ahead = ca + np.array([-1.2, 0, 0.5]), ca + np.array([1.2, 0, 0.5])
        parts = {"N": back, "CA": ca, "C": ahead} | ({} if letter == "G" else {"CB": cb})
        atoms += [
            Atom(name, NAMES[letter], chain, first + place, tuple(xyz), element=name[0]) for name, xyz in parts.items()
        ]
    return atoms


def format_pdb(atoms: Iterable[Atom], end: str = "END\n") -> str:
    lines, model = [], None
    atoms = list(atoms)
    several = len({atom.model for atom in atoms}) > 1
    for serial, atom in enumerate(atoms, 1):
        if several and atom.model != model:
            lines += [*(["ENDMDL"] if model else []), f"MODEL     {atom.model:4d}"]
            model = atom.model
        x, y, z = atom.xyz
        kind = "HETATM" if atom.hetero else "ATOM  "
        name = f"{atom.name:<4}" if len(atom.name) == 4 or len(atom.element) == 2 else f" {atom.name:<3}"
        lines.append(
            f"{kind}{serial:5d} {name}{atom.altloc or ' '}{atom.residue:>3} {atom.chain}{atom.number:4d}"
            f"{atom.insertion or ' '}   {x:8.3f}{y:8.3f}{z:8.3f}{atom.occupancy:6.2f}{20:6.2f}          "
            f"{atom.element:>2}"
        )
    return "\n".join([*lines, *(["ENDMDL"] if several else [])]) + "\n" + end


def format_mmcif(atoms: Iterable[Atom], end: str = "#\n") -> str:
    columns = (
        "group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id",
        "label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy",
        "B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num",
    )  # fmt: skip
    lines = ["data_TEST", "#", "_entry.id TEST", "#", "loop_", *(f"_atom_site.{name}" for name in columns)]
    for serial, atom in enumerate(atoms, 1):
        values = (
            "HETATM" if atom.hetero else "ATOM", serial, atom.element.upper(), atom.name, atom.altloc or ".",
            atom.residue, atom.chain, 1, atom.number, atom.insertion or "?", *(f"{value:.3f}" for value in atom.xyz),
            f"{atom.occupancy:.2f}", "20.00", atom.number, atom.chain, atom.model,
        )  # fmt: skip
        lines.append(" ".join(map(str, values)))
    return "\n".join(lines) + "\n" + end


FORMATS = {"pdb": format_pdb, "cif": format_mmcif}


def write_structure(path: Path, atoms: Iterable[Atom]) -> Path:
    path.write_text(FORMATS[path.suffix[1:]](atoms), encoding="utf-8")
    return path

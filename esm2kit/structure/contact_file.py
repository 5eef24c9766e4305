"""Create and read the HDF5 files of contacts.

The file has one array `values` with the upper triangles of all proteins, diagonal included, one after the other: the
values of protein i are values[offsets[i]:offsets[i + 1]], in the order of `numpy.triu_indices(T)`. Other datasets are
`ids` and `chains`, the number of residues of each chain, such as "54" or "54:30" for a complex of two.

A file is created with space for all values, which are then written to their byte offsets in any order. Last, the
checksums of all blocks are written into the HDF5 user block; a file without them is not finished.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from esm2kit.core.checksums import raise_damaged
from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs
from esm2kit.core.paths import expand_path
from esm2kit.core.seal import Seal, checksum_contents, has_seal, plan_user_block, write_seal
from esm2kit.sequences.ids import DIGEST_BYTES, IdLookup, digest_sequence
from esm2kit.structure.inputs import SEPARATOR, Protein

FORMAT = 1
FORMAT_ATTRIBUTE = "esm2kit_contacts"
REMEDY = "run `esm2kit contacts` again with --restart true"


def count_values(num_residues: int) -> int:
    """Number of values of an upper triangle with its diagonal."""
    return num_residues * (num_residues + 1) // 2


def pack(values_TT: np.ndarray, dtype: str) -> np.ndarray:
    """Convert a symmetric matrix to its upper triangle."""
    return np.ascontiguousarray(values_TT[np.triu_indices(len(values_TT))], dtype=dtype)


def unpack(values_N: np.ndarray, num_residues: int) -> np.ndarray:
    """Convert an upper triangle to the symmetric matrix, float32."""
    values_TT = np.empty((num_residues, num_residues), np.float32)
    rows, columns = np.triu_indices(num_residues)
    values_TT[rows, columns] = values_TT[columns, rows] = values_N
    return values_TT


def create_contact_file(path: Path, proteins: Sequence[Protein], dtype: str, attributes: dict[str, Any]) -> np.ndarray:
    """Create a file that is complete except for its values and its checksums.

    Args:
        path: of the new file.
        proteins: in order.
        dtype: "float32" or "float16".
        attributes: strings and numbers for the root attributes.

    Returns:
        (P,) byte at which each protein's values start.
    """
    counts_P = np.array([count_values(protein.num_residues) for protein in proteins], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64)
    itemsize = np.dtype(dtype).itemsize
    user_block = plan_user_block(int(offsets[-1]) * itemsize + 256 * (len(proteins) + 256))
    with h5py.File(path, "w", libver=("v110", "v110"), userblock_size=user_block) as file:
        file.attrs.update({FORMAT_ATTRIBUTE: FORMAT, "num_proteins": len(proteins), "dtype": dtype, **attributes})
        text = h5py.string_dtype()
        file.create_dataset("offsets", data=offsets)
        file.create_dataset("ids", data=[protein.id for protein in proteins], dtype=text)
        lengths = [SEPARATOR.join(str(len(chain)) for chain in protein.chains) for protein in proteins]
        file.create_dataset("chains", data=lengths, dtype=text)
        digests = b"".join(digest_sequence(protein.sequence) for protein in proteins)
        file.create_dataset("sequences", data=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES))
        # contiguous and not filled, so that the offsets of values are known and nothing is written twice
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_layout(h5d.CONTIGUOUS)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        space = h5s.create_simple((int(offsets[-1]),))
        values = h5d.create(file.id, b"values", h5t.py_create(np.dtype(dtype)), space, properties)
        return values.get_offset() + offsets[:-1] * itemsize


def seal_contact_file(path: Path) -> None:
    """Write the checksums of a file whose values are complete into it."""
    with h5py.File(path, "r") as file:
        user_block, contents = file.userblock_size, checksum_contents(dict(file.attrs), *_read_index(file))
    write_seal(path, user_block, contents)


def _read_index(file: h5py.File) -> list[np.ndarray]:
    texts = [np.frombuffer(b"\n".join(file[name][()]), np.uint8) for name in ("ids", "chains")]
    return [*texts, file["offsets"][()], file["sequences"][()]]


def is_contact_file(path: Path) -> bool:
    """Return whether a file with checksums is one of contacts.

    Args:
        path: the file.

    Returns:
        False for embeddings, and for a file that is damaged.
    """
    try:
        seal = Seal(path, REMEDY)
    except InputError:
        return False
    try:
        seal.check_metadata()
        with h5py.File(path, "r") as file:
            return FORMAT_ATTRIBUTE in file.attrs
    except Exception:  # h5py raises errors of many kinds for damaged metadata
        return False
    finally:
        seal.close()


class ContactReader:
    """Read the contact maps of `esm2kit contacts` by protein id or accession.

    `ids` are in the order of the input. `values` is "contacts" (probabilities) or "coupling". `attributes` contains
    model_name, precision, linker and the parsed provenance.

    Args:
        path: a file written by `esm2kit contacts`.

    Raises:
        InputError: the file does not exist, is damaged or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = expand_path(path)
        if not path.is_file():
            raise InputError(
                f"{path} is not a file. Pass the .h5 file of `esm2kit contacts`.", code="contacts.absent", path=path
            )
        check_git_lfs(path)
        if not has_seal(path):
            self._refuse()
        self._seal = Seal(path, REMEDY)
        self._file = None
        try:
            self._seal.check_metadata()
            self._file = h5py.File(path, "r")
            self._read_contents()
        except Exception as error:
            self.close()
            if isinstance(error, InputError):
                raise
            # h5py raises OSError, KeyError, RuntimeError and others for damaged metadata
            raise_damaged(path, " ".join(str(error).split()), REMEDY)

    def _refuse(self) -> None:
        raise InputError(
            f"{self.path} is not a finished file of contacts. Pass the .h5 file of `esm2kit contacts`, or {REMEDY}.",
            code="contacts.format",
            path=self.path,
        )

    def _read_contents(self) -> None:
        assert self._file is not None
        attributes = dict(self._file.attrs)
        if attributes.get(FORMAT_ATTRIBUTE) != FORMAT:
            self._refuse()
        if checksum_contents(attributes, *_read_index(self._file)) != self._seal.contents:
            raise_damaged(self.path, "its attributes differ from their checksum", REMEDY)
        self.ids = tuple(value.decode() for value in self._file["ids"][()])
        self._chains = [value.decode() for value in self._file["chains"][()]]
        self._offsets = self._file["offsets"][()]
        self.values: str = attributes["values"]
        self.attributes = {
            name: json.loads(value) if name in ("provenance", "settings") else value
            for name, value in attributes.items()
        }
        self._index = IdLookup(self.ids, str(self.path))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids, like the keys of a dictionary."""
        return iter(self.ids)

    def __contains__(self, protein: str) -> bool:
        return protein in self._index

    def __enter__(self) -> "ContactReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._seal.close()

    def check(self) -> None:
        """Check every byte of the file against its checksums.

        Raises:
            InputError: a block differs.
        """
        self._seal.check_all()

    def chain_lengths(self, protein: str) -> tuple[int, ...]:
        """Return the number of residues of each chain of a protein, by its id."""
        return tuple(map(int, self._chains[self._index[protein]].split(SEPARATOR)))

    def __getitem__(self, protein: str) -> np.ndarray:
        """Read the map of one protein.

        Args:
            protein: its id, or a part of the id between bars, such as the accession, that no other protein has.

        Returns:
            (T, T) symmetric float32: contact probabilities or couplings. Chains of a complex follow each other.

        Raises:
            UnknownIdError: there is no such protein; a KeyError that lists similar ids.
            InputError: the reader is closed, or the values are damaged.
        """
        if not isinstance(protein, str):
            raise InputError(
                f"{self.path}: a protein is selected by its id, found {protein!r}. Use reader.ids[i] for index i.",
                code="contacts.id",
                found=protein,
            )
        return self.read(self._index[protein])

    def read(self, index: int) -> np.ndarray:
        """Read the map of the protein at an index, as `reader[id]`.

        Args:
            index: from 0, in the order of `ids`.

        Returns:
            (T, T) symmetric float32.

        Raises:
            InputError: the reader is closed, or the values are damaged.
        """
        if self._file is None:
            raise InputError(
                f"{self.path}: this reader is closed. Open the file with a new ContactReader.",
                code="contacts.closed",
                path=self.path,
            )
        values = self._file["values"]
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        first = values.id.get_offset()
        self._seal.check(first + start * values.dtype.itemsize, first + stop * values.dtype.itemsize)
        return unpack(values[start:stop], sum(map(int, self._chains[index].split(SEPARATOR))))

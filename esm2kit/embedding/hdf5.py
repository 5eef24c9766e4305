"""The HDF5 files that hold embeddings: how they are laid out, made and read.

A file is made in two strokes. First its skeleton: every dataset, attribute and byte of space, closed and complete as
HDF5. Then the values, poured to byte offsets that are known and never move. So any number of processes write one file
without MPI, a killed run leaves a sound file with holes and a list of what is in it, and nothing is merged or copied.

Layout `datasets`, what other programs read: one dataset a protein at the root, named "0", "1", ... (or by the
sequence's hash, or by id), shape (D,) or (residues, D), attribute `original_id`. Layout `packed`, what reads fastest:
`values` (N, D), `offsets` (P + 1,) and `ids` (P,).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from esm2kit.core.errors import InputError
from esm2kit.sequences.ids import IdLookup

FORMAT = 1
Level = Literal["protein", "residue"]
Layout = Literal["datasets", "packed"]
# Ids sit in root attributes of this many each: one attribute a protein is read 1,000 times slower than one a block.
IDS_PER_BLOCK = 1 << 16
STRING = h5py.string_dtype()
STRING_IN_MEMORY = h5t.py_create(STRING)


class ProteinEntry(NamedTuple):
    """One protein's place in a file."""

    id: str
    key: str
    num_residues: int


class Skeleton(NamedTuple):
    """What a file will hold.

    Args:
        level: one vector a protein, or one a residue.
        layout: `datasets` or `packed`.
        width: floats a vector.
        dtype: "float32" or "float16".
        key: what names a dataset: index, hash or id.
    """

    level: Level
    layout: Layout
    width: int
    dtype: str
    key: str

    def num_rows(self, num_residues: int) -> int:
        return 1 if self.level == "protein" else num_residues


def create_file(
    path: Path,
    skeleton: Skeleton,
    rows: Iterable[ProteinEntry],
    num_proteins: int,
    num_residues: int,
    attributes: Mapping[str, Any],
    starts_P: np.ndarray,
) -> None:
    """Make a file that lacks nothing but its values.

    Args:
        path: the file to make.
        skeleton: its level, layout, width and dtype.
        rows: the proteins in order; read once, never held. Rows of equal key share the first one's dataset.
        num_proteins: how many rows there are.
        num_residues: of all rows together.
        attributes: strings and numbers for the root.
        starts_P: filled with the byte at which each protein's values begin.
    Costs: about 40 us a protein in layout `datasets`, 2 us in `packed`.
    """
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs.update(
            {
                "esm2kit_format": FORMAT,
                "level": skeleton.level,
                "layout": skeleton.layout,
                "key": skeleton.key,
                "embed_dim": skeleton.width,
                "dtype": skeleton.dtype,
                "num_proteins": num_proteins,
                **attributes,
            }
        )
        make = _create_datasets if skeleton.layout == "datasets" else _create_packed
        make(file, skeleton, rows, num_proteins, num_residues, starts_P)


def _contiguous_properties() -> h5p.PropDCID:
    """Space given at once, contiguous and unfilled: this is what makes a byte offset known and lasting."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    return properties


def _create_datasets(
    file: h5py.File,
    skeleton: Skeleton,
    rows: Iterable[ProteinEntry],
    num_proteins: int,
    num_residues: int,
    starts_P: np.ndarray,
) -> None:
    properties, scalar = _contiguous_properties(), h5s.create(h5s.SCALAR)
    dtype, string = h5t.py_create(np.dtype(skeleton.dtype)), h5t.py_create(STRING, logical=True)
    spaces: dict[int, h5s.SpaceID] = {}
    ids: list[bytes] = []
    keys: list[bytes] = []
    block = 0
    for index, row in enumerate(rows):
        key = row.key.encode()
        if skeleton.key == "index" or key not in file.id:
            num_rows = skeleton.num_rows(row.num_residues)
            if num_rows not in spaces:
                shape = (skeleton.width,) if skeleton.level == "protein" else (num_rows, skeleton.width)
                spaces[num_rows] = h5s.create_simple(shape)
            dataset = h5d.create(file.id, key, dtype, spaces[num_rows], properties)
            _write_string(dataset, b"original_id", row.id, string, scalar)
        else:
            dataset = h5d.open(file.id, key)
        starts_P[index] = dataset.get_offset()
        ids.append(row.id.encode())
        keys.append(key)
        if len(ids) == IDS_PER_BLOCK or index == num_proteins - 1:
            _write_block(file, f"ids_{block:05d}", ids)
            if skeleton.key == "hash":
                _write_block(file, f"keys_{block:05d}", keys)
            ids, keys = [], []
            block += 1


def _write_string(dataset: h5d.DatasetID, name: bytes, text: str, kind: h5t.TypeID, scalar: h5s.SpaceID) -> None:
    """A string attribute through the low-level calls: a third of `attrs[...] = text`'s time.

    Of variable size, since h5py gives strings of fixed size back as bytes, and other programs read ids with h5py.
    """
    h5a.create(dataset, name, kind, scalar).write(np.array(text, dtype=STRING), mtype=STRING_IN_MEMORY)


def _write_block(file: h5py.File, name: str, lines: list[bytes]) -> None:
    file.attrs[name] = np.frombuffer(b"\n".join(lines), dtype=np.uint8)


def _create_packed(
    file: h5py.File,
    skeleton: Skeleton,
    rows: Iterable[ProteinEntry],
    num_proteins: int,
    num_residues: int,
    starts_P: np.ndarray,
) -> None:
    total = num_proteins if skeleton.level == "protein" else num_residues
    shape = h5s.create_simple((total, skeleton.width))
    values = h5d.create(file.id, b"values", h5t.py_create(np.dtype(skeleton.dtype)), shape, _contiguous_properties())
    offsets = file.create_dataset("offsets", (num_proteins + 1,), dtype=np.int64)
    names = file.create_dataset("ids", (num_proteins,), dtype=h5py.string_dtype())
    first_byte, row_bytes = values.get_offset(), skeleton.width * np.dtype(skeleton.dtype).itemsize
    index = position = 0
    rows = iter(rows)
    while block := list(islice(rows, IDS_PER_BLOCK)):
        stop = index + len(block)
        counts = [skeleton.num_rows(row.num_residues) for row in block]
        ends = position + np.cumsum(counts)
        offsets[index + 1 : stop + 1] = ends
        starts_P[index:stop] = first_byte + (ends - counts) * row_bytes
        names[index:stop] = [row.id for row in block]
        index, position = stop, int(ends[-1])


class EmbeddingReader:
    """Embeddings by protein id, or accession, whatever the file's layout and key.

    Args:
        path: a file `esm2kit embed` made.
    Raises: InputError if it is another kind of file, or not whole.

    `ids` come in the FASTA's order, duplicates included; `level` is "protein" or "residue"; `embed_dim` counts the
    floats of one vector; `attributes` holds model_name, layer, pooling, input_sha256 and the parsed provenance. Values
    come out as float32 however they are stored.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                f"{path} does not exist: make it with `esm2kit embed`", code="embeddings.absent", path=path
            )
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(
                f"{path} is not a whole HDF5 file: {error}", code="embeddings.damaged", path=path
            ) from None
        attributes = dict(self._file.attrs)
        if attributes.get("esm2kit_format") != FORMAT:
            found = attributes.get("esm2kit_format", "no")
            self._file.close()
            raise InputError(
                f"{path} holds {found} esm2kit_format, not {FORMAT}: make it again with `esm2kit embed`",
                code="embeddings.format",
                path=path,
                found=found,
            )
        self._layout: str = attributes["layout"]
        self.level: str = attributes["level"]
        self.embed_dim = int(attributes["embed_dim"])
        self.ids = self._read_ids(attributes)
        self._keys = self._read_keys(attributes)
        self.attributes = {
            name: _to_python(value) for name, value in attributes.items() if not name.startswith(("ids_", "keys_"))
        }
        self._index = IdLookup(self.ids, str(path))
        if self._layout == "packed":
            self._offsets = self._file["offsets"][()]

    def _read_ids(self, attributes: Mapping[str, Any]) -> list[str]:
        if self._layout == "packed":
            return [value.decode() for value in self._file["ids"][()]]
        return _read_blocks(attributes, "ids_")

    def _read_keys(self, attributes: Mapping[str, Any]) -> Sequence[str]:
        if self._layout == "packed" or attributes["key"] == "index":
            return range(len(self.ids))
        return self.ids if attributes["key"] == "id" else _read_blocks(attributes, "keys_")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """The ids, as a dictionary gives its keys."""
        return iter(self.ids)

    def __contains__(self, protein: str) -> bool:
        return protein in self._index

    def __enter__(self) -> "EmbeddingReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __getitem__(self, protein: str) -> np.ndarray:
        """One protein's vector (D,) or its residues' vectors (residues, D), float32.

        Args:
            protein: its id; or the accession or entry name inside it, where one protein alone has that.
        Raises: UnknownIdError, a KeyError, if there is none, with the ids that come near; InputError for a number.
        """
        if not isinstance(protein, str):
            raise InputError(
                f"{self.path}: proteins go by id, found {protein!r}; the first one's is reader.ids[0]",
                code="embeddings.id",
                found=protein,
            )
        value = self._read(self._index[protein])
        return value[0] if self.level == "protein" else value

    def matrix(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """One row a protein, (P, D) float32, in the order of `ids` (default: all, in the file's order).

        Raises: InputError for a per-residue file, or for ids it lacks.
        """
        if self.level != "protein":
            raise InputError(
                f"{self.path} holds residues: use its {self.path.stem.replace('_hiddens', '')}_embeddings.h5",
                code="embeddings.level",
                path=self.path,
                found=self.level,
            )
        indices = self._indices(ids)
        if self._layout == "packed" and ids is None:
            return self._file["values"].astype(np.float32)[()]
        matrix_PD = np.empty((len(indices), self.embed_dim), dtype=np.float32)
        for place, index in enumerate(indices):
            self._read(index, out=matrix_PD[place : place + 1])
        return matrix_PD

    def locate_rows(self, ids: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray, np.dtype]:
        """Where vectors lie in the file, for a reader that wants them without HDF5 and without a copy.

        Args:
            ids: which proteins, in which order (None: all).
        Returns: (P,) the byte at which each protein's rows begin; offsets (P + 1,), protein i being rows
            offsets[i] to offsets[i + 1] of what was asked for; the rows' dtype.
        Raises: InputError for ids the file lacks.
        """
        indices = self._indices(ids)
        if self._layout == "packed":
            values = self._file["values"]
            first_rows_P = self._offsets[np.asarray(indices, dtype=np.int64)]
            counts_P = self._offsets[np.asarray(indices, dtype=np.int64) + 1] - first_rows_P
            starts_P = values.id.get_offset() + first_rows_P * (self.embed_dim * values.dtype.itemsize)
            dtype = values.dtype
        else:
            starts_P, counts_P = np.empty((2, len(indices)), dtype=np.int64)
            dtype = np.dtype(self.attributes["dtype"])
            for place, index in enumerate(indices):
                dataset = self._open(index)
                starts_P[place] = dataset.get_offset()
                counts_P[place] = 1 if self.level == "protein" else dataset.shape[0]
        return starts_P, np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64), dtype

    def _indices(self, ids: Sequence[str] | None) -> Sequence[int]:
        if ids is None:
            return range(len(self.ids))
        absent = [protein for protein in ids if protein not in self._index]
        if absent:
            raise InputError(
                f"{self.path} lacks {len(absent)} of {len(ids)} proteins, the first is {absent[0]!r}",
                code="embeddings.lacks",
                path=self.path,
                proteins=absent,
            )
        return [self._index[protein] for protein in ids]

    def _open(self, index: int) -> h5d.DatasetID:
        return h5d.open(self._file.id, str(self._keys[index]).encode())

    def _read(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows of one protein into `out` (rows, D); HDF5 converts to its dtype on the way, float32 by default."""
        if self._layout == "packed":
            start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
            out = np.empty((stop - start, self.embed_dim), np.float32) if out is None else out
            self._file["values"].read_direct(out, np.s_[start:stop])
            return out
        dataset = self._open(index)
        num_rows = 1 if self.level == "protein" else dataset.shape[0]
        out = np.empty((num_rows, self.embed_dim), np.float32) if out is None else out
        dataset.read(h5s.ALL, h5s.ALL, out[0] if self.level == "protein" else out)
        return out


def _read_blocks(attributes: Mapping[str, Any], prefix: str) -> list[str]:
    names = sorted(name for name in attributes if name.startswith(prefix))
    return [line for name in names for line in attributes[name].tobytes().decode().split("\n")]


def _to_python(value: Any) -> Any:
    """numpy scalars as Python's; JSON texts parsed."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value

"""Create and read the HDF5 files of embeddings.

A file is created in three steps. First, a complete HDF5 file with all datasets and attributes, and with space allocated
for the values. Then the values are written to their byte offsets, which never change. So any number of processes can
write one file without MPI, an interrupted run leaves a valid file, and nothing needs to be merged. Last, the checksums
of all blocks (`seal_file`); a file without them is not finished.

Layout `datasets`, which other programs read: one dataset per protein at the root, named "0", "1", ... (or by the hash
of the sequence, or by id), with shape (D,) or (residues, D) and the attribute `original_id`. Layout `packed`, which is
the fastest to read: `values` (N, D), `offsets` (P + 1,) and `ids` (P,).

Both have root attributes `sequences_00000`, ...: DIGEST_BYTES of each protein's hash, for IDS_PER_BLOCK proteins each.
They show of which sequence a vector is, whatever the ids mean.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from esm2kit.core.checksums import raise_damaged
from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs
from esm2kit.core.paths import expand_path
from esm2kit.core.seal import Seal, checksum_contents, has_seal, plan_user_block, write_seal
from esm2kit.embedding.plan import REMEDY
from esm2kit.sequences.ids import DIGEST_BYTES, IdLookup, digest_sequence, is_position

FORMAT = 2
UNSEALED_FORMAT = 1  # of version 0.1.0: without checksums
METADATA_BYTES = 1024  # of HDF5 per dataset, at most
Level = Literal["protein", "residue"]
Layout = Literal["datasets", "packed"]
# Number of ids per root attribute. Reading one attribute per protein would be 1,000 times slower.
IDS_PER_BLOCK = 1 << 16
STRING = h5py.string_dtype()
STRING_IN_MEMORY = h5t.py_create(STRING)


class Entry(NamedTuple):
    """Id, dataset name, length and sequence digest of a protein in a file; files of version 0.1.0 have no digests."""

    id: str
    key: str
    num_residues: int
    sequence: bytes = b""


class Skeleton(NamedTuple):
    """Structure of a file.

    Args:
        level: one vector per protein, or one per residue.
        layout: `datasets` or `packed`.
        width: number of floats per vector.
        dtype: "float32" or "float16".
        key: name of a dataset: index, hash or id.
    """

    level: Level
    layout: Layout
    width: int
    dtype: str
    key: str

    def num_rows(self, num_residues: int) -> int:
        """Return the number of vectors of a protein."""
        return 1 if self.level == "protein" else num_residues


def create_file(
    path: Path,
    skeleton: Skeleton,
    rows: Iterable[Entry],
    num_proteins: int,
    num_residues: int,
    attributes: Mapping[str, Any],
    starts_P: np.ndarray,
) -> None:
    """Create a file that is complete except for its values.

    This takes about 40 us per protein in layout `datasets`, 2 us in `packed`.

    Args:
        path: of the new file.
        skeleton: its structure.
        rows: the proteins in order, streamed. Rows with equal keys share one dataset.
        num_proteins: number of rows.
        num_residues: total number of residues.
        attributes: strings and numbers for the root attributes.
        starts_P: (P,) output, the byte offset of each protein's values.
    """
    vectors = num_proteins if skeleton.level == "protein" else num_residues
    num_bytes = vectors * skeleton.width * np.dtype(skeleton.dtype).itemsize + METADATA_BYTES * (num_proteins + 64)
    with h5py.File(path, "w", libver=("v110", "v110"), userblock_size=plan_user_block(num_bytes)) as file:
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
        create_values = _create_datasets if skeleton.layout == "datasets" else _create_packed
        create_values(file, skeleton, rows, num_proteins, num_residues, starts_P)


def seal_file(path: Path) -> None:
    """Write the checksums of a file whose values are complete into it."""
    with h5py.File(path, "r") as file:
        user_block, contents = file.userblock_size, checksum_contents(dict(file.attrs), *_read_index(file))
    write_seal(path, user_block, contents)


def _read_index(file: h5py.File) -> list[np.ndarray]:
    """The ids and offsets of a packed file, where they are datasets."""
    if file.attrs["layout"] != "packed":
        return []
    return [np.frombuffer(b"\n".join(file["ids"][()]), np.uint8), file["offsets"][()]]


def _contiguous_properties() -> h5p.PropDCID:
    """Build creation properties that allocate contiguous, unfilled space immediately, so that offsets are fixed."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    return properties


def _create_datasets(
    file: h5py.File,
    skeleton: Skeleton,
    rows: Iterable[Entry],
    num_proteins: int,
    num_residues: int,
    starts_P: np.ndarray,
) -> None:
    properties, scalar = _contiguous_properties(), h5s.create(h5s.SCALAR)
    dtype, string = h5t.py_create(np.dtype(skeleton.dtype)), h5t.py_create(STRING, logical=True)
    spaces: dict[int, h5s.SpaceID] = {}
    ids: list[bytes] = []
    keys: list[bytes] = []
    sequences: list[bytes] = []
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
        sequences.append(row.sequence)
        if len(ids) == IDS_PER_BLOCK or index == num_proteins - 1:
            _write_block(file, f"ids_{block:05d}", ids)
            if skeleton.key == "hash":
                _write_block(file, f"keys_{block:05d}", keys)
            _write_digests(file, block, sequences)
            ids, keys, sequences = [], [], []
            block += 1


def _write_string(dataset: h5d.DatasetID, name: bytes, text: str, kind: h5t.TypeID, scalar: h5s.SpaceID) -> None:
    """Write a string attribute by low-level calls, three times as fast as `attrs[...] = text`.

    The string has variable length, because h5py returns fixed-length strings as bytes.
    """
    h5a.create(dataset, name, kind, scalar).write(np.array(text, dtype=STRING), mtype=STRING_IN_MEMORY)


def _write_block(file: h5py.File, name: str, lines: list[bytes]) -> None:
    file.attrs[name] = np.frombuffer(b"\n".join(lines), dtype=np.uint8)


def _write_digests(file: h5py.File, block: int, sequences: list[bytes]) -> None:
    if all(sequences):
        file.attrs[f"sequences_{block:05d}"] = np.frombuffer(b"".join(sequences), dtype=np.uint8)


def _create_packed(
    file: h5py.File,
    skeleton: Skeleton,
    rows: Iterable[Entry],
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
        _write_digests(file, index // IDS_PER_BLOCK, [row.sequence for row in block])
        index, position = stop, int(ends[-1])


class EmbeddingReader:
    """Read embeddings by protein id or accession, from a file of any layout and key.

    `ids` are in the order of the FASTA, including duplicates. `level` is "protein" or "residue". `embed_dim` is the
    number of floats per vector. `attributes` contains model_name, layer, pooling, input_sha256 and the parsed
    provenance. Values are returned as float32, whatever the stored type.

    Args:
        path: a file written by `esm2kit embed`.

    Raises:
        InputError: the file does not exist, is damaged or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = expand_path(path)
        if self.path.is_dir():
            files = sorted(file.name for file in self.path.glob("*.h5"))
            found = f"which contains {', '.join(files[:8])}" if files else "which contains no .h5 file"
            fix = "Pass one of its files." if files else "Create one with `esm2kit embed`."
            raise InputError(
                f"{path} is a folder, {found}. {fix}", code="embeddings.folder", path=path, found=tuple(files)
            )
        if not self.path.is_file():
            raise InputError(
                f"{path} does not exist. Create it with `esm2kit embed`.", code="embeddings.absent", path=path
            )
        check_git_lfs(self.path)
        self._seal = Seal(self.path, REMEDY) if has_seal(self.path) else None
        try:
            if self._seal:
                self._seal.check_metadata()
            self._file, self._is_open = h5py.File(self.path, "r"), True
        except InputError:
            self._seal.close()
            raise
        except OSError as error:
            raise InputError(
                f"{path} is not a complete HDF5 file ({error}). Pass a file of `esm2kit embed`. To replace "
                f"a damaged one, {REMEDY}.",
                code="embeddings.damaged",
                path=path,
            ) from None
        try:
            self._open_contents()
        except Exception as error:
            self.close()
            if isinstance(error, InputError):
                raise
            # h5py raises KeyError, RuntimeError and others for damaged metadata
            raise_damaged(self.path, " ".join(str(error).split()), REMEDY)

    def _open_contents(self) -> None:
        attributes = dict(self._file.attrs)
        found = attributes.get("esm2kit_format", "no")
        if found not in (FORMAT, UNSEALED_FORMAT):
            raise InputError(
                f"{self.path} has {found} esm2kit_format, expected {FORMAT}. Create it again with `esm2kit embed`.",
                code="embeddings.format",
                path=self.path,
                found=found,
            )
        if found == FORMAT:
            if not self._seal:
                raise_damaged(self.path, "it has no checksums, so it is not finished", REMEDY)
            if checksum_contents(attributes, *_read_index(self._file)) != self._seal.contents:
                raise_damaged(self.path, "its attributes differ from their checksum", REMEDY)
        self._layout: str = attributes["layout"]
        self.level: str = attributes["level"]
        self.embed_dim = int(attributes["embed_dim"])
        self.ids = tuple(self._read_ids(attributes))
        self._keys = self._read_keys(attributes)
        self._digests = self._read_digests(attributes)
        self.attributes = {
            name: _to_python(value)
            for name, value in attributes.items()
            if not name.startswith(("ids_", "keys_", "sequences_"))
        }
        self._index = IdLookup(self.ids, str(self.path))
        if self._layout == "packed":
            self._offsets = self._file["offsets"][()]

    def check(self) -> None:
        """Check every byte of the file against its checksums.

        Raises:
            InputError: a block differs.
        """
        self._check_open()
        if self._seal:
            self._seal.check_all()

    def _read_ids(self, attributes: Mapping[str, Any]) -> list[str]:
        if self._layout == "packed":
            return [value.decode() for value in self._file["ids"][()]]
        return _read_blocks(attributes, "ids_")

    def _read_keys(self, attributes: Mapping[str, Any]) -> Sequence[str]:
        if self._layout == "packed" or attributes["key"] == "index":
            return range(len(self.ids))
        return self.ids if attributes["key"] == "id" else _read_blocks(attributes, "keys_")

    def _read_digests(self, attributes: Mapping[str, Any]) -> list[bytes] | None:
        """The digests of the sequences, None for a file of version 0.1.0 whose keys are not hashes."""
        names = sorted(name for name in attributes if name.startswith("sequences_"))
        if names:
            content = b"".join(attributes[name].tobytes() for name in names)
            return [content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)]
        if attributes["key"] == "hash":
            return [bytes.fromhex(key)[:DIGEST_BYTES] for key in self._keys]
        return None

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids, like the keys of a dictionary."""
        return iter(self.ids)

    def __contains__(self, protein: str) -> bool:
        return protein in self._index

    def __enter__(self) -> "EmbeddingReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Pickle the path: a copy, such as that of a worker process, opens the file again."""
        return type(self), (self.path,)

    def close(self) -> None:
        """Close the file."""
        self._is_open = False
        self._file.close()
        if self._seal:
            self._seal.close()
            self._seal = None

    def __getitem__(self, protein: str) -> np.ndarray:
        """Read the embedding of one protein.

        Args:
            protein: its id, or a part of the id between bars, such as the accession, that no other protein has.

        Returns:
            (D,) vector of the protein, or (residues, D) vectors of its residues, float32.

        Raises:
            UnknownIdError: there is no such protein; a KeyError that lists similar ids.
            InputError: `protein` is not a string.
        """
        if not isinstance(protein, str):
            raise InputError(
                f"{self.path}: a protein is selected by its id, found {protein!r}. Use reader.ids[i] for index i.",
                code="embeddings.id",
                found=protein,
            )
        value = self._read(self._index[protein])
        return value[0] if self.level == "protein" else value

    def matrix(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """Read the vectors of several proteins.

        Args:
            ids: the proteins, in any ordered collection. None selects all, in the order of the file.

        Returns:
            (P, D) float32, one row per protein.

        Raises:
            InputError: the file has vectors of residues, an id is missing, or `ids` is a text or a set.
        """
        if self.level != "protein":
            raise InputError(
                f"{self.path} has one vector per residue. "
                f"Use {self.path.stem.replace('_hiddens', '')}_embeddings.h5, which has one per protein.",
                code="embeddings.level",
                path=self.path,
                found=self.level,
            )
        indices = self._indices(ids)
        self._check_open()
        if self._layout == "packed" and ids is None:
            self.check()
            return self._file["values"].astype(np.float32)[()]
        matrix_PD = np.empty((len(indices), self.embed_dim), dtype=np.float32)
        for place, index in enumerate(indices):
            self._read(index, out=matrix_PD[place : place + 1])
        return matrix_PD

    def count_rows(self) -> np.ndarray:
        """Count the vectors per protein, (P,): the number of residues, or 1 in a file with one vector per protein."""
        self._check_open()
        if self.level == "protein":
            return np.ones(len(self.ids), dtype=np.int64)
        if self._layout == "packed":
            return np.diff(self._offsets).astype(np.int64)
        return np.array([self._open(index).shape[0] for index in range(len(self.ids))], dtype=np.int64)

    def rows(self, proteins: range) -> np.ndarray:
        """Read the vectors of consecutive proteins, without a loop over ids.

        Args:
            proteins: positions in the file, with step 1.

        Returns:
            (rows, D) float32, the proteins' rows one after the other.

        Raises:
            InputError: the values are damaged, or the reader is closed.
        """
        self._check_open()
        if self._layout != "packed":
            return np.concatenate([self._read(index) for index in proteins] or [np.empty((0, self.embed_dim), "f4")])
        values, row_bytes = self._file["values"], self.embed_dim * self._file["values"].dtype.itemsize
        start, stop = (int(row) for row in self._offsets[[proteins.start, proteins.stop]])
        first_byte = values.id.get_offset()
        if self._seal:
            self._seal.check(first_byte + start * row_bytes, first_byte + stop * row_bytes)
        return values[start:stop].astype(np.float32, copy=False)

    def find_proteins(self, ids: Sequence[str], sequences: Sequence[str], same_input: bool = False) -> np.ndarray:
        """Find proteins by id and sequence, never by id alone: an id may belong to another sequence in another file.

        Args:
            ids: the proteins. One of these ids may be another in the file, or the position of another protein.
            sequences: their residues, upper case.
            same_input: whether the file was made from exactly these proteins, so that its ids are sufficient.

        Returns:
            (P,) row of a protein with this sequence, of the same id if there is one; -1 if the file has none.

        Raises:
            InputError: the file is of version 0.1.0 and does not record sequences, and the ids are only positions.
        """
        by_id = [self._find(name) for name in ids]
        if self._digests is None:
            positions = [name for name, row in zip(ids, by_id, strict=True) if row >= 0 and is_position(name)]
            if positions and not same_input:
                raise InputError(
                    f"{self.path} does not record of which sequences its vectors are, and its ids are only positions "
                    f"({positions[0]!r}). Embed the proteins again.",
                    code="embeddings.positions",
                    path=self.path,
                    id=positions[0],
                )
            return np.array(by_id, dtype=np.int64)
        by_sequence: dict[bytes, int] = {}
        for row, digest in enumerate(self._digests):
            by_sequence.setdefault(digest, row)
        digests = map(digest_sequence, sequences)
        return np.array(
            [
                row if row >= 0 and self._digests[row] == digest else by_sequence.get(digest, -1)
                for row, digest in zip(by_id, digests, strict=True)
            ],
            dtype=np.int64,
        )

    @property
    def digests(self) -> tuple[bytes, ...] | None:
        """Digests of the sequences, in the order of the file; None if a file of version 0.1.0 does not have them."""
        return None if self._digests is None else tuple(self._digests)

    def _find(self, name: str) -> int:
        return self._index[name] if name in self else -1

    def locate_rows(
        self, ids: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.dtype]:
        """Locate vectors in the file, so that they can be memory-mapped without HDF5.

        Args:
            ids: the proteins. None selects all, in the order of the file.
            rows: rows of the proteins from `find_proteins`, instead of ids.

        Returns:
            (P,) byte offset of each protein's first row; (P + 1,) offsets, protein i having rows offsets[i] to
            offsets[i + 1] of the selection; the stored data type.

        Raises:
            InputError: an id is missing.
        """
        indices = self._indices(ids) if rows is None else [int(row) for row in rows]
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
        if self._seal and len(indices):
            self._seal.check_ranges(starts_P, starts_P + counts_P * (self.embed_dim * dtype.itemsize))
        return starts_P, np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64), dtype

    def _indices(self, ids: Sequence[str] | None) -> Sequence[int]:
        if ids is None:
            return range(len(self.ids))
        if isinstance(ids, str | bytes | Set):
            found = "one text" if isinstance(ids, str | bytes) else "a set, which has no order"
            raise InputError(
                f"{self.path}: ids is {found}. Pass a list of ids, such as {list(self.ids[:2])!r}.",
                code="embeddings.ids",
                path=self.path,
                found=ids,
            )
        ids = list(ids)  # a generator can be read only once
        absent = [protein for protein in ids if protein not in self._index]
        if absent:
            raise InputError(
                f"{self.path} lacks {len(absent)} of {len(ids)} proteins, such as {absent[0]!r}.",
                code="embeddings.missing-ids",
                path=self.path,
                proteins=absent,
            )
        return [self._index[protein] for protein in ids]

    def _check_open(self) -> None:
        if not self._is_open:
            raise InputError(
                f"{self.path}: this reader is closed. Open the file with a new EmbeddingReader.",
                code="embeddings.closed",
                path=self.path,
            )

    def _open(self, index: int) -> h5d.DatasetID:
        self._check_open()
        try:
            return h5d.open(self._file.id, str(self._keys[index]).encode())
        except (KeyError, OSError, RuntimeError, ValueError) as error:  # by what HDF5 finds wrong
            raise_damaged(self.path, " ".join(str(error).split()), REMEDY)

    def _read(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read the rows of one protein into `out` (rows, D), converted to its data type; float32 by default."""
        self._check_open()
        if self._layout == "packed":
            start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
            out = np.empty((stop - start, self.embed_dim), np.float32) if out is None else out
            values = self._file["values"]
            self._check(values.id.get_offset() + start * self.embed_dim * values.dtype.itemsize, out.size, values.dtype)
            values.read_direct(out, np.s_[start:stop])
            return out
        dataset = self._open(index)
        num_rows = 1 if self.level == "protein" else dataset.shape[0]
        out = np.empty((num_rows, self.embed_dim), np.float32) if out is None else out
        self._check(dataset.get_offset(), out.size, dataset.dtype)
        dataset.read(h5s.ALL, h5s.ALL, out[0] if self.level == "protein" else out)
        return out

    def _check(self, start: int, num_values: int, dtype: np.dtype) -> None:
        """Check the blocks that hold some values; `start` is the first one's byte in the file."""
        if self._seal:
            self._seal.check(start, start + num_values * dtype.itemsize)


def _read_blocks(attributes: Mapping[str, Any], prefix: str) -> list[str]:
    names = sorted(name for name in attributes if name.startswith(prefix))
    return [line for name in names for line in attributes[name].tobytes().decode().split("\n")]


def _to_python(value: Any) -> Any:
    """Convert NumPy scalars to Python's, and parse JSON strings."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value

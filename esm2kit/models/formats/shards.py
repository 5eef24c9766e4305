"""Read tensors that are split over several files: torch.distributed.checkpoint folders, and safetensors shards.

The `.metadata` of a distributed checkpoint is a pickle. The unpickler in this module allows only the names that torch
writes and replaces each by an inert record, so that no code runs. torch's weights-only reader reads the tensors.
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import check_git_lfs
from esm2kit.models.formats.readers import check_uncompressed

METADATA = ".metadata"
SUFFIX = ".distcp"
# torch's HuggingFaceStorageWriter: keys of a shard's offsets in the safetensors header, and the pattern of file names.
OFFSETS, SAVED_OFFSETS, SHARD_FILES = "DCP_SHARDING_INFO", "saved_offsets", "shard-*.safetensors"
# Names in the `.metadata` that torch 2.11 to 2.13 write; all are data.
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ALLOWED_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch", name) for name in ("Size", *DTYPES)),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}  # fmt: skip

# Other exceptions that a damaged or malicious pickle raises; torch's errors and RecursionError are RuntimeErrors.
READ_ERRORS = (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
          RuntimeError, ImportError, AssertionError)  # fmt: skip


class Piece(NamedTuple):
    """A part of a tensor.

    Args:
        file: the file.
        offset: index of its first element in the full tensor, per dimension.
        first_byte: position in the file; None in a safetensors file, which finds tensors by name.
        num_bytes: size in the file.
    """

    file: Path
    offset: tuple[int, ...]
    first_byte: int | None = None
    num_bytes: int = 0


class Shards:
    """The tensors of a folder; each is assembled from its parts when it is read.

    Args:
        source: the folder, for messages.
        shapes: name -> shape of the full tensor.
        pieces: name -> parts.
    """

    def __init__(self, source: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[Piece]]) -> None:
        self.source, self.shapes, self.pieces = source, dict(shapes), dict(pieces)

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: a key of `shapes`.

        Returns:
            The full tensor; memory-mapped if it has a single part.

        Raises:
            InputError: parts are missing, overlap, are damaged, or contain code.
        """
        shape = self.shapes[name]
        parts = [(piece, _read_piece(name, piece)) for piece in self.pieces.get(name, [])]
        if not parts or sum(part.numel() for _, part in parts) < prod(shape):
            raise self._missing_error(name)
        if sum(part.numel() for _, part in parts) > prod(shape):
            raise InputError(
                f"{self.source}: parts of tensor '{name}' overlap. Copy the checkpoint again.",
                code="shards.overlap",
                name=name,
            )
        if [(part.shape, any(piece.offset)) for piece, part in parts] == [(shape, False)]:
            return parts[0][1]  # not copied, so that the ranks of a node share the mapped memory
        full, is_filled = parts[0][1].new_empty(shape), torch.zeros(shape, dtype=torch.bool)
        for piece, part in parts:
            area = tuple(slice(first, first + size) for first, size in zip(piece.offset, part.shape, strict=False))
            fits = len(part.shape) == len(shape) == len(piece.offset)
            if not fits or any(side.stop > size for side, size in zip(area, shape, strict=True)):
                raise InputError(
                    f"{piece.file}: a part of tensor '{name}' with shape {tuple(part.shape)} and offset {piece.offset} "
                    f"exceeds the tensor's shape {shape}. Copy the checkpoint again.",
                    code="shards.outside",
                    name=name,
                    path=piece.file,
                )
            full[area], is_filled[area] = part, True
        if not is_filled.all():
            raise self._missing_error(name)
        return full

    def _missing_error(self, name: str) -> InputError:
        return InputError(
            f"{self.source}: parts of tensor '{name}' are missing. Copy all files of the checkpoint.",
            code="shards.absent",
            name=name,
        )


def is_distributed(folder: Path) -> bool:
    """Check whether a folder is a distributed checkpoint with `.metadata` or with safetensors shards."""
    return (folder / METADATA).is_file() or any(folder.glob(SHARD_FILES))


def shard_files(folder: Path) -> list[Path]:
    """Return the files with a distributed checkpoint's tensors, sorted by name."""
    return sorted(folder.glob(f"*{SUFFIX}" if (folder / METADATA).is_file() else SHARD_FILES))


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a Hugging Face model's tensors: safetensors before .bin, shards in order.

    Args:
        folder: the model's folder.

    Returns:
        One or more files.

    Raises:
        InputError: there are none, a shard is missing, or the index is damaged or refers to another folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = [folder / file for file in read_index(index)]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise InputError(
                    f"{folder}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}. Copy them to "
                    "the folder.",
                    code="shards.absent",
                    name=missing[0],
                )
            return shards
        if (folder / name).is_file():
            return [folder / name]
    if shards := shard_files(folder):
        return shards
    raise InputError(
        f"{folder}: the folder has no model.safetensors, pytorch_model.bin or shards. Check the path.",
        code="checkpoint.no-weights",
        path=folder,
    )


def read_index(index: Path) -> list[str]:
    """Read the file names of an index of shards.

    Args:
        index: a model.safetensors.index.json or pytorch_model.bin.index.json.

    Returns:
        Sorted names of files in the folder of the index.

    Raises:
        InputError: the index is damaged, lists no shards, or refers to another folder.
    """
    check_git_lfs(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index}: the index of shards cannot be read ({error!r}). Download it again.",
            code="shards.index",
            path=index,
        ) from None
    if not names:
        raise InputError(f"{index}: the index lists no shards. Download it again.", code="shards.index", path=index)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise InputError(
                f"{index}: the index lists {name!r}, which is not a shard in the same folder. Download the index "
                "from its publisher.",
                code="shards.elsewhere",
                path=index,
                name=name,
            )
    return names


def open_shards(folder: Path) -> Shards:
    """Open a distributed checkpoint without reading tensors.

    Args:
        folder: the checkpoint.

    Returns:
        Its tensors, optimizer states included.

    Raises:
        InputError: the metadata are damaged or contain code, or a file is missing or truncated.
    """
    folder = Path(folder)
    if (folder / METADATA).is_file():
        return _open_metadata(folder)
    return open_safetensors(folder, shard_files(folder))


def open_safetensors(source: Path, files: Iterable[Path]) -> Shards:
    """Open several safetensors files with full tensors or with parts and their offsets.

    Args:
        source: the folder, for messages.
        files: the safetensors files.

    Returns:
        Their tensors, not read yet.

    Raises:
        InputError: a file is damaged, or two files contain the same part.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for file in files:
        for name, offset, shape in _list_tensors(file):
            end = tuple(first + size for first, size in zip(offset, shape, strict=False))
            if name in pieces and any(piece.offset == offset for piece in pieces[name]):
                raise InputError(
                    f"{file}: tensor '{name}' is also in {pieces[name][0].file.name}. Use one checkpoint's files.",
                    code="shards.overlap",
                    name=name,
                    path=file,
                )
            previous = shapes.get(name, end)
            if len(offset) != len(shape) or len(previous) != len(end):
                raise InputError(
                    f"{file}: the offset of tensor '{name}' does not match its shape. Copy the file again.",
                    code="shards.outside",
                    name=name,
                    path=file,
                )
            shapes[name] = tuple(map(max, previous, end))
            pieces.setdefault(name, []).append(Piece(file, offset))
    return Shards(source, shapes, pieces)


def _list_tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield name, offset in the full tensor, and shape for every tensor of a safetensors file."""
    check_git_lfs(file)
    try:
        with safe_open(file, "pt") as opened:
            sharding = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
            for name in opened.keys():  # noqa: SIM118, not a dictionary
                shape = tuple(opened.get_slice(name).get_shape())
                offset = sharding[name][SAVED_OFFSETS] if name in sharding else [0] * len(shape)
                yield name, _check_indices(offset), shape
    except SafetensorError as error:
        raise InputError(
            f"{file}: the safetensors file is incomplete or damaged ({error}). Download it again.",
            code="checkpoint.damaged",
            path=file,
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: the offsets in the file's header cannot be read ({error!r}). Download it again.",
            code="shards.offset",
            path=file,
        ) from None


def _check_indices(numbers: Iterable[Any]) -> tuple[int, ...]:
    """Check that numbers are integers of at least 0; raises ValueError."""
    found = tuple(numbers)
    if not all(type(number) is int and number >= 0 for number in found):
        raise ValueError(f"{found} are not all integers of at least 0")
    return found


def _read_piece(name: str, piece: Piece) -> Tensor:
    """Read a part of a tensor and check that it is a plain tensor of at most its size in the file."""
    if piece.first_byte is None:
        with safe_open(piece.file, "pt") as opened:
            return opened.get_tensor(name)
    with open(piece.file, "rb") as opened:
        opened.seek(piece.first_byte)
        data = opened.read(piece.num_bytes)
    try:
        check_uncompressed(io.BytesIO(data), piece.num_bytes)
        part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *READ_ERRORS) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"{piece.file}: the part of '{name}' is not a plain tensor ({reason}) and was not loaded. Copy it again.",
            code="checkpoint.code",
            path=piece.file,
            name=name,
        ) from None
    if not isinstance(part, Tensor):
        raise InputError(
            f"{piece.file}: the part of '{name}' is not a tensor but {type(part).__name__} and was not loaded.",
            code="checkpoint.code",
            path=piece.file,
            name=name,
            found=type(part).__name__,
        )
    # With a stride of 0, a sparse layout or the meta device, a few bytes can describe a tensor of any size.
    if part.layout != torch.strided or part.is_meta or part.numel() * part.itemsize > piece.num_bytes:
        raise InputError(
            f"{piece.file}: the part of '{name}' with shape {tuple(part.shape)} is larger than its {piece.num_bytes} "
            "bytes and was not loaded. Copy it again.",
            code="checkpoint.not-tensors",
            path=piece.file,
            name=name,
        )
    return part


class _Record:
    """An inert object that replaces every class in the pickle: it stores its arguments and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` without importing classes; names outside ALLOWED_NAMES are rejected."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a record class for an allowed name."""
        if (module, name) not in ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"contains code ({module}.{name})")
        return type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Reject references to objects outside the pickle."""
        raise pickle.UnpicklingError("refers to an external object")


def _open_metadata(folder: Path) -> Shards:
    """Open a distributed checkpoint by its `.metadata`."""
    file = folder / METADATA
    pieces: dict[str, list[Piece]] = {}
    check_git_lfs(file)
    try:
        with open(file, "rb") as opened:
            fields = _MetadataUnpickler(opened).load().state
        shapes = {
            str(name): _check_indices(entry.state["size"].args[0])
            for name, entry in fields["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        for key, value in fields["storage_data"].items():
            name, stored = str(key.state["fqn"]), value.state
            if name not in shapes:
                continue  # not a tensor, such as an optimizer's settings or an epoch
            saved = key.state.get("offset")
            offset = () if saved is None else _check_indices(saved.args[0])
            first_byte, num_bytes = _check_indices((stored["offset"], stored["length"]))
            if extensions := stored.get("transform_descriptors"):
                raise InputError(
                    f"{file}: tensor '{name}' was saved with extensions ({extensions!r:.60}). Save it without them.",
                    code="shards.extension",
                    path=file,
                    name=name,
                )
            path = _resolve_file(folder, stored["relative_path"], first_byte + num_bytes)
            pieces.setdefault(name, []).append(Piece(path, offset, first_byte, num_bytes))
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or ["is damaged"])[0]
        raise InputError(
            f"{file}: the file {reason} and was not loaded. Ask for a new copy of the checkpoint.",
            code="checkpoint.code",
            path=file,
        ) from None
    except READ_ERRORS as error:
        raise InputError(
            f"{file}: the metadata of the distributed checkpoint are damaged ({error!r:.100}). Copy the file again.",
            code="checkpoint.damaged",
            path=file,
        ) from None
    return Shards(folder, shapes, pieces)


def _resolve_file(folder: Path, relative: Any, end: int) -> Path:
    """Return the path of a file in the folder and check that it has at least `end` bytes."""
    if not isinstance(relative, str) or Path(relative).name != relative or not relative.endswith(SUFFIX):
        raise InputError(
            f"{folder / METADATA}: refers to {relative!r:.100}, which is not a {SUFFIX} file in the same folder.",
            code="shards.elsewhere",
            path=folder / METADATA,
            name=relative,
        )
    path = folder / relative
    if not path.is_file():
        raise InputError(
            f"{path}: the file is missing. Copy all files of the checkpoint.", code="shards.absent", name=path.name
        )
    check_git_lfs(path)
    if path.stat().st_size < end:
        raise InputError(
            f"{path}: the file has {path.stat().st_size:,} bytes, expected at least {end:,}. Copy it again.",
            code="shards.cut-short",
            path=path,
            found=path.stat().st_size,
            expected=end,
        )
    return path

"""A model's tensors cut over several files: torch.distributed.checkpoint folders, and safetensors shards.

The `.metadata` of a distributed checkpoint is a pickle. It is read here by an unpickler that knows the few names torch
writes and gives an inert record for each, so that nothing in it can run; the tensors go through torch's weights-only
reader.
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
from esm2kit.models.formats.readers import check_uncompressed

METADATA = ".metadata"
SUFFIX = ".distcp"
# torch's HuggingFaceStorageWriter: where a shard lies in its tensor, in the safetensors header; and its files' names.
OFFSETS, SAVED_OFFSETS, SHARD_FILES = "DCP_SHARDING_INFO", "saved_offsets", "shard-*.safetensors"
# What torch 2.11 to 2.13 put into `.metadata`, all of it data.
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

# What else a damaged or hostile pickle may raise on its way; torch's errors and RecursionError are RuntimeErrors.
READ_ERRORS = (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError,
          RuntimeError, ImportError, AssertionError)  # fmt: skip


class Piece(NamedTuple):
    """A part of a tensor.

    Args:
        file: where it is.
        place: its first element in the whole tensor, an index a dimension.
        start: its first byte in the file; None in a safetensors file, which knows by the tensor's name.
        size: its bytes.
    """

    file: Path
    place: tuple[int, ...]
    start: int | None = None
    size: int = 0


class Shards:
    """The tensors of a folder by name, each put together when it is read.

    Args:
        source: for messages.
        shapes: name -> shape.
        pieces: name -> its parts.
    """

    def __init__(self, source: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[Piece]]) -> None:
        self.source, self.shapes, self.pieces = source, dict(shapes), dict(pieces)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises: InputError if its parts do not make it up, overlap, or if one is damaged or code."""
        shape = self.shapes[name]
        parts = [(piece, _read_piece(name, piece)) for piece in self.pieces.get(name, [])]
        if not parts or sum(part.numel() for _, part in parts) < prod(shape):
            raise InputError(
                f"{self.source}: parts of {name} are absent; copy every file of the checkpoint",
                code="shards.absent",
                name=name,
            )
        if sum(part.numel() for _, part in parts) > prod(shape):
            raise InputError(
                f"{self.source}: parts of {name} overlap; take another copy of the checkpoint",
                code="shards.overlap",
                name=name,
            )
        if [(part.shape, any(piece.place)) for piece, part in parts] == [(shape, False)]:
            return parts[0][1]  # as it is: mapped from its file, the ranks of a node share it
        whole, seen = parts[0][1].new_empty(shape), torch.zeros(shape, dtype=torch.bool)
        for piece, part in parts:
            area = tuple(slice(first, first + size) for first, size in zip(piece.place, part.shape, strict=False))
            fits = len(part.shape) == len(shape) == len(piece.place)
            if not fits or any(side.stop > size for side, size in zip(area, shape, strict=True)):
                raise InputError(
                    f"{piece.file}: a part of {name}, {tuple(part.shape)} at {piece.place}, lies outside its "
                    f"{shape}; take another copy of the checkpoint",
                    code="shards.outside",
                    name=name,
                    path=piece.file,
                )
            whole[area], seen[area] = part, True
        if not seen.all():
            raise InputError(
                f"{self.source}: parts of {name} are absent; copy every file of the checkpoint",
                code="shards.absent",
                name=name,
            )
        return whole


def is_distributed(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint, of either form."""
    return (folder / METADATA).is_file() or any(folder.glob(SHARD_FILES))


def shard_files(folder: Path) -> list[Path]:
    """The files that hold a distributed checkpoint's tensors, in the order of their names."""
    return sorted(folder.glob(f"*{SUFFIX}" if (folder / METADATA).is_file() else SHARD_FILES))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a Hugging Face model's tensors: safetensors before .bin, shards in order.

    Raises: InputError if there are none, if shards are absent, or if the index of shards is damaged or names a file
        elsewhere.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = [folder / file for file in read_index(index)]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise InputError(
                    f"{folder}: {len(absent)} of {len(shards)} shards are absent, as {absent[0]}; copy them too",
                    code="shards.absent",
                    name=absent[0],
                )
            return shards
        if (folder / name).is_file():
            return [folder / name]
    if shards := shard_files(folder):
        return shards
    raise InputError(
        f"{folder}: neither model.safetensors nor pytorch_model.bin is in it", code="checkpoint.no-weights", path=folder
    )


def read_index(index: Path) -> list[str]:
    """The shards an index names, each beside it. Raises: InputError if it is damaged, or names none or others."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index}: no readable index of shards ({error!r}); fetch it again", code="shards.index", path=index
        ) from None
    if not names:
        raise InputError(
            f"{index}: no readable index of shards (it names none); fetch it again", code="shards.index", path=index
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise InputError(
                f"{index}: names {name!r}, which is no shard beside it; take the publisher's own file",
                code="shards.elsewhere",
                path=index,
                name=name,
            )
    return names


def open_shards(folder: Path) -> Shards:
    """What a distributed checkpoint holds, no tensor read yet.

    Raises: InputError if its metadata are damaged or name code, or if a file is absent or cut short.
    """
    folder = Path(folder)
    if (folder / METADATA).is_file():
        return _open_metadata(folder)
    return open_safetensors(folder, shard_files(folder))


def open_safetensors(source: Path, files: Iterable[Path]) -> Shards:
    """The tensors of several safetensors files, whole ones or parts that say where they lie.

    Raises: InputError for a damaged file, or a tensor that two files give.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for file in files:
        for name, place, shape in _list_tensors(file):
            reach = tuple(first + size for first, size in zip(place, shape, strict=False))
            if name in pieces and any(piece.place == place for piece in pieces[name]):
                raise InputError(
                    f"{file}: {name} is in {pieces[name][0].file.name} too; take one checkpoint's files",
                    code="shards.overlap",
                    name=name,
                    path=file,
                )
            before = shapes.get(name, reach)
            if len(place) != len(shape) or len(before) != len(reach):
                raise InputError(
                    f"{file}: the place of {name} does not fit its shape; take another copy of it",
                    code="shards.outside",
                    name=name,
                    path=file,
                )
            shapes[name] = tuple(map(max, before, reach))
            pieces.setdefault(name, []).append(Piece(file, place))
    return Shards(source, shapes, pieces)


def _list_tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, place in the whole tensor, and shape of what a safetensors file holds."""
    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
            for name in opened.keys():  # noqa: SIM118, not a dictionary
                shape = tuple(opened.get_slice(name).get_shape())
                place = told[name][SAVED_OFFSETS] if name in told else [0] * len(shape)
                yield name, _check_indices(place), shape
    except SafetensorError as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); fetch it again", code="checkpoint.damaged", path=file
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: its header does not say where the parts lie ({error!r}); fetch it again",
            code="shards.offset",
            path=file,
        ) from None


def _check_indices(numbers: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(numbers)
    if not all(type(number) is int and number >= 0 for number in found):
        raise ValueError(f"{found} are no whole numbers")
    return found


def _read_piece(name: str, piece: Piece) -> Tensor:
    if piece.start is None:
        with safe_open(piece.file, "pt") as opened:
            return opened.get_tensor(name)
    with open(piece.file, "rb") as opened:
        opened.seek(piece.start)
        data = opened.read(piece.size)
    try:
        check_uncompressed(io.BytesIO(data), piece.size)
        part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *READ_ERRORS) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise InputError(
            f"{piece.file}: refused, the part of {name} is no plain tensor ({reason}); take another copy",
            code="checkpoint.code",
            path=piece.file,
            name=name,
        ) from None
    if not isinstance(part, Tensor):
        raise InputError(
            f"{piece.file}: refused, the part of {name} is {type(part).__name__} and no tensor",
            code="checkpoint.code",
            path=piece.file,
            name=name,
            found=type(part).__name__,
        )
    # by a stride of 0, a sparse layout or the meta device, a few bytes can be a tensor of any size
    if part.layout != torch.strided or part.is_meta or part.numel() * part.itemsize > piece.size:
        raise InputError(
            f"{piece.file}: refused, the part of {name}, {tuple(part.shape)}, is more than its {piece.size} bytes "
            "hold; take another copy",
            code="checkpoint.not-tensors",
            path=piece.file,
            name=name,
        )
    return part


class _Record:
    """What the unpickler makes in place of any class: it keeps what it is given and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` without torch's classes or any other: a name is known, or the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no distributed checkpoint needs")
        return type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to something outside itself")


def _open_metadata(folder: Path) -> Shards:
    file = folder / METADATA
    pieces: dict[str, list[Piece]] = {}
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
                continue  # an optimizer's settings, an epoch: bytes that are left alone
            place = () if (offset := key.state.get("offset")) is None else _check_indices(offset.args[0])
            start, size = _check_indices((stored["offset"], stored["length"]))
            if packed := stored.get("transform_descriptors"):
                raise InputError(
                    f"{file}: {name} is stored through {packed!r:.60}; save it without extensions",
                    code="shards.extension",
                    path=file,
                    name=name,
                )
            path = _resolve_file(folder, stored["relative_path"], start + size)
            pieces.setdefault(name, []).append(Piece(path, place, start, size))
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or ["is damaged"])[0]
        raise InputError(
            f"{file}: refused, it {reason}; take the checkpoint from whoever trained it",
            code="checkpoint.code",
            path=file,
        ) from None
    except READ_ERRORS as error:
        raise InputError(
            f"{file}: not a distributed checkpoint's metadata ({error!r:.100}); copy it again",
            code="checkpoint.damaged",
            path=file,
        ) from None
    return Shards(folder, shapes, pieces)


def _resolve_file(folder: Path, relative: Any, end: int) -> Path:
    """A file of the checkpoint that reaches at least to byte `end`."""
    if not isinstance(relative, str) or Path(relative).name != relative or not relative.endswith(SUFFIX):
        raise InputError(
            f"{folder / METADATA}: names {relative!r:.100}, which is no {SUFFIX} file beside it",
            code="shards.elsewhere",
            path=folder / METADATA,
            name=relative,
        )
    path = folder / relative
    if not path.is_file():
        raise InputError(f"{path} is absent; copy every file of the checkpoint", code="shards.absent", name=path.name)
    if path.stat().st_size < end:
        raise InputError(
            f"{path}: has {path.stat().st_size} bytes and should reach to {end}; copy it again",
            code="shards.cut-short",
            path=path,
            found=path.stat().st_size,
            expected=end,
        )
    return path

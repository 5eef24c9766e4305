"""Weight files read without running anything in them: safetensors, and what torch.save wrote, weights only."""

import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esm2kit.core.errors import InputError

State = dict[str, Tensor]


def read_safetensors(path: Path) -> State:
    """Read all tensors of a safetensors file.

    Raises:
        InputError: the file is cut short or of another format.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); fetch it again", code="checkpoint.damaged", path=path
        ) from None


def read_pickle(path: Path) -> Any:
    """Read a file made by torch.save with the weights-only unpickler: tensors and argparse.Namespace, no code, ever.

    Tensors are mapped, not read: the ranks of a node share one copy of what nobody changes.

    Raises:
        InputError: the file holds anything else, is damaged, or was not made by torch.save.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct the path", code="checkpoint.absent", path=path)
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: not a whole file of torch.save; fetch it again", code="checkpoint.damaged", path=path
        )
    try:
        with open(path, "rb") as opened:
            check_uncompressed(opened, path.stat().st_size)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|Unsupported class|type) ([\w.]+\.\w+)", str(error))
        what = f"names {named[1]}, which is code" if named else "holds more than tensors"
        raise InputError(
            f"{path}: refused, it {what}; esm2kit loads weights only, take the publisher's own file",
            code="checkpoint.code",
            path=path,
            found=named[1] if named else None,
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"{path}: not a whole file of torch.save ({reason}); fetch it again", code="checkpoint.damaged", path=path
        ) from None


def check_tensors(found: Any, source: Path) -> State:
    """Check that what a pickle gave is a dictionary of plain tensors.

    Raises:
        InputError: names what else it is.
    """
    if not isinstance(found, dict):
        raise InputError(
            f"{source}: holds {type(found).__name__} where tensors by name should be; fetch it again",
            code="checkpoint.not-tensors",
            path=source,
            found=type(found).__name__,
        )
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"{source}: {name!r:.80} is no plain tensor; take the publisher's own file",
                code="checkpoint.not-tensors",
                path=source,
                name=name,
            )
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # by a stride of 0
            raise InputError(
                f"{source}: {name!r:.80} is more than its bytes hold; take the publisher's own file",
                code="checkpoint.not-tensors",
                path=source,
                name=name,
            )
    return {str(name): tensor for name, tensor in found.items()}


def check_uncompressed(opened: BinaryIO, size: int) -> None:
    """Check a file of torch.save against its size: it stores every member once and uncompressed.

    A compressed one could take a thousand times its size in memory.

    Args:
        opened: the file, at any place.
        size: its bytes.

    Raises:
        ValueError: a zip is deflated, or holds the same bytes more than once.
    """
    if not zipfile.is_zipfile(opened):
        return  # the form before torch 1.6, whose reader takes no more than it finds
    try:
        with zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged zip: {error}") from None
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        raise ValueError("it would unpack to more than its bytes")

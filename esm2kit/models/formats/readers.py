"""Read weight files without running code: safetensors files, and files of torch.save by its weights-only reader."""

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

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        InputError: the file is truncated or has another format.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path}: the safetensors file is incomplete or damaged ({error}). Download it again.",
            code="checkpoint.damaged",
            path=path,
        ) from None


def read_pickle(path: Path) -> Any:
    """Read a file of torch.save with the weights-only unpickler, which allows tensors and argparse.Namespace only.

    Tensors are memory-mapped, so that the ranks of a node share one copy of unchanged tensors.

    Args:
        path: the file.

    Returns:
        The content.

    Raises:
        InputError: the file contains anything else, is damaged, or was not written by torch.save.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: the file does not exist. Check the path.", code="checkpoint.absent", path=path)
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: the file is incomplete, or was not written by torch.save. Download it again.",
            code="checkpoint.damaged",
            path=path,
        )
    try:
        with open(path, "rb") as opened:
            check_uncompressed(opened, path.stat().st_size)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|Unsupported class|type) ([\w.]+\.\w+)", str(error))
        what = f"code ({named[1]})" if named else "more than tensors"
        raise InputError(
            f"{path}: the file contains {what} and was not loaded. esm2kit loads only weights. Download the file from "
            "its publisher.",
            code="checkpoint.code",
            path=path,
            found=named[1] if named else None,
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"{path}: the file is damaged ({reason}). Download it again.", code="checkpoint.damaged", path=path
        ) from None


def check_tensors(found: Any, source: Path) -> State:
    """Check that the content of a pickle is a dictionary of plain tensors.

    Args:
        found: the content.
        source: the file, for the message.

    Returns:
        Name -> tensor.

    Raises:
        InputError: it is not a dictionary, or a value is not a plain tensor.
    """
    if not isinstance(found, dict):
        raise InputError(
            f"{source}: expected a dictionary of tensors, found {type(found).__name__}. Download the file again.",
            code="checkpoint.not-tensors",
            path=source,
            found=type(found).__name__,
        )
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"{source}: {name!r:.80} is not a plain tensor. Download the file from its publisher.",
                code="checkpoint.not-tensors",
                path=source,
                name=name,
            )
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # has a stride of 0
            raise InputError(
                f"{source}: {name!r:.80} is larger than its data in the file. Download the file from its publisher.",
                code="checkpoint.not-tensors",
                path=source,
                name=name,
            )
    return {str(name): tensor for name, tensor in found.items()}


def check_uncompressed(opened: BinaryIO, size: int) -> None:
    """Check that a file of torch.save stores every member once and uncompressed.

    A compressed file could occupy a thousand times its size in memory.

    Args:
        opened: the file, at any position.
        size: its size in bytes.

    Raises:
        ValueError: the zip archive is damaged or compressed, or stores the same bytes more than once.
    """
    if not zipfile.is_zipfile(opened):
        return  # the format before torch 1.6, whose reader allocates no more than the file's size
    try:
        with zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"damaged zip archive: {error}") from None
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        raise ValueError("its content is larger than the file")

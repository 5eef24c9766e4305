"""Read files of torch.save without running code, and find the tensors of a model among other names."""

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import UNREADABLE_ZIP, check_git_lfs
from esm2kit.models.formats.content import ZIP_KIND, describe_content

State = dict[str, Tensor]
# Components that DataParallel, torch.compile, FSDP and activation checkpointing add to tensor names.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ADAPTERS = re.compile(r"(?<![^.])(lora_\w+|base_layer|original_module|modules_to_save|ia3_l)(\.|$)")
# PEFT writes it beside adapters; transformers applies the adapters then, even if the folder has a complete model.
ADAPTER_CONFIG = "adapter_config.json"
# Keys under which trainers save a model's tensors: Lightning and others, fair-esm.
STATE_KEYS = ("state_dict", "model", "model_state_dict")


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
    check_git_lfs(path)
    if not zipfile.is_zipfile(path):
        kind = describe_content(path)
        if kind and kind != ZIP_KIND:  # an incomplete file of torch.save starts like a zip archive
            raise_not_weights(path, kind)
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
            f"{path}: the file contains {what} and was not loaded. esm2kit loads only weights: save the model's "
            "state_dict, or download the file from its publisher.",
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


def unwrap(content: Any) -> Any:
    """Return the dictionary of tensors in the content of a trainer's file; other content is returned as it is."""
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content


def clean_names(names: Iterable[str], embedding: str, source: Path | str) -> tuple[dict[str, str], str]:
    """Remove the parts of tensor names that wrappers of a model add, and find the model's own prefix.

    Args:
        names: tensor names, such as `model._orig_mod.esm.embeddings.word_embeddings.weight`.
        embedding: the last part of the name of the token embedding; exactly one tensor must have it.
        source: the file, for the message.

    Returns:
        Name in the file -> name without the components of DataParallel, torch.compile and FSDP; and the prefix before
        `embedding` in these names.

    Raises:
        InputError: the file holds adapters, or not exactly one model.
    """
    names = list(names)
    check_no_adapters(names, source)
    cleaned = {name: WRAPPERS.sub("", name) for name in names}
    prefixes = [name.removesuffix(embedding) for name in cleaned.values() if f".{name}".endswith(f".{embedding}")]
    if len(prefixes) != 1 or len(set(cleaned.values())) < len(names):
        raise InputError(
            f"{source}: expected the tensors of one ESM-2 with one '{embedding}', found {len(prefixes)}. Save one "
            "model's state_dict.",
            code="checkpoint.tensor",
            name=embedding,
            found=len(prefixes) or None,
        )
    return cleaned, prefixes[0]


def check_no_adapters(names: Iterable[str], source: Path | str) -> None:
    """Check that tensor names are those of a model without adapters.

    Args:
        names: tensor names.
        source: the file, for the message.

    Raises:
        InputError: PEFT wrote a tensor, such as one of LoRA.
    """
    found = next((name for name in names if ADAPTERS.search(name)), None)
    if found:
        raise_adapter(source, found)


def raise_adapter(source: Path | str, name: str) -> NoReturn:
    """Reject a file or folder of PEFT adapters.

    Args:
        source: the file or folder.
        name: a tensor of an adapter, or the file that describes the adapters.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{source}: these are PEFT adapters that are not merged into their base model ('{name:.80}'). Merge them with "
        "merge_and_unload() of PEFT, save the result with save_pretrained, and pass that folder.",
        code="checkpoint.adapter",
        path=source,
        name=name,
    )


def raise_not_weights(path: Path, kind: str) -> NoReturn:
    """Reject a file of another kind that was passed as a model.

    Args:
        path: the file.
        kind: what it is, from `describe_content`.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{path} is {kind}, not the weights of a model. Pass an official name, a checkpoint (.safetensors or .pt) or a "
        "model's folder.",
        code="model.not-weights",
        path=path,
        found=kind,
    )


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
    except UNREADABLE_ZIP as error:
        raise ValueError(f"damaged zip archive: {error}") from None
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        raise ValueError("its content is larger than the file")

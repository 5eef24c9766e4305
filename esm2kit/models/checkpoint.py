"""Read and write checkpoints: a safetensors file with JSON metadata in its header and a SHA-256 of its contents.

A checkpoint contains no code and is never unpickled. `model.*` tensors have fair-esm's names. `optimizer.*` tensors are
only needed to resume training.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, check_git_lfs, to_json
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.content import describe_content
from esm2kit.models.formats.readers import raise_not_weights

FORMAT = 1
TIED = {"model.lm_head.weight": "model.embed_tokens.weight"}
# torch dtype -> its name in a safetensors header
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DIGEST_PLACEHOLDER = "?" * 64
CACHE_LINE = 64
PINNED_BYTES = 1 << 20  # pinning memory takes longer than copying a smaller tensor without it


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file. An existing checkpoint is replaced in one step.
        tensors: name -> tensor. The LM head's matrix is tied to the token embedding and is not stored twice. Sharded
            tensors are gathered one at a time, so the other ranks must call `gather` on the same tensors.
        metadata: values that JSON can hold; `model` holds the fields of ESM2Config.

    Raises:
        OSError: the file cannot be written. An existing checkpoint stays unchanged.
    """
    untied = {name: tensor for name, tensor in tensors.items() if name not in TIED}
    metadata = to_json({"format": FORMAT} | metadata)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    save_tensors(path, untied, {"esm2kit": json.dumps(metadata | {"sha256": DIGEST_PLACEHOLDER})}, digest)


def gather(tensors: Mapping[str, Tensor]) -> None:
    """Take part in another rank's `write_checkpoint` of the same tensors.

    Args:
        tensors: name -> tensor, the same names on every rank.
    """
    for name in sorted(tensors):
        if name not in TIED:
            _gather_tensor(tensors[name])


def copy_to_host(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into host memory, so that they can be written while the originals change.

    Args:
        tensors: name -> tensor, on any device. Sharded tensors are gathered one at a time, so the other ranks must call
            `gather` on the same tensors.
        buffers: host tensors of earlier copies by name; they are overwritten, and missing ones are added. Those of
            tensors on a GPU are in pinned memory.

    Returns:
        Name -> complete tensor on the CPU, without the matrix that is tied to the token embedding.
    """
    copies = {}
    # a callback of the validation runs in inference mode, whose tensors cannot be overwritten later
    with torch.inference_mode(False), torch.no_grad():
        for name in sorted(tensors):
            if name in TIED:
                continue
            full, buffer = _gather_tensor(tensors[name]), buffers.get(name)
            if buffer is None or buffer.shape != full.shape or buffer.dtype != full.dtype:
                pinned = full.is_cuda and full.nbytes >= PINNED_BYTES
                buffer = buffers[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=pinned)
            copies[name] = buffer.copy_(full, non_blocking=full.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
    return copies


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], digest: "hashlib._Hash | None" = None
) -> None:
    """Write a safetensors file atomically, with one full tensor in memory at a time.

    The safetensors package requires all tensors at once: for a 15B checkpoint 180 GB on the rank that writes.

    Args:
        path: the file. An existing file is replaced in one step.
        tensors: name -> tensor, on any device and with any strides; may be sharded.
        metadata: the header's metadata. DIGEST_PLACEHOLDER in a value is replaced by the hex digest.
        digest: is updated with every tensor, in the order of the names.

    Raises:
        OSError: the file cannot be written.
    """
    header, offsets = _build_header(tensors, metadata)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(header)
        for name in sorted(tensors):
            full = _gather_tensor(tensors[name]).cpu().contiguous()
            if digest is not None:
                _update_digest(digest, name, full)
            file.seek(len(header) + offsets[name])
            file.write(_to_bytes(full))
        if digest is not None:
            file.seek(0)
            file.write(header.replace(DIGEST_PLACEHOLDER.encode(), digest.hexdigest().encode()))


def _build_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Build a safetensors header and each tensor's byte offset after it; the widest dtypes come first."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.numel() * tensor.itemsize
        span = [offsets[name], end]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    header = json.dumps(entries).encode()
    # Tensors are memory-mapped, and the rounding of matrix products depends on their memory alignment. The padding
    # keeps the alignment the same for headers of any length.
    header += b" " * (-(8 + len(header)) % CACHE_LINE)
    return len(header).to_bytes(8, "little") + header, offsets


def _gather_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; others are returned as they are."""
    tensor = tensor.detach()
    # Importing DTensor for isinstance would cost half a second.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def read_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and check its digest.

    Args:
        path: the file.
        prefix: return only the tensors whose names start with this. The digest still covers all tensors.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        InputError: the file is missing, truncated, damaged, or not an esm2kit checkpoint.
    """
    metadata = read_metadata(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    if metadata.pop("sha256", None) != _compute_digest(tensors, metadata):
        _raise_damaged(path)
    if "model.lm_head.bias" in tensors:  # the model has an LM head
        tensors |= {name: tensors[source] for name, source in TIED.items() if source in tensors}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON metadata without reading its tensors or checking its digest.

    Args:
        path: the file.

    Returns:
        The metadata, with the `sha256` that the checkpoint declares.

    Raises:
        InputError: the file is missing, truncated, or not an esm2kit checkpoint.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path}: the checkpoint does not exist. `esm2kit pretrain` creates one.",
            code="checkpoint.absent",
            path=path,
        )
    check_git_lfs(path)
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
    except SafetensorError as error:
        if kind := describe_content(path):
            raise_not_weights(path, kind)
        raise InputError(
            f"{path}: the safetensors file is incomplete or damaged ({error}). Use another checkpoint.",
            code="checkpoint.damaged",
            path=path,
        ) from error
    try:
        metadata = json.loads(header["esm2kit"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: this safetensors file is not an esm2kit checkpoint; its first tensor is "
            f"'{min(names, default='absent'):.80}'. For a Hugging Face model, pass the folder with its config.json and "
            "model.safetensors; merge PEFT adapters into their base model first.",
            code="checkpoint.not-esm2kit",
            path=path,
            name=min(names, default=None),
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: checkpoint format {metadata.get('format')} is not supported; this esm2kit reads format {FORMAT}.",
            code="checkpoint.format",
            path=path,
            found=metadata.get("format"),
            allowed=FORMAT,
        )
    return metadata


def read_config(path: Path) -> ESM2Config:
    """Read the configuration of a checkpoint's model without reading tensors.

    Args:
        path: the file.

    Returns:
        The model's configuration.

    Raises:
        InputError: as `read_metadata`, or the file is too small for its configuration.
    """
    try:
        config = ESM2Config(**read_metadata(path)["model"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: the model's configuration cannot be read ({error}). Update esm2kit if a newer version wrote the "
            "checkpoint, or use another checkpoint.",
            code="checkpoint.config",
            path=path,
        ) from None
    check_file_size(config, [path])
    return config


def read(path: Path) -> tuple[ESM2Config, dict[str, Tensor]]:
    """Read the model in a checkpoint.

    Args:
        path: the file.

    Returns:
        The model's configuration, and its tensors under fair-esm's names.

    Raises:
        InputError: as `read_checkpoint`, or the file contains only adapters.
    """
    config, (tensors, _) = read_config(path), read_checkpoint(path, prefix="model.")
    if not tensors:
        _raise_adapters_only(path)
    return config, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def open_tensors(path: Path) -> tuple[ESM2Config, Callable[[Iterable[str]], dict[str, Tensor]]]:
    """Open the model in a checkpoint, to read its tensors when they are used.

    The digest of the contents is checked first, with one tensor in memory at a time.

    Args:
        path: the file.

    Returns:
        The model's configuration, and a function that reads tensors by fair-esm's names. It omits those that the file
        does not have. The memory-mapped file is released with the tensors.

    Raises:
        InputError: as `read`.
    """
    config, (readers, _) = read_config(path), open_checkpoint(path)
    if not any(name.startswith("model.") for name in readers):
        _raise_adapters_only(path)

    def read_names(wanted: Iterable[str]) -> dict[str, Tensor]:
        sources = {name: TIED.get(f"model.{name}", f"model.{name}") for name in wanted}
        return {name: readers[source]() for name, source in sources.items() if source in readers}

    return config, read_names


def open_checkpoint(path: Path) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """Open a checkpoint and check its digest, with one tensor in memory at a time.

    Args:
        path: the file.

    Returns:
        Name -> function that reads the tensor, without the tied one; and the metadata. The memory-mapped file is
        released with the tensor.

    Raises:
        InputError: as `read_checkpoint`.
    """
    metadata = read_metadata(path)

    def read_tensor(name: str) -> Tensor:
        # opened for each tensor: memory-mapped pages stay in memory until the file is closed
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    with safe_open(path, "pt") as file:
        readers = {name: partial(read_tensor, name) for name in sorted(file.keys())}
    if metadata.pop("sha256", None) != _compute_digest(readers, metadata):
        _raise_damaged(path)
    return readers, metadata


def _raise_damaged(path: Path) -> NoReturn:
    raise InputError(
        f"{path}: the checkpoint is damaged: its contents do not match its sha256. Use another checkpoint.",
        code="checkpoint.digest",
        path=path,
    )


def _raise_adapters_only(path: Path) -> NoReturn:
    raise InputError(
        f"{path}: the file contains LoRA adapters but no encoder. Fine-tune with --merge true to save both.",
        code="checkpoint.adapters-only",
        path=path,
    )


def check_file_size(config: ESM2Config, files: Sequence[Path]) -> None:
    """Check that files can hold a configuration's parameters, before a damaged configuration builds a huge model.

    Args:
        config: the model's configuration.
        files: the files with the model's tensors.

    Raises:
        InputError: the configuration has more than 1,000 parameters per byte. Readers report truncated files.
    """
    for file in files:
        check_git_lfs(Path(file))
    size = sum(Path(file).stat().st_size for file in files)
    if config.num_parameters > 1000 * size:
        raise InputError(
            f"{files[0]}: {size:,} bytes are too few for the {config.num_parameters:,} parameters of its "
            "configuration. Download it again.",
            code="checkpoint.too-small",
            path=files[0],
            found=size,
        )


def load_tensors(model: ESM2, state: dict[str, Tensor], source: Path | str) -> None:
    """Load tensors into a model in place.

    Args:
        model: the model; on the meta device, it takes over the tensors instead of copying them.
        state: fair-esm's name -> tensor, with exactly the model's names and shapes.
        source: the file, for the message.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    what = f"this model ({model.config.num_layers} layers, embed_dim {model.config.embed_dim})"
    check_tensor_shapes(model.state_dict(), state, source, what, "Choose the model size of the checkpoint.")
    model.load_state_dict(state, assign=model.embed_tokens.weight.is_meta)
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight


def check_tensor_shapes(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path | str, what: str, remedy: str
) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Args:
        expected: name -> tensor; only the shapes are read.
        found: name -> tensor, as read from the file.
        source: the file, for the message.
        what: the model or head that requires the tensors, for the message.
        remedy: a sentence that says what to do.

    Raises:
        InputError: a tensor is missing, unknown or of another shape. The message shows the first one.
    """
    required, given = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (expected, found))
    wrong = sorted(name for name in required.keys() | given.keys() if required.get(name) != given.get(name))
    if wrong:
        name, shape = wrong[0], required.get(wrong[0])
        state = f"has shape {given[name]}" if name in given else "is missing"
        rule = "has no such tensor" if shape is None else f"requires shape {shape}"
        raise InputError(
            f"{source}: tensor '{name}' {state}, but {what} {rule}. {remedy}",
            code="checkpoint.tensor",
            name=name,
            found=given.get(name),
            expected=shape,
        )


def _compute_digest(tensors: Mapping[str, Tensor | Callable[[], Tensor]], metadata: dict[str, Any]) -> str:
    """Compute the SHA-256 of the metadata and every tensor's name, dtype, shape and bytes; functions read tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _update_digest(digest, name, tensor() if callable(tensor) else tensor)
    return digest.hexdigest()


def _update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_to_bytes(tensor))


def _to_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()

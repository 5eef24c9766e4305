"""A checkpoint is one safetensors file: tensors by name, everything else as JSON in its header, a digest over both.

Nothing in it is code, nothing is unpickled. `model.*` are fair-esm's names, `optimizer.*` what resuming needs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, to_json
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2

FORMAT = 1
TIED = {"model.lm_head.weight": "model.embed_tokens.weight"}
# safetensors' names of torch's types
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DIGEST_PLACEHOLDER = "?" * 64
CACHE_LINE = 64


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file; a checkpoint already there is replaced in one step.
        tensors: by name; the LM head's matrix may be among them and is kept once, as the embedding it is. Shards are
            gathered one after the other: the ranks that do not write must call `gather` meanwhile.
        metadata: JSON-able; `model` holds the ESM2Config's fields.
    Raises: OSError if the disk does not take it; what was there before stays.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name not in TIED}
    metadata = to_json({"format": FORMAT} | metadata)
    seal = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    save_tensors(path, kept, {"esm2kit": json.dumps(metadata | {"sha256": DIGEST_PLACEHOLDER})}, seal)


def gather(tensors: Mapping[str, Tensor]) -> None:
    """A rank's part in `write_checkpoint` of the same tensors where another one writes."""
    for name in sorted(tensors):
        if name not in TIED:
            _gather_tensor(tensors[name])


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], seal: "hashlib._Hash | None" = None
) -> None:
    """Write a safetensors file, whole or not at all, with one whole tensor in memory at a time.

    The safetensors package wants all of them at once: at 15B a checkpoint's 180 GB, on the rank that writes.

    Args:
        path: the file; one already there is replaced in one step.
        tensors: by name, on any device, of any strides, shards too.
        texts: of the header; DIGEST_PLACEHOLDER in one of them becomes the seal's hex digest.
        seal: is fed the tensors, in the order of their names.
    Raises: OSError if the disk does not take it.
    """
    header, places = _build_header(tensors, texts)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(header)
        for name in sorted(tensors):
            whole = _gather_tensor(tensors[name]).cpu().contiguous()
            if seal is not None:
                _update_digest(seal, name, whole)
            file.seek(len(header) + places[name])
            file.write(_to_bytes(whole))
        if seal is not None:
            file.seek(0)
            file.write(header.replace(DIGEST_PLACEHOLDER.encode(), seal.hexdigest().encode()))


def _build_header(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where in what follows each tensor begins: the widest types first."""
    entries: dict[str, Any] = {"__metadata__": dict(texts)}
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor = tensors[name]
        places[name], end = end, end + tensor.numel() * tensor.itemsize
        span = [places[name], end]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    told = json.dumps(entries).encode()
    # tensors are mapped where they lie, and matrix products round by their place in memory: a longer header must not
    # move them against a cache line
    told += b" " * (-(8 + len(told)) % CACHE_LINE)
    return len(told).to_bytes(8, "little") + told, places


def _gather_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    # a DTensor; its class takes half a second to import, which who has none need not wait for
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def read_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint, after its digest has been checked.

    Args:
        path: the file.
        prefix: give only tensors whose name begins so; the digest is over all of them all the same.
    Raises: InputError if the file is absent, cut short, damaged, or not an esm2kit checkpoint.
    """
    metadata = read_metadata(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    if metadata.pop("sha256", None) != _compute_digest(tensors, metadata):
        raise InputError(
            f"{path}: the checkpoint's bytes do not match its own sha256; it is damaged, take another",
            code="checkpoint.digest",
            path=path,
        )
    tensors |= {name: tensors[source] for name, source in TIED.items() if source in tensors}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, without reading its tensors or checking its digest; raises as `read_checkpoint`."""
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such checkpoint; `esm2kit pretrain` makes one", code="checkpoint.absent", path=path
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); take another checkpoint",
            code="checkpoint.damaged",
            path=path,
        ) from error
    try:
        metadata = json.loads(header["esm2kit"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: a safetensors file, but not an esm2kit checkpoint: its header lacks ours",
            code="checkpoint.not-esm2kit",
            path=path,
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: checkpoint format {metadata.get('format')}, this esm2kit reads {FORMAT}",
            code="checkpoint.format",
            path=path,
            found=metadata.get("format"),
            allowed=FORMAT,
        )
    return metadata


def read_config(path: Path) -> ESM2Config:
    """The shape of the model a checkpoint holds, no tensor read; raises as `read_checkpoint`."""
    config = ESM2Config(**read_metadata(path)["model"])
    check_file_size(config, [path])
    return config


def read(path: Path) -> tuple[ESM2Config, dict[str, Tensor]]:
    """Read the model a checkpoint holds.

    Returns:
        The model's shape, and its tensors under fair-esm's names.

    Raises:
        InputError: as `read_checkpoint`, or the file holds adapters alone.
    """
    config, (tensors, _) = read_config(path), read_checkpoint(path, prefix="model.")
    if not tensors:
        raise InputError(
            f"{path}: holds adapters and no encoder; fine-tune with --merge true for one that does",
            code="checkpoint.adapters-only",
            path=path,
        )
    return config, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def check_file_size(config: ESM2Config, files: Sequence[Path]) -> None:
    """Hold a configuration to its files' bytes, before a model of a billion layers is built to find none of them there.

    Raises: InputError for over a thousand parameters a byte; a file that was cut short has a line of its own.
    """
    held = sum(Path(file).stat().st_size for file in files)
    if config.num_parameters > 1000 * held:
        raise InputError(
            f"{files[0]}: {held:,} bytes do not hold the {config.num_parameters:,} parameters of its configuration; "
            "fetch it again",
            code="checkpoint.too-small",
            path=files[0],
            found=held,
        )


def load_tensors(model: ESM2, state: dict[str, Tensor], source: Path | str) -> None:
    """Put fair-esm-named tensors into a model as they are; names and shapes must be exactly the model's.

    Raises: InputError naming the first tensor that is missing, unknown or of another shape.
    """
    what = f"this model ({model.config.num_layers} layers, embed_dim {model.config.embed_dim})"
    check_tensor_shapes(model.state_dict(), state, source, what, "Choose the model size of the checkpoint.")
    model.load_state_dict(state, assign=model.embed_tokens.weight.is_meta)
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


def _compute_digest(tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 over the metadata and every tensor's name, type, shape and bytes."""
    seal = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        _update_digest(seal, name, tensors[name])
    return seal.hexdigest()


def _update_digest(seal: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    seal.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    seal.update(_to_bytes(tensor))


def _to_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()

"""A checkpoint is one safetensors file: tensors by name, everything else as JSON in its header, a digest over both.

Nothing in it is code, nothing is unpickled. `model.*` are fair-esm's names, `optimizer.*` what resuming needs.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esm2kit.errors import InputError
from esm2kit.model import ESM2, ESM2Config
from esm2kit.provenance import atomic_path, to_json

FORMAT = 1
TIED = {"model.lm_head.weight": "model.embed_tokens.weight"}


def write_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file; a checkpoint already there is replaced in one step.
        tensors: by name; the LM head's matrix may be among them and is kept once, as the embedding it is.
        metadata: JSON-able; `model` holds the ESM2Config's fields.
    Raises: OSError if the disk does not take it; what was there before stays.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in TIED}
    metadata = to_json({"format": FORMAT} | metadata)
    metadata["sha256"] = digest(kept, metadata)
    with atomic_path(path) as part:
        try:
            save_file(kept, part, {"esm2kit": json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # safetensors makes its file for the owner alone; a checkpoint is read by whom the folder lets in
        part.chmod(0o666 & ~_umask())


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
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise InputError(f"{path}: the checkpoint's bytes do not match its own sha256; it is damaged, take another")
    tensors |= {name: tensors[source] for name, source in TIED.items() if source in tensors}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, without reading its tensors or checking its digest; raises as `read_checkpoint`."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; `esm2kit pretrain` makes one")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); take another checkpoint") from error
    try:
        metadata = json.loads(header["esm2kit"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: a safetensors file, but not an esm2kit checkpoint: its header lacks ours") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: checkpoint format {metadata.get('format')}, this esm2kit reads {FORMAT}")
    return metadata


def load_esm2(path: Path) -> tuple[ESM2, dict[str, Any]]:
    """The model a checkpoint holds, on the CPU, in evaluation mode, with the checkpoint's metadata."""
    tensors, metadata = read_checkpoint(path, prefix="model.")
    if not tensors:
        raise InputError(f"{path}: holds adapters and no encoder; fine-tune with --merge true for one that does")
    with torch.device("meta"):
        model = ESM2(ESM2Config(**metadata["model"]))
    fill(model, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path)
    return model.eval(), metadata


def fill(model: ESM2, state: dict[str, Tensor], source: Path | str) -> None:
    """Put fair-esm-named tensors into a model as they are; names and shapes must be exactly the model's.

    Raises: InputError naming the first tensor that is missing, unknown or of another shape.
    """
    what = f"this model of {model.config.num_layers} layers x {model.config.embed_dim}"
    refuse_other_shapes(model.state_dict(), state, source, f"{what} wants", "give the checkpoint's own size")
    model.load_state_dict(state, assign=model.embed_tokens.weight.is_meta)
    model.lm_head.weight = model.embed_tokens.weight


def refuse_other_shapes(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path | str, what: str, remedy: str
) -> None:
    """Hold tensors to the names and shapes that are wanted of them.

    Args:
        expected: by name; only the shapes are read.
        found: by name.
        source: where they were found, for the message.
        what: who wants them, with its verb.
        remedy: what to do.
    Raises: InputError naming the first tensor that is missing, unknown or of another shape, with both shapes.
    """
    wanted, given = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (expected, found))
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise InputError(
            f"{source}: tensor {name} is {given.get(name, 'absent')}, {what} {wanted.get(name, 'none of that name')}; "
            f"{remedy}"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 over the metadata and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()

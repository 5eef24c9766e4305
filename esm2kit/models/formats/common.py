"""What every foreign weight format shares: safe readers, missing tensors, and building a model from a state dict."""

import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import fill
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, RotaryEmbedding
from esm2kit.models.formats.shards import refuse_packed

State = dict[str, Tensor]
CONTACT_HEAD = "contact_head.regression."


def defaults(config: ESM2Config) -> tuple[State, Tensor]:
    """What files may leave out: a contact head of zeros, by its tensors' names, and a layer's rotary frequencies."""
    inputs = config.num_layers * config.attention_heads
    head = {f"{CONTACT_HEAD}weight": torch.zeros(1, inputs), f"{CONTACT_HEAD}bias": torch.zeros(1)}
    return head, RotaryEmbedding(config.head_dim).inv_freq


def read_safetensors(path: Path) -> State:
    """A safetensors file's tensors. Raises: InputError if it is cut short or none."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """A file made by torch.save, read with the weights-only unpickler: tensors and argparse.Namespace, no code, ever.

    Raises: InputError if it holds anything else, or is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct the path")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a whole file of torch.save; fetch it again")
    try:
        with open(path, "rb") as opened:
            refuse_packed(opened, path.stat().st_size)
        with torch.serialization.safe_globals([Namespace]):
            # mapped, not read: of what nobody changes, the ranks of a node share one copy
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|Unsupported class|type) ([\w.]+\.\w+)", str(error))
        what = f"names {named[1]}, which is code" if named else "holds more than tensors"
        raise InputError(
            f"{path}: refused, it {what}; esm2kit loads weights only, take the publisher's own file"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path}: not a whole file of torch.save ({reason}); fetch it again") from None


def _plain(found: Any, source: Path) -> State:
    """What a file gave, if it is plain tensors by name. Raises: InputError naming what else it is."""
    if not isinstance(found, dict):
        raise InputError(f"{source}: holds {type(found).__name__} where tensors by name should be; fetch it again")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"{source}: {name!r:.80} is no plain tensor; take the publisher's own file")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # by a stride of 0
            raise InputError(f"{source}: {name!r:.80} is more than its bytes hold; take the publisher's own file")
    return {str(name): tensor for name, tensor in found.items()}


def build(config: ESM2Config, state: State, source: Path | str) -> ESM2:
    """A model in evaluation mode around tensors under fair-esm's names, in float32."""
    with torch.device("meta"):
        model = ESM2(config)
    shared: dict[int, Tensor] = {}
    fill(model, {name: _float32(tensor, shared) for name, tensor in state.items()}, source)
    return model.eval()


def _float32(tensor: Tensor, shared: dict[int, Tensor]) -> Tensor:
    """The same float32 tensor for the same tensor: tied ones stay tied."""
    return shared.setdefault(id(tensor), tensor.float().contiguous())

"""An ESM-2 out of a distributed checkpoint, as FSDP, tensor parallel and 2-D runs of any trainer save it."""

from collections.abc import Mapping
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.common import CONTACT_HEAD, build, defaults
from esm2kit.models.formats.shards import open_shards

EMBEDDING = "embed_tokens.weight"
OWN_PARTS = ("embed_tokens.", "layers.", "emb_layer_norm_after.", "lm_head.", CONTACT_HEAD)


def load_distributed(folder: Path) -> ESM2:
    """The ESM-2 in a distributed checkpoint: a folder of torch.distributed.checkpoint, as Lightning's FSDP and
    ModelParallelStrategy save, or one of safetensors shards that say where they lie.

    Tensors have fair-esm's names behind any prefix, optimizers are left alone, and the shape follows from the tensors.
    Raises: InputError if it is damaged, holds code, or is not one ESM-2.
    """
    shards = open_shards(Path(folder))
    prefixes = [name.removesuffix(EMBEDDING) for name in shards.shapes if name.endswith(EMBEDDING)]
    prefixes = [prefix for prefix in prefixes if "optim" not in prefix]
    if len(prefixes) != 1:
        raise InputError(
            f"{folder}: {len(prefixes)} tensors are called {EMBEDDING}, an ESM-2's checkpoint has one; a folder of "
            "Hugging Face's names needs its config.json"
        )
    names = {
        name.removeprefix(prefixes[0]): name
        for name in shards.shapes
        if name.startswith(prefixes[0]) and name.removeprefix(prefixes[0]).startswith(OWN_PARTS)
    }
    config = _shape_of({own: shards.shapes[name] for own, name in names.items()}, folder)
    state = {own: shards.read(name) for own, name in names.items()}
    contact_head, inv_freq_P = defaults(config)
    for layer in range(config.num_layers):
        state.setdefault(f"layers.{layer}.self_attn.rot_emb.inv_freq", inv_freq_P)
    state.setdefault("lm_head.weight", state[EMBEDDING])
    return build(config, contact_head | state, folder)


def _shape_of(shapes: Mapping[str, tuple[int, ...]], source: Path) -> ESM2Config:
    """An ESM-2's shape from its tensors': the heads from a layer's rotary frequencies, or from the contact head."""
    num_layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(shapes[EMBEDDING]) != 2:
        raise InputError(f"{source}: {EMBEDDING} is {shapes[EMBEDDING]}, ESM-2 has (tokens, embed_dim); not an ESM-2")
    embed_dim = shapes[EMBEDDING][1]
    frequencies, head = shapes.get("layers.0.self_attn.rot_emb.inv_freq"), shapes.get(f"{CONTACT_HEAD}weight")
    heads = 0
    if frequencies and frequencies[0]:
        heads = embed_dim // (2 * frequencies[0])
    elif head and num_layers:
        heads = head[-1] // num_layers
    if not heads or not num_layers:
        raise InputError(
            f"{source}: neither rotary frequencies nor a contact head tell how many heads a layer has; save the whole "
            "state_dict"
        )
    return ESM2Config(num_layers, embed_dim, heads)

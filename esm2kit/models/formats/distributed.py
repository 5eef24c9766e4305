"""An ESM-2 out of a distributed checkpoint, as FSDP, tensor parallel and 2-D runs of any trainer save it."""

from collections.abc import Mapping
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.models.config import ESM2Config
from esm2kit.models.formats.fair_esm import CONTACT_HEAD, add_missing_tensors
from esm2kit.models.formats.readers import State
from esm2kit.models.formats.shards import METADATA, Shards, open_shards, shard_files

EMBEDDING = "embed_tokens.weight"
MODEL_PARTS = ("embed_tokens.", "layers.", "emb_layer_norm_after.", "lm_head.", CONTACT_HEAD)


def list_files(folder: Path) -> list[Path]:
    """The files a model's digest is taken of."""
    return [*filter(Path.is_file, [folder / METADATA]), *shard_files(folder)]


def read_config(folder: Path) -> ESM2Config:
    """The shape of the ESM-2 in a distributed checkpoint, no tensor read; raises as `read`."""
    return _open(folder)[0]


def read(folder: Path) -> tuple[ESM2Config, State]:
    """Read a folder of torch.distributed.checkpoint, as Lightning's FSDP and ModelParallelStrategy save.

    It may be one of safetensors shards too that say where they lie. Tensors have fair-esm's names behind any prefix,
    optimizers are left alone, and the shape follows from the tensors.

    Returns:
        The model's shape, and its tensors under fair-esm's names.

    Raises:
        InputError: the checkpoint is damaged, holds code, or is not one ESM-2.
    """
    config, shards, names = _open(folder)
    return config, add_missing_tensors(config, {own: shards.read(name) for own, name in names.items()})


def _open(folder: Path) -> tuple[ESM2Config, Shards, dict[str, str]]:
    """The shape, the shards, and fair-esm's name -> the checkpoint's name of each of the model's tensors."""
    shards = open_shards(folder)
    prefixes = [name.removesuffix(EMBEDDING) for name in shards.shapes if name.endswith(EMBEDDING)]
    prefixes = [prefix for prefix in prefixes if "optim" not in prefix]
    if len(prefixes) != 1:
        raise InputError(
            f"{folder}: {len(prefixes)} tensors are called {EMBEDDING}, an ESM-2's checkpoint has one; a folder of "
            "Hugging Face's names needs its config.json",
            code="checkpoint.not-esm2",
            path=folder,
            name=EMBEDDING,
            found=len(prefixes),
        )
    names = {
        name.removeprefix(prefixes[0]): name
        for name in shards.shapes
        if name.startswith(prefixes[0]) and name.removeprefix(prefixes[0]).startswith(MODEL_PARTS)
    }
    return _infer_config({own: shards.shapes[name] for own, name in names.items()}, folder), shards, names


def _infer_config(shapes: Mapping[str, tuple[int, ...]], source: Path) -> ESM2Config:
    """An ESM-2's shape from its tensors': the heads from a layer's rotary frequencies, or from the contact head."""
    num_layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(shapes[EMBEDDING]) != 2:
        raise InputError(
            f"{source}: {EMBEDDING} is {shapes[EMBEDDING]}, ESM-2 has (tokens, embed_dim); not an ESM-2",
            code="checkpoint.not-esm2",
            path=source,
            name=EMBEDDING,
            found=shapes[EMBEDDING],
        )
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
            "state_dict",
            code="checkpoint.heads",
            path=source,
        )
    return ESM2Config(num_layers, embed_dim, heads)

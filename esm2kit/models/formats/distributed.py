"""Read an ESM-2 from a distributed checkpoint, as FSDP, tensor-parallel and 2-D runs of any trainer save it."""

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
    """Return the files that the model's digest covers."""
    return [*filter(Path.is_file, [folder / METADATA]), *shard_files(folder)]


def read_config(folder: Path) -> ESM2Config:
    """Infer the configuration from the tensors' shapes without reading them; raises as `read`."""
    return _open(folder)[0]


def read(folder: Path) -> tuple[ESM2Config, State]:
    """Read a folder of torch.distributed.checkpoint, as Lightning's FSDP and ModelParallelStrategy save it.

    Folders of safetensors shards with offsets are read too. Tensors must have fair-esm's names after any common
    prefix. Optimizer states are ignored.

    Args:
        folder: the checkpoint.

    Returns:
        The model's configuration, inferred from the tensors' shapes, and its tensors under fair-esm's names.

    Raises:
        InputError: the checkpoint is damaged, contains code, or does not contain exactly one ESM-2.
    """
    config, shards, names = _open(folder)
    return config, add_missing_tensors(config, {fair_name: shards.read(name) for fair_name, name in names.items()})


def _open(folder: Path) -> tuple[ESM2Config, Shards, dict[str, str]]:
    """Return the configuration, the shards, and the checkpoint's name of each tensor by its fair-esm name."""
    shards = open_shards(folder)
    prefixes = [name.removesuffix(EMBEDDING) for name in shards.shapes if name.endswith(EMBEDDING)]
    prefixes = [prefix for prefix in prefixes if "optim" not in prefix]
    if len(prefixes) != 1:
        raise InputError(
            f"{folder}: expected one tensor {EMBEDDING}, found {len(prefixes)}; this is not the checkpoint of one "
            "ESM-2. A folder with Hugging Face's tensor names requires its config.json.",
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
    return _infer_config({fair_name: shards.shapes[name] for fair_name, name in names.items()}, folder), shards, names


def _infer_config(shapes: Mapping[str, tuple[int, ...]], source: Path) -> ESM2Config:
    """Infer the configuration from tensor shapes; attention heads from rotary frequencies or the contact head."""
    num_layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(shapes[EMBEDDING]) != 2:
        raise InputError(
            f"{source}: this is not an ESM-2: {EMBEDDING} has shape {shapes[EMBEDDING]}, expected (tokens, embed_dim).",
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
            f"{source}: the number of attention heads is unknown, because rotary frequencies and contact head are both "
            "missing. Save the complete state_dict.",
            code="checkpoint.heads",
            path=source,
        )
    return ESM2Config(num_layers, embed_dim, heads)

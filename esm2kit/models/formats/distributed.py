"""Read an ESM-2 from a distributed checkpoint, as FSDP, tensor-parallel and 2-D runs of any trainer save it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.models.config import ESM2Config
from esm2kit.models.formats.fair_esm import CONTACT_HEAD, EMBEDDING, add_missing_tensors, infer_config
from esm2kit.models.formats.readers import State
from esm2kit.models.formats.shards import METADATA, Shards, open_shards, shard_files

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


def open_tensors(folder: Path) -> tuple[ESM2Config, Callable[[Iterable[str]], State]]:
    """Open a folder as for `read`, to read its tensors when they are used; see `checkpoint.open_tensors`."""
    config, shards, names = _open(folder)
    defaults = add_missing_tensors(config, {})

    def read_names(wanted: Iterable[str]) -> State:
        sources = {name: EMBEDDING if name == "lm_head.weight" and name not in names else name for name in wanted}
        found = {name: shards.read(names[source]) for name, source in sources.items() if source in names}
        return {name: defaults[name] for name in sources if name in defaults} | found

    return config, read_names


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
    return infer_config({fair_name: shards.shapes[name] for fair_name, name in names.items()}, folder), shards, names

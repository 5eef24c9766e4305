"""Any ESM-2 by one call: an official name, a fair-esm .pt, a Hugging Face folder or repository, a checkpoint of ours or
a distributed one.

No code is ever unpickled: .pt, .bin and .distcp go through torch's weights-only reader, a distributed checkpoint's
`.metadata` through one that makes inert records; everything else is safetensors.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from esm2kit.core.errors import InputError, nearest
from esm2kit.models.checkpoint import load_esm2, read_metadata
from esm2kit.models.config import SIZES
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.distributed import load_distributed
from esm2kit.models.formats.fair_esm import load_fair_esm
from esm2kit.models.formats.huggingface import load_hf
from esm2kit.models.formats.shards import METADATA, is_distributed, shard_files, weight_files
from esm2kit.models.hub import OFFICIAL, _digest_of, fetch

logger = logging.getLogger(__name__)


def load_model(model: str | Path, untrained_seed: int | None = None) -> tuple[ESM2, dict[str, Any]]:
    """An ESM-2 in evaluation mode on the CPU, in float32, and where it came from.

    Args:
        model: an official name (`esm2_t6_8M_UR50D`), a hub repository (`owner/name`, `owner/name@revision`), a
            fair-esm .pt, a Hugging Face folder (whole or sharded), a checkpoint of `esm2kit pretrain`, its run's folder
            (the best), or a folder of torch.distributed.checkpoint.
        untrained_seed: the same architecture with fresh weights from this seed instead: the baseline that tells what
            the training is worth. For an official name nothing is fetched then.
    Returns: the model, and {"name", "source", "format", "sha256"} (with untrained_seed, "untrained_seed" too).
    Raises: InputError in one line for whatever cannot be loaded, and what to do.
    """
    text = str(model)
    if untrained_seed is not None and text in SIZES and not Path(text).exists():
        fresh = ESM2.initialised(SIZES[text], untrained_seed).eval()
        return fresh, _untrained({"name": text, "source": text, "format": "size"}, untrained_seed)
    loaded, source = _load(Path(model)) if Path(model).exists() else _load_named(text)
    if untrained_seed is not None:
        return ESM2.initialised(loaded.config, untrained_seed).eval(), _untrained(source, untrained_seed)
    return loaded, source


def _untrained(source: dict[str, Any], seed: int) -> dict[str, Any]:
    return source | {"name": f"{source['name']}_untrained", "untrained_seed": seed, "sha256": f"untrained-{seed}"}


def _load(path: Path) -> tuple[ESM2, dict[str, Any]]:
    """By what the path holds."""
    if path.is_dir():
        if (path / "config.json").is_file():
            loaded, digests = _beside(lambda: [_digest_of(file) for file in weight_files(path)], lambda: load_hf(path))
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
            return loaded, {"name": path.name, "source": str(path), "format": "huggingface", "sha256": digest}
        if is_distributed(path):
            files = [*filter(Path.is_file, [path / METADATA]), *shard_files(path)]
            loaded, digests = _beside(lambda: [_digest_of(file) for file in files], lambda: load_distributed(path))
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
            return loaded, {"name": path.name, "source": str(path), "format": "distributed", "sha256": digest}
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return _load(found[0])
        if (checkpoint := _of_run(path)) and (not found or path.name == "checkpoints"):
            return _load(checkpoint)
        raise InputError(f"{path}: no config.json and {len(found)} .safetensors files in it; name one checkpoint file")
    if path.suffix in (".pt", ".pth"):
        loaded, digest = _beside(lambda: _digest_of(path), lambda: load_fair_esm(path))
        return loaded, {"name": path.stem, "source": str(path), "format": "fair-esm", "sha256": digest}
    metadata = read_metadata(path)
    loaded, _ = load_esm2(path)
    name = path.stem
    if path.parent.name == "checkpoints":  # of a run: its folder and update say more than best or last
        name = f"{path.absolute().parent.parent.name}_step{metadata['step']}"
    return loaded, {"name": name, "source": str(path), "format": "esm2kit", "sha256": metadata["sha256"]}


def _of_run(folder: Path) -> Path | None:
    """The checkpoint that a pretraining run's folder, wherever it is now, stands for: its best, else its last."""
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    names = ["last.safetensors"]
    with suppress(OSError, ValueError, KeyError, TypeError):  # a run that has not ended has not said which is its best
        names.insert(0, Path(json.loads((checkpoints.parent / "pretrain.json").read_text())["best"]).name)
    return next((path for name in names if (path := checkpoints / name).is_file()), None)


def _beside(digest: Callable[[], Any], load: Callable[[], ESM2]) -> tuple[ESM2, Any]:
    """What `load` and `digest` give, the digest taken by a thread while the tensors are read."""
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(digest)
        return load(), taken.result()


def _load_named(name: str) -> tuple[ESM2, dict[str, Any]]:
    _refuse_missing_path(name)
    if name not in OFFICIAL and (
        name.count("/") != 1 or name.startswith((".", "/")) or name.endswith((".pt", ".safetensors"))
    ):
        raise InputError(f"model {name!r} is no file, folder or published name; {nearest(name, OFFICIAL)}")
    folder, revision = fetch(name)
    loaded, source = _load(folder)
    return loaded, source | {"name": name.split("@")[0].split("/")[-1], "source": f"hub:{name}@{revision}"}


def _refuse_missing_path(name: str) -> None:
    """Raise for what begins with a folder that is there: a path that is wrong, not a name on the hub."""
    folder = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if folder is None or "@" in name or name in (official.repo for official in OFFICIAL.values()):
        return
    held = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if held[8:] else "")
    hub = f", or write {name}@main for the hub's" if name.count("/") == 1 and name[0] != "." else ""
    raise InputError(f"model {name!r} is not there: {folder} holds {shown or 'nothing'}; correct the path{hub}")

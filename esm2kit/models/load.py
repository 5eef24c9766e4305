"""Any ESM-2 by one call: an official name, a fair-esm .pt, a Hugging Face folder or repository, a checkpoint of ours or
a distributed one.

No code is ever unpickled: .pt, .bin and .distcp go through torch's weights-only reader, a distributed checkpoint's
`.metadata` through one that makes inert records; everything else is safetensors.
"""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.errors import InputError, suggest_name
from esm2kit.models import checkpoint
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats import distributed, fair_esm, huggingface
from esm2kit.models.formats.shards import is_distributed
from esm2kit.models.hub import OFFICIAL_MODELS, Download, compute_digest, fetch, read_declared_digest

logger = logging.getLogger(__name__)
# Each has read(path) -> (config, tensors under fair-esm's names) and read_config(path), which reads no tensor.
FORMATS = {"huggingface": huggingface, "distributed": distributed, "fair-esm": fair_esm, "esm2kit": checkpoint}


@dataclass(frozen=True)
class ModelFile:
    """A model that has been found; its shape and digest are looked up when asked for, its tensors read by `load`.

    Args:
        name: short, for reports.
        source: where it came from: a path, an official name, or hub:owner/name@commit.
        format: a key of FORMATS, or "size" for an architecture without weights.
        path: the file or folder; None for a size.
        untrained_seed: fresh weights of this seed in place of the file's.
        download: the hub's files, whose digests are checked before they are read.
    """

    name: str
    source: str
    format: str
    path: Path | None = None
    untrained_seed: int | None = None
    download: Download | None = None

    @cached_property
    def config(self) -> ESM2Config:
        """The shape, without reading a tensor."""
        return FORMATS[self.format].read_config(self.path) if self.path else SIZES[self.source]

    @cached_property
    def sha256(self) -> str:
        """What tells these weights from others.

        A checkpoint of ours and the hub's files declare their digest; of other formats every byte is read once.
        """
        return self._digest()

    def _digest(self) -> str:
        if self.untrained_seed is not None:
            # the shape too: the same seed gives other weights in another architecture
            shape = json.dumps(asdict(self.config), sort_keys=True)
            return f"untrained-{self.untrained_seed}-{hashlib.sha256(shape.encode()).hexdigest()[:12]}"
        if self.format == "esm2kit":
            return checkpoint.read_metadata(self.path).get("sha256", "")  # reading refuses a file without one
        files = FORMATS[self.format].list_files(self.path)
        digests = [(self.download and read_declared_digest(file)) or compute_digest(file) for file in files]
        return digests[0] if self.format == "fair-esm" else hashlib.sha256("".join(digests).encode()).hexdigest()

    def load(self) -> ESM2:
        """The model in evaluation mode on the CPU, in float32; raises as `load_model`."""
        if self.untrained_seed is not None:
            return ESM2.initialised(self.config, self.untrained_seed).eval()
        if self.download:
            self.download.check()
        with ThreadPoolExecutor(1) as pool:  # the digest is taken while the tensors are read
            digest = pool.submit(lambda: self.sha256)
            config, state = FORMATS[self.format].read(self.path)
            known = digest.result()
        if self._digest() != known:  # a training run saves under the same name; hashes of unchanged files are kept
            raise InputError(
                f"{self.path} changed while it was being read; run it again", code="model.changed", path=str(self.path)
            )
        return build_model(config, state, self.path)

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        found = {"name": self.name, "source": self.source, "format": self.format, "sha256": self.sha256}
        return found if self.untrained_seed is None else found | {"untrained_seed": self.untrained_seed}


def load_model(model: str | Path, untrained_seed: int | None = None) -> tuple[ESM2, ModelFile]:
    """Load an ESM-2 in evaluation mode on the CPU, in float32.

    Args:
        model: an official name (`esm2_t6_8M_UR50D`), a hub repository (`owner/name`, `owner/name@revision`), a
            fair-esm .pt, a Hugging Face folder (whole or sharded), a checkpoint of `esm2kit pretrain`, its run's folder
            (the best), or a folder of torch.distributed.checkpoint.
        untrained_seed: the same architecture with fresh weights from this seed instead: the baseline that shows what
            the training is worth. For an official name nothing is fetched then.

    Returns:
        The model, and where it came from.

    Raises:
        InputError: the model cannot be loaded; one line, with what to do.
    """
    found = find_model(model, untrained_seed)
    return found.load(), found


def find_model(model: str | Path, untrained_seed: int | None = None) -> ModelFile:
    """Find a model without reading its tensors; from a hub its files are fetched if the cache lacks them.

    Args:
        model: as `load_model`.
        untrained_seed: as `load_model`.

    Raises:
        InputError: there is no such model.
    """
    text = str(model)
    if untrained_seed is not None and text in SIZES and not Path(text).exists():
        found = ModelFile(text, text, "size")
    else:
        found = _find_path(Path(model)) if Path(model).exists() else _find_published(text)
    if untrained_seed is None:
        return found
    return replace(found, name=f"{found.name}_untrained", untrained_seed=untrained_seed)


def build_model(config: ESM2Config, state: dict[str, Tensor], source: Path | str) -> ESM2:
    """Make a model in evaluation mode around tensors under fair-esm's names, in float32.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = ESM2(config)
    shared: dict[int, Tensor] = {}  # the same float32 tensor for the same tensor: tied ones stay tied
    wide = {name: shared.setdefault(id(tensor), tensor.float().contiguous()) for name, tensor in state.items()}
    checkpoint.load_tensors(model, wide, source)
    return model.eval()


def _find_path(path: Path) -> ModelFile:
    """By what the path holds."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelFile(path.name, str(path), "huggingface", path)
        if is_distributed(path):
            return ModelFile(path.name, str(path), "distributed", path)
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return _find_path(found[0])
        if (best := _find_run_checkpoint(path)) and (not found or path.name == "checkpoints"):
            return _find_path(best)
        raise InputError(
            f"{path}: no config.json and {len(found)} .safetensors files in it; name one checkpoint file",
            code="model.ambiguous",
            path=path,
            found=len(found),
        )
    if path.suffix in (".pt", ".pth"):
        return ModelFile(path.stem, str(path), "fair-esm", path)
    metadata, name = checkpoint.read_metadata(path), path.stem
    if path.parent.name == "checkpoints":  # of a run: its folder and update say more than best or last
        name = f"{path.absolute().parent.parent.name}_step{metadata['step']}"
    return ModelFile(name, str(path), "esm2kit", path)


def _find_run_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a pretraining run's folder, wherever it is now, stands for: its best, else its last."""
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    names = ["last.safetensors"]
    summary = checkpoints.parent / "pretrain.json"
    if summary.is_file():  # a run that has not ended has not recorded which checkpoint is its best
        remedy = f"remove it to use {names[0]}, or pass a checkpoint file"
        names.insert(0, Path(read_sealed_json(summary, remedy)["best"]).name)
    return next((path for name in names if (path := checkpoints / name).is_file()), None)


def _find_published(name: str) -> ModelFile:
    _check_missing_path(name)
    if name not in OFFICIAL_MODELS and (
        name.count("/") != 1 or name.startswith((".", "/")) or name.endswith((".pt", ".safetensors"))
    ):
        raise InputError(
            f"model {name!r} is no file, folder or published name; {suggest_name(name, OFFICIAL_MODELS)}",
            code="model.unknown",
            name=name,
        )
    download = fetch(name)
    short, source = name.split("@")[0].split("/")[-1], f"hub:{name}@{download.revision}"
    return replace(_find_path(download.folder), name=short, source=source, download=download)


def _check_missing_path(name: str) -> None:
    """Raise for what begins with a folder that is there: a path that is wrong, not a name on the hub."""
    folder = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if folder is None or "@" in name or name in (official.repo for official in OFFICIAL_MODELS.values()):
        return
    held = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if held[8:] else "")
    hub = f", or write {name}@main for the hub's" if name.count("/") == 1 and name[0] != "." else ""
    raise InputError(
        f"model {name!r} is not there: {folder} holds {shown or 'nothing'}; correct the path{hub}",
        code="model.absent",
        name=name,
    )

"""Load an ESM-2 from any supported source.

Sources are official names, fair-esm .pt files, Hugging Face folders and repositories, esm2kit checkpoints, and
distributed checkpoints.

No code is ever unpickled. torch's weights-only reader reads .pt, .bin and .distcp files, and a restricted unpickler
reads a distributed checkpoint's `.metadata`. All other files are safetensors.
"""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.paths import expand_path
from esm2kit.models import checkpoint
from esm2kit.models.config import SIZES, ESM2Config, check_model_name, complete_model_name
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats import distributed, fair_esm, huggingface
from esm2kit.models.formats.readers import ADAPTER_CONFIG, raise_adapter
from esm2kit.models.formats.shards import is_distributed
from esm2kit.models.hub import Download, compute_digest, fetch, read_declared_digest
from esm2kit.models.initialise import SampledTensors
from esm2kit.models.weights import Weights, check_finite

logger = logging.getLogger(__name__)
# Each module defines list_files(path), read_config(path), read(path) -> (config, tensors under fair-esm's names), and
# open_tensors(path) -> (config, a function that reads tensors by name).
FORMATS = {"huggingface": huggingface, "distributed": distributed, "fair-esm": fair_esm, "esm2kit": checkpoint}

SHAPE_FIELDS = ("num_layers", "embed_dim", "attention_heads", "token_dropout")


@dataclass(frozen=True)
class ModelFile:
    """A model's file or folder; configuration and digest are read on demand, and tensors by `load`.

    Args:
        name: short name, for reports.
        source: a path, an official name, or hub:owner/name@commit.
        format: a key of FORMATS, or "size" for an architecture without weights.
        path: the file or folder; None for a size.
        untrained_seed: use random weights of this seed instead of the file's.
        download: the files from the hub, whose digests are checked before they are read.
    """

    name: str
    source: str
    format: str
    path: Path | None = None
    untrained_seed: int | None = None
    download: Download | None = None

    @cached_property
    def config(self) -> ESM2Config:
        """The model's configuration; reads no tensor."""
        if self.path is None:
            return SIZES[self.source]
        if self.untrained_seed is not None and self.format == "huggingface":
            return huggingface.read_untrained_config(self.path)
        return FORMATS[self.format].read_config(self.path)

    @cached_property
    def sha256(self) -> str:
        """Digest that identifies the weights.

        esm2kit checkpoints and files from the hub declare it. For other formats it is computed from the files.
        """
        return self._compute_digest()

    def _compute_digest(self) -> str:
        if self.untrained_seed is not None:
            # include the architecture: the same seed gives different weights for another one
            shape = {name: getattr(self.config, name) for name in SHAPE_FIELDS} | self._unusual_settings()
            shape = json.dumps(shape, sort_keys=True)
            return f"untrained-{self.untrained_seed}-{hashlib.sha256(shape.encode()).hexdigest()[:12]}"
        if self.format == "esm2kit":
            return checkpoint.read_metadata(self.path).get("sha256", "")  # read_checkpoint rejects a file without one
        files = FORMATS[self.format].list_files(self.path)
        digests = [(self.download and read_declared_digest(file)) or compute_digest(file) for file in files]
        if self.format == "huggingface":  # config.json may change the numbers of the same tensors
            digests += [f"{name}={value}" for name, value in self._unusual_settings().items()]
        return digests[0] if self.format == "fair-esm" else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _unusual_settings(self) -> dict[str, Any]:
        """Return the settings that differ from those of every published ESM-2."""
        return {
            name: value
            for name, value in asdict(self.config).items()
            if value != getattr(ESM2Config, name) and name not in SHAPE_FIELDS[:3]
        }

    def open(self) -> Weights:
        """Open the model, to read its tensors when they are used.

        Returns:
            The weights, of which none are in memory yet.

        Raises:
            InputError: as `load`, except that the numbers of a tensor are checked when it is read.
        """
        if self.untrained_seed is not None:
            return Weights(self.config, SampledTensors(self.config, self.untrained_seed).read, self.source)
        if self.download:
            self.download.check()
        digest = self.sha256
        config, read = FORMATS[self.format].open_tensors(self.path)

        def check() -> None:
            if self._compute_digest() != digest:  # unchanged files are not read again
                self._raise_changed()

        check()
        return Weights(config, read, self.path, check)

    def _raise_changed(self) -> NoReturn:
        raise InputError(
            f"{self.path} changed while it was read. Rerun the command.", code="model.changed", path=str(self.path)
        )

    def load(self) -> ESM2:
        """Load the model.

        Returns:
            The model in evaluation mode, on the CPU, in float32.

        Raises:
            InputError: the files are damaged, are not an ESM-2, or changed while they were read.
        """
        if self.untrained_seed is not None:
            return ESM2.initialised(self.config, self.untrained_seed).eval()
        if self.download:
            self.download.check()
        with ThreadPoolExecutor(1) as pool:  # compute the digest while the tensors are read
            future = pool.submit(lambda: self.sha256)
            config, state = FORMATS[self.format].read(self.path)
            digest = future.result()
        if (
            self._compute_digest() != digest
        ):  # a training run may overwrite the file; unchanged files are not read again
            self._raise_changed()
        return build_model(config, state, self.path)

    def record(self) -> dict[str, Any]:
        """Describe the model for a manifest.

        Returns:
            Values that JSON can hold: name, source, format, sha256 and, if set, untrained_seed.
        """
        found = {"name": self.name, "source": self.source, "format": self.format, "sha256": self.sha256}
        return found if self.untrained_seed is None else found | {"untrained_seed": self.untrained_seed}


def load_model(model: str | Path, untrained_seed: int | None = None) -> tuple[ESM2, ModelFile]:
    """Load an ESM-2 in evaluation mode on the CPU, in float32.

    Args:
        model: an official name (`esm2_t6_8M_UR50D`) or its short form (`8M`), a hub repository (`owner/name`,
            `owner/name@revision`), a fair-esm .pt, a Hugging Face folder (single file or shards), an esm2kit
            checkpoint, the folder of a pretraining run (its best checkpoint), or a folder of
            torch.distributed.checkpoint.
        untrained_seed: build the same architecture with random weights of this seed instead, as a baseline for the
            effect of training. Weights are not needed in this case: an official name is not downloaded, and of a
            Hugging Face folder or repository config.json is enough.

    Returns:
        The model, and the file or folder it was loaded from.

    Raises:
        InputError: the model does not exist or cannot be loaded.
    """
    found = find_model(model, untrained_seed)
    return found.load(), found


def find_model(model: str | Path, untrained_seed: int | None = None) -> ModelFile:
    """Find a model without reading its tensors; downloads files that the Hugging Face cache lacks.

    Args:
        model: as for `load_model`.
        untrained_seed: as for `load_model`.

    Returns:
        The model's file or folder.

    Raises:
        InputError: the model does not exist or cannot be downloaded.
    """
    if not isinstance(model, str | Path):
        check_type(model, str, "model", "pass a name or a path")
    if untrained_seed is not None:
        check_type(untrained_seed, Integral, "untrained_seed")
    text = complete_model_name(str(expand_path(model)))
    if untrained_seed is not None and text in SIZES and not Path(text).exists():
        found = ModelFile(text, text, "size")
    else:
        found = _find_path(Path(text)) if Path(text).exists() else _find_published(text, untrained_seed is None)
    if untrained_seed is None:
        return found
    return replace(found, name=f"{found.name}_untrained", untrained_seed=untrained_seed)


def build_model(config: ESM2Config, state: dict[str, Tensor], source: Path | str) -> ESM2:
    """Build a model from its tensors.

    Args:
        config: the architecture.
        state: fair-esm's name -> tensor.
        source: the file, for the message.

    Returns:
        The model in evaluation mode, in float32.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or has numbers that are not finite.
    """
    with torch.device("meta"):
        model = ESM2(config)
    shared: dict[int, Tensor] = {}  # converts each tensor once, so that tied tensors stay tied
    wide = {name: shared.setdefault(id(tensor), tensor.float().contiguous()) for name, tensor in state.items()}
    for name, tensor in wide.items():
        check_finite(name, tensor, source)
    checkpoint.load_tensors(model, wide, source)
    return model.eval()


def _find_path(path: Path) -> ModelFile:
    """Recognise the format of an existing file or folder."""
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            raise_adapter(path, ADAPTER_CONFIG)
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
            f"{path}: the folder has no config.json and {len(found)} .safetensors files. Pass one checkpoint file.",
            code="model.ambiguous",
            path=path,
            found=len(found),
        )
    in_folder = ("config.json", "model.safetensors", "pytorch_model.bin")
    if (path.parent / "config.json").is_file() and path.name in in_folder:
        return _find_path(path.parent)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return ModelFile(path.stem, str(path), "fair-esm", path)
    metadata, name = checkpoint.read_metadata(path), path.stem
    if path.parent.name == "checkpoints":  # the run's folder and step identify it better than "best" or "last"
        name = f"{path.absolute().parent.parent.name}_step{metadata['step']}"
    return ModelFile(name, str(path), "esm2kit", path)


def _find_run_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a pretraining run's folder, else the last; the folder may have been moved."""
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    names = ["last.safetensors"]
    summary = checkpoints.parent / "pretrain.json"
    if summary.is_file():  # only a finished run records its best checkpoint
        remedy = f"remove it to use {names[0]}, or pass a checkpoint file"
        names.insert(0, Path(read_sealed_json(summary, remedy)["best"]).name)
    return next((path for name in names if (path := checkpoints / name).is_file()), None)


def _find_published(name: str, weights: bool) -> ModelFile:
    """Download a model, or only its configuration, by its official name or repository."""
    check_model_name(name)
    download = fetch(name, weights)
    short, source = name.split("@")[0].split("/")[-1], f"hub:{name}@{download.revision}"
    return replace(_find_path(download.folder), name=short, source=source, download=download)

"""`esm2kit check`: read files of esm2kit completely and compare them with their checksums."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.errors import InputError
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.sequences.dataset import MANIFEST

logger = logging.getLogger(__name__)
MAX_SHOWN = 10
# Damage may hide what a file is; these names are those that esm2kit gives.
EMBEDDING_NAMES = ("_embeddings", "_hiddens", "_logits")
CHECKPOINT_NAMES = ("last.", "step=", "finetuned.")


@dataclass(frozen=True)
class CheckConfig:
    """Check files against their checksums: datasets, checkpoints, embeddings and reports with their predictions.

    Nothing is changed. Files of other programs have no checksum of esm2kit and are only counted.

    Args:
        path: File, or folder that is searched with its subfolders.
    """

    path: Path

    option_groups = OptionGroups(usual="path")

    def __post_init__(self) -> None:
        expand_paths(self)


def check(config: CheckConfig) -> str:
    """Check every file of esm2kit in a folder.

    Args:
        config: What to check.

    Returns:
        A summary in one line.

    Raises:
        InputError: the path does not exist, nothing in it has a checksum, or files are damaged; the message names the
            first ones.
    """
    root = Path(config.path)
    if not root.exists():
        raise InputError(f"{root} does not exist. Check the path.", code="check.absent", path=root)
    num_files = num_bytes = 0
    damaged: list[str] = []
    others: set[Path] = set()
    covered: set[Path] = set()  # by the manifest of a dataset
    for path in _list_files(root):
        checker = _find_checker(path)
        if checker is None:
            others.add(path)
            continue
        num_files, num_bytes = num_files + 1, num_bytes + path.stat().st_size
        try:
            result = checker(path)
            if isinstance(result, dict) and path.name == MANIFEST:
                covered |= {path.with_name(name) for name in result.get("files", ())}
            logger.info("%s: correct", path)
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        more = f" and {len(damaged) - MAX_SHOWN} more" if damaged[MAX_SHOWN:] else ""
        raise InputError(
            f"{len(damaged)} of {num_files} files are damaged: {'; '.join(damaged[:MAX_SHOWN])}{more}",
            code="check.damaged",
            path=root,
            damaged=damaged,
        )
    if not num_files:
        raise InputError(
            f"{root}: no file here has a checksum of esm2kit. Pass a dataset, a run, embeddings or a report.",
            code="check.nothing",
            path=root,
        )
    num_files += len(covered)
    num_bytes += sum(path.stat().st_size for path in covered)
    num_other = len(others - covered)
    other = f"; {num_other} other files have no checksum of their own" if num_other else ""
    return f"{num_files} files ({num_bytes / 1e6:,.1f} MB) agree with their checksums{other}"


def _list_files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    else:
        yield from sorted(path for path in root.rglob("*") if path.is_file())


def _find_checker(path: Path) -> Callable[[Path], object] | None:
    """Choose how to check a file by its name and first bytes; None for a file without a checksum."""
    from esm2kit.core.checksums import SEAL, read_npz, read_sealed_json
    from esm2kit.embedding.hdf5 import EmbeddingReader
    from esm2kit.embedding.seal import has_seal
    from esm2kit.models.checkpoint import read_checkpoint
    from esm2kit.sequences.dataset import check_dataset

    def check_embeddings(path: Path) -> None:
        with EmbeddingReader(path) as reader:
            reader.check()

    if path.suffix == ".h5":
        return check_embeddings if has_seal(path) or path.stem.endswith(EMBEDDING_NAMES) else None
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            is_known = path.name.startswith(CHECKPOINT_NAMES) or b'"esm2kit"' in file.read(1 << 20)
        return read_checkpoint if is_known else None
    if path.suffix == ".npz":
        return lambda path: read_npz(path, "create it again")
    if path.suffix != ".json":
        return None
    if path.name == MANIFEST and list(path.parent.glob("*.arrow")):
        return lambda path: check_dataset(path.parent)
    try:
        sealed = SEAL in json.loads(path.read_bytes())
    except (ValueError, RecursionError, TypeError):
        # nearly every JSON file that esm2kit writes has a checksum, so one that cannot be parsed may be one of them
        sealed = True
    return (lambda path: read_sealed_json(path, "create it again")) if sealed else None

"""`esm2kit check`: read files of esm2kit completely and compare them with their checksums."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.checksums import SEAL, FileChecksums, raise_damaged, read_sealed_json, read_sealed_manifest
from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.sequences.dataset import MANIFEST, REMEDY, check_dataset

logger = logging.getLogger(__name__)
MAX_SHOWN = 10
# Damage may hide what a file is; these names are those that esm2kit gives.
CONTACTS_REMEDY = "run `esm2kit contacts` again with --restart true"
EMBEDDING_NAMES = ("_embeddings", "_hiddens", "_logits")
CHECKPOINT_NAMES = ("last.", "step=", "finetuned.")
JSON_NAMES = ("report.json", "comparison.json", "plan.json", "pretrain.json", "finetune.json", MANIFEST)
NO_CHECKSUM = object()  # what a checker returns for a readable file without a checksum
BINARY_SUFFIXES = (".h5", ".hdf5", ".safetensors", ".npz", ".arrow")
DATASET_PARTS = ("train.arrow", "valid.arrow", "test.arrow", "cluster_offsets.npy")


@dataclass(frozen=True)
class CheckConfig:
    """Check files against their checksums: datasets, checkpoints, embeddings, scores, reports and their predictions.

    Nothing is changed. Files of other programs and of version 0.1.0 have no checksum of esm2kit and are only counted.
    Links are followed.

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
    if not os.path.lexists(root):
        raise InputError(f"{root} does not exist. Check the path.", code="check.absent", path=root)
    num_files = num_bytes = 0
    damaged: list[str] = []
    others: set[Path] = set()
    covered: set[Path] = set()  # by the manifest of a dataset
    for path in _list_files(root):
        checker = _find_checker(path, path == root)
        if checker is None:
            others.add(path)
            continue
        size = path.stat().st_size if path.exists() else 0
        try:
            result = checker(path)
            if result is NO_CHECKSUM:
                others.add(path)
                continue
            if isinstance(result, dict):
                listed = result.get("files", ()) if path.name == MANIFEST else result.get("checksums", ())
                covered |= {path.with_name(name) for name in listed}
            logger.info("%s: correct", path)
        except InputError as error:
            damaged.append(str(error))
        num_files, num_bytes = num_files + 1, num_bytes + size
    if damaged:
        more = f" and {len(damaged) - MAX_SHOWN} more" if damaged[MAX_SHOWN:] else ""
        raise InputError(
            f"{len(damaged)} of {format_count(num_files, 'file')} {'is' if len(damaged) == 1 else 'are'} damaged: "
            f"{'; '.join(damaged[:MAX_SHOWN])}{more}",
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
    without = f"{format_count(num_other, 'other file')} {'has' if num_other == 1 else 'have'}"
    other = f"; {without} no checksum of {'its' if num_other == 1 else 'their'} own" if num_other else ""
    agree = "agrees with its checksum" if num_files == 1 else "agree with their checksums"
    return f"{format_count(num_files, 'file')} ({num_bytes / 1e6:,.1f} MB) {agree}{other}"


def _list_files(root: Path) -> Iterator[Path]:
    """List the files of a folder and of folders that it links to, each folder once, and links without a target."""
    if not root.is_dir():
        yield root
        return
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if os.path.realpath(Path(folder) / name) not in seen)
        for path in sorted(Path(folder) / name for name in names):
            if path.is_file() or (path.is_symlink() and not path.exists()):
                yield path


def _find_checker(path: Path, is_root: bool) -> Callable[[Path], object] | None:
    """Choose how to check a file by its content and its name, as either may be damaged; None for other files."""
    if path.is_symlink() and not path.exists():
        return lambda path: raise_damaged(path, "it is a link to a file that does not exist", "restore that file")
    if not path.is_file():  # a pipe or a device
        return None
    manifest = path.with_name(MANIFEST)
    if path.name in DATASET_PARTS:
        is_dataset = path.with_name("cluster_offsets.npy").exists()
        if is_dataset and not manifest.exists() and path.name != "cluster_offsets.npy":
            return lambda path: raise_damaged(path, f"its {MANIFEST} is missing, so it is not finished", REMEDY)
    if is_root and path != manifest and manifest.is_file() and path.suffix in (".arrow", ".npy", ".json"):
        return _check_part_of_dataset
    listing = path.with_suffix(".json")
    if is_root and path != listing and listing.is_file() and path.name in _read_listed(listing):
        return lambda path: _read_listed(listing)[path.name].check(path, "create it again")
    return _find_content_checker(path)


def _read_listed(path: Path) -> dict[str, FileChecksums]:
    """Read the checksums of other files that a sealed JSON file lists; empty for any other JSON file."""
    try:
        listed = json.loads(path.read_bytes())["checksums"]
        return {name: FileChecksums(**checksums) for name, checksums in listed.items()}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def _check_part_of_dataset(path: Path) -> object:
    """Check one file of a dataset against the dataset's manifest."""
    recorded = read_sealed_json(path.with_name(MANIFEST), REMEDY).get("files", {})
    if path.name not in recorded:
        return NO_CHECKSUM
    return FileChecksums(**recorded[path.name]).check(path, REMEDY)


def _find_content_checker(path: Path) -> Callable[[Path], object] | None:
    from esm2kit.core.checksums import read_npz
    from esm2kit.core.seal import MAGIC
    from esm2kit.models.checkpoint import read_checkpoint

    with open(path, "rb") as file:
        start = file.read(1 << 20)
    if not start and (path.suffix in BINARY_SUFFIXES or path.name in JSON_NAMES):
        return lambda path: raise_damaged(path, "it is empty", "create it again")
    if start.startswith(MAGIC):
        return _check_sealed_hdf5
    if path.suffix in (".h5", ".hdf5") and path.stem.endswith("_contacts"):
        return lambda path: raise_damaged(path, "it has no checksums, so it is not finished", CONTACTS_REMEDY)
    if path.suffix in (".h5", ".hdf5"):
        return _check_embeddings if path.stem.endswith(EMBEDDING_NAMES) or b"esm2kit_format" in start else None
    # the header of a safetensors file, of which the first bytes may be damaged
    if b'"esm2kit"' in start and (path.suffix == ".safetensors" or start[8:9] == b"{"):
        return read_checkpoint
    if path.suffix == ".safetensors":
        return read_checkpoint if path.name.startswith(CHECKPOINT_NAMES) else None
    if path.suffix == ".npz":
        return lambda path: read_npz(path, "create it again")
    return _find_json_checker(path) if path.suffix == ".json" else None


def _check_sealed_hdf5(path: Path) -> object:
    from esm2kit.structure.contact_file import ContactReader, is_contact_file

    if not path.stem.endswith("_contacts") and not is_contact_file(path):
        return _check_embeddings(path)
    with ContactReader(path) as reader:
        reader.check()
    return None


def _check_embeddings(path: Path) -> object:
    from esm2kit.core.seal import has_seal
    from esm2kit.embedding.hdf5 import EmbeddingReader

    with EmbeddingReader(path) as reader:
        reader.check()
    return None if has_seal(path) else NO_CHECKSUM


def _find_json_checker(path: Path) -> Callable[[Path], object] | None:
    def check_sealed(path: Path) -> object:
        return read_sealed_json(path, "create it again")

    def check_report_and_seal(path: Path) -> object:
        from esm2kit.benchmarking.compare import check_report

        return NO_CHECKSUM if check_report(path).schema != SCHEMA else None

    if path.name == MANIFEST and list(path.parent.glob("*.arrow")):
        return lambda path: check_dataset(path.parent)
    data = path.read_bytes()
    try:
        found = json.loads(data)
        is_sealed = isinstance(found, dict) and SEAL in found
    except (ValueError, RecursionError):
        # a damaged file of esm2kit, or one of another program, which may contain comments
        found, is_sealed = None, path.name in JSON_NAMES or b"esm2kit" in data or f'"{SEAL}"'.encode() in data
    if path.name == "report.json":
        from esm2kit.benchmarking.report import SCHEMA  # of reports with a checksum

        has_schema = isinstance(found, dict) and found.get("schema") == SCHEMA
        if has_schema or path.with_name("predictions.npz").exists():
            return check_report_and_seal
    if isinstance(found, dict) and is_sealed and _read_listed(path):
        return lambda path: read_sealed_manifest(path, "create it again")
    return check_sealed if is_sealed else None

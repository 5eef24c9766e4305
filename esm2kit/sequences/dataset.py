"""Read the manifest of a dataset, and check the dataset's files against it."""

from pathlib import Path
from typing import Any

from esm2kit.core.checksums import FileChecksums, raise_damaged, read_sealed_json
from esm2kit.core.errors import InputError

MANIFEST = "manifest.json"
REMEDY = "run `esm2kit preprocess` again with --overwrite true"
# Files up to this size are checked when a dataset is opened, larger files before training and by `esm2kit check`.
SMALL_FILE_BYTES = 64 << 20


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a dataset.

    Args:
        folder: A finished output of `esm2kit preprocess`.

    Returns:
        `config`, `inputs`, `dataset` (counts), `files` (checksums) and the provenance.

    Raises:
        InputError: The folder does not exist or has no manifest, or its manifest is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"{folder} is a file. Run `esm2kit preprocess {folder}` and pass its output folder.",
            code="dataset.file",
            path=folder,
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist. Create it with `esm2kit preprocess`.", code="dataset.missing", path=folder
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: not a finished dataset (no {MANIFEST}). Run `esm2kit preprocess` with this --out_dir.",
            code="dataset.unfinished",
            path=folder,
        )
    manifest = read_sealed_json(path, REMEDY)
    if manifest.get("stage") != "preprocess" or "files" not in manifest:
        raise InputError(
            f"{path}: not a manifest of `esm2kit preprocess`. Choose another folder.",
            code="output.other-files",
            path=path,
        )
    return manifest


def check_dataset(folder: Path, every_byte: bool = True) -> dict[str, Any]:
    """Check a dataset's files against the checksums in its manifest.

    Args:
        folder: A finished output of `esm2kit preprocess`.
        every_byte: Read all files; otherwise only the sizes of files larger than SMALL_FILE_BYTES are checked.

    Returns:
        The manifest.

    Raises:
        InputError: The manifest or a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    for name, recorded in manifest["files"].items():
        path, expected = Path(folder) / name, FileChecksums(**recorded)
        if every_byte or expected.num_bytes <= SMALL_FILE_BYTES or not path.is_file():
            expected.check(path, REMEDY)
        elif path.stat().st_size != expected.num_bytes:
            raise_damaged(path, f"it has {path.stat().st_size:,} bytes instead of {expected.num_bytes:,}", REMEDY)
    return manifest

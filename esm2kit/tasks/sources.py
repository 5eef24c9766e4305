"""Find and open the files of a task: plain, compressed by gzip, or members of a zip archive."""

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from esm2kit.core.errors import InputError
from esm2kit.core.files import UNREADABLE_ZIP, check_git_lfs

# Suffixes of a split's file, in order of preference.
TABLE_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".tab", ".tab.gz", ".parquet")
ENDINGS = (".fasta", ".fa", ".fasta.gz", ".fa.gz", *TABLE_ENDINGS)
AUXILIARY = ("sequences", "mask", "resolved")
MAX_ZIP_BYTES = 8 << 30
# The first bytes of a zip archive, which an .xlsx file is, and of an .xls file.
BINARY_STARTS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
# Deflate reaches at most 1,032; FLIP's most repetitive CSV, the variants of one protein, stays below 200.
MAX_ZIP_RATIO = 400


class Source(NamedTuple):
    """A file, or a member of a zip.

    Args:
        path: of the file.
        member: name in the zip.
        test_set: the test set that is read of a file with several; empty if it has one, named test.
    """

    path: Path
    member: str | None = None
    test_set: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def is_table(self) -> bool:
        """Whether the file is a CSV, so that messages mention columns instead of FASTA headers."""
        return (self.member or self.path.name).endswith(TABLE_ENDINGS)


def check_zip(archive: zipfile.ZipFile, path: Path) -> None:
    """Check an archive for members outside its folder and for zip bombs.

    Args:
        archive: the opened archive.
        path: of the archive, for the message.

    Raises:
        InputError: a member is unsafe.
    """
    total = 0
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or (name.parts and ":" in name.parts[0]):
            raise InputError(
                f"{path}: member {member.filename!r} points outside the archive. Download the file again.",
                code="zip.path",
                member=member.filename,
                path=path,
            )
        total += member.file_size
        if member.file_size > max(MAX_ZIP_RATIO * member.compress_size, 1 << 20) or total > MAX_ZIP_BYTES:
            raise InputError(
                f"{path}: member {member.filename!r} would expand from {member.compress_size} to {member.file_size} "
                "bytes. Download the file again; this is not a FLIP archive.",
                code="zip.size",
                member=member.filename,
                path=path,
            )


@contextmanager
def open_text(source: Source) -> Iterator[io.TextIOBase]:
    """Open a plain text file, a gzip file or a member of a zip archive, without unpacking it to disk.

    Args:
        source: the file.

    Yields:
        Its text.

    Raises:
        InputError: the file is damaged, is not UTF-8 or is not a valid CSV.
    """
    check_git_lfs(source.path)
    try:
        if source.member is not None:
            with zipfile.ZipFile(source.path) as archive:
                check_zip(archive, source.path)
                with archive.open(source.member) as raw:
                    yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None)
            return
        with open(source.path, "rb") as raw:
            start = raw.read(4)
        if start in BINARY_STARTS:
            raise InputError(
                f"{source} is a workbook or an archive, not text. Export the table as CSV in UTF-8.",
                code="task.binary",
                path=source.path,
            )
        packed = start[:2] == b"\x1f\x8b"
        opener = gzip.open if packed else open
        with opener(source.path, "rt", encoding="utf-8-sig") as text:
            yield text
    except (*UNREADABLE_ZIP, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{source} is damaged ({error}). Download it again.", code="task.damaged", path=source.path
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"{source} is not encoded as UTF-8. Save it as UTF-8.", code="task.encoding", path=source.path
        ) from None
    except csv.Error as error:
        raise InputError(
            f"{source} cannot be read as a table ({error}). Check it for an unmatched quotation mark.",
            code="task.table",
            path=source.path,
        ) from None


def find_source(folder: Path, names: tuple[str, ...]) -> Source | None:
    """Find the first existing file among these names in a folder, then inside the zip archives of that folder."""
    for name in names:
        if (folder / name).is_file():
            return Source(folder / name)
    for path in sorted(folder.glob("*.zip")):
        members = _list_members(path)
        for name in names:
            if name in members:
                return Source(path, members[name])
    return None


def _list_members(path: Path) -> dict[str, str]:
    """Map file names to the members of a zip archive, without those that macOS adds."""
    check_git_lfs(path)
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
            return {PurePosixPath(name).name: name for name in archive.namelist() if "__MACOSX" not in name}
    except UNREADABLE_ZIP as error:
        raise InputError(f"{path} is damaged ({error}). Download it again.", code="task.damaged", path=path) from None


def parse_split_name(file_name: str) -> str | None:
    """Return the name of the split in a file of this name, or None if it has none of the suffixes in ENDINGS."""
    return next((file_name.removesuffix(ending) for ending in ENDINGS if file_name.endswith(ending)), None)


def find_split_names(folder: Path) -> list[str]:
    """List the splits in the folder of a custom task, including those in zip archives.

    Args:
        folder: of the task.

    Returns:
        Their names, sorted.

    Raises:
        InputError: a zip archive is damaged.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for path in folder.glob("*.zip"):
        names |= _list_members(path).keys()
    splits = {split for name in names if name[0] != "." and (split := parse_split_name(name))}
    return sorted(splits - set(AUXILIARY))

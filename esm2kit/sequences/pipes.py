"""Standard input and pipes as input files: each is copied to a file, because most stages read their input twice."""

import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from esm2kit.core.errors import InputError
from esm2kit.core.files import fsync

logger = logging.getLogger(__name__)

STDIN = Path("-")
BLOCK_BYTES = 1 << 20


def is_pipe(path: Path | str) -> bool:
    """Return whether a path is `-` (standard input), a named pipe, or a process substitution such as `<(zcat x.gz)`."""
    path = Path(path)
    return path == STDIN or path.is_fifo()


def name_pipe(path: Path | str) -> str | None:
    """Return a name for the outputs of a pipe without a name of its own; None for other files."""
    path = Path(path)
    if path == STDIN:
        return "stdin"
    return "pipe" if path.parent.name == "fd" and path.is_fifo() else None


@contextmanager
def copy_pipes(paths: Sequence[Path], folder: Path, name: str, num_processes: int = 1) -> Iterator[list[Path]]:
    """Copy pipes to files, which stay as a record of the input unless the block refuses it.

    Args:
        paths: Input files; those that are not pipes are yielded unchanged.
        folder: Folder for the copies.
        name: Name of the copies, such as `input.fasta`; each gets the start of its SHA-256 (`input_3f2a91bc.fasta`), so
            that the copy of another input is not replaced.
        num_processes: Number of processes that read the files.

    Yields:
        The files to read, in the same order.

    Raises:
        InputError: Several processes would read a pipe, standard input is a terminal, or a pipe is empty.
    """
    files, created = [], []
    for path in paths:
        if not is_pipe(path):
            files.append(path)
            continue
        source = "standard input" if path == STDIN else str(path)
        if num_processes > 1:
            raise InputError(
                f"{source} is a pipe, and {num_processes} processes cannot read one. Save it as a file and pass that.",
                code="pipe.processes",
                path=path,
                processes=num_processes,
            )
        with _open_stdin() if path == STDIN else open(path, "rb") as stream:
            copy, is_new = _copy_stream(stream, Path(folder) / name, source)
        files.append(copy)
        created += [copy] * is_new
    try:
        yield files
    except InputError:
        for copy in created:
            copy.unlink(missing_ok=True)
        raise


def _open_stdin() -> AbstractContextManager[BinaryIO]:
    """Return standard input as bytes; it is not closed after the block."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "'-' means standard input, but nothing is piped into it. Pipe a file into it, as in "
            "`zcat my.fasta.gz | esm2kit embed -`, or pass the file.",
            code="pipe.terminal",
        )
    return nullcontext(sys.stdin.buffer)


def _copy_stream(stream: BinaryIO, target: Path, source: str) -> tuple[Path, bool]:
    """Copy a stream to a file named by its content; returns the file, and whether it is new."""
    block = stream.read(BLOCK_BYTES)
    if not block:
        raise InputError(f"{source} is empty. Check the command that writes to it.", code="pipe.empty", source=source)
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            while block:
                digest.update(block)
                file.write(block)
                block = stream.read(BLOCK_BYTES)
        copy = target.with_name(f"{target.stem}_{digest.hexdigest()[:8]}{target.suffix}")
        if is_new := not copy.exists():
            fsync(part)
            os.replace(part, copy)
            logger.info("copied %s to %s", source, copy)
    finally:
        part.unlink(missing_ok=True)
    return copy, is_new

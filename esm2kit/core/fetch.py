"""One file from one address: continued where it broke off, checked, whole or absent.

It goes into `<file>.part`, with what the server said of it beside; a later call continues it only if the server still
offers the very same file.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3

from esm2kit.core.files import fsync, hold_lock, sha256_file
from esm2kit.core.progress import Progress

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
STALL_BYTES = 1024  # less than this in stall_seconds is a stalled server, even if it still trickles
CHUNK = 1 << 16


class FetchError(Exception):
    """This address cannot serve the file; the next may. What it says goes on from the address."""


def fetch(
    address: str,
    path: Path,
    stall_seconds: float,
    max_bytes: int,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Have the file of an address in `path`; a part of this very file that is there is continued.

    Args:
        address: http or https; from https nobody is sent on to plain http.
        path: where it goes once it is whole.
        stall_seconds: give a silent or trickling server up after this.
        max_bytes: a larger file, announced or not, is refused and nothing of it kept.
        size: bytes it must have, if known.
        sha256: digest it must have, if known.
        check: raises FetchError for a file that is not what it should be.
    Raises:
        FetchError: with the reason; the part is retained if a later call can continue it.
        InputError: another process is fetching the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, said = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    with hold_lock(part, f"{part} is being written by another process; wait for it"):
        with open(part, "ab") as file:
            try:
                _receive(address, file, said, stall_seconds, max_bytes)
            except requests.Timeout:
                raise FetchError(f"said nothing for {stall_seconds:.0f} s") from None
            except requests.RequestException as error:
                raise FetchError(f"failed ({type(error).__name__})") from None
            finally:
                if not file.seek(0, os.SEEK_END):  # nothing to go on from
                    part.unlink(missing_ok=True)
                    said.unlink(missing_ok=True)
        try:
            found = part.stat().st_size if part.is_file() else 0
            if found == 0:
                raise FetchError("sent an empty file")
            if size is not None and found != size:
                raise FetchError(f"sent {found} bytes instead of {size}")
            if sha256 is not None and sha256_file(part) != sha256:
                raise FetchError(f"sent another {path.name} (SHA-256 differs)")
            if check is not None:
                check(part)
        except FetchError:
            part.unlink(missing_ok=True)
            said.unlink(missing_ok=True)
            raise
        fsync(part)
        os.replace(part, path)
        said.unlink(missing_ok=True)
        fsync(path.parent)


def _receive(address: str, file: BinaryIO, said: Path, stall_seconds: float, max_bytes: int) -> None:
    """Append what is missing; a part of another version of the file is thrown away first."""
    have = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    known = json.loads(said.read_text()) if said.is_file() else {}
    if have and known.get("address") == address and known.get("tag"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["tag"]}
    else:
        have = 0
    with requests.get(
        address, headers=headers, stream=True, timeout=(min(CONNECT_SECONDS, stall_seconds), stall_seconds)
    ) as answer:
        plain = [hop.url for hop in (*answer.history, answer) if not hop.url.startswith("https:")]
        if plain and address.startswith("https:"):  # whoever stands in between could send another file
            raise FetchError(f"sends on to {plain[0]}, which is not encrypted")
        if answer.status_code == 416 and have and have == known.get("total"):
            return  # the part is the whole file
        if answer.status_code not in (200, 206):
            raise FetchError(f"answered {answer.status_code} {answer.reason}")
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise FetchError("answered with a web page instead of the file")
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise FetchError("continued at the wrong byte")
        if answer.status_code == 200:
            have = 0
            file.truncate(0)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        said.write_text(json.dumps({"address": address, "tag": tag, "total": total}))
        room = have + shutil.disk_usage(said.parent).free
        most, whose = min((max_bytes, "the file can have"), (room, f"{said.parent} has room for"))
        if max(have, total or 0) > most or not _pour(answer, file, have, total, most, stall_seconds, address):
            file.truncate(0)
            raise FetchError(f"sends more than {most:,} bytes, more than {whose}")
        if total is not None and file.seek(0, os.SEEK_END) != total:
            raise FetchError(f"broke off at {file.tell()} of {total} bytes")


def _pour(
    answer: requests.Response,
    file: BinaryIO,
    have: int,
    total: int | None,
    most: int,
    stall_seconds: float,
    address: str,
) -> bool:
    """The body into the file, with a progress line every few seconds; False once it would hold more than `most`."""
    checked = time.monotonic()
    progress = Progress(logger, f"{address}:", "MB", total and total / 1e6, have / 1e6)
    received = at_check = 0
    while True:
        try:
            block = answer.raw.read1(CHUNK)  # whatever has arrived, so that a trickle is seen as one
        except urllib3.exceptions.ReadTimeoutError:
            file.flush()
            raise requests.Timeout from None
        except urllib3.exceptions.HTTPError as error:
            file.flush()
            raise FetchError(f"broke off ({type(error).__name__})") from None
        received += len(block)
        if have + received > most:
            return False
        if not block:
            break
        file.write(block)
        now = time.monotonic()
        if now - checked > stall_seconds:
            if received - at_check < STALL_BYTES:
                file.flush()
                raise FetchError(f"sent only {received - at_check} bytes in {stall_seconds:.0f} s")
            checked, at_check = now, received
        progress.update((have + received) / 1e6)
    file.flush()
    return True

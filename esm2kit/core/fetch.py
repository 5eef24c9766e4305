"""Download one file from one address: resumable, checked and atomic.

The data go into `<file>.part`, and the server's ETag and size into `<file>.part.json`. A later call resumes only if the
server still offers the same version of the file.
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

from esm2kit.core.errors import InputError
from esm2kit.core.files import fsync, hold_lock, sha256_file
from esm2kit.core.progress import Progress

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
STALL_BYTES = 1024  # a server that sends fewer bytes than this in stall_seconds has stalled
CHUNK = 1 << 16


class FetchError(Exception):
    """An address cannot serve the file; another address may. The message completes `<address> ...`."""


def fetch(
    address: str,
    path: Path,
    stall_seconds: float,
    max_bytes: int,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    detects_truncation: bool = False,
) -> None:
    """Download a file, resuming an earlier partial download of the same file.

    Args:
        address: http or https; a redirect from https to http is an error.
        path: Path of the complete file.
        stall_seconds: Time after which a server that sends nothing, or almost nothing, counts as stalled.
        max_bytes: Maximum size; a larger file is an error, whether or not the server announces its size.
        size: Expected size in bytes, if known.
        sha256: Expected digest, if known.
        check: Checks the complete file and raises FetchError if it is not the expected one.
        detects_truncation: Whether `check` fails for a file that is cut off; then the server need not state the size.

    Raises:
        FetchError: The download failed. The partial file is retained if a later call can resume it.
        InputError: Another process is downloading the file, or a folder has the name of the file.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, but a file of this name is to be downloaded. Rename or delete the folder.",
            code="output.unwritable",
            path=path,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part, state = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    with hold_lock(
        part.with_name(f"{part.name}.lock"),
        f"{part}: another process is downloading this file. Wait until it has finished.",
    ):
        with open(part, "ab") as file:
            try:
                has_end = _receive(address, file, state, stall_seconds, max_bytes)
            except requests.Timeout:
                raise FetchError(f"sent nothing for {stall_seconds:.0f} s") from None
            except requests.RequestException as error:
                raise FetchError(_describe_failure(error)) from None
            finally:
                if not file.seek(0, os.SEEK_END):  # empty: nothing to resume
                    part.unlink(missing_ok=True)
                    state.unlink(missing_ok=True)
        try:
            found = part.stat().st_size if part.is_file() else 0
            if found == 0:
                raise FetchError("sent an empty file")
            if size is not None and found != size:
                raise FetchError(f"sent {found} bytes instead of {size}")
            if sha256 is not None and sha256_file(part) != sha256:
                raise FetchError(f"sent a different version of {path.name} (its SHA-256 differs)")
            if not has_end and size is None and sha256 is None and not detects_truncation:
                raise FetchError("does not state the size of the file, so a truncated download would not be noticed")
            if check is not None:
                check(part)
        except FetchError:
            part.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
            raise
        fsync(part)
        os.replace(part, path)
        state.unlink(missing_ok=True)
        fsync(path.parent)


def _describe_failure(error: requests.RequestException) -> str:
    """Describe why a request failed; completes `<address> ...`."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "cannot be reached through the proxy (check the variables http_proxy, https_proxy and no_proxy)"
    if isinstance(error, requests.exceptions.SSLError):
        return "has a certificate that cannot be verified"
    if isinstance(error, requests.TooManyRedirects):
        return "redirects in a circle"
    return "cannot be reached" if isinstance(error, requests.ConnectionError) else f"failed ({type(error).__name__})"


def _receive(address: str, file: BinaryIO, state: Path, stall_seconds: float, max_bytes: int) -> bool:
    """Append the missing bytes; a partial download of another version of the file is discarded first.

    Returns:
        Whether the server stated where the file ends, so that it was not cut off.

    Raises:
        FetchError: The server cannot serve the file, or the connection was closed before its end.
    """
    have = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    if have and known.get("address") == address and known.get("tag"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["tag"]}
    else:
        have = 0
    with requests.get(
        address, headers=headers, stream=True, timeout=(min(CONNECT_SECONDS, stall_seconds), stall_seconds)
    ) as response:
        plain = [hop.url for hop in (*response.history, response) if not hop.url.startswith("https:")]
        if plain and address.startswith("https:"):  # anybody on the network path could replace the file
            raise FetchError(f"redirects to {plain[0]}, which is not encrypted")
        if response.status_code == 416 and have and have == known.get("total"):
            return True  # the partial file is complete
        if response.status_code not in (200, 206):
            raise FetchError(f"returned {response.status_code} {response.reason}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise FetchError("returned a web page instead of the file")
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise FetchError("resumed at the wrong byte")
        if response.status_code == 200:
            have = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        state.write_text(json.dumps({"address": address, "tag": tag, "total": total}), encoding="utf-8")
        free = have + shutil.disk_usage(state.parent).free
        limit, reason = min((max_bytes, "the maximum for this file"), (free, f"the free space in {state.parent}"))
        with Progress(logger, f"{address}:", "MB", total and total / 1e6, have / 1e6) as progress:
            too_large = max(have, total or 0) > limit
            too_large = too_large or not _write_body(response, file, have, limit, stall_seconds, progress)
        if too_large:
            file.truncate(0)
            raise FetchError(f"sends more than {limit:,} bytes, {reason}")
        if total is not None and file.seek(0, os.SEEK_END) != total:
            raise FetchError(f"closed the connection after {file.tell()} of {total} bytes")
        return total is not None or response.headers.get("Transfer-Encoding", "").lower() == "chunked"


def _write_body(
    response: requests.Response,
    file: BinaryIO,
    have: int,
    limit: int,
    stall_seconds: float,
    progress: Progress,
) -> bool:
    """Append the body to the file and show the progress; return False if the file would exceed `limit` bytes."""
    checked = time.monotonic()
    received = received_before = 0  # in all, and at the last check for a stall
    while True:
        try:
            block = response.raw.read1(CHUNK)  # returns the bytes that have arrived, so that a slow server is noticed
        except urllib3.exceptions.ReadTimeoutError:
            file.flush()
            raise requests.Timeout from None
        except urllib3.exceptions.HTTPError as error:
            file.flush()
            raise FetchError(f"closed the connection ({type(error).__name__})") from None
        received += len(block)
        if have + received > limit:
            return False
        if not block:
            break
        file.write(block)
        now = time.monotonic()
        if now - checked > stall_seconds:
            if received - received_before < STALL_BYTES:
                file.flush()
                raise FetchError(f"sent only {received - received_before} bytes in {stall_seconds:.0f} s")
            checked, received_before = now, received
        progress.update((have + received) / 1e6)
    file.flush()
    return True

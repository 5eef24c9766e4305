"""A local Hugging Face hub, with faults."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """A local server with the part of the hub's interface that huggingface_hub uses, for one repository and commit.

    Args:
        files: name -> content.
        repo: owner/name of the repository.
        commit: its only revision, besides main.

    Attributes:
        requests: (method, path, Range header) of every request.
        interruptions: number of downloads to interrupt halfway.
        damage: flip a bit in the content of model.safetensors.
        seconds: delay of every download of weights.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], repo: str, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.commit, self.seconds = repo, commit, 0.0
        self.files, self.requests, self.interruptions, self.damage = files, [], 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        byte_range = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, byte_range))
        if self.path == "/":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if repo != self.server.repo:
            return self._refuse("RepoNotFound")
        if revision not in ("main", self.server.commit):
            return self._refuse("RevisionNotFound")
        if file not in self.server.files:
            return self._refuse("EntryNotFound")
        data = self.server.files[file]
        large = file.endswith((".safetensors", ".bin"))
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        start = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range and body else 0
        sent = bytearray(data[start:])
        if self.server.damage and large:
            sent[-1] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body and large:
            time.sleep(self.server.seconds)
        if body and large and self.server.interruptions > 0:
            self.server.interruptions -= 1
            self.wfile.write(sent[: len(sent) // 2])
            self.wfile.flush()
            self.connection.close()
        elif body:
            self.wfile.write(sent)
        return None


@contextmanager
def serve(folder: Path, repo: str, commit: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the files of a folder as one repository, and make this process use the server and an empty cache."""
    server = Hub({path.name: path.read_bytes() for path in folder.iterdir()}, repo, commit)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

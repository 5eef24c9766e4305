"""Downloads against a server on this machine: broken off, stalled, refused, lying; nothing half-written is read."""

import errno
import fcntl
import http.server
import io
import re
import shutil
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import requests
from support.errors import refused

from esm2kit.core.fetch import fetch
from esm2kit.core.files import sha256_file
from esm2kit.tasks import download
from esm2kit.tasks.download import DownloadConfig, download_flip

FASTA = "".join(
    f">Sequence{i} TARGET={i}.5 SET={'test' if i % 3 else 'train'} VALIDATION=False\n{'MKV' * 30}\n" for i in range(200)
)
BODY = FASTA.encode()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `fault` says what goes wrong."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    fault = ""
    ranges: list[str] = []  # noqa: RUF012
    etag = '"v1"'

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        body = self.files.get(self.path)
        wanted = self.headers.get("Range")
        type(self).ranges.append(wanted or "")
        if self.fault == "forbidden":
            return self.send_error(403)
        if body is None:
            return self.send_error(404)
        if self.fault == "silent":
            time.sleep(1.5)
        start = 0
        if wanted and self.headers.get("If-Range") == self.etag and self.fault != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("ETag", self.etag)
        if self.fault != "endless":
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if self.fault == "login page" else "application/octet-stream")
        self.end_headers()
        body = body[start:]
        if self.fault == "breaks off":
            self.wfile.write(body[: len(body) // 2])
            self.connection.close()
        elif self.fault == "endless":
            with suppress(ConnectionError):  # the client hangs up, as it should
                while True:
                    self.wfile.write(body)
        elif self.fault == "stalls":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(1.5)
        elif self.fault == "trickles":
            with suppress(ConnectionError):
                for byte in body[:40]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
        else:
            self.wfile.write(body)
        return None


@pytest.fixture
def server():
    Server.files, Server.fault, Server.ranges, Server.etag = {"/gb1/two_vs_rest.fasta": BODY}, "", [], '"v1"'
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_from_https_nobody_is_sent_on_to_plain_http(server, tmp_path, monkeypatch):
    send = requests.adapters.HTTPAdapter.send

    def sent_on(adapter, request, **options):
        if request.url.startswith("http:"):
            return send(adapter, request, **options)
        answer = requests.Response()
        answer.status_code, answer.url, answer.request, answer.raw = 302, request.url, request, io.BytesIO()
        answer.headers["Location"] = server + request.path_url
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", sent_on)
    with undelivered(r"https://lab\.org/gb1/\S+ redirects to http://127\S+, which is not encrypted"):
        get(tmp_path, "https://lab.org")
    assert not list((tmp_path / "gb1").iterdir())
    assert get(tmp_path, "https://lab.org", server)[0].read_bytes() == BODY, "the next server in turn"


@pytest.fixture(autouse=True)
def no_known_files(monkeypatch):
    monkeypatch.setattr(download, "KNOWN", {})


def get(folder, *servers, zips=(), **keywords):
    keywords = {"stall_seconds": 0.4} | keywords
    return download_flip(
        "gb1", folder, file_mirrors=[s + "/{folder}/{file}" for s in servers], zip_mirrors=zips, **keywords
    )


@contextmanager
def undelivered(reason):
    """No mirror delivers, and one of the reasons is of this form."""
    with refused("download.failed", task="gb1") as caught:
        yield
    assert any(re.search(reason, found) for found in caught.value.values["reasons"])
    assert "by hand" in str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    (path,) = get(tmp_path, server)
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["two_vs_rest.fasta"]
    get(tmp_path, server)
    assert len(Server.ranges) == 1


def test_a_disk_without_locks_is_no_obstacle(server, tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert get(tmp_path, server)[0].read_bytes() == BODY
    assert "two_vs_rest.fasta.part: the file system has no locks" in caplog.text


def test_a_file_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "two_vs_rest.csv").write_text("sequence,target,set\n")
    assert get(tmp_path)[0].name == "two_vs_rest.csv"


def test_a_broken_download_goes_on_where_it_broke(server, tmp_path):
    Server.fault = "breaks off"
    with undelivered("closed the connection"):
        get(tmp_path, server)
    assert names(tmp_path) == ["two_vs_rest.fasta.part", "two_vs_rest.fasta.part.json"]
    half = (tmp_path / "gb1" / "two_vs_rest.fasta.part").stat().st_size
    assert half == len(BODY) // 2
    Server.fault = ""
    assert get(tmp_path, server)[0].read_bytes() == BODY
    assert Server.ranges[-1] == f"bytes={half}-"
    assert names(tmp_path) == ["two_vs_rest.fasta"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    Server.fault = "breaks off"
    with undelivered("closed the connection"):
        get(tmp_path, server)
    Server.fault, Server.etag = "", '"v2"'
    Server.files["/gb1/two_vs_rest.fasta"] = BODY.swapcase()
    assert get(tmp_path, server)[0].read_bytes() == BODY.swapcase()


def test_a_server_without_ranges_starts_over(server, tmp_path):
    Server.fault = "breaks off"
    with undelivered("closed the connection"):
        get(tmp_path, server)
    Server.fault = "no ranges"
    assert get(tmp_path, server)[0].read_bytes() == BODY


@pytest.mark.parametrize("fault", ["silent", "stalls", "trickles"])
def test_a_server_that_stalls_is_given_up(server, tmp_path, fault):
    Server.fault = fault
    start = time.monotonic()
    with undelivered("sent nothing for|bytes in 0 s|closed the connection"):
        get(tmp_path, server)
    assert time.monotonic() - start < 5
    assert not (tmp_path / "gb1" / "two_vs_rest.fasta").exists()
    assert not names(tmp_path) or fault != "silent"


def test_a_403_says_how_to_place_the_files(server, tmp_path):
    Server.fault = "forbidden"
    with undelivered("returned 403 Forbidden"):
        get(tmp_path, server)
    assert names(tmp_path) == []


def test_a_login_page_is_not_a_fasta(server, tmp_path):
    Server.fault = "login page"
    with undelivered("web page instead of the file"):
        get(tmp_path, server)


def test_the_next_mirror_helps_out(server, tmp_path):
    assert get(tmp_path, "http://127.0.0.1:9", server)[0].read_bytes() == BODY


def test_a_mirror_of_ones_own_is_asked_first(server, tmp_path):
    config = DownloadConfig(task="gb1", data_dir=tmp_path, mirror=server + "/{folder}/{file}")
    assert [path.read_bytes() for path in download.download(config)] == [BODY]


@pytest.mark.parametrize("rest", ["FLIP", "{name}/{file}", "{file", "{file}}", "{file!x}", "{file:d}", "{}{file}"])
def test_a_mirror_that_names_no_file_is_refused(rest):
    with refused("download.mirror", found=f"http://x/{rest}"):
        DownloadConfig(mirror=f"http://x/{rest}")


@pytest.mark.parametrize(
    ("size", "sha256", "message"),
    [
        (len(BODY) + 1, None, f"sent {len(BODY)} bytes instead of {len(BODY) + 1}"),
        (1, None, "sends more than 1 bytes, the maximum for this file"),
        (None, "0" * 64, "SHA-256 differs"),
    ],
)
def test_a_file_of_another_size_or_hash_is_refused(server, tmp_path, monkeypatch, size, sha256, message):
    monkeypatch.setattr(download, "KNOWN", {("gb1", "two_vs_rest.fasta"): (size, sha256)})
    with undelivered(message):
        get(tmp_path, server)
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["", "endless"], ids=["announced", "not announced"])
@pytest.mark.parametrize("short", ["size", "room"])
def test_a_server_that_sends_too_much_is_given_up(server, tmp_path, monkeypatch, fault, short):
    Server.fault, most = fault, len(BODY) - 1
    if short == "size":
        monkeypatch.setattr(download, "MAX_BYTES", most)
        told = f"sends more than {most:,} bytes, the maximum for this file"
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=most))
        told = rf"sends more than {most:,} bytes, the free space in \S+"
    with undelivered(told):
        get(tmp_path, server)
    assert names(tmp_path) == []


def test_a_part_belongs_to_one_process_until_it_is_in_its_place(server, tmp_path):
    address, path = f"{server}/gb1/two_vs_rest.fasta", tmp_path / "mine.fasta"

    def meddle(part):
        with refused("file.locked", path=part):
            fetch(address, path, 0.4, 1 << 30)

    fetch(address, path, 0.4, 1 << 30, check=meddle)
    assert path.read_bytes() == BODY


def zipped(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members:
            archive.writestr(name, FASTA)
    return buffer.getvalue()


def test_the_archive_is_the_last_resort(server, tmp_path):
    Server.files = {"/gb1/splits.zip": zipped("splits/two_vs_rest.fasta")}
    found = get(tmp_path, server, zips=[server + "/{folder}/splits.zip"])
    assert [path.name for path in found] == ["splits.zip"]


def test_an_archive_that_reaches_out_is_thrown_away(server, tmp_path):
    Server.files = {"/gb1/splits.zip": zipped("../two_vs_rest.fasta")}
    with undelivered("points outside the archive"):
        get(tmp_path, server, zips=[server + "/{folder}/splits.zip"])
    assert names(tmp_path) == []


def test_the_older_test_set_cannot_be_fetched_by_its_newer_name(tmp_path):
    with refused("download.withdrawn", task="secondary_structure_648"):
        download_flip("secondary_structure_648", tmp_path)


def test_all_tasks_are_those_that_can_be_had(tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(download, "download_flip", lambda task, *_: asked.append(task) or [])
    with caplog.at_level("INFO", logger="esm2kit"):
        assert download.download(DownloadConfig(data_dir=tmp_path)) == []
    assert asked == [task for task in download.TASKS if task != "secondary_structure_648"]
    assert "secondary_structure_648 is left out: its files are no longer on FLIP's server" in caplog.text
    (tmp_path / "secondary_structure_648").mkdir()
    for name in ("sampled.fasta", "sequences.fasta", "resolved.fasta"):
        assert "secondary_structure_648" not in download.list_downloadable_tasks(tmp_path)
        (tmp_path / "secondary_structure_648" / name).write_text(">a\nMKT\n")
    assert download.list_downloadable_tasks(tmp_path) == list(download.TASKS), "files placed by hand are as good as any"


def test_an_unknown_task_is_named_before_anything_is_fetched(tmp_path):
    with refused("task.unknown", name="gb2", nearest="gb1"):
        download.download(DownloadConfig(task="gb2", data_dir=tmp_path))
    assert names(tmp_path) == []


@pytest.mark.shared
def test_the_known_hashes_are_those_of_flips_files(shared_data, monkeypatch):
    monkeypatch.undo()
    assert len(download.KNOWN) > 15
    for (task, name), (size, digest) in download.KNOWN.items():
        path = shared_data / "flip" / task / name
        assert path.stat().st_size == size
        if size < 500_000:
            assert sha256_file(path) == digest

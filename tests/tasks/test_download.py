"""Downloads from a local server that interrupts, stalls, refuses or sends wrong data; partial files are never read."""

import errno
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
from esm2kit.tasks.download import DownloadConfig, download_flip, is_downloaded

FASTA = "".join(
    f">Sequence{i} TARGET={i}.5 SET={'test' if i % 3 else 'train'} VALIDATION=False\n{'MKV' * 30}\n" for i in range(200)
)
BODY = FASTA.encode()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `fault` selects what goes wrong."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    fault = ""
    ranges: list[str] = []  # noqa: RUF012
    etag = '"v1"'

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        body = self.files.get(self.path)
        requested = self.headers.get("Range")
        type(self).ranges.append(requested or "")
        if self.fault == "forbidden":
            return self.send_error(403)
        if body is None:
            return self.send_error(404)
        if self.fault == "silent":
            time.sleep(1.5)
        start = 0
        if requested and self.headers.get("If-Range") == self.etag and self.fault != "no ranges":
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("ETag", self.etag)
        if self.fault not in ("endless", "no size"):
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if self.fault == "login page" else "application/octet-stream")
        self.end_headers()
        body = body[start:]
        if self.fault == "breaks off":
            self.wfile.write(body[: len(body) // 2])
            self.connection.close()
        elif self.fault == "endless":
            with suppress(ConnectionError):  # the client is expected to disconnect
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


def test_a_redirect_from_https_to_http_is_refused(server, tmp_path, monkeypatch):
    send = requests.adapters.HTTPAdapter.send

    def redirect(adapter, request, **options):
        if request.url.startswith("http:"):
            return send(adapter, request, **options)
        answer = requests.Response()
        answer.status_code, answer.url, answer.request, answer.raw = 302, request.url, request, io.BytesIO()
        answer.headers["Location"] = server + request.path_url
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirect)
    with expect_failed_download(r"https://lab\.org/gb1/\S+ redirects to http://127\S+, which is not encrypted"):
        get(tmp_path, "https://lab.org")
    assert not list((tmp_path / "gb1").iterdir())
    assert get(tmp_path, "https://lab.org", server)[0].read_bytes() == BODY, "the next mirror is used"


@pytest.fixture(autouse=True)
def no_known_files(monkeypatch):
    monkeypatch.setattr(download, "KNOWN", {})


def get(folder, *servers, zips=(), **keywords):
    keywords = {"stall_seconds": 0.4} | keywords
    return download_flip(
        "gb1", folder, file_mirrors=[s + "/{folder}/{file}" for s in servers], zip_mirrors=zips, **keywords
    )


@contextmanager
def expect_failed_download(reason):
    """Expect that no mirror delivers, and that one of the reasons matches this pattern."""
    with refused("download.failed", task="gb1") as caught:
        yield
    assert any(re.search(reason, found) for found in caught.value.values["reasons"])
    assert "by hand" in str(caught.value)


def file_names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_complete_file_is_not_downloaded_again(server, tmp_path):
    (path,) = get(tmp_path, server)
    assert path.read_bytes() == BODY
    assert file_names(tmp_path) == ["two_vs_rest.fasta"]
    get(tmp_path, server)
    assert len(Server.ranges) == 1


def test_a_file_system_without_locks_is_supported(server, tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert get(tmp_path, server)[0].read_bytes() == BODY
    assert "two_vs_rest.fasta.part.lock: the file system has no locks" in caplog.text


def test_an_existing_csv_is_not_replaced(tmp_path):
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "two_vs_rest.csv").write_text("sequence,target,set\n")
    assert get(tmp_path)[0].name == "two_vs_rest.csv"


def test_an_interrupted_download_resumes(server, tmp_path):
    Server.fault = "breaks off"
    with expect_failed_download("closed the connection"):
        get(tmp_path, server)
    assert file_names(tmp_path) == ["two_vs_rest.fasta.part", "two_vs_rest.fasta.part.json"]
    half = (tmp_path / "gb1" / "two_vs_rest.fasta.part").stat().st_size
    assert half == len(BODY) // 2
    Server.fault = ""
    assert get(tmp_path, server)[0].read_bytes() == BODY
    assert Server.ranges[-1] == f"bytes={half}-"
    assert file_names(tmp_path) == ["two_vs_rest.fasta"]


def test_a_file_that_changed_on_the_server_is_downloaded_again(server, tmp_path):
    Server.fault = "breaks off"
    with expect_failed_download("closed the connection"):
        get(tmp_path, server)
    Server.fault, Server.etag = "", '"v2"'
    Server.files["/gb1/two_vs_rest.fasta"] = BODY.swapcase()
    assert get(tmp_path, server)[0].read_bytes() == BODY.swapcase()


def test_a_download_restarts_if_the_server_does_not_support_ranges(server, tmp_path):
    Server.fault = "breaks off"
    with expect_failed_download("closed the connection"):
        get(tmp_path, server)
    Server.fault = "no ranges"
    assert get(tmp_path, server)[0].read_bytes() == BODY


@pytest.mark.parametrize("fault", ["silent", "stalls", "trickles"])
def test_a_stalled_download_times_out(server, tmp_path, fault):
    Server.fault = fault
    with expect_failed_download("sent nothing for|bytes in 0 s|closed the connection"):
        get(tmp_path, server)
    assert not (tmp_path / "gb1" / "two_vs_rest.fasta").exists()
    assert not file_names(tmp_path) or fault != "silent"


def test_the_message_of_a_403_explains_how_to_add_the_files(server, tmp_path):
    Server.fault = "forbidden"
    with expect_failed_download("returned 403 Forbidden"):
        get(tmp_path, server)
    assert file_names(tmp_path) == []


def test_a_login_page_is_refused(server, tmp_path):
    Server.fault = "login page"
    with expect_failed_download("web page instead of the file"):
        get(tmp_path, server)


OTHER_FILES = {
    "a login page without its type": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "an error as JSON": (b'{"error": "rate limit"}', "FASTA|header"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 2856916\n", "git-lfs pointer"),
    "binary": (bytes(range(256)) * 40, "is not encoded as UTF-8"),
    "proteins without labels": (b">a SET=train\nMKV\n>b SET=test\nMKV\n", "none of the 2 headers has TARGET="),
    "proteins without sets": (b">a TARGET=1\nMKV\n", "none of the 1 headers has SET="),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_not_of_the_task_is_refused_and_the_next_mirror_is_used(name, server, tmp_path):
    content, reason = OTHER_FILES[name]
    Server.files = {"/gb1/two_vs_rest.fasta": content, "/good/gb1/two_vs_rest.fasta": BODY}
    with expect_failed_download(rf"sent another file than two_vs_rest\.fasta \(two_vs_rest\.fasta.*({reason})"):
        get(tmp_path, server)
    assert file_names(tmp_path) == []
    assert get(tmp_path, server, f"{server}/good")[0].read_bytes() == BODY


@pytest.mark.parametrize("name", OTHER_FILES)
def test_an_existing_file_that_is_not_of_the_task_is_refused(name, server, tmp_path):
    path = tmp_path / "gb1" / "two_vs_rest.fasta"
    path.parent.mkdir()
    path.write_bytes(OTHER_FILES[name][0])
    with refused("download.other-file", task="gb1", path=path) as caught:
        get(tmp_path, server)
    assert "Delete it" in str(caught.value)
    assert is_downloaded("gb1", tmp_path) == name.startswith("proteins"), "the list reads only the first record"
    path.unlink()
    assert get(tmp_path, server)[0].read_bytes() == BODY
    assert is_downloaded("gb1", tmp_path)


def test_a_folder_with_the_name_of_the_file_is_refused(server, tmp_path):
    (tmp_path / "gb1" / "two_vs_rest.fasta").mkdir(parents=True)
    with refused("output.unwritable", path=tmp_path / "gb1" / "two_vs_rest.fasta"):
        get(tmp_path, server)


def test_a_server_that_does_not_state_the_size_is_refused_unless_the_size_is_known(server, tmp_path, monkeypatch):
    Server.fault = "no size"
    with expect_failed_download("does not state the size of the file"):
        get(tmp_path, server)
    assert file_names(tmp_path) == []
    monkeypatch.setattr(download, "KNOWN", {("gb1", "two_vs_rest.fasta"): (len(BODY), None)})
    assert get(tmp_path, server)[0].read_bytes() == BODY


def test_an_archive_without_stated_size_is_read_because_a_truncated_one_fails_its_checksum(server, tmp_path):
    Server.fault, whole = "no size", build_zip("splits/two_vs_rest.fasta")
    Server.files = {"/gb1/splits.zip": whole[: len(whole) - 10]}
    with expect_failed_download("is not a valid archive"):
        get(tmp_path, zips=[server + "/{folder}/splits.zip"])
    Server.files = {"/gb1/splits.zip": whole}
    assert get(tmp_path, zips=[server + "/{folder}/splits.zip"])[0].read_bytes() == whole


@pytest.mark.parametrize(
    ("address", "proxy", "reason"),
    [
        ("http://127.0.0.1:9", "", "cannot be reached$"),
        ("http://lab.invalid", "http://127.0.0.1:9", "cannot be reached through the proxy"),
    ],
)
def test_a_server_that_cannot_be_reached_is_described(address, proxy, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with expect_failed_download(reason):
        get(tmp_path, address)


@pytest.mark.parametrize("start", ["ftp://lab.org", "file:///data", "lab.org", "/data"])
def test_a_mirror_that_is_not_of_the_web_is_refused(start):
    with refused("download.mirror", found=f"{start}/{{file}}"):
        DownloadConfig(mirror=f"{start}/{{file}}")


def test_the_next_mirror_is_used(server, tmp_path):
    assert get(tmp_path, "http://127.0.0.1:9", server)[0].read_bytes() == BODY


def test_a_custom_mirror_is_tried_first(server, tmp_path):
    config = DownloadConfig(task="gb1", data_dir=tmp_path, mirror=server + "/{folder}/{file}")
    assert [path.read_bytes() for path in download.download(config)] == [BODY]


@pytest.mark.parametrize("rest", ["FLIP", "{name}/{file}", "{file", "{file}}", "{file!x}", "{file:d}", "{}{file}"])
def test_an_invalid_mirror_pattern_is_refused(rest):
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
def test_a_file_with_a_wrong_size_or_hash_is_refused(server, tmp_path, monkeypatch, size, sha256, message):
    monkeypatch.setattr(download, "KNOWN", {("gb1", "two_vs_rest.fasta"): (size, sha256)})
    with expect_failed_download(message):
        get(tmp_path, server)
    assert file_names(tmp_path) == []


@pytest.mark.parametrize("fault", ["", "endless"], ids=["announced", "not announced"])
@pytest.mark.parametrize("short", ["size", "room"])
def test_a_download_that_is_too_large_is_stopped(server, tmp_path, monkeypatch, fault, short):
    Server.fault, most = fault, len(BODY) - 1
    if short == "size":
        monkeypatch.setattr(download, "MAX_BYTES", most)
        message = f"sends more than {most:,} bytes, the maximum for this file"
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=most))
        message = rf"sends more than {most:,} bytes, the free space in \S+"
    with expect_failed_download(message):
        get(tmp_path, server)
    assert file_names(tmp_path) == []


def test_a_partial_file_is_locked_until_it_is_renamed(server, tmp_path):
    address, path = f"{server}/gb1/two_vs_rest.fasta", tmp_path / "mine.fasta"

    def lock_again(part):
        with refused("file.locked", path=part.with_name(f"{part.name}.lock")):
            fetch(address, path, 0.4, 1 << 30)

    fetch(address, path, 0.4, 1 << 30, check=lock_again)
    assert path.read_bytes() == BODY


def build_zip(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members:
            archive.writestr(name, FASTA)
    return buffer.getvalue()


def test_the_archive_is_tried_last(server, tmp_path):
    Server.files = {"/gb1/splits.zip": build_zip("splits/two_vs_rest.fasta")}
    found = get(tmp_path, server, zips=[server + "/{folder}/splits.zip"])
    assert [path.name for path in found] == ["splits.zip"]


def test_an_archive_with_a_path_outside_is_deleted(server, tmp_path):
    Server.files = {"/gb1/splits.zip": build_zip("../two_vs_rest.fasta")}
    with expect_failed_download("points outside the archive"):
        get(tmp_path, server, zips=[server + "/{folder}/splits.zip"])
    assert file_names(tmp_path) == []


def test_the_withdrawn_test_set_cannot_be_downloaded(tmp_path):
    with refused("download.withdrawn", task="secondary_structure_648"):
        download_flip("secondary_structure_648", tmp_path)


def test_all_tasks_excludes_those_that_cannot_be_downloaded(tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(download, "download_flip", lambda task, *_: asked.append(task) or [])
    with caplog.at_level("INFO", logger="esm2kit"):
        assert download.download(DownloadConfig(data_dir=tmp_path)) == []
    assert asked == [task for task in download.TASKS if task != "secondary_structure_648"]
    assert "secondary_structure_648 is skipped: its files are no longer on FLIP's server" in caplog.text
    (tmp_path / "secondary_structure_648").mkdir()
    for name in ("sampled.fasta", "sequences.fasta", "resolved.fasta"):
        assert "secondary_structure_648" not in download.list_downloadable_tasks(tmp_path)
        (tmp_path / "secondary_structure_648" / name).write_text(">a\nMKT\n")
    assert download.list_downloadable_tasks(tmp_path) == list(download.TASKS), "files that were added by hand count"


def test_an_unknown_task_is_refused_before_any_download(tmp_path):
    with refused("task.unknown", name="gb2", nearest="gb1"):
        download.download(DownloadConfig(task="gb2", data_dir=tmp_path))
    assert file_names(tmp_path) == []


@pytest.mark.shared
def test_the_known_hashes_match_flips_files(shared_data, monkeypatch):
    monkeypatch.undo()
    assert len(download.KNOWN) > 15
    for (task, name), (size, digest) in download.KNOWN.items():
        path = shared_data / "flip" / task / name
        assert path.stat().st_size == size
        if size < 500_000:
            assert sha256_file(path) == digest

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.errors import refused

from esm2kit.core.hardware import (
    cpu_name,
    read_free_memory,
    read_memory_use,
    resolve_device,
    return_freed_memory,
)

HEAP_IN_PIECES = """
from pathlib import Path
from esm2kit.core.hardware import return_freed_memory
resident = lambda: int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024
pieces = [bytearray(100_000) for _ in range(3_000)]
kept = pieces[::50]
del pieces
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_freed_memory_returns_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", HEAP_IN_PIECES], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 150, "about 290 MB were freed in pieces"


def test_an_allocator_without_malloc_trim_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    return_freed_memory()


def test_memory_use_follows_allocations_and_its_peak_stays() -> None:
    before = read_memory_use(torch.device("cpu"))
    with mmap.mmap(-1, 50_000_000) as mapped:  # new pages, which no allocator can serve from freed memory
        mapped.write(bytes(50_000_000))
        during = read_memory_use(torch.device("cpu"))
    assert during - before > 40_000_000
    assert read_memory_use(torch.device("cpu"), peak=True) > 0.98 * during  # the kernel counts in steps


def test_without_proc_the_peak_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = read_memory_use(torch.device("cpu"), peak=True)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert peak / 4 < read_memory_use(torch.device("cpu")) < peak * 4


def test_the_processor_has_a_name_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert cpu_name()


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "auto"),
    [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")],
)
def test_auto_is_a_gpu_that_torch_finds_and_no_other_is_accepted(
    has_cuda: bool, has_mps: bool, auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESM2KIT_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert resolve_device("auto") == auto
    assert resolve_device("cpu") == "cpu"
    for name, found in (("cuda", has_cuda), ("mps", has_mps)):
        if found:
            assert resolve_device(name) == name
        else:
            with refused("device.absent", requested=name):
                resolve_device(name)
    with refused("device.unknown", requested="gpu"):
        resolve_device("gpu")


def test_free_memory_is_that_of_the_narrowest_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of 1,000 bytes, 700 of them used and 200 of those cached files, in a group without a limit."""
    job = tmp_path / "cgroups" / "user" / "job"
    job.mkdir(parents=True)
    for folder, limit, used in ((job, "1000", "700"), (job.parent, "max", "900")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 500\nfile 250\ninactive_file 200\n")
    system, groups = tmp_path / "meminfo", tmp_path / "cgroup"
    system.write_text("MemTotal: 9 kB\nMemAvailable:       2 kB\nBuffers: 1 kB\n")
    groups.write_text("1:name=systemd:/other\n0::/user/job\n")
    paths = {"/proc/meminfo": system, "/proc/self/cgroup": groups}
    monkeypatch.setattr("esm2kit.core.hardware.Path", lambda path: paths[path])
    monkeypatch.setattr("esm2kit.core.hardware.CGROUPS", tmp_path / "cgroups")
    assert read_free_memory(torch.device("cpu")) == 500
    groups.write_text("0::/user\n")
    assert read_free_memory(torch.device("cpu")) == 2048, "the group has no limit, so it is what the system has"
    groups.unlink()
    assert read_free_memory(torch.device("cpu")) == 2048

"""Several devices of a node: esm2kit starts the processes itself, for embeddings and maps."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.embedding_fixtures import assert_same_files, random_proteins, write_fasta
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.core.launch import check_device_count, starts_workers
from esm2kit.embedding.config import EmbedConfig, MapConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.plan import Journal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def command(fasta: Path, out: Path, model: Path) -> list[str]:
    options = ["--out_dir", out, "--model", model, "--device", "cpu", "--devices", 2, "--batch_tokens", 64]
    return [sys.executable, "-m", "esm2kit", "embed", *map(str, [fasta, *options, "--per_residue"])]


def start(arguments: list[str]) -> subprocess.Popen:
    # a shell ignores SIGINT in background processes, which includes the tests
    code = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_module('esm2kit', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def find_workers(folder: Path) -> dict[int, int]:
    """Return the process id of each rank that writes to a run's folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                item.split("=", 1)
                for item in (process / "environ").read_text(encoding="utf-8").split("\0")
                if "=" in item
            )
            opened = [os.readlink(path) for path in (process / "fd").iterdir()]
        except OSError:
            continue
        if "RANK" in environment and any(str(folder) in path for path in opened):
            found[int(environment["RANK"])] = int(process.name)
    return found


@pytest.fixture
def long_run(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A FASTA file that takes some seconds, and the folder of the run that embeds it on two devices."""
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([30] * 12_000))
    return fasta, tmp_path / "out" / "a_embed.part"


def wait_for_both(folder: Path, process: subprocess.Popen) -> dict[int, int]:
    """Wait until both workers run and vectors have been written."""
    empty = b""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if len(found := find_workers(folder)) == 2 and all((folder / f"done.{rank}.bin").exists() for rank in found):
            written = (folder / "embeddings.h5").read_bytes()
            empty = empty or written
            if written != empty:
                return found
        time.sleep(0.1)
    raise AssertionError("the workers did not start")


def assert_resumes(arguments: list[str], fasta: Path, folder: Path, model: Path, atol: float = 0.0) -> None:
    """Check that an ended run has finished batches, resumes, and ends with the vectors of one process."""
    assert Journal(folder).read_done()
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming the unfinished run" in again.stderr
    out_dir = folder.parent.parent / "one"
    one = embed(EmbedConfig(fasta, out_dir, model=str(model), per_residue=True, batch_tokens=64, device="cpu"))
    assert_same_files(tuple(folder.parent / path.name for path in one.files), one.files, atol=atol)


def test_two_devices_give_the_files_of_one_with_one_set_of_lines(model: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([5, 30, 200, 17] * 20))
    run = subprocess.run(command(fasta, tmp_path / "two", model), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    config = EmbedConfig(fasta, tmp_path / "one", model=str(model), per_residue=True, batch_tokens=64, device="cpu")
    one = embed(config)
    assert_same_files(tuple(tmp_path / "two" / path.name for path in one.files), one.files)
    assert run.stderr.count("embedded ") == 1, run.stderr
    assert "started by torchrun" not in run.stderr
    share = int(re.search(r"embedded ([\d,]+) of", run.stderr)[1].replace(",", ""))
    assert 0 < share < 80 * 63, "each process embeds a share"


def test_in_python_the_result_and_the_errors_are_those_of_one_process(model: Path, tmp_path: Path, caplog) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 40))
    one = embed(EmbedConfig(fasta, tmp_path / "one", model=str(model), device="cpu"))
    caplog.set_level("INFO", logger="esm2kit")
    two = embed(EmbedConfig(fasta, tmp_path / "two", model=str(model), device="cpu", devices=2))
    assert two == one._replace(embeddings=tmp_path / "two" / "a_embeddings.h5", files=two.files)
    assert_same_files(two.files, one.files)
    assert caplog.text.count("residues/s") == 1
    write_fasta(fasta, {"p1": "MK1T"})
    with refused("fasta.sequence"):
        embed(EmbedConfig(fasta, tmp_path / "bad", model=str(model), device="cpu", devices=2))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_an_interrupted_run_on_two_devices_resumes(model: Path, tmp_path: Path, long_run) -> None:
    fasta, folder = long_run
    process = start(command(fasta, tmp_path / "out", model))
    workers = wait_for_both(folder, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.count("interrupted. Run the same command again to resume.") == 1, errors
    assert errors.count("stopped after") == 1, errors
    assert "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    assert_resumes(command(fasta, tmp_path / "out", model), fasta, folder, model)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("killed", ["a worker", "the parent"])
def test_a_killed_run_on_two_devices_leaves_no_process_and_resumes(
    model: Path,
    tmp_path: Path,
    long_run,
    killed: str,
) -> None:
    fasta, folder = long_run
    process = start(command(fasta, tmp_path / "out", model))
    workers = wait_for_both(folder, process)
    if killed == "a worker":
        os.kill(workers[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        line = "esm2kit: worker 1 was ended by SIGKILL. Run the same command again to resume.\n"
        assert errors.endswith(line), errors
        assert "Traceback" not in errors, errors
    else:
        process.kill()
        process.communicate(timeout=120)
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a worker still runs")
    again = subprocess.run(
        [*command(fasta, tmp_path / "out", model), "-q"], capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stderr) == (0, "")
    one = embed(EmbedConfig(fasta, tmp_path / "one", model=str(model), per_residue=True, batch_tokens=64, device="cpu"))
    assert_same_files(tuple(tmp_path / "out" / path.name for path in one.files), one.files)


def test_more_devices_than_gpus_is_one_line(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused("devices.missing", found=2, requested=3):
        check_device_count("cuda", 3)
    check_device_count("cuda", 2)
    check_device_count("cpu", 3)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20]))
    with refused("devices.missing", found=2, requested=3):
        embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), device="cuda", devices=3))
    assert not (tmp_path / "out").exists()


def test_a_map_passes_its_devices_on(tmp_path: Path) -> None:
    assert MapConfig(tmp_path, devices=3).embed_config().devices == 3
    with refused("option.range", name="devices", found=0):
        MapConfig(tmp_path, devices=0)


def test_a_worker_of_torchrun_starts_no_workers(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert starts_workers(2)
    assert not starts_workers(1)
    launch = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (launch | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    assert not starts_workers(2)
    assert not starts_workers(1), "the user called torchrun"
    with refused("devices.workers", found=2, expected=3):
        starts_workers(3)

"""An interrupt or a full disk at every write of every stage, or SIGKILL: nothing incomplete, a rerun completes it."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.finetune_fixtures import write_tasks, write_tiny_model

from esm2kit.cli.main import main
from esm2kit.embedding.hdf5 import EmbeddingReader

STAGES = ("embed", "neighbours", "score", "preprocess", "benchmark", "finetune", "predict", "pretrain")
# the results whose content does not depend on the time
RESULTS = {
    "embed": "a_embeddings.h5",
    "neighbours": "a_nearest.tsv",
    "score": "a_scores.tsv",
    "preprocess": "train.arrow",
    "benchmark": "predictions.npz",
    "finetune": "predictions.npz",
    "predict": "p.tsv",
    "pretrain": "checkpoints/last.safetensors",
}
# the file whose presence means that the stage is done, written last
FINISHED = RESULTS | {"preprocess": "manifest.json", "benchmark": "report.json", "score": "a_scores.json",
                      "neighbours": "a_neighbours.json",
                      "finetune": "finetune.json",
                      "pretrain": "pretrain.json"}  # fmt: skip
# a program that is killed at one of its writes: `{number} {command}`
KILLED = """
import os, signal, sys
import pytest
import torch
from esm2kit.cli.main import main
from test_interrupts import fail_at

with fail_at(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch()):
    sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread in this process and in those that it starts: sums of several threads differ in the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts")
    write_tiny_model(folder / "m.safetensors")
    write_tasks(folder / "tasks", 24)
    lines = [f">p{i}\n{'MKVLAGSTRE' * 2}{letter}\n" for i, letter in enumerate("ACDEFGHIKLMNPQRSTVWY")]
    (folder / "a.fasta").write_text("".join(lines), encoding="utf-8")
    for stage in ("preprocess", "finetune", "embed", "neighbours", "score", "benchmark", "predict", "pretrain"):
        assert main(command(stage, folder, folder / stage)) == 0
    return folder


def command(stage: str, work: Path, out: Path) -> list[str]:
    """Return a small command of a stage."""
    task = ["protein_class", "--data_dir", f"{work}/tasks", "--model", f"{work}/m.safetensors", "--out_dir", str(out)]
    few = ["--seeds", "0", "--resamples", "100", "--untrained", "false", "--baselines", '["majority"]']
    shape = ["--model", "custom", "--num_layers", "1", "--embed_dim", "16", "--attention_heads", "2"]
    steps = ["--max_steps", "2", "--accelerator", "cpu"]
    return {
        "embed": ["embed", f"{work}/a.fasta", "--model", f"{work}/m.safetensors", "--out_dir", str(out),
                  "--device", "cpu", "--workers", "1"],
        "neighbours": ["neighbours", f"{work}/a.fasta", "--reference", f"{work}/embed/a_embeddings.h5", "--out_dir",
                       str(out), "--device", "cpu", "--candidates", "3"],
        "score": ["score", f"{work}/a.fasta", "--model", f"{work}/m.safetensors", "--out_dir", str(out),
                  "--device", "cpu", "--workers", "1"],
        "preprocess": ["preprocess", f"{work}/a.fasta", "--val_size", "3", "--out_dir", str(out),
                       "--leakage_identity", "0"],
        "benchmark": ["benchmark", *task, *few],
        "finetune": ["finetune", *task, *steps, "--resamples", "100", "--benchmark", "false"],
        "predict": ["predict", f"{work}/a.fasta", "--model", f"{work}/finetune", "--out", f"{out}/p.tsv",
                    "--device", "cpu"],
        "pretrain": ["pretrain", "--data", f"{work}/preprocess", "--out_dir", str(out), *shape, *steps,
                     "--warmup_steps", "1"],
    }[stage]  # fmt: skip


@contextmanager
def fail_at(number: int, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Call `fault` in place of the write with this number; a write is a file's fsync or its move to its name."""
    writes: list[str] = []

    def wrap(function: Callable) -> Callable:
        def write(*arguments: object, **settings: object) -> object:
            if threading.current_thread() is threading.main_thread():
                writes.append(function.__name__)
                if len(writes) == number:
                    fault()
            return function(*arguments, **settings)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", wrap(os.fsync))
        patch.setattr(os, "replace", wrap(os.replace))
        yield writes


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_same_result(stage: str, found: Path, expected: Path) -> None:
    if stage == "embed":
        with EmbeddingReader(found / RESULTS[stage]) as one, EmbeddingReader(expected / RESULTS[stage]) as two:
            np.testing.assert_array_equal(one.matrix(), two.matrix())
    elif stage == "pretrain":
        from esm2kit import load_model

        for one, two in zip(*(load_model(path / RESULTS[stage])[0].parameters() for path in (found, expected)),
                            strict=True):  # fmt: skip
            np.testing.assert_array_equal(one.detach().numpy(), two.detach().numpy())
    else:
        assert (found / RESULTS[stage]).read_bytes() == (expected / RESULTS[stage]).read_bytes()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("fault", "code"), [(interrupt, 130), (fill_disk, 2)])
def test_a_fault_at_any_write(
    stage: str,
    fault: Callable[[], None],
    code: int,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fail at the first write, at the next one in the rerun of the same folder, and so on; then complete it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for number in range(1, 9):
            out = tmp_path / "out"
            capsys.readouterr()
            caplog.clear()
            # a shell's background processes ignore it, and so does Lightning after an interrupt
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with fail_at(number, fault, monkeypatch) as writes:
                found = main(command(stage, work, out))
            error = capsys.readouterr().err
            if len(writes) < number:
                assert found == 0
                break
            if found == 0 and "SIGINT: finishing this update" in caplog.text:  # training saves first, then exits
                continue
            assert found == code, error
            assert "Traceback" not in error
            last = error.strip().splitlines()[-1]
            assert last.startswith("esm2kit: ")
            assert ("interrupted" if code == 130 else "No space left on device") in last or "disk is full" in last
            if (out / FINISHED[stage]).exists():  # the fault came after the result
                break
        assert main(command(stage, work, out)) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert number > 1
    assert_same_result(stage, out, work / stage)
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


def list_finished(folder: Path) -> list[Path]:
    """List the files, without x.part and those in the folder y.part, which a killed process cannot remove."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(file for file in files if not any(part.endswith((".part", ".lock")) for part in file.parts))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("stage", "writes"),
    [
        ("predict", (1, 3, 5)),  # before the table has its name, after it, and before its manifest has its name
        ("benchmark", (2, 9, 13)),  # in the run of the embeddings, and where the rows and the report are saved
    ],
)
def test_killed_at_a_write(stage: str, writes: tuple[int, ...], work: Path, tmp_path: Path) -> None:
    """Kill the process at a write, its rerun in the same folder at another one, and so on; then complete it.

    The stages that resume, embedding, pretraining and fine-tuning, have tests of their own.
    """
    out, expected = tmp_path / "out", work / stage
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = [sys.executable, "-c", KILLED]
    for number in writes:
        killed = subprocess.run(
            [*program, str(number), *command(stage, work, out)], env=environment, capture_output=True, check=False
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
        for path in list_finished(out):  # complete, or absent
            if path.suffix in (".npz", ".safetensors", ".h5"):
                assert main(["check", str(out / path)]) == 0, path
        if (out / RESULTS[stage]).exists():
            assert_same_result(stage, out, expected)
    assert main(command(stage, work, out)) == 0
    assert_same_result(stage, out, expected)
    assert list_finished(out) == list_finished(expected)


@pytest.mark.parametrize("stage", STAGES)
def test_two_runs_at_once(
    stage: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command starts while the first one writes: one line, or the same result; the first one is not harmed."""
    codes = []
    with fail_at(1, lambda: codes.append(main(command(stage, work, tmp_path / "out"))), monkeypatch):
        assert main(command(stage, work, tmp_path / "out")) == 0
    error = capsys.readouterr().err
    assert codes == [0 if stage in ("benchmark", "predict") else 2]  # these two replace their result in one step
    assert "Traceback" not in error
    assert ("esm2kit: " in error) == (codes == [2])
    assert_same_result(stage, tmp_path / "out", work / stage)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]

"""Training in a separate process: its log lines, its result, its errors, and stopping it."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.errors import refused
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from esm2kit.core import torchrun
from esm2kit.core.errors import ERROR_FILE, InputError, read_recorded_error, record_error
from esm2kit.models.checkpoint import read_metadata
from esm2kit.notebook import live
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training import launch
from esm2kit.training.trainer import check_devices


def config(dataset: Path, out_dir: Path, **changes: object) -> PretrainConfig:
    settings = {
        "model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 2, "max_steps": 6, "warmup_steps": 1,
        "global_batch_size": 4, "val_check_interval": 3, "log_every_n_steps": 1, "accelerator": "cpu",
    }  # fmt: skip
    return PretrainConfig(data=dataset, out_dir=out_dir, **(settings | changes))


def test_a_run_gives_lines_result_and_configuration(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", str(os.getppid()))
    # with this variable a torchrun worker would take itself for a kernel and start workers of its own
    lines: list[str] = []
    result = launch.train("pretrain", config(dataset, tmp_path, devices=2), lines.append)
    assert result["step"] == 6
    assert Path(result["best"]).exists()
    assert any("update 6/6" in line for line in lines)
    assert (tmp_path / "pretrain.yaml").exists()


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes rank 0 run a statement while the other ranks wait."""
    script, command = tmp_path / "worker.py", launch.worker_command
    monkeypatch.setattr(launch, "worker_command", lambda *arguments: [*command(*arguments)[:-5], str(script)])

    def fail(statement: str) -> None:
        script.write_text(
            "import os, sys, time\n"
            "from esm2kit.cli import main as cli\n"
            "from esm2kit.core.errors import InputError\n"
            "def run(name, arguments):\n"
            "    if cli.rank():\n"
            "        time.sleep(60)\n"
            f"    {statement}\n"
            "cli._run = run\n"
            "sys.exit(cli.main(['pretrain']))\n"
        )

    return fail


@pytest.mark.parametrize("devices", [1, 2])
def test_the_workers_input_error_arrives_with_code_and_values(
    devices: int, failing: Callable[[str], None], tmp_path: Path
) -> None:
    failing(
        "from pathlib import Path; "
        "raise InputError('letter J at residue 3', code='fasta.letter', residue=3, path=Path('a'))"
    )
    lines: list[str] = []
    with refused("fasta.letter", residue=3, path="a") as caught:
        launch.train("pretrain", config(tmp_path, tmp_path, devices=devices), lines.append)
    assert str(caught.value) == "letter J at residue 3"
    assert lines == ["esm2kit: letter J at residue 3"], "one worker reports it once, and torchrun does not"


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("statement", "ending"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("os.kill(os.getpid(), 9)", "see the last lines of its log"),
    ],
)
def test_a_worker_that_crashes_or_is_killed(
    devices: int, statement: str, ending: str, failing: Callable[[str], None], tmp_path: Path
) -> None:
    failing(statement)
    with refused("worker.failed", stage="pretrain") as caught:
        launch.train("pretrain", config(tmp_path, tmp_path, devices=devices), lambda line: None)
    assert str(caught.value).endswith(ending)


def test_bad_input_in_a_real_run_raises_its_input_error(tmp_path: Path) -> None:
    with refused("dataset.missing", path=str(tmp_path / "nowhere")):
        launch.train("pretrain", config(tmp_path / "nowhere", tmp_path / "out"), lambda line: None)


def test_if_two_workers_fail_the_input_error_is_forwarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "0.json"))
    record_error(ConnectionError("the peer closed the connection"))
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "1.json"))
    record_error(InputError("bad letter", code="fasta.letter"))
    failures = {rank: ProcessFailure(rank, 1, rank + 1, str(tmp_path / f"{rank}.json")) for rank in (0, 1)}

    def fail() -> None:
        raise ChildFailedError("esm2kit", failures)

    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it if unset; monkeypatch restores it
    monkeypatch.setattr(torchrun.run, "main", fail)
    assert torchrun.main() == 2
    assert read_recorded_error(tmp_path / "error.json").code == "fasta.letter"
    del failures[1]
    with pytest.raises(ChildFailedError, match="esm2kit FAILED"):
        torchrun.main()


def test_missing_devices_are_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESM2KIT_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, accelerator in ((0, "cuda"), (1, "cuda"), (1, "auto")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        with refused("devices.missing", found=found, requested=2):
            check_devices(config(tmp_path, tmp_path, devices=2, accelerator=accelerator))
    check_devices(config(tmp_path, tmp_path, devices=2, accelerator="cpu"))
    monkeypatch.setenv("ESM2KIT_DEVICE", "cpu")
    check_devices(config(tmp_path, tmp_path, devices=2, accelerator="auto"))


def test_the_stop_button_saves_and_the_run_resumes(dataset: Path, tmp_path: Path) -> None:
    """The live view's button is pressed after the first validation; then the run resumes from its checkpoint."""
    endless = config(dataset, tmp_path, max_steps=1_000_000, warmup_steps=5)
    view = live.TrainingView("pretrain", tmp_path, endless.max_steps)
    seen = threading.Event()

    def show_line(line: str) -> None:
        view.show_line(line)
        if "val_loss" in line and not seen.is_set():
            seen.set()
            view.button.click()

    result = launch.train("pretrain", endless, show_line, view.set_worker)
    assert seen.is_set()
    assert 3 <= result["step"] < 1000
    last = tmp_path / "checkpoints" / "last.safetensors"
    assert read_metadata(last)["step"] == result["step"]
    assert view.button.disabled
    further = config(dataset, tmp_path, max_steps=result["step"] + 2, warmup_steps=5)
    assert pretrain(further)["step"] == result["step"] + 2
    assert json.loads((tmp_path / "pretrain.json").read_text())["step"] == result["step"] + 2


def test_headless_training_prints_the_workers_lines(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = live.train("pretrain", config(dataset, tmp_path))
    assert result["step"] == 6
    assert Path(result["best"]).exists()
    assert (tmp_path / "pretrain.yaml").exists()
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("update 6/6") for line in printed)
    assert not any(line.startswith("{") for line in printed), "the result is returned, not printed"


def test_only_informative_lines_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell and the live view omit the banners of torchrun and Lightning and the result."""
    banners = ["", "*" * 20, "-" * 20, '{"step": 3}', "INFO: Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2",
               "Initializing distributed: GLOBAL_RANK: 1, MEMBER: 2/2", "distributed_backend=gloo"]  # fmt: skip
    view = live.TrainingView("pretrain", tmp_path, 3)
    for line in ["update 3/3  loss 2.9", *banners]:
        view.show_line(line)
        live._print(line, "second: ")
    assert capsys.readouterr().out == "second: update 3/3  loss 2.9\n"
    assert view.line == "update 3/3  loss 2.9"

"""Which device `auto` means, and that the test suite uses no GPU of the machine that it runs on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.errors import refused
from support.stages import list_commands, write_inputs

from esm2kit.cli.main import main
from esm2kit.core.hardware import resolve_device

# A machine with a GPU, as the library sees it; any use of the GPU fails. It runs the commands in one process.
MACHINE_WITH_GPU = """
import json, sys
import torch
def fail(): raise RuntimeError("the GPU was used")
torch.cuda._lazy_init, torch.cuda.is_available, torch.cuda.device_count = fail, lambda: True, lambda: 1
from esm2kit.cli.main import main
print(json.dumps([main(command) for command in json.loads(sys.argv[1])]))
"""
# these use a device that resolve_device has chosen; models/packing.py is called by what runs on a CUDA GPU
RESOLVED = dict.fromkeys(
    ("core/launch.py", "training/trainer.py", "training/defaults.py", "models/packing.py"), "device_count"
)
COMPUTING = ("embed", "benchmark", "finetune", "pretrain", "map", "contacts", "score")


@pytest.mark.parametrize(
    ("requested", "variable", "gpu", "expected"),
    [
        ("auto", None, True, "cuda"),
        ("auto", None, False, "cpu"),
        ("auto", "", True, "cuda"),
        ("auto", "auto", True, "cuda"),
        ("auto", "cpu", True, "cpu"),
        ("auto", "cuda", True, "cuda"),
        ("cuda", "cpu", True, "cuda"),
        ("cpu", "cuda", True, "cpu"),
        ("cpu", "nonsense", False, "cpu"),
    ],
)
def test_the_environment_variable_is_what_auto_means(monkeypatch, requested, variable, gpu, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("ESM2KIT_DEVICE")
    if variable is not None:
        monkeypatch.setenv("ESM2KIT_DEVICE", variable)
    assert resolve_device(requested) == expected


def test_a_wrong_value_of_the_variable_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    write_inputs(tmp_path)
    monkeypatch.setenv("ESM2KIT_DEVICE", "gpu")
    with refused("device.unknown", requested="gpu"):
        resolve_device("auto")
    for command in list_commands(tmp_path, tmp_path / "out")[:3:2]:
        assert main(command) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("esm2kit: the environment variable ESM2KIT_DEVICE must be ")
        assert line.endswith("found 'gpu'")
    monkeypatch.setenv("ESM2KIT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("device.absent", found="cpu", requested="cuda"):
        resolve_device("auto")


def test_one_function_asks_torch_for_devices(root: Path) -> None:
    """Otherwise a stage could use a GPU that ESM2KIT_DEVICE excludes."""
    asking = re.compile(r"(?:cuda|mps|accelerator)\.(is_available|device_count)\(|get_device_name|current_accelerator")
    found = {
        path.relative_to(root / "esm2kit").as_posix(): match[1]
        for path in sorted((root / "esm2kit").rglob("*.py"))
        for match in asking.finditer(path.read_text(encoding="utf-8"))
    }
    assert found.pop("core/hardware.py")
    assert found == RESOLVED


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    write_inputs(folder)
    return folder


def run_with_gpu(commands: list[list[str]], work: Path, device: str) -> tuple[list[int], str]:
    """Run commands where torch reports a GPU; return their exit codes and stderr."""
    environment = os.environ | {"ESM2KIT_DEVICE": device}
    command = [sys.executable, "-c", MACHINE_WITH_GPU, json.dumps(commands)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_no_stage_uses_the_gpu_while_auto_is_the_cpu(work: Path, tmp_path: Path) -> None:
    commands = list_commands(work, tmp_path)
    codes, errors = run_with_gpu(commands, work, "cpu")
    assert codes == [0] * len(commands), errors


def test_every_stage_that_computes_uses_the_gpu_otherwise(work: Path, tmp_path: Path) -> None:
    """The counter-example: `auto` is the GPU, and the stages that compute on a device fail on the simulated one."""
    commands = list_commands(work, tmp_path)
    assert run_with_gpu(commands[1:2], work, "cpu")[0] == [0]  # the dataset of pretrain
    computing = [command for command in commands if command[0] in COMPUTING]
    codes, errors = run_with_gpu(computing, work, "auto")
    assert codes == [1] * len(computing), errors
    assert errors.count("the GPU was used") == len(computing)

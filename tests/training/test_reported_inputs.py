"""Environments from public bug reports, in which training must run as it does without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.finetune_fixtures import write_tasks, write_tiny_model

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
SBATCH = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
SBATCH |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}


def start(folder: Path, out: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("SLURM_")
    }
    command = [sys.executable, "-m", "esm2kit", "finetune", "protein_value", "--data_dir", folder, "--out_dir", out]
    command += ["--model", folder / "tiny.safetensors", "--max_steps", "2", "--benchmark", "false"]
    return subprocess.Popen(
        [*map(str, command), *options], env=plain | {"OMP_NUM_THREADS": "1"} | environment,  # which torchrun sets
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_tiny_model(path / "tiny.safetensors")
    return write_tasks(path, 60)


@pytest.fixture(scope="module")
def curve(folder: Path) -> list[str]:
    """The losses that training gives without a launcher."""
    process = start(folder, folder / "plain", {})
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return read_curve(folder / "plain")


def read_curve(out: Path) -> list[str]:
    """Read the update and the losses of each line of metrics.csv, without the clock."""
    names, *rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    kept = [names.index(name) for name in ("step", "train_loss", "val_loss")]
    return [" ".join(row[place] for place in kept) for row in rows]


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (SBATCH, "SLURM_NTASKS ignored"),
        ({"RANK": "abc"}, "RANK ignored (RANK is 'abc', not a number)"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "(MASTER_ADDR, MASTER_PORT not set)"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK ignored"),
    ],
)
def test_variables_of_a_launcher_that_did_not_start_the_process_change_nothing(
    folder: Path, curve: list[str], tmp_path: Path, environment: dict[str, str], line: str
) -> None:
    """Lightning-AI/pytorch-lightning#20391, #15011 (SLURM_NTASKS without srun), #16313 (LOCAL_RANK in a container)."""
    process = start(folder, tmp_path / "out", environment)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert line in output.splitlines()[0]
    assert read_curve(tmp_path / "out") == curve


def test_tasks_of_srun_train_as_workers_of_torchrun_do(folder: Path, tmp_path: Path) -> None:
    """srun needs no --ntasks-per-node, which Lightning's own class requires."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "127.0.0.1"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "LOCAL_RANK": "0"}
    tasks = [
        start(folder, tmp_path / "srun", step | {"SLURM_PROCID": place, "SLURM_LOCALID": place}, "--devices", "2")
        for place in "01"
    ]
    outputs = [task.communicate(timeout=180)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "started by srun: rank 0 of 2" in outputs[0]
    torchrun = start(folder, tmp_path / "torchrun", {}, "--devices", "2")
    output = torchrun.communicate(timeout=180)[0]
    assert torchrun.returncode == 0, output
    assert read_curve(tmp_path / "srun") == read_curve(tmp_path / "torchrun")

"""Misuse of the notebooks: a stale checkpoint, another size in the same folder, two runs in one folder, no network, a
read-only folder. Each ends in a one-line error, and no existing file is lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.errors import refused

from esm2kit.cli.main import main
from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.files import sha256_file, to_json
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.notebook.pickers import models as pickers
from esm2kit.notebook.records import work_folder
from esm2kit.notebook.runs.headless import read_parameters
from esm2kit.notebook.runs.run import RunConfig, run
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain
from esm2kit.training.resume import find_resume_point, lock_run_folder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"num_layers": 1, "embed_dim": 16, "attention_heads": 2, "max_steps": 2, "warmup_steps": 1, "seed": 0,
            "global_batch_size": 2, "val_check_interval": 2, "accumulate_grad_batches": 1, "lr": 0.003}  # fmt: skip
NOWHERE = "http://127.0.0.1:9"  # a proxy that does not exist: no network


@pytest.fixture
def work(tmp_path: Path, dataset: Path) -> Path:
    """A work folder after notebooks 01 and 02."""
    shutil.copytree(dataset, tmp_path / "work" / "dataset")
    train(tmp_path / "work")
    return tmp_path / "work"


def train(work: Path, **changes: int) -> None:
    settings = SETTINGS | changes
    pretrain(PretrainConfig(work / "dataset", out_dir=work / "pretrain", model="custom", accelerator="cpu", **settings))


def run_alone(folder: Path, notebook: str, **parameters: object) -> str:
    """Run one notebook in a clean kernel and return its error."""
    root = folder / "clone"
    if not root.exists():
        (root / "papermill_runs").mkdir(parents=True)
        # a copy, because `..` of a symbolic link would be this repository, with its runs
        shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
        (root / "data").symlink_to(ROOT / "data")
    (root / "papermill_runs" / "tiny.yaml").write_text(yaml.safe_dump({notebook: parameters}))
    with refused("run.notebook-failed", notebook=notebook) as caught:
        run(RunConfig(tier="tiny", root=root))
    return caught.value.values["error"]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*")) if path.is_file() and path.suffix}


@pytest.mark.parametrize("notebook", ["03_embed", "04_benchmark", "05_finetune"])
def test_a_checkpoint_whose_size_differs_from_its_record(work: Path, notebook: str) -> None:
    record = work / "pretrain" / "pretrain.json"
    content = json.loads(record.read_text())
    content["model"]["embed_dim"] = 32
    write_sealed_json(record, {key: value for key, value in content.items() if key != "sha256"})
    before = hashes(work / "pretrain" / "checkpoints")
    line = run_alone(work.parent, notebook, work_dir=str(work), model="")
    assert "has 1 layer × 16, but pretrain.json records 1 layer × 32" in line
    assert "Run 02_pretrain again" in line
    assert hashes(work / "pretrain" / "checkpoints") == before


def test_training_another_size_in_the_same_folder_is_refused_and_keeps_the_first(work: Path) -> None:
    before = hashes(work / "pretrain" / "checkpoints")
    line = run_alone(work.parent, "02_pretrain", work_dir=str(work), **SETTINGS | {"embed_dim": 32})
    assert "belongs to another run: embed_dim was 16 and is now 32. Set overwrite to True to start over" in line
    assert hashes(work / "pretrain" / "checkpoints") == before
    assert len(before) == 2, "the best and the last"


def test_after_training_at_another_size_the_next_notebooks_take_the_new_model(work: Path, sample: Path) -> None:
    """Embed with the first model as notebook 03 does, then with the second, in the same folder."""
    widths = []
    for width in (16, 32):
        train(work, embed_dim=width, resume_if_exists=width == 16)
        view = pickers.model_picker("", work)
        assert f"1 layer × {width}" in view.card.value
        config = EmbedConfig(
            fasta=sample / "uniref50_valid.fasta", out_dir=work / "embeddings", model=view.value, device="cpu"
        )
        with EmbeddingReader(embed(config, replace=True).embeddings) as reader:
            widths.append(reader.matrix().shape[1])
    assert widths == [16, 32], "stale vectors were used for the new model"


@pytest.mark.parametrize("changed", ["data", "model"])
def test_a_run_does_not_resume_with_another_input_of_the_same_name(changed: str, tmp_path: Path) -> None:
    """Fine-tuning of a checkpoint that was retrained under the same path."""
    config = FinetuneConfig(out_dir=tmp_path, max_steps=1, global_batch_size=2)
    inputs = {"data": {"sha256": "a" * 64}, "model": {"sha256": "b" * 64}}
    manifest = {"config": to_json(config), "inputs": inputs}
    metadata = {"provenance": manifest, "global_batch_size": 2, "step": 1}
    write_checkpoint(tmp_path / "checkpoints" / "last.safetensors", {"model.x": torch.zeros(1)}, metadata)
    assert find_resume_point(tmp_path, config, manifest).step == 1
    other = manifest | {"inputs": inputs | {changed: {"sha256": "c" * 64}}}
    with refused("resume.another-run") as caught:
        find_resume_point(tmp_path, config, other)
    assert f"the {changed}'s sha256 was" in str(caught.value)
    assert str(caught.value).count("is now") == 1


def test_a_notebook_does_not_train_in_the_folder_of_a_running_process(work: Path) -> None:
    before = hashes(work / "pretrain" / "checkpoints")
    with lock_run_folder(work / "pretrain"):
        line = run_alone(work.parent, "02_pretrain", work_dir=str(work), **SETTINGS | {"max_steps": 4})
    assert "another run is training here; stop it, or choose another --out_dir" in line
    assert hashes(work / "pretrain" / "checkpoints") == before


@pytest.mark.parametrize(
    ("notebook", "parameters", "message"),
    [
        ("03_embed", {"model": "esm2_t6_8M_UR50D"}, r"is not in the cache, and .* cannot be reached"),
        ("04_benchmark", {"task": "gb1"}, r"could not download gb1 .*Copy two_vs_rest\.fasta to .* by hand"),
    ],
)
def test_no_network(
    work: Path, notebook: str, parameters: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOWHERE)
        monkeypatch.setenv(name.lower(), NOWHERE)
    monkeypatch.setenv("HF_HOME", str(work / "empty"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if notebook == "04_benchmark":
        parameters = parameters | {"data_dir": str(work / "flip")}
    line = run_alone(work.parent, notebook, work_dir=str(work), **parameters)
    assert re.search(message, line), line


def test_a_work_folder_that_cannot_be_written_fails_first(tmp_path: Path) -> None:
    """A file in place of the folder, and /proc, where even root cannot write."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "work", Path("/proc/work")):
        with refused("work-dir.unwritable", path=str(place)):
            work_folder(place)
    assert (tmp_path / "file").read_text() == "mine"
    line = run_alone(tmp_path, "01_preprocess", work_dir=str(tmp_path / "file" / "work"))
    assert line.startswith("cell 2: InputError: cannot write to")
    assert list(work_folder(tmp_path / "new" / "work").iterdir()) == [], "the check leaves no files"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_checks_its_folder_first(path: Path) -> None:
    assert "work_dir" in read_parameters(path)
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert "work_folder(work_dir)" in "".join(cells[1]["source"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["preprocess", "--train_fasta", "{sample}/uniref50_valid.fasta", "--out_dir", "{place}", "--val_size", "0.5"],
        ["pretrain", "--data", "{dataset}", "--out_dir", "{place}", "--max_steps", "1"],
    ],
)
def test_a_command_that_cannot_write_prints_one_line(
    arguments: list[str], tmp_path: Path, sample: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "out"
    assert main([argument.format(sample=sample, dataset=dataset, place=place) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esm2kit: ")]
    assert len(errors) == 1
    assert "is a file, not a folder" in errors[0]
    assert (tmp_path / "file").read_text() == "mine"

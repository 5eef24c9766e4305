"""`esm2kit check`: complete files are counted, and every damaged one is named, whatever kind it is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support import damage
from support.errors import refused

from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a checkpoint, embeddings and two reports, next to a FASTA file."""
    root = tmp_path_factory.mktemp("artefacts")
    for name, build in (
        ("dataset", damage.build_dataset),
        ("model", damage.build_checkpoint),
        ("vectors", damage.build_embeddings),
        ("reports", damage.build_reports),
    ):
        (root / name).mkdir()
        build(root / name)
    return root


def test_undamaged_files_are_counted(artefacts: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(artefacts)]) == 0
    assert "agree with their checksums" in capsys.readouterr().out
    assert check(CheckConfig(artefacts / "model")).startswith("1 files (0.1 MB) agree with their checksums")
    names = {path.name for path in (artefacts / "dataset" / "data").iterdir()}
    summary = check(CheckConfig(artefacts / "dataset" / "data"))
    assert summary.startswith(f"{len(names)} files (")
    assert "other files" not in summary, "the manifest has the checksums of all files"


@pytest.mark.parametrize(
    "name",
    [
        "dataset/data/train.arrow",
        "dataset/data/cluster_members.npy",
        "dataset/data/manifest.json",
        "model/small.safetensors",
        "vectors/out/in_embeddings.h5",
        "vectors/out/in_hiddens.h5",
        "reports/a/report.json",
        "reports/b/predictions.npz",
    ],
)
@pytest.mark.parametrize("place", [0.0, 0.15, 0.3, 0.95])
def test_a_damaged_file_is_named(name: str, place: float, artefacts: Path, tmp_path: Path) -> None:
    if name.endswith(".npz") and place > 0.5:
        place = 0.45  # dates and modes at the end of a zip file have no checksum, and nobody reads them
    copy = tmp_path / "copy"
    shutil.copytree(artefacts / name.split("/")[0], copy)
    path = copy.joinpath(*name.split("/")[1:])
    content = np.fromfile(path, np.uint8)
    content[int(place * content.size) : int(place * content.size) + 16] ^= 0x15
    content.tofile(path)
    with refused("check.damaged") as error:
        check(CheckConfig(copy))
    assert str(path) in str(error.value)


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    with refused("check.absent", path=tmp_path / "nowhere"):
        check(CheckConfig(tmp_path / "nowhere"))
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    with refused("check.nothing", path=tmp_path):
        check(CheckConfig(tmp_path))

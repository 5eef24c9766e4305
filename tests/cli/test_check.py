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
    assert check(CheckConfig(artefacts / "model")).startswith("1 file (0.1 MB) agrees with its checksum")
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


def flip_last_byte(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[-1] ^= 0x15
    content.tofile(path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("vectors/out/in_embeddings.h5", "vectors.hdf5"),
        ("vectors/out/in_embeddings.h5", "part.h5.part"),
        ("model/small.safetensors", "weights.bin"),
    ],
)
def test_files_are_recognised_by_their_content(source: str, name: str, artefacts: Path, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copy(artefacts / source, copy)
    assert check(CheckConfig(copy)).startswith("1 file (")
    flip_last_byte(copy)
    with refused("check.damaged", path=tmp_path) as error:
        check(CheckConfig(tmp_path))
    assert str(copy) in str(error.value)


def test_damaged_checksums_do_not_hide_a_file_with_another_name(artefacts: Path, tmp_path: Path) -> None:
    content = bytearray((artefacts / "vectors" / "out" / "in_embeddings.h5").read_bytes())
    content[5] ^= 1
    (tmp_path / "mine.h5").write_bytes(content)
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert "mine.h5 is damaged: it has no checksums" in str(error.value)


@pytest.mark.parametrize("name", ["any.h5", "any.hdf5", "any.safetensors", "any.npz", "train.arrow", "report.json"])
def test_an_empty_file_is_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert f"{tmp_path / name} is damaged: it is empty" in str(error.value)


def test_one_file_of_a_dataset_is_checked_against_its_manifest(artefacts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(artefacts / "dataset" / "data", folder)
    for name in ("train.arrow", "cluster_offsets.npy"):
        assert check(CheckConfig(folder / name)).startswith("1 file (")
        flip_last_byte(folder / name)
        with refused("check.damaged", path=folder / name) as error:
            check(CheckConfig(folder / name))
        assert f"{folder / name} is damaged: its content differs" in str(error.value)


def test_a_dataset_without_manifest_is_not_finished(artefacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artefacts / "dataset" / "data", tmp_path / "data")
    shutil.copy(artefacts / "model" / "small.safetensors", tmp_path)
    (tmp_path / "data" / "manifest.json").unlink()
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert f"{tmp_path / 'data' / 'train.arrow'} is damaged: its manifest.json is missing" in str(error.value)


def test_a_report_is_checked_together_with_its_predictions(artefacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artefacts / "reports", tmp_path / "reports")
    one, two = (tmp_path / "reports" / name / "predictions.npz" for name in "ab")
    assert check(CheckConfig(one.parent / "report.json")).startswith("1 file (")
    shutil.copy(one, two)
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert len(error.value.values["damaged"]) == 1
    assert str(two) in str(error.value)
    one.unlink()
    with refused("check.damaged") as error:
        check(CheckConfig(one.parent / "report.json"))
    assert f"{one} was not found" in str(error.value)


@pytest.mark.parametrize("text", ["{}", '{"schema": "esm2kit.report/3"}', "", '{"sha256": '])
def test_a_report_whose_checksum_is_gone_is_damaged(text: str, artefacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artefacts / "reports" / "a", tmp_path / "a")
    (tmp_path / "a" / "report.json").write_text(text, encoding="utf-8")
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert f"{tmp_path / 'a' / 'report.json'}" in str(error.value)


def test_files_of_other_programs_are_not_called_damaged(artefacts: Path, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{ // a comment\n}", encoding="utf-8")
    (tmp_path / "other.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    shutil.copy(artefacts / "model" / "small.safetensors", tmp_path)
    assert check(CheckConfig(tmp_path)).endswith("; 3 other files have no checksum of their own")


def test_links_are_followed_once_and_one_without_a_target_is_damaged(artefacts: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(artefacts / "model")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert check(CheckConfig(tmp_path)).startswith("1 file (")
    (tmp_path / "gone_embeddings.h5").symlink_to(tmp_path / "nowhere")
    with refused("check.damaged") as error:
        check(CheckConfig(tmp_path))
    assert "gone_embeddings.h5 is damaged: it is a link to a file that does not exist" in str(error.value)
    with refused("check.damaged"):
        check(CheckConfig(tmp_path / "gone_embeddings.h5"))


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    with refused("check.absent", path=tmp_path / "nowhere"):
        check(CheckConfig(tmp_path / "nowhere"))
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    with refused("check.nothing", path=tmp_path):
        check(CheckConfig(tmp_path))

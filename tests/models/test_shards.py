"""Distributed checkpoints come in whole, and nothing in them runs, whatever they hold."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats import shards
from esm2kit.models.formats.huggingface import build_hf_config, save_hf
from esm2kit.models.load import load_model

CONFIG = ESM2Config(2, 32, 4)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves too


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Both forms of one model's checkpoint, sharded over two processes by torch itself."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(root / "tests" / "support" / "dcp_worker.py"), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A distributed checkpoint to be damaged."""
    return Path(shutil.copytree(saved / "dcp", tmp_path / "dcp"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the storage entry of one tensor in `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if key.fqn.endswith("esm2.embed_tokens.weight"))
    for name, value in changes.items():
        setattr(metadata.storage_data[key], name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_both_forms_sharded_over_two_processes_come_in_whole(saved: Path) -> None:
    expected = torch.load(saved / "whole.pt", weights_only=True)
    assert not torch.equal(expected["layers.0.fc1.weight"], ESM2.initialised(CONFIG, 3).layers[0].fc1.weight), "stepped"
    digests = set()
    for form in ("dcp", "shards"):
        assert len(shards.shard_files(saved / form)) == 2, "one file a process"
        model, source = load_model(saved / form)
        assert (source.name, source.format) == (form, "distributed")
        digests.add(source.sha256)
        assert model.config == CONFIG
        assert not model.training
        for name, tensor in expected.items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert model.lm_head.weight is model.embed_tokens.weight
    assert len(digests) == 2


def test_the_digest_is_of_every_file(copy: Path) -> None:
    before = load_model(copy)[1].sha256
    assert load_model(copy)[1].sha256 == before
    with open(copy / "__1_0.distcp", "ab") as file:
        file.write(b"x")
    assert load_model(copy)[1].sha256 != before


@pytest.mark.parametrize("prefix", ["", "module.", "model.esm2."])
def test_one_process_and_any_prefix(tmp_path: Path, prefix: str) -> None:
    model = ESM2.initialised(CONFIG, seed=4)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = load_model(tmp_path / "dcp")[0]
    assert loaded.config == CONFIG, "the heads follow from the contact head"
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_hugging_face_shards_with_a_config(saved: Path, tmp_path: Path) -> None:
    model = ESM2.initialised(CONFIG, seed=4)
    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)), no_dist=True)
    assert load_model(tmp_path)[1].format == "huggingface"
    (tmp_path / "model.safetensors.index.json").unlink()
    whole = next(tmp_path.glob("model-*.safetensors"))
    halves = ({}, {})
    for name, tensor in state.items():
        cut = tensor.shape[0] // 2 if tensor.dim() else 0
        for half, part, first in ((halves[0], tensor[:cut], 0), (halves[1], tensor[cut:], cut)):
            if part.numel():
                half[name] = (part.clone(), [first] + [0] * (tensor.dim() - 1))
    for number, half in enumerate(halves, 1):
        told = {name: {"saved_offsets": place} for name, (_, place) in half.items()}
        save_file(
            {name: part for name, (part, _) in half.items()},
            tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": json.dumps(told)},
        )
    whole.unlink()
    loaded, _ = load_model(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "config.json").unlink()
    with refused("checkpoint.not-esm2", name="embed_tokens.weight", found=0):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(build_hf_config(CONFIG)))
    next(tmp_path.glob("shard-00002*")).unlink()
    with refused("checkpoint.tensor", name="emb_layer_norm_after.bias"):
        load_model(tmp_path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("echo this must never run > evil.txt",)


HOSTILE = {
    "a call": pickle.dumps(Evil()),
    "a call within": pickle.dumps({"state_dict_metadata": {"a": Evil()}}),
    "an attribute of torch": b"\x80\x04\x8c\x05torch\x8c\x12serialization.load\x93\x8c\x08evil.txt\x85R.",
    "eval": b'c__builtin__\neval\n(S\'open("evil.txt", "w")\'\ntR.',
    "a module": b"cos\nsystem\n(S'touch evil.txt'\ntR.",
    "a reference outside": b"\x80\x04\x8c\x08evil.txtQ.",
    "an extension": b"\x80\x02\x82\x01.",
}


def is_refused(folder: Path, told: str) -> None:
    """Loading ends with one line that says this."""
    with pytest.raises(InputError, match=told) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_with_code_are_refused_in_one_line_and_nothing_runs(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(copy)
    (copy / ".metadata").write_bytes(HOSTILE[name])
    is_refused(copy, r"\.metadata: (refused, it names|refused, it refers|not a distributed)")
    assert not (copy / "evil.txt").exists()
    if name == "a call":
        pickle.loads(HOSTILE[name])
        assert (copy / "evil.txt").exists(), "the file would have run its code"


def test_a_state_for_a_known_class_changes_no_class_of_torch(copy: Path) -> None:
    before = dict(vars(dcp.metadata.Metadata))
    names = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    (copy / ".metadata").write_bytes(names + b"}\x8c\x07version\x8c\x01xsb.")
    with refused("checkpoint.damaged"):
        load_model(copy)
    assert dict(vars(dcp.metadata.Metadata)) == before


def test_a_part_with_code_is_refused_and_nothing_runs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    for payload, told in ((Evil(), "is no plain tensor"), ({"a": 1}, "is dict and no tensor")):
        torch.save(payload, copy / "__7_0.distcp")
        rewrite(copy, relative_path="__7_0.distcp", offset=0, length=(copy / "__7_0.distcp").stat().st_size)
        is_refused(copy, rf"__7_0\.distcp: refused, the part of .*embed_tokens\.weight {told}")
        assert not (copy / "evil.txt").exists()


@pytest.mark.parametrize(
    "part",
    [
        torch.zeros(1).expand(1 << 36),
        torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0), (1 << 36,), check_invariants=True),
        torch.zeros(1 << 36, device="meta"),
    ],
    ids=["stride 0", "sparse", "meta"],
)
def test_a_part_larger_than_its_bytes_is_refused_before_it_takes_memory(copy: Path, part: torch.Tensor) -> None:
    torch.save(part, copy / "__7_0.distcp")
    size = (copy / "__7_0.distcp").stat().st_size
    assert size < 4096
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=size)
    with refused("checkpoint.not-tensors", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


def test_a_part_that_would_unpack_to_more_than_its_bytes_is_refused(copy: Path) -> None:
    plain, packed = io.BytesIO(), copy / "__7_0.distcp"
    torch.save(torch.zeros(1 << 18), plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for member in stored.infolist():
            deflated.writestr(member.filename, stored.read(member))
    size = packed.stat().st_size
    assert size < 1 << 13
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=size)
    is_refused(copy, "is no plain tensor .it would unpack to more than its bytes.")


@pytest.mark.parametrize("content", [b"\x80\x02)R.", b"\x80\x02.", b"\x80\x02h\x05.", b"PK", b""])
def test_a_part_that_is_no_whole_pickle_is_one_line(copy: Path, content: bytes) -> None:
    (copy / "__7_0.distcp").write_bytes(content)
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=len(content))
    is_refused(copy, r"__7_0\.distcp: refused, the part of .* is no plain tensor")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"relative_path": "../elsewhere.distcp"}, "which is no .distcp file beside it"),
        ({"relative_path": "/etc/passwd"}, "which is no .distcp file beside it"),
        ({"relative_path": "__9_0.distcp"}, r"__9_0\.distcp is absent; copy every file"),
        ({"offset": 1 << 40}, "should reach to"),
        ({"offset": -1}, "no whole numbers"),
        ({"offset": 7}, "is no plain tensor"),
        ({"length": "1"}, "no whole numbers"),
        ({"transform_descriptors": ["zstd"]}, r"is stored through \['zstd'\]; save it without extensions"),
    ],
)
def test_entries_that_point_elsewhere(copy: Path, changes: dict[str, Any], told: str) -> None:
    rewrite(copy, **changes)
    is_refused(copy, told)


def test_parts_that_do_not_make_up_a_tensor(copy: Path) -> None:
    original = (copy / ".metadata").read_bytes()
    metadata = pickle.loads(original)
    keys = [key for key in metadata.storage_data if key.fqn == "state_dict.esm2.embed_tokens.weight"]
    assert len(keys) == 2
    metadata.storage_data[dcp.metadata.MetadataIndex(keys[0].fqn, [30, 0])] = metadata.storage_data.pop(keys[0])
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("shards.outside", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)
    metadata = pickle.loads(original)
    del metadata.storage_data[keys[1]]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("shards.absent", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)
    metadata = pickle.loads(original)
    metadata.state_dict_metadata[keys[0].fqn].size = torch.Size([1 << 40, 32])
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("shards.absent", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


@pytest.fixture(scope="module")
def sound(saved: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the undamaged checkpoint, its optimizer's too."""
    opened = shards.open_shards(saved / "dcp")
    return {name: opened.read(name) for name in sorted(opened.shapes)}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_metadata_are_one_line_or_the_same_tensors(
    saved: Path, sound: dict[str, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    """What still comes under a tensor's own name is that tensor; a damaged name is another's and is not compared.

    One fixed sample of damages: torch puts no checksum on `.metadata`, so one that happens to point at another whole
    part of the same shape could not be told.
    """
    folder = tmp_path / "dcp"
    if not folder.exists():
        shutil.copytree(saved / "dcp", folder)
    whole = bytearray((saved / "dcp" / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2, 1, 0]))])
    name = data.draw(st.sampled_from(sorted(sound)))
    told, found = "", None
    try:
        opened = shards.open_shards(folder)
        found = opened.read(name) if name in opened.shapes else None
    except InputError as error:
        told = str(error)
    assert "\n" not in told
    assert found is None or torch.equal(found, sound[name]), name


def test_parts_that_overlap_are_refused(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if key.fqn == "state_dict.esm2.embed_tokens.weight")
    metadata.storage_data[dcp.metadata.MetadataIndex(key.fqn, [3, 0])] = metadata.storage_data[key]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("shards.overlap", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


def test_safetensors_shards_that_contradict_one_another(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "shards", tmp_path / "shards"))
    first, second = shards.shard_files(folder)
    shutil.copy(first, folder / "shard-00009-model-00001-of-00001.safetensors")
    with refused("shards.overlap", name="contact_head.regression.bias"):
        load_model(folder)
    (folder / "shard-00009-model-00001-of-00001.safetensors").unlink()
    part = load_file(second)["embed_tokens.weight"]
    for place, told in (
        ("here", "does not say where"),
        ([-1, 0], "does not say where"),
        ([9], "does not fit its shape"),
        ([99999999, 0], "are absent"),
    ):
        info = json.dumps({"embed_tokens.weight": {"saved_offsets": place}})
        save_file({"embed_tokens.weight": part}, second, {"DCP_SHARDING_INFO": info})
        with pytest.raises(InputError, match=told):
            shards.open_shards(folder).read("embed_tokens.weight")
    second.write_bytes(second.read_bytes()[:200])
    with refused("checkpoint.damaged"):
        load_model(folder)


def test_a_checkpoint_that_is_not_one_esm2(tmp_path: Path) -> None:
    state = ESM2.initialised(CONFIG, seed=4).state_dict()
    for number, (content, told) in enumerate(
        [
            ({"fc.weight": torch.zeros(3)}, r"0 tensors are called embed_tokens\.weight"),
            (state | {"embed_tokens.weight": torch.tensor(1.0)}, r"embed_tokens\.weight is \(\), ESM-2 has \(tokens"),
            ({f"{side}.{name}": tensor for name, tensor in state.items() for side in "ab"}, "2 tensors are called"),
            (
                {name: t for name, t in state.items() if "inv_freq" not in name and "contact" not in name},
                "how many heads",
            ),
            ({name: t for name, t in state.items() if name != "layers.1.fc2.bias"}, r"layers\.1\.fc2\.bias' is"),
        ]
    ):
        dcp.save(content, checkpoint_id=tmp_path / str(number), no_dist=True)
        is_refused(tmp_path / str(number), told)

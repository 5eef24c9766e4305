"""Distributed checkpoints load completely; damaged and hostile ones are rejected without running code."""

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
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.load import load_model

CONFIG = ESM2Config(2, 32, 4)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves too


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Save a model in both formats with torch, sharded over two processes."""
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
    """Copy the distributed checkpoint, to be damaged."""
    return Path(shutil.copytree(saved / "dcp", tmp_path / "dcp"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the storage entry of one tensor in `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if key.fqn.endswith("esm2.embed_tokens.weight"))
    for name, value in changes.items():
        setattr(metadata.storage_data[key], name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_both_formats_sharded_over_two_processes_load_completely(saved: Path) -> None:
    expected = torch.load(saved / "whole.pt", weights_only=True)
    assert not torch.equal(expected["layers.0.fc1.weight"], ESM2.initialised(CONFIG, 3).layers[0].fc1.weight), (
        "the weights were updated"
    )
    digests = set()
    for form in ("dcp", "shards"):
        assert len(shards.shard_files(saved / form)) == 2, "one file per process"
        model, source = load_model(saved / form)
        assert (source.name, source.format) == (form, "distributed")
        digests.add(source.sha256)
        assert model.config == CONFIG
        assert not model.training
        for name, tensor in expected.items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert model.lm_head.weight is model.embed_tokens.weight
    assert len(digests) == 2


def test_the_digest_covers_every_file(copy: Path) -> None:
    before = load_model(copy)[1].sha256
    assert load_model(copy)[1].sha256 == before
    with open(copy / "__1_0.distcp", "ab") as file:
        file.write(b"x")
    assert load_model(copy)[1].sha256 != before


@pytest.mark.parametrize("prefix", ["", "module.", "model.esm2."])
def test_any_prefix_of_tensor_names_is_removed(tmp_path: Path, prefix: str) -> None:
    model = ESM2.initialised(CONFIG, seed=4)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = load_model(tmp_path / "dcp")[0]
    assert loaded.config == CONFIG, "the number of heads is inferred from the contact head"
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_hugging_face_shards_with_a_config(saved: Path, tmp_path: Path) -> None:
    model = ESM2.initialised(CONFIG, seed=4)
    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)), no_dist=True)
    assert load_model(tmp_path)[1].format == "huggingface"
    (tmp_path / "model.safetensors.index.json").unlink()
    single = next(tmp_path.glob("model-*.safetensors"))
    halves = ({}, {})
    for name, tensor in state.items():
        cut = tensor.shape[0] // 2 if tensor.dim() else 0
        for half, part, first in ((halves[0], tensor[:cut], 0), (halves[1], tensor[cut:], cut)):
            if part.numel():
                half[name] = (part.clone(), [first] + [0] * (tensor.dim() - 1))
    for number, half in enumerate(halves, 1):
        sharding = {name: {"saved_offsets": offset} for name, (_, offset) in half.items()}
        save_file(
            {name: part for name, (part, _) in half.items()},
            tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": json.dumps(sharding)},
        )
    single.unlink()
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
    "a nested call": pickle.dumps({"state_dict_metadata": {"a": Evil()}}),
    "an attribute of torch": b"\x80\x04\x8c\x05torch\x8c\x12serialization.load\x93\x8c\x08evil.txt\x85R.",
    "eval": b'c__builtin__\neval\n(S\'open("evil.txt", "w")\'\ntR.',
    "a module": b"cos\nsystem\n(S'touch evil.txt'\ntR.",
    "an external reference": b"\x80\x04\x8c\x08evil.txtQ.",
    "an extension": b"\x80\x02\x82\x01.",
}


def assert_rejected(folder: Path, message: str) -> None:
    """Loading raises a one-line InputError that matches a pattern."""
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_with_code_are_rejected_and_the_code_does_not_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(copy)
    (copy / ".metadata").write_bytes(HOSTILE[name])
    assert_rejected(copy, r"\.metadata: the (file contains code|file refers to an external|metadata of the)")
    assert not (copy / "evil.txt").exists()
    if name == "a call":
        pickle.loads(HOSTILE[name])
        assert (copy / "evil.txt").exists(), "without the check the code would run"


def test_a_state_for_an_allowed_class_does_not_change_the_class(copy: Path) -> None:
    before = dict(vars(dcp.metadata.Metadata))
    names = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    (copy / ".metadata").write_bytes(names + b"}\x8c\x07version\x8c\x01xsb.")
    with refused("checkpoint.damaged"):
        load_model(copy)
    assert dict(vars(dcp.metadata.Metadata)) == before


def test_a_part_with_code_is_rejected_and_the_code_does_not_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    for payload, message in ((Evil(), "is not a plain tensor"), ({"a": 1}, "is not a tensor but dict")):
        torch.save(payload, copy / "__7_0.distcp")
        rewrite(copy, relative_path="__7_0.distcp", offset=0, length=(copy / "__7_0.distcp").stat().st_size)
        assert_rejected(copy, rf"__7_0\.distcp: the part of .*embed_tokens\.weight' {message}")
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
def test_a_part_larger_than_its_data_is_rejected_before_memory_is_allocated(copy: Path, part: torch.Tensor) -> None:
    torch.save(part, copy / "__7_0.distcp")
    size = (copy / "__7_0.distcp").stat().st_size
    assert size < 4096
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=size)
    with refused("checkpoint.not-tensors", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


def test_a_compressed_part_is_rejected(copy: Path) -> None:
    plain, packed = io.BytesIO(), copy / "__7_0.distcp"
    torch.save(torch.zeros(1 << 18), plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for member in stored.infolist():
            deflated.writestr(member.filename, stored.read(member))
    size = packed.stat().st_size
    assert size < 1 << 13
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=size)
    assert_rejected(copy, "is not a plain tensor .its content is larger than the file.")


@pytest.mark.parametrize("content", [b"\x80\x02)R.", b"\x80\x02.", b"\x80\x02h\x05.", b"PK", b""])
def test_a_part_that_is_not_a_complete_pickle_is_rejected(copy: Path, content: bytes) -> None:
    (copy / "__7_0.distcp").write_bytes(content)
    rewrite(copy, relative_path="__7_0.distcp", offset=0, length=len(content))
    with refused("checkpoint.code", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"relative_path": "../elsewhere.distcp"}, "shards.elsewhere"),
        ({"relative_path": "/etc/passwd"}, "shards.elsewhere"),
        ({"relative_path": "__9_0.distcp"}, "shards.absent"),
        ({"offset": 1 << 40}, "shards.cut-short"),
        ({"offset": -1}, "checkpoint.damaged"),
        ({"offset": 7}, "checkpoint.code"),
        ({"length": "1"}, "checkpoint.damaged"),
        ({"transform_descriptors": ["zstd"]}, "shards.extension"),
    ],
)
def test_invalid_storage_entries_are_rejected(copy: Path, changes: dict[str, Any], code: str) -> None:
    rewrite(copy, **changes)
    with refused(code):
        load_model(copy)


def test_incomplete_tensors_are_rejected(copy: Path) -> None:
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
def undamaged(saved: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the undamaged checkpoint, including the optimizer's."""
    opened = shards.open_shards(saved / "dcp")
    return {name: opened.read(name) for name in sorted(opened.shapes)}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_metadata_raise_an_error_or_give_the_same_tensors(
    saved: Path, undamaged: dict[str, torch.Tensor], tmp_path: Path, data: st.DataObject
) -> None:
    """Compare the tensors that still have a known name.

    The damages are a fixed sample: `.metadata` has no checksum, so damage that refers to another complete part of the
    same shape cannot be detected.
    """
    folder = tmp_path / "dcp"
    if not folder.exists():
        shutil.copytree(saved / "dcp", folder)
    content = bytearray((saved / "dcp" / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 1, 0]))])
    name = data.draw(st.sampled_from(sorted(undamaged)))
    message, found = "", None
    try:
        opened = shards.open_shards(folder)
        found = opened.read(name) if name in opened.shapes else None
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert found is None or torch.equal(found, undamaged[name]), name


def test_overlapping_parts_are_rejected(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if key.fqn == "state_dict.esm2.embed_tokens.weight")
    metadata.storage_data[dcp.metadata.MetadataIndex(key.fqn, [3, 0])] = metadata.storage_data[key]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with refused("shards.overlap", name="state_dict.esm2.embed_tokens.weight"):
        load_model(copy)


def test_inconsistent_safetensors_shards_are_rejected(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "shards", tmp_path / "shards"))
    first, second = shards.shard_files(folder)
    shutil.copy(first, folder / "shard-00009-model-00001-of-00001.safetensors")
    with refused("shards.overlap", name="contact_head.regression.bias"):
        load_model(folder)
    (folder / "shard-00009-model-00001-of-00001.safetensors").unlink()
    part = load_file(second)["embed_tokens.weight"]
    for offset, code in (
        ("here", "shards.offset"),
        ([-1, 0], "shards.offset"),
        ([9], "shards.outside"),
        ([99999999, 0], "shards.absent"),
    ):
        info = json.dumps({"embed_tokens.weight": {"saved_offsets": offset}})
        save_file({"embed_tokens.weight": part}, second, {"DCP_SHARDING_INFO": info})
        with refused(code):
            shards.open_shards(folder).read("embed_tokens.weight")
    second.write_bytes(second.read_bytes()[:200])
    with refused("checkpoint.damaged"):
        load_model(folder)


def test_checkpoints_without_exactly_one_esm2_are_rejected(tmp_path: Path) -> None:
    state = ESM2.initialised(CONFIG, seed=4).state_dict()
    unknown_heads = {name: t for name, t in state.items() if "inv_freq" not in name and "contact" not in name}
    missing = "layers.1.fc2.bias"
    cases = [
        ({"fc.weight": torch.zeros(3)}, "checkpoint.not-esm2", {"found": 0}),
        (state | {"embed_tokens.weight": torch.tensor(1.0)}, "checkpoint.not-esm2", {"found": ()}),
        ({f"{side}.{name}": t for name, t in state.items() for side in "ab"}, "checkpoint.not-esm2", {"found": 2}),
        (unknown_heads, "checkpoint.heads", {}),
        ({n: t for n, t in state.items() if n != missing}, "checkpoint.tensor", {"name": missing}),
    ]
    for number, (content, code, values) in enumerate(cases):
        dcp.save(content, checkpoint_id=tmp_path / str(number), no_dist=True)
        with refused(code, **values):
            load_model(tmp_path / str(number))

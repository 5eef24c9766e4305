"""Load models by name and path, from a local hub with faults; the official 8M model if the hub is reachable."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from huggingface_hub import constants
from support.errors import refused
from support.hub import Hub, serve

from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.models import checkpoint
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats import distributed, fair_esm, huggingface
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.hub import OFFICIAL_MODELS, OfficialModel, fetch
from esm2kit.models.load import find_model, load_model

CONFIG = ESM2Config(2, 64, 4)
REPO, COMMIT = "lab/esm2_small", "a" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    save_hf(ESM2.initialised(CONFIG, seed=5), path)
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a local hub, with an empty cache."""
    with serve(folder, REPO, COMMIT, tmp_path / "cache", monkeypatch) as server:
        yield server


def gets(server: Hub) -> list[tuple[str, str, str | None]]:
    return [request for request in server.requests if request[0] == "GET" and request[1].endswith("safetensors")]


def assert_is_the_model(name: str) -> dict:
    model, source = load_model(name)
    for key, tensor in ESM2.initialised(CONFIG, seed=5).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    return source


def test_a_repository_is_downloaded_once_then_read_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = assert_is_the_model(REPO)
    assert (source.name, source.source) == ("esm2_small", f"hub:{REPO}@{COMMIT}")
    assert len(gets(hub)) == 1
    assert_is_the_model(f"{REPO}@{COMMIT}")
    assert len(gets(hub)) == 1, "downloaded once"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert_is_the_model(f"{REPO}@{COMMIT}")
    assert not hub.requests, "offline mode sends no request"
    with refused("hub.not-cached"):
        load_model("lab/other")


def test_official_names_are_pinned_to_a_commit_and_a_digest(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    monkeypatch.setitem(OFFICIAL_MODELS, "esm2_t6_8M_UR50D", OfficialModel(REPO, COMMIT, right))
    assert assert_is_the_model("esm2_t6_8M_UR50D").source == f"hub:esm2_t6_8M_UR50D@{COMMIT}"
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.requests if path != "/")
    monkeypatch.setitem(OFFICIAL_MODELS, "esm2_t6_8M_UR50D", OfficialModel(REPO, COMMIT, "f" * 64))
    with refused("hub.digest"):
        load_model("esm2_t6_8M_UR50D")
    assert OFFICIAL_MODELS.keys() == SIZES.keys()
    assert all(len(official.revision) == 40 for official in OFFICIAL_MODELS.values()), "commits, not branches"


def test_an_interrupted_download_resumes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # the default of 10 MB exceeds this model's size
    hub.interruptions = 1
    assert_is_the_model(REPO)
    resumed = [span for _, _, span in gets(hub) if span and not span.startswith("bytes=0-")]
    assert resumed, "the second request is for the remaining bytes"


def test_a_file_with_a_wrong_digest_is_rejected_and_deleted(hub: Hub) -> None:
    hub.damage = True
    with refused("hub.digest"):
        load_model(REPO)
    hub.damage = False
    assert_is_the_model(REPO)


def test_an_unreachable_hub_is_an_error(hub: Hub, tmp_path: Path) -> None:
    assert_is_the_model(f"{REPO}@{COMMIT}")
    hub.shutdown()
    hub.server_close()
    assert_is_the_model(f"{REPO}@{COMMIT}")
    with refused("hub.not-cached"):
        load_model("esm2_t12_35M_UR50D")
    next((tmp_path / "cache").rglob("snapshots/*/model.safetensors")).unlink()
    with refused("hub.not-cached"):
        load_model(f"{REPO}@{COMMIT}")


def test_a_cache_that_cannot_be_written_to_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as below a read-only home folder; a lost connection has another code."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with refused("hub.cache", path=str(tmp_path / "file" / "hub")):
        load_model(REPO)

    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("Could not determine home directory.")  # of pathlib, for a user id without an account

    monkeypatch.setattr("esm2kit.models.hub.hf_hub_download", fail)
    with refused("hub.cache"):
        load_model(REPO)


def test_unknown_names_and_revisions_are_rejected(hub: Hub) -> None:
    for name, code in [
        ("lab/none", "hub.unknown"),
        (f"{REPO}@nowhere", "hub.revision"),
        ("lab/a b", "hub.name"),
    ]:
        with refused(code):
            load_model(name)
    with pytest.raises(InputError, match="did you mean 'esm2_t6_8M_UR50D'"):
        load_model("esm2_t6_9M_UR50D")
    del hub.files["model.safetensors"]
    with refused("hub.no-weights", revision="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"):
        fetch(f"{REPO}@{COMMIT}")


def test_all_formats_load_by_path(folder: Path, tmp_path: Path) -> None:
    model = ESM2.initialised(CONFIG, seed=5)
    save_fair_esm(model, tmp_path / "esm2_small.pt")
    forms = {}
    for path in (folder, tmp_path / "esm2_small.pt"):
        loaded, source = load_model(path)
        forms[source.format] = source.sha256
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert not loaded.training
    assert list(forms) == ["huggingface", "fair-esm"]
    for path, code in [
        (tmp_path, "model.ambiguous"),
        (tmp_path / "no.pt", "model.absent"),
        (tmp_path / "no" / "no.pt", "model.absent"),
        ("no.pt", "model.unknown"),
    ]:
        with refused(code):
            load_model(path)


def test_configuration_and_digest_are_read_without_tensors(folder: Path, tmp_path: Path, hub: Hub, monkeypatch) -> None:
    model = ESM2.initialised(CONFIG, seed=5)
    save_fair_esm(model, tmp_path / "esm2_small.pt")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "own.safetensors", state, {"model": CONFIG})
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    names = [folder, tmp_path / "esm2_small.pt", tmp_path / "own.safetensors", tmp_path / "dcp", REPO]
    loaded = [load_model(name)[1] for name in names]
    for form in (huggingface, fair_esm, distributed, checkpoint):
        monkeypatch.setattr(form, "read", None)
    found = [find_model(name) for name in names]
    assert [each.config for each in found] == [CONFIG] * 5
    assert [each.record() for each in found] == [each.record() for each in loaded]
    assert len({each.sha256 for each in found}) == 4, "the folder and the hub have the same files"


def test_a_path_in_an_existing_folder_is_not_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        (tmp_path / "runs" / f"run{number}").mkdir(parents=True)
    with pytest.raises(InputError) as raised:
        load_model("runs/run10")
    text = (
        "model 'runs/run10' does not exist; runs contains run0, run1, run2, run3, run4, run5, run6, run7 and 2 more. "
    )
    text += "Check the path, or write runs/run10@main for the repository on the hub."
    assert str(raised.value) == text


def test_a_run_folder_loads_its_best_or_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, name in enumerate(("step=0000002-val_loss=2.5000", "step=0000004-val_loss=2.4000", "last")):
        state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(CONFIG, seed=step).state_dict().items()}
        write_checkpoint(checkpoints / f"{name}.safetensors", state, {"model": CONFIG, "step": 2 + 2 * step})
    assert load_model(tmp_path / "run")[1].name == "run_step6", "without a result: the last"
    best = "elsewhere/checkpoints/step=0000004-val_loss=2.4000.safetensors"
    write_sealed_json(tmp_path / "run" / "pretrain.json", {"best": best})
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for folder in (moved, moved / "checkpoints"):
        model, source = load_model(folder)
        assert source.name == "moved_step4"
        assert torch.equal(model.embed_tokens.weight, ESM2.initialised(CONFIG, seed=1).embed_tokens.weight)
    next((moved / "checkpoints").glob("*2.4000*")).unlink()
    assert load_model(moved)[1].name == "moved_step6", "the best was removed: the last"
    (moved / "checkpoints" / "last.safetensors").unlink()
    assert load_model(moved / "checkpoints")[1].name == "moved_step2", "the only one"
    with refused("model.ambiguous", found=0):
        load_model(moved)


def test_an_untrained_model_has_the_same_architecture_and_random_weights(folder: Path) -> None:
    trained, _ = load_model(folder)
    untrained, source = load_model(folder, untrained_seed=7)
    assert untrained.config == trained.config
    assert (source.untrained_seed, source.name) == (7, f"{folder.name}_untrained")
    assert not torch.equal(untrained.layers[0].fc1.weight, trained.layers[0].fc1.weight)
    assert torch.equal(untrained.layers[0].fc1.weight, load_model(folder, untrained_seed=7)[0].layers[0].fc1.weight)
    assert not torch.equal(untrained.layers[0].fc1.weight, load_model(folder, untrained_seed=8)[0].layers[0].fc1.weight)
    named, _ = load_model("esm2_t6_8M_UR50D", untrained_seed=7)
    assert named.config == SIZES["esm2_t6_8M_UR50D"], "random weights need no download"


@pytest.mark.weights
@pytest.mark.parametrize("golden", ["G1", "G2"])
def test_the_official_8m_model_gives_the_published_values(root: Path, golden: str) -> None:
    try:
        model, _ = load_model("esm2_t6_8M_UR50D")
    except InputError as error:
        pytest.skip(str(error))
    blocks = yaml.safe_load((root / "data" / "golden" / "esm2_t6_8M.yaml").read_text())["golden"]
    block = next(block for block in blocks if block["name"] == golden)
    tokens_N = torch.tensor(block["input_ids"][0])
    encoder = Encoder(model)
    found = encoder.encode(tokens_N, [len(tokens_N)], [6])[6]  # packed: no token is padding
    found = encoder.logits(found) if block["output"] == "logits" else found
    torch.testing.assert_close(found[:3, :3], torch.tensor(block["values"]), atol=block["atol"], rtol=block["rtol"])


def test_a_file_that_is_replaced_before_it_is_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    for seed in (0, 1):
        state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(CONFIG, seed).state_dict().items()}
        write_checkpoint(path, state, {"model": dataclasses.asdict(CONFIG), "step": seed})
        if seed == 0:
            found = find_model(path)
            assert found.record()["sha256"] == found.sha256
    with refused("model.changed", path=str(path)):
        found.load()


def test_short_names_of_official_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`8M` means the official model, unless a file of this name exists."""
    monkeypatch.chdir(tmp_path)
    layers = {"8M": 6, "35M": 12, "150m": 30, "650M": 33, "3B": 36, "15b": 48}
    for short, num_layers in layers.items():
        assert find_model(short, untrained_seed=0).config.num_layers == num_layers
    assert find_model("8M", untrained_seed=0).name == "esm2_t6_8M_UR50D_untrained"
    with refused("model.unknown", name="8MB"):
        find_model("8MB")
    (tmp_path / "8M").mkdir()
    with refused("model.ambiguous", path=Path("8M")):
        find_model("8M")


def test_untrained_models_of_different_architectures_have_different_digests(tmp_path: Path) -> None:
    digests = set()
    for heads in (2, 4):
        config = ESM2Config(2, 32, heads)
        state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(config, 0).state_dict().items()}
        write_checkpoint(tmp_path / f"{heads}.safetensors", state, {"model": dataclasses.asdict(config), "step": 0})
        digests.add(find_model(tmp_path / f"{heads}.safetensors", untrained_seed=0).sha256)
    assert len(digests) == 2

"""`esm2kit verify` against a local hub with a small model and planted reference outputs; one fault per check."""

import gzip
import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from support.errors import refused
from support.hub import Hub, serve
from support.structure_files import build_chain, format_pdb
from transformers import EsmForMaskedLM

from esm2kit import VerifyConfig, verify
from esm2kit.cli.main import main
from esm2kit.core.checksums import read_sealed_json
from esm2kit.finetuning import config as finetuning_config
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.models.hub import OFFICIAL_MODELS, OfficialModel
from esm2kit.scoring import masked_passes
from esm2kit.structure import attention
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.published import SCHMIRLER, SCHMIRLER_FINETUNED, PublishedScore
from esm2kit.tasks.task import Split
from esm2kit.verification import entries, evaluations, outputs
from esm2kit.verification.golden import read_golden
from esm2kit.verification.result import Check, compare_arrays, conclude

verify_module = importlib.import_module("esm2kit.verification.verify")  # the name is also that of its function

NAME, OTHER = "esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D"
FINETUNED_NAME = f"{NAME}, fine-tuned"
REPO, COMMIT = "lab/esm2_small", "b" * 40
CONFIG = ESM2Config(2, 32, 4)
PROTEINS = {"p1": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "p2": "GSHMASMTGGQQMGRGSEFELR"}
INPUTS = {"G1": [0, 1, 2, 3, 4, 5], "G2": [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]}
REFERENCED = [f"equal to {name}: {output}" for name in ("fair-esm", "transformers")
              for output in ("logits", "hidden states", "contacts")]  # fmt: skip


def build_model(seed: int = 1) -> ESM2:
    model = ESM2.initialised(CONFIG, seed)
    with torch.no_grad():
        model.contact_head.regression.bias.fill_(-2.0)
        model.contact_head.regression.weight.mul_(40)
    return model.eval()


@torch.no_grad()
def compute_perplexity(model: ESM2) -> float:
    """The pseudo-perplexity of PROTEINS, one residue at a time, with transformers."""
    losses = []
    for sequence in PROTEINS.values():
        tokens_T = torch.from_numpy(outputs.tokenize(sequence))
        for place in range(1, len(sequence) + 1):
            masked_1T = tokens_T[None].clone()
            masked_1T[0, place] = 32
            logits_V = model(masked_1T, attention_mask=torch.ones_like(masked_1T)).logits[0, place]
            losses.append(-logits_V.log_softmax(-1)[tokens_T[place]].item())
    return float(np.exp(np.mean(losses)))


@torch.no_grad()
def build_golden(folder: Path) -> dict[str, Any]:
    """Reference outputs of the model in a folder, computed with transformers."""
    model = EsmForMaskedLM.from_pretrained(folder).eval()
    blocks: list[dict[str, Any]] = []
    for name, input_ids in INPUTS.items():
        tokens_1T = torch.tensor([input_ids])
        found = model(tokens_1T, attention_mask=torch.ones_like(tokens_1T), output_hidden_states=True)
        output, values = ("logits", found.logits) if name == "G1" else ("last_hidden_state", found.hidden_states[-1])
        block = {"name": name, "what": output, "source": "transformers", "input_ids": [input_ids], "output": output}
        block |= {"tokens": "<cls> G L D A L Q I T V <eos>"} if name == "G2" else {}
        block |= {"shape": list(values.shape), "slice": "[0, :3, :3]", "values": values[0, :3, :3].tolist()}
        blocks.append(block | {"atol": 1e-4, "rtol": 1e-4})
    number = {"output": "pseudo_perplexity", "value": compute_perplexity(model), "atol": 1e-3, "source": "transformers"}
    return {"model": NAME, "golden": [*blocks, number]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    save_hf(build_model(), path)
    return path


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    return build_golden(folder)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the small model under the official name, pinned to its digest."""
    with serve(folder, REPO, COMMIT, tmp_path / "cache", monkeypatch) as server:
        digest = hashlib.sha256(server.files["model.safetensors"]).hexdigest()
        monkeypatch.setitem(OFFICIAL_MODELS, NAME, OfficialModel(REPO, COMMIT, digest))
        monkeypatch.setitem(SIZES, NAME, CONFIG)
        yield server


@pytest.fixture
def config(golden: dict[str, Any], tmp_path: Path) -> Callable[..., VerifyConfig]:
    """Build the configuration of a run, with reference outputs that a test may have changed."""

    def build(blocks: dict[str, Any] = golden, **options: Any) -> VerifyConfig:
        file, fasta = tmp_path / "golden.yaml", tmp_path / "proteins.fasta"
        file.write_text(yaml.safe_dump(blocks), encoding="utf-8")
        fasta.write_text("".join(f">{name}\n{each}\n" for name, each in PROTEINS.items()), encoding="utf-8")
        return VerifyConfig(**{"golden": file, "fasta": fasta, "out_dir": tmp_path / "out"} | options)

    return build


def group(checks: tuple[Check, ...]) -> dict[str, list[str]]:
    """Verdict -> names of the checks."""
    found: dict[str, list[str]] = {}
    for check in checks:
        found.setdefault(check.verdict, []).append(check.name)
    return found


def change(golden: dict[str, Any], index: int, **values: Any) -> dict[str, Any]:
    blocks = [block | values if number == index else block for number, block in enumerate(golden["golden"])]
    return golden | {"golden": blocks}


def test_everything_passes_with_the_official_weights(hub: Hub, config: Callable[..., VerifyConfig]) -> None:
    result = verify(config())
    assert group(result.checks) == {
        "passed": ["tokens of a sequence", "SHA-256 of the weights", "architecture", "number of parameters",
                   "contact head", "G1: logits", "G2: last_hidden_state", *REFERENCED, "pseudo-perplexity"],
        "not checked": ["contact precision", "probe on a FLIP task: gb1 three_vs_rest",
                        "fine-tuning on a FLIP task: gb1 three_vs_rest"],
    }  # fmt: skip
    assert (result.status, result.exit_code) == ("passed", 0)
    assert result.verdict == "passed: 14 checks (3 not checked)"
    assert result.table.splitlines()[0].split() == ["check", "expected", "found", "tolerance", "verdict"]
    found = read_sealed_json(result.report, "")
    assert [each["verdict"] for each in found["checks"]] == [check.verdict for check in result.checks]
    digest = next(each for each in found["checks"] if each["name"] == "SHA-256 of the weights")
    assert digest["expected"] == digest["found"] == hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    assert found["provenance"]["stage"] == "verify"


def test_altered_weights_of_the_hub_are_caught_by_their_digest(
    hub: Hub, config: Callable[..., VerifyConfig], tmp_path: Path
) -> None:
    save_hf(build_model(seed=2), tmp_path / "altered")
    hub.files["model.safetensors"] = (tmp_path / "altered" / "model.safetensors").read_bytes()
    result = verify(config())
    found = group(result.checks)
    assert (found["failed"], result.exit_code) == (["SHA-256 of the weights"], 3)
    assert found["could not check"] == ["published outputs", "equal to fair-esm", "equal to transformers",
                                        "pseudo-perplexity"]  # fmt: skip


def test_a_damaged_download_without_a_pinned_digest_is_caught_by_the_one_of_the_hub(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OFFICIAL_MODELS, NAME, OfficialModel(REPO, COMMIT))
    hub.damage = True
    result = verify(config())
    check = next(check for check in result.checks if check.verdict == "failed")
    assert (check.name, result.exit_code) == ("SHA-256 of the weights", 3)
    assert check.expected == hashlib.sha256(hub.files["model.safetensors"]).hexdigest() != check.found
    hub.damage = False
    result = verify(config())
    assert result.status == "passed", "the damaged file was deleted from the cache"
    assert result.checks[1].note == "declared by the Hugging Face hub"


def test_altered_local_weights_are_caught_by_the_digest_and_by_the_outputs(
    hub: Hub, config: Callable[..., VerifyConfig], folder: Path, tmp_path: Path
) -> None:
    assert verify(config(weights=folder)).status == "passed"
    assert not hub.requests, "local weights need no network"
    model = build_model()
    with torch.no_grad():
        model.layers[1].fc2.bias[0] += 1.0
    save_hf(model, tmp_path / "altered")
    result = verify(config(weights=tmp_path / "altered"))
    assert group(result.checks)["failed"] == [
        "SHA-256 of the weights", "G1: logits", "G2: last_hidden_state", "pseudo-perplexity",
    ]  # fmt: skip
    assert set(REFERENCED) < set(group(result.checks)["passed"]), "these read the same altered weights"
    save_fair_esm(model, tmp_path / "esm2_altered.pt")
    result = verify(config(weights=tmp_path / "esm2_altered.pt"))
    found = group(result.checks)
    assert (found["failed"][0], found["reported"]) == ("G1: logits", ["SHA-256 of the weights"])


@pytest.mark.parametrize(("index", "name"), [(0, "G1: logits"), (1, "G2: last_hidden_state")])
def test_an_altered_reference_value_is_caught(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any], index: int, name: str
) -> None:
    values = np.array(golden["golden"][index]["values"])
    values[2, 1] += 1e-3
    result = verify(config(change(golden, index, values=values.tolist())))
    assert group(result.checks)["failed"] == [name]
    check = next(check for check in result.checks if check.name == name)
    assert float(check.expected) - float(check.found) == pytest.approx(1e-3, abs=2e-4), "the value that differs"
    assert result.verdict == f"failed: 1 check of 17 (3 not checked): {name}"


def test_an_altered_configuration_is_caught_by_the_architecture(hub: Hub, config: Callable[..., VerifyConfig]) -> None:
    settings = json.loads(hub.files["config.json"]) | {"layer_norm_eps": 1e-12}
    hub.files["config.json"] = json.dumps(settings).encode()
    result = verify(config())
    assert "architecture" in group(result.checks)["failed"]
    check = next(check for check in result.checks if check.name == "architecture")
    assert "layer_norm_eps 1e-12" in check.found
    assert "layer_norm_eps" not in check.expected


def test_a_wrong_number_of_parameters_is_caught(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CONFIG.num_parameters
    monkeypatch.setattr(ESM2Config, "num_parameters", property(lambda self: right + 32))
    result = verify(config())
    assert group(result.checks)["failed"] == ["number of parameters"]
    check = next(check for check in result.checks if check.verdict == "failed")
    assert (check.expected, check.found) == (f"{right + 32:,}", f"{right:,}")


@pytest.mark.parametrize("program", ["fair-esm", "transformers"])
@pytest.mark.parametrize("output", ["logits", "hidden states", "contacts"])
def test_a_difference_from_one_program_is_caught(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch, program: str, output: str
) -> None:
    place = ("logits", "hidden states", "contacts").index(output)

    def add_fault(reference: outputs.Reference) -> outputs.Reference:
        def compute(*arguments: Any) -> list[outputs.Outputs]:
            first, *others = reference.compute(*arguments)
            arrays = [array.copy() for array in first]
            arrays[place][3, 2] += 1e-3
            return [outputs.Outputs(*arrays), *others]

        return reference._replace(compute=compute) if reference.name == program else reference

    for module in (outputs, verify_module):
        monkeypatch.setattr(module, "REFERENCES", tuple(map(add_fault, outputs.REFERENCES)))
    result = verify(config())
    assert (group(result.checks)["failed"], result.exit_code) == ([f"equal to {program}: {output}"], 3)


def test_a_program_that_does_not_run_is_not_a_difference(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's esm has the module name of fair-esm, and no esm.pretrained.load_model_and_alphabet_local."""

    def compute(*arguments: Any) -> list[outputs.Outputs]:
        raise AttributeError("module 'esm' has no attribute 'pretrained'")

    references = (outputs.REFERENCES[0]._replace(compute=compute), outputs.REFERENCES[1])
    monkeypatch.setattr(verify_module, "REFERENCES", references)
    result = verify(config())
    assert (group(result.checks)["could not check"], result.exit_code) == (["equal to fair-esm"], 4)
    check = next(check for check in result.checks if check.verdict == "could not check")
    assert "does not run here: AttributeError: module 'esm' has no attribute 'pretrained'" in check.note
    assert set(REFERENCED[3:]) < set(group(result.checks)["passed"])


def test_a_contact_head_that_is_not_fitted_is_caught(
    hub: Hub, config: Callable[..., VerifyConfig], tmp_path: Path
) -> None:
    model = build_model()
    with torch.no_grad():
        model.contact_head.regression.bias.zero_()
    save_hf(model, tmp_path / "unfitted")
    found = group(verify(config(weights=tmp_path / "unfitted")).checks)
    assert found["failed"] == ["SHA-256 of the weights", "contact head"]


def test_a_wrong_contact_head_is_caught_by_the_other_implementations(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Swapped(outputs.ContactModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.factors_LH = self.factors_LH.flip(1)

    monkeypatch.setattr(outputs, "ContactModel", Swapped)
    assert group(verify(config()).checks)["failed"] == [
        "equal to fair-esm: contacts",
        "equal to transformers: contacts",
    ]


def test_shifted_tokens_are_caught(
    hub: Hub, config: Callable[..., VerifyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = outputs.encode
    for module in (outputs, attention):
        monkeypatch.setattr(module, "encode", lambda sequence: encode(sequence) + 1)
    failed = group(verify(config()).checks)["failed"]
    assert failed == ["tokens of a sequence", *REFERENCED[:3]], "fair-esm has tokens of its own"


def test_wrong_masked_scores_are_caught(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = golden["golden"][2]["value"]
    assert group(verify(config(change(golden, 2, value=number + 0.1))).checks)["failed"] == ["pseudo-perplexity"]
    monkeypatch.setattr(masked_passes, "MASK_IDX", 24)  # X, which is not a mask
    assert group(verify(config()).checks)["failed"] == ["pseudo-perplexity"]


def test_without_a_published_value_a_number_is_only_reported(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any]
) -> None:
    result = verify(config(golden | {"golden": golden["golden"][:2]}))
    check = next(check for check in result.checks if check.name == "pseudo-perplexity")
    assert (check.verdict, check.expected) == ("reported", "no published value")
    assert float(check.found) == pytest.approx(golden["golden"][2]["value"], abs=0.005)
    assert result.status == "passed"


def test_the_precision_of_contacts_is_compared_with_structures(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    sequence = PROTEINS["p1"] * 2
    path = tmp_path / "pdb" / "1abc.pdb"
    path.parent.mkdir()
    path.write_text(format_pdb(build_chain(sequence, cb_T3=rng.uniform(0, 25, (len(sequence), 3)))), encoding="utf-8")
    result = verify(config(structures=path.parent))
    check = next(check for check in result.checks if check.name == "contact precision")
    assert (check.verdict, check.expected) == ("reported", "no published value")
    assert 0 <= float(check.found) <= 1
    number = {"output": "contact_precision", "atol": 1e-3, "source": "planted"}
    for value, verdict in ((float(check.found), "passed"), (float(check.found) + 0.05, "failed")):
        planted = golden | {"golden": [*golden["golden"], number | {"value": value}]}
        found = group(verify(config(planted, structures=path.parent)).checks)
        assert "contact precision" in found[verdict]
    path.write_text("ATOM      1  N   MET A", encoding="utf-8")
    result = verify(config(structures=path.parent))
    assert (group(result.checks)["could not check"], result.exit_code) == (["contact precision"], 4)


class PdbServer(BaseHTTPRequestHandler):
    """Serves files by name; others do not exist."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.requests.append(name)
        self.send_response(200 if name in self.files else 404)
        self.send_header("Content-Length", str(len(self.files.get(name, b""))))
        self.end_headers()
        self.wfile.write(self.files.get(name, b""))


@pytest.fixture
def pdb(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[PdbServer]]:
    """The Protein Data Bank with the chains of the sample, at random places; the entry 1F1E does not exist."""
    rng, files = np.random.default_rng(0), {}
    for name, sequence in entries.choose_chains().items():
        entry, _, chain = name.partition("_")
        cb_T3 = rng.uniform(0, 30, (len(sequence), 3))
        atoms = build_chain(sequence, chain, cb_T3=cb_T3)
        files[f"{entry.upper()}.cif.gz"] = gzip.compress(format_pdb(atoms).encode())
    del files["1F1E.cif.gz"]
    monkeypatch.setattr(PdbServer, "files", files)
    monkeypatch.setattr(PdbServer, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), PdbServer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(entries, "ADDRESS", f"http://127.0.0.1:{server.server_port}/download")
    yield PdbServer
    server.shutdown()
    server.server_close()


def test_a_small_set_of_entries_of_the_protein_data_bank_is_downloaded(
    hub: Hub, pdb: type[PdbServer], config: Callable[..., VerifyConfig], golden: dict[str, Any], tmp_path: Path
) -> None:
    assert list(entries.choose_chains()) == [
        "1b33_G", "1eer_A", "1ef1_B", "1ej0_A", "1f1e_A", "1jw9_A", "1kr4_A", "1l3p_A",
    ]  # fmt: skip
    result = verify(config(structures=Path("pdb")))
    check = next(check for check in result.checks if check.name == "contact precision")
    assert check.verdict == "reported"
    assert "over 7 proteins" in check.note
    assert "; 1 entry not downloaded; published on other structures: 0.159 on validation structures" in check.note
    assert len(pdb.requests) == 8
    (tmp_path / "local").mkdir()
    for path in (tmp_path / "out" / "structures").glob("*.cif.gz"):
        (tmp_path / "local" / path.name).write_bytes(path.read_bytes())
    same = verify(config(structures=tmp_path / "local", out_dir=tmp_path / "again"))
    assert next(each.found for each in same.checks if each.name == "contact precision") == check.found
    planted = {"output": "contact_precision", "atol": 1e-3, "source": "planted", "value": float(check.found) + 0.01}
    result = verify(config(golden | {"golden": [*golden["golden"], planted]}, structures=Path("pdb")))
    assert group(result.checks)["failed"] == ["contact precision"]
    assert pdb.requests[8:] == ["1F1E.cif.gz"], "the others are there"


@pytest.mark.parametrize("answer", [None, b"<html>Maintenance</html>"])
def test_without_any_entry_contacts_could_not_be_checked(
    hub: Hub, pdb: type[PdbServer], config: Callable[..., VerifyConfig], answer: bytes | None
) -> None:
    for name in list(pdb.files):
        if answer is None:
            del pdb.files[name]
        else:
            pdb.files[name] = gzip.compress(answer)
    result = verify(config(structures=Path("pdb")))
    assert (group(result.checks)["could not check"], result.exit_code) == (["contact precision"], 4)
    note = next(check.note for check in result.checks if check.verdict == "could not check")
    assert note.startswith("none of 8 entries of the Protein Data Bank could be downloaded")


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (0, {"atol": float("inf")}), (0, {"rtol": -1e-4}), (1, {"atol": float("nan")}),
        (1, {"values": [[float("nan")] * 3] * 3}), (2, {"atol": float("inf")}), (2, {"value": float("nan")}),
    ],
)  # fmt: skip
def test_a_tolerance_that_nothing_can_fail_is_refused(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any], index: int, values: dict[str, Any]
) -> None:
    with refused("verify.golden"):
        verify(config(change(golden, index, **values)))


def write_flip_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a small gb1, whose values are the shares of leucine, and make its sizes those of FLIP."""
    rng, lines = np.random.default_rng(0), []
    for row, chosen in enumerate(["train"] * 24 + ["validation"] * 8 + ["test"] * 16):
        sequence = "".join(rng.choice(list("LAGVSER"), 20))
        value = sequence.count("L") / 20
        sets = f"SET={'test' if chosen == 'test' else 'train'} VALIDATION={chosen == 'validation'}"
        lines.append(f">Sequence{row} TARGET={value} {sets}\n{sequence}\n")
    (folder / "gb1").mkdir(parents=True)
    (folder / "gb1" / "three_vs_rest.fasta").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setitem(TASKS["gb1"].splits, "three_vs_rest", Split(24, 8, 16))
    monkeypatch.setitem(finetuning_config.SCHMIRLER_EPOCHS, "gb1", (1, 1, 1))


def test_full_compares_a_probe_and_a_fine_tuned_model_with_their_published_scores(
    hub: Hub, config: Callable[..., VerifyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flip_task(tmp_path / "flip", monkeypatch)
    options = {"full": True, "data_dir": tmp_path / "flip", "resamples": 100}
    probe, finetuned = "probe on a FLIP task: gb1 three_vs_rest", "fine-tuning on a FLIP task: gb1 three_vs_rest"

    def plant(value: float, source: tuple[str, str], name: str) -> PublishedScore:
        return PublishedScore("gb1", "three_vs_rest", "spearman", value, name, *source)

    def run(probe_score: float, finetuned_score: float, **others: Any) -> dict[str, Check]:
        scores = (plant(probe_score, SCHMIRLER, NAME), plant(finetuned_score, SCHMIRLER_FINETUNED, FINETUNED_NAME))
        monkeypatch.setattr(evaluations, "PUBLISHED", scores)
        return {check.name: check for check in verify(config(**options | others)).checks}

    first = run(0, 0, margin=1)
    found = [float(first[name].found.split()[0]) for name in (probe, finetuned)]
    assert [first[name].verdict for name in (probe, finetuned)] == ["passed", "passed"]
    report = json.loads((tmp_path / "out" / "probe" / "report.json").read_text())
    assert report["rows"][0]["metrics"]["spearman"]["value"] == pytest.approx(found[0], abs=6e-4)
    assert len(report["rows"][0]["seeds"]) == 5, "as published"
    assert report["settings"]["preset"] == "schmirler"
    result = json.loads((tmp_path / "out" / "finetuned" / "finetune.json").read_text())
    assert result["test"]["spearman"]["value"] == pytest.approx(found[1], abs=6e-4)
    second = run(found[0] + 0.04, found[1] - 0.06)
    assert (second[probe].verdict, second[finetuned].verdict) == ("passed", "failed")
    third = run(found[0] - 0.06, found[1] + 0.04)
    assert (third[probe].verdict, third[finetuned].verdict) == ("failed", "passed")

    monkeypatch.setattr(evaluations, "PUBLISHED", ())
    result = verify(config(**options))
    assert group(result.checks)["not checked"] == ["contact precision", probe, finetuned]
    assert result.checks[-1].note == f"no published value for {NAME}"
    monkeypatch.setitem(TASKS["gb1"].splits, "three_vs_rest", Split(24, 8, 17))
    other = run(0, 0, margin=1, out_dir=tmp_path / "other")
    assert [other[name].verdict for name in (probe, finetuned)] == ["could not check", "could not check"]
    assert "test 16 instead of 17" in other[probe].note


def test_offline_nothing_is_passed(
    hub: Hub, config: Callable[..., VerifyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = verify(config(full=True))
    assert group(result.checks) == {
        "passed": ["tokens of a sequence"],
        "could not check": ["reading the weights", "published outputs", "equal to fair-esm", "equal to transformers",
                            "pseudo-perplexity", "probe on a FLIP task", "fine-tuning on a FLIP task"],
    }  # fmt: skip
    assert (result.status, result.exit_code) == ("could not check", 4)
    assert not hub.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert verify(config()).status == "passed"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert verify(config()).status == "passed", "the weights are in the cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert verify(config()).status == "could not check"


def test_without_another_program_nothing_is_passed(
    hub: Hub, config: Callable[..., VerifyConfig], golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "is_installed", lambda package: False)
    result = verify(config())
    assert result.status == "passed", "the published outputs are enough"
    notes = {check.name: check.note for check in result.checks if check.verdict == "not checked"}
    assert notes["equal to fair-esm"] == "not installed: pip install fair-esm"
    result = verify(config(golden | {"golden": []}))
    check = next(check for check in result.checks if check.name == "published outputs")
    assert (check.verdict, check.expected) == ("not checked", "not available for this model")
    assert (result.status, result.exit_code) == ("could not check", 4)


def test_the_command_has_an_exit_code_of_its_own(
    hub: Hub,
    config: Callable[..., VerifyConfig],
    golden: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(blocks: dict[str, Any], *options: str) -> int:
        settings = config(blocks)
        files = ["--golden", str(settings.golden), "--fasta", str(settings.fasta), "--out_dir", str(settings.out_dir)]
        return main(["verify", "8M", *files, *options])

    assert run(golden) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "passed"
    assert next(line for line in caplog.messages if line.startswith("architecture")).split()[-1] == "passed"
    assert run(change(golden, 0, values=[[9.0] * 3] * 3)) == 3
    assert caplog.messages[-1] == "failed: 1 check of 17 (3 not checked): G1: logits"
    assert run(golden, "--weights", "nosuch_folder") == 2
    assert main(["check", str(config().out_dir)]) == 0, "the report is sealed"


def test_wrong_inputs_are_one_line(config: Callable[..., VerifyConfig], golden: dict[str, Any], tmp_path: Path) -> None:
    with refused("verify.model", name="lab/esm2_small"):
        VerifyConfig("lab/esm2_small")
    with refused("verify.model", name="esm2_t6_9M"):
        VerifyConfig("esm2_t6_9M")
    with refused("model.absent", name=str(tmp_path / "nosuch")):
        verify(VerifyConfig(weights=tmp_path / "nosuch", out_dir=tmp_path / "out"))
    with refused("verify.absent", path=tmp_path / "nosuch.yaml"):
        VerifyConfig(golden=tmp_path / "nosuch.yaml").check_inputs()
    with refused("verify.golden-model", found=NAME, expected=OTHER):
        verify(config(model=OTHER))
    for index, values in ((0, {"slice": "[0, :2, :3]"}), (1, {"output": "attention"}), (2, {"value": "high"})):
        with refused("verify.golden"):
            verify(config(change(golden, index, **values)))
    (tmp_path / "golden.yaml").write_text("- 1", encoding="utf-8")
    with refused("verify.golden", path=tmp_path / "golden.yaml"):
        read_golden(NAME, tmp_path / "golden.yaml")


def test_esm2kit_has_reference_outputs_of_8m_only() -> None:
    found = read_golden(NAME)
    assert [(block.name, block.output, block.values[0, 0]) for block in found.outputs] == [
        ("G1", "logits", 8.921518), ("G2", "last_hidden_state", 0.14443092),
    ]  # fmt: skip
    assert outputs.check_tokens(found)[0].verdict == "passed"
    assert read_golden(OTHER) == ((), {})


def test_a_comparison_reports_the_worst_value_and_rejects_nan() -> None:
    expected = np.array([[1.0, 100.0], [0.0, -1.0]])
    assert compare_arrays(expected + np.array([[0, 0.01], [0.002, 0]]), expected, 1e-3, 1e-3) == (False, 0.0, 0.002)
    assert compare_arrays(expected + np.array([[0, 0.1], [0.0009, 0]]), expected, 1e-3, 1e-3).matches
    found = compare_arrays(np.array([np.nan, 1.0]), np.ones(2), 1e-3, 0)
    assert not found.matches
    assert np.isnan(found.found)


def test_passed_needs_an_output_of_another_program() -> None:
    own, other = Check("own", "passed"), Check("other", "passed", is_independent=True)
    assert conclude([own])[0] == "could not check"
    assert conclude([own, other, Check("x", "not checked"), Check("y", "reported")])[0] == "passed"
    assert conclude([own, other, Check("x", "could not check")]) == ("could not check", "could not check: x")
    assert conclude([other, Check("x", "could not check"), Check("y", "failed")])[0] == "failed"

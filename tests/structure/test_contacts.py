"""`esm2kit contacts`: values, batches, complexes, interrupted runs, structures and bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import write_tiny_model
from support.structure_files import FORMATS, build_chain, write_structure

from esm2kit import ContactReader, ContactsConfig, InputError, predict_contacts
from esm2kit.cli.check import CheckConfig, check
from esm2kit.cli.main import main
from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.files import hold_lock
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.contacts import compute_coupling
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.structure import attention
from esm2kit.structure import contacts as stage
from esm2kit.structure.attention import ContactModel

SHAPE = ESM2Config(3, 32, 4)
SEQUENCES = {
    "a": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKA",
    "b": "GGWLKHERNDAQSTVVYFPC",
    "sp|P12345|C_TEST": "MSTNPKPQRKTKRNTNRRPQDVKFPGGGQIVGGVYLLPRRGPRLGVRATRKTSERSQPRGRRQPIPKARRPEGRTWAQP",
    "d": "MAHHHHHHWKLESTGRQLNS",
}


def build_model(seed: int = 0) -> ESM2:
    model = ESM2.initialised(SHAPE, seed).eval()
    with torch.no_grad():  # a head as one that was fitted: large weights of both signs
        model.contact_head.regression.bias.fill_(-1.2)
        model.contact_head.regression.weight.copy_(torch.linspace(-60, 90, 12)[None])
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "fitted.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in build_model().state_dict().items()}
    write_checkpoint(path, tensors, {"model": SHAPE, "step": 0})
    return path


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "my.fasta"
    path.write_text("".join(f">{name} text\n{sequence}\n" for name, sequence in SEQUENCES.items()))
    return path


@torch.no_grad()
def predict_by_fair_esm(sequences: list[str]) -> list[np.ndarray]:
    reference = esm.ESM2(3, 32, 4).eval()
    reference.load_state_dict(build_model().state_dict())
    return [reference.predict_contacts(tokenize([sequence]))[0].numpy() for sequence in sequences]


def run(fasta: Path, model: Path, **options) -> dict:
    return predict_contacts(ContactsConfig(fasta, fasta.parent / "out", model=str(model), **options))


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_contacts_equal_fair_esm_in_any_batch(
    batch_tokens: int, block: int, fasta: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.WEIGHTS_PER_BLOCK, "cpu", block)
    made = run(fasta, model, batch_tokens=batch_tokens, pictures=0)
    expected = predict_by_fair_esm(list(SEQUENCES.values()))
    assert max(np.ptp(values) for values in expected) > 0.5, "the probabilities differ enough for a comparison"
    with ContactReader(made.contacts) as reader:
        assert reader.ids == tuple(SEQUENCES)
        for name, values in zip(SEQUENCES, expected, strict=True):
            np.testing.assert_allclose(reader[name], values, atol=1e-5)
            np.testing.assert_array_equal(reader[name], reader[name].T)
        np.testing.assert_array_equal(reader["P12345"], reader["sp|P12345|C_TEST"])
        assert reader.chain_lengths("a") == (len(SEQUENCES["a"]),)
        assert reader.attributes["provenance"]["inputs"].keys() == {"fasta", "model"}


def test_a_batch_of_padded_fair_esm_is_equal_too(fasta: Path, model: Path) -> None:
    reference = esm.ESM2(3, 32, 4).eval()
    reference.load_state_dict(build_model().state_dict())
    with torch.no_grad():
        padded = reference.predict_contacts(tokenize(list(SEQUENCES.values()))).numpy()
    maps = ContactModel(build_model(), "contacts", "float32", torch.device("cpu")).predict(list(SEQUENCES.values()))
    for values, found in zip(padded, maps, strict=True):
        np.testing.assert_allclose(found, values[: len(found), : len(found)], atol=1e-5)


def test_couplings_equal_the_mean_of_all_corrected_maps(fasta: Path, model: Path) -> None:
    made = run(fasta, model, values="coupling", pictures=0)
    with torch.no_grad():
        found = build_model()(tokenize([SEQUENCES["a"]]), need_head_weights=True)
    expected = compute_coupling(found["attentions"][0, ..., 1:-1, 1:-1])
    with ContactReader(made.contacts) as reader:
        assert reader.values == "coupling"
        np.testing.assert_allclose(reader["a"], expected, atol=1e-4)


def test_a_head_that_was_never_fitted_is_refused(fasta: Path, tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.safetensors")
    with refused("contacts.unfitted", model="tiny"):
        run(fasta, tiny)
    assert not list((tmp_path / "out").glob("*"))
    made = run(fasta, tiny, values="coupling", pictures=1)
    assert made.contacts.is_file()


@pytest.mark.parametrize("linker", [0, 25])
def test_chains_of_a_complex_are_joined_and_the_linker_is_cut_out(
    linker: int, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = SEQUENCES["b"], SEQUENCES["d"]
    fasta = tmp_path / "pair.fasta"
    fasta.write_text(f">pair\n{first[:7]}\n{first[7:].lower()}:{second}\n>single\n{first}\n")
    caplog.set_level("INFO")
    made = run(fasta, model, linker=linker, pictures=2)
    assert f"1 complex: chains are joined by {linker} glycines" in caplog.text
    (joined,) = predict_by_fair_esm([first + "G" * linker + second])
    kept = [*range(len(first)), *range(len(first) + linker, len(joined))]
    with ContactReader(made.contacts) as reader:
        assert reader.chain_lengths("pair") == (len(first), len(second))
        assert reader.attributes["linker"] == linker
        np.testing.assert_allclose(reader["pair"], joined[np.ix_(kept, kept)], atol=1e-5)
        np.testing.assert_allclose(reader["single"], predict_by_fair_esm([first])[0], atol=1e-5)


def test_values_are_stored_in_half_the_space_as_float16(fasta: Path, model: Path) -> None:
    made = run(fasta, model, dtype="float16", pictures=0)
    with ContactReader(made.contacts) as reader:
        for name, values in zip(SEQUENCES, predict_by_fair_esm(list(SEQUENCES.values())), strict=True):
            np.testing.assert_allclose(reader[name], values, atol=5e-4)


def test_a_finished_file_is_kept_and_other_settings_are_refused(fasta: Path, model: Path, tmp_path: Path) -> None:
    made = run(fasta, model, pictures=0)
    before = made.contacts.stat().st_mtime_ns
    run(fasta, model, pictures=1)
    assert made.contacts.stat().st_mtime_ns == before
    with refused("contacts.file-exists", differing=["dtype"]):
        run(fasta, model, dtype="float16")
    fasta.write_text(fasta.read_text(encoding="utf-8") + ">e\nMKV\n", encoding="utf-8")
    with refused("contacts.file-exists", differing=["fasta"]):
        run(fasta, model)
    assert len(ContactReader(run(fasta, model, pictures=0, restart=True).contacts)) == 5


def test_a_run_that_was_killed_resumes_and_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    fasta = tmp_path / "big.fasta"
    letters = np.array(list("LAGVSERTIDPKQNFYMHWC"))
    lengths = generator.integers(20, 60, 300)
    fasta.write_text(
        "".join(f">p{row}\n{''.join(generator.choice(letters, size))}\n" for row, size in enumerate(lengths))
    )
    options = {"batch_tokens": 64, "pictures": 0}
    expected = run(fasta, model, name="whole", **options)
    code = (
        "import sys, esm2kit.structure.contacts as stage\n"
        "stage.SYNC_SECONDS = 0\n"
        "from esm2kit import ContactsConfig, predict_contacts\n"
        "predict_contacts(ContactsConfig(sys.argv[1], sys.argv[2], model=sys.argv[3], batch_tokens=64, pictures=0))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(fasta), str(tmp_path / "out"), str(model)])
    journal = tmp_path / "out" / "big_contacts.part" / "done.bin"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.stat().st_size > 16 * 20):
        assert process.poll() is None, "the process ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "big_contacts.h5").exists()
    entries = journal.stat().st_size // 16
    with refused("contacts.run-exists", differing=["dtype"]):
        run(fasta, model, dtype="float16", **options)
    # half an entry, and damage to the values of a finished batch
    with open(journal, "ab") as file:
        file.write(b"12345")
    content = bytearray((journal.parent / "contacts.h5").read_bytes())
    starts = json.loads((journal.parent / "plan.json").read_text())["starts"]
    number = int(np.frombuffer(journal.read_bytes()[:8], "<i8")[0])
    longest = int(np.argsort(-lengths, kind="stable")[0])
    assert number == 0
    content[starts[longest] + 40] ^= 1
    (journal.parent / "contacts.h5").write_bytes(content)
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        predict = ContactModel.predict
        patch.setattr(ContactModel, "predict", lambda self, batch: computed.append(len(batch)) or predict(self, batch))
        found = run(fasta, model, **options)
    assert 0 < sum(computed) < 300
    assert entries >= 20
    with ContactReader(found.contacts) as reader, ContactReader(expected.contacts) as other:
        for name in other:
            np.testing.assert_array_equal(reader[name], other[name])
    assert not journal.parent.exists()


def test_check_knows_the_file(fasta: Path, model: Path, tmp_path: Path) -> None:
    path = run(fasta, model, pictures=0).contacts
    assert check(CheckConfig(path)).startswith("1 file (")
    renamed = tmp_path / "mine.h5"
    content = bytearray(path.read_bytes())
    renamed.write_bytes(content)
    assert check(CheckConfig(renamed)).startswith("1 file (")
    content[-9] ^= 1
    renamed.write_bytes(content)
    with refused("check.damaged"):
        check(CheckConfig(renamed))
    with refused("file.damaged", path=renamed):
        ContactReader(renamed)
    path.write_bytes(bytes(512) + bytes(content[512:]))
    with refused("check.damaged") as error:
        check(CheckConfig(path))
    assert "esm2kit contacts" in str(error.value)
    with refused("contacts.format"):
        ContactReader(path)
    with refused("contacts.absent"):
        ContactReader(tmp_path / "none.h5")


def test_reading_what_is_not_there_is_one_line(fasta: Path, model: Path) -> None:
    with ContactReader(run(fasta, model, pictures=0).contacts) as reader:
        assert "a" in reader
        assert "z" not in reader
        with pytest.raises(KeyError):
            reader["z"]
        with refused("contacts.id", found=0):
            reader[0]
    with refused("contacts.closed"):
        reader["a"]


@pytest.mark.parametrize(
    ("text", "options", "code", "values"),
    [
        (">a\nMKV:\n", {}, "contacts.empty-chain", {"id": "a"}),
        (">a\nMKV::MKV\n", {}, "contacts.empty-chain", {"id": "a"}),
        (">a\nMKV\n>a\nMKVL\n", {}, "contacts.ambiguous-id", {"id": "a"}),
        (">a\nMKVLM\n>b\nMK\n", {"max_residues": 4}, "contacts.too-long", {"found": 1, "allowed": 4}),
        (">a\nMK:MK\n", {"max_residues": 28}, "contacts.too-long", {"found": 1, "allowed": 28}),
        (">a\nMK-V\n", {}, "sequence.alignment", {}),
        ("", {}, "fasta.no-records", {}),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    text: str, options: dict, code: str, values: dict, tmp_path: Path, model: Path
) -> None:
    fasta = tmp_path / "bad.fasta"
    fasta.write_text(text)
    with refused(code, **values):
        run(fasta, model, **options)
    assert not list((tmp_path / "out").glob("*"))


def test_options_out_of_range_are_one_line(tmp_path: Path) -> None:
    for options in ({"linker": -1}, {"pictures": -1}, {"max_residues": 0}, {"batch_tokens": 0}):
        with refused("option.range", name=next(iter(options))):
            ContactsConfig(tmp_path, **options)
    with refused("config.choice", name="values"):
        ContactsConfig(tmp_path, values="contact")
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    with refused("structure.absent"):
        ContactsConfig(tmp_path / "a.fasta", structures=tmp_path / "none").check_inputs()


# a chain of which the CB of some residues touch, and all others are far apart
TOUCHING = [(2, 8), (4, 15), (6, 18), (1, 30), (3, 40), (5, 50), (7, 33)]


def place_residues(size: int) -> np.ndarray:
    """(T, 3) CB positions 20 Angstrom apart, but 5 Angstrom for the pairs of TOUCHING."""
    cb_T3 = np.array([[20.0 * place, 0, 0] for place in range(size)])
    for first, second in TOUCHING:
        cb_T3[second] = cb_T3[first] + [0, 5, 0]
    return cb_T3


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_precision_of_a_structure_that_is_known_by_construction(
    suffix: str, fasta: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "pdb"
    folder.mkdir()
    sequence = SEQUENCES["a"]
    write_structure(folder / f"a.{suffix}", build_chain(sequence, cb_T3=place_residues(len(sequence)), missing=[50]))
    command = ["contacts", str(fasta), "--out_dir", str(tmp_path / "out"), "--model", str(model)]
    assert main([*command, "--structures", str(folder), "--pictures", "2"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result["num_proteins"], result["num_structures"]) == (4, 1)
    lines = Path(result["precision"]).read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    observed = [place for place in range(len(sequence)) if place != 50]
    (values,) = predict_by_fair_esm([sequence])
    ranges = {"short": (6, 11), "medium": (12, 23), "long": (24, 99)}
    assert [(row["range"], row["top"]) for row in rows] == [
        (name, top) for name in ranges for top in ("L", "L/2", "L/5")
    ]
    for row in rows:
        low, high = ranges[row["range"]]
        pairs = [(i, j) for i in observed for j in observed if low <= j - i <= high]
        touching = {pair for pair in pairs if pair in TOUCHING}
        ranked = sorted(pairs, key=lambda pair: -values[pair])
        count = len(observed) // {"L": 1, "L/2": 2, "L/5": 5}[row["top"]]
        assert (int(row["selected"]), int(row["pairs"]), int(row["contacts"])) == (count, len(pairs), len(touching))
        assert float(row["precision"]) == pytest.approx(len(touching & set(ranked[:count])) / count, abs=1e-4)
        assert float(row["highest"]) == pytest.approx(min(len(touching) / count, 1), abs=1e-4)
        assert (row["id"], row["structure"], row["observed"]) == ("a", f"a.{suffix}", "53")
    report = read_sealed_json(Path(result["summary"]), "")
    assert report["summary"][0]["precision"]["value"] == pytest.approx(float(rows[0]["precision"]), abs=1e-4)
    assert report["summary"][0]["precision"]["low"] is None, "one protein has no interval"
    assert check(CheckConfig(tmp_path / "out")).startswith("3 files")
    table = Path(result["precision"])
    content = table.read_bytes()
    table.write_bytes(content.replace(b"short", b"shirt"))
    with refused("check.damaged"):
        check(CheckConfig(tmp_path / "out"))
    table.write_bytes(content)
    pictures = sorted(path.name for path in (tmp_path / "out" / "my_contacts").iterdir())
    assert pictures == ["a.png", "b.png"]


def test_a_precision_does_not_outlive_its_contacts(fasta: Path, model: Path, tmp_path: Path) -> None:
    structure = write_structure(tmp_path / "a.pdb", build_chain(SEQUENCES["a"]))
    config = ContactsConfig(fasta, tmp_path / "out", model=str(model), structures=structure, pictures=0)
    first = predict_contacts(config)
    again = predict_contacts(replace(config, structures=None))  # the same contacts
    assert again.precision is None
    assert first.precision.is_file()
    assert first.summary.is_file()
    predict_contacts(replace(config, structures=None, dtype="float16", restart=True))
    assert not first.precision.exists()
    assert not first.summary.exists()


def test_proteins_find_their_structures_by_id_by_chain_and_by_sequence(
    fasta: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pdb"
    folder.mkdir()
    first, second, third = (SEQUENCES[name] for name in ("a", "b", "sp|P12345|C_TEST"))
    records = {"1ABC_B": second, "sp|P12345|C_TEST": third, "other": first, "none": first[::-1]}
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()), encoding="utf-8")
    write_structure(folder / "1abc.pdb", [*build_chain(third), *build_chain(second, "B")])
    write_structure(folder / "P12345.cif", build_chain(third))
    write_structure(folder / "crystal.pdb", build_chain(first, missing=[3, 4]))
    write_structure(folder / "unused.pdb", build_chain("WWWWWWWWWWWWWWWW"))
    made = run(fasta, model, structures=folder, pictures=0)
    rows = [line.split("\t")[:5] for line in made.precision.read_text().splitlines()[1:]]
    found = {tuple(row) for row in rows}
    assert found == {
        ("1ABC_B", "1abc.pdb", "B", "20", "20"),
        ("sp|P12345|C_TEST", "P12345.cif", "A", "79", "79"),
        ("other", "crystal.pdb", "A", "54", "52"),
    }
    assert "1 of 4 structures fit no protein: unused" in caplog.text
    assert made.num_structures == 3
    (folder / "none.pdb").write_text((folder / "unused.pdb").read_text())
    with refused("contacts.structure-fit", id="none"):
        run(fasta, model, structures=folder, pictures=0)
    with refused("contacts.no-structure", found=1):
        run(fasta, model, structures=folder / "unused.pdb", pictures=0)


def test_a_structure_is_an_input_with_its_chains(model: Path, tmp_path: Path) -> None:
    cb_T3 = place_residues(54)
    atoms = build_chain(SEQUENCES["a"], "A", cb_T3=cb_T3)
    other = cb_T3[:20] + np.array([0, 300, 0])
    other[9] = cb_T3[20] + np.array([0, 0, 6])  # the only contact between the chains
    atoms += build_chain(SEQUENCES["b"], "B", cb_T3=other)
    path = write_structure(tmp_path / "2xyz.cif", atoms)
    made = run(path, model, pictures=1)
    with ContactReader(made.contacts) as reader:
        assert reader.ids == ("2xyz",)
        assert reader.chain_lengths("2xyz") == (54, 20)
        values = reader["2xyz"]
    lines = [line.split("\t") for line in made.precision.read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    between = next(row for row in rows if row["range"] == "between chains" and row["top"] == "L")
    assert (between["pairs"], between["contacts"], between["chains"]) == (str(54 * 20), "1", "A, B")
    rank = int((values[:54, 54:] > values[20, 63]).sum())
    assert float(between["precision"]) == pytest.approx((rank < 74) / 74, abs=1e-4)
    assert float(between["baseline"]) == pytest.approx(1 / (54 * 20), abs=1e-4)


def test_a_bad_structure_is_refused_before_the_model_is_loaded(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pdb").write_text("ATOM      1  N   MET A   1      0.0")
    with refused("structure.unreadable", path=tmp_path / "bad.pdb"):
        run(fasta, tmp_path / "no-model", structures=tmp_path / "bad.pdb")


def test_an_existing_file_of_another_program_is_refused(fasta: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "my_contacts.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError):
        run(fasta, model)


@pytest.mark.parametrize("values", ["contacts", "coupling"])
def test_very_short_proteins_have_maps_and_pictures(values: str, model: Path, tmp_path: Path) -> None:
    fasta = tmp_path / "short.fasta"
    fasta.write_text(">one\nM\n>two\nMK\n>A/B\nMKV\n>a-b\nMKV\n")
    write_structure(tmp_path / "one.pdb", build_chain("M"))
    made = run(fasta, model, values=values, structures=tmp_path / "one.pdb")
    with ContactReader(made.contacts) as reader:
        assert [reader[name].shape for name in reader] == [(1, 1), (2, 2), (3, 3), (3, 3)]
        assert all(np.isfinite(reader[name]).all() for name in reader)
    assert made.precision is None, "no pair of one residue has a range"
    names = sorted(path.name for path in made.files if path.suffix == ".png")
    assert names == ["A-B.png", "a-b_4.png", "one.png", "two.png"]


def test_a_full_disk_is_one_line_and_the_run_resumes(fasta: Path, model: Path, tmp_path: Path) -> None:
    expected = run(fasta, model, name="whole", batch_tokens=1, pictures=0)
    real, written = stage.write_at, []

    def fill(handle: int, data: memoryview, start: int) -> int:
        if len(written) == 3:  # three proteins, and then nothing
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(start)
        return real(handle, data, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "write_at", fill)
        with refused("disk.full", path=tmp_path / "out" / "my_contacts.part"):
            run(fasta, model, batch_tokens=1, pictures=0)
    assert not (tmp_path / "out" / "my_contacts.h5").exists()
    resumed = run(fasta, model, batch_tokens=1, pictures=0)
    with ContactReader(resumed.contacts) as reader, ContactReader(expected.contacts) as other:
        for name in other:
            np.testing.assert_array_equal(reader[name], other[name])


def test_two_processes_do_not_write_the_same_run(fasta: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold_lock(tmp_path / "out" / ".my_contacts.part.lock", "busy"), refused("file.locked"):
        run(fasta, model)

"""All file formats of a task give the same data, and each error names the file and the record."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.tasks.data import load_task
from esm2kit.tasks.files import parse_attributes, parse_set, read_split
from esm2kit.tasks.sources import Source, open_text

GOOD = {
    "s.fasta": (
        ">a SET=train VALIDATION=False\nHCE\n>b SET=train VALIDATION=True\nEC\n>c SET=test VALIDATION=False\nCH\nE\n"
    ),
    "sequences.fasta": ">a\nMKV\n>b extra words\nLL\n>c\nACD\n>unlabelled\nWW\n",
    "mask.fasta": ">a\n111\n>b\n01\n>c\n110\n",
}

FILE = Source(Path("t.fasta"))


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def fasta(*rows):
    return "".join(
        f">{name} TARGET={target} SET={chosen} VALIDATION={flag}\nMKV\n" for name, target, chosen, flag in rows
    )


THREE = (("a", "1.5", "train", "False"), ("b", "2", "train", "True"), ("c", "-1.2e-05", "test", "False"))


def test_a_residue_task_from_three_files(tmp_path):
    data = load_task("mine", None, write(tmp_path / "mine", GOOD).parent)
    assert (data.ids, data.sequences) == (["a", "b", "c"], ["MKV", "LL", "ACD"])
    assert data.task.labels == ("C", "E", "H")
    assert data.targets.tolist() == [2, 0, 1, 1, 0, 0, 2, 1]
    assert data.scored.tolist() == [True, True, True, False, True, True, True, False]
    assert data.sets.tolist() == ["train", "validation", "test"]
    assert data.target_rows("test").tolist() == [5, 6]


def test_a_single_file_with_masks_gives_the_same_task(tmp_path):
    text = (
        ">a TARGET=HCE SET=train MASK=111\nMKV\n>b TARGET=EC SET=val MASK=01\nLL\n"
        ">c TARGET=CHE SET=test MASK=110\nACD\n>d TARGET=HH SET=pred\nWW\n"
    )
    three = load_task("mine", None, write(tmp_path / "three" / "mine", GOOD).parent)
    one = load_task("one", None, write(tmp_path / "one", {"one.fasta": text}))
    assert (one.targets == three.targets).all()
    assert (one.scored == three.scored).all()
    assert (one.sets == three.sets).all()
    assert "1 records of one.fasta belong to no set of this split" in one.notes[0]


@pytest.mark.parametrize("form", ["crlf", "gzip", "zip", "wrapped"])
def test_line_ends_and_compression_do_not_matter(tmp_path, form):
    plain = load_task("mine", None, write(tmp_path / "plain" / "mine", GOOD).parent)
    folder = tmp_path / form / "mine"
    folder.mkdir(parents=True)
    if form == "zip":
        with zipfile.ZipFile(folder / "splits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in GOOD.items():
                archive.writestr(f"splits/{name}", text)
            archive.writestr("splits/.DS_Store", b"\0\1\2")
    for name, text in GOOD.items():
        if form == "crlf":
            (folder / name).write_bytes(text.replace("\n", "\r\n").encode())
        elif form == "gzip":
            suffix = ".gz" if name == "s.fasta" else ""
            (folder / f"{name}{suffix}").write_bytes(gzip.compress(text.encode()))
        elif form == "wrapped":
            (folder / name).write_text(text.replace("\nMKV", "\nmk\n\nv"))
    data = load_task("mine", None, folder.parent)
    assert data.sequences == plain.sequences
    assert (data.targets == plain.targets).all()


def test_csv_with_empty_and_true_validation_and_rows_without_a_set(tmp_path):
    text = "sequence,target,set,validation\nMKV,1.0,train,\nMKL,2.0,train,True\nMKI,3.0,test,\nMKW,4.0,,\n"
    data = load_task("t", None, write(tmp_path, {"t.csv": text}))
    assert data.ids == ["Sequence0", "Sequence1", "Sequence2"]
    assert data.sets.tolist() == ["train", "validation", "test"]


@pytest.mark.parametrize("delimiter", ";\t,")
def test_a_table_is_read_with_any_delimiter_and_any_case_of_the_column_names(tmp_path, delimiter):
    lines = ["ID,Sequence,TARGET,Set ,validation,", "a, MKV ,1.5,train,,", "b,mkl,2.5,Train,TRUE,", "c,MKI,3.5,test,,"]
    (tmp_path / "t.csv").write_bytes(("\ufeff" + "\r\n".join(lines).replace(",", delimiter) + "\r\n").encode())
    data = load_task("t", None, tmp_path)
    assert (data.ids, data.sequences, data.targets.tolist()) == (
        ["a", "b", "c"],
        ["MKV", "MKL", "MKI"],
        [1.5, 2.5, 3.5],
    )
    assert data.sets.tolist() == ["train", "validation", "test"]


def test_a_table_in_another_encoding_or_with_an_unmatched_quote_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("id,sequence,target,set\nMüller,MKV,1,train\n".encode("cp1252"))
    with refused("task.encoding", path=tmp_path / "t.csv"):
        load_task("t", None, tmp_path)
    (tmp_path / "t.csv").write_text('sequence,target,set\nMKV,1,"train\n' + "MKV,1,train\n" * 20_000)
    with refused("task.table", path=tmp_path / "t.csv"):
        load_task("t", None, tmp_path)


def test_residue_values_are_separated_by_semicolons(tmp_path):
    text = ">a TARGET=1;2;3 SET=train\nMKV\n>b TARGET=0.5;-1e-3 SET=val\nLL\n>c TARGET=1;1 SET=test\nAC\n"
    data = load_task("t", None, write(tmp_path, {"t.fasta": text}))
    assert (data.task.level, data.task.target) == ("residue", "value")
    assert data.targets.tolist() == [1, 2, 3, 0.5, -1e-3, 1, 1]


def test_integers_are_classes_unless_the_target_is_value(tmp_path):
    rows = [("a", "0", "train", ""), ("b", "1", "train", ""), ("c", "1", "train", "True"), ("d", "0", "test", "")]
    folder = write(tmp_path, {"t.fasta": fasta(*rows)})
    data = load_task("t", None, folder)
    assert data.task.target == "class"
    assert "the sequences of 1 of 1 test proteins also occur in train or validation" in data.notes
    assert load_task("t", None, folder, target_type="value").task.target == "value"


TABLE = "id,sequence,target,set,validation\n" + "".join(
    f"p{i},MKV{residue},{{}},{('train', 'train', 'test')[i % 3]},{'True' if i % 3 == 1 else ''}\n"
    for i, residue in enumerate("ACDEFGHIKL")
)


@pytest.mark.parametrize("others", ["7", "60.25"])
@pytest.mark.parametrize("odd", ["n.d.", "NA", "<1", "60.11C"])
def test_a_text_among_numbers_is_an_error_and_not_a_class(tmp_path, others, odd):
    folder = write(tmp_path, {"t.csv": TABLE.format(*[others] * 4, odd, *[others] * 5)})
    with refused("task.target", record="p4", found=odd):
        load_task("t", None, folder)
    with refused("task.target", record="p4", found=odd):
        load_task("t", None, folder, target_type="value")
    assert odd in load_task("t", None, folder, target_type="class").task.labels


def test_a_number_among_texts_is_a_class(tmp_path):
    folder = write(tmp_path, {"t.csv": TABLE.format(*["low", "low", "low", "7", "7", "7", "low", "low", "low", "low"])})
    assert load_task("t", None, folder).task.labels == ("7", "low")


def test_a_single_class_is_noted(tmp_path, caplog):
    caplog.set_level("INFO", "esm2kit")
    data = load_task("t", None, write(tmp_path, {"t.csv": TABLE.format(*["low"] * 10)}))
    assert "train has a single class, 'low': the scores are meaningless" in data.notes
    assert "train has a single class" in caplog.text


@pytest.mark.parametrize("build_task", [1, 10])
def test_decimal_commas_are_refused(tmp_path, build_task):
    folder = write(tmp_path, {"t.csv": TABLE.format(*["60.5"] * (10 - build_task), *['"60,5"'] * build_task)})
    with refused("task.target", record=f"p{10 - build_task}", found="60,5"):
        load_task("t", None, folder)


def test_the_inferred_target_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", "esm2kit")
    load_task("t", None, write(tmp_path, {"t.csv": TABLE.format(*"1212121212")}))
    assert "train 4, validation 3, test 3; one class per protein, scored by accuracy" in caplog.text
    assert "2 distinct integer targets are treated as classes; set target_type to value if not" in caplog.text
    caplog.clear()
    load_task("t", None, tmp_path, target_type="value")
    assert "one value per protein, scored by spearman" in caplog.text
    assert "treated as classes" not in caplog.text


def test_both_spellings_of_lysosome_are_one_class(tmp_path):
    labels = ["Lysosome/Vacuole", "Lysosome", "Cell membrane", "Cell_membrane", "Lysosome"]
    sets = [("train", "False"), ("train", "False"), ("train", "False"), ("train", "True"), ("test", "False")]
    text = fasta(*((f"p{i}", label, *chosen) for i, (label, chosen) in enumerate(zip(labels, sets, strict=True))))
    data = load_task("scl", "mixed_soft", write(tmp_path / "scl", {"mixed_soft.fasta": text}).parent)
    assert [data.task.labels[target] for target in data.targets] == [
        "Lysosome/Vacuole", "Lysosome/Vacuole", "Cell_membrane", "Cell_membrane", "Lysosome/Vacuole"
    ]  # fmt: skip
    assert not data.official
    assert any("set sizes differ from FLIP's" in note for note in data.notes)


texts = st.text(st.characters(codec="ascii", exclude_categories=("Cc", "Zs"), exclude_characters="="), min_size=1)


@given(name=texts, target=texts, chosen=texts)
def test_any_header_is_parsed_back(name, target, chosen):
    parsed, attributes = parse_attributes(f"{name} TARGET={target} SET={chosen}", FILE)
    assert (parsed, attributes) == (name, {"TARGET": target, "SET": chosen})


def test_a_value_with_spaces_ends_at_the_next_key():
    assert parse_attributes("p TARGET=Cell membrane SET=train", FILE)[1] == {
        "TARGET": "Cell membrane",
        "SET": "train",
    }


@pytest.mark.parametrize("name", ["nan", "", "None", "pred"])
def test_a_record_without_a_set_is_dropped(name, tmp_path):
    assert parse_set("a", name, "False", Source(tmp_path)) is None


def changed(name, old, new):
    assert old in GOOD[name]
    return GOOD | {name: GOOD[name].replace(old, new)}


@pytest.mark.parametrize(
    ("files", "code", "values"),
    [
        (changed("s.fasta", "HCE", "HCEE"), "task.label-count", {"record": "a", "found": 4, "expected": 3}),
        (changed("sequences.fasta", "MKV", "MK1"), "task.residue", {"record": "a", "found": "1", "residue": 3}),
        (changed("sequences.fasta", "MKV", ""), "task.no-sequence", {"record": "a"}),
        (changed("sequences.fasta", ">c", ">x"), "task.not-in-sequences", {"record": "c"}),
        (changed("mask.fasta", "111", "121"), "task.mask", {"record": "a"}),
        (changed("mask.fasta", "111", "000"), "task.empty-mask", {"set": "train"}),
        (changed("mask.fasta", ">c", ">x"), "task.not-in-mask", {"record": "c"}),
        (changed("s.fasta", "SET=test", "SET=nan"), "task.empty-set", {"set": "test"}),
        (changed("s.fasta", "SET=test", "SET=tset"), "task.set", {"record": "c", "found": "tset"}),
        (changed("s.fasta", "VALIDATION=True", "VALIDATION=maybe"), "task.validation", {"found": "maybe"}),
        (changed("s.fasta", "SET=test ", ""), "task.no-set", {"record": "c"}),
        (changed("s.fasta", "CH\nE", "CX\nE"), "task.unseen-class", {"label": "X"}),
        (changed("s.fasta", ">a", "HH\n>a"), "task.no-header", {"line": 1}),
        (GOOD | {"s.fasta": ""}, "task.no-records", {}),
        (
            GOOD | {"s.fasta": GOOD["s.fasta"].replace("SET=train", "SET=test").replace("=True", "=False")},
            "task.empty-set",
            {"set": "train"},
        ),
        (changed("s.fasta", "SET=train VALIDATION=True", "SET=test VALIDATION=True"), "task.contradiction", {}),
        ({"s.fasta": fasta(*THREE[:2], ("c", "nan", "test", "False"))}, "task.target", {"found": "nan"}),
        (
            {"s.fasta": ">a TARGET=1;inf;3 SET=train\nMKV\n>b TARGET=1;2 SET=val\nLL\n"},
            "task.target",
            {"record": "a", "found": "inf"},
        ),
        ({"s.csv": "sequence,set\nMKV,train\n"}, "task.columns", {"missing": ("target",), "repeated": ()}),
        ({"s.csv": "Sequenz;Wert\n"}, "task.columns", {"missing": ("sequence", "target", "set")}),
        ({"s.csv": ""}, "task.columns", {"missing": ("sequence", "target", "set")}),
        ({"s.csv": "sequence,target,set,Target\nMKV,1,train,2\n"}, "task.columns", {"repeated": ("target",)}),
        ({"s.csv": "id,sequence,set,target\np,MKV,train,60,11\n"}, "task.fields", {"record": "p", "row": 1}),
        ({"s.csv": "sequence,target,set\nMKV,,train\n"}, "task.no-target", {"record": "Sequence0"}),
        ({"s.csv": "sequence,target,set\nMKV,1,tset\n"}, "task.set", {"record": "Sequence0", "found": "tset"}),
        ({"s.csv": "sequence,target,set,validation\nMKV,1,train,x\n"}, "task.validation", {"found": "x"}),
        (
            {"s.csv": "sequence,target,set\nMKV,1e301,train\n"},
            "task.target-range",
            {"found": "1e301", "largest": 1e300},
        ),
        ({"s.csv": "sequence,target,set\nMKV,-2e300,train\n"}, "task.target-range", {"found": "-2e300"}),
        ({"s.csv": "sequence,target,set\nMKV,-9e299,train\n"}, "task.empty-set", {"set": "validation"}),
        ({"s.csv": "sequence,target,set\nMKV,1.5,train\n"}, "task.empty-set", {"set": "validation"}),
        ({"s.csv": "sequence,target,set\nMKV,1.5,train\nMKL,1.5,val\n"}, "task.empty-set", {"set": "test"}),
        ({"s.xlsx": "PK"}, "task.no-split", {}),
        ({}, "task.no-split", {}),
        ({"s.fasta": ">a SET=train\nMKV\n"}, "task.no-target", {"record": "a"}),
        ({"s.fasta": fasta(*THREE[:2], ("c", "", "test", "False"))}, "task.no-target", {"record": "c"}),
        (
            {
                "s.fasta": fasta(*THREE),
                "tasks.yaml": yaml.safe_dump({"tasks": [{"name": "mine", "metric": "spearmn"}]}),
            },
            "task.metric",
            {"task": "mine", "found": "spearmn"},
        ),
        (
            {
                "s.fasta": fasta(*THREE),
                "tasks.yaml": yaml.safe_dump({"tasks": [{"name": "mine", "target": "number"}]}),
            },
            "task.kind",
            {"task": "mine", "name": "target", "found": "number"},
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path, files, code, values):
    folder = write(tmp_path / "mine", files)
    with refused(code, **values):
        load_task("mine", None, folder.parent)


def test_a_binary_label_that_is_missing_from_train_is_refused(tmp_path):
    """Class 3 of bind is metal (1) plus nucleic (2), so a train class with either bit covers that label."""
    labels = ">a SET=train\n121\n>b SET=train VALIDATION=True\n00\n>c SET=test\n030\n"
    folder = write(tmp_path / "bind", {"from_publication.fasta": labels, "sequences.fasta": GOOD["sequences.fasta"]})
    assert load_task("bind", None, tmp_path).sizes["test"] == 1
    (folder / "from_publication.fasta").write_text(labels.replace("030", "043"))
    with refused("task.unseen-class", label="small"):
        load_task("bind", None, tmp_path)


def test_an_unknown_label_is_refused(tmp_path):
    text = fasta(("a", "Nucleus", "train", ""), ("b", "Nucleus", "train", "True"), ("c", "Moon", "test", ""))
    write(tmp_path / "scl", {"balanced.fasta": text})
    with refused("task.label", record="c", found="Moon"):
        load_task("scl", "balanced", tmp_path)


def test_an_unknown_residue_label_is_refused(tmp_path):
    write(tmp_path / "secondary_structure", GOOD | {"sampled.fasta": GOOD["s.fasta"].replace("HCE", "HGE")})
    with refused("task.label", record="a", found="G", known=("H", "E", "C")):
        load_task("secondary_structure", None, tmp_path)


def test_an_unknown_task_suggests_the_nearest(tmp_path):
    with refused("task.unknown", name="meltom", nearest="meltome"):
        load_task("meltom", None, tmp_path)


def test_a_task_without_files_is_refused(tmp_path):
    with refused("task.absent", task="gb1"):
        load_task("gb1", None, tmp_path)


@pytest.mark.parametrize("name", ["../evil.fasta", "/etc/evil.fasta", "a/../../b.fasta", "C:\\evil.fasta"])
def test_a_zip_with_a_path_outside_is_refused(tmp_path, name):
    (tmp_path / "gb1").mkdir()
    with zipfile.ZipFile(tmp_path / "gb1" / "splits.zip", "w") as archive:
        archive.writestr(name, "x")
    with refused("zip.path"):
        load_task("gb1", None, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["gb1", "splits.zip"]


def test_a_zip_bomb_is_refused(tmp_path):
    (tmp_path / "gb1").mkdir()
    with zipfile.ZipFile(tmp_path / "gb1" / "splits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("two_vs_rest.csv", b"\0" * (8 << 20))
    with refused("zip.size", member="two_vs_rest.csv"):
        load_task("gb1", None, tmp_path)


def test_a_damaged_zip_or_gzip_is_refused(tmp_path):
    (tmp_path / "gb1").mkdir()
    (tmp_path / "gb1" / "splits.zip").write_bytes(b"PK\3\4 nothing")
    with refused("task.damaged"):
        load_task("gb1", None, tmp_path)
    write(tmp_path / "own", {})
    whole = gzip.compress(np.random.default_rng(0).bytes(400).hex().encode())
    for packed in (whole[:-20], whole[:50] + b"\xff" * 10 + whole[60:]):
        (tmp_path / "own" / "s.fasta.gz").write_bytes(packed)
        with refused("task.damaged"):
            load_task("own", None, tmp_path)
    (tmp_path / "gb1").rename(tmp_path / "mine")
    with refused("task.damaged"):
        load_task("mine", None, tmp_path)


def test_one_of_several_splits_must_be_chosen(tmp_path):
    write(tmp_path / "mine", {"s.fasta": fasta(*THREE), "t.fasta": fasta(*THREE)})
    with refused("task.which-split", allowed=("s", "t")):
        load_task("mine", None, tmp_path)
    assert load_task("mine", "t", tmp_path).split == "t"
    assert load_task(str(tmp_path / "mine" / "t.fasta"), None, tmp_path / "elsewhere").split == "t"


def test_a_specified_file_is_read(tmp_path):
    table = "sequence,target,set,validation\nMKV,7.5,train,\nMKL,2.0,train,True\nMKI,3.0,test,\n"
    folder = write(tmp_path, {"t.fasta": fasta(*THREE), "t.csv": table, "my.own.fa": fasta(*THREE)})
    assert load_task(str(folder / "t.csv"), None, tmp_path / "elsewhere").targets[0] == 7.5
    assert load_task("t", None, folder).targets[0] == 1.5
    own = load_task(str(folder / "my.own.fa"), None, tmp_path / "elsewhere")
    assert (own.task.name, own.split) == ("my.own", "my.own")
    (folder / "u.fa.gz").write_bytes(gzip.compress(fasta(*THREE).encode()))
    assert load_task("u", None, folder).task.name == "u"
    (folder / "notes.txt").write_text("x")
    with refused("task.not-a-split", path=folder / "notes.txt"):
        load_task(str(folder / "notes.txt"), None, folder)


def test_integer_classes_are_sorted_as_numbers(tmp_path):
    rows = [(f"{chosen}{flag}{i}", str(i), chosen, flag) for chosen, flag in (("train", ""), ("train", "True"),
            ("test", "")) for i in (10, 2, 1)]  # fmt: skip
    assert load_task("t", None, write(tmp_path, {"t.fasta": fasta(*rows)})).task.labels == ("1", "2", "10")


def test_read_split_returns_the_files_that_it_read(tmp_path):
    _, files, dropped, _ = read_split(write(tmp_path / "mine", GOOD), "s")
    assert {name: source.path.name for name, source in files.items()} == {
        "split": "s.fasta", "sequences": "sequences.fasta", "mask": "mask.fasta"
    }  # fmt: skip
    assert dropped == 0


def build_task(tmp_path, num_classes=4, each=30):
    sets = [("train", "False")] * each * 2 + [("train", "True")] * each + [("test", "False")] * each
    rows = [(f"p{i}", f"class{i % num_classes if i % 7 else 0}", *chosen) for i, chosen in enumerate(sets)]
    return load_task("t", None, write(tmp_path, {"t.fasta": fasta(*rows)}))


def test_limit_takes_a_seeded_stratified_subset(tmp_path):
    data = build_task(tmp_path)
    before = (tmp_path / "t.fasta").read_bytes()
    small = data.limit_proteins(12, seed=1)
    assert small.sizes == {"train": 12, "validation": 12, "test": 12}
    assert set(small.ids) <= set(data.ids)
    whole, part = (np.bincount(d.targets[d.rows("train")], minlength=4) for d in (data, small))
    assert np.abs(part / 12 - whole / 60).max() <= 1 / 12 + 1e-9
    assert (part > 0).all()
    assert small.ids == data.limit_proteins(12, seed=1).ids != data.limit_proteins(12, seed=2).ids
    assert data.limit_proteins(1000).ids == data.ids
    assert (tmp_path / "t.fasta").read_bytes() == before
    assert "not comparable with published" in small.notes[-1]


def test_a_limit_below_the_number_of_classes_or_quantiles(tmp_path):
    small = build_task(tmp_path).limit_proteins(3)
    assert small.sizes == {"train": 4, "validation": 4, "test": 4}
    assert "at most 3 proteins per set, at least one per class" in small.notes[-1]
    rows = [
        (f"p{i}", f"{i / 8}", *(("train", "False"), ("train", "True"), ("test", "False"))[i % 3]) for i in range(90)
    ]
    values = load_task("v", None, write(tmp_path, {"v.fasta": fasta(*rows)})).limit_proteins(3)
    assert values.sizes == {"train": 3, "validation": 3, "test": 3}
    assert "per class" not in values.notes[-1]


def test_a_subset_keeps_targets_and_masks_together(tmp_path):
    data = load_task("mine", None, write(tmp_path / "mine", GOOD).parent)
    part = data.subset(np.array([0, 2]))
    assert part.targets.tolist() == [2, 0, 1, 0, 2, 1]
    assert part.scored.tolist() == [True, True, True, True, True, False]


def test_a_zip_that_claims_another_version_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("s.csv", "sequence,target,set\nMKV,1.5,train\nMKL,2.5,val\nMKI,3.5,test\n")
    assert load_task(str(tmp_path), None, tmp_path).targets.tolist() == [1.5, 2.5, 3.5]
    content = bytearray((tmp_path / "s.zip").read_bytes())
    content[content.index(b"PK\1\2") + 6] = 240  # the version that is needed to unpack
    (tmp_path / "s.zip").write_bytes(content)
    with refused("task.damaged"):
        load_task(str(tmp_path), None, tmp_path)


def test_an_encrypted_archive_is_one_line(tmp_path: Path) -> None:
    """zipfile raises a RuntimeError for it, when the member is opened."""
    with zipfile.ZipFile(tmp_path / "splits.zip", "w") as archive:
        archive.writestr("two.csv", "sequence,target,set,validation\nMKT,1,train,False\n")
    content = bytearray((tmp_path / "splits.zip").read_bytes())
    content[6] |= 1  # the flag of an encrypted member, in its own header and in the directory of the archive
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "splits.zip").write_bytes(content)
    source = Source(tmp_path / "splits.zip", "two.csv")
    with refused("task.damaged", path=source.path) as caught, open_text(source):
        pass
    assert "encrypted" in str(caught.value)

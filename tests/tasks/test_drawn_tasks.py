"""Reading drawn tasks agrees with a plain second reader in this file."""

import csv
import random
import re
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2kit.tasks.data import load_task

RESIDUE = ["residue class", "residue value"]
SETS = ("train", "train", "validation", "test")
FORMS = {
    "word": "".join,
    "blanks": " ".join,
    "commas": ",".join,
    "semicolons": ";".join,
    "python": lambda labels: str(list(labels)),
    "json": lambda labels: "[" + ", ".join(f'"{label}"' for label in labels) + "]",
}
ALPHABETS = ("HC", "HEC", "01", "0123456789", "HGEBITSC", "abcdefghijklmnopqrst", "123456789", "-HE", "αβ")
CLASSES = ("positive", "negative", "Cell membrane", "Lysosome/Vacuole", "3a", "7TM", "1_1", "2_1", "a.1", "x+", "μ")
IDS = ("p{}", "sp|P{}|X_HUMAN", "a/b:{}=c", "{}", "GFP A{}K", "Ü{}")
KEYS = {"upper": str.upper, "lower": str.lower, "title": str.title}


@st.composite
def tasks(draw):
    """Draw a task: kind, form of its labels, ids and file, and the truth (id, sequence, set, labels)."""
    kind = draw(
        st.sampled_from(["protein class", "protein integer", "protein value", "residue class", "residue value"])
    )
    form = draw(st.sampled_from(["csv", "fasta", "bodies"] if kind == "residue class" else ["csv", "fasta"]))
    labels = draw(st.sampled_from(["semicolons"] if kind == "residue value" else list(FORMS)))
    ids = draw(st.sampled_from([style for style in IDS if form == "csv" or " " not in style]))
    alphabet = draw(st.sampled_from(ALPHABETS))
    if kind == "residue class" and labels == "semicolons" and alphabet.isdigit():
        labels = "blanks"  # numbers separated by semicolons are values
    generator = random.Random(draw(st.integers(0, 2**32)))
    names = generator.sample(CLASSES, 3)
    records = []
    for number in range(40):
        sequence = "".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(9, 60)))
        if kind == "protein class":
            truth = [names[number // 4 % 3]]
        elif kind == "protein integer":
            truth = [str(number // 4 % 5 - 1)]
        elif kind == "residue class":
            truth = [alphabet[(place + number) % len(alphabet)] for place in range(len(sequence))]
            generator.shuffle(truth)
        else:
            size = 1 if kind == "protein value" else len(sequence)
            truth = [repr(round(generator.gauss(0, 3), 4) + 0.00005) for _ in range(size)]
            if kind == "residue value" and number % 3 == 0:
                truth[0] = "nan"
        records.append((ids.format(number), sequence, SETS[number % 4], truth))
    text = {"semicolons": ";", "tab": "\t", "comma": ","}[draw(st.sampled_from(["semicolons", "tab", "comma"]))]
    style = {
        "separator": text,
        "blank": draw(st.sampled_from([" ", "\t", "  "])),
        "keys": KEYS[draw(st.sampled_from(list(KEYS)))],
        "flag": draw(st.booleans()),  # validation by a flag, as in FLIP, or as a set
        "extra": draw(st.booleans()),
        "crlf": draw(st.booleans()),
        "width": draw(st.sampled_from([7, 60])),
        "order": generator.sample(["id", "sequence", "target", "set", "validation", "note"], 6),
    }
    return kind, form, labels, records, style


def write_task(folder, form, labels, records, style):
    """Write a drawn task; the file is the only thing that both readers share."""
    key, lines, sequences = style["keys"], [], []
    rows = []
    for name, sequence, chosen, truth in records:
        target = FORMS[labels](truth) if len(truth) > 1 else truth[0]
        held = chosen == "validation"
        stated = "train" if held and style["flag"] else "val" if held else chosen
        flag = str(held) if style["flag"] else ""
        rows.append(
            {"id": name, "sequence": sequence, "target": target, "set": stated, "validation": flag, "note": "n"}
        )
        body = "".join(truth) if form == "bodies" else sequence
        fields = [f"{key('SET')}={stated}", *([f"{key('VALIDATION')}={flag}"] if flag else [])]
        fields += [f"{key('TARGET')}={target}"] if form == "fasta" else []
        fields += ["OS=Homo sapiens"] if style["extra"] else []
        lines.append(f">{name}{style['blank']}{style['blank'].join(fields)}")
        lines += [body[start : start + style["width"]] for start in range(0, len(body), style["width"])]
        sequences.append(f">{name}{style['blank']}described\n{sequence}\n")
    folder.mkdir()
    end = "\r\n" if style["crlf"] else "\n"
    if form == "csv":
        with open(folder / "s.csv", "w", newline="", encoding="utf-8") as file:
            columns = [name for name in style["order"] if name != "note" or style["extra"]]
            table = csv.writer(file, delimiter=style["separator"], lineterminator=end)
            table.writerow(map(key, columns))
            table.writerows([row[name] for name in columns] for row in rows)
    else:
        (folder / "s.fasta").write_bytes((end.join(lines) + end).encode())
    if form == "bodies":
        (folder / "sequences.fasta").write_bytes("".join(sequences).replace("\n", end).encode())


@settings(max_examples=150, deadline=None)
@given(drawn=tasks())
def test_reading_a_drawn_task_gives_the_same_as_a_plain_reader(drawn):
    kind, form, labels, records, style = drawn
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder) / "t", form, labels, records, style)
        data = load_task("t", None, Path(folder))
        plain = read_plainly(Path(folder) / "t")
    assert data.ids == [row["id"] for row in plain] == [record[0] for record in records]
    assert data.sequences == [row["sequence"] for row in plain]
    assert data.sets.tolist() == [row["set"] for row in plain] == [record[2] for record in records]
    level, _, target = kind.partition(" ")
    assert (data.task.level, data.task.target) == (level, "class" if target in ("class", "integer") else "value")
    expected = [label for row in plain for label in ([row["target"]] if level == "protein" else row["labels"])]
    assert expected == [label for record in records for label in record[3]]
    if data.task.target == "class":
        assert [data.task.labels[index] for index in data.targets] == expected
        assert set(data.task.labels) == set(expected)
        assert data.scored.all()
    else:
        assert data.scored.tolist() == [label != "nan" for label in expected]
        np.testing.assert_array_equal(data.targets, [0 if label == "nan" else float(label) for label in expected])
    unread = [note for note in data.notes if "not read" in note]
    assert len(unread) == style["extra"]


def read_plainly(folder):
    """Read a task without the library: one dictionary per record, with the target both complete and split."""
    if (folder / "s.csv").exists():
        text = (folder / "s.csv").read_bytes().decode()
        delimiter = max(",;\t", key=text.split("\n")[0].count)
        header, *cells = csv.reader(text.replace("\r\n", "\n").split("\n"), delimiter=delimiter)
        rows = [dict(zip((name.lower() for name in header), row, strict=True)) for row in cells if row]
    else:
        rows = []
        for record in re.split(r"(?m)^>", (folder / "s.fasta").read_bytes().decode().replace("\r", ""))[1:]:
            header, _, body = record.partition("\n")
            name, *words = re.split(r"[ \t]+", header)
            row, last = {"id": name}, ""
            for word in words:
                field, equals, value = word.partition("=")
                if equals and field.lower() in ("set", "validation", "target", "os"):
                    last, row[field.lower()] = field.lower(), value
                else:
                    row[last] += f" {word}"
            row["sequence"] = body.replace("\n", "")
            rows.append(row)
        if (folder / "sequences.fasta").exists():
            text = (folder / "sequences.fasta").read_bytes().decode().replace("\r", "")
            found = re.findall(r"(?m)^>(\S+).*\n(\w+)\n", text)
            for row, (name, sequence) in zip(rows, found, strict=True):
                assert row["id"] == name
                row["target"], row["sequence"] = row["sequence"], sequence
    for row in rows:
        held = row["set"] == "val" or row.get("validation") == "True"
        row["set"] = "validation" if held else row["set"]
        target = row["target"].replace("[", "").replace("]", "").replace("'", "").replace('"', "")
        parts = re.split(r"[;,]\s*|\s+", target)
        row["labels"] = parts if len(parts) == len(row["sequence"]) else list(row["target"])
    return rows

"""Tables of measurements as people have them, joined with the proteins by id."""

import logging
from pathlib import Path

import pandas as pd
import pytest
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.embedding.neighbours import sha256_labels
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.columns import read_columns

RECORDS = [Record(name, name, "MKT") for name in ("P1", "P2", "P3", "P4")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", "Protein,Tm (C),Organism\nP3,41.5,yeast\nP1,54.25,human\nP9,1,fly\nP2,,mouse\n"),
        ("german.csv", "\ufeffProtein;Tm (C);Organism\nP3;41,5;yeast\nP1;54,25;human\nP9;1;fly\nP2;;mouse\n"),
        ("tabs.tsv", "Protein\tTm (C)\tOrganism\nP3\t41.5\tyeast\nP1\t54.25\thuman\nP9\t1\tfly\nP2\tNA\tmouse\n"),
    ],
)
def test_a_table_is_joined_by_id_in_the_order_of_the_proteins(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_columns(tmp_path / name, RECORDS) == {
        "Tm (C)": ["54.25", None, "41.5", None],
        "Organism": ["human", "mouse", "yeast", None],
    }


def test_an_excel_workbook(tmp_path: Path) -> None:
    frame = pd.DataFrame({"number": [1, 2], "id": ["P2", "P1"], "activity": [0.5, 1.5]})
    frame.to_excel(tmp_path / "table.xlsx", index=False)
    assert read_columns(tmp_path / "table.xlsx", RECORDS)["activity"] == ["1.5", "0.5", None, None]


def test_ids_match_by_their_parts_as_in_the_stages(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("entry,class\nP69905,a\nP68871,b\n", encoding="utf-8")
    found = [Record(name, name, "MKT" * (1 + place)) for place, name in enumerate(("sp|P69905|HBA", "sp|P68871|HBB"))]
    assert read_columns(tmp_path / "table.csv", found) == {"class": ["a", "b"]}


def test_rows_that_repeat_a_protein_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "esm2kit")
    (tmp_path / "table.csv").write_text("id,dG\nP2,\nP1,1.5\nP2,2.5\nP1,9.5\nQ7,3\n", encoding="utf-8")
    assert read_columns(tmp_path / "table.csv", RECORDS) == {"dG": ["1.5", "2.5", None, None]}
    assert "names 2 of 4 proteins; not found: 1 other row, such as 'Q7'; repeated proteins: 2 rows" in caplog.text
    caplog.clear()
    (tmp_path / "table.csv").write_text("id,dG\nP2,1\nP1,1.5\n", encoding="utf-8")
    read_columns(tmp_path / "table.csv", RECORDS)
    assert "repeated" not in caplog.text


def test_no_table_and_tables_that_cannot_be_joined(tmp_path: Path) -> None:
    assert read_columns("", RECORDS) == {}
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        read_columns(tmp_path / "nowhere.csv", RECORDS)
    (tmp_path / "other.csv").write_text("id,value\nQ1,2\n", encoding="utf-8")
    with refused("labels.no-id") as caught:
        read_columns(tmp_path / "other.csv", RECORDS)
    assert "no column of other.csv (id, value) has an id of the FASTA file, such as P1." in str(caught.value)
    (tmp_path / "damaged.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"damaged\.xlsx"):
        read_columns(tmp_path / "damaged.xlsx", RECORDS)


def test_columns_of_one_name_are_refused_if_both_have_values(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("id,host,host\na,x,y\nb,z,w\n")
    with refused("table.repeated-column", column="host"):
        read_columns(table, [Record("a", "a", "MK"), Record("b", "b", "MW")])
    table.write_text("id,host,host,,\na,x,,,\nb,z,,,\n")  # as spreadsheets export empty columns
    assert read_columns(table, [Record("a", "a", "MK"), Record("b", "b", "MW")]) == {"host": ["x", "z"]}


def test_a_folder_with_a_table_per_set(tmp_path):
    for name, rows in (("train", "p0,1.5\np1,2.5"), ("valid", "p2,3.5"), ("test", "p3,4.5")):
        (tmp_path / f"{name}.csv").write_text(f"id,Tm\n{rows}\n")
    records = [Record(f"p{number}", f"p{number}", "MKV") for number in range(5)]
    found = read_columns(tmp_path, records)
    assert found == {
        "Tm": ["1.5", "2.5", "3.5", "4.5", None],
        "set": ["train", "train", "validation", "test", None],
    }
    before = sha256_labels(tmp_path)
    assert before == sha256_labels(tmp_path)
    (tmp_path / "test.csv").write_text("id,Tm\np3,4.6\n")
    assert before != sha256_labels(tmp_path)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "train.csv").unlink()
    with refused("table.absent"):
        read_columns(tmp_path, records)

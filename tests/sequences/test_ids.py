"""Names of proteins: whole ids first, an accession where it is one protein's, and one line for what is neither."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2kit.core.errors import InputError
from esm2kit.sequences.ids import IdLookup, UnknownIdError

IDS = ["sp|P69905|HBA_HUMAN", "sp|P68871|HBB_HUMAN", "tr|P68871|OTHER_HUMAN", "P12345", "tr|P12345|X_Y", "1abc_A"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sp|P69905|HBA_HUMAN", 0),
        ("P69905", 0),
        ("HBA_HUMAN", 0),
        ("HBB_HUMAN", 1),
        ("P12345", 3),  # an id comes before another's accession
        ("1abc_A", 5),
    ],
)
def test_a_name_that_is_one_protein_s(name: str, row: int) -> None:
    lookup = IdLookup(IDS, "a.h5")
    assert lookup[name] == row
    assert name in lookup


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("P68871", "a.h5: 'P68871' may be sp|P68871|HBB_HUMAN, tr|P68871|OTHER_HUMAN: give the whole id"),
        ("P69906", "a.h5 has no protein 'P69906'; did you mean sp|P69905|HBA_HUMAN?"),
        ("hba_human", "a.h5 has no protein 'hba_human'; did you mean sp|P69905|HBA_HUMAN?"),
        ("_HUMAN", "did you mean sp|P69905|HBA_HUMAN or sp|P68871|HBB_HUMAN or tr|P68871|OTHER_HUMAN?"),
        ("zz", "a.h5 has no protein 'zz'; ids are such as sp|P69905|HBA_HUMAN, sp|P68871|HBB_HUMAN, tr|P68871|"),
        ("", "a.h5 has no protein ''; ids are such as"),
    ],
)
def test_a_name_that_is_not_is_told_in_one_line(name: str, told: str) -> None:
    lookup = IdLookup(IDS, "a.h5")
    assert name not in lookup
    with pytest.raises(UnknownIdError) as raised:
        lookup[name]
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, KeyError), "as of a dictionary"
    assert isinstance(raised.value, InputError), "the command line prints it alone"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab|", max_size=4), max_size=8), st.text("ab|", max_size=4))
def test_against_a_walk_over_all_ids(ids: list[str], name: str) -> None:
    """Found where an id is the name (the first of equal ones), else where one id alone has it between its bars."""
    holding = sorted({protein for protein in ids if name and name in protein.split("|")})
    expected = name if name in ids else holding[0] if len(holding) == 1 else None
    lookup = IdLookup(ids, "a.h5")
    assert (name in lookup) == (expected is not None)
    if expected is not None:
        assert lookup[name] == ids.index(expected)

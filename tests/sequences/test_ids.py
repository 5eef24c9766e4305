"""Names of proteins: complete ids first, then parts of ids that occur once, and one-line errors for other names."""

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
def test_ids_and_unique_parts_are_found(name: str, row: int) -> None:
    lookup = IdLookup(IDS, "a.h5")
    assert lookup[name] == row
    assert name in lookup


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("P68871", "a.h5: 'P68871' matches several ids (sp|P68871|HBB_HUMAN, tr|P68871|OTHER_HUMAN)."),
        ("P69906", "a.h5 has no protein 'P69906'; did you mean sp|P69905|HBA_HUMAN?"),
        ("hba_human", "a.h5 has no protein 'hba_human'; did you mean sp|P69905|HBA_HUMAN?"),
        ("_HUMAN", "did you mean sp|P69905|HBA_HUMAN or sp|P68871|HBB_HUMAN or tr|P68871|OTHER_HUMAN?"),
        ("zz", "a.h5 has no protein 'zz'; the first ids are sp|P69905|HBA_HUMAN, sp|P68871|HBB_HUMAN, tr|P68871|"),
        ("", "a.h5 has no protein ''; the first ids are"),
    ],
)
def test_other_names_are_a_one_line_error(name: str, message: str) -> None:
    lookup = IdLookup(IDS, "a.h5")
    assert name not in lookup
    with pytest.raises(UnknownIdError) as raised:
        lookup[name]
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, KeyError), "like a dictionary"
    assert isinstance(raised.value, InputError), "the command line prints only its message"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab|", max_size=4), max_size=8), st.text("ab|", max_size=4))
def test_against_a_linear_search(ids: list[str], name: str) -> None:
    """The first id that is the name, or else the only id that has the name as a part."""
    containing = sorted({protein for protein in ids if name and name in protein.split("|")})
    expected = name if name in ids else containing[0] if len(containing) == 1 else None
    lookup = IdLookup(ids, "a.h5")
    assert (name in lookup) == (expected is not None)
    if expected is not None:
        assert lookup[name] == ids.index(expected)

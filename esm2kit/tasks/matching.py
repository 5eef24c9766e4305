"""Match the names in a table with the records of a FASTA file."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from esm2kit.sequences.fasta import Record

# The names of databases in ids such as sp|P69905|HBA_HUMAN and gi|4504347|ref|NP_000549.1|, which name no protein.
DATABASES = {"sp", "tr", "gb", "gi", "ref", "emb", "dbj", "pdb", "prf", "pir", "lcl", "bbs", "gnl", "up", "pat"}
VERSION = re.compile(r"(.{4,})\.\d{1,3}")
CLUSTER = re.compile(r"UniRef\d+_(.+)", re.IGNORECASE)


class Matches(NamedTuple):
    """Which record each name matches.

    Args:
        records: place of the record of each name; -1 without one.
        rules: rule -> number of names that it matched.
        ambiguous: names that match several different sequences.
    """

    records: list[int]
    rules: Counter[str]
    ambiguous: list[str]


def _list_parts(name: str) -> set[str]:
    """Return the parts between bars that may name the protein: of sp|P69905|HBA_HUMAN the accession and the entry."""
    parts = {part for part in name.split("|") if len(part) > 2 and part.lower() not in DATABASES}
    return parts | {found[1] for part in parts if (found := CLUSTER.fullmatch(part))}


def _strip_version(name: str) -> set[str]:
    return {found[1] for part in _list_parts(name) if (found := VERSION.fullmatch(part))}


def _fold_case(name: str) -> set[str]:
    return {part.casefold() for part in _list_parts(name) | {name}}


def _list_words(name: str) -> set[str]:
    """Return what a name with blanks may be as an id of a FASTA, which has none."""
    words = name.split()
    return {words[0], "_".join(words)} if len(words) > 1 else set()


# description -> keys of a record's id and of a name in the table; they match if they have a key in common
Keys = Callable[[str], set[str]]
RULES: dict[str, tuple[Keys, Keys]] = {
    "by a part of the id": (_list_parts, _list_parts),
    "without the version of the FASTA's id": (_strip_version, _list_parts),
    "without the version of the table's id": (_list_parts, _strip_version),
    "by the first word or with _ for blanks": (lambda record: {record}, _list_words),
    "ignoring case": (_fold_case, _fold_case),
}
# Rules by which a name may mean another protein than the record: the other chain, or the other version of a sequence.
UNCERTAIN = {"without the version of the FASTA's id", "without the version of the table's id", "ignoring case"}


class RecordMatcher:
    """Finds the record that a name means: by the complete id or header, or else by the first of RULES that applies.

    A name that matches by an UNCERTAIN rule matches nothing if another name matches the same record by a certain one.

    Args:
        records: of a FASTA; equal ids with different sequences match no name.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._by_id = _index((record.id, row) for row, record in enumerate(records))
        self._by_header = _index((" ".join(record.description.split()), row) for row, record in enumerate(records))
        self._by_rule = {
            rule: _index((key, row) for row, record in enumerate(records) for key in of_record(record.id))
            for rule, (of_record, _) in RULES.items()
        }

    def match(self, names: Sequence[str]) -> Matches:
        """Match names with records.

        Args:
            names: cells of a column; an empty one matches nothing.

        Returns:
            The matches.
        """
        found: dict[str, tuple[int, str]] = {name: self._find(name) for name in set(names) if name}
        certain = {row for row, rule in found.values() if rule not in UNCERTAIN}
        found = {
            name: (-1, "") if rule in UNCERTAIN and row in certain else (row, rule)
            for name, (row, rule) in found.items()
        }
        rules = Counter(rule for row, rule in found.values() if row >= 0)
        ambiguous = [name for name in dict.fromkeys(names) if found.get(name, (0, ""))[1] == "ambiguous"]
        return Matches([found[name][0] if name else -1 for name in names], rules, ambiguous)

    def _find(self, name: str) -> tuple[int, str]:
        """Return the row and the rule; -1 and "ambiguous" for a name of several sequences, -1 and "" for no match."""
        candidates = [("exactly", self._by_id, {name}), ("by the complete header", self._by_header, {name})]
        candidates += [(rule, self._by_rule[rule], of_name(name)) for rule, (_, of_name) in RULES.items()]
        ambiguous = False
        for rule, index, keys in candidates:
            rows = [index[key] for key in keys if key in index]
            single = {self._first_equal(found) for found in rows} - {-1}
            if len(single) == 1:
                return single.pop(), rule
            ambiguous |= bool(rows)
            if len(single) > 1:
                break
        return -1, "ambiguous" if ambiguous else ""

    def _first_equal(self, rows: list[int]) -> int:
        """Return the first of some rows if all have the same sequence, otherwise -1."""
        return rows[0] if len({self.records[row].sequence for row in rows}) == 1 else -1


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    index: dict[str, list[int]] = defaultdict(list)
    for key, row in pairs:
        index[key].append(row)
    return dict(index)

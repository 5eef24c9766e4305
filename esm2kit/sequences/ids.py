"""Find a protein by its id, or by the accession or entry name within an id such as sp|P69905|HBA_HUMAN; hashes."""

import hashlib
import re
from collections.abc import Iterator, Sequence

from esm2kit.core.errors import InputError, find_closest

# how many ids to compare with a mistyped one; takes about 0.1 s
MAX_COMPARED_IDS = 20_000
DIGEST_BYTES = 16  # of a sequence's hash: enough to distinguish all known proteins
# An id that only states the place of a record in its file, as programs write where a file has no ids.
POSITION = re.compile(r"(?:sequence|seq|protein|record|row|query)?[ _.-]?\d+", re.IGNORECASE)


def hash_sequence(sequence: str) -> str:
    """Compute the key of a sequence in biotrainer: the SHA-256 of `<sequence>_<length>`."""
    return hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()


def digest_sequence(sequence: str) -> bytes:
    """Return the first DIGEST_BYTES of a sequence's hash, by which files of embeddings and predictions are joined."""
    return bytes.fromhex(hash_sequence(sequence))[:DIGEST_BYTES]


def is_position(protein: str) -> bool:
    """Return whether an id is only the position of a record, such as "0" or "Sequence0"."""
    return POSITION.fullmatch(protein) is not None


class UnknownIdError(InputError, KeyError):
    """A name that matches no protein or several; also a KeyError, which Python's mappings raise for an unknown key."""

    __str__ = Exception.__str__  # KeyError's own puts the message in quotes


class IdLookup:
    """Maps names of proteins to rows: complete ids first, then the parts between bars that occur in a single id.

    Args:
        ids: The ids in the order of the file; for duplicates the first row is found.
        source: Name of the file, for errors.
    """

    def __init__(self, ids: Sequence[str], source: str) -> None:
        self.ids, self.source = ids, source
        self._rows: dict[str, int] = {}
        for row, protein in enumerate(ids):
            self._rows.setdefault(protein, row)
        self._ids_of_part: dict[str, list[str]] | None = None  # built for the first name that is not an id

    def __contains__(self, name: str) -> bool:
        return name in self._rows or len(self._find_ids_with_part(name)) == 1

    def __getitem__(self, name: str) -> int:
        """Return the row of a protein.

        Args:
            name: A complete id, or a part of one between bars.

        Returns:
            The row, from 0.

        Raises:
            UnknownIdError: The name matches no id, or several; the message lists similar ids.
        """
        if name in self._rows:
            return self._rows[name]
        matches = self._find_ids_with_part(name)
        if len(matches) == 1:
            return self._rows[matches[0]]
        if matches:
            raise UnknownIdError(
                f"{self.source}: {name!r} matches several ids ({', '.join(matches[:3])}). Pass the complete id.",
                code="id.ambiguous",
                name=name,
                found=matches,
            )
        similar = list(self._find_similar_ids(name))
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"the first ids are {', '.join(self.ids[:3])}"
        raise UnknownIdError(f"{self.source} has no protein {name!r}; {hint}", code="id.unknown", name=name)

    def _find_ids_with_part(self, name: str) -> list[str]:
        """Return the ids that contain the name as a part between bars."""
        if self._ids_of_part is None:
            self._ids_of_part = {}
            for protein in self._rows:
                for part in filter(None, set(protein.split("|")) - {protein}):
                    self._ids_of_part.setdefault(part, []).append(protein)
        return self._ids_of_part.get(name, [])

    def _find_similar_ids(self, name: str) -> Iterator[str]:
        """Yield up to three ids that contain the name, or else the most similar id."""
        containing = [protein for protein in self._rows if name and name.lower() in protein.lower()][:3]
        compared = self.ids[:MAX_COMPARED_IDS]
        parts = {part: protein for protein in compared for part in (*protein.split("|"), protein)}
        yield from containing or filter(None, [parts.get(find_closest(name, parts) or "")])

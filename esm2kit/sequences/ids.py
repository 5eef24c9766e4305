"""Which protein a name means: its id, or the accession or entry name inside an id such as sp|P69905|HBA_HUMAN."""

from collections.abc import Iterator, Sequence

from esm2kit.core.errors import InputError, find_closest

# Ids that are looked through for one that resembles a mistyped one: a tenth of a second.
COMPARED = 20_000


class UnknownIdError(InputError, KeyError):
    """A name that is no protein's, or more than one's; a KeyError too, as Python's own mappings raise."""

    __str__ = Exception.__str__  # a KeyError's is the message in quotes


class IdLookup:
    """Row of a protein by name. Ids come first; a part between bars stands for the one id that has it.

    Args:
        ids: in the file's order; of equal ones the first is found.
        source: what to call the file in an error.
    """

    def __init__(self, ids: Sequence[str], source: str) -> None:
        self.ids, self.source = ids, source
        self._rows: dict[str, int] = {}
        for row, protein in enumerate(ids):
            self._rows.setdefault(protein, row)
        self._ids_of_part: dict[str, list[str]] | None = None  # made for the first name that is no id

    def __contains__(self, name: str) -> bool:
        return name in self._rows or len(self._meant(name)) == 1

    def __getitem__(self, name: str) -> int:
        """Raises: UnknownIdError with the ids that come near, in one line."""
        if name in self._rows:
            return self._rows[name]
        meant = self._meant(name)
        if len(meant) == 1:
            return self._rows[meant[0]]
        if meant:
            raise UnknownIdError(
                f"{self.source}: {name!r} may be {', '.join(meant[:3])}: give the whole id",
                code="id.ambiguous",
                name=name,
                found=meant,
            )
        near = list(self._near(name))
        told = f"did you mean {' or '.join(near)}?" if near else f"ids are such as {', '.join(self.ids[:3])}"
        raise UnknownIdError(f"{self.source} has no protein {name!r}; {told}", code="id.unknown", name=name)

    def _meant(self, name: str) -> list[str]:
        """The ids that have the name between their bars."""
        if self._ids_of_part is None:
            self._ids_of_part = {}
            for protein in self._rows:
                for part in filter(None, set(protein.split("|")) - {protein}):
                    self._ids_of_part.setdefault(part, []).append(protein)
        return self._ids_of_part.get(name, [])

    def _near(self, name: str) -> Iterator[str]:
        """Up to three ids: those that hold the name, else the one that resembles it."""
        holding = [protein for protein in self._rows if name and name.lower() in protein.lower()][:3]
        compared = self.ids[:COMPARED]
        parts = {part: protein for protein in compared for part in (*protein.split("|"), protein)}
        yield from holding or filter(None, [parts.get(find_closest(name, parts) or "")])

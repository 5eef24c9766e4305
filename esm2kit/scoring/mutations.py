"""Names of mutations: read A42G, A42G:K50R and p.Ala42Gly, compare with the wild type, name differences of sequences.

The number in a name is the index of the residue, from 1, plus the offset: with offset 25, the first residue of the
FASTA is residue 26.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from Bio.Data.IUPACData import protein_letters_3to1_extended
from rapidfuzz.distance import Levenshtein

from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.sequences.alphabet import RESIDUE_LETTERS, STANDARD_RESIDUES

# (number in the name, wild-type letter, mutant letter)
NamedSubstitution = tuple[int, str, str]

ONE_LETTER = re.compile(r"([A-Za-z])(-?\d+)([A-Za-z*])")
THREE_LETTERS = re.compile(r"([A-Za-z]{3})(-?\d+)([A-Za-z]{3}|\*)")
# What separates the substitutions of one variant: ProteinGym's colon, and others that papers use.
JOINERS = re.compile(r"[:;+/]")
PROTEIN_LETTERS = {name.upper(): letter for name, letter in protein_letters_3to1_extended.items()}
STOPS = {"*", "TER", "STP"}
# Names of the wild type in tables of variants.
WILD_TYPE_NAMES = {"wt", "_wt", "wild type", "wild-type", "wildtype", "=", "p.=", "p.(=)"}
# HGVS's words for what is not a substitution.
OTHER_HGVS = re.compile(r"del|ins|dup|fs|ext|inv|con|=|\?", re.IGNORECASE)
# A sequence that differs from the wild type at more than this share of its residues is another protein.
MAX_DIFFERENCE = 0.5


class Substitution(NamedTuple):
    """One substitution: index of the residue from 0, letter of the wild type, letter of the mutant."""

    position: int
    wild: str
    mutant: str


def is_wild_type_name(text: str) -> bool:
    """Return whether a text names the wild type, such as `WT` or HGVS's `p.=`."""
    return text.strip().lower() in WILD_TYPE_NAMES


def looks_like_mutation(text: str) -> bool:
    """Return whether a text has the form of a variant; its letters and numbers may still be wrong."""
    return is_wild_type_name(text) or all(
        ONE_LETTER.fullmatch(part) or THREE_LETTERS.fullmatch(part) for part in JOINERS.split(_strip_hgvs(text))
    )


def split_list(text: str) -> list[str]:
    """Split variants that are separated by commas or blanks; a semicolon separates only before a blank.

    Without a blank it joins the substitutions of one variant, as in a cell of a table: `A42G;K50R` is one variant.

    Args:
        text: names of variants; brackets of HGVS stay together.

    Returns:
        The names.
    """
    parts = re.findall(r"(?:\[[^\]]*\]|;(?!\s|$)|[^\[,;\s])+", text)
    return [part.strip(";") for part in parts if part.strip(";")]


def _strip_hgvs(text: str) -> str:
    """Remove `p.` and the brackets of HGVS: `p.[(Ala42Gly);(Lys50Arg)]` -> `Ala42Gly;Lys50Arg`."""
    return re.sub(r"[\[\]()\s]", "", text.strip().removeprefix("p."))


def parse_mutation(text: str, where: str = "") -> tuple[NamedSubstitution, ...]:
    """Parse the name of a variant.

    Args:
        text: substitutions such as `A42G`, `Ala42Gly` or `p.Ala42Gly`, several joined by `:` (also `;`, `+` and `/`);
            lower case is read as upper case, as in a FASTA file.
        where: the place of the text, such as `file.csv: row 5`, for the message.

    Returns:
        (number, wild-type letter, mutant letter) of each substitution, by number.

    Raises:
        InputError: the text is not a substitution, or one with a stop codon, an unknown letter, two equal letters or
            twice the same position.
    """
    place = f"{where}: " if where else ""
    found = [_parse_substitution(part, text, place) for part in JOINERS.split(_strip_hgvs(text))]
    numbers = [number for number, _, _ in found]
    if repeated := [number for number in numbers if numbers.count(number) > 1]:
        raise InputError(
            f"{place}mutation {text!r} changes position {repeated[0]} twice. Name each position once.",
            code="mutations.repeated-position",
            mutation=text,
            position=repeated[0],
        )
    return tuple(sorted(found))


def _parse_substitution(part: str, text: str, place: str) -> NamedSubstitution:
    one, three = ONE_LETTER.fullmatch(part), THREE_LETTERS.fullmatch(part)
    if (not one and not three) or (three and OTHER_HGVS.fullmatch(three[3])):
        _raise_form(part, text, place)
    wild, number, mutant = (one or three).groups()
    if mutant.upper() in STOPS:
        raise InputError(
            f"{place}mutation {text!r} is a stop codon, for which the model has no score. Remove it.",
            code="mutations.stop",
            mutation=text,
        )
    letters = [name.upper() if one else PROTEIN_LETTERS.get(name.upper(), name) for name in (wild, mutant)]
    if unknown := next((letter for letter in letters if letter not in set(STANDARD_RESIDUES)), None):
        raise InputError(
            f"{place}mutation {text!r} has {unknown!r}, which is not one of the 20 amino acids "
            f"({''.join(sorted(STANDARD_RESIDUES))}). Correct or remove it.",
            code="mutations.letter",
            mutation=text,
            found=unknown,
        )
    if letters[0] == letters[1]:
        raise InputError(
            f"{place}mutation {text!r} does not change the residue. Correct or remove it.",
            code="mutations.same",
            mutation=text,
        )
    return int(number), letters[0], letters[1]


def _raise_form(part: str, text: str, place: str) -> NoReturn:
    if OTHER_HGVS.search(part) and re.search(r"\d", part):
        raise InputError(
            f"{place}mutation {text!r} is not a substitution. Insertions and deletions are read from mutated "
            "sequences: pass a FASTA, or a table with a column of them.",
            code="mutations.not-substitution",
            mutation=text,
        )
    raise InputError(
        f"{place}{text!r} is not a mutation. Write the wild-type letter, the position and the new letter, such as "
        "A42G; join those of one variant by colons, such as A42G:K50R.",
        code="mutations.form",
        mutation=text,
    )


def format_variant(substitutions: Iterable[Substitution], offset: int = 0) -> str:
    """Name a variant as ProteinGym does: `A42G:K50R`.

    Args:
        substitutions: with indices from 0.
        offset: what is added to the number of a residue.

    Returns:
        The name.
    """
    return ":".join(f"{wild}{index + 1 + offset}{mutant}" for index, wild, mutant in substitutions)


def find_offset(sequence: str, residues: Iterable[tuple[int, str]], near: int = 0) -> int | None:
    """Find the offset with which all wild-type letters fit a sequence.

    Args:
        sequence: of the wild type.
        residues: (number, wild-type letter) of every mutation.
        near: of several offsets, the nearest to this one is returned.

    Returns:
        The offset, or None if there is none.
    """
    fitting: set[int] | None = None
    for number, letter in set(residues):
        offsets = {number - 1 - index for index, found in enumerate(sequence) if found == letter}
        fitting = offsets if fitting is None else fitting & offsets
        if not fitting:
            return None
    return min(fitting, key=lambda offset: (abs(offset - near), offset)) if fitting else None


def check_wild_type(
    protein: str, sequence: str, mutations: Sequence[tuple[str, tuple[NamedSubstitution, ...]]], offset: int = 0
) -> None:
    """Check that the wild-type letters of mutations are those of the sequence.

    Args:
        protein: its id.
        sequence: its residues.
        mutations: (place of the name and the name, substitutions) of every variant of this protein.
        offset: what is added to the number of a residue.

    Raises:
        InputError: a position is outside the sequence, or has another letter. The message names the nearest offset that
            fits all mutations.
    """
    for name, substitutions in mutations:
        for number, letter, _ in substitutions:
            index = number - 1 - offset
            inside = 0 <= index < len(sequence)
            if inside and sequence[index] == letter:
                continue
            residues = {(number, letter) for _, found in mutations for number, letter, _ in found}
            nearest = find_offset(sequence, residues, offset)
            fix = "No offset fits all mutations: check that they are of this protein."
            if nearest is not None:
                fix = f"With --offset {nearest} all wild-type letters fit ({format_count(len(residues), 'position')})."
            if not inside:
                raise InputError(
                    f"{name}: position {number} is outside protein {protein!r}, whose residues are "
                    f"{1 + offset} to {len(sequence) + offset}. {fix}",
                    code="mutations.position",
                    position=number,
                    first=1 + offset,
                    last=len(sequence) + offset,
                    offset=nearest,
                )
            raise InputError(
                f"{name}: protein {protein!r} has {sequence[index]!r} at position {number}, not {letter!r}. {fix}",
                code="mutations.wild-type",
                position=number,
                found=sequence[index],
                expected=letter,
                offset=nearest,
            )


def compare_sequences(
    wild_type: str, mutated: str, offset: int = 0, where: str = ""
) -> tuple[tuple[Substitution, ...], str]:
    """Find how a mutated sequence differs from the wild type.

    Args:
        wild_type: residues.
        mutated: residues in upper case.
        offset: what is added to the number of a residue.
        where: the place of the sequence, for the message.

    Returns:
        The substitutions and the name of the variant. For sequences of other lengths there are no substitutions, and
        the name is HGVS's for one block of residues, from the first to the last difference: `K50_R52del`,
        `K50_R51insGG`, `K50_R52delinsGG`. Both are empty for equal sequences.

    Raises:
        InputError: a letter is not an amino acid, or most residues differ.
    """
    place = f"{where}: " if where else ""
    if unknown := set(mutated) - set(RESIDUE_LETTERS):
        index = next(index for index, letter in enumerate(mutated) if letter in unknown)
        raise InputError(
            f"{place}the mutated sequence has {mutated[index]!r} at residue {index + 1}, which is not an amino acid. "
            "Correct or remove it.",
            code="mutations.sequence-letter",
            found=mutated[index],
            residue=index + 1,
        )
    if wild_type == mutated:
        return (), ""
    same_length = len(wild_type) == len(mutated)
    changed = [index for index in range(len(wild_type)) if wild_type[index] != mutated[index]] if same_length else []
    share = len(changed) / len(mutated) if same_length else Levenshtein.normalized_distance(wild_type, mutated)
    if share > MAX_DIFFERENCE:
        raise InputError(
            f"{place}the mutated sequence differs from the wild type at {share:.0%} of its residues. Is it a variant "
            "of this protein?",
            code="mutations.unrelated",
            share=share,
        )
    if not same_length:
        name, added = _name_block(wild_type, mutated, offset)
        if unknown := next((letter for letter in added if letter not in STANDARD_RESIDUES), None):
            _raise_letter(place, name, unknown)  # it has no likelihood, so that the score would be too high
        return (), name
    substitutions = tuple(Substitution(index, wild_type[index], mutated[index]) for index in changed)
    for substitution in substitutions:
        if unknown := next((letter for letter in substitution[1:] if letter not in STANDARD_RESIDUES), None):
            _raise_letter(place, format_variant([substitution], offset), unknown)
    return substitutions, format_variant(substitutions, offset)


def _raise_letter(place: str, name: str, unknown: str) -> NoReturn:
    raise InputError(
        f"{place}mutation {name!r} has {unknown!r}, which is not one of the 20 amino acids. Remove it.",
        code="mutations.letter",
        mutation=name,
        found=unknown,
    )


def _name_block(wild_type: str, mutated: str, offset: int) -> tuple[str, str]:
    """Name the difference of two sequences as one deletion, insertion or both; also returns the residues added."""
    shortest = min(len(wild_type), len(mutated))
    start = next((index for index in range(shortest) if wild_type[index] != mutated[index]), shortest)
    rest = shortest - start
    end = next((index for index in range(rest) if wild_type[-1 - index] != mutated[-1 - index]), rest)
    removed, added = wild_type[start : len(wild_type) - end], mutated[start : len(mutated) - end]

    def name(index: int) -> str:
        return f"{wild_type[index]}{index + 1 + offset}"

    if not removed and 0 < start < len(wild_type):
        return f"{name(start - 1)}_{name(start)}ins{added}", added
    if not removed:  # before the first residue or after the last, which HGVS names with that residue
        start, removed = (0, wild_type[0]) if start == 0 else (start - 1, wild_type[-1])
        added = added + removed if start == 0 else removed + added
    last = start + len(removed) - 1
    block = name(start) if last == start else f"{name(start)}_{name(last)}"
    return f"{block}del" if not added else f"{block}delins{added}", added


def parse_positions(text: str, num_residues: int, offset: int = 0, place: str = "the protein") -> list[int]:
    """Parse chosen positions, such as `10-40,52`.

    Args:
        text: numbers and ranges with both ends, separated by commas or blanks.
        num_residues: T, of the protein.
        offset: what is added to the number of a residue.
        place: name of the protein, for the message.

    Returns:
        Indices of residues from 0, ascending, each once.

    Raises:
        InputError: the text has another form, or a position is outside the protein.
    """
    chosen: set[int] = set()
    for part in re.split(r"[,;\s]+", text.strip().strip("[]")):
        found = re.fullmatch(r"(-?\d+)(?:[-:](-?\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(
                f"positions {text!r}: {part!r} is not a position or a range. Write them such as 10-40,52.",
                code="positions.form",
                found=part,
            )
        for number in (first, last):
            if not 1 + offset <= number <= num_residues + offset:
                raise InputError(
                    f"positions {text!r}: position {number} is outside {place}, whose residues are {1 + offset} to "
                    f"{num_residues + offset}. Choose positions that every protein has.",
                    code="positions.outside",
                    position=number,
                    first=1 + offset,
                    last=num_residues + offset,
                )
        chosen.update(range(first - 1 - offset, last - offset))
    return sorted(chosen)

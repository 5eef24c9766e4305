"""The header lines of FASTA files: what an id is, and which text is not allowed. All readers use this definition."""

from typing import NamedTuple

# NCBI's nr and similar files join the headers of identical proteins with this byte, Ctrl-A
JOINER = "\x01"
# the bytes that end an id
BLANKS = " \t" + JOINER


class Header(NamedTuple):
    """A header line."""

    id: str  # "" if the line has no id
    text: str  # the text after the id, up to the next header of an identical protein


def parse_header(line: str) -> Header:
    r"""Split a header line into its id and the text after it.

    The id starts after the blanks that follow '>', and ends at a space, a tab or Ctrl-A. All other characters, such as
    '|', ':', '/' and '=', belong to the id. In files in which Ctrl-A joins the headers of identical proteins, such as
    NCBI's nr, the first header names the protein.

    Args:
        line: The header without its '>' and its line ending.

    Returns:
        The id and the text, both without blanks at their ends: `a\tfirst \x01b second` has the id `a` and the text
        `first`.
    """
    first = line.lstrip(BLANKS).partition(JOINER)[0]
    stop = min((place for blank in BLANKS if (place := first.find(blank)) >= 0), default=len(first))
    return Header(first[:stop], first[stop:].strip(BLANKS))


def find_control_character(line: str) -> str | None:
    """Return the first control character of a header that is neither a tab nor Ctrl-A, or None."""
    return next((letter for letter in line if (letter < " " and letter not in BLANKS) or letter == "\x7f"), None)

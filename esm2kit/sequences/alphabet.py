"""The ESM-1b alphabet of fair-esm, 33 tokens, with array lookups between residues and token ids.

Source: fair-esm 2.0.0 `Alphabet.from_architecture("ESM-1b")`; the order is part of every published checkpoint.
"""

import numpy as np

from esm2kit.core.errors import InputError

STANDARD_RESIDUES = "LAGVSERTIDPKQNFYMHWC"
RESIDUE_LETTERS = STANDARD_RESIDUES + "XBUZO"
TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUE_LETTERS, ".", "-", "<null_1>", "<mask>")

BOS_IDX, PAD_IDX, EOS_IDX, UNK_IDX = 0, 1, 2, 3
MASK_IDX = TOKENS.index("<mask>")
FIRST_STANDARD_IDX = 4
NUM_STANDARD = len(STANDARD_RESIDUES)
VOCAB_SIZE = len(TOKENS)

# ASCII byte -> token id; other bytes are <unk>, for which `encode` raises an error
BYTE_TO_TOKEN = np.full(256, UNK_IDX, dtype=np.uint8)
for _index, _token in enumerate(TOKENS):
    if len(_token) == 1:
        BYTE_TO_TOKEN[ord(_token)] = _index
# the upper-case bytes that are allowed in the sequences of a FASTA file
IS_RESIDUE_BYTE = np.zeros(256, dtype=bool)
IS_RESIDUE_BYTE[np.frombuffer(RESIDUE_LETTERS.encode(), dtype=np.uint8)] = True


def encode(residues: str | bytes | np.ndarray) -> np.ndarray:
    """Convert residues to token ids, without BOS and EOS.

    Args:
        residues: T upper-case amino-acid letters, as text, as bytes or as a uint8 array.

    Returns:
        (T,) uint8 token ids.

    Raises:
        InputError: A letter is not one of fair-esm's one-letter tokens.
    """
    if isinstance(residues, str):
        residues = residues.encode("ascii", errors="replace")
    codes = np.frombuffer(residues, dtype=np.uint8) if isinstance(residues, bytes) else residues
    tokens = BYTE_TO_TOKEN[codes]
    unknown = np.flatnonzero(tokens == UNK_IDX)
    if unknown.size:
        letter = chr(codes[unknown[0]])
        raise InputError(
            f"letter {letter!r} at residue {unknown[0] + 1} is not an amino-acid letter ({RESIDUE_LETTERS})",
            code="sequence.letter",
            found=letter,
            residue=int(unknown[0]) + 1,
        )
    return tokens


def decode(tokens: np.ndarray) -> str:
    """Convert token ids to text; special tokens are written by name, such as `<mask>`."""
    return "".join(TOKENS[token] for token in tokens)

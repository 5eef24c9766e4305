"""fair-esm's ESM-1b alphabet as arrays: 33 tokens, letters <-> ids without a dictionary per residue.

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

# byte of a letter -> token id; bytes that are no token stay <unk>, which `encode` refuses unless told otherwise
BYTE_TO_TOKEN = np.full(256, UNK_IDX, dtype=np.uint8)
for _index, _token in enumerate(TOKENS):
    if len(_token) == 1:
        BYTE_TO_TOKEN[ord(_token)] = _index
# which bytes a protein FASTA may hold once upper-cased
IS_RESIDUE_BYTE = np.zeros(256, dtype=bool)
IS_RESIDUE_BYTE[np.frombuffer(RESIDUE_LETTERS.encode(), dtype=np.uint8)] = True


def encode(residues: str | bytes | np.ndarray) -> np.ndarray:
    """Token ids of a sequence, without BOS and EOS.

    Args:
        residues: upper-case letters, their bytes, or a uint8 array of bytes (T residues).
    Returns: (T,) uint8 token ids.
    Raises: InputError naming the first letter that is none of fair-esm's one-letter tokens.
    """
    if isinstance(residues, str):
        residues = residues.encode("ascii", errors="replace")
    codes = np.frombuffer(residues, dtype=np.uint8) if isinstance(residues, bytes) else residues
    tokens = BYTE_TO_TOKEN[codes]
    unknown = np.flatnonzero(tokens == UNK_IDX)
    if unknown.size:
        letter = chr(codes[unknown[0]])
        raise InputError(
            f"letter {letter!r} at residue {unknown[0] + 1} is not in the alphabet {RESIDUE_LETTERS}",
            code="sequence.letter",
            found=letter,
            residue=int(unknown[0]) + 1,
        )
    return tokens


def decode(tokens: np.ndarray) -> str:
    """The letters of token ids; special tokens come out by name, as in `<mask>`."""
    return "".join(TOKENS[token] for token in tokens)

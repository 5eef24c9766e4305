"""Describe a file that is not a model by its content, for the message."""

from pathlib import Path

ZIP_KIND = "a zip archive, as torch.save writes it in files named .pt"
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# first bytes -> the kind of file
MAGIC_BYTES = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"ARROW1": "an Arrow file, such as a dataset's sequences",
    b"\x93NUMPY": "a NumPy array",
    b"PK\x03\x04": ZIP_KIND,
    b"\x7fELF": "a program",
}


def describe_content(path: Path) -> str | None:
    """Describe a file that is not a model by its first bytes.

    Args:
        path: an existing file.

    Returns:
        Text such as "a FASTA file"; None for an empty file, or a binary one of another kind.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    if HDF5_MAGIC in start:  # ours have a block before it
        return "an HDF5 file, such as embeddings"
    for magic, kind in MAGIC_BYTES.items():
        if start.startswith(magic):
            return kind
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # not a character that the last byte has cut
            return None
        text = start[: error.start].decode()
    if not text.strip() or not text.replace("\t", " ").replace("\r", " ").replace("\n", " ").isprintable():
        return None
    first = text.lstrip()[0]
    return "a FASTA file" if first == ">" else "a JSON file" if first in "{[" else "a text file"

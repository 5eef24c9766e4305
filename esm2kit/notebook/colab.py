"""The form notebook for Google Colab: a FASTA file or a pasted sequence -> vectors, a map and tables, in one cell."""

import csv
import hashlib
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.draw_map import describe_map, plot_map, write_map
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.embedding.maps import MIN_PROTEINS, colours, default_field, field_name, project
from esm2kit.notebook.display import captioned, follow_progress
from esm2kit.sequences.fasta import Record, read_fasta, strip_fasta_suffix


def embed_form(sequence: str = "", model: str = "8M", colour_by: str = "", out_dir: str | Path = "esm2kit") -> Path:
    """Embed the proteins of a form: write vectors, a map and tables, show the map, and offer all of it as one file.

    Proteins over 1,022 residues are embedded in overlapping windows.

    Args:
        sequence: A pasted sequence, or several separated by blanks or commas. Default: ask for a FASTA file.
        model: Name of an official model, or path of a model.
        colour_by: Field of the FASTA headers that colours the map, such as OS, or residues. Default: the first field
            that groups or measures the proteins, otherwise residues.
        out_dir: Folder of the results, in a subfolder per input and model.

    Returns:
        The folder of the results: `<name>_embeddings.h5`, `<name>_vectors.csv`, and from four proteins on
        `<name>_map.csv` and `<name>_map.png`.

    Raises:
        InputError: There is no sequence, or the proteins, the model or the field are not valid.
    """
    name, content = ("pasted.fasta", format_pasted(sequence).encode()) if sequence.strip() else _upload()
    stem = portable_name(strip_fasta_suffix(Path(name)))
    folder = Path(out_dir) / f"{stem}_{hashlib.sha256(content + model.encode()).hexdigest()[:8]}"
    fasta = folder / portable_name(name)
    with atomic_path(fasta) as part:
        part.write_bytes(content)
    follow_progress()
    made = embed(EmbedConfig(fasta, out_dir=folder, name=stem, model=model, long_proteins="window"), replace=True)
    records = list(read_fasta(fasta))
    with EmbeddingReader(made.embeddings) as reader:
        vectors_PD = reader.matrix()
    lengths = [len(record.sequence) for record in records]
    names = [f"v{number}" for number in range(1, vectors_PD.shape[1] + 1)]
    rows = ([record.id, length, *vector] for record, length, vector in zip(records, lengths, vectors_PD, strict=True))
    _write_csv(folder / f"{stem}_vectors.csv", ["id", "residues", *names], rows)
    counted = f"{format_count(len(records), 'protein')}, {format_count(sum(lengths), 'residue')}"
    print(f"{counted}, vectors of {len(names)} numbers")
    if len(records) >= MIN_PROTEINS:
        _make_map(folder / f"{stem}_map", records, vectors_PD, colour_by)
    else:
        print(f"A map requires at least {MIN_PROTEINS} proteins.")
    _offer(folder, stem)
    return folder


def format_pasted(text: str) -> str:
    """Write pasted sequences as FASTA; Colab's fields have one line, so several are separated by blanks or commas.

    Args:
        text: Sequences in one-letter code, or a complete FASTA file with its lines.

    Returns:
        FASTA, with the ids protein_1, protein_2, ... unless the text has its own.

    Raises:
        InputError: A part is not a sequence, or a FASTA file has lost its line breaks.
    """
    if text.lstrip().startswith(">"):
        if "\n" not in text.strip():
            raise InputError(
                "the pasted FASTA has lost its line breaks. Paste the sequence alone, or leave the field empty and "
                "upload the file.",
                code="form.fasta-in-one-line",
            )
        return text
    parts = [part for part in re.split(r"[\s,;]+", text) if part]
    wrong = [part for part in parts if not re.fullmatch(r"[A-Za-z]+\*?", part)]
    if wrong:
        raise InputError(
            f"'{wrong[0][:40]}' is not a protein sequence. Paste residues in one-letter code, such as MKTAYIAK.",
            code="form.not-a-sequence",
            found=wrong[0],
        )
    return "".join(f">protein_{number}\n{part.upper()}\n" for number, part in enumerate(parts, 1))


def _upload() -> tuple[str, bytes]:
    """Ask for a file with Colab's dialog; returns its name and content."""
    if "google.colab" not in sys.modules:
        raise InputError(
            "files can be uploaded in Google Colab only. Paste a sequence here, or use `esm2kit embed my.fasta`.",
            code="form.no-colab",
        )
    from google.colab import files

    print("Choose a FASTA file (.fasta, .fa, .faa, also .gz).")
    uploaded = files.upload()
    if len(uploaded) != 1:
        raise InputError(
            f"{len(uploaded)} files were uploaded. Run the cell again and choose one FASTA file.",
            code="form.upload",
            found=len(uploaded),
        )
    return next(iter(uploaded.items()))


def _make_map(path: Path, records: Sequence[Record], vectors_PD: np.ndarray, colour_by: str) -> None:
    """Write the map as a table and a picture, and show it."""
    field = colour_by or default_field(records)
    values_P, projected = colours(records, field), project(vectors_PD)
    axes = plot_map(projected, values_P, field_name(field))
    write_map(path, "png", axes, records, projected, {field: values_P})
    captioned(axes, describe_map(projected, "pca", field_name(field)))


def _write_csv(path: Path, header: list[str], rows: object) -> None:
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _offer(folder: Path, stem: str) -> None:
    """Pack the results into one file; in Colab the browser downloads it."""
    packed = folder / f"{stem}_esm2kit.zip"
    made = sorted(path for path in folder.iterdir() if path.name.startswith(f"{stem}_") and path != packed)
    with atomic_path(packed) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in made:
            archive.write(path, path.name)
    print("results:", *(path.name for path in made))
    print(f"all in one file: {packed}")
    if "google.colab" in sys.modules:
        from google.colab import files

        files.download(str(packed))

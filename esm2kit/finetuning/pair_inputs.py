"""The pairs of proteins that `esm2kit predict` labels with a model of pairs."""

from pathlib import Path

from esm2kit.benchmarking.saved_probe import SavedProbe
from esm2kit.core.errors import InputError
from esm2kit.finetuning.config import PredictConfig
from esm2kit.finetuning.predictor import Predictor
from esm2kit.sequences.pipes import is_pipe
from esm2kit.tasks.pair_files import ProteinPair, find_pair_columns, read_fasta_pairs, read_table_pairs
from esm2kit.tasks.sources import Source
from esm2kit.tasks.tables import read_table


def read_new_pairs(
    config: PredictConfig, model: Predictor, files: list[Path]
) -> tuple[list[ProteinPair], dict[str, Path]] | None:
    """Read the pairs to predict.

    Args:
        config: pairs.
        model: The model.
        files: Files of fasta, with copies of pipes.

    Returns:
        (id, sequence) of both proteins of each pair, and the files; None for a model of single proteins.

    Raises:
        InputError: The model or the files are not of pairs, or a protein is missing.
    """
    if not isinstance(model, SavedProbe) or model.pair_features is None:
        if config.pairs is not None:
            raise InputError(
                f"pairs '{config.pairs}' is given, but {config.model} predicts single proteins. Omit pairs, or choose "
                "a benchmark of pairs.",
                code="predict.single-model",
                path=config.pairs,
            )
        return None
    if config.pairs is not None and is_pipe(config.pairs):
        raise InputError(
            f"pairs '{config.pairs}' is a pipe, but a table is read several times. Save it to a file.",
            code="labels.pipe",
            path=config.pairs,
        )
    path = Path(config.pairs) if config.pairs is not None else files[0]
    if config.pairs is None and not Source(path).is_table:
        found = read_fasta_pairs(Source(path))
        if not found:
            _raise_no_pairs(path)
        return [((a, first), (b, second)) for a, first, b, second, _ in found], {"fasta": path}
    table = read_table(path)
    places = find_pair_columns(table.columns)
    if places is None or (places.sequences is None and config.pairs is None):
        _raise_no_pairs(path)
    pairs, files = read_table_pairs(table, places, None if config.pairs is None else files)
    if None in pairs:
        row = pairs.index(None)
        cells = [table.rows[row][place] for place in places.ids]
        raise InputError(
            f"{path}: row {row + 1} names {cells[0]!r} and {cells[1]!r}, and the FASTA does not have both. Add the "
            "sequences, or remove the row.",
            code="pairs.no-sequence",
            record=row + 1,
            found=tuple(cells),
            path=path,
        )
    return pairs, {name: source.path for name, source in files.items()}


def _raise_no_pairs(path: Path) -> None:
    raise InputError(
        f"{path} has no pairs of proteins, which this model predicts. Pass a table with the columns sequence_a and "
        "sequence_b, or a FASTA and --pairs with a table of the columns protein_a and protein_b.",
        code="predict.no-pairs",
        path=path,
    )

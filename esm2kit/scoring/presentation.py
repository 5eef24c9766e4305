"""Write the HTML page, the pictures and the coloured structures of a run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from esm2kit.core.checksums import FileChecksums, read_sealed_manifest, write_sealed_json
from esm2kit.core.files import atomic_path, sha256_file
from esm2kit.core.paths import portable_name
from esm2kit.scoring.config import ScoreConfig
from esm2kit.scoring.page import PageContent, render_scores
from esm2kit.scoring.pictures import draw_substitutions
from esm2kit.scoring.scores import REMEDY, Scores
from esm2kit.scoring.structures import colour_structures, fit_structures
from esm2kit.sequences.fasta import Record

logger = logging.getLogger(__name__)
DPI = 200
MAX_NAME = 100  # characters of a file name
# Residues of all heat maps of a page together, which then has a few megabytes; the first protein is always drawn.
MAX_RESIDUES = 20_000


class Presentation:
    """The page, the pictures and the structures; what they need is read before the scores are computed.

    Args:
        config: `structure`, `colour_by`, `pictures` and `restart`.
        proteins: the wild types.

    Raises:
        InputError: the structure cannot be read, or shows another protein.
    """

    def __init__(self, config: ScoreConfig, proteins: Sequence[Record]) -> None:
        self.config, self.proteins = config, proteins
        self.fitted = fit_structures(config.structure, proteins)
        self.shown: list[int] = []
        num_residues = 0
        for index, protein in enumerate(proteins[: config.pictures]):
            num_residues += len(protein.sequence)
            if index and num_residues > MAX_RESIDUES:
                break
            self.shown.append(index)

    def run(self, scores: Scores) -> Scores:
        """Write what does not exist from the same scores and settings.

        Args:
            scores: the run, compared with measured values if there are some.

        Returns:
            The run with the files.
        """
        if not self.config.pictures and not self.fitted:
            return scores
        path = scores.manifest.with_name(f"{scores.manifest.name.removesuffix('_scores.json')}_page.json")
        settings = {
            "scores": sha256_file(scores.manifest),
            "assay": None if scores.assay is None else sha256_file(scores.assay),
            "structures": [sha256_file(each.structure.path) for each in self.fitted],
            "colour_by": self.config.colour_by,
            "pictures": self.config.pictures,
        }
        if self.config.restart or not path.is_file() or read_sealed_manifest(path, REMEDY)["settings"] != settings:
            self._write(scores, path, settings)
        found = [path.with_name(name) for name in read_sealed_manifest(path, REMEDY)["checksums"]]
        by_suffix = {suffix: [each for each in found if each.suffix == suffix] for suffix in {p.suffix for p in found}}
        pages = by_suffix.get(".html", [])
        if pages:
            logger.info("page: %s", pages[0])
        return replace(
            scores,
            files=(*scores.files, *found, path),
            page=pages[0] if pages else None,
            pictures=tuple(each for each in found if each.suffix in (".png", ".svg")),
            structures=tuple(each for each in found if each.suffix in (".pdb", ".cif")),
        )

    def _write(self, scores: Scores, path: Path, settings: dict[str, Any]) -> None:
        path.unlink(missing_ok=True)  # of the page that this one replaces
        coloured = colour_structures(scores, self.fitted, self.config.colour_by)
        pictures: list[Path] = []
        if self.config.pictures:
            names = [protein.id for protein in self.proteins]
            pictures = self._draw(scores)
            page = scores.manifest.with_suffix(".html")
            content = PageContent(scores, names, self.config.offset, self.shown if scores.tables else [], coloured)
            text = render_scores(content)
            with atomic_path(page) as part:
                part.write_text(text, encoding="utf-8")
            pictures.insert(0, page)
        files = [*pictures, *(each.path for each in coloured)]
        checksums = {each.name: FileChecksums.compute(each) for each in files}
        write_sealed_json(path, {"stage": "score", "settings": settings, "checksums": checksums})

    def _draw(self, scores: Scores) -> list[Path]:
        """Draw the heat maps as files."""
        paths: list[Path] = []
        if scores.tables is None:
            return paths
        stem, taken = scores.manifest.stem, set()
        for index in self.shown:
            protein = self.proteins[index].id
            name = "" if scores.num_proteins == 1 else f"_{portable_name(protein)[:MAX_NAME]}"
            if name.casefold() in taken:
                name += f"_{index + 1}"
            taken.add(name.casefold())
            title = f"{protein}, {scores.model}, {scores.strategy}"
            with plt.rc_context({"svg.hashsalt": "esm2kit", "svg.fonttype": "none", "text.parse_math": False}):
                figure = draw_substitutions(scores.table(index), scores.sequence(index), self.config.offset, title)
                for suffix, metadata in (("png", None), ("svg", {"Date": None})):
                    paths.append(scores.manifest.with_name(f"{stem}{name}.{suffix}"))
                    with atomic_path(paths[-1]) as part:
                        figure.savefig(part, format=suffix, dpi=DPI, facecolor="white", metadata=metadata)
            plt.close(figure)
        return paths

"""Write generated pages."""

from collections.abc import Mapping
from pathlib import Path


def write_pages(folder: Path, pages: Mapping[str, str]) -> None:
    """Write files and delete others of the same suffixes; an unchanged file keeps its time, so Sphinx skips it.

    Args:
        folder: created if it does not exist.
        pages: file name -> text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = {Path(name).suffix for name in pages}
    for path in folder.iterdir():
        if path.suffix in suffixes and path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")

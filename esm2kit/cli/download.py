"""`esm2kit download`: what can be fetched, what is here, and fetching it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.models.config import SIZES
from esm2kit.tasks.download import DownloadConfig, download
from esm2kit.tasks.flip import TASKS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogueConfig:
    """Fetch weights or FLIP tasks, checked; without a name, list what there is.

    Args:
        what: nothing (list), a model's name, `flip` (every task), `flip <task>` or `flip/<task>`.
        split: of the FLIP task; its default if not given, every one if "all".
        data_dir: folder of FLIP's task folders.
        mirror: of FLIP's files, asked before FLIP's own servers, such as https://files.lab.org/FLIP/{folder}/{file}.
        verify: load the fetched model once, so that every tensor is known to be there and of its size.
    """

    what: str | list[str] | None = None
    split: str | None = None
    data_dir: Path = Path("flip")
    mirror: str | None = None
    verify: bool = True


def catalogue(config: CatalogueConfig) -> str:
    """List, or fetch and verify.

    Returns: lines for a person: the list, or where the files are.
    Raises: InputError for a name that is neither, and whatever keeps the files from arriving.
    """
    what = config.what if isinstance(config.what, str) else "/".join(config.what or [])
    if not what:
        return _listing(config.data_dir)
    kind, _, task = what.partition("/")
    if kind == "flip":
        files = download(DownloadConfig(task or "all", config.split, config.data_dir, config.mirror))
        return "\n".join(str(file) for file in files)
    if what in TASKS:
        raise InputError(f"{what} is a FLIP task: `esm2kit download flip {what}`", code="download.task", name=what)
    if what not in SIZES and ("/" not in what or not isinstance(config.what, str)):
        raise InputError(
            f"{what} is no model and not flip; {suggest_name(what, ['flip', *SIZES])}, or give owner/name",
            code="download.unknown",
            name=what,
            nearest=find_closest(what, ["flip", *SIZES]),
        )
    # they import torch, which the list and FLIP do without
    from esm2kit.models.hub import fetch
    from esm2kit.models.load import load_model

    fetched = fetch(what)
    fetched.check()
    if config.verify:
        model, source = load_model(what)
        logger.info("%s: %d parameters, sha256 %s", what, model.config.num_parameters, source.sha256)
    return f"{what} at revision {fetched.revision}: {fetched.folder}"


def _listing(data_dir: Path) -> str:
    lines = ["models (esm2kit download <name>):"]
    for name, size in SIZES.items():
        parameters = size.num_parameters
        shape, megabytes = f"{size.num_layers} layers x {size.embed_dim}", 4 * parameters / 1e6
        lines.append(f"  {name:<22} {shape:<18} {parameters / 1e6:>8,.1f}M  {megabytes:>9,.0f} MB in float32")
    lines.append("FLIP tasks (esm2kit download flip <task>, or flip for all):")
    for name, task in TASKS.items():
        here = "here" if (data_dir / name).is_dir() else ""
        lines.append(f"  {name:<23} {task.level} {task.target}, {task.licence}  {here}".rstrip())
    return "\n".join(lines)

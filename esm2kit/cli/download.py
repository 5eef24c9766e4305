"""`esm2kit download`: list the model weights and FLIP tasks that are available, or download them."""

import logging
from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.models.config import MODEL_NAMES, SIZES, complete_model_names
from esm2kit.tasks.flip import TASKS

logger = logging.getLogger(__name__)
LICENCE = "by Meta, MIT licence, please cite doi:10.1126/science.ade2574"


@dataclass(frozen=True)
class CatalogueConfig:
    """Download model weights or FLIP tasks and check them; without a name, list what is available.

    Args:
        what: Name of a model such as 8M, `flip` for all tasks, or `flip TASK` for one. Default: list the models and
            tasks.
        split: Split of the FLIP task, or `all`. Default: the task's default split.
        data_dir: Folder of the FLIP task folders.
        mirror: Address pattern of a mirror to try before FLIP's own servers, such as
            https://files.lab.org/FLIP/{folder}/{file}.
        verify: Load a downloaded model once, to check that all tensors exist and have the right shapes.
    """

    what: str | list[str] | None = None
    split: str | None = None
    data_dir: Path = Path("flip")
    mirror: str | None = None
    verify: bool = True

    option_groups = OptionGroups(usual="what split data_dir mirror verify")

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "what")


def list_or_download(config: CatalogueConfig) -> str:
    """List the models and tasks, or download one and check it.

    Args:
        config: What to download, and where to.

    Returns:
        Text for the user: the list, or the paths of the files.

    Raises:
        InputError: The name is neither a model nor a task, or the download failed.
    """
    what = config.what if isinstance(config.what, str) else "/".join(config.what or [])
    if not what:
        return _format_list(config.data_dir)
    kind, _, task = what.partition("/")
    if kind.lower() == "flip" and "/" in task:
        raise InputError(
            f"one FLIP task can be downloaded at a time, found {task.replace('/', ' ')}. Use `esm2kit download flip` "
            "for all.",
            code="download.several",
            found=task.split("/"),
        )
    task = task.lower()
    if kind.lower() == "flip":
        from esm2kit.tasks.download import DownloadConfig, download  # slow import

        files = download(DownloadConfig(task or "all", config.split, config.data_dir, config.mirror))
        for name in [task] if task in TASKS else TASKS:
            logger.info("%s: licence %s, please cite %s", name, TASKS[name].licence, TASKS[name].citation)
        return "\n".join(str(file) for file in files)
    if what in TASKS:
        raise InputError(
            f"'{what}' is a FLIP task: run `esm2kit download flip {what}`", code="download.task", name=what
        )
    if what not in SIZES and ("/" not in what or not isinstance(config.what, str)):
        raise InputError(
            f"'{what}' is neither a model nor 'flip' (other models of the hub are called owner/name); "
            f"{suggest_name(what, ['flip', *MODEL_NAMES])}",
            code="download.unknown",
            name=what,
            nearest=find_closest(what, ["flip", *MODEL_NAMES]),
        )
    if unused := [f"--{name}" for name in ("split", "mirror") if getattr(config, name) is not None]:
        raise InputError(
            f"{' and '.join(unused)} is only for FLIP tasks, and {what} is a model. Omit it; the variable HF_ENDPOINT "
            "sets another hub.",
            code="download.only-flip",
            names=unused,
        )
    # these import torch, which the list and FLIP tasks do not need
    from esm2kit.models.hub import fetch
    from esm2kit.models.load import load_model

    fetched = fetch(what)
    fetched.check()
    if config.verify:
        model, source = load_model(what)
        logger.info("%s: %d parameters, sha256 %s", what, model.config.num_parameters, source.sha256)
    page = f"https://huggingface.co/{what}"
    logger.info("%s: %s", what, LICENCE if what in SIZES else f"its licence is on {page}")
    return f"{what} at revision {fetched.revision}: {fetched.folder}"


def _format_list(data_dir: Path) -> str:
    """Format the list of models and tasks; tasks in `data_dir` are marked."""
    from esm2kit.tasks.download import is_downloaded  # slow import

    lines = [f"models (esm2kit download NAME): {LICENCE}"]
    for name, size in SIZES.items():
        parameters = size.num_parameters
        shape, megabytes = f"{size.num_layers} layers x {size.embed_dim}", 4 * parameters / 1e6
        lines.append(f"  {name:<22} {shape:<18} {parameters / 1e6:>8,.1f}M  {megabytes:>9,.0f} MB in float32")
    lines.append("FLIP tasks (esm2kit download flip TASK, or esm2kit download flip for all):")
    for name, task in TASKS.items():
        downloaded = "downloaded" if is_downloaded(name, data_dir) else ""
        lines.append(f"  {name:<23} {task.level} {task.target}, {task.licence}  {downloaded}".rstrip())
    return "\n".join(lines)

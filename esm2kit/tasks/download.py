"""Download FLIP's files from its server or from mirrors. Existing files are not replaced."""

import logging
import string
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esm2kit.core.errors import InputError, find_closest, suggest_name
from esm2kit.core.fetch import FetchError, fetch
from esm2kit.core.files import UNREADABLE_ZIP, check_output_folder
from esm2kit.core.paths import expand_paths
from esm2kit.tasks.files import parse_attributes, read_csv_split, read_records
from esm2kit.tasks.flip import TASKS, find_split
from esm2kit.tasks.sources import Source, check_zip, find_source
from esm2kit.tasks.task import Task

logger = logging.getLogger(__name__)

# In this order: FLIP's server over https, then http; then the archive in FLIP's repository at a fixed commit.
COMMIT = "62cace8735f5610e2743cf06ce0f944b37fffaa6"
FILE_MIRRORS = (
    "https://data.bioembeddings.com/public/FLIP/fasta/{folder}/{file}",
    "http://data.bioembeddings.com/public/FLIP/fasta/{folder}/{file}",
)
ZIP_MIRRORS = (f"https://raw.githubusercontent.com/J-SNACKKB/FLIP/{COMMIT}/splits/{{folder}}/splits.zip",)
# (task, file) -> bytes and SHA-256, from FLIP's repository at that commit. For other files only the length announced
# by the server is checked, and the checksums inside an archive.
KNOWN: dict[tuple[str, str], tuple[int, str]] = {
    ("bind", "from_publication.fasta"): (288_188, "8b000abee7f98633cdf3683aa9ef9311ddddd41c1be9845992c2af5f8a550e4d"),
    ("bind", "one_vs_many.fasta"): (289_532, "00c885369dcb92f2c9cee4a645ed4b8a23a135cf9a05ef5760916592133a3226"),
    ("bind", "one_vs_mn.fasta"): (66_137, "bfb89809e662e7fcff2d3861da8668be4174bfbe55dc8e80645fa41bb04a2ed1"),
    ("bind", "one_vs_sm.fasta"): (259_762, "a6716a11fcf5ba3431dacf0a8b7ead2a7a27b31ea0e75ffde2a38e35f896140c"),
    ("bind", "one_vs_sn.fasta"): (71_618, "0a11de0c900bfeea3e9f58ffc88d48f92ba9c44eada85df5e769324d753d8f5c"),
    ("bind", "sequences.fasta"): (251_874, "09487b43f207164acef3c491bf59e9ba83f3fcc2d19f011f2bab1ddfc0b9d924"),
    ("bind", "two_vs_many.fasta"): (289_737, "9002f9c5735d772a35b97cca8756194fc04446297dfd56ec5e3241a7db2bd235"),
    ("conservation", "sampled.fasta"): (3_091_516, "fe7621ff1c49e6e0f20ca974f27749c4f88c34f33a978c45847fe801cf5af59d"),
    ("conservation", "sequences.fasta"): (
        2_821_277,
        "efc86819cd06167e5c34e7f6377d90f30a1636121e588a115f53a9ad4bf39a64",
    ),
    ("gb1", "low_vs_high.fasta"): (2_861_115, "15dc7b8090cf1e4963e4a6bdfb1c531c9b9894eeef33221981fb1d5c67408516"),
    ("gb1", "one_vs_rest.fasta"): (2_856_560, "3af259abd9cafd843d264d41fc17c46542392b26cd063eb5a6cdd4f3d9a68188"),
    ("gb1", "sampled.fasta"): (2_862_824, "2259bafa03b87134502a77c47107210d41ca07e5dae3b4a1374ac0e3f81f6090"),
    ("gb1", "splits.zip"): (1_241_473, "00a3c3d5be56ce35adfbec838db8ff549be369525e151a6978133da34b9fd86f"),
    ("gb1", "three_vs_rest.fasta"): (2_859_226, "276a9d37342b3ffa50c5f5ee1e11f45975d179b784806e6dea8076c8a498a0ec"),
    ("gb1", "two_vs_rest.csv"): (2_500_241, "b368e4564e10e33735f897c9b63f1be7030082e565c6d4e1368d6f1641a310de"),
    ("gb1", "two_vs_rest.fasta"): (2_856_916, "c36a5694467b322060f0a766e3cb40ebb8a727a39d41ddd104a814f833b327e1"),
    ("secondary_structure", "mask.fasta"): (
        2_945_498,
        "6ffafb87ab0d40781103594d3a8fa202d1db741fd49cc00fe6220797bf55897f",
    ),
    ("secondary_structure", "sampled.fasta"): (
        3_245_266,
        "d74173c6ecd35339e9455565b45160f7285d401a1fc05e814af67bcb7bb83ad1",
    ),
    ("secondary_structure", "sequences.fasta"): (
        2_945_498,
        "cc69cb36650161fa08874c7a3a2ceceb9c3bbab1b6394cb875647c1b8b4a4b03",
    ),
    ("secondary_structure_648", "resolved.fasta"): (
        2_996_269,
        "5aad80ab3e045c589f6ee740b321519b8e5fcdccb9642c3422e1ec383eecdb7d",
    ),
    ("secondary_structure_648", "sampled.fasta"): (
        3_303_421,
        "4c98e70930134df6458142ccda36ef8a3a32623f580861c03f0c48f8e252242a",
    ),
    ("secondary_structure_648", "sequences.fasta"): (
        2_996_269,
        "ad3d62d1a3fcd44cb59b3eff2c8f7ffdbf68ad5ba540fc7e0ee6851377e436ae",
    ),
}
# Size limit of other files. The largest file of FLIP, 284,009 variants of 735 residues of aav, has 0.2 GB.
MAX_BYTES = 1 << 30
STALL_SECONDS = 30.0


@dataclass(frozen=True)
class DownloadConfig:
    """Download the files of FLIP tasks.

    Args:
        task: FLIP task, or all.
        split: Split of the task, or all. Default: FLIP's default split.
        data_dir: Folder of task folders. Files are written to <data_dir>/<task>/.
        mirror: URL pattern to try first. Default: none. Example: https://files.lab.org/FLIP/{folder}/{file}.
    """

    task: str = "all"
    split: str | None = None
    data_dir: Path = Path("flip")
    mirror: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self)
        try:  # field, format and conversion per pair of braces
            fields = {each[1:] for each in string.Formatter().parse(self.mirror or "{file}")} - {(None, None, None)}
        except ValueError:  # an unmatched brace
            fields = set()
        if ("file", "", None) not in fields or fields - {(name, "", None) for name in ("file", "folder")}:
            raise InputError(
                f"mirror {self.mirror!r} must contain {{file}}, may contain {{folder}}, and no other braces",
                code="download.mirror",
                found=self.mirror,
            )
        if self.mirror and not self.mirror.startswith(("http://", "https://")):
            raise InputError(
                f"mirror {self.mirror!r} must start with http:// or https://. Copy files of this machine to "
                f"{self.data_dir}/<task>/ instead.",
                code="download.mirror",
                found=self.mirror,
            )


def download(config: DownloadConfig) -> list[Path]:
    """Download one FLIP task, or all of them.

    Args:
        config: what to download, and where to.

    Returns:
        Paths of the files, including those that existed before.

    Raises:
        InputError: a task could not be downloaded; the other tasks are downloaded first.
    """
    check_output_folder(config.data_dir)
    mirrors = (config.mirror, *FILE_MIRRORS) if config.mirror else FILE_MIRRORS
    if config.task != "all":
        return download_flip(config.task, config.data_dir, config.split, mirrors)
    files, failed = [], []
    tasks = list_downloadable_tasks(config.data_dir)
    for task in tasks:
        try:
            files += download_flip(task, config.data_dir, config.split, mirrors)
        except InputError as error:
            logger.warning("%s", error)
            failed.append(task)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(tasks)} tasks could not be downloaded ({', '.join(failed)}). See the log.",
            code="download.some-failed",
            tasks=tuple(failed),
        )
    return files


def list_downloadable_tasks(data_dir: Path) -> list[str]:
    """List FLIP's tasks, except those that were withdrawn from its server and are not in data_dir; log these."""
    tasks = []
    for name, spec in TASKS.items():
        if spec.folder and _find_missing(_expected_files(spec, list(spec.splits)), Path(data_dir) / name):
            logger.info("%s is skipped: its files are no longer on FLIP's server and not in %s", name, data_dir)
        else:
            tasks.append(name)
    return tasks


def _expected_files(spec: Task, splits: list[str]) -> dict[str, tuple[str, ...]]:
    """Map each required file of a task to its accepted file names."""
    return {name: (name,) for name in spec.files} | {f"{s}.fasta": (f"{s}.fasta", f"{s}.csv") for s in splits}


def _find_missing(expected: dict[str, tuple[str, ...]], folder: Path) -> list[str]:
    return [name for name, forms in expected.items() if not (folder.is_dir() and find_source(folder, forms))]


def is_downloaded(task: str, data_dir: Path) -> bool:
    """Return whether a folder has all files of a FLIP task's default split, in whichever supported format they are."""
    spec, folder = TASKS[task], Path(data_dir) / task
    expected = _expected_files(spec, [find_split(spec, None)])
    if _find_missing(expected, folder):
        return False
    try:
        for source in (find_source(folder, forms) for forms in expected.values()):
            if not source.is_table:
                next(read_records(source))
    except InputError:  # such as an error page that was saved under the name of the file
        return False
    return True


def _check_source(source: Source, spec: Task, name: str) -> None:
    """Check that a file of a task is readable: a table, or FASTA whose headers have the fields of a split.

    Args:
        source: the file.
        spec: the task.
        name: of the file; those of `spec.files` have no fields.

    Raises:
        InputError: it is another file, such as an error page.
    """
    if source.is_table:
        read_csv_split(source)
        return
    needed = {} if name in spec.files else {"SET": 0} | ({"TARGET": 0} if spec.level == "protein" else {})
    num_records = 0
    for header, _ in read_records(source):
        num_records += 1
        attributes = parse_attributes(header, source)[1] if needed else {}
        for field in needed.keys() & attributes.keys():
            needed[field] += 1
    absent = [field for field, count in needed.items() if not count]
    if absent:
        raise InputError(
            f"{source}: none of the {num_records:,} headers has {absent[0]}=, so it is not a split of {spec.name}. "
            "Use another file.",
            code="task.not-a-split",
            path=source.path,
            found=absent[0],
        )


def download_flip(
    task: str,
    data_dir: Path,
    split: str | None = None,
    file_mirrors: Sequence[str] = FILE_MIRRORS,
    zip_mirrors: Sequence[str] = ZIP_MIRRORS,
    stall_seconds: float = STALL_SECONDS,
) -> list[Path]:
    """Download the missing files of a task to `<data_dir>/<task>/`.

    Existing files are not replaced, in whichever supported format they are.

    Args:
        task: a key of flip.TASKS.
        data_dir: folder that contains the task folders.
        split: name of the split. None selects FLIP's default, "all" every split.
        file_mirrors: URL patterns with {folder} and {file}, tried in order.
        zip_mirrors: URL patterns of an archive of all splits, tried last.
        stall_seconds: time in seconds after which a stalled or very slow server is given up.

    Returns:
        Paths of the task's files.

    Raises:
        InputError: the task or split is unknown, or no mirror provides the files; the message then explains how to
            add them by hand.
    """
    if task not in TASKS:
        raise InputError(
            f"unknown FLIP task {task!r}; {suggest_name(task, TASKS)}",
            code="task.unknown",
            name=task,
            nearest=find_closest(task, TASKS),
        )
    spec = TASKS[task]
    splits = list(spec.splits) if split == "all" else [find_split(spec, split)]
    folder = Path(data_dir) / task
    expected = _expected_files(spec, splits)
    absent = _find_missing(expected, folder)
    if absent and spec.folder:  # the server has another test set under this name
        raise InputError(
            f"{task} is no longer on FLIP's server, which has {spec.folder} with another test set. Copy "
            f"{', '.join(expected)} from before 2022-12 to {folder}.",
            code="download.withdrawn",
            task=task,
            path=folder,
        )
    for name in expected.keys() - set(absent):
        source = find_source(folder, expected[name])
        try:
            _check_source(source, spec, name)
        except InputError as error:
            raise InputError(
                f"{source.path} exists, but is not a file of {task} ({_get_reason(error, source.path, name)}). Delete "
                "it, then rerun the command to download it.",
                code="download.other-file",
                task=task,
                path=source.path,
            ) from None
    reasons: list[str] = []
    for name in absent:
        if not _fetch_from_mirrors(
            task, name, folder, [m.format(folder=task, file=name) for m in file_mirrors], stall_seconds, reasons
        ):
            break
    else:
        return [find_source(folder, forms).path for forms in expected.values()]
    for address in (mirror.format(folder=task) for mirror in zip_mirrors):
        if _fetch_from_mirrors(task, "splits.zip", folder, [address], stall_seconds, reasons, _check_archive):
            found = [find_source(folder, forms) for forms in expected.values()]
            if all(found):
                return [source.path for source in found]
            reasons.append(f"{address} lacks {next(n for n, f in zip(expected, found, strict=True) if not f)}")
    raise InputError(
        f"could not download {task} ({'; '.join(dict.fromkeys(reasons)) or 'no mirror given'}). Copy "
        f"{', '.join(absent)} to {folder} by hand "
        "(FLIP: https://github.com/J-SNACKKB/FLIP, splits folder, AFL-3.0), then rerun the command.",
        code="download.failed",
        task=task,
        reasons=tuple(dict.fromkeys(reasons)),
        path=folder,
    )


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, path)
            if archive.testzip() is not None:
                raise zipfile.BadZipFile(f"member {archive.testzip()} fails its checksum")
    except (*UNREADABLE_ZIP, InputError) as error:
        raise FetchError(f"is not a valid archive ({error})") from None


def _get_reason(error: InputError, path: Path, name: str) -> str:
    """Return what is wrong with a file, without the remedy; the file is called by its name in the task."""
    return str(error).replace(str(path), name).split(". ")[0].rstrip(".")


def _fetch_from_mirrors(
    task: str,
    name: str,
    folder: Path,
    addresses: Sequence[str],
    stall_seconds: float,
    reasons: list[str],
    check: Callable[[Path], None] | None = None,
) -> bool:
    """Download a file from the first address that works, and append the reason of each failure to `reasons`."""
    size, sha256 = KNOWN.get((task, name), (None, None))
    is_archive = check is not None

    def check_fasta(path: Path) -> None:
        try:
            _check_source(Source(path), TASKS[task], name)
        except InputError as error:
            raise FetchError(f"sent another file than {name} ({_get_reason(error, path, name)})") from None

    for address in addresses:
        try:
            fetch(
                address, folder / name, stall_seconds, size or MAX_BYTES, size, sha256, check or check_fasta, is_archive
            )
            return True
        except FetchError as refusal:
            reasons.append(f"{address} {refusal}")
            logger.info("%s %s", address, refusal)
    return False

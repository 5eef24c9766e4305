"""Download ESM-2 weights from the Hugging Face hub: pinned revisions, resumable downloads, verified digests."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import requests
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from esm2kit.core.errors import InputError
from esm2kit.core.files import sha256_file
from esm2kit.models.formats.readers import ADAPTER_CONFIG, raise_adapter
from esm2kit.models.formats.shards import read_index, weight_files

logger = logging.getLogger(__name__)
DEFAULT_ENDPOINT = "https://huggingface.co"
# system errors of a folder that cannot be written to, or of a full disk
CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC,
                errno.EDQUOT, errno.EFBIG)  # fmt: skip
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
LICENCE = "MIT"  # of the code and of the weights: https://github.com/facebookresearch/esm
SECONDS_TO_CONNECT = 5.0
# The process downloads, because a thread cannot be ended when the time is over.
FETCH = """
import sys
from esm2kit.core.errors import InputError
from esm2kit.models.hub import fetch
try:
    fetch(sys.argv[1])
except InputError as error:
    sys.exit(str(error))
"""


class OfficialModel(NamedTuple):
    """One of Meta's ESM-2 models on the Hugging Face hub.

    Args:
        repo: owner/name.
        revision: the pinned commit.
        sha256: of model.safetensors; None if only the digests that the hub declares are known.
    """

    repo: str
    revision: str
    sha256: str | None = None


# Independent public projects pin the same revisions and digests. The hub also declares the digests at each download.
OFFICIAL_MODELS = {
    "esm2_t6_8M_UR50D": OfficialModel(
        "facebook/esm2_t6_8M_UR50D",
        "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
        "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
    ),
    "esm2_t12_35M_UR50D": OfficialModel("facebook/esm2_t12_35M_UR50D", "6fbf070e65b0b7291e7bbcd451118c216cff79d8"),
    "esm2_t30_150M_UR50D": OfficialModel(
        "facebook/esm2_t30_150M_UR50D",
        "a695f6045e2e32885fa60af20c13cb35398ce30c",
        "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
    ),
    "esm2_t33_650M_UR50D": OfficialModel(
        "facebook/esm2_t33_650M_UR50D",
        "08e4846e537177426273712802403f7ba8261b6c",
        "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
    ),
    "esm2_t36_3B_UR50D": OfficialModel("facebook/esm2_t36_3B_UR50D", "476b639933c8baad5ad09a60ac1a87f987b656fc"),
    "esm2_t48_15B_UR50D": OfficialModel("facebook/esm2_t48_15B_UR50D", "5fbca39631164edc1d402a5aa369f982f72ee282"),
}


def compute_digest(file: Path) -> str:
    """Compute the SHA-256 of a file, once per process while the file's size and modification time stay the same.

    Args:
        file: any file.

    Returns:
        The hex digest.
    """
    status = file.stat()
    return _cached_digest(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _cached_digest(file: Path, size: int, modified_ns: int) -> str:
    return sha256_file(file)


class Download(NamedTuple):
    """A downloaded model in the Hugging Face cache.

    Args:
        folder: the folder with the model's files.
        revision: the commit.
        pinned: expected SHA-256 of model.safetensors; None if only the digests that the hub declares are known.
    """

    folder: Path
    revision: str
    pinned: str | None

    def files(self) -> list[Path]:
        """Return the files with tensors."""
        return weight_files(self.folder)

    def check(self) -> None:
        """Compare the files with tensors with their digests; raises as `check_digest`."""
        for file in self.files():
            check_digest(file, self.pinned if file.name == "model.safetensors" else None)


def fetch(name: str, weights: bool = True) -> Download:
    """Download a model's files that the Hugging Face cache lacks; interrupted downloads resume.

    The environment variables HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE apply, as for huggingface_hub.

    Args:
        name: an official name, `owner/name` or `owner/name@revision`.
        weights: download the weights too, not only config.json.

    Returns:
        The files; `check` compares them with their digests.

    Raises:
        InputError: the model does not exist, or the hub cannot be reached and the cache lacks a file.
    """
    given, _, revision = name.partition("@")
    official = OFFICIAL_MODELS.get(given, OfficialModel(given, "main"))
    revision = revision or official.revision
    hub = _HubRevision(official.repo, revision)
    if official.repo not in (each.repo for each in OFFICIAL_MODELS.values()) and hub.has_file(ADAPTER_CONFIG):
        raise_adapter(given, ADAPTER_CONFIG)
    if not hub.has_file("config.json") and not hub.unreachable:
        raise InputError(
            f"{official.repo}@{revision} has no config.json, so it is not a model of transformers. Use another "
            "repository, or download its files and pass the path.",
            code="hub.no-config",
            name=official.repo,
            revision=revision,
        )
    folder = hub.download("config.json").parent
    for file in hub.list_tensor_files() if weights else ():
        hub.download(file)
    if hub.unreachable and hub.endpoint in hub.unreachable:
        logger.warning("%s; %s is read from the cache", hub.unreachable, name)
    return Download(folder, folder.name, official.sha256 if revision == official.revision else None)


def is_cached(name: str) -> bool:
    """Check whether an official model is in the Hugging Face cache, so that no network is needed.

    Args:
        name: an official name.

    Returns:
        True if the cache has its config.json and its weights.
    """
    official = OFFICIAL_MODELS[name]
    cached = {
        file
        for file in ("config.json", *SINGLE_FILES, *INDEXES)
        if isinstance(
            try_to_load_from_cache(official.repo, file, cache_dir=constants.HF_HUB_CACHE, revision=official.revision),
            str,
        )
    }
    return "config.json" in cached and len(cached) > 1


def fetch_in_time(name: str, seconds: float = 60.0, on_start: Callable[[], None] = lambda: None) -> str:
    """Download an official model if that takes no longer than a time limit.

    Without network this takes at most SECONDS_TO_CONNECT. The part that was downloaded when the time is over stays in
    the cache, so that the next call continues there.

    Args:
        name: an official name.
        seconds: time limit of the download.
        on_start: called before the download, if there is one.

    Returns:
        An empty text if the model is in the cache now; otherwise the reason why it is not.
    """
    if is_cached(name):
        return ""
    if unreachable := _explain_unreachable():
        return unreachable
    on_start()
    environment = os.environ | {"HF_HUB_CACHE": str(constants.HF_HUB_CACHE), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("JPY_PARENT_PID", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", FETCH, name],
            env=environment, capture_output=True, text=True, encoding="utf-8", timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the download takes longer than {seconds:.0f} seconds"
    lines = done.stderr.strip().splitlines()
    return "" if is_cached(name) else lines[-1].rstrip(".") if lines else "the download failed"


def _read_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def _explain_unreachable() -> str:
    """Return why the hub cannot be used, or an empty text; the hub's own client would try for 25 seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    endpoint, reached = _read_endpoint(), threading.Event()

    def connect() -> None:
        try:
            requests.head(endpoint, timeout=SECONDS_TO_CONNECT)
            reached.set()
        except requests.RequestException:
            return

    # the timeout of a request does not include the lookup of the host's name, so a thread limits both
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    return "" if reached.is_set() else f"{endpoint} cannot be reached"


class _HubRevision:
    """One revision of a repository, read from the hub or, if the hub is unreachable, from the cache."""

    def __init__(self, repo: str, revision: str) -> None:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            owner_and_name = "/".join(repo.rstrip("/").split("/")[-2:])
            fix = f"Pass {owner_and_name!r}" if "://" in repo else "Pass owner/name, or the path of a local model"
            raise InputError(
                f"{repo!r} is not the name of a model on the hub: {str(error).splitlines()[0]} {fix}.",
                code="hub.name",
                name=repo,
            ) from None
        self.repo, self.revision = repo, revision
        self.endpoint = _read_endpoint()
        self.unreachable = _explain_unreachable() or None

    def list_tensor_files(self) -> list[str]:
        """Find and download the files with tensors: safetensors before .bin, single files before shards.

        Returns:
            The names of the files.

        Raises:
            InputError: the repository has no weights, or the hub is unreachable and the cache lacks a file.
        """
        for single, index in zip(SINGLE_FILES, INDEXES, strict=True):
            if self.has_file(single):
                return [single]
            if self.has_file(index):
                return read_index(self.download(index))
        if self.unreachable:
            raise self._not_cached_error(f"{self.repo} at revision {self.revision}")
        raise InputError(
            f"{self.repo}@{self.revision} has neither model.safetensors nor pytorch_model.bin. Use another repository.",
            code="hub.no-weights",
            name=self.repo,
            revision=self.revision,
        )

    def has_file(self, file: str) -> bool:
        """Check whether the repository, or the cache if the hub is unreachable, has a file; downloads it."""
        if self.unreachable:
            cache = constants.HF_HUB_CACHE
            return isinstance(try_to_load_from_cache(self.repo, file, cache_dir=cache, revision=self.revision), str)
        try:
            self.download(file)
        except EntryNotFoundError:
            return False
        return True

    def download(self, file: str) -> Path:
        """Download one file to the cache.

        Args:
            file: its name in the repository.

        Returns:
            The path in the cache.

        Raises:
            EntryNotFoundError: the repository has no such file.
            InputError: the repository or revision does not exist, or the file cannot be downloaded.
        """
        place, local = f"{self.repo}/{file} at revision {self.revision}", self.unreachable is not None
        try:
            path = hf_hub_download(
                self.repo, file, revision=self.revision, endpoint=self.endpoint, local_files_only=local
            )
        except LocalEntryNotFoundError:
            raise self._not_cached_error(place) from None
        except OfflineModeIsEnabled:
            raise InputError(
                f"{place} is not in the cache, and offline mode is on. Unset HF_HUB_OFFLINE to download it.",
                code="hub.offline",
                name=self.repo,
            ) from None
        except GatedRepoError:
            raise InputError(
                f"{self.repo} is restricted on {self.endpoint}. Accept its terms there, and set HF_TOKEN to a token of "
                "your account.",
                code="hub.gated",
                name=self.repo,
            ) from None
        except RepositoryNotFoundError:
            known = ", ".join(OFFICIAL_MODELS)
            raise InputError(
                f"{self.endpoint} has no public model '{self.repo}'. Use one of {known}, or another owner/name.",
                code="hub.unknown",
                name=self.repo,
            ) from None
        except RevisionNotFoundError:
            raise InputError(
                f"{self.endpoint}/{self.repo} has no revision '{self.revision}'. Omit it or use an existing commit.",
                code="hub.revision",
                name=self.repo,
                revision=self.revision,
            ) from None
        except EntryNotFoundError:
            raise
        except Exception as error:  # the HTTP client of huggingface_hub raises errors of its own
            if isinstance(error, OSError | RuntimeError) and not isinstance(
                error, HfHubHTTPError | requests.RequestException
            ):
                _raise_unwritable_cache(error)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{place}: the download was interrupted ({reason}). Rerun the command to resume it.",
                code="hub.interrupted",
                name=self.repo,
            ) from None
        return Path(path)

    def _not_cached_error(self, place: str) -> InputError:
        why = self.unreachable or f"{self.endpoint} no longer responds"
        remedy = "Download it on a machine with network access and copy HF_HOME, or pass the path of a local model."
        return InputError(f"{place} is not in the cache, and {why}. {remedy}", code="hub.not-cached", place=place)


def _raise_unwritable_cache(error: OSError | RuntimeError) -> None:
    """Name the cache if it cannot be written to; return for an error of the network, or raise another RuntimeError."""
    # pathlib raises RuntimeError for a user without a home folder, as in a container with an unknown user id
    homeless = isinstance(error, RuntimeError) and "home directory" in str(error)
    if isinstance(error, RuntimeError) and not homeless:
        raise error
    if homeless or error.errno in CACHE_ERRORS:
        reason = "the home folder is not known" if homeless else error.strerror
        raise InputError(
            f"the cache of downloaded models, {constants.HF_HUB_CACHE}, cannot be written to ({reason}). Set HF_HOME "
            "to a folder that can be written to and has space.",
            code="hub.cache",
            path=constants.HF_HUB_CACHE,
        ) from None


def read_declared_digest(path: Path) -> str | None:
    """Read the SHA-256 that the hub declared for a file: the name of the blob that the cache links to.

    Args:
        path: a file in the cache.

    Returns:
        The hex digest; None for small files, whose names are not a SHA-256.
    """
    blob = path.resolve()
    return blob.name if len(blob.name) == 64 else None


def check_digest(path: Path, pinned: str | None = None) -> None:
    """Compare a file in the Hugging Face cache with its pinned or declared digest.

    Args:
        path: a file in the cache.
        pinned: the expected SHA-256. Default: the digest that the hub declared.

    Raises:
        InputError: the digests differ. The file is deleted from the cache, so that it is downloaded again.
    """
    blob = path.resolve()
    expected = pinned or read_declared_digest(path)
    if expected is None or path.suffix not in (".safetensors", ".bin"):
        return
    found = compute_digest(path)
    if found != expected:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise InputError(
            f"{path.name}: the sha256 is {found}, expected {expected}. The file was deleted from the cache; rerun the "
            "command to download it again.",
            code="hub.digest",
            path=path,
            found=found,
            expected=expected,
        )

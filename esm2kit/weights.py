"""Any ESM-2 by one call: an official name, a fair-esm .pt, a Hugging Face folder or repository, a checkpoint of ours or
a distributed one.

No code is ever unpickled: .pt, .bin and .distcp go through torch's weights-only reader, a distributed checkpoint's
`.metadata` through one that makes inert records; everything else is safetensors.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import requests
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from esm2kit.checkpoint import load_esm2, read_metadata
from esm2kit.convert import load_fair_esm, load_hf
from esm2kit.distributed import load_distributed
from esm2kit.errors import InputError, nearest
from esm2kit.model import ESM2, SIZES
from esm2kit.provenance import sha256_file
from esm2kit.shards import METADATA, indexed, is_distributed, shard_files, weight_files

logger = logging.getLogger(__name__)
DEFAULT_ENDPOINT = "https://huggingface.co"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class Official(NamedTuple):
    """One of Meta's ESM-2 on the Hugging Face hub.

    Args:
        repo: owner/name.
        revision: the commit everyone gets.
        sha256: of model.safetensors; None where only the hub's own declaration is checked (sharded .bin files).
    """

    repo: str
    revision: str
    sha256: str | None = None


# Revisions and digests as independent public projects pin them; the hub declares the digests again at each download.
OFFICIAL = {
    "esm2_t6_8M_UR50D": Official(
        "facebook/esm2_t6_8M_UR50D",
        "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
        "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
    ),
    "esm2_t12_35M_UR50D": Official("facebook/esm2_t12_35M_UR50D", "6fbf070e65b0b7291e7bbcd451118c216cff79d8"),
    "esm2_t30_150M_UR50D": Official(
        "facebook/esm2_t30_150M_UR50D",
        "a695f6045e2e32885fa60af20c13cb35398ce30c",
        "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
    ),
    "esm2_t33_650M_UR50D": Official(
        "facebook/esm2_t33_650M_UR50D",
        "08e4846e537177426273712802403f7ba8261b6c",
        "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
    ),
    "esm2_t36_3B_UR50D": Official("facebook/esm2_t36_3B_UR50D", "476b639933c8baad5ad09a60ac1a87f987b656fc"),
    "esm2_t48_15B_UR50D": Official("facebook/esm2_t48_15B_UR50D", "5fbca39631164edc1d402a5aa369f982f72ee282"),
}


def load_model(model: str | Path, untrained_seed: int | None = None) -> tuple[ESM2, dict[str, Any]]:
    """An ESM-2 in evaluation mode on the CPU, in float32, and where it came from.

    Args:
        model: an official name (`esm2_t6_8M_UR50D`), a hub repository (`owner/name`, `owner/name@revision`), a
            fair-esm .pt, a Hugging Face folder (whole or sharded), a checkpoint of `esm2kit pretrain`, its run's folder
            (the best), or a folder of torch.distributed.checkpoint.
        untrained_seed: the same architecture with fresh weights from this seed instead: the baseline that tells what
            the training is worth. For an official name nothing is fetched then.
    Returns: the model, and {"name", "source", "format", "sha256"} (with untrained_seed, "untrained_seed" too).
    Raises: InputError in one line for whatever cannot be loaded, and what to do.
    """
    text = str(model)
    if untrained_seed is not None and text in SIZES and not Path(text).exists():
        fresh = ESM2.initialised(SIZES[text], untrained_seed).eval()
        return fresh, _untrained({"name": text, "source": text, "format": "size"}, untrained_seed)
    loaded, source = _load(Path(model)) if Path(model).exists() else _load_named(text)
    if untrained_seed is not None:
        return ESM2.initialised(loaded.config, untrained_seed).eval(), _untrained(source, untrained_seed)
    return loaded, source


def _untrained(source: dict[str, Any], seed: int) -> dict[str, Any]:
    return source | {"name": f"{source['name']}_untrained", "untrained_seed": seed, "sha256": f"untrained-{seed}"}


def _load(path: Path) -> tuple[ESM2, dict[str, Any]]:
    """By what the path holds."""
    if path.is_dir():
        if (path / "config.json").is_file():
            loaded, digests = _beside(lambda: [_digest_of(file) for file in weight_files(path)], lambda: load_hf(path))
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
            return loaded, {"name": path.name, "source": str(path), "format": "huggingface", "sha256": digest}
        if is_distributed(path):
            files = [*filter(Path.is_file, [path / METADATA]), *shard_files(path)]
            loaded, digests = _beside(lambda: [_digest_of(file) for file in files], lambda: load_distributed(path))
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
            return loaded, {"name": path.name, "source": str(path), "format": "distributed", "sha256": digest}
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return _load(found[0])
        if (checkpoint := _of_run(path)) and (not found or path.name == "checkpoints"):
            return _load(checkpoint)
        raise InputError(f"{path}: no config.json and {len(found)} .safetensors files in it; name one checkpoint file")
    if path.suffix in (".pt", ".pth"):
        loaded, digest = _beside(lambda: _digest_of(path), lambda: load_fair_esm(path))
        return loaded, {"name": path.stem, "source": str(path), "format": "fair-esm", "sha256": digest}
    metadata = read_metadata(path)
    loaded, _ = load_esm2(path)
    name = path.stem
    if path.parent.name == "checkpoints":  # of a run: its folder and update say more than best or last
        name = f"{path.absolute().parent.parent.name}_step{metadata['step']}"
    return loaded, {"name": name, "source": str(path), "format": "esm2kit", "sha256": metadata["sha256"]}


def _of_run(folder: Path) -> Path | None:
    """The checkpoint that a pretraining run's folder, wherever it is now, stands for: its best, else its last."""
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    names = ["last.safetensors"]
    with suppress(OSError, ValueError, KeyError, TypeError):  # a run that has not ended has not said which is its best
        names.insert(0, Path(json.loads((checkpoints.parent / "pretrain.json").read_text())["best"]).name)
    return next((path for name in names if (path := checkpoints / name).is_file()), None)


def _beside(digest: Callable[[], Any], load: Callable[[], ESM2]) -> tuple[ESM2, Any]:
    """What `load` and `digest` give, the digest taken by a thread while the tensors are read."""
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(digest)
        return load(), taken.result()


def _digest_of(file: Path) -> str:
    """SHA-256 of a file, taken once a process for as long as the file stays as it is."""
    status = file.stat()
    return _digest_at(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_at(file: Path, size: int, modified_ns: int) -> str:
    return sha256_file(file)


def _load_named(name: str) -> tuple[ESM2, dict[str, Any]]:
    _refuse_missing_path(name)
    if name not in OFFICIAL and (
        name.count("/") != 1 or name.startswith((".", "/")) or name.endswith((".pt", ".safetensors"))
    ):
        raise InputError(f"model {name!r} is no file, folder or published name; {nearest(name, OFFICIAL)}")
    folder, revision = fetch(name)
    loaded, source = _load(folder)
    return loaded, source | {"name": name.split("@")[0].split("/")[-1], "source": f"hub:{name}@{revision}"}


def _refuse_missing_path(name: str) -> None:
    """Raise for what begins with a folder that is there: a path that is wrong, not a name on the hub."""
    folder = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if folder is None or "@" in name or name in (official.repo for official in OFFICIAL.values()):
        return
    held = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if held[8:] else "")
    hub = f", or write {name}@main for the hub's" if name.count("/") == 1 and name[0] != "." else ""
    raise InputError(f"model {name!r} is not there: {folder} holds {shown or 'nothing'}; correct the path{hub}")


def fetch(name: str) -> tuple[Path, str]:
    """An ESM-2's files in the hub's cache: downloaded if they are not there, resumed if they are in part, checked.

    Args:
        name: an official name, `owner/name` or `owner/name@revision`.
    Returns: the folder, and the commit it is.
    Raises: InputError if the hub cannot be reached and the cache lacks a file, if there is no such model, or if a
        digest differs. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
    """
    given, _, revision = name.partition("@")
    official = OFFICIAL.get(given, Official(given, "main"))
    revision = revision or official.revision
    hub = _Hub(official.repo, revision)
    folder = hub.download("config.json").parent
    for file in hub.tensor_files():
        pinned = official.sha256 if file == "model.safetensors" and revision == official.revision else None
        check_digest(hub.download(file), pinned)
    return folder, folder.name


class _Hub:
    """One revision of one repository, and whether anything but the cache can be asked for it."""

    def __init__(self, repo: str, revision: str) -> None:
        self.repo, self.revision = repo, revision
        self.endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        self.unreachable = "HF_HUB_OFFLINE is set" if offline else self._ask()

    def _ask(self) -> str | None:
        """Why nobody answers, found out within seconds; left to itself the hub's client tries for 25."""
        try:
            requests.head(self.endpoint, timeout=5)
        except requests.RequestException:
            logger.warning("%s cannot be reached: only models already in the cache can be used", self.endpoint)
            return f"{self.endpoint} cannot be reached"
        return None

    def tensor_files(self) -> list[str]:
        """The names of the files that hold tensors, safetensors before .bin, whole before sharded."""
        for single, index in zip(SINGLE_FILES, INDEXES, strict=True):
            if self._has(single):
                return [single]
            if self._has(index):
                return indexed(self.download(index))
        if self.unreachable:
            raise self._not_cached(f"{self.repo} at revision {self.revision}")
        raise InputError(
            f"{self.repo}@{self.revision} has neither model.safetensors nor pytorch_model.bin; give another repository"
        )

    def _has(self, file: str) -> bool:
        if self.unreachable:
            cache = constants.HF_HUB_CACHE
            return isinstance(try_to_load_from_cache(self.repo, file, cache_dir=cache, revision=self.revision), str)
        try:
            self.download(file)
        except EntryNotFoundError:
            return False
        return True

    def download(self, file: str) -> Path:
        """One file through the hub's cache. Raises: EntryNotFoundError if the repository lacks it, else InputError."""
        place, local = f"{self.repo}/{file} at revision {self.revision}", self.unreachable is not None
        try:
            path = hf_hub_download(
                self.repo, file, revision=self.revision, endpoint=self.endpoint, local_files_only=local
            )
        except LocalEntryNotFoundError:
            raise self._not_cached(place) from None
        except OfflineModeIsEnabled:
            raise InputError(f"{place} is not in the cache and offline mode is on: unset HF_HUB_OFFLINE") from None
        except RepositoryNotFoundError:
            known = ", ".join(OFFICIAL)
            raise InputError(
                f"{self.endpoint} has no public model {self.repo}: use one of {known}, or owner/name"
            ) from None
        except RevisionNotFoundError:
            remedy = "leave it out, or take a commit that exists"
            raise InputError(f"{self.endpoint}/{self.repo} has no revision {self.revision}: {remedy}") from None
        except HFValidationError as error:
            raise InputError(f"{self.repo!r} is no model's name on a hub: {str(error).splitlines()[0]}") from None
        except EntryNotFoundError:
            raise
        except (HfHubHTTPError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{place}: the download broke off ({reason}); run it again, it goes on from there"
            ) from None
        return Path(path)

    def _not_cached(self, place: str) -> InputError:
        why = self.unreachable or f"{self.endpoint} stopped answering"
        remedy = "fetch it where there is a network and copy HF_HOME, or give a model that is here by its path"
        return InputError(f"{place} is not in the cache and {why}: {remedy}")


def check_digest(path: Path, pinned: str | None = None) -> None:
    """Hold a file of the hub's cache to the digest its name there declares, and to a pinned one.

    The hub stores a large file under the SHA-256 the server declared for it, and the model's folder links there.
    Raises: InputError naming both digests. The damaged file is taken out of the cache, so that a new download mends it.
    """
    blob = path.resolve()
    declared = blob.name if len(blob.name) == 64 else None
    expected = pinned or declared
    if expected is None or path.suffix not in (".safetensors", ".bin"):
        return
    found = _digest_of(path)
    if found != expected:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise InputError(
            f"{path.name}: sha256 is {found}, not {expected}; it was removed from the cache, fetch it again"
        )

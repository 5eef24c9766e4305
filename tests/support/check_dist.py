"""Check a source distribution and a wheel before they are given to others; `make dist` runs it.

Run `python tests/support/check_dist.py dist`. It prints one line per problem and exits with 1, or prints the sizes.
"""

import email.message
import hashlib
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 5_000_000
# packages of Jupyter, which the command line and the library do not need
NOTEBOOK_PACKAGES = {
    "ipykernel",
    "ipython",
    "ipywidgets",
    "jupyterlab",
    "nbclient",
    "nbconvert",
    "papermill",
    "traitlets",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def list_walkthrough() -> dict[str, str]:
    """Path in the wheel -> SHA-256 of the checkout's file."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["esm2kit"]["walkthrough"]
    paths = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {f"esm2kit/walkthrough/{path.relative_to(ROOT).as_posix()}": digest(path.read_bytes()) for path in paths}


def list_package() -> dict[str, str]:
    """Path in the wheel -> SHA-256 of every file of the package."""
    paths = [path for path in (ROOT / "esm2kit").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): digest(path.read_bytes()) for path in paths}


def check_metadata(metadata: email.message.Message) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {
        "Name": "esm2kit", "Version": project["version"], "License-Expression": "MIT", "License-File": "LICENSE",
        "Requires-Python": project["requires-python"], "Summary": project["description"],
        "Description-Content-Type": "text/markdown",
    }  # fmt: skip
    found = [f"METADATA: {key} is {metadata[key]!r} instead of {value!r}" for key, value in expected.items()
             if metadata[key] != value]  # fmt: skip
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    if urls != project["urls"]:
        found.append(f"METADATA: the urls are {urls}")
    if set(metadata.get_all("Provides-Extra", [])) != set(project["optional-dependencies"]):
        found.append(f"METADATA: the extras are {metadata.get_all('Provides-Extra')}")
    base = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    needless = [line for line in base if line.split(">")[0].split("[")[0] in NOTEBOOK_PACKAGES]
    if needless:
        found.append(f"METADATA: the base installation requires {needless}")
    if "# esm2kit" not in metadata.get_payload():
        found.append("METADATA: the README is missing")
    return found


def check_wheel(path: Path) -> list[str]:
    found = []
    with zipfile.ZipFile(path) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    info = next(name.split("/")[0] for name in packed if ".dist-info/" in name)
    found += check_metadata(email.message_from_bytes(packed[f"{info}/METADATA"]))
    if b"esm2kit = esm2kit.cli.main:main" not in packed.get(f"{info}/entry_points.txt", b""):
        found.append("entry_points.txt lacks the command esm2kit")
    if not any(name.startswith(f"{info}/licenses/") and b"MIT" in data for name, data in packed.items()):
        found.append("the licence is missing")
    expected = list_package() | list_walkthrough()
    content = {name: digest(data) for name, data in packed.items() if ".dist-info/" not in name}
    found += [f"{name} is missing" for name in sorted(expected.keys() - content.keys())]
    found += [f"{name} should not be there" for name in sorted(content.keys() - expected.keys())]
    found += [
        f"{name} differs from the checkout"
        for name in sorted(expected)
        if content.get(name, expected[name]) != expected[name]
    ]
    for name, data in packed.items():
        if name.endswith(".ipynb") and any(cell.get("outputs") for cell in json.loads(data)["cells"]):
            found.append(f"{name} has outputs: run `nbstripout` on it")
    return found


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {name.replace("esm2kit/walkthrough/", "") for name in list_package() | list_walkthrough()}
    needed |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"}
    return [f"{name} is missing" for name in sorted(needed - names)]


def check_dist(folder: Path) -> list[str]:
    """Check the one wheel and the one source distribution in a folder; return the problems."""
    found = []
    for pattern, check in (("*.whl", check_wheel), ("*.tar.gz", check_sdist)):
        paths = list(Path(folder).glob(pattern))
        if len(paths) != 1:
            return [f"{folder} holds {len(paths)} files {pattern} instead of one"]
        found += [f"{paths[0].name}: {problem}" for problem in check(paths[0])]
        if paths[0].stat().st_size > MAX_BYTES:
            found.append(f"{paths[0].name}: {paths[0].stat().st_size:,} bytes, the maximum is {MAX_BYTES:,}")
    if find_spec("twine"):
        command = [sys.executable, "-m", "twine", "check", "--strict", *Path(folder).glob("esm2kit-*")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found += [done.stdout] if done.returncode else []
    return found


if __name__ == "__main__":
    problems = check_dist(Path(sys.argv[1]))
    print("\n".join(problems) or "\n".join(f"{p}: {p.stat().st_size:,} bytes" for p in Path(sys.argv[1]).iterdir()))
    sys.exit(bool(problems))

"""esm2kit on systems without POSIX: nothing imports POSIX modules unguarded, and stages run without POSIX calls."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.core import files, hardware, processes
from esm2kit.core.hardware import resolve_device
from esm2kit.core.paths import portable_name
from esm2kit.embedding.embed import EmbedConfig, embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.notebook.runs.manifest import Artefact

POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "crypt", "syslog", "readline", "curses"}
# attributes that Windows lacks; each use needs a guard in the same file
POSIX_CALLS = {
    "os": "fork forkpty killpg getpgid setsid getuid geteuid getgid chown mkfifo uname statvfs pread preadv pwrite "
    "pwritev fdatasync sched_getaffinity sched_setaffinity nice wait waitid posix_fallocate posix_fadvise sync "
    "fchmod getloadavg sysconf O_NONBLOCK O_CLOEXEC O_DIRECTORY",
    "signal": "SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGALRM SIGQUIT SIGPIPE SIGCHLD alarm pause pthread_sigmask setitimer",
}
NAMES = {f"{module}.{name}" for module, names in POSIX_CALLS.items() for name in names.split()}

# run as a stranger's system would: esm2kit cannot import POSIX's modules, and the calls that it could find are gone
WITHOUT_POSIX = """
import builtins, os, signal, sys
import filelock, lightning, multiprocessing.util, sklearn.linear_model, torch, torch.distributed.elastic, matplotlib
original = builtins.__import__
def load(name, globals=None, *arguments, **named):
    if name.partition(".")[0] in {modules} and str((globals or {{}}).get("__name__", "")).startswith("esm2kit"):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return original(name, globals, *arguments, **named)
builtins.__import__ = load
for name in {names}:
    module, _, attribute = name.partition(".")
    if hasattr(sys.modules[module], attribute):
        delattr(sys.modules[module], attribute)
"""
# Python's own subprocess and multiprocessing modules use these on Linux
NEEDED_BY_PYTHON = {"os.fork", "os.waitid", "os.setsid", "os.O_CLOEXEC", "os.getuid", "os.geteuid", "signal.SIGKILL"}
NEEDED_BY_PYTHON |= {"os.O_NONBLOCK", "os.O_DIRECTORY", "os.uname", "os.fchmod", "signal.pthread_sigmask", "os.getgid"}
NEEDED_BY_PYTHON |= {"os.sysconf", "os.statvfs", "signal.SIGCHLD"}
PREPARE = WITHOUT_POSIX.format(modules=POSIX_MODULES, names=sorted(NAMES - NEEDED_BY_PYTHON))


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((root / "esm2kit").rglob("*.py"))}


def name_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ""), node


def test_modules_of_posix_are_not_imported_at_the_top(sources: dict[Path, ast.Module]) -> None:
    """`resource` is the exception: inside a function, for systems without /proc."""
    found = []
    for path, tree in sources.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name, node in tree.body) for name in names if name in POSIX_MODULES]
    assert found == [("hardware.py", "resource", False)]


def test_calls_of_posix_are_guarded(sources: dict[Path, ast.Module]) -> None:
    unguarded, used = [], set()
    for path, tree in sources.items():
        for node in ast.walk(tree):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name in NAMES:
                module, _, attribute = name.partition(".")
                guards = (f"hasattr({module}, '{attribute}')", "hasattr(os, 'killpg')")
                used.add(name)
                if not any(guard in ast.unparse(tree) for guard in guards):
                    unguarded.append(f"{path.name}:{node.lineno}: {name}")
    assert not unguarded
    assert used == {
        "os.pread",
        "os.preadv",
        "os.pwrite",
        "os.killpg",
        "os.sched_getaffinity",
        "os.sysconf",
        "signal.SIGKILL",
    }


def test_text_files_are_utf8_on_every_system(sources: dict[Path, ast.Module]) -> None:
    """Python's default encoding is an old code page on Windows."""
    unnamed = []
    for path, tree in sources.items():
        for name, call in name_calls(tree):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            if name == "open" and isinstance(call.func, ast.Name):
                mode = ast.unparse(keywords.get("mode") or (call.args[1] if len(call.args) > 1 else ast.Constant("r")))
                is_text = "b" not in mode
            else:
                is_text = name in ("read_text", "write_text") or (name in ("run", "Popen") and "text" in keywords)
            if is_text and "encoding" not in keywords:
                unnamed.append(f"{path.name}:{call.lineno}")
    assert not unnamed


def run_without_posix(code: str, folder: Path, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", PREPARE + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_can_be_imported_without_posix(root: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, esm2kit
names = [module.name for module in pkgutil.walk_packages(esm2kit.__path__, "esm2kit.")]
for name in names:
    if name not in ("esm2kit.__main__", "esm2kit.core.torchrun"):
        importlib.import_module(name)
print(len(names))
"""
    number = int(run_without_posix(code, tmp_path))
    assert number >= len(list((root / "esm2kit").rglob("*.py"))) - 20


def test_the_simulation_is_one(tmp_path: Path) -> None:
    """A module of esm2kit's name that uses POSIX fails in it, so that the tests that use it can fail."""
    code = """
import types
for text in ("import fcntl", "import os; os.killpg", "import os; os.pread"):
    try:
        exec(text, {"__name__": "esm2kit.new"})
    except (ImportError, AttributeError) as error:
        print(type(error).__name__)
"""
    assert run_without_posix(code, tmp_path).split() == ["ModuleNotFoundError", "AttributeError", "AttributeError"]


def test_stages_give_the_same_results_without_posix(tmp_path: Path) -> None:
    """Vectors and datasets are equal to those of this system, byte for byte where files hold no time."""
    model = write_tiny_model(tmp_path / "model.safetensors")
    (tmp_path / "my.fasta").write_text("".join(f">p{i}\nMKTAYIAKQR{'ACDEFGHIKL'[i]}\n" for i in range(10)))
    code = """
import sys
from esm2kit.cli.main import main
out, model = sys.argv[1:]
assert main(["embed", "my.fasta", "--model", model, "--out_dir", out, "--per_residue", "true", "--workers", "2"]) == 0
assert main(["embed", "my.fasta", "--model", model, "--out_dir", out, "--per_residue", "true", "--workers", "2"]) == 0
assert main(["check", out]) == 0
assert main(["preprocess", "my.fasta", "--out_dir", out + "_data", "--val_size", "0.2"]) == 0
"""
    run_without_posix(code, tmp_path, "other", model)
    subprocess.run([sys.executable, "-c", code, "this", model], cwd=tmp_path, check=True, capture_output=True)
    with (
        EmbeddingReader(tmp_path / "this" / "my_embeddings.h5") as this,
        EmbeddingReader(tmp_path / "other" / "my_embeddings.h5") as other,
    ):
        assert (this.matrix() == other.matrix()).all()
    for name in ("train.arrow", "valid.arrow"):
        assert (tmp_path / "this_data" / name).read_bytes() == (tmp_path / "other_data" / name).read_bytes()


def test_reads_and_writes_at_a_position_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "pwrite")
    handle = os.open(tmp_path / "file", os.O_RDWR | files.BINARY)
    buffer = bytearray(4)
    assert files.read_at(handle, 3, 7) == bytes([7, 8, 9])
    assert files.read_at(handle, 3, 99) == bytes([99])
    assert files.read_into(handle, memoryview(buffer), 50) == 4
    assert buffer == bytes([50, 51, 52, 53])
    assert files.read_into(handle, memoryview(buffer), 98) == 2
    assert buffer == bytes([98, 99, 52, 53])
    assert files.write_at(handle, memoryview(b"abc"), 20) == 3
    assert files.read_at(handle, 5, 19) == b"\x13abc\x17"
    os.close(handle)


def test_what_windows_and_macos_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.check_platform(2)
    with refused("device.unknown", requested="xpu"):
        resolve_device("xpu")
    monkeypatch.setattr(sys, "platform", "win32")
    processes.check_platform(1)
    with refused("platform.devices", found=2):
        processes.check_platform(2)


def test_memory_use_on_windows_is_read_from_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure is the one of psapi.h: 72 bytes, the peak at byte 8, the current size at byte 16."""

    class Kernel:
        def K32GetProcessMemoryInfo(self, process: object, memory: object, size: int) -> int:
            assert size == 72
            structure = memory._obj
            structure.peak, structure.current = 3_000_000_000, 2_000_000_000
            assert bytes(structure)[8:16] == (3_000_000_000).to_bytes(8, "little")
            assert bytes(structure)[16:24] == (2_000_000_000).to_bytes(8, "little")
            return 1

    monkeypatch.setattr(hardware.ctypes, "WinDLL", lambda name: Kernel(), raising=False)
    assert hardware._read_windows_memory(peak=False) == 2_000_000_000
    assert hardware._read_windows_memory(peak=True) == 3_000_000_000


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my.liver", "my.liver"),
        ("pdb:1abc|A", "pdb-1abc-A"),
        ('a<b>c"d?e*f/g\\h', "a-b-c-d-e-f-g-h"),
        ("con", "_con"),
        ("Con.fasta", "_Con.fasta"),
        ("LPT1", "_LPT1"),
        ("console", "console"),
        ("com12", "com12"),
        ("ends. ", "ends"),
        (".", "-"),
        ("tab\tnew\n", "tab-new-"),
        ("Größe", "Größe"),
    ],
)
def test_names_from_the_input_are_valid_on_every_system(text: str, name: str) -> None:
    assert portable_name(text) == name
    assert portable_name(name) == name


def test_outputs_have_portable_names_and_their_ids_stay(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.safetensors")
    fasta = tmp_path / "pdb:1abc|A.fasta"
    fasta.write_text(">con\nMKV\n>a:b|c?\nLAG\n")
    made = embed(EmbedConfig(fasta, out_dir=tmp_path / "out", model=str(model), device="cpu"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pdb-1abc-A_embeddings.h5"]
    with EmbeddingReader(made.embeddings) as reader:
        assert list(reader) == ["con", "a:b|c?"]
    other = tmp_path / "pdb-1abc-A.fasta"  # another input with the same name of outputs
    other.write_text(">x\nMKVL\n")
    with refused("embed.file-exists"):
        embed(EmbedConfig(other, out_dir=tmp_path / "out", model=str(model), device="cpu"))


def test_inputs_whose_names_differ_in_case_do_not_replace_each_other(tmp_path: Path) -> None:
    """On a file system that ignores the case, both names open the same output; a link has this effect here."""
    model = write_tiny_model(tmp_path / "model.safetensors")
    (tmp_path / "My.fasta").write_text(">a\nMKV\n")
    (tmp_path / "my.fasta").write_text(">a\nLAG\n")
    one, other = (
        EmbedConfig(tmp_path / name, model=str(model), device="cpu", out_dir=tmp_path)
        for name in ("My.fasta", "my.fasta")
    )
    first = embed(one).embeddings
    os.link(first, tmp_path / "my_embeddings.h5")
    before = first.read_bytes()
    with refused("embed.file-exists"):
        embed(other)
    assert first.read_bytes() == before
    with refused("benchmark.same-name", tasks=["a/GB1", "b/gb1"]):
        benchmark(BenchmarkConfig(tasks="a/GB1,b/gb1", model=str(model), out_dir=tmp_path / "report"))


def test_links_of_a_run_made_on_windows_are_links() -> None:
    made = Artefact(r"C:\lab\papermill_runs\sample-1\artefacts\gb1\report.html")
    assert made.path_within("sample-1") == "artefacts/gb1/report.html"
    assert Artefact("/lab/papermill_runs/sample-1/a/b.html").path_within("sample-1") == "a/b.html"

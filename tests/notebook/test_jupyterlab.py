"""The notebooks in JupyterLab in a real browser: mouse, keyboard, errors, the Stop button.

Screenshots of every step are saved in papermill_runs/screenshots. If the environment sets
ESM2KIT_WALKED=RUN/artefacts, they show the model of that run instead of one trained here in seconds, like the
screenshot in the README.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import requests

from esm2kit.models.checkpoint import read_metadata
from esm2kit.notebook.runs.pages import render_notebook_page, write_runs_page
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.pretraining.pretrain import PretrainConfig, pretrain

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the dev dependencies: make test")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
SCREENSHOTS = ROOT / "papermill_runs" / "screenshots"
SECONDS = 150

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
UNVALIDATED = "02_without_validation"  # notebook 02, whose first validation is far away
WALKED = os.environ.get("ESM2KIT_WALKED")
# parameters that replace the defaults, so that the notebooks take seconds instead of minutes
SMALL = {
    "02_pretrain": {
        "max_steps": 1_000_000, "num_layers": 1, "embed_dim": 16, "attention_heads": 4, "val_check_interval": 40,
        "warmup_steps": 5,
    },
    "03_embed": {"projection": "pca"},
    "04_benchmark": {"others": ""} if WALKED else {"limit": 20, "seeds": 1, "resamples": 100, "others": ""},
}  # fmt: skip
SMALL[UNVALIDATED] = SMALL["02_pretrain"] | {"val_check_interval": 1_000_000, "work_dir": "../unvalidated"}
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/themes": {"adaptive-theme": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy with a dataset, a checkpoint, and the notebooks with small parameters."""
    root = tmp_path_factory.mktemp("clone")
    (root / "data").symlink_to(ROOT / "data")
    (root / "papermill_runs").mkdir()
    shutil.copy(ROOT / "papermill_runs" / "sample.yaml", root / "papermill_runs")
    (root / "notebooks").mkdir()
    sources = {path.stem: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    for stem, path in (sources | {UNVALIDATED: sources["02_pretrain"]}).items():
        notebook = nbformat.read(path, as_version=4)
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        for name, value in SMALL.get(stem, {}).items():
            lines = cell.source.splitlines()
            place = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
            lines[place] = f"{lines[place].split('=')[0]}= {value!r}  # for the test"
            cell.source = "\n".join(lines)
        nbformat.write(notebook, root / "notebooks" / f"{stem}.ipynb")
    sample, work = ROOT / "data" / "sample", root / "work"
    if WALKED:
        for folder in ("dataset", "pretrain"):
            shutil.copytree(Path(WALKED) / folder, work / folder)
        return root
    made = PreprocessConfig(
        train_fasta=sample / "uniref50_train_filt.fasta",
        sampler_fasta=sample / "ur90_ur50_sampler.fasta",
        mapping=sample / "mapping.tsv",
        valid_fasta=sample / "uniref50_valid.fasta",
        out_dir=work / "dataset",
    )
    preprocess(made)
    shape = {"model": "custom", "num_layers": 1, "embed_dim": 16, "attention_heads": 4}
    batch = {"max_steps": 2, "warmup_steps": 1, "val_check_interval": 2, "global_batch_size": 2}
    pretrain(PretrainConfig(data=work / "dataset", out_dir=work / "pretrain", accelerator="cpu", **shape, **batch))
    return root


@pytest.fixture(scope="module")
def lab(clone: Path) -> Iterator[str]:
    """A JupyterLab server for that copy; yields its address."""
    for name, settings in SETTINGS.items():
        path = clone / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
               "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}  # fmt: skip
    environment = os.environ | {name: str(clone / folder) for name, folder in folders.items()}
    environment.pop("ESM2KIT_HEADLESS", None)
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(clone / "hub")}  # `auto` is the model trained here
    environment["PYTHONSTARTUP"] = str(ROOT / "docs" / "kernel_start.py")  # as `make lab` does
    arguments = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                 "--IdentityProvider.token=", f"--ServerApp.root_dir={clone}"]  # fmt: skip
    with open(clone / "lab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{address}/api/status", timeout=5).ok:
                    break
            assert server.poll() is None, (clone / "lab.log").read_text()[-2000:]
            time.sleep(0.5)
        yield address
    finally:
        for kernel in requests.get(f"{address}/api/kernels", timeout=10).json():
            requests.delete(f"{address}/api/kernels/{kernel['id']}", timeout=30)
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


class Lab:
    """A notebook that is open in JupyterLab, and the actions of a user.

    Args:
        page: page of the browser.
        name: name of the notebook.
    """

    def __init__(self, page: Any, name: str) -> None:
        self.page, self.name, self.shots = page, name, 0
        path = ROOT / "notebooks" / f"{'02_pretrain' if name == UNVALIDATED else name}.ipynb"
        self.sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]

    def cell(self, containing: str) -> Any:
        """First cell whose source contains the text; the page may not render all of an editor that is out of view."""
        place = next(number for number, source in enumerate(self.sources) if containing in source)
        return self.page.locator(".jp-Notebook .jp-Cell").nth(place)

    def menu(self, item: str, menu: str = "Run") -> None:
        """Choose an item of a menu."""
        self.page.locator(".lm-MenuBar-item", has_text=menu).first.click()
        self.page.locator(".lm-Menu-item", has_text=item).first.click()

    def select(self, containing: str) -> None:
        """Select a cell by clicking its prompt, without entering it."""
        self.cell(containing).locator(".jp-InputPrompt").first.click()

    def run_from(self, containing: str) -> None:
        self.select(containing)
        self.menu("Run Selected Cell and All Below")

    def wait(self, containing: str) -> None:
        """Wait until a cell has been executed."""
        prompt = self.cell(containing).locator(".jp-InputPrompt").first
        sync_api.expect(prompt).to_have_text(NUMBERED, timeout=SECONDS * 1000)

    def output(self, containing: str) -> Any:
        return self.cell(containing).locator(".jp-OutputArea-output")

    def shot(self, what: str, at: str | None = None) -> None:
        """Save a screenshot, scrolled to a cell."""
        if at is not None:
            self.cell(at).scroll_into_view_if_needed()
            self.page.wait_for_timeout(300)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.shots += 1
        self.page.screenshot(path=SCREENSHOTS / f"{self.name}-{self.shots}-{what}.png")


NUMBERED = re.compile(r"\[\d+\]:")


@contextlib.contextmanager
def opened(browser: Any, lab: str, name: str, theme: str = "light") -> Iterator[Lab]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=theme)
    page.set_default_timeout(60_000)
    try:
        page.goto(f"{lab}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        dialog_button = page.locator(".jp-Dialog").get_by_role("button", name="Select", exact=True)
        # if the kernel starts slowly, JupyterLab asks which one to use
        page.add_locator_handler(dialog_button, lambda button: button.click())
        page.locator("#jp-bottom-panel, .jp-StatusBar-Item").get_by_text("| Idle").first.wait_for()
        yield Lab(page, name)
    finally:
        with contextlib.suppress(Exception):
            page.screenshot(path=SCREENSHOTS / f"{name}-last.png")
        page.close()


def expect_text(locator: Any, text: str | re.Pattern[str]) -> None:
    sync_api.expect(locator.filter(has_text=text).first).to_be_visible(timeout=SECONDS * 1000)


# without ESM2KIT_WALKED the notebook uses 20 proteins per set
TRAINED = {
    task: re.compile(rf"{task}: trained on {'[0-9]+' if WALKED else '20'} proteins")
    for task in ("secondary_structure_pdb", "helix_content_pdb", "domain_of_life")
}


def test_the_task_changes_by_mouse_and_by_keyboard(browser: Any, lab: str, clone: Path) -> None:
    with opened(browser, lab, "04_benchmark") as notebook:
        notebook.menu("Run All Cells")
        notebook.wait("TaskChoice.of(name")  # the last cell whose code is not folded
        expect_text(notebook.output("report = score("), TRAINED["secondary_structure_pdb"])
        notebook.shot("all-run", "score_chart(report)")

        # mouse: click a task in the list
        tasks = notebook.output("task_choice = ").get_by_label("Task")
        tasks.locator("option", has_text="helix_content_pdb").click()
        expect_text(notebook.output("task_choice = "), "a value")
        notebook.shot("mouse", "task_choice = ")
        notebook.run_from("def score(")
        expect_text(notebook.output("report = score("), TRAINED["helix_content_pdb"])
        notebook.wait("TaskChoice.of(name")  # the last cell whose code is not folded
        notebook.shot("mouse-result", "score_chart(report)")

        # keyboard: arrow up from helix_content_pdb to domain_of_life
        tasks.focus()
        notebook.page.keyboard.press("ArrowUp")
        expect_text(notebook.output("task_choice = "), "3 classes per protein")
        notebook.run_from("def score(")
        expect_text(notebook.output("report = score("), TRAINED["domain_of_life"])
        notebook.wait("TaskChoice.of(name")  # the last cell whose code is not folded
        notebook.shot("keyboard-result", "score_chart(report)")

        # a random split of FLIP has an orange traffic light
        tasks.locator("option", has_text="gb1").click()
        notebook.output("task_choice = ").get_by_label("Split").select_option(
            label="sampled (orange, 1,745 test proteins)"
        )
        expect_text(notebook.output("task_choice = "), "orange: overestimates")
        notebook.shot("traffic-light", "task_choice = ")

        # save the choices as a tier
        tasks.locator("option", has_text="domain_of_life").click()
        panel = notebook.output('Export("04_benchmark"')
        panel.get_by_label("Save choices as").fill("clicked")
        panel.get_by_role("button", name="Save").click()
        expect_text(panel, "esm2kit run --tier clicked")
        assert "task: domain_of_life" in (clone / "papermill_runs" / "clicked.yaml").read_text()
        notebook.shot("saved", 'Export("04_benchmark"')


def test_an_invalid_layout_is_shown_in_the_widget_and_the_next_cell_and_follows_the_size(
    browser: Any, lab: str
) -> None:
    with opened(browser, lab, "02_pretrain") as notebook:
        notebook.select("chosen = layout.value")
        notebook.menu("Run All Above Selected Cell")
        notebook.wait("layout = ")
        expect_text(notebook.output("layout = "), "global_batch_size 16 = micro_batch_size 8")
        field = notebook.output("layout = ").get_by_label("Accumulate")
        field.click(click_count=3)
        notebook.page.keyboard.type("3")
        notebook.page.keyboard.press("Tab")
        expect_text(notebook.output("layout = "), "Cannot be used: global_batch_size 16 was requested")
        notebook.select("chosen = layout.value")
        notebook.menu("Run Selected Cell")
        expect_text(notebook.output("chosen = layout.value"), "InputError: global_batch_size 16 was requested")
        assert "Traceback" not in notebook.output("chosen = layout.value").first.inner_text()
        notebook.shot("layout-error", "layout = ")
        # arrow down to a valid number: the error disappears
        field.click()
        notebook.page.keyboard.press("ArrowDown")
        notebook.page.keyboard.press("Tab")
        expect_text(notebook.output("layout = "), "micro_batch_size 8 x accumulate_grad_batches 2")
        assert notebook.output("layout = ").get_by_role("alert").count() == 0

        # five tensor-parallel devices: not valid for the custom model's 4 heads, valid for the published model's 20
        layout, size = notebook.output("layout = "), notebook.output("size = size_picker(")
        for label in ("Devices", "Tensor parallel"):
            layout.get_by_label(label).fill("5")
            notebook.page.keyboard.press("Tab")
        expect_text(layout, "Cannot be used: attention_heads 4 is not divisible by tensor_model_parallel_size 5")
        notebook.shot("heads-error", "layout = ")
        size.get_by_label("Model").focus()
        notebook.page.keyboard.press("ArrowDown")
        expect_text(size, "6 layers × 320, 20 heads of 16 channels")
        sync_api.expect(layout.get_by_role("alert")).to_have_count(0, timeout=SECONDS * 1000)
        assert size.get_by_label("Width").is_disabled()
        notebook.shot("size", "size = size_picker(")
        notebook.select("chosen = layout.value")
        notebook.menu("Run Selected Cell")
        expect_text(notebook.output("chosen = layout.value"), "7.51 million parameters")


def test_after_a_restart_a_middle_cell_names_the_cell_to_run_first(browser: Any, lab: str) -> None:
    with opened(browser, lab, "02_pretrain") as notebook:
        notebook.select("chosen = layout.value")
        notebook.menu("Run All Above Selected Cell")
        notebook.wait("layout = ")
        notebook.menu("Restart Kernel…", "Kernel")
        notebook.page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()
        notebook.page.locator("#jp-bottom-panel, .jp-StatusBar-Item").get_by_text("| Idle").first.wait_for()
        notebook.select("chosen = layout.value")
        notebook.menu("Run Selected Cell")
        output = notebook.output("chosen = layout.value")
        expect_text(output, "'size' is defined in code cell 3 (`size = size_picker(")
        assert "Traceback" not in output.first.inner_text()
        notebook.shot("restarted", "chosen = layout.value")
        notebook.menu("Run All Above Selected Cell")
        notebook.wait("layout = ")
        notebook.select("chosen = layout.value")
        notebook.menu("Run Selected Cell")
        expect_text(output, "million parameters")


def test_the_stop_button_ends_training_with_a_checkpoint(browser: Any, lab: str, clone: Path) -> None:
    shutil.rmtree(clone / "work" / "pretrain")
    with opened(browser, lab, "02_pretrain", theme="dark") as notebook:
        notebook.menu("Run All Cells")
        view = notebook.output("result = live.train")
        sync_api.expect(view.locator("circle").nth(3)).to_be_visible(timeout=SECONDS * 1000)
        before = view.locator("svg").first.get_attribute("aria-label")
        notebook.shot("training", "result = live.train")
        sync_api.expect(view.locator("svg").first).not_to_have_attribute("aria-label", before, timeout=30_000)
        view.get_by_role("button", name="Stop and save").click()
        notebook.wait("result = live.train")
        # a static picture replaces the widget, so that a saved notebook retains it
        assert view.locator("svg").count() == 4
        assert view.get_by_role("button").count() == 0
        notebook.shot("stopped", "result = live.train")
        expect_text(notebook.output('record("02_pretrain"'), "run the training cell again")
    step = json.loads((clone / "work" / "pretrain" / "pretrain.json").read_text())["step"]
    assert 0 < step < SMALL["02_pretrain"]["max_steps"]
    assert read_metadata(clone / "work" / "pretrain" / "checkpoints" / "last.safetensors")["step"] == step


def test_stop_while_training_starts_and_before_the_first_validation(browser: Any, lab: str, clone: Path) -> None:
    """The two moments without a score: each is one line that says what to do, and the next try goes on."""
    (clone / "unvalidated").mkdir()
    (clone / "unvalidated" / "dataset").symlink_to(clone / "work" / "dataset")
    with opened(browser, lab, UNVALIDATED) as notebook:
        notebook.menu("Run All Cells")
        training = notebook.output("result = live.train")
        training.get_by_role("button", name="Stop and save").click(timeout=SECONDS * 1000)
        expect_text(training, "InputError: training was stopped before its first update or after its last one.")
        assert "Traceback" not in "".join(training.all_inner_texts())
        notebook.shot("stopped-at-start", "result = live.train")

        notebook.select("result = live.train")
        notebook.menu("Run Selected Cell and All Below")
        curve = training.locator("svg").first
        sync_api.expect(curve).to_have_attribute("aria-label", re.compile(r"^training loss \d"), timeout=SECONDS * 1000)

        # the kernel is busy: the card of a widget follows its control all the same
        layout = notebook.output("layout = ")
        layout.get_by_label("Accumulate").fill("4")
        notebook.page.keyboard.press("Tab")
        expect_text(layout, "micro_batch_size 4 x accumulate_grad_batches 4")
        expect_text(layout, "Run the cells below.")
        assert training.get_by_role("button", name="Stop and save").is_visible(), "the kernel was not busy"
        notebook.shot("changed-while-busy", "layout = ")

        training.get_by_role("button", name="Stop and save").click()
        expect_text(
            training, re.compile("training stopped at update [0-9,]+ of 1,000,000, before its first validation")
        )
        assert "Traceback" not in "".join(training.all_inner_texts())
        notebook.shot("stopped-unvalidated", "result = live.train")
    assert json.loads((clone / "unvalidated" / "pretrain" / "pretrain.json").read_text())["val_perplexity"] is None


def test_the_pictures_of_notebook_03_follow_its_widgets(browser: Any, lab: str) -> None:
    def picture(containing: str) -> Any:
        return notebook.output(containing).locator(".figure").first

    def expect_caption(containing: str, text: str) -> None:
        expect_text(notebook.output(containing), text)

    with opened(browser, lab, "03_embed", theme="dark") as notebook:
        notebook.menu("Run All Cells")
        expect_caption("def draw_pairs", "Residue pairs of A0A022Q764")
        expect_text(notebook.output('record("03_embed"'), "embeddings")
        expect_caption("def draw_map", "450 proteins by PCA, coloured by domain of life.")
        notebook.shot("all-run", "map_choice = map_picker")
        text = picture("def draw_map").locator("text").first
        colour = text.evaluate("label => getComputedStyle(label).fill")
        assert colour == "rgb(255, 255, 255)", "text of a figure has the colour of the theme"

        # another colour: the map, the neighbours and the comparison follow
        before = picture("def draw_map").get_attribute("id")
        choice = notebook.output("map_choice = map_picker")
        choice.get_by_label("Colour by").select_option(label="residues: length in residues (all proteins)")
        expect_caption("def draw_map", "450 proteins by PCA, coloured by length in residues.")
        sync_api.expect(picture("def draw_map")).not_to_have_attribute("id", before)
        expect_caption("def draw_neighbours", "(the star; length in residues: 248)")
        expect_caption("def draw_agreement", "is on the same side of the median length in residues")
        notebook.shot("colour", "map_choice = map_picker")

        # another method
        choice.get_by_label("Projection").select_option(label="t-SNE")
        expect_caption("def draw_map", "450 proteins by t-SNE")
        notebook.shot("tsne", "def draw_map")

        # another protein: its neighbours, residues and pairs follow; an unknown one is explained in their place
        field = notebook.output("protein_choice = protein_picker").get_by_label("Protein")
        field.fill("A0A022WJ58")
        notebook.page.keyboard.press("Enter")
        for cell in ("def draw_neighbours", "def draw_residues", "def draw_pairs"):
            expect_caption(cell, "A0A022WJ58")
        field.fill("nobody")
        notebook.page.keyboard.press("Enter")
        expect_text(notebook.output("def draw_pairs"), "Cannot be used: protein 'nobody' is not among the 450")
        assert notebook.output("def draw_pairs").locator(".figure").count() == 0, (
            "the picture of another protein is left"
        )

        # what is not drawn again is marked
        files = notebook.output("file_choice = file_picker")
        files.get_by_label("FASTA file").fill("../data/sample/uniref50_valid.fasta")
        notebook.page.keyboard.press("Enter")
        expect_text(files, "Changed: what is below still shows the earlier choice. Run the cells below.")
        notebook.shot("stale", "file_choice = file_picker")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_overview_of_runs_sorts_by_keyboard_and_needs_no_network(browser: Any, tmp_path: Path, theme: str) -> None:
    for name, loss, seconds in (("a-20260101-000000", 2.5, 90.0), ("b-20260102-000000", 3.5, 600.0)):
        report = tmp_path / name / "artefacts" / "report.html"
        report.parent.mkdir(parents=True)
        report.write_text("<p>report</p>")
        entry = {"status": "done", "seconds": seconds, "parameters": {}, "figures": {"loss": loss}}
        entry["made"] = {"report": {"path": str(report)}}
        manifest = {"tier": name[0], "created": f"2026-01-0{1 + (name[0] == 'b')}T00:00:00", "git_commit": "0" * 40}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest | {"notebooks": {"02_pretrain": entry}}))
    page = browser.new_page(color_scheme=theme)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(write_runs_page(tmp_path).as_uri())
    first = page.locator("tbody").first.locator("tr td:first-child")
    assert first.all_inner_texts() == ["b-20260102-000000", "a-20260101-000000"]
    for _ in range(7):  # newest run, table, Run, Settings, Status, Started, Minutes
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert first.all_inner_texts() == ["a-20260101-000000", "b-20260102-000000"], "1.5 minutes come before 10"
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Minutes")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"runs-{theme}.png")
    background, ink = page.evaluate("[getComputedStyle(document.documentElement), getComputedStyle(document.body)]"
                                    ".map((style, at) => at ? style.color : style.colorScheme)")  # fmt: skip
    assert background == "light dark"
    assert ink == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[theme]
    assert all(url.startswith("file:") for url in requested)
    page.get_by_role("link", name="report").first.click()
    assert page.inner_text("body") == "report"
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_of_an_executed_notebook_needs_no_network_and_has_both_themes(
    browser: Any, tmp_path: Path, theme: str
) -> None:
    cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell("print(1)  # one")]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "made.ipynb")
    (tmp_path / "made.html").write_text(render_notebook_page(tmp_path / "made.ipynb"))
    page = browser.new_page(color_scheme=theme)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto((tmp_path / "made.html").as_uri())
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert (paper, ink) == {
        "light": ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0.87)"), "dark": ("rgb(17, 17, 17)", "rgb(255, 255, 255)"),
    }[theme]  # fmt: skip
    assert requested == [(tmp_path / "made.html").as_uri()]
    page.close()

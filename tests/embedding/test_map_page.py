"""The page of a map: its data, and in a browser its points, its search and its legend."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2kit.embedding import map_page
from esm2kit.embedding.map_page import write_map_page
from esm2kit.embedding.maps import NOT_GIVEN, Projection
from esm2kit.plots import MUTED
from esm2kit.sequences.fasta import Record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><b>x</b> & 'y'"
RECORDS = [
    Record("sp|P1|A", f"sp|P1|A Kinase {HOSTILE} OS=Homo sapiens GN=ABC", "MKV"),
    Record("P2", "P2 Protease OS=Mus musculus", "MKVL"),
    Record("P3", "P3", "MKVLA"),
    Record("P4", "P4 Kinase two", "M"),
]
XY = np.array([[0.0, 0.0], [10.0, 5.0], [5.0, 2.5], [10.0, 0.0]])
PROJECTED = Projection(XY, ("component 1", "component 2"), 0.5)


def write(path: Path, values: np.ndarray, field: str = "family", columns: dict | None = None) -> dict[str, Any]:
    write_map_page(path, PROJECTED, RECORDS, field, values, columns or {}, "4 proteins.")
    return read_data(path)


def read_data(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(text)


def test_the_page_has_what_is_known_of_each_protein_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    columns = {"family": ["a", "b", None, "a"], "Tm": ["40.5", None, "60", "1"]}
    data = write(path, np.array(["a", "b", NOT_GIVEN, "a"]), columns=columns)
    assert data["id"] == ["sp|P1|A", "P2", "P3", "P4"]
    assert data["about"] == [f"Kinase {HOSTILE}", "Protease", "", "Kinase two"]
    assert (data["x"], data["y"]) == ([0, 1, 0.5, 1], [0, 1, 0.5, 0])
    assert dict(zip(data["columns"], data["values"], strict=True)) == {
        "family": ["a", "b", "", "a"],
        "Tm": ["40.5", "", "60", "1"],
        "organism": ["Homo sapiens", "Mus musculus", "", ""],
        "gene": ["ABC", "", "", ""],
        "residues": ["3", "4", "5", "1"],
    }
    assert [data["colours"][place] for place in data["colour"]][2] == MUTED
    assert data["group"] == [0, 1, 2, 0]
    assert data["order"][0] == 2, "grey points are below the others"
    text = path.read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert not re.findall(r"(?:src|href|url|import)\W{1,3}(?:https?:|//)", text)
    again = tmp_path / "again.html"
    write(again, np.array(["a", "b", NOT_GIVEN, "a"]), columns=columns)
    assert again.read_bytes() == path.read_bytes()


def test_numbers_have_a_scale_of_colours(tmp_path: Path) -> None:
    data = write(tmp_path / "map.html", np.array([40.0, 60.0, np.nan, 50.0]), "Tm")
    assert data["colour"] == [0, 63, 64, 32]
    assert data["colours"][64] == MUTED
    assert data["values"][0] == ["40", "60", "", "50"]
    text = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "<span>40</span>" in text
    assert "not given (1)" in text
    equal = write(tmp_path / "equal.html", np.full(4, 7.0), "Tm")
    assert equal["colour"] == [0, 0, 0, 0]


def test_a_page_of_very_many_proteins_shows_a_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_page, "MAX_POINTS", 3)
    data = write(tmp_path / "map.html", np.array(["a", "b", "c", "a"]))
    assert len(data["id"]) == len(data["x"]) == 3
    assert "a random sample of 3 of 4 proteins" in (tmp_path / "map.html").read_text(encoding="utf-8")


@pytest.fixture
def open_page() -> Iterator[Callable[[Path, str], Any]]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_it(path: Path, scheme: str) -> Any:
            page = browser.new_page(viewport={"width": 900, "height": 900}, color_scheme=scheme, has_touch=True)
            page.errors, page.requested = [], []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("request", lambda request: page.requested.append(request.url))
            page.goto(path.as_uri())
            return page

        yield open_it
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(scheme: str, tmp_path: Path, open_page: Callable[[Path, str], Any]) -> None:
    write(tmp_path / "map.html", np.array(["a", "b", "c", "a"]))
    page = open_page(tmp_path / "map.html", scheme)
    area = page.locator("canvas").bounding_box()

    def locate(x: float, y: float) -> tuple[float, float]:
        return area["x"] + 14 + x * (area["width"] - 28), area["y"] + 14 + (1 - y) * (area["height"] - 28)

    tip, card, search = page.locator(".map-tip"), page.locator(".map-card"), page.locator(".map input")
    assert not tip.is_visible()
    page.mouse.move(*locate(0.5, 0.5))
    assert tip.locator("strong").inner_text() == "P3"
    page.mouse.move(*locate(0, 0))
    assert f"Kinase {HOSTILE}" in tip.inner_text()
    assert "Homo sapiens" in tip.inner_text()
    page.mouse.move(*locate(0.25, 0.75))
    assert not tip.is_visible()
    page.touchscreen.tap(*locate(1, 1))
    assert card.locator("strong").inner_text() == "P2"
    search.fill("kinase")
    assert page.locator(".map-found").inner_text() == "2 of 4"
    assert not card.is_visible()
    for expected in ("sp|P1|A", "P4", "sp|P1|A"):
        search.press("Enter")
        assert card.locator("strong").inner_text() == expected
    search.press("Escape")
    assert page.locator(".map-found").inner_text() == ""
    button = page.locator("button[data-group='2']")
    assert button.inner_text() == "c (1)"
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    page.mouse.move(*locate(0.5, 0.5))
    assert not tip.is_visible(), "its group is hidden"
    page.locator(".map-in").click()
    page.mouse.move(*locate(0.5, 0.5))
    button.click()
    page.mouse.move(*locate(0.5, 0.5))
    assert tip.locator("strong").inner_text() == "P3", "the middle stays where it is"
    page.mouse.move(*locate(0, 0))
    assert not tip.is_visible(), "enlarged, so that this point is outside"
    assert page.errors == []
    assert page.requested == [(tmp_path / "map.html").as_uri()]

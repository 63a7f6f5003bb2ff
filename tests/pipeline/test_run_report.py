"""`kava report`: one page that holds all it shows, escapes all it is given, and looks right in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fixtures.command import kava, write_recipe

from kava.pipeline import load_recipe
from kava.pipeline.compare_stage import outdated
from kava.pipeline.report.curves import colours_of, draw_curves, draw_errors, draw_sizes, size_text
from kava.pipeline.report.page import Page, Picture, Table
from kava.pipeline.report.run_report import time_text
from kava.pipeline.run import Run

COMPARE = {"arms": ["none", "kv", "shuffled"], "seeds": [0, 1], "eval_steps": 2}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    path: Path = write_recipe(tmp_path_factory.mktemp("report"), tiny_models, compare=COMPARE)
    kava("run", path)
    kava("compare", path)
    return path


@pytest.fixture(scope="module")
def html(recipe: Path) -> str:
    assert str(recipe.parent / "run/report.html") in kava("report", recipe)
    return (recipe.parent / "run/report.html").read_text()


class Reader(HTMLParser):
    """Tags that are opened and closed in order, what they refer to, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_for_nothing(html: str) -> None:
    found = Reader(html)
    assert len(found.references) == 5
    assert all(
        reference.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,")) for reference in found.references
    )
    assert "script" not in html.lower()
    assert not re.findall(r"url\(|@import|https?:", re.sub(r'src="[^"]*"', "", html))
    for reference in found.references:
        data = b64decode(reference.partition(",")[2])
        if "svg" in reference[:20]:
            tree = ElementTree.fromstring(data)
            links = [v for e in tree.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        else:
            assert data.startswith(b"\x89PNG")


def test_the_page_has_what_is_known(recipe: Path, html: str) -> None:
    text, run = Reader(html).text, recipe.parent / "run"
    summary = json.loads((run / "compare/compare.json").read_text())
    for arm in summary["arms"].values():
        assert f"{arm['metrics']['ce']['mean']:.4f}" in text
    for pair in summary["differences"]:
        assert f"{pair['ce']:+.4f}" in text
    for label in ("extract big", "project big", "compare kv-0", "student kv"):
        assert label in text
    assert json.loads((run / "targets/big.zarr/zarr.json").read_text())["attributes"]["kava"]["fingerprint"] in text
    assert json.loads((run / "compare/kv-0/kava.json").read_text())["key"] in text
    assert "torch" in text
    assert "max_steps: 6" in text


def test_a_comparison_of_another_recipe_says_so(recipe: Path, html: str) -> None:
    summary, told = json.loads((recipe.parent / "run/compare/compare.json").read_text()), "not of the recipe as it is"
    assert told not in html
    kava("report", recipe, "--no-projection", "-s", "train.max_steps=7")
    text = Reader((recipe.parent / "run/report.html").read_text()).text
    assert f"{told} now, but of another train.max_steps;" in text
    for override, changed in (
        ("train.seed=5", []),  # Arms have seeds of their own.
        ("train.eval_steps=1", []),
        ("train.logging_steps=1", []),
        ("compare.eval_steps=1", []),
        ("corpus.heldout.ratio=0.5", ["corpus"]),
        ("student.dtype=bfloat16", ["student"]),
        ("train.teacher=big", []),
        ("compare.seeds=[0]", ["compare.seeds"]),
        ("compare.arms=[none, {kv: {alpha: 3}}, shuffled]", ["compare.arms"]),
        ("compare.arms=[none, kv]", ["compare.arms"]),
        ("compare.arms=[none, kv, shuffled, random]", ["compare.arms"]),
    ):
        assert outdated(Run(load_recipe(recipe, [override])), summary) == changed, override
    run = Run(load_recipe(recipe))
    summary["provenance"]["targets"] = "0" * 32
    assert outdated(run, summary) == ["targets"]
    shutil.move(run.target_path("big"), recipe.parent / "elsewhere")
    try:
        assert outdated(Run(load_recipe(recipe)), summary) == []
    finally:
        shutil.move(recipe.parent / "elsewhere", run.target_path("big"))


def test_what_was_evaluated(recipe: Path) -> None:
    kava("evaluate", recipe, "--max-new-tokens", 2, "--limit", 3)
    kava("evaluate", recipe.parent / "run/compare/kv-0", "--no-generate")
    kava("report", recipe, "--no-projection")
    text = Reader((recipe.parent / "run/report.html").read_text()).text
    for folder in ("students/kv", "compare/kv-0"):
        found = json.loads((recipe.parent / "run" / folder / "evaluate.json").read_text())
        assert f"{folder}, float32" in text
        assert f"{found['ce_per_byte']:.4f}" in text
    assert "0 of 3 (0.000, 95 % 0.000 .. " in text


def test_what_is_not_there_yet_says_what_makes_it(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, tiny_models)
    assert "nothing of this run is made yet" in kava("report", path, code=2)
    kava("run", path, "--until", "extract")
    kava("report", path, "--no-projection")
    text = Reader((tmp_path / "run/report.html").read_text()).text
    for command in ("kava compare", "kava train", "kava evaluate", "kava project --report"):
        assert command in text
    # A map that needs no reference of the student: none is there to measure by.
    kava("run", path, "--until", "project", "-s", "project.heads=random")
    kava("report", path, "-s", "project.heads=random")
    text = Reader((tmp_path / "run/report.html").read_text()).text
    assert "kava project --report measures the projection" in text
    assert "there is no store" not in text


def test_whatever_it_is_given_is_text() -> None:
    evil = '<script>alert("x")</script> & \'"'
    page = Page(evil, evil)
    page.cards([(evil, evil, evil)])
    page.section(evil)
    page.flow([(evil, evil, evil)])
    page.table(Table([evil], [[evil]]))
    page.picture(Picture(b"x", evil))
    page.note(evil)
    page.code(evil, evil)
    html = page.html()
    assert "<script" not in html
    assert Reader(html).text.count(evil) == 15
    assert len(Reader(html).references) == 1


def test_a_picture_is_the_same_again() -> None:
    curves: dict[str, list[dict[str, Any]]] = {
        "none": [{"step": 5, "ce": 5.0, "interval": (4.5, 5.5)}, {"step": 10, "ce": 4.0, "interval": (3.9, 4.1)}],
        "kv": [{"step": 5, "ce": 3.9, "interval": None}, {"step": 10, "ce": 3.0, "interval": None}],
        "empty": [],
    }
    assert draw_curves(curves, "none") == draw_curves(curves, "none")
    errors = {"kv": {"keys": [0.1, 0.2], "values": [0.3, 0.0]}}
    assert draw_errors(errors, "arm") == draw_errors(errors, "arm")
    assert draw_errors({"kv": {"keys": [0.0], "values": [0.0]}}, "arm")
    assert draw_sizes([("extract", 10**9), ("train", 0)])


def test_colours_do_not_depend_on_where_the_baseline_stands() -> None:
    assert colours_of(["none", "kv", "b"], "none") == colours_of(["kv", "none", "b"], "none")
    assert len(set(colours_of([f"a{n}" for n in range(8)], None).values())) == 8


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (7.4, "7 s"), (59.6, "60 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_times(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (340_000_000, "340 MB"), (2 * 10**12, "2.0 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "height"), [(1100, 3600), (420, 5200)], ids=["desk", "phone"])
def test_a_browser_shows_it(recipe: Path, html: str, tmp_path: Path, width: int, height: int) -> None:
    """Headless Chromium without a network: every picture is drawn, nothing sticks out sideways; a screenshot is kept."""
    import numpy as np
    from matplotlib.image import imread

    page, shot = tmp_path / "page.html", tmp_path / f"report-{width}.png"
    # What the browser made of the page is asked by a script of the test's own, which leaves it in the title.
    ask = (
        "<script>addEventListener('load', () => { const images = [...document.images]; document.title = JSON.stringify("
        "[images.length, images.every(i => i.complete && i.naturalWidth > 0), document.documentElement.scrollWidth, "
        "innerWidth, [...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().height > 40)]) })"
        "</script></body>"
    )
    page.write_text(html.replace("</body>", ask))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'u'}",
    ]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},{height}"]
    subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    dom = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    images, drawn, wide, inner, shown = json.loads(title[1])
    assert (images, drawn, shown) == (5, True, True)
    assert wide <= inner
    picture = imread(shot)
    assert picture.shape[:2] == (height, width)
    assert np.unique(picture.reshape(-1, picture.shape[-1])[::50], axis=0).shape[0] > 20

"""The check of links in the built documentation, and that the reference names modules that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dead_link_is_found(docs, tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html">b</a> <a href="b.html#there">b</a> <a href="#top">top</a>'
        '<a href="https://example.org/x">out</a> <img src="picture.svg">'
    )
    (tmp_path / "b.html").write_text('<p id="there"><a href="a.html">a</a>')
    assert docs.dead_links(tmp_path) == ["a.html: picture.svg"]
    (tmp_path / "picture.svg").write_text("<svg/>")
    assert docs.dead_links(tmp_path) == []
    (tmp_path / "b.html").write_text('<a href="a.html#bottom">a</a> <a href="c.html">c</a>')
    assert docs.dead_links(tmp_path) == ["a.html: b.html#there", "b.html: a.html#bottom", "b.html: c.html"]


def test_every_page_is_in_the_order_of_pages(docs):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages == {*docs.GUIDES, *docs.MORE}


def test_the_reference_is_of_modules_that_there_are(docs):
    for package, modules in docs.REFERENCE.items():
        for module in modules:
            path = ROOT / Path(*package.split(".")) / f"{module}.py"
            assert path.exists(), path


def test_what_is_installed_is_what_the_extra_asks_for():
    listed = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    asked = re.findall(r'"([^"]+)"', listed)
    assert len(asked) == 2
    locked = (ROOT / ".ci" / "docs.lock").read_text().splitlines()
    assert set(asked) <= set(locked)
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in locked)


def test_what_a_comment_says_of_a_field_is_in_the_reference():
    """Where `make docs` has run."""
    page = ROOT / "build" / "docs" / "site" / "reference" / "radixkv.html"
    if not page.exists():
        pytest.skip("make docs has not run")
    text = re.sub(r"<[^>]+>", "", page.read_text())
    assert "published pages that can be taken back" in text  # Stats.evictable
    assert "pages that no other namespace&#39;s request evicts" in text or "pages that no other namespace's" in text

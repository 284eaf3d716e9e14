"""Builds the pages of docs/ and an API reference from the sources, with their fields, into build/docs/site: make docs.

Runs in a virtual environment with the extra `docs` alone: the sources are read, not imported. A link that leads
nowhere, to a page or to a heading, is an error.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs"
SOURCE, SITE = OUT / "source", OUT / "site"

GUIDES = (
    "concepts", "embedding", "vision", "trees", "scheduling", "serving", "models", "capacity", "formats", "tiers",
    "monitoring",
)  # fmt: skip
MORE = ("seeing", "policies", "design", "testing", "benchmarks", "api")
REFERENCE = {
    "radixkv": ("cache", "engine", "step", "journal", "content", "errors", "formats", "kv_plan", "shape"),
    "radixkv.scheduling": ("scheduler", "request", "batch", "policy"),
    "radixkv.hf": (
        "adapter", "generator", "aio", "request", "sampling", "processors", "text", "draft", "cache", "kv_check",
        "kv_measure", "optimize",
    ),
    "radixkv.tiers": ("tiers", "fetch", "planner"),
    "radixkv.traces": ("request", "replay", "recorder", "workload", "policies", "lint"),
    "radixkv.observe": ("metrics", "namespaces", "tree_html", "tree_svg", "tree_text", "timeline"),
    "radixkv.capacity": ("config", "fit", "sizes"),
}  # fmt: skip


def write_pages() -> list[object]:
    """The pages as they stand, the README first, and a page of reference for each package; returns their order."""
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE)
    (SOURCE / "index.md").write_text((ROOT / "README.md").read_text().replace("](docs/", "]("))
    (SOURCE / "CHANGELOG.md").write_text((ROOT / "CHANGELOG.md").read_text().replace("](docs/", "]("))
    shutil.copytree(ROOT / "bench" / "results", SOURCE / "bench" / "results")
    for page in SOURCE.glob("*.md"):
        page.write_text(page.read_text().replace("](../bench/", "](bench/"))
    (SOURCE / "reference").mkdir()
    names = {}
    for package, modules in REFERENCE.items():
        text = f"# {package}\n\n" + "".join(f"::: {package}.{module}\n" for module in modules)
        if package == "radixkv":
            text += "::: radixkv._core.Cache\n"
        (SOURCE / "reference" / f"{package}.md").write_text(text)
        names[package] = f"reference/{package}.md"
    pages: list[object] = ["index.md", *(f"{page}.md" for page in GUIDES)]
    return [*pages, {"Reference": list(names.values())}, {"More": [*(f"{page}.md" for page in MORE), "CHANGELOG.md"]}]


def write_config(nav: list[object]) -> Path:
    options = {
        "show_root_heading": True, "show_root_full_path": True, "show_source": False, "docstring_section_style": "list",
        "members_order": "source", "filters": ["!^_"], "show_if_no_docstring": False, "separate_signature": True,
        "show_signature_annotations": True, "inherited_members": False, "heading_level": 2,
        "extensions": [str(ROOT / ".ci" / "field_comments.py")],
    }  # fmt: skip
    config = {
        "site_name": "radixkv",
        "docs_dir": str(SOURCE),
        "site_dir": str(SITE),
        "use_directory_urls": False,
        "strict": True,
        "nav": nav,
        "theme": {"name": "readthedocs"},
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": {"paths": [str(ROOT)], "options": options}}}}],
        "markdown_extensions": ["tables", "fenced_code", "attr_list", {"toc": {"permalink": True}}],
        "validation": {"omitted_files": "ignore", "anchors": "warn", "unrecognized_links": "warn"},
    }
    path = OUT / "mkdocs.yml"
    path.write_text(json.dumps(config, indent=1))  # which is YAML, too
    return path


class Links(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.targets.append(value)


def dead_links(site: Path) -> list[str]:
    """Of a built site: each link between its pages that leads nowhere."""
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page.resolve()
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{page.relative_to(site)}: {target}")
    return sorted(dead)


def main() -> int:
    config = write_config(write_pages())
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(config)])
    if built.returncode:
        return built.returncode
    dead = dead_links(SITE.resolve())
    print("\n".join(dead) if dead else f"built {SITE}: {len(list(SITE.rglob('*.html')))} pages, no dead link")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main())

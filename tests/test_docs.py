"""The pages of the repository: their links lead somewhere, and docs/isa.md is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tilert.ops.__main__ import markdown

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown page offers: its headings as GitHub spells them."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of `text` to files that do not exist or to headings that they do not have."""
    broken: list[str] = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            content = text if target == page else target.read_text(encoding="utf-8")
            if anchor not in anchors(content):
                broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_broken_links_are_caught(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The first, part\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#the-first-part) [c](https://example.org/x) `[d](no)`\n"
    assert broken_links(page, good) == []
    assert broken_links(page, "```\n[a](none.md)\n```\n") == []
    bad = "[a](none.md) ![b](none.svg) [c](other.md#second) [d](#nowhere)"
    assert broken_links(page, bad) == ["none.md", "none.svg", "other.md#second", "#nowhere"]


def test_isa_page_is_what_the_ops_say() -> None:
    page = (ROOT / "docs" / "isa.md").read_text(encoding="utf-8")
    assert page == markdown(), "docs/isa.md is out of date: run `make docs`"

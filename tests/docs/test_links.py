"""What the documents point to is there, and what they are beside stays small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_OURS = {".venv", ".gateway", "node_modules", "target", "build", "dist", ".git"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not NOT_OURS & set(path.relative_to(ROOT).parts))
EXAMPLES_BYTES = 600_000


def anchors(document: Path) -> set[str]:
    """The fragments that a heading of the document can be linked by."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(CODE.sub("", document.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, fragment = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.relative_to(ROOT)} points to {link}, which is not there"
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), f"{document.relative_to(ROOT)} points to {link}: no such heading"


def test_reports_that_are_committed_stay_small() -> None:
    files = [path for path in (ROOT / "bench/examples").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < EXAMPLES_BYTES
    assert not [path for path in files if path.suffix == ".html"]

"""The text of README.md and of the pages in docs/."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTATION = "\n## \n".join(page.read_text(encoding="utf-8") for page in PAGES)


def section(title: str) -> str:
    """The text of a section of any page."""
    return DOCUMENTATION.split(f"\n## {title}\n")[1].split("\n## ")[0]

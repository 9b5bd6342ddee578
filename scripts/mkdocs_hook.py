"""Hook of mkdocs: include the pages of the root folder, the examples and the summaries of recorded results in the site.

The links to them are adapted.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT_PAGES = {"README.md": "index.md", "LOG.md": "log.md", "CONTRIBUTING.md": "contributing.md"}
ROOT_PAGES["CHANGELOG.md"] = "changelog.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root folder, and examples, cards of pretrained weights and summaries of results as files."""
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=adapt_links(text.replace("](docs/", "]("))))
    for path in (root / "examples").iterdir():
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    for path in (root / "fastcifar" / "pretrained").glob("*.md"):
        files.append(File.generated(config, f"pretrained/{path.name}", abs_src_path=str(path)))
    for path in (root / "bench" / "results").glob("*/summary.json"):
        files.append(File.generated(config, f"results/{path.parent.name}/summary.json", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Adapt the links of a page of docs/."""
    return adapt_links(markdown)


def on_page_content(html: str, **_: object) -> str:
    """Remove the backslash of an escaped bar in code, which GitHub needs in tables and MkDocs shows."""
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace(r"\|", "|"), html)


def adapt_links(text: str) -> str:
    """Return `text` with links to the pages of the root folder replaced by links within the site."""
    for name, page in ROOT_PAGES.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({page}", text)
    text = re.sub(r"\]\((?:\.\./)?bench/results/([\w-]+)\)", r"](results/\1/summary.json)", text)
    text = re.sub(r"\]\((?:\.\./)?fastcifar/pretrained/", "](pretrained/", text)
    return text.replace("](../examples/", "](examples/")

"""Hooks of mkdocs: pages that are made from the code, parts of the README, and measured figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from generators import api, charts, commands, methods, results, text
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
GENERATED: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, and list them in the navigation."""
    GENERATED.clear()
    GENERATED.update({**methods.pages(), **api.pages(), "commands.md": commands.page()})
    for entry in config.nav or []:
        for title, folder in (("Methods", "methods/"), ("Python", "api/")):
            if isinstance(entry, dict) and title in entry:
                entry[title] = [path for path in GENERATED if path.startswith(folder)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that were made."""
    for path, content in GENERATED.items():
        files.append(File.generated(config, path, content=content))
    files.append(File.generated(config, charts.SCRIPT, content=charts.script()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Fill in ``<!-- readme: Heading -->``, ``<!-- results: name -->`` and ``<!-- made: name -->``."""
    made = {"rules": methods.rule_table, "tags": methods.tag_table}
    markdown = re.sub(r"<!-- readme: (.+?) -->", lambda found: readme(found.group(1)), markdown)
    markdown = re.sub(r"<!-- results: (.+?) -->", lambda found: results.section(found.group(1)), markdown)
    return re.sub(r"<!-- made: (.+?) -->", lambda found: made[found.group(1)](), markdown)


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Link what docstrings name."""
    return text.references(html)


def readme(heading: str) -> str:
    """A section of the README without its heading (``top``: what stands before the first), links made to fit."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = {"top": re.split(r"^## ", lines, flags=re.MULTILINE)[0].partition("\n")[2]}
    for part in re.split(r"^## ", lines, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        sections[title.strip()] = body
    if heading not in sections:
        raise PluginError(f"the README has no section {heading!r}; it has {', '.join(sections)}")
    body = re.sub(r"<!--.*?-->\n?", "", sections[heading], flags=re.DOTALL).strip("\n")
    body = body.replace("](docs/", "](")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)(?!(?:[\w-]+/)*[\w-]+\.md\))[^)]*\)", r"\1", body) + "\n"

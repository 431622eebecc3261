"""Markdown from plain data and docstrings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\*_\[\]|#])")


def escape(text: str) -> str:
    """Text that Markdown shows as it is; what stands between backticks stays code."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _marked(part) for part in parts)


def _marked(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """Inline code, also in a cell of a table; an empty string stays one."""
    shown = str(text).replace("|", "&#124;").replace("<", "&lt;").replace(">", "&gt;")
    return f"<code>{shown}</code>" if shown else ""


def block(text: str, language: str = "text") -> str:
    """A block of code."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{textwrap.dedent(text).strip(chr(10))}\n{fence}\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """A table; the columns named in ``numbers`` are aligned to the right. Nothing where there are no rows."""
    listed = [[cell.replace("\n", " ") for cell in row] for row in rows]
    if not listed:
        return ""
    rule = ["---:" if name in numbers else "---" for name in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *listed]) + "\n"


def prose(docstring: str) -> str:
    """A docstring of a method as Markdown: indented paragraphs become blocks of code, others text."""
    made = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring.strip("\n")):
        if re.search(r"^\s+", paragraph, re.MULTILINE):
            made.append(block(paragraph))
        else:
            made.append(escape(" ".join(paragraph.split())) + "\n")
    joined = "\n".join(made)
    return joined.replace("```\n\n```text\n", "\n")  # equations that an empty line divides are one block


def references(html: str) -> str:
    """Roles of docstrings (``:func:`weft.compare```) as links to what they name, where that is documented."""

    def link(found: re.Match[str]) -> str:
        target = found.group(1).removeprefix("~")
        return f'<autoref optional identifier="{target}"><code>{target}</code></autoref>'

    return re.sub(r":(?:func|class|meth|mod|attr|data|exc):<code>(~?[\w.]+)</code>", link, html)

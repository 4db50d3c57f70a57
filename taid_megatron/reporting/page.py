"""One HTML page that needs nothing but itself: no network, no script, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data_tools.manifest import write_atomically

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         font-variant-numeric: tabular-nums; }
td:not(.words), td:first-child { white-space: nowrap; }
.words { text-align: left; }
img { max-width: 100%; } figure { margin: 1.2rem 0; } figcaption { color: #555; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Table:
    """A table; cells are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    """Columns of words; the others hold numbers."""

    def html(self) -> str:
        """As HTML."""
        head = self._row("th", self.header) if any(self.header) else ""
        body = "".join(self._row("td", row) for row in self.rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _row(self, tag: str, cells: Sequence[str]) -> str:
        words = ' class="words"'
        found = [
            f"<{tag}{words if n in self.left else ''}>{escape(cell)}</{tag}>"
            for n, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(found)}</tr>"

    def markdown(self) -> str:
        """As Markdown."""
        sides = ["---" if n in self.left else "---:" for n in range(len(self.header))]
        lines = [self.header, sides, *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    png: bytes
    caption: str

    def html(self) -> str:
        """As HTML, the picture inside."""
        data = base64.b64encode(self.png).decode()
        caption = escape(self.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Text:
    """A paragraph, or lines as they are."""

    text: str
    verbatim: bool = False

    def html(self) -> str:
        """As HTML."""
        tag = "pre" if self.verbatim else "p"
        return f"<{tag}>{escape(self.text)}</{tag}>"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Table | Picture | Text]


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(title, sections).encode())


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    body = "".join(
        f"<h2>{escape(section.title)}</h2>" + "".join(part.html() for part in section.parts)
        for section in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )

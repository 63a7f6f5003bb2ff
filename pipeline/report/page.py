"""One HTML page that asks for nothing outside itself: no script, no font, no file. All that it is given is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal

STYLE: Final = """
:root { color-scheme: light; --ink: #1c2530; --soft: #5b6673; --line: #dfe4ea; --blue: #1f6fb4; --paper: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 0.75rem; }
.subtitle { color: var(--soft); margin: 0 0 1.25rem; overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: 0.75rem; }
.card { flex: 1 1 14rem; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  border-left: 4px solid var(--blue); padding: 0.75rem 1rem; }
.card b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.card small { display: block; color: var(--soft); }
.flow { display: flex; flex-wrap: wrap; align-items: stretch; gap: 0.4rem 0.4rem; margin-bottom: 1rem; }
.flow > .step { border: 1px solid var(--line); border-top: 3px solid #b6bfc9; border-radius: 6px;
  padding: 0.35rem 0.6rem; background: #fbfcfd; }
.flow > .complete { border-top-color: #2a7d4f; }
.flow > .partial, .flow > .stale { border-top-color: #d9a20f; }
.flow > .damaged { border-top-color: #c02942; }
.flow small { display: block; color: var(--soft); }
.flow > .arrow { align-self: center; color: #9aa5b1; }
figure { margin: 0.5rem 0 1rem; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; margin: 0.5rem 0 0.75rem; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th, td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 8rem; }
td.digest { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.8rem; }
.note { color: var(--soft); font-size: 0.9rem; margin: 0.25rem 0 0.75rem; overflow-wrap: anywhere; }
details pre { overflow-x: auto; background: #f5f7f9; padding: 0.75rem; border-radius: 6px; font-size: 0.8rem; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  section { padding: 0.75rem; }
  img { max-width: none; width: 36rem; }
}
@media print {
  body { background: none; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section, figure, .card, tr { break-inside: avoid; }
  section { border: none; padding: 0; }
  .scroll, figure { overflow: visible; }
  img { max-width: 100%; width: auto; }
  th, td { white-space: normal; }
  table { font-size: 8pt; }
}
"""


@dataclass(frozen=True)
class Picture:
    """An image that lies in the page."""

    data: bytes
    text: str
    """What is to be seen, for those who do not see it."""
    kind: Literal["svg", "png"] = "svg"


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page:
    """A page, from top to bottom; all text is plain text."""

    def __init__(self, title: str, subtitle: str) -> None:
        """A page.

        Args:
            title: also of the window.
            subtitle: what it is about, in a line.
        """
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._open = False

    def section(self, title: str) -> None:
        """Begins a section; what is added next is in it."""
        self._close()
        self._parts.append(f"<section>\n<h2>{escape(title)}</h2>")
        self._open = True

    def cards(self, found: Sequence[tuple[str, str, str]]) -> None:
        """Numbers to be seen first: each with what it is, and a note."""
        cards = [
            f'<div class="card"><b>{escape(number)}</b>{escape(name)}<small>{escape(note)}</small></div>'
            for number, name, note in found
        ]
        self._parts.append(f'<div class="cards">{"".join(cards)}</div>')

    def flow(self, steps: Sequence[tuple[str, str, str]]) -> None:
        """Boxes joined by arrows: each has a label, a state, and a note."""
        boxes = [
            f'<div class="step {escape(state)}">{escape(label)}<small>{escape(state)}</small>'
            f"<small>{escape(note)}</small></div>"
            for label, state, note in steps
        ]
        arrow = '<div class="arrow" aria-hidden="true">&rarr;</div>'
        self._parts.append(f'<div class="flow">{arrow.join(boxes)}</div>')

    def picture(self, picture: Picture) -> None:
        """An image."""
        kind = "image/svg+xml" if picture.kind == "svg" else "image/png"
        data = b64encode(picture.data).decode()
        self._parts.append(f'<figure><img alt="{escape(picture.text)}" src="data:{kind};base64,{data}"></figure>')

    def table(self, table: Table) -> None:
        """A table; on a narrow screen it can be moved sideways."""
        head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )

    def note(self, text: str) -> None:
        """A paragraph in small letters."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def code(self, title: str, text: str) -> None:
        """Text as it is, folded away."""
        self._parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        """The page."""
        self._close()
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="subtitle">{escape(self.subtitle)}</p>\n{body}\n'
            "</main>\n</body>\n</html>\n"
        )

    def _close(self) -> None:
        if self._open:
            self._parts.append("</section>")
        self._open = False


def _cell(text: str) -> str:
    is_digest = len(text) >= 16 and set(text) <= set("0123456789abcdef")
    return f"<td{' class=digest' if is_digest else ''}>{escape(text)}</td>"

# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A page of HTML in one file: headings, paragraphs, tables, and pictures inside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; font: 16px/1.55 system-ui, sans-serif; color: #222; }
h1 { font-size: 1.7rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
p { margin: 0.5rem 0; } img { max-width: 100%; max-height: 48rem; margin: 0.7rem 0; display: block; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.88rem; } .wide { overflow-x: auto; }
th, td { padding: 0.22rem 0.8rem 0.22rem 0; text-align: right; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; border-bottom-color: #999; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; color: #555; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole text of the file, under a heading that is the title."""
    body = "\n".join((f"<h1>{escape(title)}</h1>", *sections))
    head = (
        '<meta charset="utf-8">\n<meta name="viewport"'
        f' content="width=device-width">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(title: str, *blocks: str) -> str:
    """A heading and what stands below it."""
    return "\n".join((f"<h2>{escape(title)}</h2>", *blocks))


def paragraph(*sentences: str) -> str:
    """Plain text, escaped."""
    return f"<p>{escape(' '.join(sentences))}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A row of cells for each of ``rows``; the first column is text, the others numbers."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def facts_table(facts: Iterable[tuple[str, Any]]) -> str:
    """A name and a value in each row; what is no text is written as JSON."""
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(_value(value))}</td></tr>" for name, value in facts)
    return '<table class="facts">\n' + "\n".join(lines) + "\n</table>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def picture(path: Path, alt: str) -> str:
    """A PNG file inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

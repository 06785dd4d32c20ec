# SPDX-License-Identifier: Apache-2.0
"""A small document: a list of blocks, written as Markdown and as one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Heading:
    """A heading."""

    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph, or a list of points."""

    lines: list[str]
    bullets: bool = False


@dataclass
class Table:
    """A table; ``**text**`` in a cell is bold."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Picture:
    """A figure in a file."""

    file: Path
    caption: str


@dataclass
class Folded:
    """Blocks that open on a click."""

    title: str
    blocks: list["Block"]


Block = Heading | Text | Table | Picture | Folded


def write_document(blocks: Sequence[Block], title: str, folder: Path, name: str = "report") -> list[Path]:
    """Write a document.

    Args:
        blocks (Sequence[Block]): What it says. Pictures lie in the folder or below it.
        title (str): Of the page.
        folder (Path): Gets both files.
        name (str): Of the files, without suffix.

    Returns:
        list[Path]: The Markdown file and the HTML page.
    """
    markdown, page = folder / f"{name}.md", folder / f"{name}.html"
    markdown.write_text("\n".join(_markdown(blocks, folder)) + "\n", encoding="utf-8")
    body = "\n".join(_html(blocks))
    page.write_text(PAGE.replace("{title}", html.escape(title)).replace("{body}", body), encoding="utf-8")
    return [markdown, page]


def _markdown(blocks: Sequence[Block], folder: Path) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                lines += [f"{'#' * block.level} {block.text}", ""]
            case Text():
                lines += [f"- {line}" if block.bullets else line for line in block.lines] + [""]
            case Table():
                lines.append("| " + " | ".join(block.head) + " |")
                lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(block.head) - 1)]) + "|")
                lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in block.rows]
                lines += ["", *([block.caption, ""] if block.caption else [])]
            case Picture():
                lines += [f"![{block.caption}]({block.file.relative_to(folder).as_posix()})", "", block.caption, ""]
            case Folded():
                lines += ["<details>", f"<summary>{block.title}</summary>", ""]
                lines += [*_markdown(block.blocks, folder), "</details>", ""]
    return lines


def _html(blocks: Sequence[Block]) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                lines.append(f"<h{block.level}>{_inline(block.text)}</h{block.level}>")
            case Text():
                points = "".join(f"<li>{_inline(line)}</li>" for line in block.lines)
                lines.append(
                    f"<ul>{points}</ul>"
                    if block.bullets
                    else "".join(f"<p>{_inline(line)}</p>" for line in block.lines)
                )
            case Table():
                head = "".join(f"<th>{_inline(text)}</th>" for text in block.head)
                body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in block.rows)
                caption = f"<p class='caption'>{_inline(block.caption)}</p>" if block.caption else ""
                lines.append(f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>{caption}")
            case Picture():
                kind = "jpeg" if block.file.suffix == ".jpg" else "png"
                content = base64.b64encode(block.file.read_bytes()).decode()
                image = f"<img alt='{html.escape(block.caption)}' src='data:image/{kind};base64,{content}'>"
                lines.append(f"<figure>{image}<figcaption>{_inline(block.caption)}</figcaption></figure>")
            case Folded():
                inner = "\n".join(_html(block.blocks))
                lines.append(f"<details><summary>{_inline(block.title)}</summary>{inner}</details>")
    return lines


def _html_cell(text: str) -> str:
    plain = text.strip("*")
    kind = "gap" if re.match(r"(missing|failed|timeout|not planned|-$)", plain) else ""
    return f"<td class='{kind}'>{_inline(text)}</td>" if kind else f"<td>{_inline(text)}</td>"


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d5d5d8; } h3 { margin-top: 1.6rem; }
ul { background: #f6f7f9; border-radius: 6px; padding: .8rem 1rem .8rem 2rem; font-size: .92rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #e4e4e7; text-align: right; vertical-align: top; }
th { background: #f6f7f9; font-weight: 600; } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td.gap { color: #a33; font-style: italic; } td { max-width: 34rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .caption { color: #555; font-size: .86rem; } summary { cursor: pointer; margin: .5rem 0; }
</style></head><body>
{body}
</body></html>
"""

"""Pictures, responses, and captions before and after training with their hallucinations marked."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from povid.files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

Finder = Callable[[str], list[str]]
"""Returns the objects that a text mentions, in order (``chair_words.objects`` with its synonyms bound)."""

PICTURES = ("picture", "noised picture")
TEXTS = ("preferred", "dispreferred", "before", "after")
COLUMNS = ("id", *PICTURES, "question", *TEXTS, "hallucinated before", "hallucinated after")
STYLE = "background:#ffd5d0;color:#8c1d18"


def table_rows(records: Sequence[Mapping[str, Any]], find: Finder | None = None) -> tuple[list[str], list[list[Any]]]:
    """Return the column names and the rows of the table.

    Each record holds ``id``, ``image`` and ``noised`` (a PIL picture, encoded bytes, a file or None), ``question``,
    ``preferred``, ``dispreferred``, the captions ``before`` and ``after`` training, and ``objects``, the objects in the
    picture. The four texts are returned as HTML with mentions of other objects in <mark>; the last two columns list the
    objects hallucinated in each caption. Without ``find`` or ``objects``, nothing is marked.
    """
    rows = []
    for record in records:
        truth = record.get("objects")
        known = find is not None and truth is not None
        texts = {key: str(record.get(key) or "") for key in TEXTS}
        marked = [mark(text, truth, find) if known else html.escape(text) for text in texts.values()]
        absent = [", ".join(hallucinated(texts[key], truth, find)) if known else "" for key in ("before", "after")]
        rows.append(
            [
                str(record.get("id", "")),
                record.get("image"),
                record.get("noised"),
                str(record.get("question") or ""),
                *marked,
                *absent,
            ]
        )
    return list(COLUMNS), rows


def hallucinated(text: str, truth: Collection[str], find: Finder) -> list[str]:
    """Return the objects that ``text`` mentions and ``truth`` does not hold, each once, in order of mention."""
    return list(dict.fromkeys(thing for thing in find(text) if thing not in truth))


def mark(text: str, truth: Collection[str], find: Finder) -> str:
    """Return ``text`` as HTML with every mention of an object that ``truth`` does not hold in <mark>."""
    absent = set(hallucinated(text, truth, find))
    words = list(re.finditer(r"[\w'-]+", text))
    out, end, place = [], 0, 0
    while place < len(words):
        span = words[place : place + 1]
        pair = words[place : place + 2]
        # Two words form one name if they mention something else together than one by one (hot dog).
        if len(pair) == 2 and find(_between(text, pair)) != find(pair[0].group()) + find(pair[1].group()):
            span = pair
        if absent.intersection(find(_between(text, span))):
            out += [
                html.escape(text[end : span[0].start()]),
                f'<mark style="{STYLE}">{html.escape(_between(text, span))}</mark>',
            ]
            end = span[-1].end()
        place += len(span)
    return "".join([*out, html.escape(text[end:])])


def _between(text: str, words: Sequence[re.Match[str]]) -> str:
    return text[words[0].start() : words[-1].end()]


def sample_table(records: Sequence[Mapping[str, Any]], find: Finder | None = None) -> Any:
    """A W&B table of samples: pictures as images, texts as HTML with their hallucinations marked.

    ``records`` as for ``table_rows``; ``noise``, y_l^n as pieces of text with whether each differs from y_w, is a
    column with the differing ones marked.
    """
    import wandb

    columns, rows = table_rows(records, find)
    place = columns.index("dispreferred") + 1
    made = wandb.Table(columns=[*columns[:place], "noise dispreferred", *columns[place:]])
    for record, row in zip(records, rows):
        cells = [_for_wandb(column, value) for column, value in zip(columns, row, strict=True)]
        noise = wandb.Html(_marked_pieces(record.get("noise") or ()), inject=False)
        made.add_data(*cells[:place], noise, *cells[place:])
    return made


def flip_table(records: Sequence[Mapping[str, Any]]) -> Any:
    """A W&B table of yes/no questions whose answers changed: image, question, label, before and after."""
    import wandb

    made = wandb.Table(columns=["picture", "question", "label", "before", "after"])
    for record in records:
        texts = (str(record[key]) for key in ("question", "label", "before", "after"))
        made.add_data(_for_wandb("picture", record["image"]), *texts)
    return made


def _marked_pieces(pieces: Sequence[tuple[str, bool]]) -> str:
    return "".join(
        f'<mark style="{STYLE}">{html.escape(text)}</mark>' if differs and text else html.escape(text)
        for text, differs in pieces
    )


def _for_wandb(column: str, value: Any) -> Any:
    import wandb

    if column in PICTURES:
        return None if value is None else wandb.Image(_picture(value))
    return wandb.Html(value, inject=False) if column in TEXTS else value


def _picture(value: Any) -> Image:
    from PIL import Image

    from povid.preferences.pictures import rgb

    if isinstance(value, (bytes, bytearray)):
        return rgb(Image.open(io.BytesIO(value)))
    if isinstance(value, (str, Path)):
        with Image.open(value) as picture:
            return rgb(picture)
    return rgb(value)


def write_page(table: tuple[Sequence[str], Sequence[Sequence[Any]]], file: Path) -> Path:
    """Write a table made by ``table_rows`` as one self-contained HTML file; return ``file``."""
    columns, rows = table
    body = []
    for row in rows:
        cells = []
        for column, value in zip(columns, row, strict=True):
            if column in PICTURES:
                text = "" if value is None else f'<img src="data:image/png;base64,{_encoded(value)}">'
            else:
                text = value if column in TEXTS else html.escape(str(value))
            cells.append(f"<td>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    page = (
        "<!doctype html><meta charset='utf-8'><title>Before and after</title><style>"
        "body{font:14px/1.45 sans-serif;margin:24px;color:#1a1a1a}table{border-collapse:collapse}"
        "th,td{border-bottom:1px solid #ccc;padding:8px;text-align:left;vertical-align:top;max-width:22em}"
        "img{width:150px;image-rendering:auto}</style>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>\n"
    )
    return write_text(file, page)


def _encoded(value: Any) -> str:
    buffer = io.BytesIO()
    _picture(value).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

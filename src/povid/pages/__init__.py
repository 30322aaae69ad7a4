"""Self-contained HTML pages, all from one set of templates.

A page is one file without a network address in it. Jinja escapes every text, and a Content-Security-Policy allows
only the page's own style and scripts, by their hashes, and pictures inside the page. A text that slips through the
escaping could therefore not run.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from povid.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 320  # pixels of the longer side of a picture on a page
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
NONE = b""  # plotly.js makes an empty <style> and fills it rule by rule


def write(
    file: Path, template: str, *, scripts: Sequence[str] = (), library: bytes | None = None, **values: Any
) -> Path:
    """Write the page that ``template`` makes of ``values``; return ``file``.

    Args:
        scripts: names of the files in ``templates`` that the page runs.
        library: JavaScript that these scripts may start (see :func:`packed`), beside their own.
    """
    style, *code = [(TEMPLATES / name).read_bytes() for name in ("page.css", *scripts)]
    allowed = [*code, *([library] if library else [])]
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}" + (f" {_hash(NONE)}" if library else ""),
            f"script-src {' '.join(map(_hash, allowed)) or chr(39) + 'none' + chr(39)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    page = _environment().get_template(template)
    text = page.render(
        **values, policy=policy, style=style.decode(), code=[part.decode() for part in code], library=library
    )
    # half a surrogate pair, which JSON may hold, is no character
    return write_text(Path(file), text.encode("utf-8", "replace").decode("utf-8"))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["own"] = Markup  # for the project's own style and scripts alone
    made.filters["packed"] = packed
    return made


def _hash(source: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"


def packed(source: Any) -> str:
    """Bytes, or a value as JSON, compressed with gzip and written in base64; ``curves.js`` unpacks it."""
    return _packed(source if isinstance(source, bytes) else json.dumps(source, separators=(",", ":")).encode())


@functools.lru_cache(2)
def _packed(source: bytes) -> str:
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()


def picture(image: Image) -> bytes:
    """A picture for a page: encoded, and scaled down if its longer side has more than :data:`SIDE` pixels."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if small.size == image.size else "JPEG", quality=82)
    return buffer.getvalue()


def kind(encoded: bytes) -> str | None:
    """png or jpeg by the first bytes; None for anything else, which no page embeds."""
    return next((name for start, name in SIGNATURES.items() if encoded.startswith(start)), None)


def address(encoded: bytes) -> str:
    """A ``data:`` address of an encoded PNG or JPEG."""
    return f"data:image/{kind(encoded)};base64,{base64.b64encode(encoded).decode()}"

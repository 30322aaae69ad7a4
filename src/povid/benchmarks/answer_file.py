"""Answer and question files in the layouts that others write, with the place of every record for error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from povid.fault import Fault

_SPACE = re.compile(r"\s*")


def read_records(file: Path) -> list[tuple[str, Any]]:
    """The records of a JSON list, of JSON Lines, or of JSON objects written one after another.

    Returns (place, record) pairs; place reads "answers.jsonl line 3", or "answers.json record 3" inside a list. A file
    that is one single JSON object gives that object alone. Raises Fault for a file that is missing, not UTF-8 or not
    JSON, naming the line.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Fault(f"{file}: no such file; give the path of the file to be read") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{file} cannot be read ({error}); give a UTF-8 text file") from None
    decode = json.JSONDecoder().raw_decode
    values: list[tuple[str, Any]] = []
    end, line = 0, 1
    while (start := _SPACE.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        try:
            value, end = decode(text, start)
        except json.JSONDecodeError as error:
            wrong = line + text.count("\n", start, error.pos)
            raise Fault(f"{file} line {wrong} is not JSON ({error.msg}); correct or remove that line") from None
        values.append((f"{file.name} line {line}", value))
        line += text.count("\n", start, end)
    if len(values) == 1 and isinstance(values[0][1], list):
        return [(f"{file.name} record {number}", item) for number, item in enumerate(values[0][1], 1)]
    return values

"""Models that OpenAI's own server no longer has, or will lose on a known day, and what to ask instead.

Dates from OpenAI's list of deprecations, as of November 2026. A name ends at the start of its day. The replacements are
those that answer chat completions without reasoning first, as a judge's or generator's prompt expects.
"""

from __future__ import annotations

from datetime import date
from urllib.parse import urlsplit

RETIRED = {
    "2024-09-13": ("gpt-6-luna", "gpt-3.5-turbo-0301 gpt-3.5-turbo-0613 gpt-3.5-turbo-16k-0613"),
    "2024-12-06": ("gpt-6.1-terra", "gpt-4-vision-preview gpt-4-1106-vision-preview"),
    "2025-06-06": ("gpt-6.1-terra", "gpt-4-32k gpt-4-32k-0314 gpt-4-32k-0613"),
    "2026-02-17": ("gpt-6.1-terra", "chatgpt-4o-latest"),
    "2026-03-26": ("gpt-6.1-terra", "gpt-4-0314 gpt-4-0125-preview gpt-4-turbo-preview"),
    "2026-09-28": ("gpt-6-luna", "gpt-3.5-turbo-1106 gpt-3.5-turbo-instruct"),
    "2026-10-23": (
        "gpt-6.1-terra",
        "gpt-3.5-turbo gpt-3.5-turbo-0125 gpt-4 gpt-4-0613 gpt-4-1106-preview gpt-4-turbo gpt-4-turbo-2024-04-09 "
        "gpt-4o-2024-05-13 gpt-4.1-nano gpt-4.1-nano-2025-04-14 o1 o1-2024-12-17 o3-mini o3-mini-2025-01-31 o4-mini "
        "o4-mini-2025-04-16",
    ),
    "2026-12-11": (
        "gpt-6.1-terra",
        "gpt-5 gpt-5-2025-08-07 gpt-5-mini gpt-5-mini-2025-08-07 gpt-5-nano gpt-5-nano-2025-08-07 o3",
    ),
    "2027-01-14": (
        "gpt-6.1-terra",
        "gpt-4o gpt-4o-2024-08-06 gpt-4o-2024-11-20 gpt-4o-mini gpt-4o-mini-2024-07-18 gpt-4.1 gpt-4.1-2025-04-14 "
        "gpt-4.1-mini gpt-4.1-mini-2025-04-14",
    ),
}
"""Day → (replacement, names)."""

OPENAI = "api.openai.com"


def retirement(model: str, base_url: str | None) -> tuple[date, str] | None:
    """The day on which a model ends and its replacement; None for one not listed, or behind another server.

    Without ``base_url`` the server is OpenAI's own. Anybody else's server may call its model by a retired name.
    """
    host = (urlsplit(base_url).hostname or "") if base_url else OPENAI
    if host != OPENAI and not host.endswith(f".{OPENAI}"):
        return None
    for day, (replacement, names) in RETIRED.items():
        if model in names.split():
            return date.fromisoformat(day), replacement
    return None


def today() -> date:
    return date.today()

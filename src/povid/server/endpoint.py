"""A client for any OpenAI-compatible server: bounded concurrency, back-off, a budget, and every reply kept on disk.

Judges, served models and the dispreference generator all send their requests from here, so nothing is asked twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import openai
from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from povid.fault import Fault
from povid.preferences.pictures import rgb
from povid.preferences.stored import Picture, picture_bytes
from povid.server import retired
from povid.server.bounded import BoundedClient, patience
from povid.server.replies import Reply, ReplyFile, Spent

log = logging.getLogger(__name__)

RETRIED = {408, 409, 425, 429}  # and every 5xx
LOCAL_KEY = "none"  # local servers ask for no key, but the client insists on one
MOST_TOKENS = 100_000_000  # that a server may say a request took
QUIET = 8.0  # seconds without a first reply after which that is said, and again after twice as many


class NoReply(Fault):
    """The server did not answer one request in any attempt."""


class Unreachable(Fault):
    """Nobody can be connected to at the server's address, so no request is worth sending."""


class _Malformed(ValueError):
    """A reply with status 200 that is not a chat completion."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the server. ``name`` identifies it in errors ("record 17") and is not part of the cache key.

    ``sample`` distinguishes several replies to the same request; ``extra`` holds further arguments of the API.
    ``temperature=None`` leaves the choice to the server. ``reads`` is what its sender makes of a reply: None if that is
    of no use, which ``ask_again`` is about; not part of the cache key either.
    """

    messages: Sequence[Mapping[str, Any]]
    temperature: float | None = 0.0
    max_tokens: int = 1024
    sample: int = 0
    name: str = "a request"
    extra: Mapping[str, Any] = field(default_factory=dict)
    reads: Callable[[Reply], Any] | None = field(default=None, compare=False)

    def useless(self, reply: Reply) -> bool:
        """Whether a reply is empty or its sender cannot read it."""
        return not reply.text.strip() or (self.reads is not None and self.reads(reply) is None)


class EndpointSettings(BaseModel):
    """How an OpenAI-compatible server is asked: the settings that judges, served models and generators share.

    Attributes:
        model: name of the model as the server knows it; None where the caller chooses it, as a judge does.
        revision: commit of the open weights that the server was started with. No server tells it, so it is taken at
            your word: replies under another one are not used, and it stands beside every result.
        extra: arguments of the API for every request, as ``reasoning_effort``; part of what a reply depends on. They
            take the place of ours, and one that is null is not sent.
        base_url: address up to ``/v1``, without user name and password; None takes OPENAI_BASE_URL from the
            environment, else OpenAI's own server.
        api_key_env: environment variable that holds the key; it may be unset when a ``base_url`` is known.
        concurrency: requests in flight at once from this process.
        timeout: seconds in which the whole reply must come, or the attempt counts as failed.
        retries: attempts after the first one, on 429, 5xx, time-outs, broken connections and malformed replies.
        backoff: seconds before the second attempt; doubles with each further one, with jitter.
        longest_wait: seconds that no single wait exceeds, including a server's Retry-After.
        requests_per_minute: rate limit of this process; None for no limit.
        input_price, output_price: currency per million tokens; without them, costs are reported as 0.
        budget: currency that all replies in the cache together may cost; needs both prices.
        token_budget: tokens that all replies in the cache together may take.
        image_tokens: tokens reserved for one image until the server has reported what it took.
        max_tokens_key: name of the API's length limit; some newer models want ``max_completion_tokens``.
        ask_again: ask once more for replies on disk that are of no use, after a server has been mended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, min_length=1)
    extra: dict[str, Any] = Field(default_factory=dict)
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(8, ge=1)
    timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    retries: int = Field(6, ge=0)
    backoff: float = Field(1.0, ge=0, allow_inf_nan=False)
    longest_wait: float = Field(120.0, ge=0, allow_inf_nan=False)
    requests_per_minute: float | None = Field(None, gt=0, allow_inf_nan=False)
    input_price: float | None = Field(None, ge=0, allow_inf_nan=False)
    output_price: float | None = Field(None, ge=0, allow_inf_nan=False)
    budget: float | None = Field(None, ge=0, allow_inf_nan=False)
    token_budget: int | None = Field(None, ge=0)
    image_tokens: int = Field(1100, ge=0)
    max_tokens_key: str = Field("max_tokens", min_length=1)
    ask_again: bool = False

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        return address if address is None else plain_address(address)

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be a key: say nothing of it
            raise ValueError("needed the name of an environment variable, not the key itself")
        return name

    @model_validator(mode="after")
    def _a_budget_needs_prices(self) -> Self:
        if self.budget is not None and (self.input_price is None or self.output_price is None):
            raise ValueError(
                f"budget={self.budget:g} needs input_price and output_price (currency per million tokens); "
                "give both, or use token_budget"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Who answers: the model, and its revision and further arguments where they are given."""
        found = {"model": self.model, "revision": self.revision, "extra": self.extra}
        return {key: value for key, value in found.items() if key == "model" or value}


def plain_address(address: str) -> str:
    """An address that may be written to files.

    Raises:
        ValueError: it is no http address, or holds a user name or password; the message does not repeat it.
    """
    try:
        parts = urlsplit(address)
        secret = "@" in parts.netloc
    except ValueError:
        parts = secret = None
    if secret:
        raise ValueError(
            "the address holds a user name or password, which would stand in config.yaml and in logs; leave it out and "
            "put the key into the environment variable that api_key_env names"
        )
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("needed an address that begins with http:// or https://, up to /v1")
    return address


class Endpoint:
    """A chat model behind an OpenAI-compatible server.

    Args:
        settings: which model, where, and how it is asked.
        cache: JSON Lines file that every reply is appended to the moment it arrives; several processes may share it.

    Requests that timed out do not count as spent: no server reports what they cost.

    Raises:
        Fault: no model is named, a key is needed and its environment variable is not set, or the model is retired and
            has not left a reply in ``cache``.
    """

    def __init__(self, settings: EndpointSettings, cache: str | Path) -> None:
        if settings.model is None:
            raise Fault("no model is named for the server; set `model` to the name by which the server knows it")
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or None
        try:
            base_url = base_url and plain_address(base_url)
        except ValueError as error:
            raise Fault(f"OPENAI_BASE_URL: {error}") from None
        key = os.environ.get(settings.api_key_env, "").strip() or (LOCAL_KEY if base_url else None)
        if key is None:
            raise Fault(
                f"no key for {settings.model}: the environment variable {settings.api_key_env} is not set; "
                f"set it, or give the base_url of a server that needs none"
            )
        if not (key.isascii() and key.isprintable()):
            raise Fault(f"{settings.api_key_env} holds characters that no key has; set it to the key alone")
        self._secret = key if len(key) >= 8 else None
        self.settings, self.model, self.base_url = settings, settings.model, base_url
        self.paid = Spent()  # by this process
        self._interval = 60.0 / settings.requests_per_minute if settings.requests_per_minute else 0.0
        self._next_start = 0.0
        self._lock = threading.RLock()
        self._away = threading.Lock()  # taken by the first request that finds nobody
        self._file = ReplyFile(Path(cache), settings.budget, settings.token_budget)
        self._asked_again: set[str] = set()
        self._gone = self._retired()
        if self._gone and self.model not in self._file.models:
            raise Fault(self._gone)
        self._http = BoundedClient(settings.timeout)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key,
            timeout=patience(settings.timeout),
            max_retries=0,
            http_client=self._http,
        )

    def _retired(self) -> str:
        """Why the model cannot be asked any more, or ""; a coming end is a warning."""
        if (known := retired.retirement(self.model, self.base_url)) is None:
            return ""
        day, replacement = known
        instead = f"use {replacement} with extra={{reasoning_effort: none}} and max_tokens_key=max_completion_tokens"
        instead += ", as judge=openai does"
        if retired.today() >= day:
            return f"OpenAI shut {self.model} down on {day}; {instead}, or name your own server with base_url"
        log.warning("OpenAI will shut %s down on %s; then %s", self.model, day, instead)
        return ""

    # ------------------------------------------------------------------ asking

    def ask(self, request: Request, stop: threading.Event | None = None) -> Reply:
        """Send one request and wait for its reply; setting ``stop`` ends the wait between attempts.

        Raises NoReply, Unreachable, BudgetReached, or a Fault with the server's own sentence for a refused request
        (status 4xx).
        """
        key = self.key(request)
        old = self._file.get(key)
        if old is not None and not self._mended(key, request, old):
            return old
        with self._file.claim(key) as claim:
            self._file.read_new()
            if (known := self._file.get(key)) is not old:
                return known
            stop = stop or threading.Event()
            self._file.reserve(claim, request.name, self.estimate(request), stop)
            reply = self._send(request, stop)
            with self._lock:
                self.paid.add(reply)
            self._file.keep(
                key,
                request.name,
                reply,
                {
                    "model": self.model,
                    "temperature": request.temperature,
                    "max_tokens": request.max_tokens,
                    "sample": request.sample,
                },
            )
        return reply

    def _mended(self, key: str, request: Request, reply: Reply) -> bool:
        """Whether a reply on disk is to be replaced: once in this process, and only if it is of no use."""
        if not self.settings.ask_again or not request.useless(reply):
            return False
        with self._lock:
            first = key not in self._asked_again
            self._asked_again.add(key)
        return first

    def ask_all(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply | NoReply]]:
        """Send many requests, ``concurrency`` at once; yields (position, reply) in the order in which replies arrive.

        ``requests`` is consumed lazily, so a generator that encodes images holds few of them in memory. A request that
        gets no reply is yielded as its NoReply, and the others continue. A Fault (budget reached, server out of reach,
        key refused, request rejected) is raised after the replies in flight have been yielded. As long as no reply at
        all has come, that is said every now and then.
        """
        numbered = enumerate(requests)
        stop, flying = threading.Event(), {}
        failure: BaseException | None = None
        started, quiet = time.monotonic(), QUIET
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="endpoint")
        try:
            while True:
                while failure is None and len(flying) < self.settings.concurrency:
                    try:
                        position, request = next(numbered)
                    except StopIteration:
                        break
                    except Fault as error:  # a request that cannot be built must not lose the replies in flight
                        failure = error
                        break
                    flying[pool.submit(self.ask, request, stop)] = position
                if not flying:
                    break
                done = wait(flying, None if math.isinf(quiet) else quiet, return_when=FIRST_COMPLETED).done
                if done:
                    quiet = math.inf
                else:
                    since = time.monotonic() - started
                    log.warning("%s: no reply for %.0f s; requests under way: %d", self._who(), since, len(flying))
                    quiet *= 2
                for future in done:
                    position, raised = flying.pop(future), future.exception()
                    if raised is None:
                        yield position, future.result()
                    elif isinstance(raised, NoReply):
                        yield position, raised
                    else:
                        failure = failure or raised
            if failure is not None:
                raise failure
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def reach(self) -> None:
        """Raise Unreachable unless something answers at the address within QUIET seconds; no request is paid for."""
        http, reason = BoundedClient(QUIET), ""
        try:
            self._client.with_options(http_client=http, timeout=patience(QUIET)).models.list()
        except Exception as error:  # what a server says of its models, and how, does not matter
            reason = self._said(error.__cause__ or error)
        if not http.connected.is_set():
            raise self._unreachable(reason)

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(
            f"{self._who()} cannot be reached ({reason}); start the server or correct base_url and run again, all "
            "replies so far are kept"
        )

    @property
    def total(self) -> Spent:
        """What all processes that share the cache have spent."""
        return self._file.total

    def known(self, request: Request) -> Reply | None:
        """The reply that is already on disk, if there is one."""
        return self._file.get(self.key(request))

    def key(self, request: Request) -> str:
        """sha256 of everything that determines the reply: images by their bytes, and the server's address.

        Two servers may know different models by the same name. Without an address the server is OpenAI's own.
        """
        whole = {
            **({"revision": self.settings.revision} if self.settings.revision else {}),
            **({"base_url": self.base_url.rstrip("/")} if self.base_url else {}),
            "model": self.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "sample": request.sample,
            "extra": dict(request.extra) | self.settings.extra,
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def estimate(self, request: Request) -> Reply:
        """Upper bound on what a request takes, as a Reply without text: 3 bytes a token, and max_tokens of reply."""
        images, size = 0, 0
        for message in request.messages:
            content = message["content"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                images += "image_url" in part
                size += len(part.get("text", "").encode("utf-8", "replace"))
        prompt = size // 3 + 8 * len(request.messages) + 8 + images * self.settings.image_tokens
        longest = self.settings.extra.get(self.settings.max_tokens_key) or request.max_tokens
        return Reply("", prompt, longest, self._price(prompt, longest), "")

    # ------------------------------------------------------------------ one request on the wire

    def _send(self, request: Request, stop: threading.Event) -> Reply:
        if self._gone:
            raise Fault(f"{request.name}: {self._gone}; only its replies on disk can still be used")
        # lone surrogates cannot be sent as UTF-8
        sendable = json.loads(json.dumps(list(request.messages), ensure_ascii=False).encode("utf-8", "replace"))
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": sendable,
            self.settings.max_tokens_key: request.max_tokens,
            "temperature": request.temperature,
            **request.extra,
            **self.settings.extra,
        }
        arguments = {key: value for key, value in arguments.items() if value is not None}
        for attempt in range(self.settings.retries + 1):
            self._pace(stop)
            asked_wait, failed = 0.0, ""
            try:
                return self._read(self._client.chat.completions.create(**arguments), request)
            except openai.APIStatusError as error:
                reason = f"status {error.status_code}: {self._said(error.message)}"
                quota_exhausted = error.code == "insufficient_quota"
                if quota_exhausted or not (error.status_code in RETRIED or error.status_code >= 500):
                    raise Fault(
                        f"{request.name}: {self._who()} refused it with {reason}; check the request, "
                        "the key and the model's name"
                    ) from error
                asked_wait = _retry_after(error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                reason = f"no answer within {self.settings.timeout:g} s"
            except openai.APIConnectionError as error:
                failed = self._said(error.__cause__ or error)
                reason = failed if isinstance(error.__cause__, TimeoutError) else f"the connection failed ({failed})"
            except TimeoutError as error:  # openai 2 wraps it, openai 3 does not
                reason = str(error)
            except (openai.APIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
                # whatever the client makes of a body that is no completion
                reason = f"a reply that is not a chat completion ({self._said(error)})"
            unconnected = not self._http.connected.is_set()
            if unconnected and (attempt or not self.settings.retries):
                raise self._unreachable(reason)
            if attempt == self.settings.retries or stop.is_set():
                break
            pause = min(self.settings.backoff * 2**attempt * random.uniform(0.5, 1.5), self.settings.longest_wait)
            pause = min(pause, 1.0) if unconnected else pause
            if asked_wait:
                self._hold_off(min(asked_wait, self.settings.longest_wait))
            if not unconnected:
                tries, seconds = self.settings.retries + 1, max(pause, asked_wait)
                log.warning(
                    "%s: attempt %d of %d failed (%s); the next in %.1f s",
                    request.name,
                    attempt + 1,
                    tries,
                    reason,
                    seconds,
                )
            elif self._away.acquire(blocking=False):  # all requests in flight find the same: one says it
                log.warning("%s cannot be reached (%s); once more in %.1f s", self._who(), reason, pause)
            stop.wait(pause)
        if failed:
            self._http.connected.clear()  # a server that went away is tried twice by the next request, not seven times
        raise NoReply(
            f"{request.name}: {self._who()} gave no reply in {attempt + 1} attempts (the last: {reason}); "
            "run again to send only the unanswered requests, or raise timeout or retries"
        )

    def _read(self, completion: Any, request: Request) -> Reply:
        choices = completion.choices if isinstance(completion, openai.types.chat.ChatCompletion) else None
        if not choices or choices[0].message is None:
            raise _Malformed(str(completion)[:120])
        message, usage = choices[0].message, completion.usage
        text = message.content or message.refusal or ""
        finish: Any = choices[0].finish_reason or ""
        if not isinstance(text, str) or not isinstance(finish, str):
            raise _Malformed(str(message)[:120])
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        if not all(count is None or (type(count) is int and 0 <= count <= MOST_TOKENS) for count in counts):
            raise _Malformed(f"usage {usage}"[:120])
        text, finish = self._without_key(text), self._without_key(finish)[:40]
        guess = self.estimate(request)
        prompt = usage.prompt_tokens if usage and usage.prompt_tokens is not None else guess.prompt_tokens
        counted = usage is not None and usage.completion_tokens is not None
        reply = usage.completion_tokens if counted else len(text.encode("utf-8", "replace")) // 3
        return Reply(text, prompt, reply, self._price(prompt, reply), finish)

    def _said(self, what: Any) -> str:
        """A server's words on one line."""
        return _one_line(self._without_key(str(what)))

    def _without_key(self, text: str) -> str:
        """Text without the key, which some servers repeat."""
        return text.replace(self._secret, "[key]") if self._secret else text

    def _pace(self, stop: threading.Event) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = max(self._next_start, start + self._interval) if self._interval else self._next_start
        stop.wait(max(0.0, start - time.monotonic()))

    def _hold_off(self, seconds: float) -> None:
        """Apply the pause that the server asked for to every thread of this process."""
        with self._lock:
            self._next_start = max(self._next_start, time.monotonic() + seconds)

    def _price(self, prompt: int, completion: int) -> float:
        settings = self.settings
        return (prompt * (settings.input_price or 0.0) + completion * (settings.output_price or 0.0)) / 1e6

    def _who(self) -> str:
        return f"{self.model} at {self.base_url or 'the default server'}"


def image_part(picture: str | Picture, max_side: int = 1024) -> dict[str, Any]:
    """An image as the ``image_url`` part of a message: a data URL, its longest side at most ``max_side`` pixels.

    A JPEG that fits is sent unchanged, another file that fits as PNG (lossless), and a larger one is resized and sent
    as JPEG. Transparent areas become white. A rotation in the EXIF data is left out, not applied, so that a served
    model sees the picture as a model in this process does.

    Raises:
        Fault: names the file that is missing, broken or suspiciously large (Pillow's decompression bomb limit).
    """
    name = str(picture) if isinstance(picture, str | Path) else "an image given as bytes"
    try:
        data = picture_bytes(Path(picture) if isinstance(picture, str) else picture)
    except OSError as error:
        raise Fault(
            f"{name}: the image cannot be read ({error.strerror}); put the file there or remove its record"
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            fits, kind = max(image.size) <= max_side, image.format
            if kind == "JPEG":
                image.draft("RGB", (max_side, max_side))
            image.load()
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # a server might apply it
            if not (fits and kind == "JPEG" and image.mode == "RGB" and not rotated):
                plain = flatten(image)
                plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                kind = "PNG" if fits and kind != "JPEG" else "JPEG"
                plain.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
                data = buffer.getvalue()
    except Image.DecompressionBombError as error:
        raise Fault(
            f"{name}: the image is too large to open safely ({error}); resize it or remove its record"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise Fault(
            f"{name}: this is not a readable image ({_one_line(str(error))}); replace it or remove its record"
        ) from error
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def flatten(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent areas on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return rgb(image)


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 when absent or unreadable."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0

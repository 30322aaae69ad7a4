"""Any OpenAI-compatible server: bounded concurrency, back-off, a budget, and every reply kept on disk.

Judges, served models and the dispreference generator all ask through this file, so that nothing is asked twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import openai
from PIL import Image, ImageOps

from povid.fault import Fault
from povid.server.replies import Reply, ReplyFile, Spent

log = logging.getLogger(__name__)

RETRIED = {408, 409, 425, 429}  # and every 5xx
LOCAL_KEY = "none"  # servers of one's own ask for no key, the client insists on one


class NoReply(Fault):
    """The server did not answer one request, however often it was asked."""


class _Garbled(ValueError):
    """A reply with status 200 that is no chat completion."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the server. ``name`` is what errors call it ("record 17") and no part of the cache key.

    ``sample`` tells apart several replies to the same request; ``extra`` holds further arguments of the API.
    ``temperature=None`` leaves the choice to the server.
    """

    messages: Sequence[Mapping[str, Any]]
    temperature: float | None = 0.0
    max_tokens: int = 1024
    sample: int = 0
    name: str = "a request"
    extra: Mapping[str, Any] = field(default_factory=dict)


class Endpoint:
    """A chat model behind an OpenAI-compatible server.

    Args:
        model: name of the model as the server knows it.
        cache: JSON Lines file of replies, appended to the moment one arrives; several processes may share it.
        base_url: the server; default OPENAI_BASE_URL, else OpenAI's own.
        api_key_env: environment variable that holds the key; may be unset when ``base_url`` is given.
        concurrency: requests in flight at once from this process.
        timeout: seconds without an answer after which a try counts as failed.
        retries: further tries after the first, on 429, 5xx, time-outs, broken connections and garbled replies.
        backoff: seconds before the second try; doubles with each further one, with jitter.
        longest_wait: seconds that no single wait exceeds, a server's Retry-After included.
        requests_per_minute: pace of this process, if bounded.
        input_price, output_price: currency per million tokens.
        budget: currency that all replies in ``cache`` together may cost. ``token_budget``: the same in tokens.
        image_tokens: tokens reserved for one picture before the server has said what it took.
        max_tokens_key: some newer models want ``max_completion_tokens``.

    Requests that timed out are not counted as spent: no server tells what they cost.
    """

    def __init__(
        self,
        model: str,
        cache: str | Path,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        longest_wait: float = 120.0,
        requests_per_minute: float | None = None,
        input_price: float | None = None,
        output_price: float | None = None,
        budget: float | None = None,
        token_budget: int | None = None,
        image_tokens: int = 1100,
        max_tokens_key: str = "max_tokens",
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        key = os.environ.get(api_key_env) or (LOCAL_KEY if base_url else None)
        if key is None:
            raise Fault(
                f"no key for {model}: the environment variable {api_key_env} is not set; "
                f"set it, or give the base_url of a server that needs none"
            )
        if budget is not None and (input_price is None or output_price is None):
            raise Fault(
                f"budget={budget} for {model} needs input_price and output_price "
                "(currency per million tokens); give both, or use token_budget"
            )
        if concurrency < 1:
            raise Fault(f"concurrency={concurrency} sends nothing; give 1 or more")
        self.model, self.base_url, self.concurrency = model, base_url, concurrency
        self.retries, self.backoff, self.longest_wait = retries, backoff, longest_wait
        self.prices = (input_price or 0.0, output_price or 0.0)
        self.image_tokens, self.max_tokens_key = image_tokens, max_tokens_key
        self.paid = Spent()  # by this process
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0
        self._lock = threading.RLock()
        self._file = ReplyFile(Path(cache), budget, token_budget)
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)

    # ------------------------------------------------------------------ asking

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        temperature: float | None = 0.0,
        max_tokens: int = 1024,
        sample: int = 0,
        name: str = "a request",
        **extra: Any,
    ) -> Reply:
        """Ask one question and wait. Raises NoReply, BudgetReached, or Fault with the server's own sentence (4xx)."""
        return self.ask(Request(messages, temperature, max_tokens, sample, name, extra))

    def ask(self, request: Request, stop: threading.Event | None = None) -> Reply:
        """``complete`` for a Request; a set ``stop`` ends the waiting between tries."""
        key = self.key(request)
        if (known := self._file.get(key)) is not None:
            return known
        with self._file.claim(key) as claim:
            self._file.read_new()
            if (known := self._file.get(key)) is not None:
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

    def ask_all(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply | NoReply]]:
        """Ask many, ``concurrency`` at once; yields (position, reply) in the order in which they come.

        ``requests`` is drawn from lazily, so a generator that encodes pictures holds few in memory. A request that
        stays without a reply is yielded as its NoReply and the others go on. A Fault (budget, a refused key, a
        request that the server rejects) is raised after the replies in flight have been yielded.
        """
        numbered = enumerate(requests)
        stop, failure, flying = threading.Event(), None, {}
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            while True:
                while failure is None and len(flying) < self.concurrency:
                    try:
                        position, request = next(numbered)
                    except StopIteration:
                        break
                    except Fault as error:  # a record that cannot be asked must not lose what is in flight
                        failure = error
                        break
                    flying[pool.submit(self.ask, request, stop)] = position
                if not flying:
                    break
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    position, error = flying.pop(future), future.exception()
                    if error is None:
                        yield position, future.result()
                    elif isinstance(error, NoReply):
                        yield position, error
                    else:
                        failure = failure or error
            if failure is not None:
                raise failure
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def total(self) -> Spent:
        """What everybody who wrote to the cache has spent."""
        return self._file.total

    def known(self, request: Request) -> Reply | None:
        """The reply that is on disk already, if there is one."""
        return self._file.get(self.key(request))

    def key(self, request: Request) -> str:
        """sha256 of all that determines the reply; pictures count by their bytes, the server's address does not."""
        whole = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "sample": request.sample,
            "extra": dict(request.extra),
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def estimate(self, request: Request) -> Reply:
        """Upper estimate of what a request takes (text empty): a token per 3 bytes, max_tokens of reply."""
        pictures, size = 0, 0
        for message in request.messages:
            content = message["content"]
            for part in [{"text": content}] if isinstance(content, str) else content:
                pictures += "image_url" in part
                size += len(part.get("text", "").encode("utf-8", "replace"))
        prompt = size // 3 + 8 * len(request.messages) + 8 + pictures * self.image_tokens
        return Reply("", prompt, request.max_tokens, self._price(prompt, request.max_tokens), "")

    # ------------------------------------------------------------------ one request on the wire

    def _send(self, request: Request, stop: threading.Event) -> Reply:
        # half characters (lone surrogates) cannot go over the wire
        sendable = json.loads(json.dumps(list(request.messages), ensure_ascii=False).encode("utf-8", "replace"))
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": sendable,
            self.max_tokens_key: request.max_tokens,
            **request.extra,
        }
        if request.temperature is not None:
            arguments["temperature"] = request.temperature
        for attempt in range(self.retries + 1):
            self._pace(stop)
            asked_wait = 0.0
            try:
                return self._read(self._client.chat.completions.create(**arguments), request)
            except openai.APIStatusError as error:
                reason = f"status {error.status_code}: {_one_line(error.message)}"
                hopeless = error.code == "insufficient_quota"
                if hopeless or not (error.status_code in RETRIED or error.status_code >= 500):
                    raise Fault(
                        f"{request.name}: {self._who()} refused it with {reason}; mend the request, "
                        "the key or the model's name"
                    ) from error
                asked_wait = _retry_after(error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                reason = f"no answer within {self._client.timeout} s"
            except openai.APIConnectionError as error:
                reason = f"the connection failed ({_one_line(str(error.__cause__ or error))})"
            except (openai.APIError, _Garbled, ValueError) as error:
                reason = f"a reply that is no chat completion ({_one_line(str(error))})"
            if attempt == self.retries or stop.is_set():
                break
            pause = min(self.backoff * 2**attempt * random.uniform(0.5, 1.5), self.longest_wait)
            if asked_wait:
                self._hold_off(min(asked_wait, self.longest_wait))
            log.info("%s: %s; trying again in %.1f s", request.name, reason, max(pause, asked_wait))
            stop.wait(pause)
        raise NoReply(
            f"{request.name}: {self._who()} gave no reply in {attempt + 1} tries, last {reason}; "
            "run again to ask only what is open, or raise timeout or retries"
        )

    def _read(self, completion: Any, request: Request) -> Reply:
        choices = completion.choices if isinstance(completion, openai.types.chat.ChatCompletion) else None
        if not choices or choices[0].message is None:
            raise _Garbled(str(completion)[:120])
        message, usage = choices[0].message, completion.usage
        text = message.content or message.refusal or ""
        if not isinstance(text, str):
            raise _Garbled(str(text)[:120])
        guess = self.estimate(request)
        prompt = usage.prompt_tokens if usage and usage.prompt_tokens is not None else guess.prompt_tokens
        counted = usage is not None and usage.completion_tokens is not None
        reply = usage.completion_tokens if counted else len(text.encode("utf-8", "replace")) // 3
        return Reply(text, prompt, reply, self._price(prompt, reply), choices[0].finish_reason or "")

    def _pace(self, stop: threading.Event) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = max(self._next_start, start + self._interval) if self._interval else self._next_start
        stop.wait(max(0.0, start - time.monotonic()))

    def _hold_off(self, seconds: float) -> None:
        """The server asked for a pause: it holds for every thread of this process."""
        with self._lock:
            self._next_start = max(self._next_start, time.monotonic() + seconds)

    def _price(self, prompt: int, completion: int) -> float:
        return (prompt * self.prices[0] + completion * self.prices[1]) / 1e6

    def _who(self) -> str:
        return f"{self.model} at {self.base_url or 'the default server'}"


def image_part(picture: str | Path | bytes, max_side: int = 1024) -> dict[str, Any]:
    """A picture as the ``image_url`` part of a message: a data URL, longest side at most ``max_side`` pixels.

    JPEG files that fit go as they are; other files that fit go as PNG, so that nothing is lost; what must be made
    smaller goes as JPEG. Transparent parts become white.

    Raises:
        Fault: names the file that is absent, broken or far too large to be a photograph (Pillow's bomb limit).
    """
    name = "a picture given as bytes" if isinstance(picture, bytes) else str(picture)
    try:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
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
            plain = ImageOps.exif_transpose(image)
            turned = plain.size != image.size or image.getexif().get(0x0112, 1) != 1
            if not (fits and kind == "JPEG" and image.mode == "RGB" and not turned):
                plain = flatten(plain)
                plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                kind = "PNG" if fits and kind != "JPEG" else "JPEG"
                plain.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
                data = buffer.getvalue()
    except Image.DecompressionBombError as error:
        raise Fault(
            f"{name}: the image is too large to open safely ({error}); make it smaller or remove its record"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise Fault(
            f"{name}: this is no image that can be read ({_one_line(str(error))}); replace it or remove its record"
        ) from error
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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

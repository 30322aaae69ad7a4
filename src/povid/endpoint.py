"""Any OpenAI-compatible server: bounded concurrency, back-off, a budget, and every reply kept on disk.

Judges, served models and the dispreference generator all ask through this file, so that nothing is asked twice.
"""

from __future__ import annotations

import base64
import fcntl
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import openai
from PIL import Image, ImageOps

from povid.fault import Fault

log = logging.getLogger(__name__)

RETRIED = {408, 409, 425, 429}  # and every 5xx
LOCAL_KEY = "none"              # servers of one's own ask for no key, the client insists on one


class NoReply(Fault):
    """The server did not answer one request, however often it was asked."""


class BudgetReached(Fault):
    """The next request could exceed the budget; nothing was sent."""


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


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; ``cost`` in the currency of the prices (0 without prices), ``cached`` if it was on disk."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    finish_reason: str
    cached: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Spent:
    """What requests have cost: their number, tokens and money."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, reply: Reply) -> None:
        self.requests += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cost += reply.cost

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


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
            raise Fault(f"no key for {model}: the environment variable {api_key_env} is not set; "
                        f"set it, or give the base_url of a server that needs none")
        if budget is not None and (input_price is None or output_price is None):
            raise Fault(f"budget={budget} for {model} needs input_price and output_price "
                        "(currency per million tokens); give both, or use token_budget")
        if concurrency < 1:
            raise Fault(f"concurrency={concurrency} sends nothing; give 1 or more")
        self.model, self.base_url, self.concurrency = model, base_url, concurrency
        self.retries, self.backoff, self.longest_wait = retries, backoff, longest_wait
        self.prices = (input_price or 0.0, output_price or 0.0)
        self.budget, self.token_budget = budget, token_budget
        self.image_tokens, self.max_tokens_key = image_tokens, max_tokens_key
        self.paid = Spent()   # by this process
        self.total = Spent()  # by everybody who wrote to the cache
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0
        self._lock = threading.RLock()
        self._replies: dict[str, Reply] = {}
        self._read_to = 0
        self._cache = Path(cache)
        self._claims = self._cache.with_name(self._cache.name + ".claims")
        try:
            self._claims.mkdir(parents=True, exist_ok=True)
            self._cache.touch()
        except OSError as error:
            raise Fault(f"{self._cache}: replies cannot be kept there ({error.strerror}); "
                        "choose a file in a folder that can be written") from error
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)
        self._read_new()

    # ------------------------------------------------------------------ asking

    def complete(self, messages: Sequence[Mapping[str, Any]], *, temperature: float | None = 0.0,
                 max_tokens: int = 1024, sample: int = 0, name: str = "a request", **extra: Any) -> Reply:
        """Ask one question and wait. Raises NoReply, BudgetReached, or Fault with the server's own sentence (4xx)."""
        return self.ask(Request(messages, temperature, max_tokens, sample, name, extra))

    def ask(self, request: Request, stop: threading.Event | None = None) -> Reply:
        """``complete`` for a Request; a set ``stop`` ends the waiting between tries."""
        key = self.key(request)
        if (known := self._known(key)) is not None:
            return known
        with self._claim(key) as claim:
            self._read_new()
            if (known := self._known(key)) is not None:
                return known
            stop = stop or threading.Event()
            self._reserve(claim, request, stop)
            reply = self._send(request, stop)
            self._keep(key, request, reply)
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

    def known(self, request: Request) -> Reply | None:
        """The reply that is on disk already, if there is one."""
        return self._known(self.key(request))

    def key(self, request: Request) -> str:
        """sha256 of all that determines the reply; pictures count by their bytes, the server's address does not."""
        whole = {"model": self.model, "messages": list(request.messages), "temperature": request.temperature,
                 "max_tokens": request.max_tokens, "sample": request.sample, "extra": dict(request.extra)}
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
        arguments: dict[str, Any] = {"model": self.model, "messages": sendable,
                                     self.max_tokens_key: request.max_tokens, **request.extra}
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
                    raise Fault(f"{request.name}: {self._who()} refused it with {reason}; mend the request, "
                                "the key or the model's name") from error
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
        raise NoReply(f"{request.name}: {self._who()} gave no reply in {attempt + 1} tries, last {reason}; "
                      "run again to ask only what is open, or raise timeout or retries")

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

    # ------------------------------------------------------------------ the file of replies

    def _known(self, key: str) -> Reply | None:
        with self._lock:
            return self._replies.get(key)

    def _read_new(self) -> None:
        """Take in the lines that this or another process has appended; a torn last line waits for its end."""
        with self._lock:
            with self._cache.open("rb") as file:
                file.seek(self._read_to)
                block = file.read()
            block = block[:block.rfind(b"\n") + 1]
            self._read_to += len(block)
            for line in block.splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except ValueError:  # a process was killed while writing; its request will be asked again
            log.warning("%s: one torn line is passed over: %s", self._cache, line[:60])
            return
        try:
            reply = Reply(record["text"], record["prompt_tokens"], record["completion_tokens"], record["cost"],
                          record["finish_reason"], cached=True)
            self._replies[record["key"]] = reply
        except (KeyError, TypeError) as error:
            raise Fault(f"{self._cache}: a line is no kept reply (it lacks {error}); "
                        "name another file, this one belongs to something else") from error
        self.total.add(reply)

    def _keep(self, key: str, request: Request, reply: Reply) -> None:
        record = {"key": key, "name": request.name, "model": self.model, "temperature": request.temperature,
                  "max_tokens": request.max_tokens, "sample": request.sample, "text": reply.text,
                  "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens,
                  "cost": reply.cost, "finish_reason": reply.finish_reason,
                  "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps(record).encode() + b"\n"
        with self._file_locked() as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line  # closes a line that a killed process left open
            try:
                file.write(line)
                file.flush()
            except OSError as error:
                raise Fault(f"{self._cache}: the reply to {request.name} could not be written ({error.strerror}); "
                            "make room and run again") from error
        with self._lock:
            self.paid.add(reply)
        self._read_new()

    @contextmanager
    def _file_locked(self) -> Iterator[Any]:
        with self._cache.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    # ------------------------------------------------------------------ claims: a request in flight, and its reserve

    @contextmanager
    def _claim(self, key: str) -> Iterator[int]:
        """Wait until nobody else is asking this. The lock dies with its process, so a kill leaves nothing stuck."""
        path = self._claims / key
        while True:
            claim = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(claim, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino == os.fstat(claim).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(claim)  # its last owner removed it while this process waited
        try:
            yield claim
        finally:
            path.unlink(missing_ok=True)
            os.close(claim)

    def _reserve(self, claim: int, request: Request, stop: threading.Event) -> None:
        """Set aside what the request may cost; waits while others' reserves might still turn out smaller."""
        if self.budget is None and self.token_budget is None:
            return
        need = self.estimate(request)
        while True:
            with self._file_locked():
                self._read_new()
                money, tokens = self._reserved()
                if self._fits(need.cost + money, need.tokens + tokens):
                    os.pwrite(claim, json.dumps([need.cost, need.tokens]).encode(), 0)
                    return
                if not self._fits(need.cost, need.tokens) or stop.is_set():
                    limit = f"{self.budget:g}" if self.budget is not None else f"{self.token_budget} tokens"
                    raise BudgetReached(
                        f"{request.name}: stopped before the budget of {limit} would be exceeded ({self.total.cost:.4f}"
                        f" and {self.total.tokens} tokens spent so far in {self._cache}, up to {need.cost:.4f} and "
                        f"{need.tokens} tokens needed next); raise the budget to go on")
            stop.wait(0.05)

    def _fits(self, cost: float, tokens: int) -> bool:
        return ((self.budget is None or self.total.cost + cost <= self.budget)
                and (self.token_budget is None or self.total.tokens + tokens <= self.token_budget))

    def _reserved(self) -> tuple[float, int]:
        """What requests in flight, of every process, have set aside; leftovers of killed ones are cleared away."""
        money, tokens = 0.0, 0
        for path in self._claims.iterdir():
            try:
                claim = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                if amount := os.pread(claim, 200, 0):
                    money, tokens = money + json.loads(amount)[0], tokens + json.loads(amount)[1]
            finally:
                os.close(claim)
        return money, tokens


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
        raise Fault(f"{name}: the image cannot be read ({error.strerror}); put the file there "
                    "or remove its record") from error
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
        raise Fault(f"{name}: the image is too large to open safely ({error}); make it smaller "
                    "or remove its record") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise Fault(f"{name}: this is no image that can be read ({_one_line(str(error))}); replace it "
                    "or remove its record") from error
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

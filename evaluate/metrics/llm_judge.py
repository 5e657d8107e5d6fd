"""A client for the judge of autointerp: any endpoint of the OpenAI chat-completions protocol."""

import contextlib
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from ...common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ...common.files import digest_of, parse_json
from ...common.formatting import format_bytes
from ...common.schemas import JUDGE_ANSWERS_RECORD

Message = dict[str, str]  # role, content
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before each retry of a busy or unreachable endpoint
MAX_WAIT = 60  # seconds that an endpoint's Retry-After may ask for
MAX_ANSWER_TOKENS = 100
MAX_REPLY = 1 << 20  # bytes that are read of a reply
MAX_ANSWER = 10_000  # characters of an answer; more are cut off
Result = TypeVar("Result")


class Judge(Protocol):
    """Answers a conversation with a text."""

    def ask(self, messages: Sequence[Message], /) -> str: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key is sent to the given URL only."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """A chat model at `url`, the base URL of an API such as https://api.openai.com/v1. Thread-safe.

    A busy or unreachable endpoint is retried after each of `waits` seconds. Raises UnavailableError if it refuses or
    does not answer with a chat completion of bounded size in bounded time, UsageError for an invalid URL or an unknown
    model.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 60.0  # seconds without a byte
    time_limit: float = 300.0  # seconds for an answer, from the connection to its last byte
    waits: Sequence[float] = RETRY_WAITS
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            port = parts.port  # raises ValueError for an invalid port
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        spaced = any(character.isspace() for character in self.url)
        if spaced or port == 0 or parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise UsageError(
                f"autointerp.endpoint={self.url} is not a valid URL (http or https, without a password). "
                "Give one such as https://api.openai.com/v1."
            )

    def ask(self, messages: Sequence[Message]) -> str:
        """Send the messages and return the text of the reply."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for wait in (*self.waits, None):
            try:
                reply = within(self.time_limit, partial(self.exchange, request))
            except TimeLimitExceeded:
                raise UnavailableError(
                    f"The judge at {self.url} did not finish its answer within {self.time_limit:g} s. Try again, or "
                    "choose a faster judge."
                ) from None
            except (OSError, HTTPException) as error:  # URLError and TimeoutError among them
                if wait is None:
                    problem = getattr(error, "reason", None) or str(error) or type(error).__name__
                    raise UnavailableError(
                        f"The judge at {self.url} could not be reached in {len(self.waits) + 1} attempts: {problem}. "
                        "Check the network and --set autointerp.endpoint=..."
                    ) from error
                self.sleep(wait)
                continue
            if 200 <= reply.code < 300:
                return parse_reply(reply.body, self.url)
            if (reply.code != 429 and reply.code < 500) or wait is None:
                raise self.refusal(reply)
            after = reply.retry_after
            self.sleep(max(wait, min(float(after), MAX_WAIT)) if after.isdecimal() else wait)
        raise AssertionError("the last attempt returns or raises")

    def exchange(self, request: urllib.request.Request) -> "Reply":
        """The endpoint's reply, whatever its status, of which at most MAX_REPLY bytes are read."""
        try:
            opened = urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            opened = error
        with opened as response:
            body = response.read(MAX_REPLY + 1)
            return Reply(response.status, response.reason, response.headers.get("Retry-After") or "", body)

    def refusal(self, error: "Reply") -> SaeError:
        """The error to raise for an HTTP error, with the endpoint's own message unless it contains the key."""
        message = ""
        with contextlib.suppress(Exception):  # the body may be anything
            body = parse_json(error.body, self.url)
            message = str(body["error"]["message"] if isinstance(body["error"], dict) else body["error"])[:200]
        reply = f" It says: {message}" if message and not (self.key and self.key in message) else ""
        if error.code in (401, 403):
            return UnavailableError(
                f"The judge at {self.url} refuses the key (HTTP {error.code}). Put a valid key into the environment "
                f"variable that autointerp.key_variable names.{reply}"
            )
        if error.code == 404:
            return UsageError(
                f"There is no chat model {self.model} at {self.url} (HTTP 404). Check "
                "--set autointerp.judge_model=... and --set autointerp.endpoint=..., which usually ends with "
                f"/v1.{reply}"
            )
        if error.code == 429:
            return UnavailableError(
                f"The judge at {self.url} accepts no more questions for now, or the account is used up (HTTP 429, "
                f"{len(self.waits) + 1} times). Try again later.{reply}"
            )
        return UnavailableError(f"The judge at {self.url} answered HTTP {error.code} {error.reason}.{reply}")


class Reply(NamedTuple):
    """A reply over HTTP."""

    code: int
    reason: str
    retry_after: str
    body: bytes


class TimeLimitExceeded(Exception):
    """A call did not return in time."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of a call. Raises TimeLimitExceeded if it takes longer; it then goes on in a thread of its own.

    The timeout of a socket is for one read: a server that sends a byte a minute never exceeds it.
    """
    outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeLimitExceeded from None
    if error is not None:
        raise error
    return result


def parse_reply(reply: bytes, url: str) -> str:
    """The text of a chat completion, at most MAX_ANSWER characters. Raises UnavailableError for any other reply."""
    if len(reply) > MAX_REPLY:
        raise UnavailableError(
            f"The judge at {url} answered with more than {format_bytes(MAX_REPLY)}; an answer has some hundred bytes. "
            "Check --set autointerp.endpoint=..."
        )
    try:
        content = parse_json(reply, url)["choices"][0]["message"]["content"]
    except (DamagedError, LookupError, TypeError):
        content = False
    if content is not None and not isinstance(content, str):
        raise UnavailableError(
            f"The judge at {url} did not answer with a chat completion. Check --set autointerp.endpoint=..., which "
            "usually ends with /v1."
        )
    return (content or "")[:MAX_ANSWER]


class KeptAnswers:
    """A judge whose answers are kept in a file if it stops answering, so that they are not asked and paid for twice.

    Raises DamagedError if the file cannot be read.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge, self.path = judge, path
        # Digest of the question -> answer.
        self.answers = dict(JUDGE_ANSWERS_RECORD.read(path)["answers"]) if path.exists() else {}

    def ask(self, messages: Sequence[Message]) -> str:
        question = digest_of(list(messages))
        if question not in self.answers:
            self.answers[question] = self.judge.ask(messages)
        return self.answers[question]

    @contextlib.contextmanager
    def kept_if_interrupted(self) -> Iterator[None]:
        """Write the file if the block fails or is interrupted."""
        try:
            yield
        except BaseException:
            if self.answers:
                JUDGE_ANSWERS_RECORD.write(self.path, {"answers": dict(self.answers)})
            raise


def read_key(variable: str) -> str:
    """The key in an environment variable, or "" if it is not set: a local endpoint needs none."""
    return os.environ.get(variable, "").strip()

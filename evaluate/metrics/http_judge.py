"""A judge at a URL: any endpoint with the OpenAI chat-completions protocol, called through httpx2."""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ...common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ...common.files import parse_json
from ...common.formatting import format_bytes, format_count
from ...common.packages import import_extra
from .llm_judge import MAX_ANSWER_TOKENS, KeepAnswer, Message

PARALLEL_QUESTIONS = 10
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before each retry of a busy or unreachable endpoint
MAX_WAIT = 60  # longest wait in seconds that an endpoint's Retry-After may request
GRACE = 5.0  # seconds to wait for the answers to pending questions after an error or Ctrl-C
POLL = 0.1  # seconds between checks whether to stop
MAX_REPLY = 1 << 20  # bytes of a reply that are read
MAX_ANSWER = 10_000  # characters after which an answer is cut off


class Reply(NamedTuple):
    """A reply over HTTP."""

    code: int
    reason: str
    retry_after: str
    body: bytes


@dataclass(frozen=True)
class Endpoint:
    """A chat model at `url`, the base URL of an API such as https://api.openai.com/v1.

    If the endpoint is busy or unreachable, the request is sent again after each wait in `waits` (in seconds).
    Redirects are not followed, so the key is sent only to `url`. Raises UnavailableError if the endpoint rejects a
    request or does not return a chat completion within the limits of size and time, and UsageError for an invalid URL
    or key or an unknown model.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0  # longest time in seconds without a byte
    time_limit: float = 300.0  # seconds for an answer, from the connection to its last byte
    waits: Sequence[float] = RETRY_WAITS
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        try:
            self._httpx.URL(self.url)
            parts = urlsplit(self.url)
            port = parts.port  # raises ValueError for an invalid port, which httpx2 does not check
        except (ValueError, self._httpx.InvalidURL):
            parts, port = urlsplit(""), None
        spaced = any(character.isspace() for character in self.url)
        secret = "@" in parts.netloc or parts.query or parts.fragment  # settings are stored with every result
        if spaced or port == 0 or parts.scheme not in ("http", "https") or not parts.netloc or secret:
            raise UsageError(
                f"autointerp.endpoint={self.url} is not a valid URL (http or https, without a password or a query). "
                "Give one such as https://api.openai.com/v1."
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(
                "The key in the environment variable named by autointerp.key_variable contains characters that are not "
                "allowed in a key, such as a line break or a non-ASCII letter. Set the variable again."
            )

    def ask(self, messages: Sequence[Message]) -> str:
        """Send one question and return the text of the reply."""
        answers: list[str] = []
        self.answer_all([messages], lambda _, answer: answers.append(answer))
        return answers[0]

    def answer_all(self, questions: Sequence[Sequence[Message]], keep: KeepAnswer) -> None:
        """Ask all questions, PARALLEL_QUESTIONS at a time, and call `keep(index, answer)` as each answer arrives.

        After an error or Ctrl-C, no further question is asked. Pending questions are already paid for, so their answers
        are awaited for up to GRACE seconds.
        """
        stop = threading.Event()
        with futures.ThreadPoolExecutor(1) as thread:  # a new thread: a notebook's thread already runs an event loop
            try:
                asking = thread.submit(asyncio.run, self._ask_in_parallel(questions, keep, stop))
                # If Ctrl-C arrives just as a wait begins, Python handles it only after the wait.
                while not futures.wait([asking], timeout=POLL).done:
                    pass
                asking.result()
            except BaseException:
                stop.set()
                raise

    async def _ask_in_parallel(
        self, questions: Sequence[Sequence[Message]], keep: KeepAnswer, stop: threading.Event
    ) -> None:
        waiting = deque(enumerate(questions))

        async def ask_in_turn() -> None:
            while waiting:
                index, messages = waiting.popleft()
                keep(index, await self._ask(client, messages))

        async with self._httpx.AsyncClient(timeout=self.timeout) as client:
            tasks = {asyncio.create_task(ask_in_turn()) for _ in range(min(PARALLEL_QUESTIONS, len(questions)))}
            pending = set(tasks)
            while pending and not stop.is_set() and not any(task.done() and task.exception() for task in tasks):
                _, pending = await asyncio.wait(pending, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
            waiting.clear()
            if pending:
                _, pending = await asyncio.wait(pending, timeout=GRACE)
            for task in pending:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise errors[0]

    @property
    def _httpx(self) -> Any:
        return import_extra("judge", f"autointerp.endpoint={self.url}")

    async def _ask(self, client: Any, messages: Sequence[Message]) -> str:
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
        for wait in (*self.waits, None):
            pause = wait
            try:
                async with asyncio.timeout(self.time_limit):
                    reply = await self._exchange(client, body)
            except TimeoutError:
                raise UnavailableError(
                    f"The judge at {self.url} did not finish its answer within {self.time_limit:g} s. Try again, or "
                    "choose a faster judge."
                ) from None
            except self._httpx.HTTPError as error:  # no connection, a broken connection, a timeout
                if wait is None:
                    silent = isinstance(error, self._httpx.TimeoutException)
                    cause = f"no data arrived within {self.timeout:g} s" if silent else describe_cause(error)
                    attempts = format_count(len(self.waits) + 1, "attempt")
                    raise UnavailableError(
                        f"The judge at {self.url} could not be reached in {attempts}: {cause}. Check the network and "
                        "--set autointerp.endpoint=..."
                    ) from error
            else:
                if 200 <= reply.code < 300:
                    return parse_reply(reply.body, self.url)
                if (reply.code != 429 and reply.code < 500) or wait is None:
                    raise self.refusal(reply)
                if reply.retry_after.isdecimal():
                    pause = max(wait, min(float(reply.retry_after), MAX_WAIT))
            await self.sleep(pause or 0)
        raise AssertionError("the last attempt returns or raises")

    async def _exchange(self, client: Any, body: dict[str, Any]) -> Reply:
        """The endpoint's reply with any status. Little more than MAX_REPLY bytes of it are read."""
        # A compressed reply could expand without limit, so compression is not requested and nothing is unpacked.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        data = bytearray()
        async with client.stream("POST", address, json=body, headers=headers, follow_redirects=False) as response:
            async for part in response.aiter_raw():
                data += part
                if len(data) > MAX_REPLY:
                    break
            after = response.headers.get("Retry-After", "")
            return Reply(response.status_code, response.reason_phrase, after, bytes(data))

    def refusal(self, error: Reply) -> SaeError:
        """The error to raise for an HTTP error, with the endpoint's own message unless it contains the key."""
        message = ""
        with contextlib.suppress(Exception):  # the body may be anything
            body = parse_json(error.body, self.url)
            message = str(body["error"]["message"] if isinstance(body["error"], dict) else body["error"])[:200]
        reply = f" It says: {message}" if message and not (self.key and self.key in message) else ""
        if error.code in (401, 403):
            return UnavailableError(
                f"The judge at {self.url} rejects the key (HTTP {error.code}). Put a valid key into the "
                f"environment variable named by autointerp.key_variable.{reply}"
            )
        if error.code == 404:
            return UsageError(
                f"There is no chat model {self.model} at {self.url} (HTTP 404). Check --set autointerp.judge_model=... "
                f"and --set autointerp.endpoint=..., which usually ends with /v1.{reply}"
            )
        if error.code == 429:
            return UnavailableError(
                f"The judge at {self.url} accepts no more questions for now, or the account has no credit "
                f"left (HTTP 429 in {len(self.waits) + 1} attempts). Try again later.{reply}"
            )
        hint = "Try again later, or look at the server's log."
        if error.code < 400:
            hint = "Redirects are not followed. Give the target address with --set autointerp.endpoint=..."
        elif error.code < 500:
            hint = "Check --set autointerp.judge_model=... and --set autointerp.endpoint=..."
        return UnavailableError(f"The judge at {self.url} answered HTTP {error.code} {error.reason}.{reply} {hint}")


def describe_cause(error: BaseException) -> str:
    """The root cause of an error, since httpx2 itself reports only that all attempts failed."""
    *_, lowest = causes(error)
    if isinstance(lowest, ConnectionError) and lowest.errno:  # asyncio's own message gives no reason
        return os.strerror(lowest.errno)
    return str(lowest) or type(lowest).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


def parse_reply(reply: bytes, url: str) -> str:
    """The text of a chat completion, at most MAX_ANSWER characters. Raises UnavailableError for any other reply."""
    if len(reply) > MAX_REPLY:
        raise UnavailableError(
            f"The judge at {url} answered with more than {format_bytes(MAX_REPLY)}; an answer should have a "
            "few hundred bytes. Check --set autointerp.endpoint=..."
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

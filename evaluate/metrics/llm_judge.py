"""A client for the judge of autointerp: any endpoint of the OpenAI chat-completions protocol."""

import contextlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol

from ...common.errors import SaeError, UnavailableError, UsageError

Message = dict[str, str]  # role, content
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds before each retry of a busy or unreachable endpoint
MAX_WAIT = 60  # seconds that an endpoint's Retry-After may ask for
MAX_ANSWER_TOKENS = 100


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

    A busy or unreachable endpoint is retried after each of `waits` seconds. Raises UnavailableError if it does not
    answer or refuses, UsageError for an invalid URL or an unknown model.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 60.0
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
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as reply:
                    return parse_reply(reply.read(), self.url)
            except urllib.error.HTTPError as error:
                if (error.code != 429 and error.code < 500) or wait is None:
                    raise self.refusal(error) from None
                retry_after = error.headers.get("Retry-After") or ""
                self.sleep(max(wait, min(float(retry_after), MAX_WAIT)) if retry_after.isdecimal() else wait)
            except (OSError, HTTPException) as error:  # URLError and TimeoutError among them
                if wait is None:
                    problem = getattr(error, "reason", None) or str(error) or type(error).__name__
                    raise UnavailableError(
                        f"The judge at {self.url} could not be reached in {len(self.waits) + 1} attempts: {problem}. "
                        "Check the network and --set autointerp.endpoint=..."
                    ) from error
                self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def refusal(self, error: urllib.error.HTTPError) -> SaeError:
        """The error to raise for an HTTP error, with the endpoint's own message unless it contains the key."""
        message = ""
        with contextlib.suppress(Exception):  # the body may be anything
            body = json.loads(error.read(10_000))
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


def parse_reply(reply: bytes, url: str) -> str:
    """The text of a chat completion. Raises UnavailableError for any other reply."""
    try:
        return str(json.loads(reply)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError) as error:
        raise UnavailableError(
            f"The judge at {url} did not answer with a chat completion. Check --set autointerp.endpoint=..., which "
            "usually ends with /v1."
        ) from error


def read_key(variable: str) -> str:
    """The key in an environment variable, or "" if it is not set: a local endpoint needs none."""
    return os.environ.get(variable, "").strip()

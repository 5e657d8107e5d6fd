"""A language model that is asked in words: whatever speaks the OpenAI protocol of chat completions, by its URL."""

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
RETRY_WAITS = (1, 2, 4, 8, 16)  # seconds, before an endpoint that is busy or not reached is tried again
MAX_WAIT = 60  # seconds: of those that an endpoint may ask for
MAX_ANSWER_TOKENS = 100  # of an answer


class Judge(Protocol):
    def ask(self, messages: Sequence[Message], /) -> str: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the URL that was given and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """`url` is what clients call the base URL, such as https://api.openai.com/v1. Calls may run in several threads.

    A busy or unreachable endpoint is tried again after each of `waits`. Raises OutsideError when it does not answer or
    refuses, UsageError for a URL or a model that is none.
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
            port = parts.port  # ValueError for one that is none
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        spaced = any(character.isspace() for character in self.url)
        if spaced or port == 0 or parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise UsageError(
                f"autointerp.endpoint={self.url} is no URL without a password. Give one such as https://api.openai.com/v1."
            )

    def ask(self, messages: Sequence[Message]) -> str:
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
                asked = error.headers.get("Retry-After") or ""
                self.sleep(max(wait, min(float(asked), MAX_WAIT)) if asked.isdecimal() else wait)
            except (OSError, HTTPException) as error:  # URLError and TimeoutError among them
                if wait is None:
                    problem = getattr(error, "reason", None) or str(error) or type(error).__name__
                    raise UnavailableError(
                        f"The judge at {self.url} could not be reached, {len(self.waits) + 1} times: {problem}. "
                        "Check the network and --set autointerp.endpoint=..."
                    ) from error
                self.sleep(wait)
        raise AssertionError("the last turn returns or raises")

    def refusal(self, error: urllib.error.HTTPError) -> SaeError:
        """The sentence for a reply that is none."""
        said = ""
        with contextlib.suppress(Exception):  # it may be anything
            found = json.loads(error.read(10_000))
            said = str(found["error"]["message"] if isinstance(found["error"], dict) else found["error"])[:200]
        said = f" It says: {said}" if said and not (self.key and self.key in said) else ""
        if error.code in (401, 403):
            return UnavailableError(
                f"The judge at {self.url} refuses the key (HTTP {error.code}). Put a valid one into the environment variable "
                f"that autointerp.key_variable names.{said}"
            )
        if error.code == 404:
            return UsageError(
                f"There is no chat model {self.model} at {self.url} (HTTP 404). Check --set autointerp.judge_model=... and "
                f"--set autointerp.endpoint=..., which usually ends with /v1.{said}"
            )
        if error.code == 429:
            return UnavailableError(
                f"The judge at {self.url} takes no more questions for now, or the account is used up (HTTP 429, "
                f"{len(self.waits) + 1} times). Try again later.{said}"
            )
        return UnavailableError(f"The judge at {self.url} answered HTTP {error.code} {error.reason}.{said}")


def parse_reply(reply: bytes, url: str) -> str:
    try:
        return str(json.loads(reply)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError) as error:
        raise UnavailableError(
            f"What the judge at {url} answered is no chat completion. Check --set autointerp.endpoint=..., which usually ends with /v1."
        ) from error


def read_key(variable: str) -> str:
    """The key that an environment variable holds; none, as for an endpoint on one's own machine."""
    return os.environ.get(variable, "").strip()

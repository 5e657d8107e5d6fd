"""The client of a judge against a local server: retries, refusals, invalid URLs."""

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.metrics.llm_judge import Endpoint

MESSAGES = [{"role": "user", "content": "Which?"}]


def test_a_busy_endpoint_is_waited_for(server):
    slept = []
    server.replies = [
        (429, {"Retry-After": "7"}, {}),
        (503, {}, b"busy"),
        server.completion("yes"),
        server.completion(""),
    ]
    judge = Endpoint(server.url + "/", "m", waits=(1, 2), sleep=slept.append)
    assert judge.ask(MESSAGES) == "yes" and slept == [7, 2]
    assert judge.ask(MESSAGES) == ""
    assert server.seen[0][1] is None and server.seen[0][2]["messages"] == MESSAGES


@pytest.mark.parametrize(
    ("reply", "error", "sentence", "asked"),
    [
        (
            (403, {}, {"error": {"message": "key k is bad"}}),
            UnavailableError,
            r"refuses the key \(HTTP 403\).*names\.$",
            1,
        ),
        (
            (404, {}, {"error": "no model"}),
            UsageError,
            r"no chat model m at .* usually ends with /v1\. It says: no model",
            1,
        ),
        (
            (429, {}, {"error": {"message": "quota"}}),
            UnavailableError,
            r"HTTP 429, 3 times\)\. Try again later\. It says: quota",
            3,
        ),
        ((500, {}, b"<html>"), UnavailableError, "answered HTTP 500 Internal Server Error", 3),
        (
            (400, {}, {"error": {"message": "max_tokens"}}),
            UnavailableError,
            "answered HTTP 400 .* It says: max_tokens",
            1,
        ),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), UnavailableError, "answered HTTP 302", 1),
        ((200, {}, b"<html>"), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, {"choices": []}), UnavailableError, "did not answer with a chat completion", 1),
    ],
)
def test_what_an_endpoint_refuses_is_a_sentence(server, reply, error, sentence, asked):
    server.replies = [reply]
    with pytest.raises(error, match=sentence):
        Endpoint(server.url, "m", "key k", waits=(0, 0), sleep=lambda _: None).ask(MESSAGES)
    assert len(server.seen) == asked


def test_an_endpoint_that_is_not_there_is_a_sentence():
    slept = []
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1/v1 could not be reached in 3 attempts: .*refused"):
        Endpoint("http://127.0.0.1:1/v1", "m", waits=(1, 2), sleep=slept.append).ask(MESSAGES)
    assert slept == [1, 2]


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "file:///etc/passwd",
        "https://",
        "https://me:secret@host/v1",
        "http://[::1/v1",
        "http://h:99999/v1",
        "http://a b/v1",
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UsageError, match="is not a valid URL"):
        Endpoint(url, "m")

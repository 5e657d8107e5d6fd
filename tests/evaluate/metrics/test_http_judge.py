"""The client of a judge against a local server: retries, refusals, invalid URLs."""

import asyncio
import contextlib
import gzip
import signal
import socket
import threading
import time

import pytest

from sae.common import packages
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.metrics import http_judge
from sae.evaluate.metrics.http_judge import MAX_ANSWER, PARALLEL_QUESTIONS, Endpoint

MESSAGES = [{"role": "user", "content": "Which?"}]


def completion(content) -> dict:
    return {"choices": [{"message": {"content": content}}]}


def into(slept: list):
    """A replacement for asyncio.sleep that only records the seconds."""

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    return sleep


def test_a_busy_endpoint_is_waited_for(server):
    slept = []
    server.replies = [
        (429, {"Retry-After": "7"}, {}),
        (503, {}, b"busy"),
        server.completion("yes"),
        server.completion(""),
    ]
    judge = Endpoint(server.url + "/", "m", waits=(1, 2), sleep=into(slept))
    assert judge.ask(MESSAGES) == "yes" and slept == [7, 2]
    assert judge.ask(MESSAGES) == ""
    assert server.seen[0][1] is None and server.seen[0][2]["messages"] == MESSAGES


@pytest.mark.parametrize(
    ("reply", "error", "sentence", "asked"),
    [
        (
            (403, {}, {"error": {"message": "key k is bad"}}),
            UnavailableError,
            r"rejects the key \(HTTP 403\).*key_variable\.$",
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
            r"HTTP 429 in 3 attempts\)\. Try again later\. It says: quota",
            3,
        ),
        ((500, {}, b"<html>"), UnavailableError, r"answered HTTP 500 Internal Server Error\. Try again later", 3),
        (
            (400, {}, {"error": {"message": "max_tokens"}}),
            UnavailableError,
            r"answered HTTP 400 .* It says: max_tokens Check --set autointerp\.judge_model",
            1,
        ),
        (
            (302, {"Location": "http://127.0.0.1:9/"}, b""),
            UnavailableError,
            "answered HTTP 302 .*Give the target address",
            1,
        ),
        ((200, {}, b"<html>"), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, {"choices": []}), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, b"[" * 100_000), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, b"9" * 8000), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, b'{"choices": [{"message": {"content": "\xff"}}]}'), UnavailableError, "did not answer with a", 1),
        ((200, {}, completion(["a"])), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, completion(5)), UnavailableError, "did not answer with a chat completion", 1),
        ((200, {}, b" " * (2 << 20)), UnavailableError, "answered with more than", 1),
        ((500, {}, b"[" * 100_000), UnavailableError, "answered HTTP 500", 3),
        (
            (200, {"Content-Encoding": "gzip"}, gzip.compress(b'{"choices": [{"message": {"content": "a"}}]}')),
            UnavailableError,
            "did not answer with a chat completion",
            1,
        ),
        ((429, {"Retry-After": "9" * 5000}, b""), UnavailableError, "HTTP 429 in 3 attempts", 3),
    ],
)
def test_what_an_endpoint_refuses_is_a_sentence(server, reply, error, sentence, asked):
    server.replies = [reply]
    with pytest.raises(error, match=sentence):
        Endpoint(server.url, "m", "key k", waits=(0, 0), sleep=into([])).ask(MESSAGES)
    assert len(server.seen) == asked


def test_an_endpoint_that_is_not_there_is_a_sentence():
    slept = []
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1/v1 could not be reached in 3 attempts: .*refused"):
        Endpoint("http://127.0.0.1:1/v1", "m", waits=(1, 2), sleep=into(slept)).ask(MESSAGES)
    assert slept == [1, 2]


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "https://api.openai.com/v1?key=k",
        "https://api.openai.com/v1#k",
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


def endless(kind: str) -> tuple[str, threading.Thread]:
    """The URL of a server whose replies never end, and its thread, which ends when the client closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + (b"" if kind == "headers" else b"\r\n"))
            while True:
                connection.sendall(b"a" * (65536 if kind == "fast" else 1))
                if kind != "fast":
                    time.sleep(0.01)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", thread


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("fast", "answered with more than 1.0 MB"),
        ("slow", r"did not finish its answer within 0\.5 s"),
        ("headers", r"did not finish its answer within 0\.5 s"),
    ],
)
def test_an_answer_without_end_is_a_sentence(kind, sentence):
    url, thread = endless(kind)
    with pytest.raises(UnavailableError, match=sentence):
        Endpoint(url, "m", waits=(0,), time_limit=30 if kind == "fast" else 0.5).ask(MESSAGES)
    if kind == "fast":
        thread.join(timeout=30)
        assert not thread.is_alive()  # the connection was closed instead of being read further


def test_a_long_answer_is_cut(server):
    server.replies = [server.completion("x" * 50_000)]
    assert Endpoint(server.url, "m").ask(MESSAGES) == "x" * MAX_ANSWER


@pytest.mark.parametrize("key", ["k\nX-Injected: 1", "schl\u00fcssel", "a\x00b"])
def test_what_is_no_key_is_refused_and_not_shown(key):
    with pytest.raises(
        UsageError, match="named by autointerp.key_variable contains characters that are not allowed"
    ) as error:
        Endpoint("http://h/v1", "m", key)
    assert key not in str(error.value)


def test_a_key_is_not_in_the_repr_of_an_endpoint():
    assert "secret" not in repr(Endpoint("http://h/v1", "m", "secret"))


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(packages.EXTRAS, "judge", "no_such_package")
    with pytest.raises(UnavailableError, match=r"endpoint=http://h/v1 needs no_such_package.*sae-pipeline\[judge\]"):
        Endpoint("http://h/v1", "m")


def test_many_questions_are_asked_at_once_and_each_gets_its_own_answer(server):
    two, under_way, most = threading.Barrier(2), set(), []

    def reply(body):
        under_way.add(body["messages"][0]["content"])
        most.append(len(under_way))
        two.wait(30)  # until another question has arrived
        under_way.discard(body["messages"][0]["content"])
        return server.completion(body["messages"][0]["content"] + "!")

    server.replies = [reply]
    answers = {}
    questions = [[{"role": "user", "content": str(n)}] for n in range(40)]
    Endpoint(server.url, "m").answer_all(questions, answers.__setitem__)
    assert answers == {n: f"{n}!" for n in range(40)} and max(most) <= PARALLEL_QUESTIONS


def test_after_a_refusal_no_further_question_is_asked(server):
    server.replies = [(401, {}, {})]
    kept = []
    with pytest.raises(UnavailableError, match="rejects the key"):
        Endpoint(server.url, "m").answer_all([MESSAGES] * 50, lambda *answer: kept.append(answer))
    assert len(server.seen) <= PARALLEL_QUESTIONS and not kept


@pytest.fixture
def heeds_ctrl_c():
    """Install Python's SIGINT handler. A process that is started without a terminal may not have it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when(begun: threading.Event) -> None:
    """Once `begun` is set, send SIGINT to a thread that is not the main one, so that the main thread's wait goes on.

    This is the hard case of Ctrl-C: the kernel may deliver the signal to another thread, or to the main thread just
    before it starts to wait. In both cases the main thread handles the signal only after its wait.
    """

    def press() -> None:
        begun.wait(30)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def test_after_ctrl_c_answers_under_way_have_a_moment_and_no_more(server, monkeypatch, heeds_ctrl_c):
    monkeypatch.setattr(http_judge, "GRACE", 30.0)
    begun, stopping, released, hung = threading.Event(), threading.Event(), threading.Event(), []
    wait = asyncio.wait

    def watched(tasks, *, timeout=None, **rest):
        if timeout == http_judge.GRACE:
            stopping.set()
            return wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)  # until one answer
        return wait(tasks, timeout=timeout, **rest)

    monkeypatch.setattr(asyncio, "wait", watched)

    def reply(body):
        if body["messages"][0]["content"] == "1":
            begun.set()
            hung.append(released.wait(30))  # an endpoint that hangs
        stopping.wait(30)
        return server.completion("late")

    server.replies = [reply]
    kept: dict[int, str] = {}
    questions = [[{"role": "user", "content": str(n)}] for n in range(PARALLEL_QUESTIONS + 5)]
    interrupt_when(begun)
    with pytest.raises(KeyboardInterrupt):
        Endpoint(server.url, "m").answer_all(questions, kept.__setitem__)
    assert hung == [] and set(kept.values()) == {"late"} and 1 not in kept
    assert len(server.seen) <= PARALLEL_QUESTIONS  # no further question
    released.set()


def test_ctrl_c_ends_the_wait_before_a_retry(server, monkeypatch, heeds_ctrl_c):
    monkeypatch.setattr(http_judge, "GRACE", 0.1)
    begun, slept = threading.Event(), []

    async def sleep(seconds: float) -> None:
        begun.set()
        await asyncio.sleep(20)
        slept.append(seconds)

    server.replies = [(429, {"Retry-After": "60"}, {})]
    interrupt_when(begun)
    with pytest.raises(KeyboardInterrupt):
        Endpoint(server.url, "m", sleep=sleep).ask(MESSAGES)
    assert slept == [] and len(server.seen) == 1


def test_an_error_ends_questions_that_hang(server, monkeypatch):
    monkeypatch.setattr(http_judge, "GRACE", 0.1)
    begun, released, hung = threading.Event(), threading.Event(), []

    def reply(body):
        if body["messages"][0]["content"] == "1":
            begun.set()
            hung.append(released.wait(20))
        begun.wait(20)
        return (401, {}, {})

    server.replies = [reply]
    with pytest.raises(UnavailableError, match="rejects the key"):
        Endpoint(server.url, "m").answer_all([[{"role": "user", "content": str(n)}] for n in (0, 1)], lambda *_: None)
    assert hung == []
    released.set()


def test_an_endpoint_that_says_nothing_is_a_sentence(server):
    released = threading.Event()
    server.replies = [lambda body: server.completion(str(released.wait(20)))]
    with pytest.raises(UnavailableError, match=r"in 1 attempt: no data arrived within 0\.2 s\. Check the network"):
        Endpoint(server.url, "m", timeout=0.2, waits=()).ask(MESSAGES)
    released.set()


def test_a_notebook_can_ask_although_its_event_loop_runs(server):
    server.replies = [server.completion("yes")]

    async def cell() -> str:
        return Endpoint(server.url, "m").ask(MESSAGES)

    assert asyncio.run(cell()) == "yes"

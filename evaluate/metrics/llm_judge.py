"""The interface of autointerp's judges, and the file that stores their answers."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ...common.errors import DamagedError, UnavailableError
from ...common.evaluation_schemas import JUDGE_ANSWERS_RECORD
from ...common.files import digest_of, make_folder, os_error, parse_json, read_file
from .base import Progress

Message = dict[str, str]  # role, content
KeepAnswer = Callable[[int, str], Any]  # takes the index of a question and its answer
MAX_ANSWER_TOKENS = 100


class Judge(Protocol):
    """Answers each conversation with a text."""

    def answer_all(self, questions: Sequence[Sequence[Message]], keep: KeepAnswer, /) -> None:
        """Call `keep(index, answer)` once for each question, in any order, as soon as the answer arrives.

        Raises UnavailableError if the judge stops answering.
        """


class KeptAnswers:
    """A judge whose answers are stored in a file, so that no question is asked (and paid for) twice.

    The file has one line of JSON per answer, appended when the answer arrives: `messages` (the question), `answer`, and
    `digest` (of both). If the process is killed, only the answers to pending questions are lost. A line that is cut off
    or does not match its digest is ignored, and its question is asked again. Several processes can append to one file.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge, self.path = judge, path

    @cached_property
    def answers(self) -> dict[str, str]:
        return self.read(self.path)

    @staticmethod
    def read(path: Path) -> dict[str, str]:
        """The answers in a file: digest of the question -> answer.

        Raises DamagedError if an earlier version wrote a .json file next to this file and that .json file is damaged.
        """
        answers: dict[str, str] = {}
        earlier = path.with_suffix(".json")
        if earlier.exists():
            answers |= JUDGE_ANSWERS_RECORD.read(earlier)["answers"]
        for line in read_file(path).split(b"\n") if path.exists() else ():
            with contextlib.suppress(DamagedError, LookupError, TypeError):
                entry = parse_json(line, path)
                if entry["digest"] == digest_of([entry["messages"], entry["answer"]]):
                    answers[digest_of(entry["messages"])] = entry["answer"]
        return answers

    def ask_all(self, questions: Sequence[Sequence[Message]], progress: Progress) -> list[str]:
        """The answers, in order. The judge is asked only the questions that it has not answered before, each of them
        once."""
        digests = [digest_of(list(messages)) for messages in questions]
        open_questions = {digest: list(messages) for digest, messages in zip(digests, questions, strict=True)}
        open_questions = {digest: one for digest, one in open_questions.items() if digest not in self.answers}
        asked = list(open_questions.items())
        done = len(set(digests)) - len(asked)

        def keep(index: int, answer: str) -> None:
            nonlocal done
            digest, messages = asked[index]
            self.append(messages, answer)
            self.answers[digest] = answer
            done += 1
            progress(done, len(set(digests)))

        if asked:
            self.judge.answer_all([messages for _, messages in asked], keep)
        return [self.answers[digest] for digest in digests]

    def append(self, messages: Sequence[Message], answer: str) -> None:
        """Add a line to the file. Raises UnavailableError if the disk is full or not writable."""
        entry = {"messages": messages, "answer": answer, "digest": digest_of([messages, answer])}
        # There is a line break before the entry, too: if a process was killed while it wrote, the file may end within a
        # line.
        line = b"\n" + json.dumps(entry).encode() + b"\n"
        try:
            make_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if os.write(descriptor, line) != len(line):
                    raise UnavailableError(f"The disk is full: {self.path} could not be written.")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise os_error(error, self.path) from error


def read_key(variable: str) -> str:
    """The key in an environment variable; "" if the variable is not set, since a local endpoint needs no key."""
    return os.environ.get(variable, "").strip()

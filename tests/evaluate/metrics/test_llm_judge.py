"""Each answer of a judge is stored when it arrives, so none is lost when a run is interrupted."""

import os
import signal
from dataclasses import dataclass, field

import pytest

from sae.common.errors import DamagedError, UnavailableError
from sae.common.evaluation_schemas import JUDGE_ANSWERS_RECORD
from sae.common.files import digest_of
from sae.evaluate.metrics.llm_judge import KeptAnswers

QUESTIONS = [[{"role": "system", "content": "Count."}, {"role": "user", "content": str(n)}] for n in range(4)]
ANSWERS = ["a 0", "a 1", "a 2", "a 3"]


def silent(done, total, note=""):
    pass


@dataclass
class Counting:
    """A judge that answers "a 3" to 3, starting with the last question. After `most` answers it calls `end`."""

    most: int = 99
    end: object = None
    asked: list = field(default_factory=list)

    def answer_all(self, questions, keep):
        for index in reversed(range(len(questions))):
            if len(self.asked) == self.most:
                self.end()
            self.asked.append(questions[index][1]["content"])
            keep(index, f"a {self.asked[-1]}")


def stop():
    raise UnavailableError("enough")


def test_the_same_questions_are_asked_once_and_progress_counts_them(tmp_path):
    judge, seen = Counting(), []
    kept = KeptAnswers(judge, tmp_path / "new" / "kept.jsonl")
    assert kept.ask_all(QUESTIONS + QUESTIONS[:2], lambda *done: seen.append(done)) == ANSWERS + ANSWERS[:2]
    assert judge.asked == ["3", "2", "1", "0"] and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert kept.ask_all(QUESTIONS, silent) == ANSWERS and len(judge.asked) == 4


def test_answers_are_kept_when_the_judge_stops_answering(tmp_path):
    with pytest.raises(UnavailableError):
        KeptAnswers(Counting(3, stop), tmp_path / "kept.jsonl").ask_all(QUESTIONS, silent)
    judge = Counting()
    assert KeptAnswers(judge, tmp_path / "kept.jsonl").ask_all(QUESTIONS, silent) == ANSWERS and judge.asked == ["0"]


def test_a_kill_loses_only_the_question_under_way(tmp_path):
    path = tmp_path / "kept.jsonl"
    if not (child := os.fork()):
        KeptAnswers(Counting(2, lambda: os.kill(os.getpid(), signal.SIGKILL)), path).ask_all(QUESTIONS, silent)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    judge = Counting()
    assert KeptAnswers(judge, path).ask_all(QUESTIONS, silent) == ANSWERS and judge.asked == ["1", "0"]


def test_processes_append_to_one_file(tmp_path):
    """Three processes append at once, and no line is interrupted by that of another."""
    kept = KeptAnswers(None, tmp_path / "kept.jsonl")
    children = []
    for process in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for n in range(40):
                    kept.append([{"role": "user", "content": f"{process} {n} " + "long " * 2000}], str(n))
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    assert len(KeptAnswers.read(kept.path)) == 3 * 40


def test_a_file_that_is_cut_anywhere_keeps_its_whole_lines_and_takes_more(tmp_path):
    whole = tmp_path / "whole.jsonl"
    KeptAnswers(Counting(), whole).ask_all(QUESTIONS, silent)
    data = whole.read_bytes()
    for size in range(0, len(data), 7):
        path = tmp_path / f"cut{size}.jsonl"
        path.write_bytes(data[:size])
        judge = Counting()
        assert KeptAnswers(judge, path).ask_all(QUESTIONS, silent) == ANSWERS
        assert len(judge.asked) in (4 - data[: size + 1].count(b"}\n"), 4 - data[:size].count(b"}\n"))
        assert KeptAnswers.read(path) == KeptAnswers.read(whole)


def test_a_damaged_answer_is_not_used_but_asked_again(tmp_path):
    path = tmp_path / "kept.jsonl"
    KeptAnswers(Counting(), path).ask_all(QUESTIONS, silent)
    path.write_bytes(path.read_bytes().replace(b"a 2", b"a 7") + b"[1]\n{}\nnull\n")
    judge = Counting()
    assert KeptAnswers(judge, path).ask_all(QUESTIONS, silent) == ANSWERS and judge.asked == ["2"]


def test_the_answers_that_an_earlier_version_kept_are_used(tmp_path):
    old = tmp_path / "judge-1.json"
    JUDGE_ANSWERS_RECORD.write(old, {"answers": {digest_of(QUESTIONS[1]): "from before"}})
    judge = Counting()
    found = KeptAnswers(judge, tmp_path / "judge-1.jsonl").ask_all(QUESTIONS, silent)
    assert found == ["a 0", "from before", "a 2", "a 3"] and judge.asked == ["3", "2", "0"]
    old.write_bytes(old.read_bytes().replace(b"before", b"behind"))
    with pytest.raises(DamagedError, match="judge-1.json"):
        KeptAnswers(judge, tmp_path / "judge-1.jsonl").ask_all(QUESTIONS, silent)

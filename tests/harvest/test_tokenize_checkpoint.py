"""Tokenizing that was killed continues from its checkpoint and gives the contexts of an uninterrupted run."""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae.cache.contexts import Contexts
from sae.common import records
from sae.common.errors import DamagedError, UnavailableError
from sae.harvest import stages, tokenize_checkpoint
from sae.harvest.contexts import ContextCutter, is_held_out, make_contexts
from sae.harvest.documents import Document, ListedDocuments, TextSource
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.harvest.tokenize_checkpoint import TokenizeCheckpoint

from .written import files_of

DOCUMENTS = [[5 + (n * k) % 7000 for k in range(1, 3 + n % 23)] for n in range(1, 120)]  # of 2 to 24 ids
HERE = {"some": "harvest"}


class Killed(BaseException):
    """An exception that nothing catches."""


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.harvest.contexts.BATCH_DOCUMENTS", 5)


@pytest.fixture
def cut_some(cut_up, tmp_path: Path) -> Callable[..., Contexts]:
    """cut_some(text, pack=...) cuts a thousand rows, with a checkpoint in tmp_path / "killed" every 150 tokens."""

    def cut_into(text: Any = DOCUMENTS, checkpoint: TokenizeCheckpoint | None = None, **more: Any) -> Contexts:
        settings = {"held_out": 0.2, "checkpoint_tokens": 150} | more
        return cut_up(
            text, 1000, exactly=True, checkpoint=checkpoint or TokenizeCheckpoint(tmp_path / "killed", HERE), **settings
        )

    return cut_into


@pytest.fixture
def whole(cut_some, tmp_path: Path) -> Callable[..., Contexts]:
    """whole(pack=...) cuts the same text in one go, without a checkpoint."""
    return lambda **more: cut_some(
        checkpoint=TokenizeCheckpoint(tmp_path / "whole", HERE), checkpoint_tokens=10**9, **more
    )


def breaking_at(number: int, error: BaseException | None = None) -> TextSource:
    """The documents, with an exception before one of them."""

    def documents() -> Iterator[Document]:
        for at, ids in enumerate(DOCUMENTS):
            if at == number:
                raise error or Killed
            yield Document(ids)

    return TextSource("some", {}, ListedDocuments(documents))


def left_rows(documents: list[list[int]]) -> int:
    return sum(len(ids) for ids in documents if not is_held_out(ids, 0, 0.2))


def checkpoint_parts(folder: Path) -> int:
    return len(list(folder.glob("tokens/draft/*.safetensors")))


@pytest.mark.parametrize("pack", [False, True])
def test_checkpoints_do_not_change_the_contexts(same, cut_some, whole, tmp_path: Path, pack: bool) -> None:
    assert same(cut_some(pack=pack), whole(pack=pack))
    assert checkpoint_parts(tmp_path / "killed") == 7 and checkpoint_parts(tmp_path / "whole") == 0


@pytest.mark.parametrize("pack", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_kill_between_any_two_documents(same, cut_some, whole, tmp_path: Path, pack: bool) -> None:
    expected, gone_on = whole(pack=pack), set()
    for number in range(0, 96, 3):
        with pytest.raises(Killed):
            cut_some(breaking_at(number), pack=pack)
        left = TokenizeCheckpoint(tmp_path / "killed", HERE)
        gone_on.add(left.state["documents"] if left.state else 0)
        assert same(cut_some(checkpoint=left, pack=pack), expected)
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    # Some runs resumed from each of the seven checkpoints, and some started without one.
    assert len(gone_on) == 8 and all(documents % 5 == 0 for documents in gone_on)


@pytest.mark.parametrize("pack", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_any_write_of_a_checkpoint(
    same, cut_some, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: bool, before: bool
) -> None:
    """A run is killed before or after it renames one of its fourteen files, and is then resumed."""
    expected = whole(pack=pack)
    for writer in (tokenize_checkpoint, records):  # the writers of a part and of the state
        for number in range(1, 8):
            calls, write = [], writer.atomic_write

            def dying(*arguments: Any, calls=calls, write=write, number=number, **more: Any) -> None:
                calls.append(1)
                if not (len(calls) == number and before):
                    write(*arguments, **more)
                if len(calls) == number:
                    raise Killed

            with monkeypatch.context() as patched:
                patched.setattr(writer, "atomic_write", dying)
                with pytest.raises(Killed):
                    cut_some(pack=pack)
            kept = number - (before or writer is tokenize_checkpoint)
            assert len(TokenizeCheckpoint(tmp_path / "killed", HERE).checksums) == kept
            assert same(cut_some(pack=pack), expected)
            shutil.rmtree(tmp_path / "killed")


def test_tokenized_documents_are_not_tokenized_again(cut_some, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        cut_some(breaking_at(60))
    left, added, told = TokenizeCheckpoint(tmp_path / "killed", HERE), [], []
    add = ContextCutter.add
    monkeypatch.setattr(
        ContextCutter, "add", lambda self, body, number, *rest: (added.append(number), add(self, body, number, *rest))
    )
    cut_some(TextSource("some", {}, ListedDocuments(lambda: map(Document, DOCUMENTS)), told.append), left)
    assert added[0] == 50 and added == list(range(50, 50 + len(added)))
    assert told == [f"Continuing some after {left_rows(DOCUMENTS[:50])} tokens, which are already tokenized."]


def test_a_network_failure_keeps_everything_tokenized_before(same, cut_some, whole, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="gone"):
        cut_some(breaking_at(43, UnavailableError("gone")), checkpoint_tokens=10**9)
    left = TokenizeCheckpoint(tmp_path / "killed", HERE)
    assert left.state["documents"] == 40 and same(cut_some(checkpoint=left), whole())


def test_skipped_documents_are_counted_once(cut_some, tmp_path: Path) -> None:
    documents = [x for ids in DOCUMENTS for x in (ids, [], None)]

    def text(number: int = 10**9) -> TextSource:
        return TextSource(
            "some", {}, ListedDocuments(lambda: itertools.chain(map(Document, documents[:number]), breaking()))
        )

    def breaking() -> Iterator[Document]:
        raise Killed
        yield

    plain, again = text(), text()
    cut_some(plain, TokenizeCheckpoint(tmp_path / "whole", HERE))
    with pytest.raises(Killed):
        cut_some(text(150))
    cut_some(again)
    assert again.skipped == plain.skipped and again.skipped["empty"] == again.skipped["not text"] > 60


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_number(path: Path) -> None:
    saved = json.loads(path.read_text())
    saved["state"]["rows"] += 1
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("000001.safetensors", flip),
        ("000001.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("000000.safetensors", Path.unlink),
        ("state.json", Path.unlink),
        ("state.json", flip),
        ("state.json", other_number),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text('{"digest": "", "content": []}')),  # of an earlier version
    ],
)
def test_a_damaged_checkpoint_is_discarded(
    same, cut_some, whole, tmp_path: Path, file: str, damage: Callable[[Path], Any]
) -> None:
    with pytest.raises(Killed):
        cut_some(breaking_at(60))
    damage(tmp_path / "killed" / "tokens" / "draft" / file)
    left = TokenizeCheckpoint(tmp_path / "killed", HERE)
    assert left.state is None and not list(left.read_parts()) and not left.folder.exists()
    told: list[str] = []
    text = TextSource("some", {}, ListedDocuments(lambda: map(Document, DOCUMENTS)), told.append)
    assert same(cut_some(text, left), whole())
    assert len(told) == 1 and re.match(
        "The tokens of an earlier run cannot be used, so tokenizing starts over: ", told[0]
    )


def test_a_checkpoint_damaged_while_in_use_raises(cut_some, tmp_path: Path) -> None:
    left = TokenizeCheckpoint(tmp_path / "killed", HERE)
    with pytest.raises(Killed):
        cut_some(breaking_at(60), left)
    flip(left.part_file(0))
    with pytest.raises(DamagedError, match="000000.safetensors is missing or damaged. Run the same command again"):
        list(left.read_parts())


def test_the_checkpoint_of_another_harvest_is_not_used(cut_some, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        cut_some(breaking_at(60))
    other = TokenizeCheckpoint(tmp_path / "killed", HERE | {"seed": 1})
    assert other.state is None and not other.folder.exists()


# The whole harvest


def test_a_harvest_killed_while_it_tokenizes(
    tiny_model: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harvest is killed while tokenizing, after the tokens, or once the cache has them.

    The resumed harvest writes the same files and leaves no checkpoint.
    """
    request = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0,), tokens=2000, context=32, window=1024, held_out=0.2,
        device="cpu", pack=True, out=tmp_path / "whole",
    )  # fmt: skip

    expected = files_of(run_harvest(plan_harvest(request)).folder)
    monkeypatch.setattr(stages, "make_contexts", functools.partial(make_contexts, checkpoint_tokens=100))
    killed = replace(request, out=tmp_path / "killed")
    told: list[str] = []

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    for where, name in ((stages, "CacheWriter"), (stages, "remove_checkpoint")):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, die)
            with pytest.raises(Killed):
                run_harvest(plan_harvest(killed, told.append))
        assert checkpoint_parts(killed.out)
    assert len(told) == 1 and told[0].startswith("Continuing sentences after ")
    run_harvest(plan_harvest(killed, told.append))
    assert files_of(killed.out) == expected and not checkpoint_parts(killed.out) and len(told) == 1
    assert plan_harvest(killed).identity["pack"] and not plan_harvest(replace(killed, pack=False)).identity["pack"]

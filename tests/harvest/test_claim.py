"""One of several tasks cuts the text of a harvest, and a task that is slow or dead is replaced."""

import time
from pathlib import Path
from typing import Any

import pytest

from sae.cache.place import FolderPlace
from sae.common.cache_schemas import HARVEST_RECORD
from sae.common.errors import UnavailableError
from sae.harvest import claim, stages, tasks
from sae.harvest.claim import EXPIRY, ClaimLost, TextClaim
from sae.harvest.plan import HarvestPlan
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import harvest_activations

from .written import files_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still. The only entry of the list is its time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def waited(task: TextClaim, clock: list[float], seconds: float) -> str | None:
    """Let a task try to take a claim every second, for this number of seconds. Returns the claim's file, or None."""
    for _ in range(int(seconds)):
        clock[0] += 1
        if file := task.take():
            return file
    return None


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tokens").iterdir())


def test_one_of_two_tasks_has_the_claim(tmp_path: Path) -> None:
    first, second = (TextClaim(FolderPlace(tmp_path), f"task {n}") for n in (1, 2))
    file = first.take()
    assert file == "tokens/claim-000001.json" and second.take() is None and second.holder == first.owner
    with first.held(file) as check:
        check()
    assert claims(tmp_path) == [] and second.take() == "tokens/claim-000001.json"


def test_an_expired_claim_is_taken_over_and_its_task_notices(tmp_path: Path, clock: list[float]) -> None:
    slow, other, third = (TextClaim(FolderPlace(tmp_path), f"task {n}") for n in range(3))
    file = slow.take()
    with pytest.raises(ClaimLost), slow.held(file) as check:
        check()
        assert other.take() is None and third.take() is None
        assert waited(other, clock, EXPIRY - 1) is None
        later = waited(other, clock, 1)
        assert later == "tokens/claim-000002.json" and third.take() is None  # the claim that third waits for is new
        check()
    assert claims(tmp_path) == ["claim-000001.json", "claim-000002.json"]  # slow does not remove the claims
    with other.held(later) as check:
        check()
    assert claims(tmp_path) == []


def test_the_last_claim_is_removed_first(tmp_path: Path, clock: list[float], monkeypatch) -> None:
    """A store looks claims up from the first one on, and would not find the others if that one were gone."""
    place, removed = FolderPlace(tmp_path), []
    dead, working = TextClaim(place, "dead"), TextClaim(place, "working")
    assert dead.take() and working.take() is None
    monkeypatch.setattr(place, "remove_claims", removed.extend)
    with working.held(str(waited(working, clock, EXPIRY))):
        pass
    assert removed == ["tokens/claim-000002.json", "tokens/claim-000001.json"]


def test_a_claim_that_is_renewed_is_not_taken(tmp_path: Path, clock: list[float], monkeypatch) -> None:
    monkeypatch.setattr(claim, "RENEW", 0.01)
    place = FolderPlace(tmp_path)
    working, waiting = TextClaim(place, "working"), TextClaim(place, "waiting")
    file = working.take()
    with working.held(file):
        assert waiting.take() is None
        for _ in range(3):
            assert waited(waiting, clock, EXPIRY - 1) is None
            before = place.read_claim(file)
            while place.read_claim(file) == before:  # the thread that renews it uses the real clock
                time.sleep(0.001)
            assert waiting.take() is None


def test_a_damaged_claim_expires(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "claim-000001.json").write_text("{")
    waiting = TextClaim(FolderPlace(tmp_path), "waiting")
    assert waiting.take() is None
    assert waited(waiting, clock, EXPIRY) == "tokens/claim-000002.json"


def test_a_task_that_was_stopped_does_not_take_another_one_for_dead(tmp_path: Path, clock: list[float]) -> None:
    """This happens on a machine that was suspended, where no task could renew its claim."""
    working, waiting = TextClaim(FolderPlace(tmp_path), "working"), TextClaim(FolderPlace(tmp_path), "waiting")
    assert working.take() and waiting.take() is None
    for _ in range(3):
        clock[0] += 100 * EXPIRY
        assert waiting.take() is None
    assert waited(waiting, clock, EXPIRY) == "tokens/claim-000002.json"


def test_a_task_that_loses_its_claim_reads_the_text_of_the_other(
    tiny_model: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task resumes after another task has taken over its claim, cut the text and harvested its share."""
    options: dict[str, Any] = {
        "model": str(tiny_model), "dataset": str(sentences), "layers": 0, "tokens": 600, "context": 32, "window": 256,
        "device": "cpu",
    }  # fmt: skip
    whole, out = harvest_activations(**options, out=tmp_path / "whole").folder, tmp_path / "cache"
    monkeypatch.setattr(tasks, "POLL", 0.0)
    monkeypatch.setattr(claim, "EXPIRY", 0.0)
    make_contexts, written = stages.make_contexts, {}

    def slow(*arguments: Any, **more: Any) -> Any:
        contexts = make_contexts(*arguments, **more)
        monkeypatch.setattr(stages, "make_contexts", make_contexts)
        harvest_activations(**options, out=out, share="2/2")
        written.update({path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()})
        return contexts

    monkeypatch.setattr(stages, "make_contexts", slow)
    harvest_activations(**options, out=out, share="1/2")
    assert len(list(written)) > 10 and (out / "tokens/commit.json") in written
    replaced = ("claim-", ".lock", "zarr.json")  # or removed
    kept = {path: moment for path, moment in written.items() if not path.name.startswith(replaced)}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files_of(out) == files_of(whole)


def test_a_task_counts_with_the_windows_of_others(
    tiny_model: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These windows do not exist yet and need space too.

    harvest.json records the options of the task that began last.
    """
    said: list[str] = []
    needed: list[float] = []
    options: dict[str, Any] = {
        "model": str(tiny_model), "dataset": str(sentences), "layers": 0, "tokens": 600, "context": 32, "window": 256,
        "device": "cpu", "out": tmp_path / "cache",
    }  # fmt: skip
    monkeypatch.setattr(HarvestPlan, "check_space", lambda plan, size, per_row: needed.append(size))
    harvest_activations(**options, share="1/2", progress=HarvestProgress(say=said.append))
    assert [sentence.split(",")[0] for sentence in said] == ["Share 1/2 is done. 1 of 3 windows are missing"]
    # one check before the text is cut, and one before the windows are computed
    assert len(needed) == 2 and needed[0] == needed[1]
    harvest_activations(**options, share="2/2", batch_contexts=16)
    assert HARVEST_RECORD.read(tmp_path / "cache/harvest.json")["batch_contexts"] == 16


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_text_that_another_task_has_cut_before_the_claim_is_not_cut_again(
    tiny_model: Path, sentences: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch, where: str
) -> None:
    """The other task finishes after this one has looked for the text and before it makes its claim."""
    address = tmp_path / "cache" if where == "folder" else f"{request.getfixturevalue('bucket')}/pile"
    options: dict[str, Any] = {
        "model": str(tiny_model), "dataset": str(sentences), "layers": 0, "tokens": 300, "context": 32, "window": 256,
        "device": "cpu", "out": address,
    }  # fmt: skip
    cuts, make_contexts, take = [], stages.make_contexts, TextClaim.take

    def cut(*arguments: Any, **more: Any) -> Any:
        cuts.append(1)
        return make_contexts(*arguments, **more)

    def take_late(claim: TextClaim) -> str | None:
        monkeypatch.setattr(TextClaim, "take", take)
        harvest_activations(**options, share="2/2")
        file = take(claim)
        assert file == "tokens/claim-000001.json"
        return file

    monkeypatch.setattr(stages, "make_contexts", cut)
    monkeypatch.setattr(TextClaim, "take", take_late)
    cache = harvest_activations(**options, share="1/2")
    assert len(cuts) == 1 and cache.hooks and FolderPlace(cache.folder).claim_files() == []


class CountedPlace(FolderPlace):
    """A folder that counts how often claims are listed, and in which the first `failures` renewals fail."""

    looks = failures = renewals = 0

    def claim_files(self) -> list[str]:
        self.looks += 1
        return super().claim_files()

    def renew_claim(self, file: str, content: Any) -> None:
        self.renewals += 1
        if self.renewals <= self.failures:
            raise UnavailableError("The store failed.")
        super().renew_claim(file, content)

    def wait(self, name: str, more: int) -> None:
        until, ends = getattr(self, name) + more, time.monotonic() + 20
        while getattr(self, name) < until:
            assert time.monotonic() < ends, f"no more {name}"
            time.sleep(0.001)


def test_a_claim_that_could_not_be_renewed_is_renewed_later(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(claim, "RENEW", 0.002)
    place = CountedPlace(tmp_path)
    place.failures = 2
    working = TextClaim(place, "working")
    file = working.take()
    with working.held(file):
        place.wait("renewals", 4)
        assert place.read_claim(file)["beat"] > 2


def test_a_claim_that_was_lost_is_not_renewed(tmp_path: Path, monkeypatch) -> None:
    """The task that took over the claim has removed it after cutting the text."""
    monkeypatch.setattr(claim, "RENEW", 0.002)
    place = CountedPlace(tmp_path)
    slow = TextClaim(place, "slow")
    file = slow.take()
    with slow.held(file):
        place.create_claim("tokens/claim-000002.json", {"owner": "other", "task": "1", "beat": 0})
        place.wait("looks", 3)  # the thread may have been between its look at the claims and its renewal
        (tmp_path / file).unlink()
        place.wait("looks", 3)
        assert claims(tmp_path) == ["claim-000002.json"]

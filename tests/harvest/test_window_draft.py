"""An interrupted window is continued, not begun again, and has the same bytes in the end."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter
from sae.common.errors import Interrupted, UnavailableError
from sae.harvest import window_draft, windows
from sae.harvest.device_copy import DeviceCopy, scatter
from sae.harvest.model import LanguageModel
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import run_harvest

from .written import files_of


class Killed(BaseException):
    """Ends a harvest as kill -9 would: nothing more is saved."""


@pytest.fixture(scope="module")
def short(tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    """A harvest of 300 rows of two layers, less than one window of 512, with four contexts in a pass."""
    return HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0, 1), tokens=300, context=16, window=512, held_out=0.1,
        device="cpu", batch_contexts=4, out=tmp_path_factory.mktemp("draft") / "whole",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(short: HarvestConfig) -> Cache:
    return run_harvest(plan_harvest(short))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """stopping(error, after) returns the list of the sizes of later passes; pass number `after` raises the error."""
    capture = LanguageModel.capture_hooks

    def stop(error: type[BaseException] | None = None, after: int = 0) -> list[int]:
        passes: list[int] = []

        def counted(model, ids_NS, hooks):
            passes.append(len(ids_NS))
            if error is not None and len(passes) > after:
                raise error
            return capture(model, ids_NS, hooks)

        monkeypatch.setattr(LanguageModel, "capture_hooks", counted)
        return passes

    return stop


def harvest(config: HarvestConfig) -> list[str]:
    """Run a harvest, and return its messages."""
    said: list[str] = []
    run_harvest(plan_harvest(config), HarvestProgress(say=said.append))
    return said


def test_ctrl_c_saves_what_is_computed(short, whole: Cache, tmp_path: Path, stopping, monkeypatch) -> None:
    monkeypatch.setattr(windows, "WORTH_SAVING", 0)
    config, all_passes = replace(short, out=tmp_path / "cache"), -(-len(whole.contexts(held_out=False)) // 4)
    stopping(KeyboardInterrupt, after=3)
    with pytest.raises(Interrupted, match=r"0 of 1 windows are safe, and \d+ rows of the next; run the same command"):
        harvest(config)
    stopping(KeyboardInterrupt, after=2)  # and again
    with pytest.raises(Interrupted):
        harvest(config)
    passes = stopping()
    said = harvest(config)
    assert len(passes) == all_passes - 5 and any("of the 300 rows of window 0 are already computed" in s for s in said)
    assert files_of(config.out) == files_of(whole.folder)  # so there is no draft left


def test_a_kill_loses_what_is_younger_than_the_last_part(short, whole, tmp_path: Path, stopping, monkeypatch) -> None:
    monkeypatch.setattr(windows, "SAVE_SECONDS", 0)
    config = replace(short, out=tmp_path / "cache")
    stopping(Killed, after=4)
    with pytest.raises(Killed):
        harvest(config)
    tokens = {p: p.stat().st_mtime_ns for p in (config.out / "tokens").rglob("*") if p.is_file()}
    passes = stopping()
    harvest(config)
    assert len(passes) == -(-len(whole.contexts(held_out=False)) // 4) - 4
    assert {p: p.stat().st_mtime_ns for p in tokens} == tokens  # the text is not cut again
    assert files_of(config.out) == files_of(whole.folder)


class LateCopy(DeviceCopy):
    """The rows arrive with the next pass, or when they are waited for, as if they came from a GPU."""

    late = None

    def send(self, *copied) -> None:
        self.wait()
        self.late = copied

    def wait(self) -> None:
        if self.late is not None:
            scatter(*self.late)
        self.late = None


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_rows_are_saved_once_they_have_arrived(short, whole, tmp_path: Path, stopping, monkeypatch, error) -> None:
    monkeypatch.setattr(windows, "DeviceCopy", LateCopy)
    monkeypatch.setattr(windows, "SAVE_SECONDS" if error is Killed else "WORTH_SAVING", 0)
    config = replace(short, out=tmp_path / "cache")
    stopping(error, after=4)
    with pytest.raises((Killed, Interrupted)):
        harvest(config)
    stopping()
    harvest(config)
    assert files_of(config.out) == files_of(whole.folder)


def test_a_draft_stays_until_its_window_is_committed(short, whole, tmp_path: Path, stopping, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise UnavailableError("The disk is full")

    monkeypatch.setattr(windows, "SAVE_SECONDS", 0)
    config = replace(short, out=tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(UnavailableError):
        patch.setattr(CacheWriter, "write_window", full)
        harvest(config)
    passes = stopping()
    harvest(config)
    assert passes == [] and files_of(config.out) == files_of(whole.folder)


def test_a_window_that_another_worker_has_committed_is_not_computed(
    short, whole: Cache, tmp_path: Path, stopping, monkeypatch
) -> None:
    config, passes = replace(short, out=tmp_path / "cache"), stopping()
    shutil.copytree(whole.folder, config.out)
    monkeypatch.setattr(CacheWriter, "missing_windows", lambda *_: {0: ["layer_00", "layer_01"]})  # out of date
    harvest(config)
    assert passes == []


@pytest.mark.parametrize(
    "change", ["a lost part", "a damaged part", "a damaged state", "another pass", "another layer"]
)
def test_a_draft_that_cannot_be_continued_begins_again(
    short, whole: Cache, tmp_path: Path, stopping, monkeypatch, change: str
) -> None:
    monkeypatch.setattr(windows, "WORTH_SAVING", 0)
    config = replace(short, out=tmp_path / "cache")
    changed = {"another pass": {"batch_contexts": 2}, "another layer": {"layers": (0,)}}.get(change, {})
    stopping(KeyboardInterrupt, after=3)
    with pytest.raises(Interrupted):
        harvest(replace(config, **changed))
    part, state = (config.out / "drafts/000000" / name for name in ("000000.safetensors", "state.json"))
    if change == "a lost part":
        part.unlink()
    elif change == "a damaged part":
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    elif change == "a damaged state":
        state.write_text(state.read_text().replace('"context": 1', '"context": 2'))
    passes = stopping()
    harvest(config)
    assert len(passes) == -(-len(whole.contexts(held_out=False)) // 4)
    mine, expected = files_of(config.out), files_of(whole.folder)
    assert {name for name in mine.keys() | expected.keys() if mine.get(name) != expected.get(name)} <= {"harvest.json"}


def test_a_full_disk_costs_the_draft_not_the_harvest(short, whole, tmp_path: Path, stopping, monkeypatch) -> None:
    def full(path: Path, *parts: bytes) -> None:
        raise UnavailableError("The disk is full")

    monkeypatch.setattr(windows, "SAVE_SECONDS", 0)
    monkeypatch.setattr(window_draft, "atomic_write", full)
    config = replace(short, out=tmp_path / "cache")
    harvest(config)
    assert files_of(config.out) == files_of(whole.folder)


def test_drafts_of_committed_windows_are_removed(short, whole, tmp_path: Path) -> None:
    """A harvest that is killed right after a commit leaves such a draft."""
    config = replace(short, out=tmp_path / "cache")
    harvest(config)
    (config.out / "drafts/000000").mkdir(parents=True)
    harvest(config)
    assert not (config.out / "drafts").exists()

"""Texts with odd rows, columns or splits are harvested to the same bytes as the text alone."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.cache.reader import Cache
from sae.common.cache_schemas import HARVEST_RECORD
from sae.common.errors import UsageError
from sae.common.files import read_json
from sae.harvest import contexts, stages
from sae.harvest.description import summarize_harvest
from sae.harvest.plan import HarvestConfig, HarvestPlan, plan_harvest
from sae.harvest.repair import repair
from sae.harvest.run import run_harvest

BAD = {130: b"null", 210: b'{"text": "caf\xe9"}', 330: b'{"text": "cut'}
FIRST = "bad.jsonl line 131: expected an object, found null"
SENTENCE = f"skipped  3 rows could not be read and were skipped (first: {FIRST})."


class Killed(BaseException):
    """An exception that nothing catches."""


@pytest.fixture(scope="module")
def plan_of(tiny_model: Path) -> Callable[..., HarvestPlan]:
    def plan(dataset: Path, out: Path, **more: Any) -> HarvestPlan:
        settings = {"layers": (0,), "tokens": 1500, "context": 16, "window": 512, "device": "cpu"} | more
        return plan_harvest(HarvestConfig(model=str(tiny_model), dataset=str(dataset), out=out, **settings))

    return plan


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good.jsonl, bad.jsonl, which adds three bad rows, and other.jsonl, which adds columns of every type."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": f"the fox {n} reads {n % 7} yellow books"} for n in range(400)]
    others = [1, "x", None, [], {"a": 1}, {"b": ["q"]}, 1.5]
    lines = [json.dumps(row).encode() for row in rows]
    (folder / "good.jsonl").write_bytes(b"\n".join(lines))
    (folder / "bad.jsonl").write_bytes(b"\n".join(x for n, one in enumerate(lines) for x in (BAD.get(n), one) if x))
    (folder / "other.jsonl").write_text(
        "\n".join(json.dumps(row | {"x": others[n % 7]} | ({"y": 0} if n > 300 else {})) for n, row in enumerate(rows))
    )
    return folder


@pytest.fixture(scope="module")
def whole(texts: Path, plan_of, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return run_harvest(plan_of(texts / "good.jsonl", tmp_path_factory.mktemp("whole") / "cache"))


def data_of(folder: Path) -> dict[str, bytes]:
    names = ("layer_", "row_", "tokens/")
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}
    return {name: file.read_bytes() for name, file in files.items() if name.startswith(names)}


@pytest.mark.parametrize("name", ["bad", "other"])
def test_the_rows_are_those_of_the_text_alone(texts: Path, plan_of, whole: Cache, tmp_path: Path, name: str) -> None:
    cache = run_harvest(plan_of(texts / f"{name}.jsonl", tmp_path / "cache"))
    assert data_of(cache.folder) == data_of(whole.folder)


@pytest.mark.slow
def test_skipped_rows_are_said_and_recorded_however_often_it_is_resumed(
    texts: Path, plan_of, whole: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checkpoints of the text, resumed, opened again, and repaired."""
    monkeypatch.setattr(contexts, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(stages, "make_contexts", functools.partial(contexts.make_contexts, checkpoint_tokens=100))
    folder, read = tmp_path / "cache", contexts.next_batch

    def killed(documents: Any) -> Any:
        batch = read(documents)
        if any("fox 230 " in one.text for one in batch):
            raise Killed
        return batch

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(contexts, "next_batch", killed)
        run_harvest(plan_of(texts / "bad.jsonl", folder, tokens=None))
    plan = plan_of(texts / "bad.jsonl", folder, tokens=None)
    assert (folder / "tokens" / "draft" / "state.json").exists()
    cache = run_harvest(plan)
    assert plan.text.read == 403 and SENTENCE in summarize_harvest(plan, cache, 0)
    again = plan_of(texts / "bad.jsonl", folder, tokens=None)
    assert SENTENCE in summarize_harvest(again, run_harvest(again), 0) and not again.text.read
    assert read_json(folder / "harvest.json")["unreadable"] == {"rows": 3, "first": FIRST}
    before = data_of(folder)
    (folder / "tokens" / "ids" / "c.0.0").unlink()
    assert repair(folder) and data_of(folder) == before
    assert read_json(folder / "harvest.json")["unreadable"] == {"rows": 3, "first": FIRST}


def test_the_error_of_a_short_text_names_the_rows_that_were_skipped(texts: Path, plan_of, tmp_path: Path) -> None:
    sentence = rf"has only .* of the requested 1,000,000 tokens. 3 rows could not be read .*{FIRST}.*Use --tokens "
    with pytest.raises(UsageError, match=sentence):
        run_harvest(plan_of(texts / "bad.jsonl", tmp_path / "cache", tokens=1_000_000))


def test_a_cache_of_a_whole_folder_with_splits_is_repaired_as_it_was_made(texts: Path, plan_of, tmp_path: Path) -> None:
    """Earlier versions read every file of a folder, whatever its split."""
    (tmp_path / "set").mkdir()
    lines = (texts / "good.jsonl").read_text().splitlines()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(reversed(lines)))
    cache = run_harvest(plan_of(tmp_path / "set", tmp_path / "cache", split="all"))
    record = HARVEST_RECORD.read(cache.folder / "harvest.json")
    HARVEST_RECORD.write(cache.folder / "harvest.json", record | {"split": "train"})
    before = data_of(cache.folder)
    (cache.folder / "tokens" / "ids" / "c.0.0").unlink()
    assert repair(cache.folder) and data_of(cache.folder) == before
    train = plan_of(tmp_path / "set", tmp_path / "other")
    assert train.identity["data"]["revision"] != cache.identity["data"]["revision"]
    (tmp_path / "set" / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="was harvested with other inputs than now .changed: data."):
        repair(cache.folder)

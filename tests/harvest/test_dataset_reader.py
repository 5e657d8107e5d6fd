"""A dataset is read to the last row from any file that holds it, even over an unreliable network."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from sae.common.errors import SaeError, UnavailableError, UsageError
from sae.harvest.dataset_reader import is_network_error
from sae.harvest.documents import TextSource

ROWS = [{"text": f"the quick brown fox {n} reads " + "yellow books " * (n % 5), "n": n} for n in range(40)]
TEXTS = [row["text"] for row in ROWS]


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set", num_shards=3)
    (folder / "set" / "cache-0123.arrow").write_bytes(b"what a map of it left behind")
    return folder / "set"


def saved_splits(folder: Path) -> Path:
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"test": whole.select(range(3)), "train": whole}).save_to_disk(folder / "set")
    return folder / "set"


def arrow_stream(folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(folder / "set.arrow", table.schema) as written:
        written.write_table(table, max_chunksize=7)
    return folder / "set.arrow"


def arrow_file(folder: Path) -> Path:
    pa.feather.write_feather(pa.Table.from_pylist(ROWS), folder / "set.arrow")
    return folder / "set.arrow"


def lines(folder: Path) -> Path:
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "set.jsonl"


def packed_lines(folder: Path) -> Path:
    (folder / "set.jsonl.gz").write_bytes(gzip.compress(lines(folder).read_bytes()))
    return folder / "set.jsonl.gz"


def table(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "set.parquet", row_group_size=6)
    return folder / "set.parquet"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("make", [saved, saved_splits, arrow_stream, arrow_file, lines, packed_lines, table])
def test_the_same_rows_are_the_same_text_in_every_file(tmp_path: Path, read, make: Callable[[Path], Path]) -> None:
    text = read(make(tmp_path))
    assert [d.text for d in text.documents] == TEXTS and text.name == "set"


@pytest.mark.parametrize("make", [saved, arrow_stream, lines, table])
@pytest.mark.parametrize("read_before", [1, 6, 7, 39, 40])
def test_a_text_continues_from_any_row(tmp_path: Path, read, make: Callable[[Path], Path], read_before: int) -> None:
    path = make(tmp_path)
    text = read(path)
    assert [next(text.documents).text for _ in range(read_before)] == TEXTS[:read_before]
    state = json.loads(json.dumps(text.state))
    other = read(path)
    other.seek(state)
    assert [d.text for d in other.documents] == TEXTS[read_before:] and other.reader.rows_read == 40
    other.seek(None)
    assert [d.text for d in other.documents] == TEXTS


def test_a_split_is_chosen_and_a_wrong_one_is_rejected(tmp_path: Path, read) -> None:
    path = saved_splits(tmp_path)
    text, whole = read(path, split="test"), read(path)
    assert [d.text for d in text.documents] == TEXTS[:3] and text.identity != whole.identity
    with pytest.raises(
        UsageError, match="set has no split 'dev'; its splits are 'test', 'train'. Choose one with --split"
    ):
        read(path, split="dev")


def test_a_saved_dataset_with_a_missing_file_is_rejected(tmp_path: Path, read) -> None:
    path = saved(tmp_path)
    (path / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UsageError, match="data-00001-of-00003.arrow cannot be read: No such file"):
        read(path)


# Columns of ids


def ids_table(folder: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.table({"input_ids": rows}), folder / "ids.parquet")
    return folder / "ids.parquet"


def test_a_column_of_ids_gives_the_contexts_of_its_text(tmp_path: Path, read, cut_up, tokenizer: Any) -> None:
    encoded = tokenizer(TEXTS)["input_ids"]
    whole, tokenised = cut_up(TEXTS), cut_up(read(ids_table(tmp_path, encoded), "input_ids"))
    assert np.array_equal(whole.ids, tokenised.ids) and np.array_equal(whole.document, tokenised.document)


@pytest.mark.parametrize("bad", [8192, -1])
def test_an_id_of_another_tokenizer_is_rejected_with_its_row(tmp_path: Path, read, bad: int) -> None:
    path = ids_table(tmp_path, [[2, 8191], [], None, [0, bad, 5]])
    with pytest.raises(
        UsageError, match=f"Row 3 of .*ids.parquet contains the id {bad}, but .* has the ids 0 to 8,191"
    ):
        list(read(path, "input_ids").documents)


@pytest.mark.parametrize("row", [[1.5], ["a"], [[1], [2, 3]], [True]])
def test_lists_of_other_types_cannot_be_read(tmp_path: Path, read, row: list[Any]) -> None:
    text = read(ids_table(tmp_path, [row, row]), "input_ids")
    assert not list(text.documents) and text.skipped["unreadable"] == 2
    assert text.first_unreadable == (
        f"ids.parquet row 0 has {row!r} in the column 'input_ids'; expected text or a list of token ids"
    )


def test_ids_among_which_one_is_missing_are_not_text(tmp_path: Path, read) -> None:
    text = read(ids_table(tmp_path, [[1, None], [1]]), "input_ids")
    assert [d.text for d in text.documents] == [[1]] and text.skipped == {"empty": 0, "not text": 1, "huge": 0}


# The Hub, and a network that fails


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind(f"{status} of the Hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits in seconds, recorded instead of slept."""
    slept: list[float] = []
    monkeypatch.setattr("sae.harvest.dataset_reader.sleep", slept.append)
    return slept


@pytest.fixture
def hub(tmp_path: Path, read, waits, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextSource]:
    """hub(failures, say=...) opens a dataset of seven row groups.

    Each (n, exception) in `failures` raises the exception once, before group n.
    """
    stream = datasets.load_dataset("parquet", data_files=[str(table(tmp_path))], split="train", streaming=True)
    generate = stream._ex_iterable.generate_tables_fn

    def opened(failures: list[tuple[int, Exception]], **more: Any) -> TextSource:
        def breaking(**files: Any) -> Iterator[Any]:
            for number, group in enumerate(generate(**files)):
                if failures and failures[0][0] == number:
                    raise failures.pop(0)[1]
                yield group

        stream._ex_iterable.generate_tables_fn = breaking
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        return read("some/set", **more)

    return opened


LOST = ConnectionError("Server Disconnected")


@pytest.mark.parametrize(
    ("groups", "waited"),
    [([], []), ([2], [1]), ([1, 1, 1], [1, 2, 4]), ([6] * 5, [1, 2, 4, 8, 16]), ([2, 2, 2, 4, 4], [1, 2, 4, 1, 2])],
)
@pytest.mark.parametrize(
    "error", [LOST, TimeoutError("timed out"), http(HfHubHTTPError, 503), http(HfHubHTTPError, 429)]
)
def test_network_failures_are_retried(hub, waits, groups: list[int], waited: list[int], error: Exception) -> None:
    told: list[str] = []
    text = hub([(group, error) for group in groups], say=told.append)
    assert [d.text for d in text.documents] == TEXTS and waits == waited
    assert len(told) == len(waited)
    for sentence in told[:1]:
        assert sentence == f"Network failure at row {6 * groups[0]} of some/set ({error}); retrying in 1 s."


@pytest.mark.parametrize("status", [408, 429, 500, 503, 400, 404, 409])
def test_the_hub_is_asked_again_where_waiting_may_help(status: int) -> None:
    """Timeouts, rate limits and errors of the Hub are retried; errors in the request are not."""
    assert is_network_error(http(HfHubHTTPError, status)) is (status in (408, 429, 500, 503))


def test_a_lasting_network_failure_raises_a_clear_error(hub, waits) -> None:
    text = hub([(3, LOST)] * 6)
    sentence = (
        "some/set could not be read beyond row 18: Server Disconnected .* 6 times in a row, with waits of 31 seconds "
        "in all. Run the same command again"
    )
    with pytest.raises(UnavailableError, match=sentence):
        list(text.documents)
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    "error", [pa.ArrowInvalid("a broken file"), http(HfHubHTTPError, 404), http(HfHubHTTPError, 403)]
)
def test_other_failures_are_not_retried(hub, waits, error: Exception) -> None:
    text = hub([(3, error)])
    with pytest.raises(UnavailableError, match="The dataset some/set could not be read: "):
        list(text.documents)
    assert not waits


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            http(RepositoryNotFoundError, 404),
            UnavailableError,
            "There is no dataset some/set on the Hub that you can read. Check the name",
        ),
        (
            http(GatedRepoError, 403),
            UnavailableError,
            "The dataset some/set is gated: accept its terms at https://.*/some/set, then run `hf auth login`",
        ),
        (
            http(RevisionNotFoundError, 404),
            UsageError,
            "The dataset some/set has no revision None. Give a commit with --dataset-revision",
        ),
        (
            ValueError("Bad split: dev. Available splits: ['train']"),
            UsageError,
            r"some/set: Bad split: dev. Available splits: \['train'\]. Choose one with --split",
        ),
        (LOST, UnavailableError, "The dataset some/set could not be read: Server Disconnected"),
    ],
)
def test_a_dataset_that_does_not_open_fails_at_once(
    hub, read, waits, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[SaeError], sentence: str
) -> None:
    hub([])

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(kind, match=sentence):
        read("some/set")
    assert not waits

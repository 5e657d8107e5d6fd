"""Marked rows stay where they are, and count for nothing: not in the statistics, not in training."""

import numpy as np
import pytest
import torch

from sae.cache.loader import BatchLoader, BatchOrder, ResidentLoader, open_loader
from sae.cache.reader import Cache
from sae.common.errors import UsageError

ROWS, D, MARKED = 200, 8, (3, 4, 5, 47, 199)


@pytest.fixture
def rows() -> torch.Tensor:
    """(200, 8) of norm about 3, five of them a hundred times as long."""
    values = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
    values[list(MARKED)] *= 100
    return values.bfloat16()


@pytest.fixture(params=[False, True], ids=["raw", "compressed"])
def marked(request, tmp_path, rows, begin_cache, write_some) -> Cache:
    bits = {5: rows.view(torch.int16).numpy().view(np.uint16)}
    bits[12] = bits[5]
    writer = begin_cache(tmp_path / "marked", bits, 16, compress=request.param)
    write_some(writer, bits, list(writer.missing_windows()))
    writer.finish(max_norm=10)
    return Cache(tmp_path / "marked")


def test_long_rows_are_marked(marked: Cache) -> None:
    assert marked.outlier_rows("layer_05").tolist() == list(MARKED)
    found = marked.statistics("layer_05")
    assert (found["marked"], found["count"], found["max_norm"]) == (5, 195, 10)


def test_statistics_are_those_of_the_others(marked: Cache, rows: torch.Tensor) -> None:
    others = np.delete(rows.double().numpy(), MARKED, 0)
    found = marked.statistics("layer_05")
    assert found["variance"] == pytest.approx(others.var(0).mean(), rel=1e-9)
    assert found["mean_square_norm"] == pytest.approx((others**2).sum(1).mean(), rel=1e-9)
    np.testing.assert_allclose(marked.mean("layer_05"), others.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stream", [BatchLoader, ResidentLoader])
def test_another_row_of_the_batch_stands_in(marked: Cache, rows: torch.Tensor, stream) -> None:
    """Every batch is the plan's, but for marked rows, which are the next row of the batch that is not marked."""
    first, plan = np.cumsum([0, *marked.chunk_rows]), BatchOrder(marked.chunk_rows, 40, seed=1)
    seen = 0
    with stream(marked, "layer_05", 40, seed=1) as batches:
        for number in range(3 * plan.batches_per_epoch):
            planned = np.concatenate(
                [first[p.chunk] + np.arange(p.start, p.start + p.rows) for p in plan.spans(number)]
            )
            expected = []
            for at, row in enumerate(planned):
                seen += row in MARKED
                while row in MARKED:
                    at = (at + 1) % len(planned)
                    row = planned[at]
                expected.append(row)
            assert torch.equal(next(batches).view(torch.int16), rows[expected].view(torch.int16))
    assert seen >= 10  # marked rows were met


def test_a_batch_of_marked_rows_only_is_refused(marked: Cache) -> None:
    with BatchLoader(marked, "layer_05", 1) as batches:
        with pytest.raises(UsageError, match="only rows over --max-norm. Harvest again with a larger --max-norm"):
            for _ in range(ROWS):
                next(batches)


def test_marking_again_writes_no_activations(marked: Cache, rows, begin_cache) -> None:
    digests = {name: marked.array_digest(name) for name in ("layer_05", "layer_12")}
    files = {p: p.stat().st_mtime_ns for p in marked.folder.glob("layer_*/c.*")}
    bits = {5: rows.view(torch.int16).numpy().view(np.uint16)}
    writer = begin_cache(marked.folder, bits, 16, compress=marked.layout.compress)
    assert writer.is_finished(10) and not writer.is_finished() and not writer.is_finished(20)
    writer.finish()
    after = Cache(marked.folder)
    assert not len(after.outlier_rows("layer_05")) and after.outlier_rows("layer_12").tolist() == list(MARKED)
    assert (
        after.array_digest("layer_05") != digests["layer_05"] and after.array_digest("layer_12") == digests["layer_12"]
    )
    assert {p: p.stat().st_mtime_ns for p in marked.folder.glob("layer_*/c.*")} == files


def test_batches_of_a_compressed_cache_are_the_same(tmp_path, rows, begin_cache, write_some) -> None:
    read = []
    for compress in (False, True):
        bits = {5: rows.view(torch.int16).numpy().view(np.uint16)}
        writer = begin_cache(tmp_path / str(compress), bits, 64, compress=compress)
        write_some(writer, bits, list(writer.missing_windows()))
        writer.finish()
        cache = Cache(tmp_path / str(compress))
        assert np.array_equal(np.concatenate([cache.read_chunk("layer_05", n) for n in range(4)]), bits[5])
        with open_loader(cache, "layer_05", 24, seed=3, batch=2, device="cpu") as batches:
            read.append([next(batches).clone() for _ in range(20)])
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*read, strict=True))


def test_what_is_resident_is_the_same_stream(marked: Cache) -> None:
    with (
        BatchLoader(marked, "layer_12", 24, seed=2, batch=5) as batches,
        ResidentLoader(marked, "layer_12", 24, seed=2, batch=5) as resident,
    ):
        for _ in range(25):
            assert torch.equal(next(batches).view(torch.int16), next(resident).view(torch.int16))
        assert batches.batch == resident.batch == 30

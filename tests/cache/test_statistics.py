"""Statistics of the rows, with and without outliers."""

import re

import numpy as np
import pytest
import torch

from sae.cache.reader import Cache
from sae.cache.statistics import describe_statistics

D = 8
ROWS = 40


def test_statistics_equal_numpy_in_float64(cache: Cache, finite_bits) -> None:
    rows = torch.from_numpy(finite_bits(ROWS, D, 12)).view(torch.bfloat16).double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    statistics = cache.statistics("layer_12")
    np.testing.assert_allclose(cache.mean("layer_12"), rows.mean(0), rtol=1e-12)
    assert statistics["count"] == ROWS
    assert statistics["mean_square_norm"] == pytest.approx((norms**2).mean(), rel=1e-12)
    assert statistics["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)
    assert statistics["norm_of_mean"] == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-12)
    assert statistics["mean_norm"] == pytest.approx(norms.mean(), rel=1e-6)  # norms are stored in float32
    assert statistics["norm_quantiles"]["0.9"] == pytest.approx(np.quantile(norms, 0.9), rel=1e-6)


def test_outlier_dimensions_are_listed(write_cache) -> None:
    rows = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
    rows[:, 3] += 40
    cache = write_cache({5: rows.bfloat16().view(torch.int16).numpy().view(np.uint16)})
    assert list(cache.statistics("layer_05")["outlier_dimensions"]) == ["3"]
    assert cache.statistics("layer_05")["outlier_dimensions"]["3"]["mean"] == pytest.approx(40, abs=1)


def test_an_outlier_dimension_has_over_eight_times_the_median_root_mean_square(write_cache) -> None:
    rows = torch.ones(ROWS, D)
    rows[:, 1], rows[:, 2], rows[:, 6] = 7.5, 8.0, 8.5
    cache = write_cache({5: rows.bfloat16().view(torch.int16).numpy().view(np.uint16)})
    assert list(cache.statistics("layer_05")["outlier_dimensions"]) == ["6"]


def test_rows_over_max_norm_are_outliers(outlier_cache: Cache, outliers: list[int]) -> None:
    assert outlier_cache.outlier_rows("layer_05").tolist() == outliers
    statistics = outlier_cache.statistics("layer_05")
    assert (statistics["marked"], statistics["count"], statistics["max_norm"]) == (5, 195, 10)


def test_statistics_exclude_outliers(
    outlier_cache: Cache, rows_with_outliers: torch.Tensor, outliers: list[int]
) -> None:
    others = np.delete(rows_with_outliers.double().numpy(), outliers, 0)
    statistics = outlier_cache.statistics("layer_05")
    assert statistics["variance"] == pytest.approx(others.var(0).mean(), rel=1e-9)
    assert statistics["mean_square_norm"] == pytest.approx((others**2).sum(1).mean(), rel=1e-9)
    np.testing.assert_allclose(outlier_cache.mean("layer_05"), others.mean(0), rtol=1e-9, atol=1e-12)


def test_changing_max_norm_writes_no_activations(
    outlier_cache: Cache, rows_with_outliers, outliers, make_writer
) -> None:
    digests = {name: outlier_cache.array_digest(name) for name in ("layer_05", "layer_12")}
    files = {p: p.stat().st_mtime_ns for p in outlier_cache.folder.glob("layer_*/c.*")}
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    writer = make_writer(outlier_cache.folder, bits, 16, compress=outlier_cache.layout.compress)
    assert writer.is_finished(10) and not writer.is_finished() and not writer.is_finished(20)
    writer.finish()
    both = make_writer(outlier_cache.folder, bits | {12: bits[5]}, 16, compress=outlier_cache.layout.compress)
    assert not both.is_finished(10) and not both.is_finished()
    after = Cache(outlier_cache.folder)
    assert not len(after.outlier_rows("layer_05")) and after.outlier_rows("layer_12").tolist() == outliers
    assert after.array_digest("layer_05") != digests["layer_05"]
    assert after.array_digest("layer_12") == digests["layer_12"]
    assert {p: p.stat().st_mtime_ns for p in outlier_cache.folder.glob("layer_*/c.*")} == files


def test_statistics_are_described_in_one_line(outlier_cache: Cache) -> None:
    line = describe_statistics(outlier_cache.statistics("layer_05"))
    assert re.fullmatch(
        r"mean norm [\d.]+ \(1% [\d.]+, median [\d.]+, 99\.9% [\d.]+\), elementwise variance [\d.]+, "
        r"0 outlier dimensions, 5 rows over 10x the median norm masked",
        line,
    )

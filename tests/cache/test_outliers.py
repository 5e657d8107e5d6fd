"""Rows with large norms: what is reported about them, and when a warning names the option that masks them."""

import numpy as np
import pytest
import torch

from sae.cache.hooks import Hook
from sae.cache.outliers import TOP_SHARE, describe_largest, norm_limit, outlier_warning, rows_above, top_rows
from sae.cache.reader import Cache
from sae.common.cache_schemas import MANIFEST_RECORD


def share_of_variance(rows: np.ndarray) -> float:
    """The share of the variance of rows (R, d) that is due to the 0.1 % of the rows with the largest norms."""
    centered = np.square(rows - rows.mean(0)).sum(1)
    top = np.argsort(np.square(rows).sum(1))[-int(np.ceil(len(rows) * TOP_SHARE)) :]
    return float(centered[top].sum() / centered.sum())


def test_the_limit_is_a_multiple_of_the_median_and_exceeded_strictly() -> None:
    norms = np.array([1.0, 2.0, 3.0, 20.0, 21.0], np.float32)
    assert norm_limit(norms, 7.0) == 21.0 and norm_limit(norms, None) is None
    assert rows_above(norms, 20.0).tolist() == [4]
    assert rows_above(norms, None).tolist() == []


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (999, 1), (1000, 1), (1001, 2), (5000, 5)])
def test_the_top_rows_are_a_thousandth_rounded_up(rows: int, count: int) -> None:
    norms = np.random.default_rng(0).permutation(rows).astype(np.float32)
    assert set(norms[top_rows(norms)]) == set(range(rows - count, rows))


def test_the_share_of_the_top_rows_is_that_of_numpy(outlier_cache: Cache, rows_with_outliers, outliers) -> None:
    largest = outlier_cache.statistics("layer_05")["largest"]
    rows = rows_with_outliers.double().numpy()
    assert largest["norm"] == pytest.approx(np.linalg.norm(rows, axis=1).max(), rel=1e-6)
    assert largest["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)
    assert largest["share"] == pytest.approx(share_of_variance(rows), rel=1e-9)
    assert largest["share_unmasked"] == pytest.approx(share_of_variance(np.delete(rows, outliers, 0)), rel=1e-9)
    # Row r is position 1 + r % 7 of context r // 7, whose tokens are 8 (r // 7) + position.
    assert largest["rows"] == 5
    assert dict(largest["positions"]) == {4: 2, 6: 2, 5: 1}  # rows 3, 4, 5, 47, 199
    assert {token for token, _, _ in largest["tokens"]} <= {8 * (r // 7) + 1 + r % 7 for r in outliers}


def test_tokens_are_shown_as_text_where_the_harvest_gave_it(outlier_cache, rows_with_outliers, make_writer) -> None:
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    writer = make_writer(outlier_cache.folder, bits, 16, compress=outlier_cache.layout.compress)
    writer.finish(10, token_text=lambda token: f"<{token}>")
    line = describe_largest(Cache(outlier_cache.folder).statistics("layer_05"))
    assert line.startswith("largest norm ")
    assert " without the masked rows); the 5 largest rows by position: 2 at 4, 2 at 6, 1 at 5; by token: " in line
    assert "1 of '<4>', " in line


def test_a_warning_names_the_option_that_masks_the_rows(outlier_cache, rows_with_outliers, make_writer) -> None:
    assert outlier_warning("layer_05", outlier_cache.statistics("layer_05")) is None
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    writer = make_writer(outlier_cache.folder, bits, 16, compress=outlier_cache.layout.compress)
    writer.finish(None)
    described = "\n".join(Cache(outlier_cache.folder).describe_outliers(Hook(5)))
    assert "warning  layer_05: 0.1% of the unmasked rows hold " in described and "with --max-norm 10;" in described
    assert len(Cache(outlier_cache.folder).describe_outliers(Hook(12))) == 1
    writer.finish(1000)
    warning = outlier_warning("layer_05", Cache(outlier_cache.folder).statistics("layer_05"))
    assert warning is not None and "with a --max-norm below 1000;" in warning


@pytest.mark.parametrize(("share", "warns"), [(0.1, False), (0.1001, True)])
def test_a_warning_is_about_over_a_tenth_of_the_variance_of_the_unmasked_rows(share: float, warns: bool) -> None:
    largest = {"share": 0.9, "share_unmasked": share}
    assert (outlier_warning("layer_05", {"largest": largest, "max_norm": 10.0}) is not None) == warns


def test_a_limit_that_no_row_exceeds_changes_no_digest(cache: Cache, finite_bits, make_writer) -> None:
    """Runs on caches of older versions, which had no default limit, therefore keep their names and can be resumed."""
    before = cache.array_digest("layer_05")
    writer = make_writer(cache.folder, {5: finite_bits(40, 8, 5)}, 16)
    writer.finish(1e15)
    after = Cache(cache.folder)
    assert after.norm_limit("layer_05") is not None and not len(after.outlier_rows("layer_05"))
    assert after.array_digest("layer_05") == before


def test_the_statistics_of_an_older_version_are_read(outlier_cache: Cache) -> None:
    path = outlier_cache.folder / "manifest.json"
    manifest = MANIFEST_RECORD.read(path)
    del manifest["statistics"]["layer_05"]["largest"]
    MANIFEST_RECORD.write(path, manifest)
    older = Cache(outlier_cache.folder)
    statistics = older.statistics("layer_05")
    assert describe_largest(statistics) == "" and outlier_warning("layer_05", statistics) is None
    assert older.describe_outliers(Hook(5)) == []
    assert older.norm_limit("layer_05") == outlier_cache.norm_limit("layer_05")


def test_a_limit_counts_in_the_digest_of_an_older_version_even_if_no_row_exceeds_it(
    cache, finite_bits, make_writer
) -> None:
    writer = make_writer(cache.folder, {5: finite_bits(40, 8, 5)}, 16)
    writer.finish(1e15)
    path = cache.folder / "manifest.json"
    manifest = MANIFEST_RECORD.read(path)
    digests = []
    for max_norm, limit in ((1e15, manifest["statistics"]["layer_05"]["norm_limit"]), (None, None)):
        manifest["statistics"]["layer_05"].pop("largest", None)
        manifest["statistics"]["layer_05"] |= {"max_norm": max_norm, "norm_limit": limit}
        MANIFEST_RECORD.write(path, manifest)
        digests.append(Cache(cache.folder).array_digest("layer_05"))
    assert digests[1] == cache.array_digest("layer_05") != digests[0]

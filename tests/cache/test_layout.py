"""How rows are split into chunks and compressed blocks."""

import pytest

from sae.cache.layout import Layout


@pytest.mark.parametrize(("chunk_rows", "block"), [(8192, 256), (100, 100), (2048, 256), (1000, 250), (4099, 4099)])
def test_a_chunk_is_a_whole_number_of_blocks(chunk_rows: int, block: int) -> None:
    assert Layout(chunk_rows, chunk_rows, compress=True).block_rows == block


@pytest.mark.parametrize("rows", [1, 99, 100, 101, 250, 300])
def test_rows_in_windows_are_those_of_their_ranges(rows: int) -> None:
    layout = Layout(rows, 100)
    every = range(layout.n_windows)
    for windows in ([], every, every[::2], every[1:], list(every)[-1:], sorted(every, reverse=True)):
        assert layout.rows_in(windows) == sum(len(layout.row_range(window)) for window in windows)

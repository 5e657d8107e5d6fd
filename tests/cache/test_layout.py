"""How rows are split into chunks and compressed blocks."""

import pytest

from sae.cache.layout import Layout


@pytest.mark.parametrize(("chunk_rows", "block"), [(8192, 256), (100, 100), (2048, 256), (1000, 250), (4099, 4099)])
def test_a_chunk_is_a_whole_number_of_blocks(chunk_rows: int, block: int) -> None:
    assert Layout(chunk_rows, chunk_rows, compress=True).block_rows == block

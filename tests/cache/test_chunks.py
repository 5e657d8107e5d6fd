"""Every reader of a chunk file sees the same bits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from sae.cache.chunks import Shard, check_chunk, map_chunk, read_rows, write_chunk
from sae.cache.layout import ArraySpec, Layout, group_metadata, token_arrays
from sae.common.cache_schemas import ARRAY_RECORD, GROUP_RECORD
from sae.common.errors import DamagedError

D = 16
ROWS = 4100  # times 16: each of the 65,536 patterns, so every NaN, both infinities and -0.0
EVERY_PATTERN = (np.arange(ROWS * D) % 65536).astype(np.uint16).reshape(ROWS, D)


def write_array(folder: Path, rows: np.ndarray, dtype: str, compress: bool = False) -> ArraySpec:
    array = Layout(len(rows), 1024, dtype, compress).activation_arrays("layer_05", rows.shape[1])[0]
    GROUP_RECORD.write(folder / "zarr.json", group_metadata({}))
    ARRAY_RECORD.write(folder / array.name / "zarr.json", array.metadata())
    for chunk in range(array.n_chunks):
        write_chunk(folder, array, chunk, rows[chunk * 1024 : (chunk + 1) * 1024])
    return array


def test_every_reader_sees_the_same_bits(tmp_path: Path) -> None:
    array = write_array(tmp_path, EVERY_PATTERN, "bfloat16")
    assert array.n_chunks == 5  # the last holds 4 rows of 1,024
    ours = np.concatenate([map_chunk(tmp_path, array, n) for n in range(5)])
    files = [tmp_path / "layer_05" / f"c.{n}.0" for n in range(5)]
    prefixes = [np.memmap(file, np.uint16, "r", shape=(1024, D)) for file in files]
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "layer_05")}}
    for read in (
        ours,
        np.concatenate(prefixes)[:ROWS],
        zarr.open_array(str(tmp_path / "layer_05"), mode="r")[:],
        zarr.open_group(str(tmp_path), mode="r")["layer_05"][:],
        tensorstore.open(store).result().read().result().view(np.uint16),
    ):
        assert read.dtype == np.uint16 and np.array_equal(read, EVERY_PATTERN)
    assert [name for name, _ in zarr.open_group(str(tmp_path), mode="r").members()] == ["layer_05"]
    assert not np.concatenate(prefixes)[ROWS:].any()  # the padding of the last chunk


@pytest.mark.parametrize("dtype", ["bfloat16", "uint16"])
def test_every_reader_decodes_the_same_bits(tmp_path: Path, dtype: str) -> None:
    array = write_array(tmp_path, EVERY_PATTERN, dtype, compress=True)
    assert array.block_rows == 256
    path = tmp_path / "layer_05"
    shards = [Shard(tmp_path, array, n, (path / f"c.{n}.0").stat().st_size) for n in range(5)]
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    for read in (
        np.concatenate([shard.decode_block(n) for shard in shards for n in range(4)])[:ROWS],
        zarr.open_array(str(path), mode="r")[:],
        tensorstore.open(store).result().read().result().view(np.uint16),
        np.concatenate([read_rows(tmp_path, array, 0, np.arange(1024), len(shards[0].raw)), EVERY_PATTERN[1024:]]),
    ):
        assert read.dtype == np.uint16 and np.array_equal(read, EVERY_PATTERN)


def test_rows_that_compress_are_compressed(tmp_path: Path) -> None:
    """The compression ratio of normally distributed rows comes close to its limit of 1.53.

    The high byte of a number, its sign and the top of its exponent, carries about 2.6 bits of information.
    """
    normal = torch.randn(4096, 2304, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.int16).numpy()
    array = write_array(tmp_path, normal.view(np.uint16), "bfloat16", compress=True)
    stored = sum((tmp_path / array.chunk_file(n)).stat().st_size for n in range(4))
    assert 1.35 < normal.nbytes / stored < 1.53


def test_a_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    array = Layout(1024, 1024, "bfloat16", True).activation_arrays("layer_05", D)[0]
    file, record = write_chunk(tmp_path, array, 0, EVERY_PATTERN[:1024])
    check_chunk(tmp_path, array, 0, {file: record})
    raw = bytearray((tmp_path / file).read_bytes())
    raw[100] ^= 1
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(
        DamagedError, match="is not the file that the cache lists: a bit was flipped. Run `sae cache repair`"
    ):
        check_chunk(tmp_path, array, 0, {file: record})


def test_uint16_is_read_without_this_package(tmp_path: Path) -> None:
    write_array(tmp_path, EVERY_PATTERN, "uint16")
    script = (
        "import sys, numpy, zarr; a = zarr.open_group(sys.argv[1], mode='r')['layer_05']; "
        "numpy.save(sys.argv[2], a[:]); assert a.attrs['logical_dtype'] == 'bfloat16' and 'sae' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(tmp_path / "read.npy")], check=True)
    assert np.array_equal(np.load(tmp_path / "read.npy"), EVERY_PATTERN)


def test_both_storage_types_write_the_same_files(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "uint16"):
        write_array(tmp_path / dtype, EVERY_PATTERN, dtype)
    for n in range(5):
        one, other = (tmp_path / dtype / "layer_05" / f"c.{n}.0" for dtype in ("bfloat16", "uint16"))
        assert one.read_bytes() == other.read_bytes()


def test_a_chunk_of_zeros_is_written(tmp_path: Path) -> None:
    array = write_array(tmp_path, np.zeros((1024, D), np.uint16), "bfloat16")
    assert (tmp_path / array.chunk_file(0)).stat().st_size == 1024 * D * 2 + 4


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "uint16"])
def test_a_lost_chunk_reads_as_nan(tmp_path: Path, dtype: str, compress: bool) -> None:
    array = write_array(tmp_path, EVERY_PATTERN, dtype, compress)
    (tmp_path / array.chunk_file(1)).unlink()
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "layer_05")}}
    for read in (
        zarr.open_array(str(tmp_path / "layer_05"), mode="r")[:],
        tensorstore.open(store).result().read().result().view(np.uint16),
    ):
        lost = torch.from_numpy(np.asarray(read)).view(torch.bfloat16)[1024:2048]
        assert lost.isnan().all()
        assert np.array_equal(*(np.delete(rows, np.s_[1024:2048], 0) for rows in (read, EVERY_PATTERN)))


def test_lost_norms_and_moments_read_as_nan(tmp_path: Path) -> None:
    """Lost integers and booleans read as zero, because their types have no value for missing data."""
    layout = Layout(ROWS, 1024)
    GROUP_RECORD.write(tmp_path / "zarr.json", group_metadata({}))
    for array in [*layout.arrays({"layer_05": D}), *token_arrays(3, 8, rows=True)]:
        ARRAY_RECORD.write(tmp_path / array.name / "zarr.json", array.metadata())
        lost = zarr.open_array(str(tmp_path / array.name), mode="r")[:]
        assert lost.shape == array.shape
        if lost.dtype.kind == "f":
            assert np.isnan(lost).all()
        elif array.name != "layer_05":
            assert not lost.any()


def test_zarr_refuses_a_flipped_bit(tmp_path: Path) -> None:
    array = write_array(tmp_path, EVERY_PATTERN, "bfloat16")
    file = tmp_path / array.chunk_file(2)
    raw = bytearray(file.read_bytes())
    raw[777] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(tmp_path / "layer_05"), mode="r")[:]

"""Untrusted files: declared sizes are checked against the file, and any bytes give an SAE or raise an SaeError."""

import io
import json
import os
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae.common.errors import DamagedError, SaeError, UsageError
from sae.train.formats.base import Format, detect_format
from sae.train.formats.import_ import import_sae, resolve_hook_and_model
from sae.train.formats.safe_pickle import read_state_dict_headers
from sae.train.formats.safe_read import ForeignFolder, read_npz_headers, read_safetensors_headers, tensor_from_bytes

HUGE = 10**12
FORMATS = sorted(Format.registry)
WEIGHTS = {
    "saelens": "sae_weights.safetensors",
    "gemma-scope": "params.npz",
    "dictionary-learning": "ae.pt",
    "sparsify": "layers.12/sae.safetensors",
    "gemma-scope-2": "params.safetensors",
    "qwen-scope": "layer12.sae.pt",
}


# --- claims, shapes, values -----------------------------------------------------------------------------------------


def rewrite_safetensors_header(path: Path, change: Callable[[dict], None], length: int | None = None) -> None:
    """Change the header of a safetensors file and, with `length`, the header length that the file declares."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + n :])


@pytest.mark.parametrize("to", ["saelens", "sparsify", "gemma-scope-2"])
def test_a_safetensors_header_that_claims_too_much_is_rejected(import_fails, foreign_folder, to):
    folder = foreign_folder(to)
    path = folder / WEIGHTS[to]
    original = path.read_bytes()

    def change_W_dec(**entry):
        path.write_bytes(original)
        rewrite_safetensors_header(path, lambda header: header["w_dec" if "w_dec" in header else "W_dec"].update(entry))

    change_W_dec(shape=[HUGE])
    import_fails(folder, DamagedError, "_dec is declared with 1,000,000,000,000 numbers (4,000,000,000,000 bytes)")
    change_W_dec(shape=[HUGE], data_offsets=[0, 4 * HUGE])
    import_fails(folder, DamagedError, "_dec exceeds the size of the file")
    change_W_dec(shape=[-1, -512])
    import_fails(folder, DamagedError, "has the shape (-1, -512)")
    change_W_dec(shape=[2, 4, 16])
    import_fails(folder, DamagedError, "expected at most two dimensions")
    change_W_dec(dtype="F8_E4M3")
    import_fails(folder, DamagedError, "has dtype 'F8_E4M3'")
    path.write_bytes(original)
    rewrite_safetensors_header(path, lambda header: None, length=HUGE)
    import_fails(folder, DamagedError, "declares a header of 1,000,000,000,000 bytes")


def test_a_config_that_claims_too_many_latents_is_rejected(import_fails, foreign_folder):
    folder = foreign_folder("saelens")
    config = json.loads((folder / "cfg.json").read_text())
    for value in (HUGE, -16, True, "16", 16.0, None, [16]):
        (folder / "cfg.json").write_text(json.dumps({**config, "d_sae": value}))
        import_fails(folder, DamagedError, "d_sae is ", "expected a whole number from 1 to")
    (folder / "cfg.json").write_text(json.dumps({**config, "d_sae": 2**31 - 1}))
    import_fails(folder, DamagedError, "W_enc has shape (8, 16), expected (8, 2147483647)")


def npy_bytes(shape: tuple[int, ...], dtype: str = "<f4", body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def test_an_npz_that_claims_too_much_is_rejected(import_fails, rewrite_zip, foreign_folder):
    folder = foreign_folder("gemma-scope")
    W_enc = npy_bytes((10**6, 10**6))
    rewrite_zip(folder / "params.npz", lambda name, data: W_enc if name == "W_enc.npy" else data)
    import_fails(
        folder,
        DamagedError,
        "W_enc is declared with 1,000,000 x 1,000,000 numbers (4,000,000,000,000 bytes), but has 0 bytes",
    )


def test_an_npz_that_unpacks_to_far_more_than_its_size_is_rejected(import_fails, rewrite_zip, foreign_folder):
    folder = foreign_folder("gemma-scope")
    W_enc = npy_bytes((8, 2_000_000), body=bytes(64_000_000))
    change = lambda name, data: W_enc if name == "W_enc.npy" else data  # noqa: E731
    rewrite_zip(folder / "params.npz", change, compression=zipfile.ZIP_DEFLATED)
    import_fails(folder, DamagedError, "declares 64,00", "bytes of entries, but has")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("defect", ["nan", "transposed", "missing", "surplus"])
def test_invalid_weights_are_rejected(import_fails, foreign_folder, to, defect):
    folder = foreign_folder(to)
    path = folder / WEIGHTS[to]
    read = {".pt": read_state_dict_headers, ".npz": read_npz_headers}.get(path.suffix, read_safetensors_headers)
    tensors = {name: header.read().clone() for name, header in read(path).items()}
    matrix = next(name for name in ("W_dec", "w_dec", "decoder.weight") if name in tensors)
    words = {
        "nan": ("b_dec contains NaN or infinity",),
        "transposed": (f"{matrix} has shape ", "it is transposed; this is not corrected automatically"),
        "missing": ("b_dec",),
        "surplus": ("extra",),
    }[defect]
    if defect == "nan":
        tensors["b_dec"][2] = float("nan")
    elif defect == "transposed":
        tensors[matrix] = tensors[matrix].T.contiguous()
    elif defect == "missing":
        del tensors["b_dec"]
    else:
        tensors["extra"] = torch.zeros(2)
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    else:
        save_file(tensors, path)
    import_fails(folder, DamagedError, *words)


def test_an_invalid_k_is_rejected(import_fails, foreign_folder):
    folder = foreign_folder("sparsify")
    path = folder / "layers.12" / "cfg.json"
    config = json.loads(path.read_text())
    for k in (0, -1, 17, HUGE, True):
        path.write_text(json.dumps({**config, "k": k}))
        import_fails(folder, DamagedError, "k is ")


def test_no_bytes_are_an_empty_tensor():
    assert tensor_from_bytes(bytearray(), (0, 3), torch.float32).shape == (0, 3)


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_a_link_out_of_the_folder_is_rejected(import_fails, foreign_folder, tmp_path, to):
    folder = foreign_folder(to)
    path = folder / WEIGHTS[to]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    import_fails(folder, UsageError, "Refused:", "outside its folder", "cp -rL")
    path.unlink()
    shutil.move(tmp_path / "elsewhere", path.with_name("inside"))
    path.symlink_to("inside")  # a link inside the folder is allowed
    import_sae(folder, out=tmp_path / "runs")


def test_an_archive_entry_that_leads_out_of_it_is_rejected(import_fails, foreign_folder):
    folder = foreign_folder("gemma-scope")
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("../../evil.npy", npy_bytes((1,), body=bytes(4)))
    import_fails(folder, UsageError, "contains '../../evil.npy', which is encrypted or points outside the archive")


def test_a_pipe_in_place_of_a_file_is_not_opened(import_fails, foreign_folder):
    folder = foreign_folder("saelens")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    import_fails(folder, DamagedError, "cfg.json is missing")


# --- fuzz -----------------------------------------------------------------------------------------------------------

READERS = {
    "saelens": read_safetensors_headers,
    "gemma-scope": read_npz_headers,
    "dictionary-learning": read_state_dict_headers,
}
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.lists(st.integers(-2, 2**70), max_size=3)
SAFETENSORS_ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16"]) | JSON, "shape": SIZES | JSON, "data_offsets": SIZES | JSON}
)
OPCODES = [
    *(b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b"q\x00"),
    *(b"h\x00", b"K\x05", b"N", b"\x88", b"X\x01\x00\x00\x000", b"ctorch\nFloatStorage\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"i", b"0", b"2"),
]
CONFIG_KEYS = [
    *("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "normalize_activations", "norm_scaling_factor"),
    *("metadata", "num_latents", "expansion_factor", "activation", "transcode", "trainer", "buffer", "about"),
    *("hook_name", "model_name", "context_size", "type", "hf_hook_point_in", "hf_hook_point_out", "affine_connection"),
    *("width", "base_model", "d_model", "hook_point", "prepend_bos", "dataset_path"),
]


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> dict[str, bytes]:
    """A valid file of each type."""
    folder = tmp_path_factory.mktemp("files")
    arrays = {"W_enc": torch.randn(3, 5), "b_enc": torch.randn(5)}
    save_file(arrays, folder / "saelens")
    with (folder / "gemma-scope").open("wb") as file:
        np.savez_compressed(file, **{name: t.numpy() for name, t in arrays.items()})
    torch.save(arrays, folder / "dictionary-learning")
    return {name: (folder / name).read_bytes() for name in READERS}


def read_everything(to: str, path: Path) -> None:
    """Read every header and tensor of a file. The only exception allowed is SaeError."""
    tracemalloc.start()
    try:
        for header in READERS[to](path).values():
            assert tuple(header.read().shape) == header.shape
    except SaeError as error:
        assert len(str(error)) > 20
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("to", sorted(READERS))
@FUZZ
@given(data=st.data())
def test_changed_bytes_give_tensors_or_an_error(tmp_path, valid_files, to, data):
    changed = bytearray(valid_files[to])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(changed[: data.draw(st.none() | st.integers(0, len(changed)))])
    read_everything(to, tmp_path / "file")


@pytest.mark.parametrize("to", sorted(READERS))
@FUZZ
@given(noise=st.binary(max_size=400), head=st.integers(0, 64))
def test_random_bytes_give_an_error(tmp_path, valid_files, to, noise, head):
    (tmp_path / "file").write_bytes(valid_files[to][:head] + noise)
    read_everything(to, tmp_path / "file")


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["W_enc", "b_enc", "__metadata__"]), JSON | SAFETENSORS_ENTRY))
def test_any_safetensors_header_gives_tensors_or_an_error(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(80))
    read_everything("saelens", tmp_path / "file")


@FUZZ
@given(program=st.lists(st.sampled_from(OPCODES), max_size=40))
def test_any_pickle_gives_tensors_or_an_error(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"".join(program) + b".")
        archive.writestr("a/data/0", bytes(20))
    read_everything("dictionary-learning", tmp_path / "file")


@pytest.mark.parametrize("to", [pytest.param(to, marks=() if to in READERS else pytest.mark.slow) for to in FORMATS])
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON, min_size=1, max_size=4))
def test_any_config_gives_an_sae_or_an_error(foreign_folder, tmp_path, to, changes):
    original, changed = tmp_path / to, tmp_path / "changed"
    if not changed.exists():
        foreign_folder(to)
        shutil.copytree(original, changed)
    for path in original.rglob("*.json"):
        config = json.dumps({**json.loads(path.read_text()), **changes})
        (changed / path.relative_to(original)).write_text(config)
    folder = ForeignFolder(changed)
    try:
        fmt = detect_format(folder)
        foreign = fmt.read(folder)
        resolve_hook_and_model(foreign, folder.path, "gpt2", 12)
        f_BF, recon_BD = fmt.reference(folder)(torch.zeros(2, 8))
        assert foreign.sae.encode(torch.zeros(2, 8)).shape == f_BF.shape
    except SaeError as error:
        assert len(str(error)) > 20

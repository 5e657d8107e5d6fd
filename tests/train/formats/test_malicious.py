"""Files of an enemy: a sentence, nothing run, no memory taken; and whatever the bytes are, never another exception."""

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae.common.errors import DamagedError, SaeError, UsageError
from sae.train.formats.base import detect_format
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae, resolve_hook_and_model
from sae.train.formats.safe_pickle import read_state_dict_headers
from sae.train.formats.safe_read import ForeignFolder, read_npz_headers, read_safetensors_headers, tensor_from_bytes

HUGE = 10**12
FORMATS = {"saelens": "jumprelu", "gemma-scope": "jumprelu", "dictionary-learning": "topk", "sparsify": "topk"}
WEIGHTS = {
    "saelens": "sae_weights.safetensors", "gemma-scope": "params.npz", "dictionary-learning": "ae.pt",
    "sparsify": "layers.12/sae.safetensors",
}  # fmt: skip


@pytest.fixture
def theirs(make_sae, tmp_path) -> Callable[[str], Path]:
    return lambda to: export_sae(make_sae(FORMATS[to], unit=True), to, tmp_path / "theirs").folder


def refused(folder: Path, kind: type[SaeError], *words: str) -> None:
    """An import is refused with these words, makes no run, and takes less memory than 4 MB."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as error:
            import_sae(folder, out=folder.parent / "runs")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), error.value
    assert not (folder.parent / "runs").exists()


# --- pickles --------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch '{self.marker}'",))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["torch", "bare", "npz"])
def test_a_pickle_with_code_is_refused_and_does_not_run(theirs, tmp_path, where, protocol):
    marker = tmp_path / "ran"
    bomb = {"bias": Runs(marker)}
    if where == "npz":
        folder = theirs("gemma-scope")
        arrays = dict(np.load(folder / "params.npz"))
        np.savez(folder / "params.npz", **{**arrays, "threshold": np.array([Runs(marker)], dtype=object)})
        refused(folder, UsageError, "Refused: threshold in", "is an object array, which is a pickle and can run code")
    else:
        folder = theirs("dictionary-learning")
        if where == "bare":
            (folder / "ae.pt").write_bytes(pickle.dumps(bomb, protocol))
            refused(folder, UsageError, "is not a zip file")
        else:
            torch.save(bomb, folder / "ae.pt", pickle_protocol=protocol)
            refused(folder, UsageError, "Refused:", "Nothing in it was run")
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb, protocol))  # it does run where somebody trusts it
    assert marker.exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    """A zip file with its files changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize(
    ("program", "kind", "word"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", UsageError, "builtins.eval"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", UsageError, "INST"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", UsageError, "SHORT_BINUNICODE"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", DamagedError, "a memo table of 2,147,483,647 entries"),
        (b"\x80\x02X\xff\xff\xff\x7f.", DamagedError, "cannot be read"),
        (b"\x80\x02].", DamagedError, "does not hold a plain dictionary of tensors"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", DamagedError, ""),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", DamagedError, "cannot be read"),
        (b"\x80\x02" + b")" + b"\x85" * 16_000 + b"}" + b".", DamagedError, ""),
        (b"\x80\x02}" + b")" + b"\x85" * 16_000 + b"K\x01s.", DamagedError, ""),
        (b"", DamagedError, "cannot be read"),
    ],
)
def test_a_program_that_does_more_than_name_tensors_is_refused(theirs, program, kind, word):
    folder = theirs("dictionary-learning")
    rewritten(folder / "ae.pt", lambda name, data: program if name.endswith("data.pkl") else data)
    refused(folder, kind, word)


def claimed(shape: tuple[int, ...], elements: int, stride: tuple[int, ...]) -> bytes:
    """The pickle of a state dict whose one tensor claims these sizes."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Stored(), 0, shape, stride, False, OrderedDict())

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, what):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(what, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"b_dec": Tensor()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "elements", "stride"),
    [
        ((HUGE,), HUGE, (1,)),
        ((HUGE,), 8, (0,)),
        ((8,), HUGE, (1,)),
        ((10**6, 10**6), 8, (0, 0)),
        ((8,), 8, (HUGE,)),
        ((8,), 8, (-1,)),
        ((-8,), 8, (1,)),
        ((2**63,), 2**63, (1,)),
        ((2, 2, 2), 8, (4, 2, 1)),
    ],
)
def test_a_tensor_that_claims_more_than_its_storage_is_refused(theirs, shape, elements, stride):
    folder = theirs("dictionary-learning")
    rewritten(folder / "ae.pt", lambda name, data: claimed(shape, elements, stride) if name.endswith(".pkl") else data)
    refused(folder, DamagedError, "ae.pt")


def test_a_transposed_view_of_a_storage_is_read_as_it_is(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": w.T, "b": w[1]}, tmp_path / "ae.pt")
    claims = read_state_dict_headers(tmp_path / "ae.pt")
    assert torch.equal(claims["a"].read(), w.T) and torch.equal(claims["b"].read(), w[1])


# --- claims, shapes, values -----------------------------------------------------------------------------------------


def header_of(path: Path, change: Callable[[dict], None], length: int | None = None) -> None:
    """A safetensors file with its header changed."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + n :])


@pytest.mark.parametrize("to", ["saelens", "sparsify"])
def test_a_safetensors_header_that_claims_10_to_the_12_numbers_is_refused(theirs, to):
    folder = theirs(to)
    path = folder / WEIGHTS[to]
    whole = path.read_bytes()

    def claims(**entry):
        path.write_bytes(whole)
        header_of(path, lambda header: header["W_dec"].update(entry))

    claims(shape=[HUGE])
    refused(folder, DamagedError, "W_dec claims 1,000,000,000,000 numbers, 4,000,000,000,000 bytes")
    claims(shape=[HUGE], data_offsets=[0, 4 * HUGE])
    refused(folder, DamagedError, "W_dec would be outside of the file")
    claims(shape=[-1, -512])
    refused(folder, DamagedError, "has the shape (-1, -512)")
    claims(shape=[2, 4, 16])
    refused(folder, DamagedError, "expected at most two sizes")
    claims(dtype="F8_E4M3")
    refused(folder, DamagedError, "has dtype 'F8_E4M3'")
    path.write_bytes(whole)
    header_of(path, lambda header: None, length=HUGE)
    refused(folder, DamagedError, "claims a header of 1,000,000,000,000 bytes")


def test_a_configuration_that_claims_10_to_the_12_latents_is_refused(theirs):
    folder = theirs("saelens")
    config = json.loads((folder / "cfg.json").read_text())
    for value in (HUGE, -16, True, "16", 16.0, None, [16]):
        (folder / "cfg.json").write_text(json.dumps({**config, "d_sae": value}))
        refused(folder, DamagedError, "d_sae is ", "expected a whole number from 1 to")
    (folder / "cfg.json").write_text(json.dumps({**config, "d_sae": 2**31 - 1}))
    refused(folder, DamagedError, "W_enc has shape (8, 16), expected (8, 2147483647)")


def npz_with(path: Path, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    rewritten(path, lambda entry, old: data if entry == f"{name}.npy" else old, compression=compression)


def npy(shape: tuple[int, ...], kind: str = "<f4", body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def test_an_npz_that_claims_10_to_the_12_numbers_is_refused(theirs):
    folder = theirs("gemma-scope")
    npz_with(folder / "params.npz", "W_enc", npy((10**6, 10**6)))
    refused(folder, DamagedError, "W_enc claims 1,000,000 x 1,000,000 numbers, 4,000,000,000,000 bytes, but has 0")


def test_an_npz_whose_zeros_fill_the_memory_is_refused(theirs):
    folder = theirs("gemma-scope")
    npz_with(folder / "params.npz", "W_enc", npy((8, 2_000_000), body=bytes(64_000_000)), zipfile.ZIP_DEFLATED)
    refused(folder, DamagedError, "claims to hold 64,00", "bytes, but has")


def test_a_compressed_state_dict_is_refused(theirs):
    folder = theirs("dictionary-learning")
    rewritten(folder / "ae.pt", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    refused(folder, DamagedError, "is compressed, which torch.save never does")


@pytest.mark.parametrize("to", sorted(FORMATS))
@pytest.mark.parametrize("what", ["nan", "transposed", "missing", "surplus"])
def test_weights_that_cannot_be_are_refused(theirs, to, what):
    folder = theirs(to)
    path = folder / WEIGHTS[to]
    read = {"ae.pt": read_state_dict_headers, "params.npz": read_npz_headers}.get(path.name, read_safetensors_headers)
    found = {name: claim.read().clone() for name, claim in read(path).items()}
    matrix = "W_dec" if "W_dec" in found else "decoder.weight"
    words = {
        "nan": ("b_dec holds NaN or infinity",),
        "transposed": (f"{matrix} has shape ", "it is transposed; this is not corrected automatically"),
        "missing": ("b_dec",),
        "surplus": ("extra",),
    }[what]
    if what == "nan":
        found["b_dec"][2] = float("nan")
    elif what == "transposed":
        found[matrix] = found[matrix].T.contiguous()
    elif what == "missing":
        del found["b_dec"]
    else:
        found["extra"] = torch.zeros(2)
    if path.name == "ae.pt":
        torch.save(found, path)
    elif path.name == "params.npz":
        np.savez(path, **{name: t.numpy() for name, t in found.items()})
    else:
        save_file(found, path)
    refused(folder, DamagedError, *words)


def test_a_wrong_k_is_refused(theirs):
    folder = theirs("sparsify")
    path = folder / "layers.12" / "cfg.json"
    config = json.loads(path.read_text())
    for k in (0, -1, 17, HUGE, True):
        path.write_text(json.dumps({**config, "k": k}))
        refused(folder, DamagedError, "k is ")


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_a_link_that_leaves_the_folder_is_refused(theirs, tmp_path, to):
    folder = theirs(to)
    path = folder / WEIGHTS[to]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, UsageError, "Refused:", "is a link out of its folder", "cp -rL")
    path.unlink()
    shutil.move(tmp_path / "elsewhere", path.with_name("inside"))
    path.symlink_to("inside")  # one that stays is what it points at
    import_sae(folder, out=tmp_path / "runs")


def test_a_name_that_leaves_an_archive_is_refused(theirs):
    folder = theirs("gemma-scope")
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("../../evil.npy", npy((1,), body=bytes(4)))
    refused(folder, UsageError, "holds '../../evil.npy', which leads out of the archive")


def test_a_pipe_in_place_of_a_file_is_not_opened(theirs):
    folder = theirs("saelens")
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")
    refused(folder, DamagedError, "cfg.json is missing")


# --- fuzz -----------------------------------------------------------------------------------------------------------

READERS = {
    "saelens": read_safetensors_headers,
    "gemma-scope": read_npz_headers,
    "dictionary-learning": read_state_dict_headers,
}
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """A good file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    arrays = {"W_enc": torch.randn(3, 5), "b_enc": torch.randn(5)}
    save_file(arrays, folder / "saelens")
    with (folder / "gemma-scope").open("wb") as file:
        np.savez_compressed(file, **{name: t.numpy() for name, t in arrays.items()})
    torch.save(arrays, folder / "dictionary-learning")
    return {name: (folder / name).read_bytes() for name in READERS}


def read_all(to: str, path: Path) -> None:
    """Every claim of a file, and every tensor; its own error is the only one that may come."""
    tracemalloc.start()
    try:
        for claim in READERS[to](path).values():
            assert tuple(claim.read().shape) == claim.shape
    except SaeError as error:
        assert len(str(error)) > 20
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("to", sorted(READERS))
@FUZZ
@given(data=st.data())
def test_changed_bytes_give_an_object_or_a_sentence(tmp_path, whole, to, data):
    changed = bytearray(whole[to])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(changed[: data.draw(st.none() | st.integers(0, len(changed)))])
    read_all(to, tmp_path / "file")


@pytest.mark.parametrize("to", sorted(READERS))
@FUZZ
@given(noise=st.binary(max_size=400), head=st.integers(0, 64))
def test_random_bytes_give_a_sentence(tmp_path, whole, to, noise, head):
    (tmp_path / "file").write_bytes(whole[to][:head] + noise)
    read_all(to, tmp_path / "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["W_enc", "b_enc", "__metadata__"]), JSON | st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16"]) | JSON, "shape": st.lists(st.integers(-2, 2**70), max_size=3) | JSON, "data_offsets": st.lists(st.integers(-2, 2**70), max_size=3) | JSON})))  # fmt: skip
def test_any_safetensors_header_gives_an_object_or_a_sentence(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(80))
    read_all("saelens", tmp_path / "file")


OPCODES = st.sampled_from([b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b"q\x00", b"h\x00", b"K\x05", b"N", b"\x88", b"X\x01\x00\x00\x000", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"i", b"0", b"2"])  # fmt: skip


@FUZZ
@given(program=st.lists(OPCODES, max_size=40))
def test_any_pickle_gives_an_object_or_a_sentence(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"".join(program) + b".")
        archive.writestr("a/data/0", bytes(20))
    read_all("dictionary-learning", tmp_path / "file")


@pytest.mark.parametrize("to", sorted(FORMATS))
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(["architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "normalize_activations", "norm_scaling_factor", "metadata", "num_latents", "expansion_factor", "activation", "transcode", "trainer", "buffer", "about", "hook_name", "model_name", "context_size"]), JSON, min_size=1, max_size=4))  # fmt: skip
def test_any_configuration_gives_an_sae_or_a_sentence(theirs, tmp_path, to, changes):
    if not (tmp_path / "theirs").exists():
        theirs(to)
        shutil.copytree(tmp_path / "theirs", tmp_path / "changed")
    for path in (tmp_path / "theirs").rglob("*.json"):
        changed = json.dumps({**json.loads(path.read_text()), **changes})
        (tmp_path / "changed" / path.relative_to(tmp_path / "theirs")).write_text(changed)
    folder = ForeignFolder(tmp_path / "changed")
    try:
        kind = detect_format(folder)
        found = kind.read(folder)
        resolve_hook_and_model(found, folder.path, "gpt2", 12)
        f_BF, recon_BD = kind.reference(folder)(torch.zeros(2, 8))
        assert found.sae.encode(torch.zeros(2, 8)).shape == f_BF.shape
    except SaeError as error:
        assert len(str(error)) > 20


def test_nothing_is_a_tensor_of_nothing():
    assert tensor_from_bytes(bytearray(), (0, 3), torch.float32).shape == (0, 3)

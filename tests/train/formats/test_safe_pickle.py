"""Untrusted pickles: none of their code runs, and every size that they declare is checked."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.common.errors import DamagedError, UsageError
from sae.train.formats.safe_pickle import read_state_dict_headers

HUGE = 10**12


class RunsCode:
    """An object that creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch '{self.marker}'",))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["torch", "bare", "npz", "qwen"])
def test_a_pickle_with_code_is_rejected_and_does_not_run(import_fails, foreign_folder, tmp_path, where, protocol):
    marker = tmp_path / "ran"
    bomb = {"bias": RunsCode(marker)}
    if where == "npz":
        folder = foreign_folder("gemma-scope")
        arrays = dict(np.load(folder / "params.npz"))
        np.savez(folder / "params.npz", **{**arrays, "threshold": np.array([RunsCode(marker)], dtype=object)})
        import_fails(
            folder, UsageError, "Refused: threshold in", "is an object array, which is a pickle and can run code"
        )
    else:
        folder = foreign_folder("qwen-scope" if where == "qwen" else "dictionary-learning")
        file = folder / ("layer12.sae.pt" if where == "qwen" else "ae.pt")
        if where == "bare":
            file.write_bytes(pickle.dumps(bomb, protocol))
            import_fails(folder, UsageError, "is not a zip file")
        else:
            torch.save(bomb, file, pickle_protocol=protocol)
            import_fails(folder, UsageError, "Refused:", "Nothing in it was run")
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb, protocol))  # the pickle does create the file when it is loaded
    assert marker.exists()


@pytest.mark.parametrize(
    ("program", "error_type", "word"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", UsageError, "builtins.eval"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", UsageError, "INST"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", UsageError, "SHORT_BINUNICODE"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", DamagedError, "a memo table of 2,147,483,647 entries"),
        (b"\x80\x02X\xff\xff\xff\x7f.", DamagedError, "cannot be read"),
        (b"\x80\x02].", DamagedError, "is not a plain dictionary of tensors"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", DamagedError, ""),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", DamagedError, "cannot be read"),
        (b"\x80\x02" + b")" + b"\x85" * 16_000 + b"}" + b".", DamagedError, ""),
        (b"\x80\x02}" + b")" + b"\x85" * 16_000 + b"K\x01s.", DamagedError, ""),
        (b"", DamagedError, "cannot be read"),
    ],
)
def test_a_pickle_that_does_more_than_describe_tensors_is_rejected(
    import_fails, rewrite_zip, foreign_folder, program, error_type, word
):
    folder = foreign_folder("dictionary-learning")
    rewrite_zip(folder / "ae.pt", lambda name, data: program if name.endswith("data.pkl") else data)
    import_fails(folder, error_type, word)


def pickle_claiming(shape: tuple[int, ...], elements: int, stride: tuple[int, ...]) -> bytes:
    """The pickle of a state dict with one tensor that declares this shape, stride and number of stored elements."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, stride, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(obj, Storage) else None

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
def test_a_tensor_that_claims_more_than_its_storage_is_rejected(
    import_fails, rewrite_zip, foreign_folder, shape, elements, stride
):
    folder = foreign_folder("dictionary-learning")
    rewrite_zip(
        folder / "ae.pt", lambda name, data: pickle_claiming(shape, elements, stride) if name.endswith(".pkl") else data
    )
    import_fails(folder, DamagedError, "ae.pt")


def test_a_compressed_state_dict_is_rejected(import_fails, rewrite_zip, foreign_folder):
    folder = foreign_folder("dictionary-learning")
    rewrite_zip(folder / "ae.pt", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    import_fails(folder, DamagedError, "is compressed, which torch.save never does")


def test_views_of_a_storage_are_read_with_their_strides(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": w.T, "b": w[1]}, tmp_path / "ae.pt")
    headers = read_state_dict_headers(tmp_path / "ae.pt")
    assert torch.equal(headers["a"].read(), w.T) and torch.equal(headers["b"].read(), w[1])

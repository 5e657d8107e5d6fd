"""This package and other libraries compute the same latents and reconstructions from each other's files.

The libraries need not be installed: their files and outputs are fixtures that benchmarks/peers/formats.py writes.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.cache.hooks import Hook
from sae.train.formats.base import Format
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.safe_read import ForeignFolder
from sae.train.sae import load_sae

FIXTURES = Path(__file__).parent / "fixtures"
OUTPUTS_FROM_EXPORTS = {path.stem: load_file(path) for path in sorted((FIXTURES / "read").glob("*.safetensors"))}
OUTPUTS_FROM_OWN_FILES = {path.stem: load_file(path) for path in sorted((FIXTURES / "written").glob("*.safetensors"))}
EXPORTED = [
    (library, key[:-2]) for library, tensors in OUTPUTS_FROM_EXPORTS.items() for key in tensors if key.endswith(".f")
]
OWN_FILES = [
    (library, key[:-2]) for library, tensors in OUTPUTS_FROM_OWN_FILES.items() for key in tensors if key.endswith(".f")
]


def assert_agree(ours: tuple[Tensor, Tensor], theirs: dict[str, Tensor], name: str) -> None:
    """Active sets are equal, f and x_hat agree to a relative 1e-6, and some but not all latents are active."""
    f_RF, recon_RD = theirs[f"{name}.f"].double(), theirs[f"{name}.x_hat"].double()
    assert 0 < (f_RF > 0).float().mean() < 0.9
    assert torch.equal(ours[0] > 0, f_RF > 0)
    assert (ours[0] - f_RF).norm() < 1e-6 * f_RF.norm()
    assert (ours[1] - recon_RD).norm() < 1e-6 * recon_RD.norm()


def test_every_library_and_format_has_fixtures():
    assert {library.rsplit("-", 1)[0] for library, _ in EXPORTED} == {
        "sae-lens", "sae-bench", "dictionary-learning", "eai-sparsify"
    }  # fmt: skip
    assert {name.split("--")[1] for _, name in EXPORTED} == set(Format.exported())
    assert len(OWN_FILES) == 31


@pytest.mark.parametrize(("library", "name"), EXPORTED)
def test_a_library_computes_the_same_from_our_exports(library, name, tmp_path, x_RD):
    activation, to = name.split("--")
    run = FIXTURES / "ours" / activation
    result = export_sae(run, to, tmp_path / "out")
    assert result.check.ambiguous_rows == 0
    assert_agree(Format.registry[to].reference(ForeignFolder(result.folder))(x_RD), OUTPUTS_FROM_EXPORTS[library], name)
    sae = load_sae(run).double()
    f_RF = sae.encode(x_RD.double())
    assert_agree((f_RF.detach(), sae.decode(f_RF).detach()), OUTPUTS_FROM_EXPORTS[library], name)


@pytest.mark.parametrize(("library", "case"), OWN_FILES)
def test_we_compute_the_same_from_a_librarys_own_files(library, case, tmp_path, x_RD):
    folder = FIXTURES / "written" / library / case
    result = import_sae(folder, out=tmp_path)
    sae = load_sae(result.folder)
    assert sae.origin["model"]["name"] == "google/gemma-2-2b"
    assert (Hook(sae.origin["layer"], sae.origin["site"]), sae.origin["context"]) == (Hook(12), 128)
    sae = sae.double()
    f_RF = sae.encode(x_RD.double()).detach()
    assert_agree((f_RF, sae.decode(f_RF).detach()), OUTPUTS_FROM_OWN_FILES[library], case)

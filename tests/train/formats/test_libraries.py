"""What other libraries compute, without them: their outputs and files are fixtures that benchmarks/peers/formats.py wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.cache.layout import Hook
from sae.train.formats.base import Format
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.safe_read import ForeignFolder
from sae.train.sae import load_sae

FIXTURES = Path(__file__).parent / "fixtures"
READ = {path.stem: load_file(path) for path in sorted((FIXTURES / "read").glob("*.safetensors"))}
WROTE = {path.stem: load_file(path) for path in sorted((FIXTURES / "written").glob("*.safetensors"))}
ASKED = [(library, key[:-2]) for library, found in READ.items() for key in found if key.endswith(".f")]
WRITTEN = [(library, key[:-2]) for library, found in WROTE.items() for key in found if key.endswith(".f")]


def same(ours: tuple[Tensor, Tensor], theirs: dict[str, Tensor], name: str) -> None:
    """Active sets equal and f and x_hat within 1e-6; some latents fire, and not all."""
    f_RF, recon_RD = theirs[f"{name}.f"].double(), theirs[f"{name}.x_hat"].double()
    assert 0 < (f_RF > 0).float().mean() < 0.9
    assert torch.equal(ours[0] > 0, f_RF > 0)
    assert (ours[0] - f_RF).norm() < 1e-6 * f_RF.norm()
    assert (ours[1] - recon_RD).norm() < 1e-6 * recon_RD.norm()


def test_every_library_and_format_is_there():
    assert {library.rsplit("-", 1)[0] for library, _ in ASKED} == {
        "sae-lens", "sae-bench", "dictionary-learning", "eai-sparsify"
    }  # fmt: skip
    assert {name.split("--")[1] for _, name in ASKED} == set(Format.registry)
    assert len(WRITTEN) == 31


@pytest.mark.parametrize(("library", "name"), ASKED)
def test_our_files_mean_to_a_library_what_they_mean_to_us(library, name, tmp_path, x_RD):
    kind, to = name.split("--")
    run = FIXTURES / "ours" / kind
    made = export_sae(run, to, tmp_path / "out")
    assert made.check.ambiguous_rows == 0
    same(Format.registry[to].reference(ForeignFolder(made.folder))(x_RD), READ[library], name)
    sae = load_sae(run).double()
    f_RF = sae.encode(x_RD.double())
    same((f_RF.detach(), sae.decode(f_RF).detach()), READ[library], name)


@pytest.mark.parametrize(("library", "case"), WRITTEN)
def test_files_of_a_library_mean_to_us_what_they_mean_to_it(library, case, tmp_path, x_RD):
    folder = FIXTURES / "written" / library / case
    made = import_sae(folder, out=tmp_path)
    sae = load_sae(made.folder)
    assert sae.origin["model"]["name"] == "google/gemma-2-2b"
    assert (Hook(sae.origin["layer"], sae.origin["site"]), sae.origin["context"]) == (Hook(12), 128)
    wide = sae.double()
    f_RF = wide.encode(x_RD.double()).detach()
    same((f_RF, wide.decode(f_RF).detach()), WROTE[library], case)

"""Small SAEs with every activation, their files in every format, and a fake Hub that reads from a folder."""

import hashlib
import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.common.errors import SaeError
from sae.train.formats.canonical import CanonicalSAE, from_canonical
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.sae import SAE

FIXTURES = Path(__file__).parent / "fixtures"
D, F = 8, 16
ORIGIN = {"model": {"name": "google/gemma-2-2b", "revision": None}, "layer": 12, "site": "resid_post", "context": 128}
ACTIVATIONS = {"saelens": "jumprelu", "gemma-scope": "jumprelu", "dictionary-learning": "topk", "sparsify": "topk"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def x_RD() -> Tensor:
    """Rows on which some latents are active."""
    return load_file(FIXTURES / "rows.safetensors")["x"]


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    """A factory of random SAEs; decoder rows have norms from 0.5 to 2, or 1 with `unit`."""

    def make(activation: str, *, pre_bias: bool = True, unit: bool = False) -> SAE:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        W_dec = draw(F, D)
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        if not unit:
            W_dec = W_dec * (0.5 + 1.5 * torch.rand(F, 1, generator=generator, dtype=torch.float64))
        matrices = (draw(D, F), 0.3 * draw(F), W_dec, draw(D))
        options = {
            "topk": {"k": 4},
            "jumprelu": {"threshold": draw(F).abs()},
            "gated": {"r_mag": 0.5 * draw(F), "b_mag": draw(F)},
        }
        canonical = CanonicalSAE(*matrices, activation, **options.get(activation, {}))
        sae = from_canonical(canonical, pre_bias=pre_bias)
        sae.origin = dict(ORIGIN)
        return sae

    return make


@pytest.fixture(scope="session")
def encode_decode() -> Callable[[SAE, Tensor], tuple[Tensor, Tensor]]:
    """Latents and reconstructions in float64."""

    def run(sae: SAE, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        sae64 = sae.double()
        with torch.no_grad():
            f_RF = sae64.encode(x_RD.double())
            return f_RF, sae64.decode(f_RF)

    return run


# --- files of other libraries ---------------------------------------------------------------------------------------


def draw_weights(seed: int = 0, d_in: int = D, d_sae: int = F) -> dict[str, Tensor]:
    """W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), b_dec and threshold, in float32. W_dec's rows have norm 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    w = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    w["threshold"] = w["threshold"].abs()
    w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    return w


GEMMA_SCOPE_2 = {
    "hf_hook_point_in": "model.layers.12.output",
    "hf_hook_point_out": "model.layers.12.output",
    "width": F,
    "model_name": "google/gemma-3-1b-pt",
    "architecture": "jump_relu",
    "l0": 60,
    "affine_connection": False,
    "type": "sae",
}


def write_gemma_scope_2(folder: Path, config: dict[str, Any] | None = GEMMA_SCOPE_2, **weights: Tensor) -> Path:
    """Write a folder as docs/reference/formats.md describes it, without using the package's code."""
    folder.mkdir(parents=True)
    w = draw_weights() | weights
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file({names.get(name, name): t.contiguous() for name, t in w.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


QWEN_SCOPE = {
    "model_type": "topk_sae",
    "base_model": "Qwen/Qwen3-1.7B-Base",
    "d_model": D,
    "d_sae": F,
    "k": 4,
    "num_layers": 28,
    "hook_point": "resid_post",
    "dtype": "float32",
}


def write_qwen_scope(
    folder: Path, config: dict[str, Any] | None = QWEN_SCOPE, layers: Sequence[int] = (12,), **weights: Tensor
) -> Path:
    """Write a folder as docs/reference/formats.md describes it, without using the package's code.

    The layer number is the seed of each SAE's weights.
    """
    folder.mkdir(parents=True)
    for layer in layers:
        w = draw_weights(layer) | weights
        tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        torch.save({name: t.contiguous() for name, t in tensors.items()}, folder / f"layer{layer}.sae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def layouts() -> SimpleNamespace:
    """Functions that write published layouts without using the package's code, and their default configs."""
    return SimpleNamespace(
        draw_weights=draw_weights,
        gemma_scope_2=write_gemma_scope_2,
        gemma_scope_2_config=GEMMA_SCOPE_2,
        qwen_scope=write_qwen_scope,
        qwen_scope_config=QWEN_SCOPE,
    )


@pytest.fixture
def foreign_folder(make_sae, tmp_path) -> Callable[..., Path]:
    """A factory of folders in a given format, by default with an activation that the format supports."""

    def write(to: str, activation: str | None = None) -> Path:
        if to == "gemma-scope-2":
            return write_gemma_scope_2(tmp_path / to)
        if to == "qwen-scope":
            return write_qwen_scope(tmp_path / to)
        return export_sae(make_sae(activation or ACTIVATIONS[to], unit=True), to, tmp_path / to).folder

    return write


@pytest.fixture
def export_with_config(make_sae, tmp_path) -> Callable[..., Path]:
    """A factory of folders in a given format whose config has some keys dropped or changed."""

    def write(activation: str, to: str, /, *dropped: str, **changed: Any) -> Path:
        folder = export_sae(make_sae(activation, unit=True), to, tmp_path / "foreign").folder
        path = next(p for name in ("cfg.json", "about.json") for p in folder.rglob(name))
        config = json.loads(path.read_text())
        config = {name: value for name, value in (config | changed).items() if name not in dropped}
        path.write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def import_fails() -> Callable[..., None]:
    """Check that an import raises `error_type` with all `words`, creates no run and allocates less than 4 MB."""

    def check(folder: Path, error_type: type[SaeError], *words: str) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(error_type) as error:
                import_sae(folder, out=folder.parent / "runs")
            assert tracemalloc.get_traced_memory()[1] < 4e6
        finally:
            tracemalloc.stop()
        assert type(error.value) is error_type
        assert all(word in str(error.value) for word in words), error.value
        assert not (folder.parent / "runs").exists()

    return check


@pytest.fixture(scope="session")
def rewrite_zip() -> Callable[..., None]:
    """Replace the data of each entry of a zip file with `change(name, data)`."""

    def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in files.items():
                archive.writestr(name, change(name, data))

    return rewrite


# --- the Hub --------------------------------------------------------------------------------------------------------


class FakeHub:
    """A stand-in for the Hub: it serves one repository from a folder and records every request."""

    commit = COMMIT

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str | None, bool]] = []
        self.downloads: list[tuple[str, str, str]] = []
        self.uploads: list[tuple[Any, ...]] = []
        self.extra_names: list[str] = []  # listed, but not in the folder

    def add(self, path: str, source: Path) -> None:
        shutil.copytree(source, self.folder / path, dirs_exist_ok=True)

    # huggingface_hub.HfApi
    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        self.requests.append((repo, revision, files_metadata))
        siblings = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            lfs = SimpleNamespace(sha256=sha256) if path.suffix != ".json" else None
            name = path.relative_to(self.folder).as_posix()
            siblings.append(SimpleNamespace(rfilename=name, size=path.stat().st_size, lfs=lfs))
        siblings += [SimpleNamespace(rfilename=name, size=1, lfs=None) for name in self.extra_names]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.uploads.append(("create", repo, private))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        files = {path.name: path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()}
        self.uploads.append(("folder", repo_id, files))
        return SimpleNamespace(oid=COMMIT)

    # huggingface_hub.hf_hub_download
    def download(self, repo: str, filename: str, revision: str, local_dir: Path) -> str:
        self.downloads.append((repo, filename, revision))
        (target := Path(local_dir) / filename).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / filename, target)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake

"""Another library's side of formats.py, in its own environment: `python formats_worker.py LIBRARY read|write FOLDER`.

read   FOLDER/request.json names folders and formats. Each is loaded as the library's users load it, and its latents and
       reconstructions of FOLDER/rows.safetensors are written to FOLDER/<name>.safetensors, computed in float64.
write  The library makes an SAE of each of its classes with random weights, saves it in its own way in FOLDER/<case>/,
       and writes its latents and reconstructions of the rows to FOLDER/<case>/outputs.safetensors.

Imports nothing from this project.
"""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Coder = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> f, x_hat
LAYER, MODEL = 12, "gemma-2-2b"


def coder(sae: Any) -> Coder:
    return lambda x: (f := sae.encode(x), sae.decode(f))


def perturb(module: torch.nn.Module) -> Any:
    """Change every weight and bias of a module, by the same random numbers every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            if "threshold" in name:
                p.copy_(0.1 + 0.2 * torch.rand(p.shape, generator=generator))
            elif p.is_floating_point():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module


@contextlib.contextmanager
def hub_files_from(folder: Path, *modules: Any) -> Iterator[None]:
    """Read from a folder the files that would otherwise come from the Hub."""

    def found(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(folder / Path(filename).name)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "hf_hub_download", found))
        yield


# --- SAELens --------------------------------------------------------------------------------------------------------


def read_saelens(kind: str, folder: Path) -> Coder:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    if kind == "saelens":
        return coder(SAE.load_from_disk(folder, dtype="float64"))
    d_in, d_sae = widths(folder)

    def converter(path: Any, device: str, cfg_overrides: Any) -> Any:
        over = {"d_in": d_in, "d_sae": d_sae, "dtype": "float64"}
        place = f"layer_{LAYER}/width_16k/average_l0_82"
        return loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", place, device, False, over)[:2]

    with hub_files_from(folder, loaders):
        return coder(SAE.load_from_disk(folder, converter=converter).double())


def widths(folder: Path) -> tuple[int, int]:
    import numpy as np

    with np.load(folder / "params.npz") as arrays:
        return arrays["W_enc"].shape


def write_saelens(folder: Path, d_in: int, d_sae: int) -> dict[str, Coder]:
    import sae_lens as sl

    shared = {"d_in": d_in, "d_sae": d_sae}
    metadata = sl.saes.sae.SAEMetadata(model_name=MODEL, hook_name=f"blocks.{LAYER}.hook_resid_post", context_size=128)
    made = {}
    for bias in (True, False):
        end = "" if bias else "-no-b_dec"
        common = {**shared, "apply_b_dec_to_input": bias, "metadata": metadata}
        made[f"standard{end}"] = sl.StandardSAE(sl.StandardSAEConfig(**common))
        made[f"gated{end}"] = sl.GatedSAE(sl.GatedSAEConfig(**common))
        made[f"jumprelu{end}"] = sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**common))
        made[f"topk{end}"] = sl.TopKSAE(sl.TopKSAEConfig(**common, k=4))
    rescaled = sl.TopKSAEConfig(**shared, k=4, rescale_acts_by_decoder_norm=True, metadata=metadata)
    made["topk-rescaled"] = sl.TopKSAE(rescaled)
    coders: dict[str, Coder] = {}
    for name, sae in made.items():
        perturb(sae).save_model(folder / name)
        coders[name] = coder(sl.SAE.load_from_disk(folder / name, dtype="float64"))
    trained = {
        "batchtopk": sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(**shared, k=4)),
        "matryoshka": sl.MatryoshkaBatchTopKTrainingSAE(
            sl.MatryoshkaBatchTopKTrainingSAEConfig(**shared, k=4, matryoshka_widths=[d_sae // 4, d_sae])
        ),
    }
    for name, sae in trained.items():
        perturb(sae).topk_threshold.fill_(0.3)
        sae.cfg.metadata = metadata
        sae.save_inference_model(folder / name)
        coders[name] = coder(sl.SAE.load_from_disk(folder / name, dtype="float64"))
    return coders


# --- dictionary_learning --------------------------------------------------------------------------------------------


def classes() -> dict[str, Any]:
    # Imported by the package for a buffer of activations that is not used here.
    sys.modules["nnsight"] = SimpleNamespace(LanguageModel=None)  # type: ignore[assignment]
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    found = {
        n: getattr(dictionary, n) for n in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
    }
    return found | {
        "AutoEncoderTopK": top_k.AutoEncoderTopK,
        "BatchTopKSAE": batch_top_k.BatchTopKSAE,
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    }


def read_dictionary_learning(kind: str, folder: Path) -> Coder:
    """Load like the library's `load_dictionary`, whose module imports more than is needed here."""
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    with contextlib.redirect_stdout(io.StringIO()):
        options = {"k": trainer["k"]} if "k" in trainer else {}
        return coder(classes()[trainer["dict_class"]].from_pretrained(str(folder / "ae.pt"), **options).double())


def write_dictionary_learning(folder: Path, d_in: int, d_sae: int) -> dict[str, Coder]:
    coders: dict[str, Coder] = {}
    for name, kind in classes().items():
        more: dict[str, Any] = {"k": 4} if "TopK" in name else {}
        if name.startswith("Matryoshka"):
            more["group_sizes"] = [d_sae // 4, d_sae - d_sae // 4]
        sae = perturb(kind(d_in, d_sae, **more))
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            sae.threshold.fill_(0.3)
        trainer = {
            "dict_class": name,
            "activation_dim": d_in,
            "dict_size": d_sae,
            "layer": LAYER,
            "lm_name": f"google/{MODEL}",
            "submodule_name": f"resid_post_layer_{LAYER}",
            **{n: v for n, v in more.items() if n == "k"},
        }
        (folder / name).mkdir()
        torch.save({n: t.cpu() for n, t in sae.state_dict().items()}, folder / name / "ae.pt")
        (folder / name / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}, indent=4)
        )
        again = kind(d_in, d_sae, **more)  # not from_pretrained, which rescales the rows of an AutoEncoder
        again.load_state_dict(torch.load(folder / name / "ae.pt", weights_only=True))
        coders[name] = coder(again.double())
    return coders


# --- sparsify -------------------------------------------------------------------------------------------------------


def sparse(sae: Any) -> Coder:
    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, indices, pre = sae.encode(x)
        f = torch.zeros_like(pre).scatter(-1, indices, acts)
        return f, sae.decode(acts, indices)

    return code


def read_sparsify(kind: str, folder: Path) -> Coder:
    from sparsify import SparseCoder

    (sae,) = SparseCoder.load_many(str(folder), local=True).values()
    return sparse(sae.double())


def write_sparsify(folder: Path, d_in: int, d_sae: int) -> dict[str, Coder]:
    from sparsify import SparseCoder, SparseCoderConfig

    coders: dict[str, Coder] = {}
    for name, size in (("factor", {"expansion_factor": d_sae // d_in}), ("latents", {"num_latents": d_sae})):
        sae = perturb(SparseCoder(d_in, SparseCoderConfig(k=4, **size)))
        sae.save_to_disk(folder / name / f"layers.{LAYER}")
        (folder / name / "config.json").write_text(json.dumps({"model": f"google/{MODEL}", "ctx_len": 128}))
        coders[name] = sparse(SparseCoder.load_from_disk(folder / name / f"layers.{LAYER}").double())
    return coders


# --- SAEBench -------------------------------------------------------------------------------------------------------


def read_saebench(kind: str, folder: Path) -> Coder:
    from sae_bench.custom_saes import gated_sae, jumprelu_sae, relu_sae, topk_sae

    if kind == "saelens":
        return read_saelens(kind, folder)
    cpu, dtype = torch.device("cpu"), torch.float64
    with contextlib.redirect_stdout(io.StringIO()), hub_files_from(folder, gated_sae, jumprelu_sae, relu_sae, topk_sae):
        if kind == "gemma-scope":
            load = jumprelu_sae.load_gemma_scope_jumprelu_sae
            return coder(load("", "params.npz", LAYER, MODEL, cpu, dtype))
        config = json.loads((folder / "config.json").read_text())["trainer"]
        load = {
            "StandardTrainer": relu_sae.load_dictionary_learning_relu_sae,
            "TopKTrainer": topk_sae.load_dictionary_learning_topk_sae,
            "GatedSAETrainer": gated_sae.load_dictionary_learning_gated_sae,
            "JumpReluTrainer": jumprelu_sae.load_dictionary_learning_jump_relu_sae,
        }[config["trainer_class"]]
        return coder(load("", "ae.pt", config["lm_name"], cpu, dtype, LAYER))


LIBRARIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "saelens": ("sae-lens", dict.fromkeys(("saelens", "gemma-scope"), read_saelens), write_saelens),
    "dictionary_learning": (
        "dictionary-learning", {"dictionary-learning": read_dictionary_learning}, write_dictionary_learning,
    ),
    "sparsify": ("eai-sparsify", {"sparsify": read_sparsify}, write_sparsify),
    "saebench": ("sae-bench", dict.fromkeys(("saelens", "gemma-scope", "dictionary-learning"), read_saebench), None),
}  # fmt: skip


@torch.no_grad()
def main(library: str, doing: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # SAELens warns about how to load the model
    package, readers, write = LIBRARIES[library]
    about = {"library": f"{package} {version(package)}", "torch": torch.__version__}
    x = load_file(folder / "rows.safetensors")["x"].double()
    if doing == "read":
        for name, entry in json.loads((folder / "request.json").read_text()).items():
            if entry["format"] in readers:
                f, x_hat = readers[entry["format"]](entry["format"], Path(entry["folder"]))(x)
                save_file({"f": f.contiguous(), "x_hat": x_hat.contiguous()}, folder / f"{name}.safetensors", about)
    elif write is not None:
        torch.manual_seed(0)
        d_sae = json.loads((folder / "request.json").read_text())["d_sae"]
        for name, code in write(folder, x.shape[1], d_sae).items():
            f, x_hat = code(x)
            save_file({"f": f.contiguous(), "x_hat": x_hat.contiguous()}, folder / name / "outputs.safetensors", about)
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

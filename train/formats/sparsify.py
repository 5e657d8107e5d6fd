"""EleutherAI's sparsify: layers.12/ with cfg.json and sae.safetensors, beside the training run's config.json.

f     = the k largest of ReLU((x - b_dec) We^T + be)          encoder.weight We is (d_sae, d_in)
x_hat = f W_dec + b_dec                                       W_dec is (d_sae, d_in)
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import Description, ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, hub_id, parse_model, recorded_hook
from .safe_read import (
    ForeignFolder,
    get_bool,
    get_positive_int,
    read_safetensors_headers,
    read_weights,
    short_repr,
)


class Sparsify(Format, name="sparsify"):
    activations = ("topk",)
    files = ("sae.safetensors", "cfg.json", "about.json")
    parent_files = ("config.json",)
    config = "cfg.json"

    def refusal(self, repo: str, weights: PurePosixPath) -> str | None:
        return "transcoder" if "transcoder" in repo else None

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        sizes = [config.get(key) for key in ("num_latents", "d_in", "expansion_factor", "k")]
        latents, d_in, expansion, k = (size if type(size) is int else 0 for size in sizes)
        return Description(d_sae=latents or d_in * expansion or None, l0=str(k) if k else None)

    def matches(self, folder: ForeignFolder) -> bool:
        return self.sae_folder(folder) is not None

    def sae_folder(self, folder: ForeignFolder) -> ForeignFolder | None:
        """The SAE's folder: the given one, or its only subfolder with an SAE.

        Raises UsageError if several subfolders have an SAE.
        """
        if folder.has("sae.safetensors"):
            return folder
        if not folder.path.is_dir():
            return None
        found = sorted(path.parent for path in folder.path.glob("*/sae.safetensors"))
        subfolders = [path for path in found if not (path / "sae.json").exists()]  # not runs of this package
        if len(subfolders) > 1:
            raise UsageError(
                f"{folder.path} contains {len(subfolders)} SAEs: {', '.join(path.name for path in subfolders[:8])}. "
                f"Choose one: sae import {subfolders[0]}"
            )
        if not subfolders:
            return None
        folder.require_file(f"{subfolders[0].name}/sae.safetensors")  # rejects a link that leads outside the folder
        return ForeignFolder(subfolders[0])

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        sae_folder = folder / hookpoint(metadata)
        tensors = {
            "encoder.weight": canonical.W_enc.T,
            "encoder.bias": canonical.centered_b_enc,
            "W_dec": canonical.W_dec,
            "b_dec": canonical.b_dec,
        }
        config = {
            "activation": "topk",
            "expansion_factor": max(1, canonical.d_sae // canonical.d_in),
            "normalize_decoder": canonical.has_unit_rows,
            "num_latents": canonical.d_sae,
            "k": canonical.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": canonical.d_in,
        }
        data = save({name: t.float().contiguous().clone() for name, t in tensors.items()})
        atomic_write(sae_folder / "sae.safetensors", data)
        write_json(sae_folder / "cfg.json", config)
        write_json(sae_folder / "about.json", metadata)
        run = {"sae": config, "model": hub_id(metadata.get("model_name", "")), "hookpoints": [sae_folder.name]}
        write_json(folder / "config.json", run | {"ctx_len": metadata.get("context_size")})

    def load(self, folder: ForeignFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The config, and the tensors as they are in the file."""
        sae_folder = self.sae_folder(folder) or folder
        config, config_path = sae_folder.read_json("cfg.json"), sae_folder.path / "cfg.json"
        if (activation := config.get("activation", "topk")) != "topk":
            raise UsageError(f"{config_path}: activation is {short_repr(activation)}; only topk is supported.")
        for name in ("transcode", "skip_connection"):
            if get_bool(config_path, config, name, False):
                raise UsageError(f"{config_path}: {name} is true: this is a transcoder, not an SAE.")
        D = get_positive_int(config_path, config, "d_in")
        if config.get("num_latents"):
            F = get_positive_int(config_path, config, "num_latents")
        else:
            F = D * get_positive_int(config_path, config, "expansion_factor")
        path = sae_folder.require_file("sae.safetensors")
        expected = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
        tensors = read_weights(path, read_safetensors_headers(path), expected)
        if get_positive_int(config_path, config, "k") > F:
            raise DamagedError(f"{config_path}: k is {config['k']}, but there are only {F} latents.")
        return config, tensors

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        config, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}
        W_enc = w["encoder.weight"].T
        b_enc = w["encoder.bias"] - w["b_dec"] @ W_enc
        canonical = CanonicalSAE(W_enc, b_enc, w["W_dec"], w["b_dec"], "topk", k=config["k"])
        foreign = ForeignSAE(from_canonical(canonical, pre_bias=True), metadata=dict(config))
        sae_folder = self.sae_folder(folder) or folder
        about = sae_folder.read_json("about.json") if sae_folder.has("about.json") else {}
        foreign.hook = recorded_hook(about) or first_hook([sae_folder.path.resolve().name])
        parent = ForeignFolder(sae_folder.path.parent)
        run = parent.read_json("config.json") if parent.has("config.json") else {}
        foreign.model = parse_model(run.get("model"))
        foreign.record_text({"context_size": run.get("ctx_len"), "dataset_path": run.get("dataset"), **about})
        foreign.metadata |= about
        return foreign

    def reference(self, folder: ForeignFolder) -> Reference:
        config, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BF = ((x_BD.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
            top = z_BF.topk(config["k"], dim=-1)
            f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values)
            return f_BF, f_BF @ w["W_dec"] + w["b_dec"]

        return encode_decode


def hookpoint(metadata: dict[str, Any]) -> str:
    """The name, within transformers' base model, of the module whose output an SAE reads: `layers.12.mlp`.

    Raises UsageError for a hook that is not the output of a module, because sparsify cannot name it.
    """
    name, layer = metadata.get("hook_name"), metadata.get("hook_layer", 0)
    if name is None:
        return "sae"
    if "hf_hook_name" in metadata:
        return str(metadata["hf_hook_name"]).partition(".")[2]
    if name.endswith("hook_resid_pre") and layer > 0:  # the output of the previous block
        block = str(metadata.get("hf_hook_input_of", f"model.layers.{layer}")).partition(".")[2]
        return f"{block.rpartition('.')[0]}.{layer - 1}"
    raise UsageError(
        f"sparsify can only record the output of a module in transformers, and {name} is "
        + (f"the input of {metadata['hf_hook_input_of']}" if "hf_hook_input_of" in metadata else "not known to be one")
        + ". Export it with --to saelens, dictionary-learning or gemma-scope."
    )

"""EleutherAI's sparsify: layers.12/ with cfg.json and sae.safetensors.

f     = the k largest of ReLU((x - b_dec) We^T + be)          encoder.weight We is (d_sae, d_in)
x_hat = f W_dec + b_dec                                       W_dec is (d_sae, d_in) already
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, hub_id, parse_model
from .safe_read import (
    ForeignFolder,
    get_bool,
    get_nested,
    get_positive_int,
    read_safetensors_headers,
    read_weights,
    short_repr,
)


class Sparsify(Format, name="sparsify"):
    holds = ("topk",)
    files = ("sae.safetensors", "cfg.json", "about.json")
    above = ("config.json",)

    def recognise(self, folder: ForeignFolder) -> bool:
        return self.inside(folder) is not None

    def inside(self, folder: ForeignFolder) -> ForeignFolder | None:
        """The folder of its SAE: itself, or its only one. UsageError when it has several."""
        if folder.has("sae.safetensors"):
            return folder
        if not folder.path.is_dir():
            return None
        found = sorted(path.parent for path in folder.path.glob("*/sae.safetensors"))
        if len(found) > 1:
            raise UsageError(
                f"{folder.path} holds {len(found)} SAEs: {', '.join(path.name for path in found[:8])}. Name one: sae import {found[0]}"
            )
        if not found:
            return None
        folder.file(f"{found[0].name}/sae.safetensors")  # refused when a link leads elsewhere
        return ForeignFolder(found[0])

    def write(self, plain: CanonicalSAE, folder: Path, about: dict[str, Any]) -> None:
        layer = about.get("hook_layer")
        inner = folder / (f"layers.{layer}" if layer is not None else "sae")
        tensors = {
            "encoder.weight": plain.W_enc.T, "encoder.bias": plain.input_bias, "W_dec": plain.W_dec, "b_dec": plain.b_dec
        }  # fmt: skip
        config = {
            "activation": "topk", "expansion_factor": max(1, plain.d_sae // plain.d_in), "normalize_decoder": plain.unit_rows,
            "num_latents": plain.d_sae, "k": plain.k, "multi_topk": False, "skip_connection": False, "transcode": False,
            "d_in": plain.d_in,
        }  # fmt: skip
        atomic_write(inner / "sae.safetensors", save({n: t.float().contiguous().clone() for n, t in tensors.items()}))
        write_json(inner / "cfg.json", config)
        write_json(inner / "about.json", about)
        run = {"sae": config, "model": hub_id(about.get("model_name", "")), "hookpoints": [inner.name]}
        write_json(folder / "config.json", run | {"ctx_len": about.get("context_size")})

    def load(self, folder: ForeignFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
        inner = self.inside(folder) or folder
        config, at = inner.record("cfg.json"), inner.path / "cfg.json"
        if (kind := config.get("activation", "topk")) != "topk":
            raise UsageError(f"{at}: the activation is {short_repr(kind)}; of sparsify only topk is known here.")
        for name in ("transcode", "skip_connection"):
            if get_bool(at, config, name, False):
                raise UsageError(f"{at}: {name} is true: it predicts another place than it reads, and is no SAE.")
        D = get_positive_int(at, config, "d_in")
        F = get_positive_int(at, config, "num_latents", 0) if config.get("num_latents") else D * get_positive_int(at, config, "expansion_factor")  # fmt: skip
        path = inner.file("sae.safetensors")
        expected = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
        found = read_weights(path, read_safetensors_headers(path), expected)
        if get_positive_int(at, config, "k") > F:
            raise DamagedError(f"{at}: k is {config['k']}, and there are {F} latents.")
        return config, found

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        config, found = self.load(folder)
        w = {name: t.double() for name, t in found.items()}
        W_enc = w["encoder.weight"].T
        b_enc = w["encoder.bias"] - w["b_dec"] @ W_enc
        plain = CanonicalSAE(W_enc, b_enc, w["W_dec"], w["b_dec"], "topk", k=config["k"])
        result = ForeignSAE(from_canonical(plain, pre_bias=True), metadata=dict(config))
        inner = self.inside(folder) or folder
        said = inner.record("about.json") if inner.has("about.json") else {}
        result.hook = first_hook([said.get("hook_name"), inner.path.resolve().name])
        above = ForeignFolder(inner.path.parent)
        run = above.record("config.json") if above.has("config.json") else {}
        result.model = parse_model(run.get("model"))
        if isinstance(context := get_nested(run, "ctx_len"), int):
            result.context = context
        result.metadata |= said
        return result

    def reference(self, folder: ForeignFolder) -> Reference:
        config, found = self.load(folder)
        w = {name: t.double() for name, t in found.items()}

        def code(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BF = ((x_BD.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
            top = z_BF.topk(config["k"], dim=-1)
            f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values)
            return f_BF, f_BF @ w["W_dec"] + w["b_dec"]

        return code

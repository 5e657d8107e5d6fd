"""Gemma Scope's file: params.npz with W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec and threshold, all float32.

    f = ReLU(z) where z > threshold,  z = x W_enc + b_enc;  b_dec is not subtracted at the input

Some files have lower-case w_enc and w_dec. Model and layer stand in no file but in its path, as
gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz; what we write has an about.json beside it.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...common.errors import UsageError
from ...common.files import atomic_write, write_json
from .base import ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, parse_gemma_scope_path, parse_model
from .safe_read import ForeignFolder, read_npz_headers, read_weights, vector_size


class GemmaScope(Format, name="gemma-scope"):
    holds = ("jumprelu",)
    files = ("params.npz", "about.json")

    def recognise(self, folder: ForeignFolder) -> bool:
        return folder.has("params.npz")

    def write(self, plain: CanonicalSAE, folder: Path, about: dict[str, Any]) -> None:
        assert plain.threshold is not None
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(plain, name).float().contiguous().numpy() for name in names})
        atomic_write(folder / "params.npz", buffer.getbuffer())
        write_json(folder / "about.json", about)

    def load(self, folder: ForeignFolder) -> dict[str, Tensor]:
        path = folder.file("params.npz")
        claims = {{"w_enc": "W_enc", "w_dec": "W_dec"}.get(name, name): c for name, c in read_npz_headers(path).items()}
        D, F = vector_size(path, claims, "b_dec"), vector_size(path, claims, "b_enc")
        expected = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        return read_weights(path, claims, expected)

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        w = {name: t.double() for name, t in self.load(folder).items()}
        plain = CanonicalSAE(
            w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], "jumprelu", threshold=w["threshold"].clamp_min(0)
        )
        found = ForeignSAE(from_canonical(plain))
        parts = folder.path.resolve().parts
        if "embedding" in parts:
            raise UsageError(f"{folder.path} is of the embedding, which is no layer, and was scaled by sqrt(d_in).")
        found.model, found.hook = parse_gemma_scope_path(parts)
        if folder.has("about.json"):
            found.metadata = folder.record("about.json")
            found.hook = first_hook([found.metadata.get("hook_name")]) or found.hook
            found.model = parse_model(found.metadata.get("model_name")) or found.model
            if isinstance(context := found.metadata.get("context_size"), int):
                found.context = context
        return found

    def reference(self, folder: ForeignFolder) -> Reference:
        w = {name: t.double() for name, t in self.load(folder).items()}

        def code(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BF = x_BD.double() @ w["W_enc"] + w["b_enc"]
            f_BF = z_BF.relu() * (z_BF > w["threshold"])
            return f_BF, f_BF @ w["W_dec"] + w["b_dec"]

        return code

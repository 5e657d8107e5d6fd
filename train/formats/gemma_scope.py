"""Gemma Scope: params.npz with W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec and threshold, all float32.

    f = ReLU(z) where z > threshold,  z = x W_enc + b_enc;  b_dec is not subtracted from the input

In some files the names w_enc and w_dec are in lower case. Model and layer are recorded only in the path, such as
gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz. Our exports add an about.json.
"""

import io
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from ...common.errors import UsageError
from ...common.files import atomic_write, write_json
from .base import Description, ForeignSAE, Format, Reference, describe_path
from .canonical import CanonicalSAE, from_canonical
from .hook_names import parse_gemma_scope_path, parse_model, recorded_hook
from .safe_read import ForeignFolder, read_npz_headers, read_weights, vector_size

KINDS = {  # kinds of files that are not an SAE of a layer's activations: kind -> description
    "embedding": "an SAE on the embedding, scaled by sqrt(d_in)",
    "transcoder": "a transcoder, from the input of an MLP to its output",
}


class GemmaScope(Format, name="gemma-scope"):
    activations = ("jumprelu",)
    files = ("params.npz", "about.json")

    def refusal(self, repo: str, weights: PurePosixPath) -> str | None:
        kind = kind_of_path((*repo.split("/"), *weights.parts))
        return "embedding SAE" if kind == "embedding" else kind

    def describe_path(self, repo: str, weights: PurePosixPath) -> Description:
        model, hook = parse_gemma_scope_path((*repo.split("/"), *weights.parts))
        return replace(describe_path(weights), model=model, hook=hook)

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        assert canonical.threshold is not None
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(canonical, name).float().contiguous().numpy() for name in names})
        atomic_write(folder / "params.npz", buffer.getbuffer())
        write_json(folder / "about.json", metadata)

    def load(self, folder: ForeignFolder) -> dict[str, Tensor]:
        path = folder.require_file("params.npz")
        capitals = {"w_enc": "W_enc", "w_dec": "W_dec"}
        headers = {capitals.get(name, name): header for name, header in read_npz_headers(path).items()}
        D, F = vector_size(path, headers, "b_dec"), vector_size(path, headers, "b_enc")
        expected = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        return read_weights(path, headers, expected)

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        w = {name: t.double() for name, t in self.load(folder).items()}
        threshold_F = w["threshold"].clamp_min(0)
        canonical = CanonicalSAE(w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], "jumprelu", threshold=threshold_F)
        foreign = ForeignSAE(from_canonical(canonical))
        parts = folder.path.resolve().parts
        if kind := kind_of_path(parts):
            raise UsageError(f"{folder.path} is {KINDS[kind]}. Only SAEs of a layer's activations are supported.")
        foreign.model, foreign.hook = parse_gemma_scope_path(parts)
        if folder.has("about.json"):
            foreign.metadata = folder.read_json("about.json")
            foreign.hook = recorded_hook(foreign.metadata) or foreign.hook
            foreign.model = parse_model(foreign.metadata.get("model_name")) or foreign.model
            foreign.record_text(foreign.metadata)
        return foreign

    def reference(self, folder: ForeignFolder) -> Reference:
        w = {name: t.double() for name, t in self.load(folder).items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BF = x_BD.double() @ w["W_enc"] + w["b_enc"]
            f_BF = z_BF.relu() * (z_BF > w["threshold"])
            return f_BF, f_BF @ w["W_dec"] + w["b_dec"]

        return encode_decode


def kind_of_path(parts: tuple[str, ...]) -> str | None:
    """None if the files at a path are an SAE of a layer's activations; otherwise the kind of the files."""
    if any(re.fullmatch(r"gemma-scope-\w+-(pt|it)-transcoders", part) for part in parts):
        return "transcoder"
    return "embedding" if "embedding" in parts else None

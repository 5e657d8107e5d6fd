"""Gemma Scope 2: config.json, and params.safetensors with w_enc (d_in, d_sae), w_dec, b_enc, b_dec and threshold.

    f = ReLU(z) where z > threshold,  z = x w_enc + b_enc;  x_hat = f w_dec + b_dec

b_dec is not subtracted from the input. The folder is <site>[_all]/layer_<n>_width_<label>_l0_<label>. config.json
records the model, the hook points (as names of modules in transformers) and the kind (sae, transcoder, clt or
crosscoder). If config.json is missing, the path contains the same information. docs/reference/formats.md lists the
sources.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from ...cache.hooks import Hook
from ...common.errors import UsageError
from .base import Description, ForeignSAE, Format, Reference, describe_path
from .canonical import CanonicalSAE, from_canonical
from .hook_names import parse_model
from .safe_read import (
    ForeignFolder,
    get_bool,
    get_str,
    read_safetensors_headers,
    read_weights,
    short_repr,
    vector_size,
)

SITES_BY_FOLDER = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}  # also with _all
SITES_BY_MODULE = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "post_feedforward_layernorm.output": "mlp_out",
}
KINDS = {  # first word of the folder, and `type` in config.json -> description
    "transcoder": "transcoder",
    "clt": "cross-layer transcoder",
    "crosscoder": "crosscoder",
    "skip transcoder": "transcoder with an affine skip connection",
}


class GemmaScope2(Format, name="gemma-scope-2"):
    files = ("params.safetensors", "config.json")
    config = "config.json"

    def is_weights(self, name: str) -> bool:
        """Also true for the files (one per layer) of crosscoders and cross-layer transcoders, which `read` rejects."""
        return name == self.files[0] or re.fullmatch(r"params_layer_\d{1,4}\.safetensors", name) is not None

    def matches(self, folder: ForeignFolder) -> bool:
        return folder.path.is_dir() and any(self.is_weights(path.name) for path in folder.path.iterdir())

    def refusal(self, repo: str, weights: PurePosixPath) -> str | None:
        kind = kind_of_path(weights.parts)
        return kind or (None if weights.name == self.files[0] else "crosscoder")

    def describe_path(self, repo: str, weights: PurePosixPath) -> Description:
        parts = (*repo.split("/"), *weights.parts)
        return replace(describe_path(weights), model=model_of_path(parts), hook=hook_of_path(parts))

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        l0, width = config.get("l0"), config.get("width")
        return Description(
            model=parse_gemma_3(config.get("model_name")),
            hook=parse_module(config.get("hf_hook_point_in")),
            d_sae=width if type(width) is int else None,
            l0=f"{l0:g}" if isinstance(l0, (int, float)) else None,
        )

    def load(self, folder: ForeignFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The config, and the tensors exactly as in the file. Raises UsageError for anything other than an SAE."""
        config, config_path = {}, folder.path / "config.json"
        if folder.has("config.json"):
            config = folder.read_json("config.json")
        parts = folder.path.resolve().parts
        architecture = get_str(config_path, config, "architecture", "jump_relu")
        kind = get_str(config_path, config, "type", kind_of_path(parts) or "sae")
        hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
        if kind == "sae" and hook_out is not None and hook_out != hook_in:
            kind = "transcoder"
        if get_bool(config_path, config, "affine_connection", False):
            kind = "skip transcoder"
        if kind == "sae" and not folder.has(self.files[0]):
            kind = "crosscoder"
        if kind != "sae":
            raise UsageError(
                f"{folder.path} is a {KINDS.get(kind, short_repr(kind))}, which predicts the activations at one place "
                "from those at another. Only SAEs are supported; `sae import --list` shows the SAEs in a repository."
            )
        if architecture != "jump_relu":
            raise UsageError(
                f"{config_path}: architecture {short_repr(architecture)} is not supported, only jump_relu."
            )
        path = folder.require_file(self.files[0])
        headers = read_safetensors_headers(path)
        if "affine_skip_connection" in headers:
            raise UsageError(f"{path} is a transcoder with an affine skip connection. Only SAEs are supported.")
        D, F = vector_size(path, headers, "b_dec"), vector_size(path, headers, "b_enc")
        expected = {"w_enc": (D, F), "w_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        return config, read_weights(path, headers, expected)

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        config, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}
        threshold_F = w["threshold"].clamp_min(0)
        canonical = CanonicalSAE(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], "jumprelu", threshold=threshold_F)
        foreign = ForeignSAE(from_canonical(canonical), metadata=config)
        parts = folder.path.resolve().parts
        foreign.model = parse_gemma_3(config.get("model_name")) or model_of_path(parts)
        if config.get("hf_hook_point_in") is None:
            foreign.hook = hook_of_path(parts)
        elif (hook := parse_module(config["hf_hook_point_in"])) is not None:
            foreign.hook = hook
        else:
            raise UsageError(
                f"{folder.path / 'config.json'}: the hook point {short_repr(config['hf_hook_point_in'])} is not "
                f"supported. Supported are model.layers.<n> with {', '.join(SITES_BY_MODULE)}."
            )
        if (width := config.get("width")) not in (None, canonical.d_sae):
            foreign.notes.append(
                f"config.json says width {short_repr(width)}, but there are {canonical.d_sae:,} latents."
            )
        foreign.record_text(config)
        return foreign

    def reference(self, folder: ForeignFolder) -> Reference:
        w = {name: t.double() for name, t in self.load(folder)[1].items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            z_BF = x_BD.double() @ w["w_enc"] + w["b_enc"]
            f_BF = (z_BF > w["threshold"]) * z_BF.relu()
            return f_BF, f_BF @ w["w_dec"] + w["b_dec"]

        return encode_decode


def kind_of_path(parts: tuple[str, ...]) -> str | None:
    """The kind of the files, by the innermost folder whose name tells it; None for an SAE, or if no name tells it."""
    for part in reversed(parts):
        word = part.split("_")[0]
        if word in KINDS:
            return KINDS[word]
        if part.removesuffix("_all") in SITES_BY_FOLDER:
            return None
    return None


def hook_of_path(parts: tuple[str, ...]) -> Hook | None:
    """`resid_post_all/layer_12_width_16k_l0_small`: the site's folder, then a folder that begins with the layer."""
    for folder, name in zip(parts, parts[1:], strict=False):
        site = SITES_BY_FOLDER.get(folder.removesuffix("_all"))
        if site and (match := re.match(r"layer_(\d{1,4})_width_", name)):
            return Hook(int(match[1]), site)
    return None


def model_of_path(parts: tuple[str, ...]) -> str | None:
    """The model of a repository: `gemma-scope-2-1b-pt` has SAEs of google/gemma-3-1b-pt."""
    for part in parts:
        if match := re.fullmatch(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", part):
            return parse_gemma_3(f"gemma-3-{match[1]}-{match[2]}")
    return None


def parse_gemma_3(name: object) -> str | None:
    """A model's id on the Hub.

    The ids of all base models end in `-pt`, except that of gemma-3-270m. Some configs say gemma-v3 or omit
    the owner.
    """
    if (model := parse_model(name)) is None:
        return None
    match = re.fullmatch(r"(?:google/)?gemma-(?:v)?3-(270m|1b|4b|12b|27b)-(pt|it)", model)
    if match is None:
        return model
    return f"google/gemma-3-{match[1]}{'' if match.groups() == ('270m', 'pt') else f'-{match[2]}'}"


def parse_module(text: object) -> Hook | None:
    """The hook of a name such as `model.layers.12.self_attn.o_proj.input`; None if the module is not a known site."""
    pattern = r"model\.(?:language_model\.)?layers\.(\d{1,4})\.(.+)"
    if not isinstance(text, str) or (match := re.fullmatch(pattern, text)) is None or match[2] not in SITES_BY_MODULE:
        return None
    return Hook(int(match[1]), SITES_BY_MODULE[match[2]])

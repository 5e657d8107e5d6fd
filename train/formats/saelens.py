"""SAELens, the directory of version 6: cfg.json and sae_weights.safetensors.

    x'     = x - b_dec if apply_b_dec_to_input, which is true if the key is missing
    topk   with rescale_acts_by_decoder_norm: f = the k largest of z |W_dec,i|, x_hat = (f / |W_dec|) W_dec + b_dec

Exported SAEs read raw activations, have unit decoder rows, and have b_dec folded into b_enc. A relu SAE is exported as
`standard`, and every SAE with a threshold as `jumprelu`. `normalize_activations="layer_norm"` corresponds to an `SAE`
with `layer_norm`, but the latents of our `SAE` are SAELens' latents multiplied by the token's standard deviation.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import Description, ForeignSAE, Format, Reference, hook_or_none
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, hub_id, is_module, parse_model, with_recorded_layer
from .safe_read import (
    ForeignFolder,
    get_bool,
    get_nested,
    get_positive_int,
    get_str,
    read_safetensors_headers,
    read_weights,
    short_repr,
)

# SAELens' architecture -> activation of CanonicalSAE
ARCHITECTURES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
# SAELens uses these only in training. For inference, it saves such an SAE as jumprelu.
TRAINING_ARCHITECTURES = {"batchtopk", "matryoshka_batchtopk"}
PER_TOKEN_NORMALIZATIONS = {
    "constant_norm_rescale": "divides each token by its own norm",
    "covariance_whitening": "whitens the input",
}


class SAELens(Format, name="saelens"):
    activations = ("relu", "topk", "gated", "jumprelu")
    layer_norm = True
    files = ("sae_weights.safetensors", "cfg.json", "activation_scaler.json")
    config = "cfg.json"

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        config = upgrade_config(dict(config))
        recorded = {**config, **config.get("metadata", {})}
        d_sae, k = recorded.get("d_sae"), recorded.get("k")
        return Description(
            model=parse_model(recorded.get("model_name")),
            hook=hook_or_none(recorded.get("hook_name"), recorded.get("hf_hook_name")),
            d_sae=d_sae if type(d_sae) is int else None,
            l0=str(k) if type(k) is int else None,
        )

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        metadata = saelens_metadata(metadata)
        architectures = {activation: name for name, activation in ARCHITECTURES.items()}
        config: dict[str, Any] = {
            "architecture": architectures[canonical.activation],
            "d_in": canonical.d_in,
            "d_sae": canonical.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "layer_norm" if canonical.layer_norm else "none",
            "reshape_activations": "hook_z" if ".hook_z" in metadata.get("hook_name", "") else "none",
        }
        if canonical.activation == "topk":
            # With unit rows, True and False are equivalent, but SAELens' fold_W_dec_norm() works only with True.
            config |= {"k": canonical.k, "rescale_acts_by_decoder_norm": canonical.has_unit_rows}
        tensors = {"W_enc": canonical.W_enc, "W_dec": canonical.W_dec, "b_dec": canonical.b_dec}
        if canonical.activation == "gated":
            assert canonical.r_mag is not None and canonical.b_mag is not None
            tensors |= {"b_gate": canonical.b_enc, "r_mag": canonical.r_mag, "b_mag": canonical.b_mag}
        else:
            tensors["b_enc"] = canonical.b_enc
        if canonical.activation == "jumprelu":
            assert canonical.threshold is not None
            tensors["threshold"] = canonical.threshold
        data = save({name: t.float().contiguous().clone() for name, t in tensors.items()})
        atomic_write(folder / "sae_weights.safetensors", data)
        write_json(folder / "cfg.json", {**config, "metadata": metadata})

    def load(self, folder: ForeignFolder) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
        """The config in the form of version 6, the activation as CanonicalSAE names it, and the tensors as stored."""
        config, config_path = upgrade_config(folder.read_json("cfg.json")), folder.path / "cfg.json"
        activation = read_activation(config_path, config)
        path = folder.require_file("sae_weights.safetensors")
        headers = read_safetensors_headers(path)
        D, F = get_positive_int(config_path, config, "d_in"), get_positive_int(config_path, config, "d_sae")
        expected: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
        vectors = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
        tensors = read_weights(path, headers, {**expected, **{n: (F,) for n in vectors.get(activation, ("b_enc",))}})
        if activation == "topk" and get_positive_int(config_path, config, "k") > F:
            raise DamagedError(f"{config_path}: k is {config['k']}, but there are only {F} latents.")
        return config, activation, tensors

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        config, activation, tensors = self.load(folder)
        scale, config_path = input_scale(folder, config), folder.path / "cfg.json"
        w = {name: t.double() for name, t in tensors.items()}
        W_enc, W_dec, b_dec = w["W_enc"] * scale, w["W_dec"] / scale, w["b_dec"] / scale
        pre_bias = get_bool(config_path, config, "apply_b_dec_to_input", True)
        b_enc = w["b_gate"] if activation == "gated" else w["b_enc"]
        b_dec_F = b_dec @ W_enc if pre_bias else torch.zeros_like(b_enc)
        layer_norm = config.get("normalize_activations") == "layer_norm"
        canonical = CanonicalSAE(W_enc, b_enc - b_dec_F, W_dec, b_dec, activation, layer_norm=layer_norm)
        if activation == "topk":
            canonical = replace(canonical, k=get_positive_int(config_path, config, "k"))
            if get_bool(config_path, config, "rescale_acts_by_decoder_norm", False):
                canonical = fold_decoder_norm(canonical, w["W_dec"].norm(dim=1), config_path)
        elif activation == "jumprelu":
            canonical = replace(canonical, threshold=w["threshold"].clamp_min(0))
        elif activation == "gated":
            canonical = replace(canonical, r_mag=w["r_mag"], b_mag=w["b_mag"] - w["r_mag"].exp() * b_dec_F)
        return add_metadata(ForeignSAE(from_canonical(canonical, pre_bias=pre_bias)), config)

    def reference(self, folder: ForeignFolder) -> Reference:
        config, activation, tensors = self.load(folder)
        scale, w = input_scale(folder, config), {name: t.double() for name, t in tensors.items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            if config.get("normalize_activations") == "layer_norm":
                mean_B1, deviation_B1 = x_BD.double().mean(-1, keepdim=True), x_BD.double().std(-1, keepdim=True)
                f_BF, recon_BD = after_norm((x_BD.double() - mean_B1) / (deviation_B1 + 1e-5))
                return f_BF, recon_BD * deviation_B1 + mean_B1
            return after_norm(x_BD.double() * scale)

        def after_norm(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            if config.get("apply_b_dec_to_input", True):
                x_BD = x_BD - w["b_dec"]
            z_BF = x_BD @ w["W_enc"]
            if activation == "gated":
                f_BF = (z_BF + w["b_gate"] > 0) * (x_BD @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
            elif activation == "topk":
                n_F = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm", False) else 1.0
                top = ((z_BF + w["b_enc"]) * n_F).topk(config["k"], dim=-1)
                f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values.relu())
                return f_BF, ((f_BF / n_F) @ w["W_dec"] + w["b_dec"]) / scale
            else:
                f_BF = (z_BF + w["b_enc"]).relu()
                if activation == "jumprelu":
                    f_BF = f_BF * (z_BF + w["b_enc"] > w["threshold"])
            return f_BF, (f_BF @ w["W_dec"] + w["b_dec"]) / scale

        return encode_decode


def saelens_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, with the hook point named as in SAELens.

    TransformerLens has no hook point for the input or output of a module that is named by its path. For such an output,
    SAELens runs transformers' own model. Raises UsageError for such an input, because SAELens has no name for it.
    """
    name = metadata.get("hook_name")
    if not is_module(name):
        return metadata
    if "hf_hook_name" not in metadata:
        raise UsageError(
            f"SAELens reads the outputs of modules, and this SAE was trained on {name}. Export it with --to "
            "dictionary-learning or --to gemma-scope, which can record any hook point."
        )
    own: dict[str, Any] = {
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {},
        "sae_hook_name": name,
    }
    model = {"model_name": hub_id(metadata["model_name"])} if "model_name" in metadata else {}
    return metadata | own | model | {"hook_name": metadata["hf_hook_name"]}


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a config from before version 6, where topk was an activation of `standard`, to the form of version 6."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    if config.get("activation_fn") == "topk" and (k := get_nested(config, "activation_fn_kwargs", "k")) is not None:
        config |= {"architecture": "topk", "k": k}
    if isinstance(normalize := config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if config.get("normalize_activations", 0) is None:
        config["normalize_activations"] = "none"
    if not isinstance(config.get("metadata", {}), dict):
        config["metadata"] = {}
    return config


def read_activation(path: Path, config: dict[str, Any]) -> str:
    """The activation that a config describes, as CanonicalSAE names it. Raises UsageError if it is not supported."""
    architecture = get_str(path, config, "architecture", "standard")
    if architecture in TRAINING_ARCHITECTURES:
        raise UsageError(
            f"{path} is the training state of a {architecture}, which SAELens saves as jumprelu for inference. "
            "Save it with save_inference_model."
        )
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{path}: architecture {short_repr(architecture)} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    activation_fn = config.get("activation_fn", "relu")
    if activation_fn not in (None, "relu", architecture):  # SAELens itself would load such a config as a relu SAE
        raise UsageError(
            f"{path}: activation_fn {short_repr(activation_fn)} contradicts architecture {architecture}. "
            "Ask the author."
        )
    if config.get("finetuning_scaling_factor"):
        raise UsageError(f"{path} has finetuning_scaling_factor, which neither this package nor SAELens supports.")
    return ARCHITECTURES[architecture]


def input_scale(folder: ForeignFolder, config: dict[str, Any]) -> float:
    """The factor by which x is multiplied before it enters the SAE.

    Raises UsageError if the factor differs between tokens or is not recorded.
    """
    path = folder.path / "cfg.json"
    normalization = get_str(path, config, "normalize_activations", "none")
    if normalization in ("none", "layer_norm"):
        return 1.0
    if normalization in PER_TOKEN_NORMALIZATIONS:
        raise UsageError(
            f"{path}: normalize_activations {normalization} {PER_TOKEN_NORMALIZATIONS[normalization]}, which is not "
            "supported: it cannot be folded into the weights."
        )
    factor: Any = config.get("norm_scaling_factor")
    if folder.has("activation_scaler.json"):
        factor = folder.read_json("activation_scaler.json").get("scaling_factor")
    known = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if normalization != "expected_average_only_in" or not known:
        raise UsageError(
            f"{path}: normalize_activations is {short_repr(normalization)}, but the files do not record the factor. "
            "Ask the author to fold it (fold_activation_norm_scaling_factor), or add it to cfg.json as "
            "norm_scaling_factor."
        )
    if not 1e-30 < factor < 1e30:
        raise DamagedError(f"{path}: invalid scaling factor {short_repr(factor)}; expected a positive number.")
    return float(factor)


def fold_decoder_norm(canonical: CanonicalSAE, norm_F: Tensor, config_path: Path) -> CanonicalSAE:
    """Fold rescale_acts_by_decoder_norm.

    This setting multiplies latents by the norms of their decoder rows before the k largest are selected.
    """
    if (norm_F == 0).any():
        raise DamagedError(
            f"{config_path}: rescale_acts_by_decoder_norm divides by the norms of W_dec's rows, but "
            f"{int((norm_F == 0).sum())} of them are zero."
        )
    W_enc, b_enc, W_dec = canonical.W_enc * norm_F, canonical.b_enc * norm_F, canonical.W_dec / norm_F[:, None]
    return replace(canonical, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)


def add_metadata(foreign: ForeignSAE, config: dict[str, Any]) -> ForeignSAE:
    """Model and hook point from the config: under "metadata" or, before version 6, at the top level."""
    recorded = {**config, **config.get("metadata", {})}
    foreign.model = parse_model(recorded.get("model_name"))
    names = [recorded.get(key) for key in ("sae_hook_name", "hook_name", "hf_hook_name")]
    foreign.hook = with_recorded_layer(first_hook(names), recorded.get("hook_layer"))
    foreign.record_text(recorded)
    foreign.metadata = {name: value for name, value in recorded.items() if name != "metadata"}
    if foreign.sae.layer_norm:
        foreign.notes.append(
            "normalize_activations is layer_norm. In this package, latents are in units of raw activations: SAELens' "
            "latents multiplied by the token's standard deviation."
        )
    if config.get("apply_b_dec_to_input") is None:
        foreign.notes.append("cfg.json has no apply_b_dec_to_input. As in SAELens, b_dec is subtracted from the input.")
    return foreign

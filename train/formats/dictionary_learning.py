"""dictionary_learning: ae.pt, which is a state dict, and config.json, which names the class of the SAE.

AutoEncoder        f = ReLU(We (x - bias) + be),  x_hat = Wd f + bias          We is (d_sae, d_in), Wd (d_in, d_sae)
AutoEncoderNew     f = ReLU(We x + be),           x_hat = Wd f + bd
GatedAutoEncoder   z = We (x - decoder_bias);  f = 1[z + gate_bias > 0] ReLU(exp(r_mag) z + mag_bias)
AutoEncoderTopK    the k largest of ReLU(We (x - b_dec) + be)
BatchTopKSAE       ReLU(We (x - b_dec) + be) where above `threshold`, a scalar that is -1 until training sets it
MatryoshkaBatchTopKSAE   the same with W_enc (d_in, d_sae) and W_dec (d_sae, d_in)
JumpReluAutoEncoder      ReLU(z) where z > threshold, z = x W_enc + b_enc
"""

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.hooks import SITES, Hook
from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import Description, ForeignSAE, Format, Reference, hook_or_none
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, hub_id, is_module, parse_model, recorded_hook
from .safe_pickle import read_state_dict_headers
from .safe_read import ForeignFolder, TensorHeader, get_nested, read_weights, short_repr, vector_size

# The tensors of each class and their shapes: D is d_in, F d_sae, G the number of groups, "" a scalar. A folder is
# inconsistent if its config.json names a class that has different tensors.
CLASS_TENSORS = {
    "AutoEncoder": {"bias": "D", "encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"},
    "AutoEncoderNew": {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF", "decoder.bias": "D"},
    "GatedAutoEncoder": {
        "decoder_bias": "D", "r_mag": "F", "gate_bias": "F", "mag_bias": "F", "encoder.weight": "FD",
        "decoder.weight": "DF",
    },
    "AutoEncoderTopK": {
        "b_dec": "D", "k": "", "threshold": "", "encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF",
    },
    "MatryoshkaBatchTopKSAE": {
        "W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "k": "", "threshold": "", "group_sizes": "G",
    },
    "JumpReluAutoEncoder": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"},
}  # fmt: skip
CLASS_TENSORS["BatchTopKSAE"] = CLASS_TENSORS["AutoEncoderTopK"]
EXPORT_CLASSES = {
    "relu": ("AutoEncoder", "StandardTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
"""Activation of CanonicalSAE -> (class of the SAE, class of its trainer) in the exported config.json."""


class DictionaryLearning(Format, name="dictionary-learning"):
    activations = ("relu", "topk", "gated", "jumprelu")
    files = ("ae.pt", "config.json")
    config = "config.json"

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        trainer = config.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        d_sae, k = trainer.get("dict_size"), trainer.get("k")
        return Description(
            model=parse_model(trainer.get("lm_name")),
            hook=hook_or_none(get_nested(config, "about", "hook_name"), *hook_texts(trainer)),
            d_sae=d_sae if type(d_sae) is int else None,
            l0=str(k) if type(k) is int else None,
        )

    def write(self, canonical: CanonicalSAE, folder: Path, metadata: dict[str, Any]) -> None:
        dict_class, trainer_class = EXPORT_CLASSES[canonical.activation]
        tensors = state_dict(canonical)
        tensors = {
            name: (t.float() if (t := tensors[name]).is_floating_point() else t).contiguous().clone()
            for name in CLASS_TENSORS[dict_class]
        }
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        trainer = {
            "trainer_class": trainer_class,
            "dict_class": dict_class,
            "activation_dim": canonical.d_in,
            "dict_size": canonical.d_sae,
            "device": "cpu",
            "layer": metadata.get("hook_layer"),
            "lm_name": hub_id(metadata.get("model_name", "")) or None,
            "submodule_name": submodule_name(metadata),
            "seed": metadata.get("seed"),
        }
        if canonical.activation == "topk":
            trainer["k"] = canonical.k
        buffer_config = {"ctx_len": metadata.get("context_size"), "d_submodule": canonical.d_in, "io": "out"}
        if is_module(name := metadata.get("hook_name")) and str(name).endswith(".input"):
            buffer_config["io"] = "in"
        atomic_write(folder / "ae.pt", buffer.getbuffer())
        write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer_config, "about": metadata})

    def load(self, folder: ForeignFolder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """The class, config.json, and the tensors exactly as in the file."""
        path = folder.require_file("ae.pt")
        headers = read_state_dict_headers(path)
        config = folder.read_json("config.json") if folder.has("config.json") else {}
        dict_class = resolve_class(path, headers, get_nested(config, "trainer", "dict_class"))
        return dict_class, config, read_weights(path, headers, expected_shapes(path, dict_class, headers))

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        dict_class, config, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}
        W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
        W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
        b_dec = next(w[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w)
        b_enc = next(w[name] for name in ("b_enc", "encoder.bias", "gate_bias") if name in w)
        pre_bias = dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        b_dec_F = b_dec @ W_enc if pre_bias else torch.zeros_like(b_enc)
        canonical = CanonicalSAE(W_enc, b_enc - b_dec_F, W_dec, b_dec, "relu")
        match dict_class:
            case "GatedAutoEncoder":
                b_mag = w["mag_bias"] - w["r_mag"].exp() * b_dec_F
                canonical = replace(canonical, activation="gated", r_mag=w["r_mag"], b_mag=b_mag)
            case "AutoEncoderTopK":
                canonical = replace(canonical, activation="topk", k=read_k(folder, tensors, canonical.d_sae))
            case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
                threshold = read_threshold(folder, tensors, dict_class)
                threshold_F = torch.full_like(b_enc, threshold)
                canonical = replace(canonical, activation="jumprelu", threshold=threshold_F)
            case "JumpReluAutoEncoder":
                canonical = replace(canonical, activation="jumprelu", threshold=w["threshold"].clamp_min(0))
        foreign = ForeignSAE(from_canonical(canonical, pre_bias=pre_bias))
        foreign.model = parse_model(get_nested(config, "trainer", "lm_name"))
        foreign.hook = find_hook(folder, config)
        about = config.get("about")
        text = {"context_size": get_nested(config, "buffer", "ctx_len")}
        foreign.record_text(text | about if isinstance(about, dict) else text)
        foreign.metadata = {**config, "dict_class": dict_class}
        return foreign

    def reference(self, folder: ForeignFolder) -> Reference:
        dict_class, _, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            x_BD = x_BD.double()
            relu = torch.nn.functional.relu
            match dict_class:
                case "AutoEncoder":
                    f_BF = relu((x_BD - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
                    return f_BF, f_BF @ w["decoder.weight"].T + w["bias"]
                case "AutoEncoderNew":
                    f_BF = relu(x_BD @ w["encoder.weight"].T + w["encoder.bias"])
                    return f_BF, f_BF @ w["decoder.weight"].T + w["decoder.bias"]
                case "GatedAutoEncoder":
                    z_BF = (x_BD - w["decoder_bias"]) @ w["encoder.weight"].T
                    f_BF = (z_BF + w["gate_bias"] > 0) * relu(w["r_mag"].exp() * z_BF + w["mag_bias"])
                    return f_BF, f_BF @ w["decoder.weight"].T + w["decoder_bias"]
                case "JumpReluAutoEncoder":
                    z_BF = x_BD @ w["W_enc"] + w["b_enc"]
                    f_BF = relu(z_BF * (z_BF > w["threshold"]))
                    return f_BF, f_BF @ w["W_dec"] + w["b_dec"]
                case "MatryoshkaBatchTopKSAE":
                    z_BF = relu((x_BD - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
                    f_BF = z_BF * (z_BF > w["threshold"])
                    return f_BF, f_BF @ w["W_dec"] + w["b_dec"]
            z_BF = relu((x_BD - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
            if dict_class == "BatchTopKSAE":
                f_BF = z_BF * (z_BF > w["threshold"])
            else:
                top = z_BF.topk(int(w["k"]), dim=-1)
                f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values)
            return f_BF, f_BF @ w["decoder.weight"].T + w["b_dec"]

        return encode_decode


# --- writing ----------------------------------------------------------------------------------------------------------


def state_dict(canonical: CanonicalSAE) -> dict[str, Tensor]:
    """The tensors of an exported SAE in float64, by the names that its class in dictionary_learning uses."""
    matrices = {"encoder.weight": canonical.W_enc.T, "decoder.weight": canonical.W_dec.T}
    match canonical.activation:
        case "relu":
            return matrices | {"bias": canonical.b_dec, "encoder.bias": canonical.centered_b_enc}
        case "gated":
            assert canonical.r_mag is not None and canonical.b_mag is not None
            b_dec_F = canonical.b_dec @ canonical.W_enc
            return matrices | {
                "decoder_bias": canonical.b_dec,
                "r_mag": canonical.r_mag,
                "gate_bias": canonical.b_enc + b_dec_F,
                "mag_bias": canonical.b_mag + canonical.r_mag.exp() * b_dec_F,
            }
        case "topk":
            return matrices | {
                "b_dec": canonical.b_dec,
                "k": torch.tensor(canonical.k, dtype=torch.int32),
                "threshold": torch.tensor(-1.0),
                "encoder.bias": canonical.centered_b_enc,
            }
        case "jumprelu":
            assert canonical.threshold is not None
            return {
                "W_enc": canonical.W_enc,
                "b_enc": canonical.b_enc,
                "W_dec": canonical.W_dec,
                "b_dec": canonical.b_dec,
                "threshold": canonical.threshold,
            }
    raise AssertionError(canonical.activation)


def submodule_name(metadata: dict[str, Any]) -> str | None:
    """`resid_post_layer_12`, as in dictionary_learning's own demo. A module is named as in transformers."""
    name = metadata.get("hook_name")
    if is_module(name):
        return metadata.get("hf_hook_name") or metadata.get("hf_hook_input_of")
    layer = metadata.get("hook_layer")
    return next((f"{site}_layer_{layer}" for site, form in SITES.items() if form.format(layer) == name), None)


# --- reading ----------------------------------------------------------------------------------------------------------


def resolve_class(path: Path, headers: dict[str, TensorHeader], recorded: object) -> str:
    """The class of an SAE, determined from its tensors and from the class in config.json, which may be missing.

    Raises DamagedError if the tensors contradict the recorded class, and UsageError if the tensors fit several classes
    and no class is recorded.
    """
    fitting = [name for name, tensors in CLASS_TENSORS.items() if set(tensors) == set(headers)]
    if not fitting:
        differences = {name: set(tensors) ^ set(headers) for name, tensors in CLASS_TENSORS.items()}
        nearest = min(differences, key=lambda name: len(differences[name]))
        if isinstance(recorded, str) and recorded in CLASS_TENSORS:
            nearest = recorded
        raise DamagedError(
            f"{path} does not contain the tensors of any supported class ({', '.join(CLASS_TENSORS)}). Missing or "
            f"unexpected for {nearest}: {short_repr(sorted(differences[nearest]))}. Download it again, or ask the "
            "author."
        )
    if recorded is None:
        if len(fitting) > 1:
            raise UsageError(
                f"{path} can be {' or '.join(fitting)}, and no config.json names the class. Download config.json too, "
                'or write it: {"trainer": {"dict_class": "..."}}.'
            )
        return fitting[0]
    if not isinstance(recorded, str) or recorded not in fitting:
        raise DamagedError(
            f"{path.with_name('config.json')} names the class {short_repr(recorded)}, but ae.pt contains the tensors "
            f"of {' or '.join(fitting)}."
        )
    return recorded


def expected_shapes(path: Path, dict_class: str, headers: dict[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """The shapes of a class's tensors. The lengths of the vectors give d_in, d_sae and the number of groups."""
    tensors = CLASS_TENSORS[dict_class]
    sizes = {"G": vector_size(path, headers, "group_sizes")} if "group_sizes" in tensors else {}
    sizes["D"] = vector_size(path, headers, next(name for name, shape in tensors.items() if shape == "D"))
    sizes["F"] = vector_size(path, headers, next(name for name, shape in tensors.items() if shape == "F"))
    return {name: tuple(sizes[letter] for letter in shape) for name, shape in tensors.items()}


def read_k(folder: ForeignFolder, tensors: dict[str, Tensor], d_sae: int) -> int:
    k = int(tensors["k"])
    if not 0 < k <= d_sae:
        raise DamagedError(f"{folder.path / 'ae.pt'}: k is {k}; expected 1 to {d_sae}, the number of latents.")
    return k


def read_threshold(folder: ForeignFolder, tensors: dict[str, Tensor], dict_class: str) -> float:
    threshold = float(tensors["threshold"].double())
    if threshold < 0:
        raise UsageError(
            f"{folder.path / 'ae.pt'}: the threshold of this {dict_class} was never set (it is {threshold:g}). Without "
            "a threshold, k applies to a whole batch, so the latents of a single token are undefined. Train the SAE "
            "longer, or set the threshold."
        )
    return threshold


def find_hook(folder: ForeignFolder, config: dict[str, Any]) -> Hook | None:
    """The hook point: from our own metadata, the submodule's name, the folder's path, or the layer number.

    A layer number does not determine the site in the layer, so it is used only if the submodule can be resid_post.
    """
    trainer = config.get("trainer")
    submodule, by_number = hook_texts(trainer if isinstance(trainer, dict) else {})
    path_parts, about = reversed(folder.path.resolve().parts[-3:]), config.get("about")
    own = recorded_hook(about) if isinstance(about, dict) else None
    if get_nested(config, "buffer", "io") == "in" and isinstance(submodule, str) and "_layer_" not in submodule:
        submodule = f"{submodule}.input"
    return own or first_hook([submodule, *path_parts, by_number])


def hook_texts(trainer: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The submodule's name, and, if that name can stand for resid_post, a hook name built from the layer number."""
    submodule, layer = trainer.get("submodule_name"), trainer.get("layer")
    known = type(layer) is int and layer >= 0 and may_be_resid_post(submodule)
    return submodule, f"blocks.{layer}.hook_resid_post" if known else None


def may_be_resid_post(submodule: object) -> bool:
    """Whether a submodule can be the residual stream after a block: True unless its name denotes another site."""
    return not isinstance(submodule, str) or not re.search(r"mlp|att|pre|mid|_in\b", submodule)

"""dictionary_learning's folder: ae.pt, a state dict, and config.json, which names its class.

AutoEncoder        f = ReLU(We (x - bias) + be),  x_hat = Wd f + bias          We is (d_sae, d_in), Wd (d_in, d_sae)
AutoEncoderNew     f = ReLU(We x + be),           x_hat = Wd f + bd
GatedAutoEncoder   z = We (x - decoder_bias);  f = 1[z + gate_bias > 0] ReLU(exp(r_mag) z + mag_bias)
AutoEncoderTopK    the k largest of ReLU(We (x - b_dec) + be)
BatchTopKSAE       those of ReLU(We (x - b_dec) + be) over `threshold`, which is one for all and -1 until it was set
MatryoshkaBatchTopKSAE   the same with W_enc (d_in, d_sae) and W_dec (d_sae, d_in)
JumpReluAutoEncoder      ReLU(z) where z > threshold, z = x W_enc + b_enc
"""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, hub_id, parse_model
from .safe_pickle import read_state_dict_headers
from .safe_read import ForeignFolder, TensorHeader, get_nested, read_weights, short_repr, vector_size

# By the tensors that only this class has. config.json can say otherwise: then the folder contradicts itself.
TENSORS = {
    "AutoEncoder": {"bias": "D", "encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"},
    "AutoEncoderNew": {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF", "decoder.bias": "D"},
    "GatedAutoEncoder": {
        "decoder_bias": "D", "r_mag": "F", "gate_bias": "F", "mag_bias": "F", "encoder.weight": "FD", "decoder.weight": "DF",
    },
    "AutoEncoderTopK": {
        "b_dec": "D", "k": "", "threshold": "", "encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF",
    },
    "MatryoshkaBatchTopKSAE": {
        "W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "k": "", "threshold": "", "group_sizes": "G",
    },
    "JumpReluAutoEncoder": {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F"},
}  # fmt: skip
TENSORS["BatchTopKSAE"] = TENSORS["AutoEncoderTopK"]
DICT_CLASSES = {"relu": "AutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}  # fmt: skip
TRAINERS = {"relu": "StandardTrainer", "gated": "GatedSAETrainer", "topk": "TopKTrainer", "jumprelu": "JumpReluTrainer"}


class DictionaryLearning(Format, name="dictionary-learning"):
    holds = ("relu", "topk", "gated", "jumprelu")
    files = ("ae.pt", "config.json")

    def recognise(self, folder: ForeignFolder) -> bool:
        return folder.has("ae.pt")

    def write(self, plain: CanonicalSAE, folder: Path, about: dict[str, Any]) -> None:
        encoder, decoder = plain.W_enc.T, plain.W_dec.T
        match plain:
            case CanonicalSAE(kind="relu"):
                found = {"bias": plain.b_dec, "encoder.weight": encoder, "encoder.bias": plain.input_bias, "decoder.weight": decoder}  # fmt: skip
            case CanonicalSAE(kind="gated", r_mag=Tensor(), b_mag=Tensor()):
                inside_F = plain.b_dec @ plain.W_enc
                found = {
                    "decoder_bias": plain.b_dec, "r_mag": plain.r_mag, "gate_bias": plain.b_enc + inside_F,
                    "mag_bias": plain.b_mag + plain.r_mag.exp() * inside_F, "encoder.weight": encoder, "decoder.weight": decoder,
                }  # fmt: skip
            case CanonicalSAE(kind="topk"):
                found = {
                    "b_dec": plain.b_dec, "k": torch.tensor(plain.k, dtype=torch.int32), "threshold": torch.tensor(-1.0),
                    "encoder.weight": encoder, "encoder.bias": plain.input_bias, "decoder.weight": decoder,
                }  # fmt: skip
            case CanonicalSAE(kind="jumprelu", threshold=Tensor()):
                found = {"W_enc": plain.W_enc, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec, "threshold": plain.threshold}  # fmt: skip
            case _:
                raise AssertionError(plain.kind)
        buffer = io.BytesIO()
        torch.save(
            {n: (t.float() if t.is_floating_point() else t).contiguous().clone() for n, t in found.items()}, buffer
        )
        name = DICT_CLASSES[plain.kind]
        trainer = {
            "trainer_class": TRAINERS[plain.kind], "dict_class": name, "activation_dim": plain.d_in, "dict_size": plain.d_sae,
            "device": "cpu", "layer": about.get("hook_layer"), "lm_name": hub_id(about.get("model_name", "")) or None,
            "submodule_name": submodule_name(about.get("hook_name", "")), "seed": about.get("seed"),
        }  # fmt: skip
        if plain.kind == "topk":
            trainer["k"] = plain.k
        buffer_record = {"ctx_len": about.get("context_size"), "d_submodule": plain.d_in, "io": "out"}
        atomic_write(folder / "ae.pt", buffer.getbuffer())
        write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer_record, "about": about})

    def load(self, folder: ForeignFolder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """The class, config.json, and the tensors as they lie there."""
        path = folder.file("ae.pt")
        claims = read_state_dict_headers(path)
        config = folder.record("config.json") if folder.has("config.json") else {}
        name = get_nested(config, "trainer", "dict_class")
        fitting = [kind for kind, names in TENSORS.items() if set(names) == set(claims)]
        if not fitting:
            apart = {kind: set(names) ^ set(claims) for kind, names in TENSORS.items()}
            nearest = (
                name if isinstance(name, str) and name in TENSORS else min(apart, key=lambda kind: len(apart[kind]))
            )
            raise DamagedError(
                f"{path} holds the tensors of no class that is known here ({', '.join(TENSORS)}): from {nearest} it differs in "
                f"{short_repr(sorted(apart[nearest]))}. Get it again, or ask the author."
            )
        if name is None:
            if len(fitting) > 1:
                raise UsageError(
                    f"{folder.path} can be {' or '.join(fitting)}, and has no config.json that says which. Get config.json too: "
                    'its trainer.dict_class decides ({"trainer": {"dict_class": "..."}}).'
                )
            name = fitting[0]
        if name not in fitting:
            raise DamagedError(f"{folder.path / 'config.json'} says {short_repr(name)}, but ae.pt holds the tensors of {' or '.join(fitting)}.")  # fmt: skip
        return name, config, read_weights(path, claims, expected_shapes(path, name, claims))

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        name, config, found = self.load(folder)
        w = {n: t.double() for n, t in found.items()}
        W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
        W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
        b_dec = next(w[n] for n in ("b_dec", "bias", "decoder_bias", "decoder.bias") if n in w)
        b_enc = next(w[n] for n in ("b_enc", "encoder.bias", "gate_bias") if n in w)
        pre_bias = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        inside_F = b_dec @ W_enc if pre_bias else torch.zeros_like(b_enc)
        plain = CanonicalSAE(W_enc, b_enc - inside_F, W_dec, b_dec, "relu")
        matrices = (plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec)
        match name:
            case "GatedAutoEncoder":
                plain = CanonicalSAE(
                    *matrices, "gated", r_mag=w["r_mag"], b_mag=w["mag_bias"] - w["r_mag"].exp() * inside_F
                )
            case "AutoEncoderTopK":
                plain = CanonicalSAE(*matrices, "topk", k=read_k(folder, found, plain.d_sae))
            case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
                threshold = float(w["threshold"])
                if threshold < 0:
                    raise UsageError(
                        f"{folder.path / 'ae.pt'}: the threshold of this {name} was never set (it is {threshold:g}), and k is of a "
                        "whole batch: what it does to one token is not decided. Train it longer, or set its threshold."
                    )
                plain = CanonicalSAE(*matrices, "jumprelu", threshold=torch.full_like(b_enc, threshold))
            case "JumpReluAutoEncoder":
                plain = CanonicalSAE(*matrices, "jumprelu", threshold=w["threshold"].clamp_min(0))
        result = ForeignSAE(from_canonical(plain, pre_bias=pre_bias))
        trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
        assert isinstance(trainer, dict)
        result.model = parse_model(trainer.get("lm_name"))
        layer = trainer.get("layer")
        said = f"blocks.{layer}.hook_resid_post" if type(layer) is int and layer >= 0 else None
        if not may_be_resid_post(trainer.get("submodule_name")):
            said = None  # the number of a layer says nothing of the place in it
        own = get_nested(config, "about", "hook_name")
        result.hook = first_hook(
            [own, trainer.get("submodule_name"), *reversed(folder.path.resolve().parts[-3:]), said]
        )
        if isinstance(context := get_nested(config, "buffer", "ctx_len"), int):
            result.context = context
        result.metadata = {**config, "dict_class": name}
        return result

    def reference(self, folder: ForeignFolder) -> Reference:
        name, _, found = self.load(folder)
        w = {n: t.double() for n, t in found.items()}

        def code(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            x_BD = x_BD.double()
            relu = torch.nn.functional.relu
            match name:
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
            if name == "BatchTopKSAE":
                f_BF = z_BF * (z_BF > w["threshold"])
            else:
                top = z_BF.topk(int(w["k"]), dim=-1)
                f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values)
            return f_BF, f_BF @ w["decoder.weight"].T + w["b_dec"]

        return code


def expected_shapes(path: Path, name: str, claims: dict[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """The shapes that a class demands: d_in and d_sae from its biases, or where it has one alone, from its encoder."""
    letters = TENSORS[name]
    known = {"G": vector_size(path, claims, "group_sizes")} if "group_sizes" in letters else {}
    known["D"] = vector_size(path, claims, next(n for n, s in letters.items() if s == "D"))
    known["F"] = vector_size(path, claims, next(n for n, s in letters.items() if s == "F"))
    return {n: tuple(known[letter] for letter in s) for n, s in letters.items()}


def read_k(folder: ForeignFolder, found: dict[str, Tensor], d_sae: int) -> int:
    k = int(found["k"])
    if not 0 < k <= d_sae:
        raise DamagedError(f"{folder.path / 'ae.pt'}: k is {k}, and there are {d_sae} latents.")
    return k


def may_be_resid_post(submodule: object) -> bool:
    """Whether the words for a place leave open or say that it is the residual stream after a block."""
    return not isinstance(submodule, str) or not re.search(r"mlp|att|pre|mid|_in\b", submodule)


def submodule_name(hook_name: str) -> str | None:
    """`resid_post_layer_12`, as its own demo calls it."""
    hook = first_hook([hook_name])
    return None if hook is None else f"{hook.site}_layer_{hook.layer}"

"""Qwen-Scope: a folder with a layer<n>.sae.pt for each block: W_enc (d_sae, d_in), W_dec (d_in, d_sae), b_enc, b_dec.

    f = the k largest of z, where positive,  z = x W_enc^T + b_enc;  x_hat = f W_dec^T + b_dec

b_dec is not subtracted from the input, which is the residual stream after the block. The files are torch.save state
dicts and are read without unpickling. config.json and the repository's name, such as
SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, contain k and the model. docs/reference/formats.md lists the sources.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...common.errors import DamagedError, UsageError
from .base import Description, ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import parse_model
from .safe_pickle import read_state_dict_headers
from .safe_read import ForeignFolder, get_positive_int, read_weights, short_repr, vector_size

WEIGHTS = re.compile(r"layer(\d{1,4})\.sae\.pt")
REPOSITORY = re.compile(r"SAE-Res-([\w.\-]{1,80})-W(\d{1,5})K-L0_(\d{1,6})")


class RepositoryName(NamedTuple):
    """The information in the name of a Qwen-Scope repository."""

    model: str
    d_sae: int
    k: int


class QwenScope(Format, name="qwen-scope"):
    files = ("layer<n>.sae.pt", "config.json")

    def is_weights(self, name: str) -> bool:
        return WEIGHTS.fullmatch(name) is not None

    def matches(self, folder: ForeignFolder) -> bool:
        return bool(weights_of(folder))

    def address(self, weights: PurePosixPath) -> PurePosixPath:
        return weights

    def weights_name(self, folder: ForeignFolder) -> str:
        """The chosen file, or the only one. Raises UsageError if there are several and none was chosen."""
        if folder.chosen is not None:
            return folder.chosen
        names = weights_of(folder)
        if len(names) != 1:
            raise UsageError(
                f"{folder.path} contains the SAEs of {len(names)} layers. Choose one with --layer, or give its file: "
                f"sae import {folder.path / names[0]}"
            )
        return names[0]

    def select(self, folder: ForeignFolder, layer: int | None) -> ForeignFolder:
        if folder.chosen is not None or layer is None:
            return folder
        name = f"layer{layer}.sae.pt"
        if not folder.has(name):
            layers = sorted(layer_of(name) for name in weights_of(folder))
            raise UsageError(f"{folder.path} has no {name}; it contains the layers {', '.join(map(str, layers))}.")
        return ForeignFolder(folder.path, name)

    def describe_path(self, repo: str, weights: PurePosixPath) -> Description:
        hook, name = Hook(layer_of(weights.name)), parse_repository((*repo.split("/"), *weights.parts))
        return Description(name.model, hook, name.d_sae, str(name.k)) if name else Description(hook=hook)

    def describe_config(self, config: Mapping[str, Any]) -> Description:
        d_sae, k = config.get("d_sae"), config.get("k")
        return Description(
            model=parse_model(config.get("base_model")),
            d_sae=d_sae if type(d_sae) is int else None,
            l0=str(k) if type(k) is int else None,
        )

    def load(self, folder: ForeignFolder) -> tuple[str, dict[str, Any], int, dict[str, Tensor]]:
        """The name of the weights file, config.json, k, and the tensors exactly as in the file."""
        file, path = self.weights_name(folder), folder.path / "config.json"
        weights = folder.require_file(file)
        headers = read_state_dict_headers(weights)
        D, F = vector_size(weights, headers, "b_dec"), vector_size(weights, headers, "b_enc")
        config = folder.read_json("config.json") if folder.has("config.json") else {}
        if (hook_point := config.get("hook_point", "resid_post")) != "resid_post":
            raise UsageError(f"{path}: hook_point {short_repr(hook_point)} is not supported, only resid_post.")
        for key, size in {"d_model": D, "d_sae": F}.items():
            if get_positive_int(path, config, key, size) != size:
                raise DamagedError(f"{path} says {key} {config[key]:,}, but {file} has {size:,}. Download both again.")
        named = parse_repository(folder.path.resolve().parts)
        if named is None and "k" not in config:
            raise UsageError(
                f"The number k of active latents of {weights} is not recorded: there is no config.json beside it, and "
                "no folder above it with the repository's name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50. Download "
                'config.json too, or write it: {"k": 50, "base_model": "Qwen/Qwen3-8B-Base"}.'
            )
        k = get_positive_int(path, config, "k", named.k if named else None)
        if k > F:
            raise DamagedError(f"{path}: k is {k}, but there are only {F} latents.")
        expected = {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)}
        return file, config, k, read_weights(weights, headers, expected)

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        file, config, k, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}
        canonical = CanonicalSAE(w["W_enc"].T, w["b_enc"], w["W_dec"].T, w["b_dec"], "topk", k=k)
        foreign = ForeignSAE(from_canonical(canonical), hook=Hook(layer_of(file)), metadata=config)
        named = parse_repository(folder.path.resolve().parts)
        foreign.model = parse_model(config.get("base_model")) or (named.model if named else None)
        if named and named.k != k:
            foreign.notes.append(f"config.json has k = {k}, but the folder's name has k = {named.k}; {k} is used.")
        foreign.record_text(config)
        return foreign

    def reference(self, folder: ForeignFolder) -> Reference:
        _, _, k, tensors = self.load(folder)
        w = {name: t.double() for name, t in tensors.items()}

        def encode_decode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            top = (x_BD.double() @ w["W_enc"].T + w["b_enc"]).topk(k, dim=-1)
            # The model card's example would keep negative values among the k largest; SAELens sets them to zero.
            f_BF = torch.zeros(len(x_BD), len(w["b_enc"]), dtype=torch.float64)
            f_BF.scatter_(-1, top.indices, top.values.clamp_min(0))
            return f_BF, f_BF @ w["W_dec"].T + w["b_dec"]

        return encode_decode


def layer_of(name: str) -> int:
    match = WEIGHTS.fullmatch(name)
    assert match is not None
    return int(match[1])


def weights_of(folder: ForeignFolder) -> list[str]:
    """The weights files in a folder, ordered by layer."""
    if not folder.path.is_dir():
        return []
    return sorted((path.name for path in folder.path.iterdir() if WEIGHTS.fullmatch(path.name)), key=layer_of)


def parse_repository(parts: tuple[str, ...]) -> RepositoryName | None:
    """`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`: the model, the width in units of 1,024 latents, and k."""
    for part in reversed(parts):
        if match := REPOSITORY.fullmatch(part):
            return RepositoryName(f"Qwen/{match[1]}", int(match[2]) * 1024, int(match[3]))
    return None

"""Hooks, the places where activations are read from a model, and their names on the command line, on disk and in
TransformerLens.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..common.errors import DamagedError, UsageError

SITES = {  # site -> TransformerLens' name of the hook
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "attn_z": "blocks.{}.attn.hook_z",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_hidden": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # the stream and what is added to it
OUTSIDE = "model."  # prefix of the path of a module outside the blocks


class Hook(NamedTuple):
    """Where activations are read from the model: a site of a layer.

    The site is one of SITES, or `<path>.output` or `<path>.input` for any other module. `mlp.gate_proj.output` is in
    the block of the layer; `model.embed_tokens.output` is outside the blocks, and `model` denotes the module that
    contains the blocks. Modules before the first block belong to layer 0, and modules after the last block belong to
    the last layer.
    """

    layer: int
    site: str = "resid_post"

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.site == "resid_post" else f"{self.site} of layer {self.layer}"

    @property
    def cli_flags(self) -> str:
        """The command line options that select this hook: `--layer 12 --site mlp_out`."""
        return f"--layer {self.layer}" + (f" --site {self.site}" if self.site != "resid_post" else "")

    @property
    def array(self) -> str:
        """The name of its array in a cache: `layer_12` for the residual stream, `layer_12.mlp_out` for another site."""
        return f"layer_{self.layer:02d}" if self.site == "resid_post" else f"layer_{self.layer:02d}.{self.site}"

    @property
    def name(self) -> str:
        """TransformerLens' name, `blocks.12.hook_resid_post`; for a module, `model.layers.12.mlp.up_proj.output`."""
        if self.site in SITES:
            return SITES[self.site].format(self.layer)
        return self.site if self.is_outside else f"model.layers.{self.layer}.{self.site}"

    @property
    def is_outside(self) -> bool:
        """Whether the hook is on a module outside the blocks, such as the embedding or the final norm."""
        return self.site.startswith(OUTSIDE)

    @property
    def module_path(self) -> str:
        """For a site that is not in SITES, the path of its module in the block, or in the trunk if `is_outside`."""
        return self.site.rpartition(".")[0].removeprefix(OUTSIDE)

    @property
    def record(self) -> dict[str, Any]:
        """The hook's entries in a record such as sae.json; the site is omitted for the residual stream (resid_post)."""
        return {"layer": self.layer} | ({"site": self.site} if self.site != "resid_post" else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Hook":
        """The hook that a record describes by its entries `layer` and, optionally, `site`; the inverse of
        `Hook.record`.
        """
        return cls(record["layer"], record.get("site", "resid_post"))

    @classmethod
    def from_array(cls, array: str) -> "Hook":
        """The hook whose array has the name `array`. Raises DamagedError if there is no such hook."""
        match = re.fullmatch(r"layer_(\d+)(?:\.([\w.]+))?", array)
        if match is None:
            raise DamagedError(f"{array!r} is not the name of an array of activations, such as layer_12.")
        return cls(int(match[1]), match[2] or "resid_post")


def is_site(text: str) -> bool:
    """Whether a string is a valid site: one of SITES, or the input or output of a module."""
    return text in SITES or re.fullmatch(r"[\w.]+\.(input|output)", text) is not None


class ModuleSpec(NamedTuple):
    """A parsed value of --module, such as `model.layers.{layer}.mlp.gate_proj:output`."""

    blocks: str | None  # where the blocks are: model.layers; None for a module outside the blocks
    layer: int | None  # None: every requested layer
    path: str  # in the block, or of a module outside the blocks
    end: str  # input or output

    @property
    def site(self) -> str:
        """The site in the block. The output of the block itself is resid_post, and its input is resid_pre."""
        if not self.path:
            return "resid_post" if self.end == "output" else "resid_pre"
        return f"{self.path}.{self.end}"

    @classmethod
    def parse(cls, text: str) -> "ModuleSpec":
        """Parse a value of --module. Raises UsageError if the value is invalid."""
        match = re.fullmatch(r"([A-Za-z_]\w*(?:\.(?:\w+|\{layer\}))*)(?::(input|output))?", text)
        if match is None:
            raise UsageError(
                f"invalid --module {text}: expected the module's name in transformers, with {{layer}} in place of the "
                "block number, such as 'model.layers.{layer}.mlp.gate_proj' or 'model.layers.{layer}.mlp:input'."
            )
        path, end = match[1], match[2] or "output"
        inside = re.fullmatch(r"(.+?)\.(\{layer\}|\d+)(?:\.(.+))?", path)
        if inside is None:
            return cls(None, None, path, end)
        layer = None if inside[2] == "{layer}" else int(inside[2])
        return cls(inside[1], layer, inside[3] or "", end)

"""An independent check of `sae evaluate`: KL, CE and explained variance with only transformers and torch hooks.

    python benchmarks/real_model/forward_hooks.py MODEL CACHE RUN... [--tokens N] [--count-outliers]

This file imports nothing from the package and shares no code with it. It reads the files as
docs/reference/cache-format.md and sae.json describe them, encodes by the equations of the recipes, and runs the whole
model once for each SAE with a forward hook on its block. Measurements are kept for each row, so that the numbers can be
computed again with any single row left out.

Definitions. Counted rows are the tokens of the held-out contexts that are not special and whose norm does not exceed
the limit of the cache, if it has one. A reconstruction replaces the activation at counted rows only. KL(model ||
spliced) is averaged over counted rows, CE of the next token over counted rows that have one in their context, explained
variance is 1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over counted rows.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

BATCH_CONTEXTS = 16
LOGIT_ROWS = 256  # rows whose logits are in memory at a time


@dataclass(frozen=True)
class HeldOutText:
    """The held-out contexts of a cache: ids (N, S), lengths (N,), documents (N,), and which tokens are counted."""

    ids: np.ndarray
    length: np.ndarray
    document: np.ndarray
    special: list[int]
    skip_positions: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """The ids and `counted` of each batch, (N, S), and the slice of its contexts."""
        for start in range(0, len(self.ids), BATCH_CONTEXTS):
            part = slice(start, start + BATCH_CONTEXTS)
            width = int(self.length[part].max())
            ids = torch.from_numpy(self.ids[part, :width].astype(np.int64))
            counted = torch.arange(width) < torch.from_numpy(self.length[part].astype(np.int64))[:, None]
            counted &= ~torch.isin(ids, torch.tensor(self.special, dtype=torch.int64))
            counted[:, : self.skip_positions] = False
            yield ids, counted, part


@dataclass
class PlainCache:
    """The parts of a cache that are read: its identity, statistics, text and rows."""

    folder: Path
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attributes = json.loads((self.folder / "zarr.json").read_text())["attributes"]

    @property
    def identity(self) -> dict[str, Any]:
        return self.attributes["identity"]

    def norm_limit(self, array: str) -> float | None:
        """The norm above which a row is an outlier, None if there is no limit."""
        return json.loads((self.folder / "manifest.json").read_text())["statistics"][array].get("norm_limit")

    def held_out(self, tokens: int | None = None) -> HeldOutText:
        """The held-out contexts, or the first of them that together contain `tokens` tokens."""
        group = zarr.open_group(self.folder / "tokens", mode="r")
        chosen = np.flatnonzero(group["held_out"][:])
        length = group["length"][:][chosen]
        if tokens is not None:
            chosen = chosen[: 1 + int((length.cumsum() < tokens).sum())]
        ids, document = group["ids"][:][chosen], group["document"][:][chosen]
        special, positions = self.identity["skip"], self.identity.get("skip_positions", 0)
        return HeldOutText(ids, length[: len(chosen)], document, special, positions)

    def contexts(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids (N, S) and lengths (N,) of all contexts."""
        group = zarr.open_group(self.folder / "tokens", mode="r")
        return group["ids"][:], group["length"][:]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The context and the position of each row."""
        group = zarr.open_group(self.folder, mode="r")
        return group["row_ctx"][:], group["row_pos"][:]

    def rows(self, array: str, chunks: int | None = None) -> Iterator[Tensor]:
        """The rows of an array (n, d_in) in float32, chunk by chunk; with `chunks`, only those of the first `chunks`
        chunks."""
        metadata = json.loads((self.folder / array / "zarr.json").read_text())
        total, width = metadata["shape"]
        size = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        for number in range(-(-total // size))[:chunks]:
            bits = np.fromfile(self.folder / array / f"c.{number}.0", np.int16, size * width).reshape(size, width)
            yield torch.from_numpy(bits[: total - number * size]).view(torch.bfloat16).float()


@dataclass(frozen=True)
class PlainSAE:
    """A saved SAE, by the equations: f = act((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec."""

    name: str
    layer: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    d_sae: int


def load_plain_sae(folder: Path) -> PlainSAE:
    spec, w = json.loads((folder / "sae.json").read_text()), load_file(folder / "sae.safetensors")
    if spec["origin"].get("site", "resid_post") != "resid_post":
        raise SystemExit(f"{folder} reads {spec['origin']['site']}; this check splices into resid_post only.")
    if spec.get("layer_norm"):
        raise SystemExit(f"{folder}: this check has no equation for normalize=layer_norm.")

    def encode(x: Tensor) -> Tensor:
        z = (x - w["b_dec"] if spec["pre_bias"] else x) @ w["W_enc"] + w["b_enc"]
        for number, activation in enumerate(spec["activation"]):
            match activation["name"]:
                case "relu":
                    z = z.clamp(min=0)
                case "topk":
                    top = z.topk(activation["k"], dim=-1)
                    z = torch.zeros_like(z).scatter(-1, top.indices, top.values.clamp(min=0))
                case "batchtopk":
                    z = torch.where(z > w[f"activation.{number}.threshold"], z, 0).clamp(min=0)
                case "jumprelu":
                    z = torch.where(z > w[f"activation.{number}.threshold"], z, 0)
                case name:
                    raise SystemExit(f"{folder}: this check has no equation for the activation {name}.")
        return z

    def decode(f: Tensor) -> Tensor:
        return f @ w["W_dec"] + w["b_dec"]

    return PlainSAE(folder.name, spec["origin"]["layer"], encode, decode, spec["d_sae"])


@dataclass
class RowTable:
    """Measurements at each row whose token is not special: R rows, K SAEs. Outlier rows are included if they were
    spliced.

    `error` is |x - x_hat|^2, `distance` |x - mean of the counted x|^2. `ce` is NaN where no token follows. `first_row`
    (K, F) is the row on which each latent is largest, or -1 if it never fires.
    """

    names: list[str]
    context: np.ndarray
    position: np.ndarray
    document: np.ndarray
    norm: np.ndarray
    distance: np.ndarray
    ce: np.ndarray
    error: np.ndarray
    kl: np.ndarray
    ce_spliced: np.ndarray
    l0: np.ndarray
    first_row: list[np.ndarray]

    @property
    def has_losses(self) -> bool:
        return not np.isnan(self.kl).any()

    def summary(self) -> dict[str, dict[str, float]]:
        """The numbers of each SAE that were measured, under the names that `sae evaluate` gives them."""
        return {name: self._numbers(k) for k, name in enumerate(self.names)}

    def _numbers(self, k: int) -> dict[str, float]:
        numbers = {"fve": 1 - self.error[:, k].sum() / self.distance.sum(), "l0": self.l0[:, k].mean()}
        if self.has_losses:
            numbers["kl_div_with_sae"] = self.kl[:, k].mean()
            numbers["ce_loss_with_sae"] = np.nanmean(self.ce_spliced[:, k])
            numbers["ce_loss_without_sae"] = np.nanmean(self.ce)
        return {name: float(value) for name, value in numbers.items()}


def load_plain_model(folder: Path, cache: PlainCache) -> Any:
    """The model in a folder, in float32 and with the attention that the cache was harvested with."""
    attention = cache.identity["attention"]
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, attn_implementation=attention
    ).eval()


@torch.no_grad()
def measure(
    model: Any, text: HeldOutText, saes: Sequence[PlainSAE], norm_limit: float | None = None, loss: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
) -> RowTable:  # fmt: skip
    """Splice the SAEs into the model, one after the other. Rows whose norm exceeds `norm_limit` are neither replaced
    nor counted.

    Without `loss` the model runs once, and KL and CE are NaN.
    """
    (layer,) = {sae.layer for sae in saes}
    block = model.model.layers[layer]
    columns: dict[str, list[Tensor]] = {}
    xs: list[Tensor] = []
    best = [torch.zeros(sae.d_sae) for sae in saes]
    first = [torch.full((sae.d_sae,), -1) for sae in saes]
    done = 0
    for ids, counted, part in text.batches():
        seen: dict[str, Tensor] = {}

        def keep(_module: Any, _inputs: Any, output: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = output[0] if isinstance(output, tuple) else output

        handle = block.register_forward_hook(keep)
        final = model.model(ids, use_cache=False).last_hidden_state
        handle.remove()
        if norm_limit is not None:
            counted = counted & (seen["x"].norm(dim=-1) <= norm_limit)
        x = seen["x"][counted]
        context, position = counted.nonzero(as_tuple=True)
        next_ids = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)[counted]
        ends = position + 1 >= torch.from_numpy(text.length[part].astype(np.int64))[context]
        errors, l0s, finals = [], [], []
        for k, sae in enumerate(saes):
            f = sae.encode(x)
            recon = sae.decode(f)
            errors.append((x - recon).double().square().sum(1))
            l0s.append((f != 0).sum(1).double())
            value, row = f.max(0)
            better = value > best[k]
            best[k], first[k] = torch.where(better, value, best[k]), torch.where(better, row + done, first[k])
            if loss:
                finals.append(spliced_final(model, block, ids, counted, recon))
        ce, kls, ces = torch.full((1 + 2 * len(saes), len(x)), torch.nan).double().split([1, len(saes), len(saes)])
        if loss:
            ce, kls, ces = losses(model, final[counted], finals, next_ids, ends)
        batch = {
            "context": context + part.start, "position": position, "norm": x.double().norm(dim=1), "ce": ce[0],
            "error": torch.stack(errors, 1), "l0": torch.stack(l0s, 1), "kl": kls.T, "ce_spliced": ces.T,
        }  # fmt: skip
        for name, values in batch.items():
            columns.setdefault(name, []).append(values)
        xs.append(x)
        done += len(x)
        say(f"{part.stop:,} of {len(text.ids):,} contexts")
    array = {name: torch.cat(values).numpy() for name, values in columns.items()}
    x = torch.cat(xs).double()
    return RowTable(
        names=[sae.name for sae in saes], document=text.document[array["context"]],
        distance=(x - x.mean(0)).square().sum(1).numpy(), first_row=[rows.numpy() for rows in first], **array,
    )  # fmt: skip


def spliced_final(model: Any, block: Any, ids: Tensor, counted: Tensor, recon: Tensor) -> Tensor:
    """The model's final activations at the counted rows when the block's output there is `recon`."""

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[counted] = recon
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = block.register_forward_hook(replace)
    try:
        return model.model(ids, use_cache=False).last_hidden_state[counted]
    finally:
        handle.remove()


def losses(
    model: Any, final: Tensor, spliced: Sequence[Tensor], next_ids: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """CE of the model (1, R), and KL and CE of each of K spliced models (K, R), in nats. CE is NaN at `ends` (R,).

    Log-probabilities are float32, like the model: torch's float32 log_softmax over 49,152 tokens is off by about 1e-5,
    so float64 log-probabilities would move a KL of 2.2 by 2e-5.
    """
    ce = torch.empty(1, len(final), dtype=torch.float64)
    kl, ce_spliced = torch.empty(2, len(spliced), len(final), dtype=torch.float64)
    for start in range(0, len(final), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        log_p = model.lm_head(final[rows]).log_softmax(-1)
        ce[0, rows] = -log_p.gather(1, next_ids[rows, None])[:, 0]
        for k, output in enumerate(spliced):
            log_q = model.lm_head(output[rows]).log_softmax(-1)
            kl[k, rows] = (log_p.exp() * (log_p - log_q)).double().sum(1)
            ce_spliced[k, rows] = -log_q.gather(1, next_ids[rows, None])[:, 0]
    ce[:, ends], ce_spliced[:, ends] = torch.nan, torch.nan
    return ce, kl, ce_spliced


@torch.no_grad()
def hidden_state_differences(
    model: Any, cache: PlainCache, arrays: Sequence[str], batch_contexts: int
) -> dict[str, int]:
    """How many stored rows of each array differ in any bit from the model's hidden_states, rounded to bfloat16."""
    ids, length = cache.contexts()
    row_context, row_position = cache.places()
    stored = {array: torch.cat(list(cache.rows(array))) for array in arrays}
    by_batch = row_context // batch_contexts
    differing = dict.fromkeys(arrays, 0)
    for number in range(int(by_batch.max()) + 1):
        part = slice(number * batch_contexts, min((number + 1) * batch_contexts, int(row_context.max()) + 1))
        width = int(length[part].max())
        batch = torch.from_numpy(ids[part, :width].astype(np.int64))
        states = model.model(batch, use_cache=False, output_hidden_states=True).hidden_states
        rows = np.flatnonzero(by_batch == number)
        place = (
            torch.from_numpy(row_context[rows].astype(np.int64) - part.start),
            torch.from_numpy(row_position[rows].astype(np.int64)),
        )
        for array in arrays:
            state = states[int(array.removeprefix("layer_")) + 1][place].to(torch.bfloat16).float()
            differing[array] += int((state != stored[array][rows]).any(1).sum())
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("cache", type=Path, help="folder of the cache whose held-out text is read")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs on the same layer")
    parser.add_argument("--tokens", type=int, help="held-out tokens to read (default: all)")
    parser.add_argument("--count-outliers", action="store_true", help="count and replace outlier rows as well")
    args = parser.parse_args()
    cache = PlainCache(args.cache)
    saes = [load_plain_sae(run) for run in args.runs]
    limit = None if args.count_outliers else cache.norm_limit(f"layer_{saes[0].layer:02}")
    table = measure(load_plain_model(args.model, cache), cache.held_out(args.tokens), saes, limit, say=print)
    print(json.dumps({"rows": len(table.norm), "norm_limit": limit, "runs": table.summary()}, indent=1))


if __name__ == "__main__":
    main()

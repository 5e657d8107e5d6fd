"""A table of model families and sites: writes `docs/reference/families.md`. Takes two minutes.

python benchmarks/family_table.py > docs/reference/families.md
"""

import re
import textwrap
from collections.abc import Iterator

import transformers

from sae.benchmarks.families import FAMILIES, FamilyResult, examine
from sae.cache.hooks import SITES

HEAD = f"""# Model families and their sites

Made by `benchmarks/family_table.py`, which checks each family on a tiny model with random parameters, of transformers
{transformers.__version__}. `tests/harvest/test_families.py` runs the same checks. They are:

- Captured activations equal transformers' hidden states, and what a plain forward hook sees on the named module, to
  the bit.
- resid_pre + attn_out + mlp_out = resid_post, and resid_pre + attn_out = resid_mid.
- Putting the captured activations back gives the model's logits, and putting others there gives the logits of
  transformers' model with a plain hook that does the same. Afterwards the model is as before.
- The first blocks alone, as a harvest loads them, give the same activations as the whole model.

The family of a model is the `model_type` in its config.json: Pythia is gpt_neox, SmolLM2 is llama, and a multimodal
model such as Gemma 3 is listed by its language tower, gemma3_text. The blocks and the sites are found by structure and
numbers (`harvest/structure.py`, `harvest/probe.py`), so a family that is not listed works as well if its numbers prove
the sites. `sae harvest --dry-run` shows what is found, and the harvest checks it again on the model's own weights. A
site that cannot be proved is refused with the reason. `--module` reads the input or output of any other module,
whichever the family.

The sites of a block, in the order in which the model computes them:

| site | what | TransformerLens |
|---|---|---|
| resid_pre | the residual stream before the block | `hook_resid_pre` |
| attn_z | what attention's output matrix reads: the heads, one after the other | `attn.hook_z`, flattened |
| attn_out | what attention adds to the residual stream | `hook_attn_out` |
| resid_mid | the residual stream between attention and MLP | `hook_resid_mid` |
| mlp_in | what the MLP reads, after the norm | `mlp.hook_in` (TransformerBridge) |
| mlp_hidden | what the MLP's last matrix reads: its neurons | `mlp.hook_post` |
| mlp_out | what the MLP adds to the residual stream | `hook_mlp_out` |
| resid_post | the residual stream after the block | `hook_resid_post` |

A number such as 1/2 counts kinds of blocks: in one of two kinds the site exists, such as the dense blocks of a model
that also has mixtures of experts. The modules are those of attn_z and mlp_in: what stands in the place of attention
reads earlier tokens, be it attention, a Mamba or DeltaNet mixer or a convolution.

| family | {" | ".join(SITES)} | attention | MLP |
|{"---|" * (len(SITES) + 3)}"""


def table_row(result: FamilyResult) -> str:
    """The table row of a family."""
    cells = []
    for site in SITES:
        count, kinds = sum(site in block for block in result.blocks), len(result.blocks)
        cells.append("yes" if count == kinds else f"{count}/{kinds}" if count else "no")
    modules = [
        ", ".join(dict.fromkeys(f"`{part_of(block[site])}`" for block in result.blocks if site in block))
        for site in ("attn_z", "mlp_in")
    ]
    return f"| {result.kind} | {' | '.join([*cells, *modules])} |"


def part_of(name: str) -> str:
    """The part of the block that a module is in: `self_attn` for the input of `model.layers.1.self_attn.o_proj`."""
    path = name.removeprefix("the input of ").split(".")
    return path[next(n for n, part in enumerate(path) if part.isdigit()) + 1]


def reason_lines(results: list[FamilyResult]) -> Iterator[str]:
    """The reasons for which sites are refused, with the families to which each applies."""
    families: dict[tuple[str, str], list[str]] = {}  # sites, reason -> families
    for result in results:
        for refused in result.refused:
            sites_of_reason: dict[str, list[str]] = {}
            for site, sentence in refused.items():
                reason = sentence.partition(": ")[2] or sentence
                sites_of_reason.setdefault(re.split(r"\.? Use --", reason)[0], []).append(site)
            for reason, sites in sites_of_reason.items():
                kinds = families.setdefault((", ".join(sites), reason), [])
                kinds += [result.kind] if result.kind not in kinds else []
    for (sites, reason), kinds in families.items():
        yield textwrap.fill(f"- {', '.join(kinds)}: no {sites}: {reason}.", 120, subsequent_indent="  ")


def main() -> None:
    transformers.logging.set_verbosity_error()
    results = [examine(kind) for kind in FAMILIES]
    print(HEAD)
    for result in results:
        print(table_row(result))
    print("\n## Why sites are refused\n")
    for line in reason_lines(results):
        print(line)


if __name__ == "__main__":
    main()

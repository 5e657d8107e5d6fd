"""Every site of every model family. benchmarks/families.py contains the checks and says what they compare."""

import runpy
from pathlib import Path

import pytest

from sae.cache.hooks import SITES

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
FAMILIES = runpy.run_path(str(ROOT / "benchmarks" / "families.py"))
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "family_table.py"))
ALL, NONE = frozenset(SITES), frozenset[str]()
PARALLEL = ALL - {"resid_mid"}
EXPERTS = ALL - {"mlp_hidden"}
RESIDUAL = frozenset({"resid_pre", "resid_post"})
NOT_ADDED = ALL - {"attn_out", "mlp_out", "resid_mid"}  # Granite's and others' factors
ATTENTION_ONLY = RESIDUAL | {"attn_out", "attn_z"}
MLP_ONLY = RESIDUAL | {"mlp_in", "mlp_hidden", "mlp_out"}

# family -> the sites of each kind of block, according to the source code of transformers
EXPECTED: dict[str, list[frozenset[str]]] = {
    **dict.fromkeys(
        ("apertus", "arcee", "biogpt", "bloom", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm4", "gpt2",
         "gpt_bigcode", "helium", "lfm2", "llama", "mistral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "opt",
         "persimmon", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"), [ALL],
    ),
    **dict.fromkeys(("bamba", "gemma2", "gemma4_text", "gpt_neo", "qwen3_5_text"), [ALL, ALL]),
    **dict.fromkeys(("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi"), [PARALLEL]),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe"), [EXPERTS]),
    **dict.fromkeys(("deepseek_v3", "llama4_text"), [ALL, EXPERTS]),
    **dict.fromkeys(("gpt_oss", "qwen3_next"), [EXPERTS, EXPERTS]),
    "granite": [NOT_ADDED], "mamba": [ATTENTION_ONLY], "mamba2": [ATTENTION_ONLY], "jamba": [ALL, EXPERTS],
    "nemotron_h": [ATTENTION_ONLY, ATTENTION_ONLY, MLP_ONLY, MLP_ONLY - {"mlp_hidden"}],
    "deepseek_v4": [NONE], "gemma3n_text": [NONE],
}  # fmt: skip
# Built as others here are, or nearly so, or with blocks of several kinds, which take the longest: slow.
ALIKE = {
    "bamba", "biogpt", "bloom", "cohere2", "deepseek_v3", "deepseek_v4", "gemma3_text", "gemma4_text", "glm4",
    "gpt_neo", "lfm2", "llama4_text", "mpt", "olmo2", "phi3", "qwen3_moe",
    "apertus", "arcee", "codegen", "cohere", "ernie4_5", "exaone4", "gemma", "gpt_bigcode", "helium", "mamba",
    "mistral", "nemotron", "nemotron_h", "olmo", "olmo3", "persimmon", "phi", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_next", "smollm3", "stablelm", "starcoder2",
    "falcon", "gpt_oss", "gptj", "jamba", "llama", "mamba2", "qwen3_5_text",
}  # fmt: skip
QUICK = sorted(set(EXPECTED) - ALIKE)
OTHERS = sorted(set(FAMILIES["FAMILIES"]) - set(EXPECTED))


def row_in_the_docs(kind: str) -> str:
    lines = (ROOT / "docs" / "reference" / "families.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {kind} |"))


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(ALIKE))])
def test_every_site_of_a_family(kind: str) -> None:
    result = FAMILIES["examine"](kind)
    assert sorted(map(sorted, result.blocks)) == sorted(map(sorted, EXPECTED[kind]))
    assert result.spliced == sum(map(len, EXPECTED[kind]))
    assert TABLE["table_row"](result) == row_in_the_docs(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_site_of_another_family(kind: str) -> None:
    assert TABLE["table_row"](FAMILIES["examine"](kind)) == row_in_the_docs(kind)

"""Hooks are planned from a model's configuration alone, with little memory, or refused with a reason."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig

from sae.cache.hooks import SITES, Hook, ModuleSpec, is_site
from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.harvest import architectures
from sae.harvest.architectures import check_context, check_sites, hook_width, hooks_of_sites, module_name
from sae.harvest.model import LanguageModel, find_model, load_trunk
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.repair import repair
from sae.harvest.run import run_harvest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "spec", "site"),
    [
        ("model.layers.{layer}.mlp.fc", ("model.layers", None, "mlp.fc", "output"), "mlp.fc.output"),
        ("transformer.h.{layer}.mlp:input", ("transformer.h", None, "mlp", "input"), "mlp.input"),
        ("model.layers.3.mlp.experts.0.up:output", ("model.layers", 3, "mlp.experts.0.up", "output"),
         "mlp.experts.0.up.output"),
        ("model.layers.{layer}", ("model.layers", None, "", "output"), "resid_post"),
        ("model.layers.{layer}:input", ("model.layers", None, "", "input"), "resid_pre"),
        ("model.norm:input", (None, None, "model.norm", "input"), "model.norm.input"),
    ],
)  # fmt: skip
def test_a_module_is_taken_apart(text: str, spec: tuple, site: str) -> None:
    assert ModuleSpec.parse(text) == spec and ModuleSpec.parse(text).site == site
    assert is_site(site)


@pytest.mark.parametrize("text", ["", "model.layers.{layer}.mlp:both", "a b", "../x", "model..norm", ":input"])
def test_what_is_no_module_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="invalid --module .*: expected the module's name in transformers"):
        ModuleSpec.parse(text)


@pytest.mark.parametrize(
    "site", [*SITES, "mlp.gate_proj.output", "model.embed_tokens.output", "mlp.experts.0.w1.input"]
)
def test_an_array_names_its_hook(site: str) -> None:
    hook = Hook(7, site)
    assert Hook.from_array(hook.array) == Hook.from_record(hook.record) == hook and is_site(site)


def test_modules_of_blocks_and_outside_them_are_planned() -> None:
    config = find_model("gemma-2-mini")[1]
    texts = ["layers.{layer}.mlp.up_proj", "model.layers.7.mlp:input", "model.embed_tokens", "model.norm:input"]
    hooks = hooks_of_sites(config, [5, 12], ["attn_z"], texts)
    assert hooks == sorted([
        Hook(5, "attn_z"), Hook(12, "attn_z"), Hook(5, "mlp.up_proj.output"), Hook(12, "mlp.up_proj.output"),
        Hook(7, "mlp.input"), Hook(0, "model.embed_tokens.output"), Hook(25, "model.norm.input"),
    ])  # fmt: skip
    check_sites(config, hooks)
    assert [hook_width(hook, config) for hook in hooks] == [128, 128, 256, 128, 128, 256, 128]
    assert module_name(Hook(25, "model.norm.input"), config) == "the input of model.norm"
    assert module_name(Hook(5, "mlp.up_proj.output"), config) == "model.layers.5.mlp.up_proj"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model.layers.{layer}.mlp.gate", "no block has a module mlp.gate; did you mean mlp.gate_proj"),
        (
            "transformer.h.{layer}.mlp",
            "has its blocks in model.layers, not in transformer.h. Give 'model.layers.{layer}",
        ),
        ("model.embed", "has no module model.embed outside its blocks; did you mean model.embed_tokens"),
        ("lm_head", "has no module lm_head outside its blocks"),
        ("model.rotary_emb", r"its output has shape \(1, 8, 32\) for 2 contexts of 8 tokens, not one vector per token"),
        ("model.layers.{layer}.self_attn.q_proj.weight", "no block has a module self_attn.q_proj.weight"),
    ],
)
def test_a_module_that_cannot_be_read_is_rejected(text: str, sentence: str) -> None:
    config = find_model("gemma-2-mini")[1]
    with pytest.raises(UsageError, match=sentence.replace("{", r"\{").replace("}", r"\}")):
        check_sites(config, hooks_of_sites(config, [5], [], [text]))


def test_the_numbers_of_a_module_outside_the_blocks_belong_to_one_layer() -> None:
    config = find_model("gemma-2-mini")[1]
    with pytest.raises(UsageError, match="model.norm.output is outside the blocks and belongs to layer 25, not 5"):
        check_sites(config, [Hook(5, "model.norm.output")])


def test_an_expert_that_sees_some_of_the_tokens_is_rejected() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING["mixtral"](**sizes, num_key_value_heads=2, num_local_experts=4, intermediate_size=16)
    check_sites(config, [Hook(1, "mlp.gate.input")])  # the router reads every token; its input has shape (N S, d)
    with pytest.raises(UsageError, match="has no mlp_hidden of layer 1: the MLP does not end in one linear map"):
        check_sites(config, [Hook(1, "mlp_hidden")])


def test_a_block_too_large_for_the_memory_is_probed_with_smaller_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of one block take 180 GB, but the names and widths found are those of the whole model."""
    config = CONFIG_MAPPING["mixtral"](
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_local_experts=256, intermediate_size=1_000_000,
    )  # fmt: skip
    sizes: list[int] = []
    randomize = architectures.randomize

    def measured(model: Any) -> None:
        sizes.append(sum(p.numel() for p in model.model.parameters() if p.device.type != "meta"))
        randomize(model)

    monkeypatch.setattr(architectures, "randomize", measured)
    check_sites(config, [Hook(1, site) for site in ("attn_z", "mlp_in", "mlp_out")])
    assert sizes and max(sizes) < 2_000_000
    assert module_name(Hook(1, "mlp_out"), config) == "model.layers.1.mlp"
    assert hook_width(Hook(1, "attn_z"), config) == 128


def test_a_wide_dense_block_keeps_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "MOST_PARAMETERS", 1000)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=777,
    )  # fmt: skip
    assert hook_width(Hook(1, "mlp_hidden"), config) == 777
    assert hook_width(Hook(1, "mlp.up_proj.output"), config) == 777


def test_only_the_probed_block_of_a_deep_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's first blocks are dense and the others are mixtures; the first mixture is probed alone."""
    built: list[set[int]] = []
    randomize = architectures.randomize

    def seen(model: Any) -> None:
        devices = [next(block.parameters()).device.type for block in model.blocks]
        built.append({n for n, device in enumerate(devices) if device != "meta"})
        randomize(model)

    monkeypatch.setattr(architectures, "randomize", seen)
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=30,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1,
        first_k_dense_replace=3, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    check_sites(config, [Hook(29, "mlp_in"), Hook(2, "mlp_hidden"), Hook(20, "attn_z")])
    assert built == [{3}, {0}]
    with pytest.raises(UsageError, match="mlp_hidden of layer 29: the MLP does not end in one linear map"):
        check_sites(config, [Hook(29, "mlp_hidden")])


def test_building_a_probe_leaves_the_classes_and_the_generator_as_they_were() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    before, state = LlamaDecoderLayer.__init__, torch.random.get_rng_state()
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    check_sites(config, [Hook(1, "mlp_in")])
    assert LlamaDecoderLayer.__init__ is before and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gptj", "opt", "codegen", "biogpt", "gpt_bigcode"])
def test_a_context_longer_than_a_table_of_positions_is_rejected(kind: str) -> None:
    config = CONFIG_MAPPING[kind](max_position_embeddings=64, num_hidden_layers=1)
    check_context(config, 64, kind)
    with pytest.raises(UsageError, match=f"--context 65 is too long: {kind} has positions for 64 tokens"):
        check_context(config, 65, kind)


@pytest.mark.parametrize("kind", ["mistral", "bloom", "gemma2", "mamba2", "gpt_neox", "falcon"])
def test_other_models_read_contexts_of_any_length(kind: str) -> None:
    check_context(CONFIG_MAPPING[kind](num_hidden_layers=1), 65535, kind)


def test_a_gemma_4_with_inputs_for_each_layer_is_loaded_whole() -> None:
    """One embedding holds these inputs for all blocks, so the first blocks cannot be built alone."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0,
    }  # fmt: skip
    with_inputs = CONFIG_MAPPING["gemma4_text"](**sizes, hidden_size_per_layer_input=4)
    without = CONFIG_MAPPING["gemma4_text"](**sizes, hidden_size_per_layer_input=0)
    assert not architectures.can_truncate(with_inputs, 1) and architectures.can_truncate(without, 1)


MODULES = ("model.layers.{layer}.mlp.gate_proj", "model.embed_tokens", "model.norm:input")


def test_a_finished_harvest_of_sites_and_modules_has_the_rows_of_plain_hooks(tiny_model, sentences, tmp_path) -> None:
    request = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(1,), sites=("resid_mid", "attn_out", "mlp_in"),
        modules=MODULES, tokens=500, context=16, window=256, device="cpu", dtype="float32", out=tmp_path / "cache",
    )  # fmt: skip
    cache = run_harvest(plan_harvest(request))
    assert {hook.site for hook in cache.hooks} == {
        "resid_mid", "attn_out", "mlp_in", "mlp.gate_proj.output", "model.embed_tokens.output", "model.norm.input",
    }  # fmt: skip
    source, config = find_model(str(tiny_model))
    model = load_trunk(source, config, 1, dtype="float32", device="cpu", attention="eager")
    check_rows(cache, model)
    damaged = cache.folder / "layer_01.mlp.gate_proj.output" / "c.0.0"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-40])
    assert "harvested again, with the same bytes" in repair(cache.folder, device="cpu")[0]
    assert damaged.read_bytes() == before


def check_rows(cache: Cache, model: LanguageModel) -> None:
    """The first rows of each array are bfloat16 of what a plain hook sees at their context and position."""
    contexts = cache.contexts(held_out=False)
    origins = list(zip(cache.read_chunk("row_ctx", 0)[:20], cache.read_chunk("row_pos", 0)[:20], strict=True))
    paths = {
        "attn_out": ("layers.1.post_attention_layernorm", "output"), "mlp_in": ("layers.1.mlp", "input"),
        "resid_mid": ("layers.1.pre_feedforward_layernorm", "input"), "model.norm.input": ("norm", "input"),
        "mlp.gate_proj.output": ("layers.1.mlp.gate_proj", "output"),
        "model.embed_tokens.output": ("embed_tokens", "output"),
    }  # fmt: skip
    for hook in cache.hooks:
        path, end = paths[hook.site]
        seen: list[torch.Tensor] = []
        handle = model.trunk.get_submodule(path).register_forward_hook(
            lambda _m, inputs, output, end=end, seen=seen: seen.append(inputs[0] if end == "input" else output)
        )
        bits = torch.from_numpy(cache.read_chunk(hook.array, 0)[:20].astype("int32"))
        for row, (context, position) in enumerate(origins):
            ids = torch.from_numpy(contexts.ids[context, : contexts.length[context]].astype("int64"))[None]
            with torch.no_grad():
                model.trunk(ids, use_cache=False)
            expected = seen.pop()[0, position].to(torch.bfloat16)
            found = bits[row].to(torch.int16).view(torch.bfloat16)
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
        handle.remove()

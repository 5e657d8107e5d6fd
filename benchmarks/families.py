"""Tiny random models of many families, and checks of all sites of each.

tests/harvest/test_families.py runs them as tests, and benchmarks/family_table.py writes the results to
docs/reference/families.md. A model has three or four blocks of width 32 with random parameters, so that every norm and
bias has an effect. What this package's hooks read and change is compared with what plain torch hooks read and change;
these are attached to the transformers model by module name.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from sae.cache.hooks import SITES, Hook
from sae.common.errors import UsageError
from sae.harvest.architectures import (
    blueprint_of,
    can_truncate,
    check_loaded_sites,
    check_sites,
    hook_width,
    kind_of,
    module_name,
)
from sae.harvest.model import LanguageModel
from sae.harvest.structure import truncate_config

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
OMIT = object()  # marks a size that must not be passed to a family's configuration
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SHARED_EXPERT = EXPERTS | {"n_shared_experts": 1, "shared_expert_intermediate_size": 16}
DENSE_FIRST = SHARED_EXPERT | {"first_k_dense_replace": 1}
NO_HEADS = {"num_attention_heads": OMIT, "num_key_value_heads": OMIT}
MAMBA = {"state_size": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_d_conv": 4, "use_mamba_kernels": False}
MAMBA2 = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": OMIT,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}  # fmt: skip
NEMOTRON_H = SHARED_EXPERT | MAMBA2 | {
    "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8,
    "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
    "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
GEMMA3N = {
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4, "laurel_rank": 2, "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * 3, "layer_types": ["full_attention"] * 3,
}  # fmt: skip

# model_type -> sizes that differ from SIZES
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": SHARED_EXPERT, "apertus": {}, "arcee": {}, "bamba": MAMBA2 | {"attn_layer_indices": [1]}, "biogpt": {},
    "bitnet": {}, "bloom": {}, "codegen": {"rotary_dim": 4}, "cohere": {}, "cohere2": {}, "ctrl": {"dff": 48},
    "cwm": {}, "deepseek_v2": LATENT | DENSE_FIRST, "deepseek_v3": LATENT | DENSE_FIRST, "deepseek_v4": {},
    "diffllama": {}, "doge": {}, "dots1": DENSE_FIRST, "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2}, "exaone4": {},
    "falcon": {"head_dim": OMIT}, "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64}, "falcon_mamba": MAMBA | NO_HEADS,
    "flex_olmo": EXPERTS, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gemma3n_text": GEMMA3N,
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 8}, "glm": {}, "glm4": {},
    "glm4_moe": DENSE_FIRST, "gpt2": {}, "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_hidden_layers": 4}, "gpt_neox": {},
    "gpt_neox_japanese": {}, "gpt_oss": EXPERTS, "gptj": {"rotary_dim": 4}, "granite": {"residual_multiplier": 0.5},
    "granitemoe": EXPERTS | {"residual_multiplier": 0.5}, "granitemoehybrid": MAMBA2 | EXPERTS, "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": MAMBA | EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 4, "mamba_dt_rank": 4}, "lfm2": {},
    "llama": {}, "llama4_text": EXPERTS | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "mamba": MAMBA | NO_HEADS,
    "mamba2": MAMBA | NO_HEADS | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": EXPERTS, "ministral": {}, "ministral3": {}, "mistral": {}, "mixtral": EXPERTS,
    "modernbert-decoder": {}, "mpt": {"max_seq_len": 64}, "nanochat": {}, "nemotron": {}, "nemotron_h": NEMOTRON_H,
    "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": EXPERTS, "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": EXPERTS,
    "qwen2": {}, "qwen2_moe": SHARED_EXPERT, "qwen3": {}, "qwen3_moe": EXPERTS, "qwen3_next": SHARED_EXPERT | DELTA,
    "qwen3_5_text": DELTA, "qwen3_5_moe_text": SHARED_EXPERT | DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]}, "rwkv": NO_HEADS, "seed_oss": {},
    "smollm3": {}, "solar_open": SHARED_EXPERT, "stablelm": {}, "starcoder2": {}, "vaultgemma": {},
    "xglm": {"ffn_dim": 48, "attention_heads": 4}, "xlstm": {}, "youtu": LATENT,
    "zamba": MAMBA | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 6, "head_dim": OMIT},
    "zamba2": MAMBA2 | {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "head_dim": OMIT,
        "mamba_ngroups": 1, "n_mamba_heads": 8,
    },
}  # fmt: skip


def make_config(kind: str, **more: Any) -> Any:
    """The tiny configuration of a family."""
    sizes = {**SIZES, **FAMILIES.get(kind, {}), **more}
    config = CONFIG_MAPPING[kind](**{name: value for name, value in sizes.items() if value is not OMIT})
    config._attn_implementation = "eager"
    return config


def make_model(kind: str, **more: Any) -> Any:
    """A tiny random model of a family, built by transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(kind, **more), trust_remote_code=False)
    model.eval().requires_grad_(False)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every parameter at random. The parameters that set the decay rate of Mamba's states are only changed a
    little."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        keeps = any(word in name for word in ("A_log", "dt_bias", "dt_proj"))
        parameter.copy_(parameter + 0.05 * noise if keeps else 0.3 * noise)


@dataclass
class FamilyResult:
    """The result for a family: in each block, the module of every site, or the reason why the site is refused."""

    kind: str
    class_name: str
    blocks: list[dict[str, str]] = field(default_factory=list)  # site -> module, for each block
    refused: list[dict[str, str]] = field(default_factory=list)
    spliced: int = 0  # number of hooks at which activations were replaced


@torch.no_grad()
def examine(kind: str) -> FamilyResult:
    """Check every site of every block of a family. Raises AssertionError if a check fails."""
    transformer = make_model(kind)
    model, config = LanguageModel(transformer), transformer.config
    ids_NS = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    plain = transformer(ids_NS, use_cache=False, output_hidden_states=True)
    hooks_before = hooks_on(transformer)  # transformers leaves hooks that collect hidden states
    result = FamilyResult(kind, type(transformer).__name__)
    for layer in chosen_layers(model):
        sites, refused = sites_of(model, config, layer)
        result.blocks.append({site: module_name(Hook(layer, site), config) for site in sites})
        result.refused.append(refused)
        hooks = [Hook(layer, site) for site in sites]
        check_loaded_sites(model, config, hooks)
        captured = model.capture_hooks(ids_NS, hooks) if hooks else {}
        check_captured(transformer, ids_NS, captured, plain)
        check_sum({hook.site: x for hook, x in captured.items()}, refused)
        result.spliced += sum(check_spliced(model, ids_NS, hook, captured[hook]) for hook in hooks)
    check_truncated(transformer, model, ids_NS)
    assert torch.equal(transformer(ids_NS, use_cache=False).logits, plain.logits)
    assert hooks_on(transformer) == hooks_before
    return result


def hooks_on(transformer: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules())


def chosen_layers(model: LanguageModel) -> list[int]:
    """One block of each kind. With three or more blocks of a kind, this is the second, which has a block of its kind on
    either side; otherwise it is the first."""
    of_kind: dict[str, list[int]] = {}
    for layer, block in enumerate(model.blocks):
        of_kind.setdefault(kind_of(block), []).append(layer)
    return sorted(layers[1 if len(layers) > 2 else 0] for layers in of_kind.values())


def sites_of(model: LanguageModel, config: Any, layer: int) -> tuple[list[str], dict[str, str]]:
    """The sites of a block, and the reasons why the other sites are refused. Checks that the weights and the
    configuration lead to the same sites."""
    sites, refused = [], {}
    for site in SITES:
        hook, reasons = Hook(layer, site), []
        for check in (lambda h: model.check_hooks([h]), lambda h: check_sites(config, [h])):
            try:
                check(hook)
            except UsageError as error:
                reasons.append(str(error))
        if reasons:
            refused[site] = reasons[0]
        else:
            sites.append(site)
            assert model.site(hook) == blueprint_of(config).site(hook), hook
            assert model.width(hook) == hook_width(hook, config)
    return sites, refused


def check_captured(transformer: Any, ids_NS: Tensor, captured: dict[Hook, Tensor], plain: Any) -> None:
    """Check that captured activations are bit-identical to hidden states and to what a plain hook on the module
    sees."""
    for hook, x in captured.items():
        assert x.shape[:2] == ids_NS.shape
        seen: list[Tensor] = []
        with plain_hook(transformer, hook, lambda y, seen=seen: seen.append(y.clone()) or y):
            transformer(ids_NS, use_cache=False)
        assert len(seen) == 1 and torch.equal(seen[0].reshape(x.shape), x), hook
        if not hasattr(transformer.config, "num_attention_heads"):
            continue  # Mamba's hidden states begin after its first block
        states = plain.hidden_states
        if hook.site == "resid_post" and hook.layer < len(states) - 2:
            assert torch.equal(states[hook.layer + 1], x), hook
        if hook.site == "resid_pre" and hook.layer > 0:
            assert torch.equal(states[hook.layer], x), hook


def check_sum(found: dict[str, Tensor], refused: dict[str, str]) -> None:
    """Check that the difference between resid_post and resid_pre is exactly what the attention and the MLP add."""
    if "attn_out" in found or "mlp_out" in found:
        total = found["resid_pre"] + found.get("attn_out", 0) + found.get("mlp_out", 0)
        torch.testing.assert_close(total, found["resid_post"], rtol=1e-5, atol=1e-5)
    if "resid_mid" in found:
        torch.testing.assert_close(found["resid_pre"] + found["attn_out"], found["resid_mid"], rtol=1e-5, atol=1e-5)


def check_spliced(model: LanguageModel, ids_NS: Tensor, hook: Hook, x: Tensor) -> bool:
    """Check that running the rest of the model from the activations at a hook gives the same logits as replacing these
    activations with a plain hook."""
    transformer, changed = model.model, 0.5 * x.roll(1, 0) + 0.1
    run = model.forward(ids_NS, [hook])
    plain = transformer(ids_NS, use_cache=False).logits
    torch.testing.assert_close(model.unembed(run.run_from(hook, x)), plain, rtol=1e-4, atol=1e-4)
    with plain_replacement(transformer, hook, changed):
        expected = transformer(ids_NS, use_cache=False).logits
    found = model.unembed(run.run_from(hook, changed))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with model.patching(hook, lambda _: changed):
        torch.testing.assert_close(transformer(ids_NS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(transformer(ids_NS, use_cache=False).logits, plain), f"patching {hook} left something behind"
    return True


def check_truncated(transformer: Any, model: LanguageModel, ids_NS: Tensor) -> None:
    """Check that the first blocks alone, as a harvest loads them, have the same activations as the whole model."""
    last = max(0, len(model.blocks) - 2)
    config = copy.deepcopy(transformer.config)
    if "resid_post" in model.probe(last).refused or not can_truncate(config, last + 1):
        return
    truncate_config(config, last + 1)
    trunk = AutoModel.from_config(config, trust_remote_code=False).eval()
    names, parts = set(trunk.state_dict()), (model.trunk, transformer.base_model)
    weights = next(part.state_dict() for part in parts if names <= set(part.state_dict()))
    trunk.load_state_dict({name: value for name, value in weights.items() if name in trunk.state_dict()})
    alone, whole = (one.capture(ids_NS, [last])[last] for one in (LanguageModel(trunk), model))
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def plain_hook(transformer: Any, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A torch hook on the module that `module_name` names, without any other code of this package."""
    words = module_name(hook, transformer.config)
    module = transformer.get_submodule(words.removeprefix("the input of ").split(",")[0])

    def before(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), keywords
        return args, keywords | {"hidden_states": change(keywords["hidden_states"])}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([change(output[0]), *output[1:]])
        return change(output)

    if words.startswith("the input of "):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def plain_replacement(transformer: Any, hook: Hook, x: Tensor) -> Iterator[None]:
    """Replace the activations at the place that `hook` names by `x`, with torch's own module hooks (`plain_hook`).

    No module returns resid_mid, so for resid_mid, attn_out is replaced by x minus resid_pre.
    """
    if hook.site != "resid_mid":
        with plain_hook(transformer, hook, lambda y: x.reshape(y.shape).clone()):  # Falcon changes the copy in place
            yield
        return
    before: list[Tensor] = []
    with (
        plain_hook(transformer, Hook(hook.layer, "resid_pre"), lambda y: before.append(y) or y),
        plain_hook(
            transformer, Hook(hook.layer, "attn_out"), lambda y: x.reshape(y.shape) - before[-1].reshape(y.shape)
        ),
    ):
        yield

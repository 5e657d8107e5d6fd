"""Tiny random models of many families, for the table of families and for the tests.

Each is three or more blocks of width 32 with every parameter random, so that no norm or bias does nothing.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
OMIT = object()  # marks a size that a family must not be given
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SHARED_EXPERT = EXPERTS | {"n_shared_experts": 1, "shared_expert_intermediate_size": 16}
DENSE_FIRST = SHARED_EXPERT | {"first_k_dense_replace": 1}
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

# model_type -> what differs from SIZES
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": SHARED_EXPERT, "apertus": {}, "arcee": {}, "bamba": MAMBA2 | {"attn_layer_indices": [1]}, "biogpt": {},
    "bitnet": {}, "bloom": {}, "codegen": {"rotary_dim": 4}, "cohere": {}, "cohere2": {}, "ctrl": {"dff": 48},
    "cwm": {}, "deepseek_v2": LATENT | DENSE_FIRST, "deepseek_v3": LATENT | DENSE_FIRST, "deepseek_v4": {},
    "diffllama": {}, "doge": {}, "dots1": DENSE_FIRST, "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2}, "exaone4": {},
    "falcon": {"head_dim": OMIT}, "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64}, "falcon_mamba": MAMBA,
    "flex_olmo": EXPERTS, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gemma3n_text": GEMMA3N,
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 8}, "glm": {}, "glm4": {},
    "glm4_moe": DENSE_FIRST, "gpt2": {}, "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_hidden_layers": 4}, "gpt_neox": {},
    "gpt_neox_japanese": {}, "gpt_oss": EXPERTS, "gptj": {"rotary_dim": 4}, "granite": {"residual_multiplier": 0.5},
    "granitemoe": EXPERTS | {"residual_multiplier": 0.5}, "granitemoehybrid": MAMBA2 | EXPERTS, "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": MAMBA | EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 4, "mamba_dt_rank": 4}, "lfm2": {},
    "llama": {}, "llama4_text": EXPERTS | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "mamba": MAMBA, "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": EXPERTS, "ministral": {}, "ministral3": {}, "mistral": {}, "mixtral": EXPERTS,
    "modernbert-decoder": {}, "mpt": {"max_seq_len": 64}, "nanochat": {}, "nemotron": {}, "nemotron_h": NEMOTRON_H,
    "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": EXPERTS, "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": EXPERTS,
    "qwen2": {}, "qwen2_moe": SHARED_EXPERT, "qwen3": {}, "qwen3_moe": EXPERTS, "qwen3_next": SHARED_EXPERT | DELTA,
    "qwen3_5_text": DELTA, "qwen3_5_moe_text": SHARED_EXPERT | DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]}, "rwkv": {}, "seed_oss": {},
    "smollm3": {}, "solar_open": SHARED_EXPERT, "stablelm": {}, "starcoder2": {}, "vaultgemma": {},
    "xglm": {"ffn_dim": 48, "attention_heads": 4}, "xlstm": {}, "youtu": LATENT,
    "zamba": MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4, "head_dim": OMIT},
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


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter at random. Those of mamba keep their sizes, so that its recurrences do not diverge."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            keep = any(word in name for word in ("A_log", "dt_bias", "dt_proj"))
            parameter.copy_(parameter + 0.05 * noise if keep else 0.3 * noise)


def make_model(kind: str, **more: Any) -> Any:
    """A tiny random model of a family, as transformers makes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(kind, **more)).eval()
    randomize(model)
    return model

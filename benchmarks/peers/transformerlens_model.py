"""A made-up Gemma 2 of any size as a TransformerLens model, for peers that would otherwise load a model by name."""

from pathlib import Path

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

NAME = "gemma-2-2b-it"  # SAEBench chooses prompts and a batch size by the model's name


def load_model(folder: Path, kind: type[HookedTransformer] = HookedTransformer) -> HookedTransformer:
    """Load a Gemma 2 of any size as a TransformerLens model in float32, with TransformerLens' own conversion."""
    hf = Gemma2ForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    c = hf.config
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    config = HookedTransformerConfig(
        model_name=NAME, original_architecture="Gemma2ForCausalLM", dtype=torch.float32, device="cpu", seed=None,
        d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads, d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers, n_key_value_heads=c.num_key_value_heads, d_vocab=c.vocab_size, n_ctx=512,
        eps=c.rms_norm_eps, act_fn="gelu_pytorch_tanh", normalization_type="RMS", final_rms=True,
        use_normalization_before_and_after=True, gated_mlp=True, positional_embedding_type="rotary",
        rotary_base=10_000, rotary_dim=c.head_dim, use_attn_scale=True, attn_scale=c.query_pre_attn_scalar**0.5,
        use_local_attn=True, window_size=c.sliding_window, attn_types=[kinds[name] for name in c.layer_types],
        attn_scores_soft_cap=c.attn_logit_softcapping, output_logits_soft_cap=c.final_logit_softcapping,
        default_prepend_bos=True,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        name_or_path=str(folder),
        add_bos_token=True,
        padding_side="right",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    model = kind(config, tokenizer)
    model.load_and_process_state_dict(
        convert_gemma_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    ids = torch.arange(2, 26)[None] * 97 % c.vocab_size
    with torch.no_grad():
        apart = (model(ids) - hf(ids).logits).abs().max()
    assert apart < 1e-4, f"TransformerLens' logits are {apart:.1e} from transformers'"
    return model

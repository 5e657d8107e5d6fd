"""A pass resumed from changed activations equals a pass of the transformers model with a plain hook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.harvest.model import LanguageModel
from sae.harvest.splice import gradients_of

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "resid_pre": ("model.layers.1", "input"),
    "resid_mid": ("model.layers.1.self_attn", "output"),
    "resid_post": ("model.layers.1", "output"),
    "attn_out": ("model.layers.1.self_attn", "output"),
    "attn_z": ("model.layers.1.self_attn.o_proj", "input"),
    "mlp_in": ("model.layers.1.mlp", "input"),
    "mlp_hidden": ("model.layers.1.mlp.down_proj", "input"),
    "mlp_out": ("model.layers.1.mlp", "output"),
    "mlp.gate_proj.output": ("model.layers.1.mlp.gate_proj", "output"),
    "self_attn.v_proj.input": ("model.layers.1.self_attn.v_proj", "input"),
    "model.embed_tokens.output": ("model.embed_tokens", "output"),
    "model.norm.input": ("model.norm", "input"),
    "model.norm.output": ("model.norm", "output"),
}
GEMMA2 = LLAMA | {
    "resid_mid": ("model.layers.1.post_attention_layernorm", "output"),
    "attn_out": ("model.layers.1.post_attention_layernorm", "output"),
    "mlp_out": ("model.layers.1.post_feedforward_layernorm", "output"),
}
GPT2 = {
    "resid_pre": ("transformer.h.1", "input"),
    "resid_mid": ("transformer.h.1.attn", "output"),
    "resid_post": ("transformer.h.1", "output"),
    "attn_out": ("transformer.h.1.attn", "output"),
    "attn_z": ("transformer.h.1.attn.c_proj", "input"),
    "mlp_in": ("transformer.h.1.mlp", "input"),
    "mlp_hidden": ("transformer.h.1.mlp.c_proj", "input"),
    "mlp_out": ("transformer.h.1.mlp", "output"),
    "model.wte.output": ("transformer.wte", "output"),
}
GPT_NEOX = {
    "resid_pre": ("gpt_neox.layers.1", "input"),
    "resid_post": ("gpt_neox.layers.1", "output"),
    "attn_out": ("gpt_neox.layers.1.attention", "output"),
    "attn_z": ("gpt_neox.layers.1.attention.dense", "input"),
    "mlp_in": ("gpt_neox.layers.1.mlp", "input"),
    "mlp_hidden": ("gpt_neox.layers.1.mlp.dense_4h_to_h", "input"),
    "mlp_out": ("gpt_neox.layers.1.mlp", "output"),
}
RESID = {"resid_pre": ("model.layers.1", "input"), "resid_post": ("model.layers.1", "output")}
MODULES: dict[str, dict[str, tuple[str, str]]] = {
    "llama": LLAMA, "qwen3": LLAMA, "gemma2": GEMMA2, "gpt2": GPT2, "gpt_neox": GPT_NEOX, "granite": RESID,
    "mixtral": RESID | {"attn_z": LLAMA["attn_z"]}, "cohere2": RESID, "phi": RESID, "olmo2": RESID,
}  # fmt: skip
"""Family -> site -> the module whose input or output it is, according to the source code of transformers.

For resid_mid, it is the module whose output attention adds to the residual stream.
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gptj": {"rotary_dim": 4},
}
CASES = [(kind, site) for kind, sites in MODULES.items() for site in sites]
SOME = [
    pytest.param(kind, site, marks=() if kind in ("gemma2", "gpt2", "gpt_neox") else pytest.mark.slow)
    for kind, site in CASES
]
LAYERS = {"model.embed_tokens.output": 0, "model.wte.output": 0, "model.norm.input": 3, "model.norm.output": 3}


@lru_cache
def tiny(kind: str) -> LanguageModel:
    """Build four random blocks of a family, with its unembedding.

    The norms are random too, because the loss of a norm that does nothing would not be noticed.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    if kind == "falcon":
        del sizes["head_dim"]
    config = CONFIG_MAPPING[kind](**sizes, **OPTIONS.get(kind, {}))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(model)


@pytest.fixture(scope="module")
def ids_NS() -> Tensor:
    return torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(1))


@contextmanager
def plain_hook(model: nn.Module, path: str, end: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a module of transformers reads or returns, without any code of this package."""

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (change(inputs[0]), *inputs[1:])

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(before) if end == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def resid_pre(model: LanguageModel, kind: str, ids_NS: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with plain_hook(model.model, *MODULES[kind]["resid_pre"], lambda x: seen.append(x) or x):  # type: ignore[func-returns-value]
        model.model(ids_NS, use_cache=False)
    return seen[0]


@pytest.mark.parametrize(("kind", "site"), SOME)
def test_its_own_activations_put_back_give_the_models_logits(kind: str, site: str, ids_NS: Tensor) -> None:
    model, hook = tiny(kind), Hook(LAYERS.get(site, 1), site)
    run = model.forward(ids_NS, [hook])
    logits = model.model(ids_NS, use_cache=False).logits
    assert torch.equal(model.unembed(run.final), logits)
    torch.testing.assert_close(model.unembed(run.run_from(hook, run.activations[hook])), logits)


@pytest.mark.parametrize(("kind", "site"), CASES)
def test_changed_activations_are_a_plain_hook_that_changes_them(kind: str, site: str, ids_NS: Tensor) -> None:
    model, hook = tiny(kind), Hook(LAYERS.get(site, 1), site)
    run = model.forward(ids_NS, [hook])
    changes: list[Callable[[Tensor], Tensor]] = [torch.zeros_like, lambda x: 0.5 * x.roll(1, 0) + 0.1]
    for change in changes:
        x_NSD = change(run.activations[hook])
        put = x_NSD - resid_pre(model, kind, ids_NS) if site == "resid_mid" else x_NSD
        with plain_hook(model.model, *MODULES[kind][site], lambda _, put=put: put):  # type: ignore[misc]
            expected = model.model(ids_NS, use_cache=False).logits
        found = model.unembed(run.run_from(hook, x_NSD))
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, model.unembed(run.final))


@pytest.mark.parametrize(("kind", "site"), SOME)
def test_several_versions_of_the_contexts_run_together(kind: str, site: str, ids_NS: Tensor) -> None:
    model, hook = tiny(kind), Hook(LAYERS.get(site, 1), site)
    run = model.forward(ids_NS, [hook])
    x_NSD = run.activations[hook]
    versions = [x_NSD, 0.5 * x_NSD.roll(1, 0), -x_NSD, x_NSD + 0.1]
    alone = [run.run_from(hook, version) for version in versions]
    torch.testing.assert_close(run.run_from(hook, torch.cat(versions)), torch.cat(alone))


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "mlp_out"])
def test_a_pass_up_to_the_hook_runs_the_rest_as_a_whole_pass_does_with_gradients(site: str, ids_NS: Tensor) -> None:
    """The gradient is that of finite differences, and is computed only if the activations require one."""
    model, hook, ran = tiny("gemma2"), Hook(1, site), []
    whole = model.forward(ids_NS, [hook])
    handle = model.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    prefix = model.prefix(ids_NS, [hook])
    handle.remove()
    assert not ran and torch.equal(prefix.activations[hook], whole.activations[hook])
    x_NSD = 0.5 * whole.activations[hook]
    changed_NSD = whole.run_from(hook, x_NSD)
    assert torch.equal(prefix.run_from(hook, x_NSD), changed_NSD) and not changed_NSD.requires_grad

    def height(x_NSD: Tensor) -> Tensor:
        return model.unembed(prefix.run_from(hook, x_NSD)[:, -1]).double().square().sum()

    traced_NSD = x_NSD.clone().requires_grad_()
    (slope_NSD,) = torch.autograd.grad(height(traced_NSD), traced_NSD)
    step_NSD = torch.randn(x_NSD.shape, generator=torch.Generator().manual_seed(0))
    rise = (height(x_NSD + 1e-3 * step_NSD) - height(x_NSD - 1e-3 * step_NSD)) / 2e-3
    torch.testing.assert_close(rise, (slope_NSD * step_NSD).sum().double(), rtol=0.03, atol=0.01)
    with torch.no_grad():
        assert not height(traced_NSD).requires_grad


def test_a_hook_is_checked_before_its_first_use_only(ids_NS: Tensor) -> None:
    model, passes = tiny("llama"), []
    hooks = [Hook(1), Hook(1, "mlp_out")]
    model.forward(ids_NS, hooks)
    handle = model.trunk.register_forward_hook(lambda *_: passes.append(1))
    for asked in (hooks, hooks[:1], []):
        model.forward(ids_NS, asked)
    handle.remove()
    assert len(passes) == 3


@pytest.mark.parametrize("kind", ["falcon", "gpt2"])
def test_what_is_put_in_is_not_changed(kind: str, ids_NS: Tensor) -> None:
    """Falcon adds the attention to the MLP's output in place."""
    model = tiny(kind)
    for hook in (Hook(1), Hook(1, "mlp_out")):
        run = model.forward(ids_NS, [hook])
        x_NSD = 0.5 * run.activations[hook]
        before, first = x_NSD.clone(), run.run_from(hook, x_NSD)
        assert torch.equal(x_NSD, before) and torch.equal(run.run_from(hook, x_NSD), first)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_hidden"])
def test_versions_of_the_first_block_s_inside_each_have_their_own_contexts(site: str, ids_NS: Tensor) -> None:
    """No block can be skipped for these sites, so the model embeds the contexts again."""
    model, hook = tiny("llama"), Hook(0, site)
    run = model.forward(ids_NS, [hook])
    versions = [run.activations[hook], 0.5 * run.activations[hook].roll(1, 0)]
    alone = [run.run_from(hook, version) for version in versions]
    torch.testing.assert_close(alone[0], run.final)
    torch.testing.assert_close(run.run_from(hook, torch.cat(versions)), torch.cat(alone))


@pytest.mark.parametrize("kind", ["llama", "gptj"])  # their blocks return a tensor and a tuple
@pytest.mark.parametrize(("layer", "runs"), [(0, [0, 1, 2, 3]), (2, [2, 3])])
def test_blocks_before_the_hook_are_not_run_again(kind: str, layer: int, runs: list[int], ids_NS: Tensor) -> None:
    model, ran = tiny(kind), []
    hooks = [Hook(layer, "mlp_out"), Hook(layer)]
    run = model.forward(ids_NS, hooks)
    handles = [
        block.mlp.register_forward_hook(lambda *_, n=number: ran.append(n)) for number, block in enumerate(model.blocks)
    ]
    for hook, expected in zip(hooks, (runs, runs[1:]), strict=True):
        ran.clear()
        run.run_from(hook, run.activations[hook])
        assert ran == expected
    for handle in handles:
        handle.remove()


class Remembering(nn.Module):
    """A projection that adds the output of the same projection in the first block, as layers with shared values do."""

    def __init__(self, own: nn.Module, memory: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.own, self.memory, self.first = own, memory, first

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x)
        if self.first:
            self.memory["first"] = y
            return y
        return y + self.memory.pop("first")


def test_where_a_block_leaves_something_for_a_later_one_nothing_is_skipped(ids_NS: Tensor) -> None:
    tiny.cache_clear()
    model, memory = tiny("llama"), {}
    tiny.cache_clear()
    for layer in (0, 3):
        model.blocks[layer].mlp.down_proj = Remembering(model.blocks[layer].mlp.down_proj, memory, layer == 0)
    hook = Hook(1)
    run = model.forward(ids_NS, [hook])
    x_NSD = 0.5 * run.activations[hook]
    with plain_hook(model.model, "model.layers.1", "output", lambda _: x_NSD):
        expected = model.model(ids_NS, use_cache=False).logits
    torch.testing.assert_close(model.unembed(run.run_from(hook, x_NSD)), expected)
    torch.testing.assert_close(run.run_from(hook, torch.cat([x_NSD, x_NSD])).chunk(2)[1], run.run_from(hook, x_NSD))


def test_nothing_is_left_behind(ids_NS: Tensor) -> None:
    model = tiny("gpt2")
    hooks = [Hook(1), Hook(1, "mlp_out")]

    def state() -> list[Any]:
        parts = [module for module in model.model.modules()]
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in parts]

    before = state()
    first = model.forward(ids_NS, hooks)
    for hook in hooks:
        first.run_from(hook, torch.zeros_like(first.activations[hook]))
        with pytest.raises(RuntimeError):
            first.run_from(hook, torch.zeros(3, 11, 5))
    assert state() == before
    assert torch.equal(model.forward(ids_NS, hooks).final, first.final)


def test_a_model_whose_numbers_are_not_its_trunks_is_refused(ids_NS: Tensor) -> None:
    tiny.cache_clear()
    model = tiny("llama")
    tiny.cache_clear()
    own, calls = model.model.forward, []

    def drifting(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        output = own(*args, **keywords)
        output.logits = output.logits + len(calls)
        return output

    model.model.forward = drifting
    with pytest.raises(UsageError, match="SAEs cannot be spliced into LlamaForCausalLM: computing its logits .* by"):
        model.forward(ids_NS, [Hook(1)])


def test_gradients_are_recorded_only_where_they_are_on_and_asked_for() -> None:
    x = torch.ones(1, requires_grad=True)
    with torch.no_grad(), gradients_of(x):
        assert not torch.is_grad_enabled()
    for asked, recorded in ((x, True), (x.detach(), False)):
        with gradients_of(asked):
            assert torch.is_grad_enabled() is recorded

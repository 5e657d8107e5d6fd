"""Captured activations equal the hidden states of transformers, and a pass resumed from them gives its logits."""

import errno
import json
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae.cache.hooks import SITES, Hook
from sae.common.errors import DamagedError, SaeError, UnavailableError, UsageError
from sae.harvest.architectures import check_context, check_layers, check_sites, hook_width, module_name
from sae.harvest.model import (
    LanguageModel,
    find_model,
    load_model,
    load_trunk,
)
from sae.harvest.module_io import output_tensor

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
SETTINGS = {"dtype": "float32", "device": "cpu", "attention": "eager"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    source, config = find_model(str(tiny_model))
    return load_model(source, config, **SETTINGS)


@pytest.fixture(scope="module")
def deep() -> LanguageModel:
    """Five random blocks of Llama, another family with blocks in the middle to splice into."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, bos_token_id=2,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def images() -> LanguageModel:
    """Three random blocks of a Gemma 3 that also reads images, so that its decoder is only a part of the model."""
    torch.manual_seed(0)
    decoder = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 2,
    }  # fmt: skip
    eyes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=decoder, vision_config=eyes, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    return LanguageModel(Gemma3ForConditionalGeneration(config).eval())


@lru_cache
def tiny(kind: str, **more: Any) -> LanguageModel:
    """Build three random blocks of any family, with its unembedding."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    config = CONFIG_MAPPING[kind](**sizes, **more)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms that do nothing would hide a missing one
        torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(model)


@pytest.fixture(params=["gemma-2 of a folder", "llama of five", "images", "gpt_neox in sequence", *FAMILIES])
def any_model(
    request: pytest.FixtureRequest, model: LanguageModel, deep: LanguageModel, images: LanguageModel
) -> LanguageModel:
    named = {"gemma-2 of a folder": model, "llama of five": deep, "images": images}
    if request.param == "gpt_neox in sequence":
        return tiny("gpt_neox", use_parallel_residual=False)
    return named[request.param] if request.param in named else tiny(request.param)


@pytest.fixture
def ids_NS(any_model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, any_model.config.vocab_size, (3, 11), generator=generator)


def test_a_layer_is_the_hidden_state_after_its_block(any_model: LanguageModel, ids_NS: Tensor) -> None:
    layers = range(len(any_model.blocks))
    captured = any_model.capture(ids_NS, layers)
    states = any_model.model(ids_NS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in layers[:-1]:
        assert torch.equal(captured[layer], states[layer + 1])
    # transformers gives the last one after the final norm
    assert torch.equal(any_model.norm(captured[layers[-1]]), states[-1])


def test_a_hook_is_named_where_transformers_has_it(any_model: LanguageModel, ids_NS: Tensor) -> None:
    """The name of a hook is the path of a module, whose output or input is captured."""
    hooks = [Hook(1, site) for site in SITES if site in any_model.probe(1).sites]
    assert len(hooks) >= len(SITES) - 1  # GPT-NeoX has no resid_mid
    found = any_model.capture_hooks(ids_NS, hooks)
    seen: list[Tensor] = []
    for hook in hooks:
        words = module_name(hook, any_model.model.config)
        module = any_model.model.get_submodule(words.removeprefix("the input of ").split(",")[0])
        if words.startswith("the input of "):
            handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        else:
            handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output_tensor(output)))
        with torch.no_grad():
            any_model.model(ids_NS, use_cache=False)
        handle.remove()
        assert torch.equal(seen.pop(), found[hook])


def test_hooks_have_the_names_of_transformer_lens(model: LanguageModel, images: LanguageModel) -> None:
    assert [module_name(Hook(n), model.config) for n in (0, 1)] == [
        "model.layers.0, hidden_states[1]",
        "model.layers.1",
    ]
    assert module_name(Hook(2), images.model.config) == "model.language_model.layers.2"
    assert module_name(Hook(0, "attn_z"), model.config) == "the input of model.layers.0.self_attn.o_proj"
    assert module_name(Hook(0), tiny("gpt2").config) == "transformer.h.0, hidden_states[1]"
    assert module_name(Hook(1, "mlp_out"), tiny("gpt_neox").config) == "gpt_neox.layers.1.mlp"


def test_a_site_that_the_numbers_do_not_prove_is_rejected_with_what_was_seen() -> None:
    """Granite multiplies what its parts add to the residual stream by a number."""
    model, ids = tiny("granite", residual_multiplier=0.5), torch.arange(3, 25).reshape(2, 11)
    seen = r"the relative difference between resid_pre \+ self_attn \+ mlp and resid_post is 0\.\d+"
    for refuse in (lambda hooks: model.capture_hooks(ids, hooks), lambda hooks: check_sites(model.config, hooks)):
        with pytest.raises(UsageError, match=f"GraniteForCausalLM has no attn_out of layer 0: {seen}. Use"):
            refuse([Hook(0, "attn_out")])
    assert model.capture(ids, [0])[0].shape == (2, 11, 16)
    assert model.capture_hooks(ids, [Hook(0, "mlp_hidden")])[Hook(0, "mlp_hidden")].shape == (2, 11, 32)


def test_a_block_with_several_vectors_per_token_is_rejected() -> None:
    config = Gemma3nTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=4,
        laurel_rank=2, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = LanguageModel(AutoModel.from_config(config).eval())
    with pytest.raises(UsageError, match="Gemma3nTextModel has activations of shape .* The model is not supported"):
        model.capture(torch.arange(3, 25).reshape(2, 11), [0])


def test_the_sites_of_a_block_add_up(any_model: LanguageModel, ids_NS: Tensor) -> None:
    """A block adds its projected heads and the output of its MLP, each after Gemma's second norm if there is one."""
    last = len(any_model.blocks) - 1
    sites = any_model.probe(last)
    hooks = {site: Hook(last, site) for site in SITES if site in sites.sites}
    captured = any_model.capture_hooks(ids_NS, list(hooks.values()))
    found = {site: captured[hook] for site, hook in hooks.items()}
    assert {s: x.shape[-1] for s, x in found.items()} == {s: any_model.width(hook) for s, hook in hooks.items()}
    assert {s: x.shape[-1] for s, x in found.items()} == {
        s: hook_width(hook, any_model.config) for s, hook in hooks.items()
    }
    assert torch.equal(found["resid_pre"], any_model.capture(ids_NS, [last - 1])[last - 1])
    torch.testing.assert_close(found["resid_pre"] + found["attn_out"] + found["mlp_out"], found["resid_post"])
    assert ("resid_mid" in found) != sites.is_parallel
    if "resid_mid" in found:
        torch.testing.assert_close(found["resid_pre"] + found["attn_out"], found["resid_mid"])
    block, norms = any_model.blocks[last], {"attn_z": torch.nn.Identity(), "mlp_hidden": torch.nn.Identity()}
    if hasattr(block, "post_feedforward_layernorm"):
        norms = {"attn_z": block.post_attention_layernorm, "mlp_hidden": block.post_feedforward_layernorm}
    for site, added in (("attn_z", "attn_out"), ("mlp_hidden", "mlp_out")):
        projection = block.get_submodule(sites.sites[site].path)
        torch.testing.assert_close(norms[site](projection(found[site])), found[added])
    torch.testing.assert_close(
        block.get_submodule(sites.sites["mlp_in"].path)(found["mlp_in"]),
        block.get_submodule(sites.sites["mlp_hidden"].path)(found["mlp_hidden"]),
    )


def test_layers_do_not_depend_on_each_other(any_model: LanguageModel, ids_NS: Tensor) -> None:
    together = any_model.capture(ids_NS, range(len(any_model.blocks)))
    for layer, residual in together.items():
        assert torch.equal(any_model.capture(ids_NS, [layer])[layer], residual)


def test_no_block_runs_after_the_last_layer(any_model: LanguageModel, ids_NS: Tensor) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _i, n=number: ran.append(n))
        for number, block in enumerate(any_model.blocks)
    ]
    any_model.capture(ids_NS, [0])
    for handle in handles:
        handle.remove()
    assert ran == [0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trunk_of_every_family_is_the_beginning_of_the_model(kind: str, tmp_path: Path) -> None:
    whole, ids = tiny(kind), torch.arange(3, 25).reshape(2, 11)
    whole.model.save_pretrained(tmp_path)
    source, config = find_model(str(tmp_path))
    trunk = load_trunk(source, config, 1, **SETTINGS)
    assert len(trunk.blocks) == 2 and trunk.model.get_output_embeddings() is None
    assert torch.equal(trunk.capture(ids, [1])[1], whole.capture(ids, [1])[1])
    again = load_model(source, config, **SETTINGS)  # tied weights too
    with torch.no_grad():
        assert torch.equal(again.unembed(again.forward(ids, []).final), whole.model(ids, use_cache=False).logits)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_trunk_of_few_blocks_is_the_beginning_of_the_model(
    tiny_model: Path, model: LanguageModel, layer: int
) -> None:
    source, config = find_model(str(tiny_model))
    trunk = load_trunk(source, config, layer, **SETTINGS)
    assert len(trunk.blocks) == layer + 1 and not hasattr(trunk.model, "lm_head")
    assert config.num_hidden_layers == 2  # the caller's is unchanged
    ids = torch.arange(3, 25).reshape(2, 11)
    assert torch.equal(trunk.capture(ids, [layer])[layer], model.capture(ids, [layer])[layer])


def hooks_on(model: LanguageModel) -> list[int]:
    return [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.blocks]


def test_a_hook_that_does_not_fire_is_an_error(deep: LanguageModel) -> None:
    ids, before = torch.arange(3, 14)[None], hooks_on(deep)
    deep.config.num_hidden_layers = 2  # transformers then runs only the first two blocks, without an error
    try:
        with pytest.raises(SaeError, match=r"blocks.3.hook_resid_post, blocks.4.hook_resid_post did not fire"):
            deep.capture(ids, [1, 3, 4])
    finally:
        deep.config.num_hidden_layers = 5
    assert hooks_on(deep) == before


def test_a_block_may_return_a_tensor_or_a_tuple() -> None:
    residual = torch.ones(2, 3)
    assert output_tensor(residual) is output_tensor((residual, None)) is residual
    assert Hook(12).name == "blocks.12.hook_resid_post" and Hook(12).array == "layer_12"
    assert Hook(3, "mlp_out").name == "blocks.3.hook_mlp_out" and Hook(3, "mlp_out").array == "layer_03.mlp_out"
    assert Hook(12, "attn_z").name == "blocks.12.attn.hook_z"
    assert all(Hook.from_array(Hook(7, site).array) == Hook(7, site) for site in SITES)


def test_a_model_is_pinned_by_its_bytes(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    revision = find_model(str(tiny_model))[0].revision
    assert find_model(str(copy))[0].revision == revision
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert find_model(str(copy))[0].revision != revision


def test_a_model_that_reads_images_is_its_decoder(images: LanguageModel, tmp_path: Path) -> None:
    images.model.save_pretrained(tmp_path)
    source, config = find_model(str(tmp_path))
    check_layers(config, [0, 2], "images")
    with pytest.raises(UsageError, match="images has no layer 3: its 3 blocks are layers 0 to 2"):
        check_layers(config, [3], "images")
    assert (hook_width(Hook(0), config), hook_width(Hook(0, "attn_z"), config)) == (16, 16)
    trunk = load_trunk(source, config, 1, **SETTINGS)
    ids = torch.arange(3, 25).reshape(2, 11)
    assert len(trunk.blocks) == 2 and torch.equal(trunk.capture(ids, [1])[1], images.capture(ids, [1])[1])


def test_a_model_without_a_list_of_blocks_is_rejected() -> None:
    class Bare(GPT2Config):
        attribute_map = {}  # noqa: RUF012

    with pytest.raises(UsageError, match="bare is a gpt2 model without num_hidden_layers in its configuration"):
        check_layers(Bare(), [0], "bare")


@pytest.mark.parametrize("layer", [26, -1])
def test_a_layer_that_the_model_lacks_is_rejected(layer: int) -> None:
    _, config = find_model("gemma-2-mini")
    check_layers(config, [0, 5, 25], "gemma-2-mini")
    with pytest.raises(UsageError, match=f"gemma-2-mini has no layer {layer}: its 26 blocks are layers 0 to 25"):
        check_layers(config, [5, layer], "gemma-2-mini")


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "nobody/nothing"])
def test_a_missing_model_without_a_network_raises_a_clear_error(name: str) -> None:
    sentence = (
        f"The model {name} could not be loaded: the Hub cannot be reached.*Check the network.*--model gemma-2-mini"
    )
    with pytest.raises(UnavailableError, match=sentence) as refused:
        find_model(name)
    assert refused.value.exit_code == 4
    assert ("license" in str(refused.value)) == name.startswith("google/")


GATED = "google/some is gated: accept its license at https://huggingface.co/google/some, then run `hf auth login`"
UNREACHABLE = "the Hub cannot be reached.*Check the network"


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind(f"{status} of the Hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("cause", "kind", "sentence"),
    [
        (http(GatedRepoError, 403), UnavailableError, GATED),
        (http(RepositoryNotFoundError, 404), UnavailableError, "There is no model google/some on the Hub"),
        (http(RevisionNotFoundError, 404), UsageError, "The model google/some has no such revision"),
        (OSError(errno.ENOSPC, "No space left on device"), UnavailableError, "the disk is full. Free some space"),
        (LocalEntryNotFoundError("Name or service not known"), UnavailableError, UNREACHABLE),
        (ConnectionError("Server disconnected"), UnavailableError, UNREACHABLE),
        (http(HfHubHTTPError, 503), UnavailableError, UNREACHABLE),
        (ValueError("Unrecognized model"), UnavailableError, "google/some could not be loaded: Unrecognized model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_errors_of_the_hub_are_translated(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, kind: type[SaeError], sentence: str, wrapped: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        if not wrapped:
            raise cause
        raise OSError(str(cause)) from cause  # as transformers does

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(kind, match=sentence) as refused:
        find_model("google/some")
    assert ("gated" in str(refused.value)) == isinstance(cause, GatedRepoError)


def test_a_folder_without_a_model_raises_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="could not be loaded"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(("kind", "what"), [("t5", "an encoder and a decoder"), ("bart", "an encoder and a decoder")])
def test_a_model_with_an_encoder_is_rejected(kind: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"some is a {kind} model, which has {what}. Only causal"):
        check_layers(CONFIG_MAPPING[kind](), [0], "some")


def test_a_model_that_reads_later_tokens_is_rejected() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = LanguageModel(AutoModel.from_config(config).eval())
    with pytest.raises(UsageError, match="depend on later tokens, so it is not a causal language model"):
        model.check_hooks([Hook(0)])


def test_a_context_longer_than_the_learned_positions_is_rejected() -> None:
    check_context(tiny("gpt2").config, 1024, "gpt2")
    check_context(tiny("llama").config, 65535, "llama")
    with pytest.raises(UsageError, match="--context 1025 is too long: gpt2 has positions for 1024 tokens"):
        check_context(tiny("gpt2").config, 1025, "gpt2")


@pytest.mark.parametrize("how", ["torn", "lacking", "another shape"])
def test_incomplete_weights_are_rejected(tiny_model: Path, tmp_path: Path, how: str) -> None:
    """transformers would fill missing tensors with random numbers."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = folder / "model.safetensors"
    weights = load_file(file)
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "lacking":
        del weights["model.layers.0.mlp.down_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    source, config = find_model(str(folder))
    sentence = (
        "are damaged: .* Download them again"
        if how == "torn"
        else "do not match its config.json: .*Download them again"
    )
    with pytest.raises(DamagedError, match=sentence):
        load_trunk(source, config, 0, **SETTINGS)

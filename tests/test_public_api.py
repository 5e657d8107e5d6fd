"""The public names of `sae`: batches of a cache, activations of texts, and a steered model."""

import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import sae
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.train.sae import SAE

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
TEXTS = ["the quick brown fox jumps", "seven zebras", "books in june, " * 30]


PUBLIC = {
    "DamagedError", "Interrupted", "SAE", "SaeError", "UnavailableError", "UsageError", "activations", "evaluate_saes",
    "export_sae", "harvest_activations", "import_sae", "load_sae", "open_cache", "steering", "train_controls",
    "train_saes",
}  # fmt: skip
ROOT = Path(sae.__file__).parent
MODULES = sorted(
    ".".join(["sae", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for folder in ("cache", "cli", "common", "evaluate", "harvest", "train", "workflows")
    for path in (ROOT / folder).rglob("*.py")
)


def test_the_public_names_are_exactly_these() -> None:
    assert set(dir(sae)) == set(sae.__all__) == PUBLIC | {"__version__"}
    with pytest.raises(AttributeError, match="module 'sae' has no attribute 'nothing'"):
        sae.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_a_docstring_for_a_notebook(name: str) -> None:
    doc = inspect.getdoc(getattr(sae, name)) or ""
    assert len(doc.splitlines()) >= (1 if name.endswith(("Error", "Interrupted")) else 5), doc


IN_ANY_ORDER = """
import importlib, json, random, sys
modules, public = json.load(sys.stdin)
for seed in (0, 1):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sae"]:
        del sys.modules[name]
    sae = importlib.import_module("sae")
    for module in random.Random(seed).sample(modules, len(modules)):
        importlib.import_module(module)
    for name in public:
        thing = getattr(sae, name)
        assert callable(thing) and thing.__name__ == name and thing.__module__.startswith("sae."), (name, thing)
"""


@pytest.mark.slow
def test_public_names_work_after_every_other_module_was_imported_in_any_order() -> None:
    """An imported submodule becomes an attribute of `sae` and must not hide a public name.

    This runs in a new process: a second import would register the operators again and make the first ones unusable.
    """
    given = json.dumps([MODULES, sorted(PUBLIC)])
    done = subprocess.run([sys.executable, "-c", IN_ANY_ORDER], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import sae", "import sae; dir(sae)", "from sae import UsageError"])
def test_the_package_loads_torch_when_it_is_needed(code: str) -> None:
    code = f"{code}; import sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.slow
def test_the_ten_lines_of_the_package_run_all_three_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """They are the lines of `sae.__doc__`, with smaller sizes."""
    lines = [line[4:] for line in (sae.__doc__ or "").splitlines() if line.startswith("    ") or not line]
    code = "\n".join(lines[next(n for n, line in enumerate(lines) if line == "import sae") :])
    for size, small in {
        "[12]": "[0]",
        "200_000": "3000",
        "900": "3",
        "1024": "128",
        "16_000": "200",
        '"4x"': "32",
    }.items():
        assert size in code
        code = code.replace(size, small)
    code = code.replace("cache=cache,", "cache=cache, layers=0,")
    exec(code, {})
    names = [line.split()[0].split("-L")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:4] == ["relu", "topk", "batchtopk", "decorrelation"] and "identity" in names


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_those_that_training_reads(tiny_cache: Cache) -> None:
    found = list(tiny_cache.batches(1, batch_size=256, seed=3))
    with BatchLoader(tiny_cache, "layer_01", 256, seed=3) as stream:
        expected = [x.float() for x in itertools.islice(stream, len(found))]
    assert len(found) == 8000 // 256 and all(map(torch.equal, found, expected))
    assert len({x.data_ptr() for x in found}) == len(found)  # each is the caller's
    later = list(tiny_cache.batches(1, batch_size=256, seed=3, batch=20, epochs=2, dtype="bfloat16"))
    assert len(later) == 2 * len(found) - 20 and later[0].dtype == torch.bfloat16
    assert all(torch.equal(ours.float(), theirs) for ours, theirs in zip(later, found[20:], strict=False))
    assert len(list(itertools.islice(tiny_cache.batches(0, batch_size=4000, epochs=None), 7))) == 7


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"layer": 7}, "holds layer 0, layer 1, not layer 7"),
        ({"layer": 0, "batch_size": 9000}, "fewer than one batch"),
        ({"layer": 0, "batch_size": 0}, "invalid batch_size 0: expected a positive number"),
        ({"layer": 0, "batch_size": 2.5}, "invalid batch_size 2.5: expected an integer"),
        ({"layer": 0, "seed": "x"}, "invalid seed .x.: expected an integer"),
        ({"layer": 0, "dtype": "float16"}, "unknown dtype 'float16'"),
        ({"layer": 0, "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_batches_that_cannot_be_had_are_refused_at_once(
    tiny_cache: Cache, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        tiny_cache.batches(**given)


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_special", [False, True])
def test_activations_are_the_hidden_states_of_each_text_by_itself(tiny_model: Path, keep_special: bool) -> None:
    found = sae.activations(
        TEXTS, model=str(tiny_model), layer=0, batch_contexts=2, keep_special=keep_special, device="cpu"
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager"),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    first = 0 if keep_special else 1
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[1][0, first:]
        mine = found.text == number
        torch.testing.assert_close(found.x[mine], expected, rtol=1e-5, atol=1e-5)
        assert found.ids[mine].tolist() == ids[0, first:].tolist()
        assert found.position[mine].tolist() == list(range(first, ids.shape[1]))
    assert len(found.tokens) == len(found.x) and found.x.dtype == torch.float32
    loaded = sae.activations(TEXTS, model=model, tokenizer=tokenizer, layer=0, keep_special=keep_special)
    torch.testing.assert_close(loaded.x, found.x)


@pytest.mark.parametrize(
    ("texts", "layer", "sentence"),
    [
        (None, 0, "expects a list of strings"),
        (["a"], "12", "invalid layer='12': expected the number of a block"),
        (["a"], [12], r"invalid layer=\[12\]: expected the number"),
    ],
)
def test_activations_of_no_texts_or_no_layer_are_refused(
    tiny_model: Path, texts: Any, layer: Any, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        sae.activations(texts, model=str(tiny_model), layer=layer)


def test_a_long_text_is_cut_as_a_harvest_cuts_it(tiny_model: Path, sentences: Path, tiny_cache: Cache) -> None:
    """Every row of the cache equals the activation of a token of the same texts, rounded to bfloat16."""
    import json

    texts = [json.loads(line)["text"] for line in sentences.read_text().splitlines()]
    found = sae.activations(texts, model=str(tiny_model), layer=1, context=32, device="cpu")
    rows = {row.tobytes() for row in found.x.bfloat16().view(torch.int16).numpy()}
    held = np.concatenate([tiny_cache.read_chunk("layer_01", n) for n in range(len(tiny_cache.chunk_rows))])[
        : tiny_cache.rows
    ]
    assert np.mean([row.tobytes() in rows for row in held]) > 0.95  # the last bit may differ in another batch
    assert int(found.position.max()) == 31


def test_a_tokenizer_without_bos_is_left_as_it_is(tiny_model: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = None
    found = sae.activations(["seven"], model=model, tokenizer=tokenizer, layer=0, keep_special=True)
    assert found.ids[0] == tokenizer("")["input_ids"][0] and tokenizer.bos_token is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"texts": "one text"}, "expects a list of strings"),
        ({"texts": []}, "contain only BOS"),
        ({"texts": ["", ""]}, "contain only BOS"),
        ({"texts": [3]}, "expects a list of strings"),
        ({"layer": 2}, "has no layer 2: its 2 blocks"),
        ({"site": "mlp"}, "unknown site 'mlp'"),
        ({"context": 1}, "invalid context=1: expected 2 to 65,535"),
        ({"model": torch.nn.Linear(1, 1)}, "needs its tokenizer"),
    ],
)
def test_what_is_not_there_is_refused(tiny_model: Path, given: dict[str, Any], sentence: str) -> None:
    asked = {"texts": TEXTS, "model": str(tiny_model), "layer": 0} | given
    with pytest.raises(UsageError, match=sentence):
        sae.activations(asked.pop("texts"), **asked)


# --- steering -------------------------------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sae_of(layer: int, site: str = "resid_post", d_in: int = 16) -> SAE:
    torch.manual_seed(1)
    made = SAE(d_in, 32).eval().requires_grad_(False)
    made.W_dec *= 3.0  # its rows are not unit rows, so normalizing them would show
    made.origin = {"layer": layer, "site": site}
    return made


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


IDS = torch.arange(3, 25).reshape(2, 11)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def hooks_on(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def by_hand(model: Any, layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits with a hook of our own on the block."""

    def replace(_module: object, _inputs: object, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = blocks[layer].register_forward_hook(replace)
    try:
        return model(IDS, use_cache=False).logits
    finally:
        handle.remove()


def test_steering_with_zero_changes_no_bit(model: Any) -> None:
    before = logits(model)
    with sae.steering(model, sae_of(1), latent=5, strength=0.0):
        assert torch.equal(logits(model), before)


def test_steering_adds_the_unit_direction_and_leaves_nothing_behind(model: Any) -> None:
    s, before, hooks = sae_of(1), logits(model), hooks_on(model)
    direction = s.W_dec[5] / s.W_dec[5].norm()
    with sae.steering(model, s, latent=5, strength=7.3) as given:
        steered = logits(model)
        assert given is model
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 7.3 * direction)) and not torch.equal(steered, before)
    with pytest.raises(KeyError), sae.steering(model, s, latent=5, strength=8.0):
        raise KeyError
    assert hooks_on(model) == hooks and torch.equal(logits(model), before)


def test_a_clamped_latent_has_that_value(model: Any) -> None:
    s = sae_of(1)

    def clamped(x: Tensor) -> Tensor:
        return x + (2.5 - s.encode(x)[..., 5])[..., None] * s.W_dec[5]

    with sae.steering(model, s, latent=5, clamp=2.5):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, clamped))


@pytest.mark.parametrize("positions", [slice(4, None), slice(4, 9, 2), [4, 7], {10}, slice(0, 0)])
def test_steering_at_positions(model: Any, positions: Any) -> None:
    s = sae_of(1)
    direction = s.W_dec[5] / s.W_dec[5].norm()
    chosen = torch.zeros(11, 1)
    chosen[positions if isinstance(positions, slice) else sorted(positions)] = 1
    with sae.steering(model, s, latent=5, strength=8.0, positions=positions):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + chosen * (8.0 * direction)))


def test_while_a_model_writes_positions_count_from_the_beginning_of_the_text() -> None:
    """With a key-value cache, each new token is a separate forward pass of one position."""
    model, s = tiny("gemma2"), sae_of(1)
    with sae.steering(model, s, latent=5, strength=30.0, positions=slice(5, 13)):
        kept = model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=True)
        anew = model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(kept, anew)
    assert not torch.equal(kept, model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False))


def test_several_directions_add_up() -> None:
    model, s = tiny("llama"), sae_of(1)
    unit = s.W_dec / s.W_dec.norm(dim=1, keepdim=True)
    with sae.steering(model, s, latent=5, strength=8.0), sae.steering(model, s, latent=6, strength=-3.0):
        steered = logits(model)
    assert torch.equal(steered, by_hand(model, 1, lambda x: x + 8.0 * unit[5] - 3.0 * unit[6]))


@pytest.mark.parametrize("site", ["mlp_out", "attn_z"])
def test_steering_at_another_site_changes_what_stands_there(model: Any, site: str) -> None:
    before = logits(model)
    with sae.steering(model, sae_of(1, site), latent=5, strength=8.0):
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("s", "given", "sentence"),
    [
        (sae_of(3), {"strength": 1.0}, "layer 3 of width 16, but this LlamaForCausalLM has 3 blocks"),
        (sae_of(1, d_in=8), {"strength": 1.0}, "of width 8, but .* of width 16"),
        (sae_of(1), {}, "Give either strength"),
        (sae_of(1), {"strength": 1.0, "clamp": 1.0}, "Give either strength"),
        (sae_of(1), {"strength": 1.0, "latent": 32}, "There is no latent 32"),
        (sae_of(1), {"strength": 1.0, "positions": slice(-3, None)}, "Count from 0"),
        (SAE(16, 4), {"strength": 1.0}, "does not record its layer"),
        (sae_of(1), {"strength": float("nan")}, "invalid strength nan"),
        (sae_of(1), {"strength": 1.0, "latent": 3.5}, "There is no latent 3.5"),
        (sae_of(1), {"strength": 1.0, "latent": "3"}, "There is no latent '3'"),
        ("runs/mine", {"strength": 1.0}, "a transformers model and an SAE"),
    ],
)
def test_steering_that_cannot_be_is_refused(s: SAE, given: dict[str, Any], sentence: str) -> None:
    model = tiny("llama")
    hooks = hooks_on(model)
    with pytest.raises(UsageError, match=sentence), sae.steering(model, s, **({"latent": 0} | given)):
        pass
    assert hooks_on(model) == hooks

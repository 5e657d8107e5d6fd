"""PEFT adapters are merged before a harvest, are part of the cache's identity, and are merged again to evaluate."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae.cache.catalog import find_cache
from sae.cache.hooks import Hook
from sae.cache.models import model_label
from sae.common.errors import DamagedError, UnavailableError, UsageError
from sae.evaluate.inputs import make_context
from sae.evaluate.run import evaluate_saes
from sae.harvest.adapters import WEIGHTS, find_adapter
from sae.harvest.description import describe_source
from sae.harvest.loading import find_model
from sae.harvest.model import load_model, load_trunk
from sae.harvest.run import harvest_activations
from sae.train.run import train_saes

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"dtype": "float32", "device": "cpu", "attention": "eager"}
IDS = torch.arange(3, 25).reshape(2, 11)
RANK, ALPHA = 4, 8


def make_adapter(model_folder: Path, folder: Path, **options: Any) -> Path:
    """A random LoRA of two kinds of modules in both blocks."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]} | options
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "lora")


def test_the_merged_weights_are_those_by_hand_and_by_peft(tiny_model: Path, adapter: Path) -> None:
    """The merged weights are W + B A alpha / r, and equal peft's own merge bit for bit."""
    source, config = find_model(str(tiny_model), adapters=[str(adapter)])
    ours = load_model(source, config, **SETTINGS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    tensors, plain = load_file(adapter / "adapter_model.safetensors"), dict(base.named_parameters())
    for name, weight in ours.model.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = plain[name].detach()
        if f"{stem}.lora_A.weight" in tensors:
            product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            expected = expected + product * (ALPHA / RANK)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    states = merged(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(ours.capture(IDS, [0])[0], states[1])
    trunk = load_trunk(source, config, 0, **SETTINGS)
    assert torch.equal(trunk.capture(IDS, [0])[0], states[1])
    plain_source, _ = find_model(str(tiny_model))
    assert not torch.equal(load_trunk(plain_source, config, 0, **SETTINGS).capture(IDS, [0])[0], states[1])


def test_a_cache_with_an_adapter_is_another_and_evaluation_merges_it_again(
    tiny_model: Path, adapter: Path, sentences: Path, home: Path
) -> None:
    options = {"layers": 0, "dataset": sentences, "tokens": 1500, "context": 32, "window": 512, "held_out": 0.2}
    plain = harvest_activations(str(tiny_model), device="cpu", **options)
    cache = harvest_activations(str(tiny_model), device="cpu", adapters=[str(adapter)], **options)
    assert cache.fingerprint != plain.fingerprint
    name = model_label(cache.identity["model"])
    assert name.startswith("tiny-gemma-") and "+lora-" in name and str(home) not in name
    assert "adapters" not in plain.identity["model"]
    assert find_cache(name, Hook(0)).folder == cache.folder
    assert find_cache(str(tiny_model), Hook(0)).folder == plain.folder
    (run,) = train_saes(["topk"], cache=cache.folder, layers=[0], steps=4, batch_size=64, width=64, device="cpu")

    def numbers() -> Any:
        row = evaluate_saes([run.folder], suite="core", tokens=200, references=False, device="cpu", force=True)[0]
        return row.results["core"].metrics

    first = numbers()
    assert numbers() == first
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    evaluated = make_context(cache)
    torch.testing.assert_close(evaluated.model.model(IDS).logits, merged(IDS).logits)
    # The settings list the adapters, so neither results nor values computed for the plain model are reused here.
    assert evaluated.settings["adapters"] == cache.identity["model"]["adapters"]
    assert "adapters" not in make_context(plain).settings
    moved = home / "elsewhere"
    shutil.copytree(adapter, moved)
    again = harvest_activations(str(tiny_model), device="cpu", adapters=[str(moved)], **options)
    assert again.folder == cache.folder, "an adapter is known by its files, wherever they lie"
    assert numbers() == first


def test_what_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = find_model(str(tiny_model))
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(UsageError, match="only read from safetensors"):
        find_adapter(str(pickled))
    with pytest.raises(UsageError, match="holds no PEFT adapter"):
        find_adapter(str(tiny_model))
    with pytest.raises(UsageError, match="There is no folder"):
        find_adapter(str(tmp_path / "none"))

    def load(folder: Path) -> None:
        load_model(find_model(str(tiny_model), adapters=[str(folder)])[0], config, **SETTINGS)

    narrow = shutil.copytree(adapter, tmp_path / "narrow")
    tensors = load_file(narrow / "adapter_model.safetensors")
    save_file({k: v[:, :8].clone() if "q_proj.lora_A" in k else v for k, v in tensors.items()},
              narrow / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UsageError, match="does not fit the model"):
        load(narrow)
    deeper = shutil.copytree(adapter, tmp_path / "deeper")
    more = {k.replace("layers.1.", "layers.7."): v.clone() for k, v in tensors.items() if "layers.1." in k}
    save_file(tensors | more, deeper / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="does not fit the model: .* of its tensors differ"):
        load(deeper)
    truncated = shutil.copytree(adapter, tmp_path / "truncated")
    (truncated / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(DamagedError, match="The weights of the adapter .*truncated are damaged"):
        load(truncated)
    not_finite = shutil.copytree(adapter, tmp_path / "not-finite")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, not_finite / WEIGHTS)
    with pytest.raises(DamagedError, match="not-finite are damaged: merged weights are not finite"):
        load(not_finite)
    prompts = tmp_path / "prompts"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt_config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(base, prompt_config).save_pretrained(prompts)
    with pytest.raises(UsageError, match="PROMPT_TUNING, which peft cannot merge"):
        load(prompts)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("sae.common.packages.installed_version", lambda package: None)
    with pytest.raises(UnavailableError, match=r"sae-pipeline\[adapters\]"):
        find_adapter(str(adapter))


def test_a_model_s_folder_with_an_adapter_in_it_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """transformers would load the model that adapter_config.json names, not the one in the folder."""
    both = shutil.copytree(tiny_model, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    with pytest.raises(UsageError, match="both holds a PEFT adapter .* move adapter_config.json out of it"):
        find_model(str(both))
    with pytest.raises(UsageError, match="lora holds a PEFT adapter .* Give the model that it was trained for with"):
        find_model(str(adapter))
    shutil.copy(adapter / WEIGHTS, both)
    source, config = find_model(str(tiny_model))
    with pytest.raises(UsageError, match="both holds a PEFT adapter"):  # a model of the Hub is checked only here
        load_trunk(replace(source, location=str(both)), config, 0, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (lambda record: [], DamagedError, "does not name the adapter's kind"),
        (lambda record: {**record, "peft_type": None}, DamagedError, "does not name the adapter's kind"),
        (lambda record: {**record, "peft_type": "NEW"}, UsageError, "of the kind NEW, which the installed peft does n"),
        (lambda record: {**record, "target_modules": "((("}, UsageError, "does not fit the model: missing "),
    ],
)
def test_a_configuration_that_peft_cannot_use(
    change: Any, kind: type[Exception], sentence: str, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    wrong = shutil.copytree(adapter, tmp_path / "wrong")
    path = wrong / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(kind, match=sentence):
        source, config = find_model(str(tiny_model), adapters=[str(wrong)])
        load_model(source, config, **SETTINGS)


def test_the_plan_names_the_model_that_an_adapter_was_trained_for(
    tiny_model: Path, adapter: Path, sentences: Path, tmp_path: Path
) -> None:
    from sae.harvest.plan import HarvestConfig, plan_harvest

    other = shutil.copytree(adapter, tmp_path / "other")
    record = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": "google/gemma-2-2b"}))
    plan = plan_harvest(
        HarvestConfig(model=str(tiny_model), adapters=[str(other)], dataset=str(sentences), layers=(0,), tokens=100)
    )
    lines = "\n".join(describe_source(plan))
    assert "adapter  other-" in lines and "trained for google/gemma-2-2b" in lines

"""If a model also reads images, only its language tower is loaded, with the same numbers as in the whole model."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

from sae.cache.hooks import Hook
from sae.cache.outliers import origin_of_rows
from sae.common.errors import DamagedError
from sae.harvest.language_tower import LeftOut
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import LanguageModel, find_model, load_model, load_trunk

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"dtype": "float32", "device": "cpu", "attention": "eager"}
TEXT = {
    "vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_EYES = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
    "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": EYES, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": TEXT
        | {"global_head_dim": 8, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
        "vision_config": EYES | {"position_embedding_size": 64, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None,
    },
    "qwen2_5_vl": {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": QWEN_EYES},
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": QWEN_EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
    },
    "mistral3": {"text_config": {"model_type": "mistral", **TEXT}, "vision_config": {"model_type": "pixtral", **EYES}},
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **EYES},
        "image_token_index": 100,
    },
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 32, "num_local_experts": 2, "num_experts_per_tok": 1},
        "vision_config": EYES | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
}


@lru_cache
def whole_model(kind: str) -> Any:
    """Build a random model of a kind that reads images and text, in which every parameter matters."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**KINDS[kind])
    config._attn_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    return model


@pytest.fixture(params=list(KINDS))
def whole(request: pytest.FixtureRequest) -> Any:
    return whole_model(request.param)


def in_shards(model: Any, folder: Path) -> tuple[Path, Path]:
    """Save a model with its language tensors in one file and all others in another. Returns both files."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    other = ("vision", "visual", "projector", "audio")
    text = {name: x for name, x in tensors.items() if not any(word in name for word in other)}
    files = {"model-00001.safetensors": text, "model-00002.safetensors": tensors.keys() - text.keys()}
    save_file(text, folder / "model-00001.safetensors", {"format": "pt"})
    others = {name: tensors[name] for name in tensors.keys() - text.keys()}
    save_file(others, folder / "model-00002.safetensors", {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder / "model-00001.safetensors", folder / "model-00002.safetensors"


def hidden_states(model: Any, ids_NS: torch.Tensor) -> Any:
    try:
        return model(ids_NS, output_hidden_states=True, use_cache=False)
    except AttributeError as error:  # transformers 5.24 cannot run Llama 4 with its own image tower
        pytest.skip(f"transformers {transformers.__version__} cannot run the whole model: {error}")


def test_the_tower_alone_computes_what_the_whole_model_does(whole: Any, tmp_path: Path) -> None:
    """Activations agree bit for bit, although the file of the other parts is missing and they take no memory."""
    _, others = in_shards(whole, tmp_path)
    others.unlink()
    ids_NS = torch.arange(3, 25).reshape(2, 11)
    expected = hidden_states(whole, ids_NS)
    source, config = find_model(str(tmp_path))
    model = load_model(source, config, **SETTINGS)
    run = model.forward(ids_NS, [Hook(0), Hook(1)])
    for layer in (0, 1):
        assert torch.equal(run.activations[Hook(layer)], expected.hidden_states[layer + 1])
    torch.testing.assert_close(model.unembed(run.final), expected.logits, rtol=1e-5, atol=1e-5)
    trunk = load_trunk(source, config, 1, **SETTINGS)
    assert torch.equal(trunk.capture(ids_NS, [1])[1], expected.hidden_states[2])
    tower = sum(p.numel() for p in LanguageModel(whole).trunk.parameters())
    unembedding = whole.get_output_embeddings().weight.numel()
    assert sum(p.numel() for p in model.model.parameters()) <= tower + unembedding
    assert any(isinstance(part, LeftOut) for part in model.model.modules())


def test_a_damaged_file_of_other_parts_does_not_matter_and_one_of_the_tower_does(tmp_path: Path) -> None:
    text, others = in_shards(whole_model("gemma3"), tmp_path)
    others.write_bytes(others.read_bytes()[:100])
    source, config = find_model(str(tmp_path))
    load_trunk(source, config, 1, **SETTINGS)
    tensors = load_file(text)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, text, {"format": "pt"})
    with pytest.raises(DamagedError, match="layers.1.mlp.up_proj.weight is missing or has another shape"):
        load_trunk(source, config, 1, **SETTINGS)


def test_no_tensor_of_other_parts_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds if all tensors are in one file."""
    whole = whole_model("qwen2_5_vl")
    whole.save_pretrained(tmp_path)
    read: list[str] = []
    import transformers.modeling_utils as modeling

    original = modeling.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, key: Any) -> Any:
            read.append(self.name)
            return self.inner[key]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = original(*args, **options)

        def get_slice(self, name: str) -> Any:
            return Slice(name, self.file.get_slice(name))

        def __enter__(self) -> "Spy":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.__exit__(None, None, None)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(modeling, "safe_open", Spy)
    source, config = find_model(str(tmp_path))
    load_model(source, config, **SETTINGS)
    assert read and not [name for name in read if "visual" in name]
    assert any("visual" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_harvest_of_the_tower_ends_with_the_activations_of_the_whole_model(sentences: Path, tmp_path: Path) -> None:
    from sae.harvest.run import harvest_activations

    torch.manual_seed(0)
    settings = KINDS["gemma3"] | {"text_config": TEXT | {"vocab_size": 8192}}
    config = CONFIG_MAPPING["gemma3"](**settings)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    folder = tmp_path / "eyes"
    _, others = in_shards(whole, folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    others.unlink()
    cache = harvest_activations(
        str(folder), layers=1, dataset=sentences, tokens=400, context=32, window=256, device="cpu", dtype="float32"
    )
    contexts = cache.contexts(held_out=False)
    bits = torch.from_numpy(cache.read_chunk("layer_01", 0).copy()).view(torch.bfloat16)
    rows = np.arange(0, 256, 40)
    origin = [
        origin_of_rows(cache.folder, cache.layout, name, rows, cache.manifest["files"])
        for name in ("row_ctx", "row_pos")
    ]
    for row, context, position in zip(rows, *origin, strict=True):
        ids = torch.from_numpy(contexts.ids[context : context + 1, : position + 1].astype("int64"))
        expected = whole(ids, output_hidden_states=True).hidden_states[2][0, -1]
        torch.testing.assert_close(bits[row].float(), expected.to(torch.bfloat16).float(), rtol=2e-2, atol=1e-3)

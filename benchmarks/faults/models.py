"""Models and tokenizers that are hostile, broken or odd."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

from faults.command import DAMAGED, HARVEST, OK, OUTSIDE, TRAIN, USAGE, sae
from faults.inputs import count_commits
from faults.table import Matrix

SENSELESS = (
    ("hidden_size", "32", DAMAGED),
    ("hidden_size", 2**40, DAMAGED),
    ("num_hidden_layers", 10**9, DAMAGED),
    ("vocab_size", 10**9, OUTSIDE),
    ("head_dim", -1, DAMAGED),
    ("num_attention_heads", 0, DAMAGED),
    ("layer_types", ["full_attention"], DAMAGED),
    ("attn_logit_softcapping", "x", DAMAGED),
    ("rope_parameters", {"rope_type": "none", "rope_theta": 1.0}, DAMAGED),
)
INDEX = "model.safetensors.index.json"
OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def bad_models(m: Matrix) -> None:
    m.head("Models and tokenizers that are hostile, broken or odd")
    for field, value, code in SENSELESS:
        edited(copied("senseless"), **{field: value})
        harvest(m, f"config.json: {field} = {value!r}", "senseless", code)
    for name, content in (("nested 100,000 deep", "[" * 100_000), ("of 5,000 digits", "9" * 5000)):
        (copied("senseless") / "config.json").write_text(f'{{"hidden_size": {content}}}')
        harvest(m, f"config.json with a value {name}", "senseless", DAMAGED)
    (copied("senseless") / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    harvest(m, "tokenizer.json that makes no sense", "senseless", DAMAGED)
    remote_code(m)
    shards(m)
    pickles(m)
    tokens_without_embedding(m)
    python_tokenizer(m)
    changed_tokenizer(m)


def harvest(m: Matrix, fault: str, model: str, code: int, *words: Any, after: str = "") -> Path:
    """Run a harvest of a model, answer "y" on its stdin, and add the outcome to the table. If the model is refused,
    nothing may be committed. The model's own code must never run, even if the model is accepted."""
    out = Path("models-cache")
    shutil.rmtree(out, ignore_errors=True)
    outcome = sae(*HARVEST, "--model", f"./{model}", "--out", out, *words, stdin="y\n" * 20)
    is_right = (count_commits(out) > 0) == (code == OK) and not Path("ran").exists()
    m.row(fault, outcome, code, after or "nothing is committed", is_right)
    return out


def copied(name: str, original: str = "tiny") -> Path:
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(original, name))


def edited(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def remote_code(m: Matrix) -> None:
    """Models, a tokenizer and a dataset with Python code of their own, which would write the file `ran` if it ran."""
    code = (
        f"open({str(Path('ran').absolute())!r}, 'w').write('ran')\n"
        "from transformers import Gemma2ForCausalLM, PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig): model_type = 'own'\n"
        "class OwnModel(Gemma2ForCausalLM): config_class = OwnConfig\n"
    )
    unrun = "none of it is run, and no question is asked"
    (edited(copied("own"), model_type="own", auto_map=OWN) / "own.py").write_text(code)
    harvest(m, "a model with Python of its own (y on stdin)", "own", USAGE, after=unrun)
    (edited(copied("own"), auto_map=OWN) / "own.py").write_text(code)
    harvest(m, "the same with an architecture that transformers knows", "own", OK, after=f"{unrun}: transformers' is")
    folder = edited(copied("own"), "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    edited(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    (folder / "own.py").write_text(code)
    harvest(m, "a tokenizer with Python of its own (y on stdin)", "own", OK, after=f"{unrun}: tokenizer.json is read")
    Path("scripted").mkdir(exist_ok=True)
    Path("scripted/scripted.py").write_text(code)
    harvest(m, "a dataset that is a loading script", "tiny", USAGE, "--dataset", "./scripted", after=unrun)


def shards(m: Matrix) -> None:
    import safetensors.torch

    for name in ("../tiny/model.safetensors", str(Path("tiny/model.safetensors").absolute())):
        folder = copied("elsewhere")
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        kind = "relative" if name.startswith("..") else "absolute"
        harvest(m, f"an index that names weights outside the folder ({kind})", "elsewhere", DAMAGED)
    folder = copied("parts")
    (folder / "below").mkdir()
    (folder / "model.safetensors").rename(folder / "below" / "all.safetensors")
    weight_map = dict.fromkeys(tensors, "below/all.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    cache = harvest(
        m,
        "weights in a subfolder that the index names",
        "parts",
        OK,
        after="they are read and are part of the model's digest",
    )
    changed = {name: tensor * 2 for name, tensor in tensors.items()}
    safetensors.torch.save_file(changed, folder / "below" / "all.safetensors", metadata={"format": "pt"})
    outcome = sae(*HARVEST, "--model", "./parts", "--out", cache)
    m.row("the same after those weights have changed", outcome, USAGE, "the cache is of another model")


def pickles(m: Matrix) -> None:
    import safetensors.torch
    import torch

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.write_text, (Path("ran").absolute(), "ran")

    folder = copied("pickled")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    harvest(m, "pytorch_model.bin", "pickled", OK, after="read with weights_only")
    torch.save(Bomb(), path)
    harvest(m, "pytorch_model.bin with a program in it", "pickled", DAMAGED)
    path.write_bytes(pickle.dumps(Bomb()))
    harvest(m, "the same as a bare pickle", "pickled", DAMAGED)
    path.write_bytes(whole[: len(whole) // 2])
    harvest(m, "pytorch_model.bin cut in the middle", "pickled", DAMAGED)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else bytes(20_000_000))
    harvest(m, "pytorch_model.bin that unpacks to a thousand times its size", "pickled", DAMAGED)


def tokens_without_embedding(m: Matrix) -> None:
    from transformers import AutoTokenizer

    folder = copied("enlarged")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_tokens(["<zzz>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    Path("zzz.jsonl").write_text('{"text": "the quick fox"}\n' * 9 + '{"text": "a fox <zzz> here"}\n' * 900)
    harvest(m, "a text with an added token that has no embedding", "enlarged", USAGE, "--dataset", "zzz.jsonl")
    harvest(m, "the same model, a text without it", "enlarged", OK, after="the plan names the token")


def python_tokenizer(m: Matrix) -> None:
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).save_pretrained("bytes")
    ByT5Tokenizer(bos_token="</s>").save_pretrained("bytes")
    harvest(m, "a tokenizer that is written in Python (ByT5)", "bytes", OK, after="it is harvested")
    Path("talks.jsonl").write_text('{"talk": [{"role": "user", "content": "hello"}]}\n' * 99)
    edited(Path("bytes"), "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    talks = ["--dataset", "talks.jsonl", "--chat-column", "talk"]
    harvest(m, "conversations through such a tokenizer", "bytes", USAGE, *talks)


def changed_tokenizer(m: Matrix) -> None:
    """The tokenizer's files change after the harvest, so that the model no longer matches the record of the cache."""
    home = Path("homes-models").absolute()
    folder = copied("vocabulary")
    words = ["--model", "./vocabulary", "--out", home / "activations" / "one", "--held-out", 0.2]
    assert sae(*HARVEST, *words).code == OK
    assert sae(*TRAIN, "--steps", 5, "--device", "cpu", env={"SAE_HOME": str(home)}).code == OK
    (run,) = (home / "runs").iterdir()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["content"] = "<another>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    outcome = sae("evaluate", run, "--suite", "core", "--tokens", 200, "--device", "cpu", env={"SAE_HOME": str(home)})
    m.row("a tokenizer that changed between harvest and evaluation", outcome, USAGE, "nothing is measured")

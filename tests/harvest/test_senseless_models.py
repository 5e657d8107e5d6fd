"""Models with invalid files: every error is one sentence that names the file, the fault and what to do."""

import json
import pickle
import re
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae.common.errors import DamagedError, SaeError, UnavailableError, UsageError
from sae.harvest import building
from sae.harvest.building import build_without_numbers, check_memory
from sae.harvest.config import HarvestConfig
from sae.harvest.description import describe_harvest
from sae.harvest.load_errors import translate_load_errors, translate_model_errors
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.harvest.plan import plan_harvest
from sae.harvest.run import run_harvest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def harvest(tiny_model: Path, sentences: Path, tmp_path: Path) -> Callable[..., Any]:
    """harvest(**changes) plans, describes and runs a harvest with a copy of the tiny model.

    The changes are applied to the config.json of the copy.
    """

    def run(**changes: Any) -> Any:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))
        config = HarvestConfig(
            str(folder), layers=(0,), dataset=str(sentences), tokens=100, device="cpu", out=tmp_path / "out", context=32
        )
        plan = plan_harvest(config)
        describe_harvest(plan)
        return run_harvest(plan)

    return run


@pytest.fixture
def little_memory() -> Any:
    """8 GB of address space: what allocates 100 GB fails at once instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", "32", r"config.json .* cannot be loaded: .*hidden_size.*expected int, got str"),
        ("hidden_size", -32, "config.json of .* has hidden_size = -32; expected a number from 1 to"),
        ("hidden_size", 2**40, "config.json of .* has hidden_size = 1099511627776; expected a number from 1 to"),
        ("vocab_size", 0, "config.json of .* has vocab_size = 0; expected a number from 1 to"),
        ("vocab_size", 10**9, "According to config.json, the weights of .* take .* GB in float32, but"),
        ("intermediate_size", 2**40, "According to config.json, .* take .* GB in float32, but the memory of cpu"),
        ("num_hidden_layers", 10**9, "config.json has num_hidden_layers = 1000000000, and no model has more than"),
        ("head_dim", -1, "config.json of .* cannot build: .*RuntimeError.*Odd values in it: head_dim = -1"),
        ("head_dim", 2**40, "According to config.json, .* take .* GB in float32, but the memory of cpu"),
        ("num_attention_heads", 0, r"config.json of .* cannot be loaded: .*\(ZeroDivisionError\)"),
        ("layer_types", ["full_attention"], r"config.json .*num_hidden_layers.*\(2\) must be equal .*layer.types"),
        ("attn_logit_softcapping", "x", "config.json of .*attn_logit_softcapping.* expected float, got str"),
        ("rope_parameters", {"rope_type": "none", "rope_theta": 1.0}, "config.json of .*KeyError"),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense(
    harvest: Callable[..., Any], little_memory: None, tmp_path: Path, field: str, value: Any, said: str
) -> None:
    with pytest.raises(SaeError, match=said) as refused:
        harvest(**{field: value})
    message = str(refused.value)
    assert "\n" not in message and len(message) < 900
    assert str(tmp_path / "model") in message
    assert re.search(r"[Dd]ownload|Choose|Use a machine|Give|Update", message), message
    assert not list((tmp_path / "out").glob("commits/*"))


def test_the_cause_and_its_type_are_kept() -> None:
    """A bug of this package that is reported this way can therefore still be found."""
    for guard in (translate_load_errors("some/model"), translate_model_errors("some/model")):
        with pytest.raises(SaeError, match=r"boom \(LookupError\)") as refused, guard:
            raise LookupError("boom")
        assert isinstance(refused.value.__cause__, LookupError)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), translate_load_errors("some/model"):
            raise stop
    with pytest.raises(UsageError, match="^as it is$"), translate_load_errors("some/model"):
        raise UsageError("as it is")


def test_a_panic_of_the_tokenizers_library_is_a_sentence(tiny_model: Path) -> None:
    class Panic(BaseException):
        """A BaseException, as pyo3's PanicException is."""

    with pytest.raises(DamagedError, match=r"tokenizer's files of .* cannot be loaded: index out of range \(Panic\)"):
        with translate_load_errors(str(tiny_model), "tokenizer"):
            raise Panic("index out of range")


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen2", "t5"])
def test_a_tokenizer_whose_files_are_missing_is_refused(tmp_path: Path, model_type: str) -> None:
    """transformers would make a tokenizer from config.json alone, which turns every text into unknown tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    source, _ = find_model(str(tmp_path))
    with pytest.raises(DamagedError, match=r"has only special tokens: its files, such as tokenizer\.json, are missing"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"bos_token": 3, "tokenizer_class": "GemmaTokenizer"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}, "tokenizer_class": "GemmaTokenizer"}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_a_tokenizer_that_makes_no_sense(tiny_model: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / file).write_text(content)
    source, _ = find_model(str(folder))
    with pytest.raises(SaeError, match=f"{re.escape(str(folder))}.*(Download|Give)"):
        load_tokenizer(source)


@pytest.mark.parametrize("content", ["", "[", "[]", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"x": "\xff"}'])
def test_a_configuration_that_cannot_be_read(tiny_model: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SaeError, match=r"config\.json"):
        find_model(str(folder))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def put_bomb(path: Path, ran: Path) -> None:
    torch.save({"w": Bomb(ran)}, path)


def put_old_bomb(path: Path, ran: Path) -> None:
    path.write_bytes(pickle.dumps({"w": Bomb(ran)}))


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def put_zip_bomb(path: Path, _: Path) -> None:
    """Write the same tensors, with one entry that unpacks to 1,000 times its size in the file."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    largest = max(entries, key=lambda name: len(entries[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, b"\0" * 50_000_000 if name == largest else data)


def put_overlapping_entries(path: Path, _: Path) -> None:
    """Write the same tensors with a directory that lists the largest one 1,000 times.

    The entries are not compressed, and together they are too large.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.filelist += 1000 * [max(archive.filelist, key=lambda entry: entry.file_size)]


def put_noise(path: Path, _: Path) -> None:
    path.write_bytes(b"PK\3\4" + bytes(range(256)) * 20)


def put_nothing(path: Path, _: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [put_bomb, put_old_bomb, truncate, put_zip_bomb, put_overlapping_entries, put_noise, put_nothing]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "parts/one.bin"])
def test_a_hostile_or_broken_pickle_of_weights(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], name: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name != "pytorch_model.bin":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path)
    load_model(*find_model(str(folder)), dtype="float32", device="cpu")  # the saved file can be loaded
    spoil(path, tmp_path / "ran")
    found = find_model(str(folder))
    with pytest.raises(
        DamagedError, match=r"(or damaged|not written by torch|weights of .*model).*[Dd]ow|pickle"
    ) as raised:
        load_model(*found, dtype="float32", device="cpu")
    # refused because of the directory, before anything is unpacked
    if spoil in (put_zip_bomb, put_overlapping_entries):
        assert "was not written by torch: " in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_does_not_fit_the_memory_is_refused_before_it_is_built(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = find_model(str(tiny_model))
    model = build_without_numbers(config)
    size = 4 * sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(building, "total_memory", lambda device: size)
    check_memory(model, "some", "float32", "cpu")
    load_model(source, config, dtype="float32", device="cpu")
    monkeypatch.setattr(building, "total_memory", lambda device: size - 1)
    check_memory(model, "some", "bfloat16", "cpu")
    with pytest.raises(UnavailableError, match="the weights of .* take .* in float32, .* Use a machine with more"):
        load_model(source, config, dtype="float32", device="cpu")


def test_a_model_with_too_many_parts_is_not_built_to_the_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = find_model(str(tiny_model))[1]
    model = build_without_numbers(config)
    parts = len(list(model.modules())) + len(list(model.parameters()))
    monkeypatch.setattr(building, "MOST_PARTS", 3 * parts)
    build_without_numbers(config)
    monkeypatch.setattr(building, "MOST_PARTS", parts // 2)
    with pytest.raises(DamagedError, match="cannot build: it has more than .* modules and parameters"):
        build_without_numbers(config)

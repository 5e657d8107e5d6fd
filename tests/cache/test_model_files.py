"""Which files of a folder determine what its model computes, and which files an index may name."""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from sae.cache.model_files import MODEL_SUFFIXES, TOKENIZER_FILES
from sae.cache.models import GivenModel, find_folder, folder_digests
from sae.common.errors import DamagedError

INDEX = "model.safetensors.index.json"


def folder_of(place: Path, **files: str) -> Path:
    """Make a folder with these files. In a name, two underscores stand for a slash and one for a dot."""
    for name, content in files.items():
        path = place / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return place


def sharded(place: Path, *names: str) -> Path:
    """Make a folder whose index names these files. Their contents differ."""
    folder = folder_of(place, config_json="{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"w{n}": name for n, name in enumerate(names)}}))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"tensors of {name}")
    return folder


def test_shards_below_the_folder_belong_to_the_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", "parts/one.safetensors", "parts/more/two.safetensors")
    new, *old = folder_digests(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert folder_digests(moved) == (new, *old)
    (folder / "parts" / "stray.safetensors").write_text("named by nothing")
    assert folder_digests(folder) == (new, *old)
    (folder / "parts" / "more" / "two.safetensors").write_text("others")
    changed, *same = folder_digests(folder)
    assert changed != new and same == old, "what earlier versions recorded did not cover them"
    assert GivenModel(folder).is_base_of({"name": "/old/model", "revision": old[0]})
    assert find_folder({"name": "/old/model", "revision": old[0]}, [str(folder)]) == folder


def test_the_digest_of_files_at_the_top_is_what_it_always_was(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", "one.safetensors", "two.safetensors")
    folder_of(folder, tokenizer_json="{}", vocab_json="{}", merges_txt="a b", vocab_txt="a", trainer__x_json="{}")
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    parts = [name.encode() + sha256((folder / name).read_bytes()).digest() for name in names]
    assert folder_digests(folder) == (sha256(b"".join(parts)).hexdigest(),)


@pytest.mark.parametrize("name", sorted(TOKENIZER_FILES))
def test_a_tokenizer_in_text_files_belongs_to_the_model(tmp_path: Path, name: str) -> None:
    """The exception is a folder with a tokenizer.json, which transformers reads instead of these files."""
    folder = folder_of(tmp_path / "model", config_json="{}", vocab_json="{}", model_safetensors="x")
    without = folder_digests(folder)[0]
    (folder / name).write_text("a b")
    one = folder_digests(folder)
    (folder / name).write_text("b a")
    other = folder_digests(folder)
    assert len({without, one[0], other[0]}) == 3
    assert one[1:] == other[1:] == (without,), "an older cache of this model is still found"
    (folder / "tokenizer.json").write_text("{}")
    with_json = folder_digests(folder)
    (folder / name).write_text("c d")
    assert folder_digests(folder) == with_json and len(with_json) == 1
    (folder / "tokenizer.json").write_text('{"model": 1}')
    assert folder_digests(folder) != with_json


def test_every_file_of_a_tokenizer_of_transformers_is_known() -> None:
    import transformers

    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    named = {
        name
        for path in sources
        for part in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL | re.MULTILINE)
        for name in re.findall(r':\s*"([^"]+)"', part)
    }
    assert len(named) > 10
    assert {name for name in named if Path(name).suffix not in MODEL_SUFFIXES} <= TOKENIZER_FILES


@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.bin", "..\\x.safetensors", "C:\\x.bin", "", "a\0b"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str, index: str, beside: bool) -> None:
    folder = folder_of(tmp_path / "model", config_json="{}", **({"model_safetensors": "x"} if beside else {}))
    (folder / index).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(DamagedError, match=rf"{re.escape(index)} names weights outside the folder of the model: .*Dow"):
        folder_digests(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors"])
def test_a_configuration_that_names_weights_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "model", config_json=json.dumps({"transformers_weights": name}))
    with pytest.raises(DamagedError, match="config.json names weights outside the folder"):
        folder_digests(folder)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "sub/x.safetensors"}))
    before = folder_of(folder, sub__x_safetensors="x") and folder_digests(folder)[0]
    (folder / "sub" / "x.safetensors").write_text("y")
    assert folder_digests(folder)[0] != before


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"w": 3}}', "\xff"]
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, content: str) -> None:
    folder = folder_of(tmp_path / "model", config_json="{}")
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedError, match=re.escape(INDEX)):
        folder_digests(folder)


def test_links_to_files_elsewhere_are_as_the_hub_stores_a_snapshot(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", "one.safetensors")
    before = folder_digests(folder)
    blob = (folder / "one.safetensors").rename(tmp_path / "blob")
    (folder / "one.safetensors").symlink_to(blob)
    assert folder_digests(folder) == before

"""A model in a local folder is the same model wherever the folder lies, and no local path is published."""

import copy
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae.cache import models
from sae.cache.catalog import find_cache
from sae.cache.hooks import Hook
from sae.cache.model_files import deciding_files
from sae.cache.models import GivenModel, find_folder, folder_digests, model_label, same_model
from sae.cache.reader import Cache
from sae.cli.main import app
from sae.common.errors import UsageError
from sae.evaluate import inputs
from sae.evaluate.latents.inspection import open_run
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import run_evaluation
from sae.harvest.model import ModelSource
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import harvest_activations
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.run import train_saes

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"layers": 0, "tokens": 1500, "context": 32, "window": 512, "held_out": 0.2, "device": "cpu"}


def evaluate(run: Path, model: Path | None = None) -> Any:
    config = EvaluateConfig(
        [run], suite="core", tokens=200, references=False, device="cpu", force=True, model=model and str(model)
    )
    return run_evaluation(plan_evaluation(config))[0].results["core"].metrics


def test_a_model_that_moved_is_found(tiny_model: Path, sentences: Path, home: Path) -> None:
    """All commands recognize the model by its files. Only evaluation needs its new folder as an argument."""
    here, there = home / "here", home / "models" / "there"
    shutil.copytree(tiny_model, here)
    cache = harvest_activations(str(here), dataset=sentences, **OPTIONS)
    digest = folder_digests(here)[0]
    assert cache.identity["model"] == {"name": f"here-{digest[:8]}", "revision": digest}
    (run,) = train_saes(["topk"], cache=cache.folder, layers=[0], steps=4, batch_size=64, width=64, device="cpu")
    before = evaluate(run.folder)
    there.parent.mkdir()
    here.rename(there)
    (there / "README.md").write_text("read me")
    (there / ".lock").touch()
    (there / "trainer_state.json").write_text("{}")
    with pytest.raises(UsageError, match=rf"here-.* \(sha256 {digest[:12]}\).*there is no folder .*--model FOLDER"):
        evaluate(run.folder)
    other = shutil.copytree(there, home / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"eos_token_id": 1', '"eos_token_id": 3')
    )
    assert folder_digests(other)[0] != digest
    with pytest.raises(UsageError, match=rf"sha256 {digest[:12]}\), not on .*sha256 {folder_digests(other)[0][:12]}"):
        evaluate(run.folder, other)
    assert evaluate(run.folder, there) == before
    assert evaluate(run.folder) == before, "it is remembered where the folder is"
    (home / "link").symlink_to(there)
    for name in (str(there), "models/there", "link", f"here-{digest[:8]}"):
        assert find_cache(name, Hook(0)).folder == cache.folder
    assert harvest_activations("models/there", dataset=sentences, **OPTIONS).folder == cache.folder


def test_an_export_is_imported_and_evaluated_and_has_no_path_in_it(
    tiny_model: Path, sentences: Path, home: Path
) -> None:
    folder = shutil.copytree(tiny_model, home / "secret" / "mine")
    cache = harvest_activations(str(folder), dataset=sentences, **OPTIONS)
    (run,) = train_saes(["topk"], cache=cache.folder, layers=[0], steps=4, batch_size=64, width=64, device="cpu")
    for fmt in ("saelens", "dictionary-learning", "sparsify"):
        exported = export_sae(run.folder, fmt, home / "exports" / fmt)
        for path in exported.files:
            assert str(home).encode() not in path.read_bytes(), f"{path.name} contains a local path"
        imported = import_sae(exported.folder, name=f"imported-{fmt}")
        assert imported.cache == cache.folder
        assert same_model(imported.sae.origin["model"], cache.identity["model"])
    ours, theirs = evaluate(run.folder), evaluate(home / "runs" / "imported-saelens")
    for name, value in ours["reconstruction_quality"].items():
        assert theirs["reconstruction_quality"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
def test_a_moved_model_is_itself_through_export_import_and_evaluation(
    tiny_model: Path, sentences: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line; at each step the model is in another folder. The second home simulates another machine."""

    def sae(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    def move(name: str) -> Path:
        nonlocal model
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        model = model.rename(home / name)
        return model

    model = shutil.copytree(tiny_model, home / "first" / "mine")
    harvest = ["harvest", "--layer", 0, "--dataset", sentences, "--tokens", 1500, "--context", 32, "--window", 512]
    harvest += ["--held-out", 0.2, "--device", "cpu"]
    sae(*harvest, "--model", model)
    (run,) = train_saes(["topk"], layers=[0], steps=4, batch_size=64, width=64, device="cpu")
    before = evaluate(run.folder)["reconstruction_quality"]
    move("second/mine")
    sae("export", run.folder, "--to", "saelens", "--out", home / "exported")
    monkeypatch.setenv("SAE_HOME", str(home / "other"))
    move("third/place/mine")
    sae(*harvest, "--model", model)
    sae("import", home / "exported", "--name", "theirs")
    move("fourth/mine")
    words = ["evaluate", home / "other" / "runs" / "theirs", "--suite", "core", "--tokens", 200, "--device", "cpu"]
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert refused.exit_code == 2 and "--model FOLDER" in refused.output
    sae(*words, "--model", model)
    after = evaluate(home / "other" / "runs" / "theirs")["reconstruction_quality"]
    assert after == {name: pytest.approx(value, abs=1e-5) for name, value in before.items()}


@pytest.mark.slow
def test_a_model_with_shards_below_its_folder_is_pinned_by_them(
    tiny_model: Path, sentences: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of an earlier version, which pinned only top-level files, can still be evaluated but not continued."""
    folder = shutil.copytree(tiny_model, home / "mine")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[:7], sorted(weights)[7:])):
        file = f"parts/{number}.safetensors"
        (folder / "parts").mkdir(exist_ok=True)
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    new, old = folder_digests(folder)
    monkeypatch.setattr(models, "deciding_files", lambda folder: deciding_files(folder)[1:])
    cache = harvest_activations(str(folder), dataset=sentences, **OPTIONS)
    assert cache.identity["model"]["revision"] == old
    (run,) = train_saes(["topk"], cache=cache.folder, layers=[0], steps=4, batch_size=64, width=64, device="cpu")
    monkeypatch.undo()
    monkeypatch.setenv("SAE_HOME", str(home))

    evaluate(run.folder)
    said: list[str] = []
    again = harvest_activations(str(folder), dataset=sentences, progress=HarvestProgress(say=said.append), **OPTIONS)
    assert again.folder != cache.folder and again.identity["model"]["revision"] == new
    assert any("by an earlier version, whose digest did not include all files" in sentence for sentence in said)
    whole = harvest_activations(str(tiny_model), dataset=sentences, **OPTIONS)
    assert np.array_equal(again.read_chunk("layer_00", 0), whole.read_chunk("layer_00", 0))
    shutil.copy(folder / "parts" / "0.safetensors", folder / "parts" / "1.safetensors")
    assert folder_digests(folder)[0] != new


def test_a_tokenizer_that_changed_is_refused_at_evaluation(
    tiny_model: Path, sentences: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache records a digest of the tokenizer. If only the versions of the libraries differ, a note is printed."""
    cache = harvest_activations(str(tiny_model), dataset=sentences, **OPTIONS)
    (run,) = train_saes(["topk"], cache=cache.folder, layers=[0], steps=4, batch_size=64, width=64, device="cpu")
    before = evaluate(run.folder)
    original = inputs.load_tokenizer

    def load_changed(source: Any) -> Any:
        tokenizer = copy.deepcopy(original(source))
        tokenizer.add_tokens(["<zzz>"])
        return tokenizer

    monkeypatch.setattr(inputs, "load_tokenizer", load_changed)
    expected = cache.identity["tokenizer"][:12]
    refusal = rf"was harvested with a different tokenizer \(sha256 {expected}\) from the one in .*Restore .*--model"
    with pytest.raises(UsageError, match=refusal):
        evaluate(run.folder)
    with pytest.raises(UsageError, match=refusal):
        open_run(run.folder, device="cpu")
    monkeypatch.setattr(inputs, "versions_of_harvest", lambda cache: {"transformers": "4.0.0"})
    config = EvaluateConfig([run.folder], suite="core", tokens=200, references=False, device="cpu", force=True)
    plan = plan_evaluation(config)
    (note,) = [
        line for line in plan.describe() if "differs from the tokenizer of the harvest, although its files" in line
    ]
    assert "the harvest used transformers 4.0.0. Install the same" in note
    assert run_evaluation(plan)[0].results["core"].metrics == before
    monkeypatch.setattr(ModelSource, "is_pinned", False)
    with pytest.raises(UsageError, match=refusal):
        evaluate(run.folder)


def test_a_cache_of_an_earlier_version_has_the_path_as_name_and_shows_it_nowhere(tiny_cache: Cache) -> None:
    old = {"name": "/home/someone/models/mine", "revision": tiny_cache.identity["model"]["revision"]}
    assert model_label(old) == f"mine-{old['revision'][:8]}"
    assert same_model(old, tiny_cache.identity["model"])
    assert not same_model(old, {**old, "revision": "0" * 64})
    assert not same_model(old, {**old, "adapters": [{"name": "lora", "revision": "1"}]})


def test_a_remembered_digest_is_not_trusted_once_a_file_has_changed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size, times and inode are compared. The digest of a file that has just changed is not remembered at all."""
    monkeypatch.setattr(models, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(models, "SETTLED_NS", -1)
    folder = home / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"one")
    first = folder_digests(folder)
    assert models.remembered_path().exists()
    read: list[Path] = []
    original = models.hashlib.file_digest
    monkeypatch.setattr(models.hashlib, "file_digest", lambda f, kind: read.append(f.name) or original(f, kind))
    assert folder_digests(folder) == first and not read
    times = weights.stat().st_mtime_ns
    weights.write_bytes(b"two")
    os.utime(weights, ns=(times, times))
    assert folder_digests(folder) != first and read
    models.remembered_path().write_text("{ torn")
    assert folder_digests(folder) != first
    monkeypatch.setattr(models, "SETTLED_NS", 10**18)
    weights.write_bytes(b"three")
    folder_digests(folder)
    folder_digests(folder)
    assert len(read) >= 4


def test_the_digest_that_an_older_version_recorded_still_means_the_folder(tiny_model: Path, home: Path) -> None:
    """That digest covered every .json, .bin, .model and .safetensors file, whatever had written the file."""
    folder = shutil.copytree(tiny_model, home / "mine")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "notes.txt").write_text("not of the model")

    def digest(names: list[str]) -> str:
        parts = [name.encode() + sha256((folder / name).read_bytes()).digest() for name in names]
        return sha256(b"".join(parts)).hexdigest()

    every = sorted(path.name for path in folder.iterdir() if path.name != "notes.txt")
    own = [name for name in every if name not in ("trainer_state.json", "pytorch_model.bin")]
    assert folder_digests(folder) == (digest(own), digest(every))
    old = {"name": "/home/someone/mine", "revision": digest(every)}
    assert GivenModel(folder).is_model_of(old) and find_folder(old, [str(folder)]) == folder
    (folder / "config.json").write_text("{}")
    assert not GivenModel(folder).is_model_of(old)
    with pytest.raises(UsageError, match="now holds other files"):
        find_folder(old, [str(folder)])

"""A published SAE is evaluated in one command, from a Hub on localhost and from a folder, and is not imported twice."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner, Result

from sae.cache.hooks import Hook
from sae.cli.main import app
from sae.common.errors import LeftOutWarning, UnavailableError, UsageError
from sae.train.formats.import_ import import_sae
from sae.workflows.published import PublishedConfig, check_hook, find_or_import, imported_runs

REPO, FOLDER = "someone/gemma-scope-2-tiny", "resid_post/layer_1_width_64_l0_small"
ADDRESS = f"hf://{REPO}/{FOLDER}"
D, F = 32, 64


def call(*words) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def gemma_scope_2_files(model: str, *, layer: int = 1, seed: int = 0, **config) -> dict[str, bytes]:
    """A JumpReLU SAE that reconstructs each direction twice, in the layout of Gemma Scope 2."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    w_dec = torch.cat([rotation, -rotation])
    tensors = {"w_enc": w_dec.T, "w_dec": w_dec, "b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    tensors["threshold"] = torch.full((F,), 0.05)
    hook = f"model.layers.{layer}.output"
    record = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": F, "model_name": model, "type": "sae"}
    record |= {"architecture": "jump_relu", "l0": 20, "affine_connection": False} | config
    data = save({name: t.contiguous().clone() for name, t in tensors.items()})
    return {"params.safetensors": data, "config.json": json.dumps(record).encode()}


def publish(hub, model: str, *, path: str = FOLDER, commit: str = "a" * 40, **options) -> None:
    files = {f"{path}/{name}": data for name, data in gemma_scope_2_files(model, **options).items()}
    hub.publish(REPO, hub.repositories.get(REPO, {}) | files, commit)


@pytest.fixture
def cached_model(tiny_cache, home) -> str:
    """The name of a model that has a cache in activations/; the cache records this name."""
    (home / "activations").mkdir()
    (home / "activations" / "tiny").symlink_to(tiny_cache.folder)
    return tiny_cache.model


def runs(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "runs").glob("*"))


def test_one_command_imports_and_evaluates_and_the_second_downloads_nothing(local_hub, cached_model, home):
    publish(local_hub, "google/gemma-3-1b-pt")
    words = ("evaluate", ADDRESS, "--model", cached_model, "--suite", "core", "--tokens", 300, "--device", "cpu")
    first = call(*words, "--no-references", "--json")
    assert first.exit_code == 0, first.stderr
    assert len(local_hub.api_requests) == 1 and "blobs=true" in local_hub.api_requests[0]
    assert sorted(local_hub.downloads) == [f"{FOLDER}/config.json", f"{FOLDER}/params.safetensors"]
    (row,) = json.loads(first.stdout)
    assert row["name"] == "gemma-scope-2-tiny--resid_post--layer_1_width_64_l0_small" == runs(home)[0]
    assert f"commit   {REPO} at {'a' * 40}" in first.stderr
    assert re.search(r"^checked  4,096 rows \(from cache ", first.stderr, re.M)
    assert "The files say google/gemma-3-1b-pt; --model" in first.stderr
    record = json.loads((home / "runs" / row["name"] / "run.json").read_text())
    assert record["imported_from"]["revision"] == "a" * 40 and record["imported_from"]["path"] == FOLDER
    again = call(*words, "--no-references", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == [row]
    assert len(local_hub.downloads) == 2 and len(runs(home)) == 1
    assert f"{ADDRESS} at {'a' * 12} was imported earlier: " in again.stderr

    evaluated = {key: value for key, value in row.items() if key != "name"}
    imported = import_sae(ADDRESS, model=cached_model, name="by-hand")
    alone = call("evaluate", imported.folder, *words[4:], "--no-references", "--json")
    assert {key: value for key, value in json.loads(alone.stdout)[0].items() if key != "name"} == evaluated


def test_a_new_commit_is_imported_beside_the_old_one(local_hub, cached_model, home, monkeypatch):
    publish(local_hub, cached_model)
    config = PublishedConfig(model=cached_model)
    (old,) = find_or_import([ADDRESS], config).folders
    publish(local_hub, cached_model, commit="b" * 40, seed=1)
    (new,) = find_or_import([ADDRESS], config).folders
    assert old != new and new.name.startswith(f"{old.name}--") and len(runs(home)) == 2
    downloads = len(local_hub.downloads)
    assert find_or_import([ADDRESS], config).folders == [new]
    requests = len(local_hub.api_requests)
    pinned = f"hf://{REPO}@{'a' * 40}/{FOLDER}"
    assert find_or_import([pinned], config).folders == [old]  # with a full commit hash, the Hub is not asked
    assert (len(local_hub.downloads), len(local_hub.api_requests)) == (downloads, requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines: list[str] = []
    assert find_or_import([ADDRESS], config, lines.append).folders == [new]
    assert "Using the SAE that was imported earlier" in lines[0] and "b" * 12 in lines[1]
    named = f"hf://{REPO}@v1/{FOLDER}"  # offline, the commit of this revision is unknown
    assert isinstance(find_or_import([named], config).refused[named], UnavailableError)
    other = find_or_import(["hf://someone/else"], config)
    assert not other.folders and isinstance(other.refused["hf://someone/else"], UnavailableError)


def test_an_import_under_another_model_or_layer_is_not_taken_for_the_files_own(local_hub, home):
    publish(local_hub, "gpt2")
    (own,) = find_or_import([ADDRESS], PublishedConfig()).folders
    (moved,) = find_or_import([ADDRESS], PublishedConfig(layer=0)).folders
    (other,) = find_or_import([ADDRESS], PublishedConfig(model="someone/fine-tuned")).folders
    assert len({own, moved, other}) == 3 and len(local_hub.downloads) == 6
    configs = {own: PublishedConfig(layer=1, model="gpt2"), moved: PublishedConfig(layer=0)}
    configs[other] = PublishedConfig(model="someone/fine-tuned")
    for folder, config in configs.items():
        assert find_or_import([ADDRESS], config).folders == [folder]
    assert find_or_import([ADDRESS], PublishedConfig()).folders == [own] and len(local_hub.downloads) == 6


def test_one_that_is_refused_does_not_stop_the_others(local_hub, cached_model, home):
    publish(local_hub, cached_model)
    publish(local_hub, cached_model, path="transcoder/layer_1_width_64_l0_small", type="transcoder")
    local_hub.publish("someone/damaged", {f"x/{n}": d for n, d in gemma_scope_2_files(cached_model).items()})
    local_hub.corrupt = {"x/params.safetensors"}
    transcoder = f"hf://{REPO}/transcoder/layer_1_width_64_l0_small"
    options = ("--model", cached_model, "--suite", "core", "--tokens", 300, "--device", "cpu", "--no-references")
    result = call("evaluate", ADDRESS, transcoder, "hf://someone/damaged/x", *options)
    assert result.exit_code == 1 and len(runs(home)) == 1
    assert "but it is not an SAE on a layer: transcoder" in result.stderr
    assert "does not have the checksum that the Hub declares" in result.stderr
    assert "Refused, for the reasons above: 2 runs" in result.stderr
    alone = call("evaluate", transcoder, *options)
    assert alone.exit_code == UsageError.exit_code and alone.stderr.startswith("error: ")


def test_a_dry_run_downloads_nothing(local_hub, cached_model, home):
    publish(local_hub, cached_model)
    result = call("evaluate", ADDRESS, "--dry-run")
    assert result.exit_code == 0 and not local_hub.downloads and not runs(home)
    assert re.search(rf"^import   {ADDRESS} at a{{12}}: 0.0 MB to download$", result.stderr, re.M)


def test_without_a_cache_the_command_that_makes_one_is_named(local_hub, home):
    hook = "model.layers.3.self_attn.o_proj.input"
    where = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "context_size": 512}
    publish(local_hub, "google/gemma-3-1b-pt", layer=3, path="attn_out/layer_3_width_64_l0_small", **where)
    result = call("evaluate", f"hf://{REPO}")
    command = "sae harvest --model google/gemma-3-1b-pt --layer 3 --site attn_z --context 512"
    command += " --tokens 1M --held-out 0.5"
    assert result.exit_code == UsageError.exit_code and result.stderr.rstrip().endswith(command)
    assert len(runs(home)) == 1  # the import is kept, and found when the cache is there
    asked = call(*command.split()[1:], "--dry-run")  # every flag is accepted: only the model does not exist here
    assert asked.stderr.startswith("error: There is no model google/gemma-3-1b-pt on the Hub")


def test_a_folder_of_another_library_is_imported_once(cached_model, tiny_cache, home):
    folder = home / "downloaded"
    folder.mkdir()
    for name, data in gemma_scope_2_files(cached_model).items():
        (folder / name).write_bytes(data)
    words = ("evaluate", folder, "--model", cached_model, "--suite", "core", "--tokens", 300, "--device", "cpu")
    first = call(*words, "--no-references", "--json")
    assert first.exit_code == 0, first.stderr
    (name,) = runs(home)
    again = call(*words, "--no-references", "--json", "--cache", tiny_cache.folder)
    assert runs(home) == [name] and "is unchanged since it was imported" in again.stderr
    assert json.loads(again.stdout) == json.loads(first.stdout)
    changed = gemma_scope_2_files(cached_model, seed=1)["params.safetensors"]
    (folder / "params.safetensors").write_bytes(changed)
    assert len({*find_or_import([str(folder)], PublishedConfig(model=cached_model)).folders, home / "runs" / name}) == 2


def test_a_cache_of_another_layer_serves_as_text(local_hub, cached_model, tiny_cache, home):
    """`--cache` names text to evaluate on. Its activations verify the import only if they are from the SAE's hook."""
    publish(local_hub, cached_model, layer=0)
    lines: list[str] = []
    given = PublishedConfig(model=cached_model, cache=tiny_cache.folder)
    assert find_or_import([ADDRESS], given, lines.append).folders
    assert any("from cache" in line for line in lines)
    deep = PublishedConfig(model="another/model", layer=7, cache=tiny_cache.folder)
    found = find_or_import([ADDRESS], deep, lines.append)
    assert found.folders and "synthetic" in lines[-2]


def test_a_layer_or_width_that_a_model_on_this_machine_has_not_is_refused_at_once(tiny_model, local_hub, home):
    check_hook("gemma-2-mini", Hook(25), 128)
    check_hook("nobody/knows-this-model", Hook(99), 3)
    check_hook(str(tiny_model), Hook(1, "attn_z"), 4096)
    with pytest.raises(UsageError, match="belongs to layer 99, but gemma-2-mini has the layers 0 to 25"):
        check_hook("gemma-2-mini", Hook(99), 128)
    with pytest.raises(UsageError, match="of width 4096, but .* has width 32 at mlp_out of layer 1"):
        check_hook(str(tiny_model), Hook(1, "mlp_out"), 4096)
    publish(local_hub, str(tiny_model))
    for words in (("import", ADDRESS, "--layer", 99), ("evaluate", ADDRESS, "--layer", 99)):
        result = call(*words, "--model", tiny_model)
        assert result.exit_code == UsageError.exit_code and "has the layers 0 to 1" in result.stderr
    assert not runs(home)


def test_a_damaged_run_does_not_stop_the_search_for_imported_ones(home):
    """It is named in a note."""
    folder = home / "runs" / "torn"
    folder.mkdir(parents=True)
    for name in ("run.json", "sae.json"):
        (folder / name).write_text('{"imported')
    with pytest.warns(LeftOutWarning, match="runs/torn is left out: .*run.json cannot be read"):
        assert list(imported_runs(PublishedConfig())) == []


def test_run_folders_and_other_texts_stay_as_they_are(home):
    (home / "runs" / "mine").mkdir(parents=True)
    (home / "runs" / "mine" / "sae.json").write_text("{}")
    (home / "runs" / "mine" / "sae.safetensors").write_bytes(b"")
    texts = ["runs/mine", "runs"]
    assert find_or_import(texts, PublishedConfig()).folders == [Path(text) for text in texts]
    result = call("evaluate", "runs")
    assert result.exit_code == UsageError.exit_code and "contains no trained SAE" in result.stderr


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("nowhere", "Train one with `sae train`, or give hf://owner/repo/folder."),
        ("runs/misspelt", "Train one with `sae train`, or give hf://owner/repo/folder."),
        ("", "Train one with `sae train`, or give hf://owner/repo/folder."),
        ("lab/res", "For an SAE on the Hub, give hf://lab/res/folder."),
        ("lab/res/layer_12/l0_5", "For an SAE on the Hub, give hf://lab/res/layer_12/l0_5."),
        ("hf:/lab/res/layer_12", "For an SAE on the Hub, give hf://lab/res/layer_12."),
        ("https://huggingface.co/lab/res/tree/main/layer_12", "For an SAE on the Hub, give hf://lab/res/layer_12."),
        ("https://hf.co/lab/res/tree/v1/layer_12", "For an SAE on the Hub, give hf://lab/res@v1/layer_12."),
    ],
)
def test_what_is_neither_there_nor_an_address(text, advice, home):
    (home / "runs").mkdir()
    found = find_or_import([text], PublishedConfig())
    assert not found.folders and str(found.refused[text]) == f"There is no run folder {text!r}. {advice}"


def test_every_text_that_is_refused_is_named(tiny_cache, home):
    """This holds even if nothing that remains can be evaluated."""
    (home / "empty").mkdir()
    shown = call("evaluate", "nowhere", "empty").stderr
    assert "There is no run folder 'nowhere'" in shown and "empty contains no trained SAE" in shown

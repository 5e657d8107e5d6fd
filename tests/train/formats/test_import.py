"""The run folder that an import creates, and where its model, layer and cache come from."""

import json

import pytest

from sae.cli.convert import describe_import
from sae.common.errors import UsageError
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.sae import SAE, load_sae


def test_the_run_folder_records_its_origin(export_with_config, tmp_path):
    imported = import_sae(export_with_config("gated", "saelens"), out=tmp_path)
    record = json.loads((imported.folder / "run.json").read_text())
    assert record["variant"] == load_sae(imported.folder).origin["variant"] == "imported-gated"
    assert record["imported_from"]["format"] == "saelens"
    assert set(record["imported_from"]["sha256"]) == {"cfg.json", "sae_weights.safetensors"}
    assert all(len(digest) == 64 for digest in record["imported_from"]["sha256"].values())
    assert record["check"]["passed"] and record["metadata"]["training_architecture"] == "gated"
    with pytest.raises(UsageError, match="already exists: run `sae evaluate"):
        import_sae(tmp_path / "foreign", out=tmp_path)
    assert import_sae(tmp_path / "foreign", out=tmp_path, name="again").folder == tmp_path / "again"
    with pytest.raises(UsageError, match="Invalid --name '../elsewhere'"):
        import_sae(tmp_path / "foreign", out=tmp_path, name="../elsewhere")
    with pytest.raises(UsageError, match=r"Invalid --name 'two\\nlines'"):
        import_sae(tmp_path / "foreign", out=tmp_path, name="two\nlines")
    with pytest.raises(UsageError, match="is already a run folder of this package"):
        import_sae(imported.folder, out=tmp_path)


def test_model_and_layer_can_be_overridden_with_a_note(export_with_config, tmp_path):
    imported = import_sae(export_with_config("relu", "saelens"), model="gpt2", layer=3, out=tmp_path)
    assert (imported.sae.origin["model"]["name"], imported.sae.origin["layer"]) == ("gpt2", 3)
    assert imported.notes == [
        "The files say layer 12; --layer 3 overrides it.",
        "The files say google/gemma-2-2b; --model gpt2 overrides it.",
    ]


def test_a_cache_is_found_or_given_and_has_to_fit(make_sae, sparse_cache, tmp_path, monkeypatch):
    sae = make_sae("relu")
    with pytest.raises(UsageError, match="has rows of width 32, but the SAE has d_in 8"):
        folder = export_sae(sae, "saelens", tmp_path / "small").folder
        import_sae(folder, model="synthetic", layer=0, cache=sparse_cache.folder, out=tmp_path)
    with pytest.raises(UsageError, match="has activations of synthetic, but the SAE is for google/gemma-2-2b"):
        import_sae(folder, layer=0, cache=sparse_cache.folder, out=tmp_path)
    wide = SAE(32, 64)
    wide.origin = {"model": {"name": "synthetic"}, "layer": 0}
    folder = export_sae(wide, "saelens", tmp_path / "wide").folder
    imported = import_sae(folder, cache=sparse_cache.folder, out=tmp_path)
    assert imported.check.description == f"from cache {sparse_cache.folder.name}"
    assert imported.sae.origin["fingerprint"] == sparse_cache.fingerprint
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "one").symlink_to(sparse_cache.folder)
    assert import_sae(folder, out=tmp_path, name="found").cache == tmp_path / "activations" / "one"
    (tmp_path / "activations" / "two").symlink_to(sparse_cache.folder)
    two = import_sae(folder, out=tmp_path, name="two")
    assert two.candidates == [tmp_path / "activations" / name for name in ("one", "two")]
    (*_, following) = describe_import(two)
    assert following.endswith(f"two --cache {two.candidates[0]}") and "no cache of this" not in str(
        describe_import(two)
    )
    assert two.cache is None and "2 caches contain layer 0 of synthetic, so none was chosen" in two.notes[0]


def test_a_folder_without_an_sae_is_rejected_naming_the_expected_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="sae_weights.safetensors \\(saelens\\).*found nothing"):
        import_sae(tmp_path / "empty")
    with pytest.raises(UsageError, match="No such folder"):
        import_sae(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes.txt is not a file of a known format"):
        import_sae(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("to", "file", "key"),
    [
        ("saelens", "cfg.json", "metadata"), ("gemma-scope", "about.json", None),
        ("dictionary-learning", "config.json", "about"), ("sparsify", "layers.12/about.json", None),
    ],
)  # fmt: skip
def test_the_origin_records_what_the_files_say_about_the_text(foreign_folder, tmp_path, to, file, key):
    path = foreign_folder(to) / file

    def import_with(name: str, **text):
        config = json.loads(path.read_text())
        recorded = config[key] if key else config
        for old in ("prepend_bos", "dataset_path", "context_size"):
            recorded.pop(old, None)
        recorded.update(text)
        path.write_text(json.dumps(config))
        return import_sae(tmp_path / to, model="gpt2", layer=0, out=tmp_path, name=name).sae.origin

    said = import_with("said", prepend_bos=False, context_size=1024, dataset_path="monology/pile-uncopyrighted")
    assert (said["prepend_bos"], said["context"], said["dataset"]) == (False, 1024, "monology/pile-uncopyrighted")
    silent = import_with("silent")
    assert "prepend_bos" not in silent and "dataset" not in silent
    odd = import_with("odd", prepend_bos="yes", context_size=True, dataset_path="a\x1b[2J")
    assert "prepend_bos" not in odd and "dataset" not in odd and odd["context"] is not True

"""`sae import --list`: the table of a release, grouping, filters, refused entries, and what is downloaded."""

import json

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import UsageError
from sae.train.formats.listing import MAX_CONFIGS, group_pattern, list_release, span, widths

GEMMA, QWEN = "google/gemma-scope-2-1b-pt", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def gemma_scope_2(hub):
    """516 SAEs named as in Gemma Scope 2, 30 transcoders and a crosscoder; each weights file has 1,000 bytes."""
    for site, layers in (("resid_post_all", 26), ("mlp_out_all", 26), ("attn_out_all", 26), ("resid_post", 4)):
        for layer in range(layers):
            for width in ("16k", "262k") if layers == 26 else ("16k", "65k", "262k", "1m"):
                for l0 in ("small", "medium", "big"):
                    add(hub, f"{site}/layer_{layer}_width_{width}_l0_{l0}/params.safetensors")
    for layer in range(30):
        add(hub, f"transcoder_all/layer_{layer}_width_16k_l0_small_affine/params.safetensors")
    for part in range(4):
        add(hub, f"crosscoder/layer_7_13_17_22_width_65k_l0_medium/params_layer_{part}.safetensors")
    add(hub, "README.md")
    return hub


def add(hub, name: str, data: bytes = bytes(1000)) -> None:
    path = hub.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if name.endswith("params.safetensors"):
        (path.parent / "config.json").write_text("{}")


def test_hundreds_of_saes_are_grouped_from_one_request(gemma_scope_2):
    release = list_release(GEMMA)
    assert len(release.saes) == 3 * 26 * 6 + 4 * 12 == 516
    assert release.refused == {"transcoder": 30, "crosscoder": 1}
    assert gemma_scope_2.requests == [(GEMMA, None, True)] and not gemma_scope_2.downloads
    heads, rows = release.table()
    assert len(rows) == 18 + 12 and heads[:2] == ["paths", "SAEs"]
    by_path = {row[0]: row[1:] for row in rows}
    assert by_path["resid_post_all/layer_*_width_16k_l0_small"] == (
        "26", "gemma-scope-2", "0-25", "resid_post", "16,384", "small", "0.0 MB",
    )  # fmt: skip
    assert by_path["attn_out_all/layer_*_width_262k_l0_big"][3:5] == ("attn_z", "262,144")


def test_filters_leave_single_saes_with_an_address_that_is_importable(gemma_scope_2):
    release = list_release(f"hf://{GEMMA}/resid_post_all", layer=12, width="16k")
    assert [sae.path for sae in release.saes] == [
        f"resid_post_all/layer_12_width_16k_l0_{label}" for label in ("big", "medium", "small")
    ]
    assert release.address(release.saes[0]) == f"hf://{GEMMA}/resid_post_all/layer_12_width_16k_l0_big"
    heads, rows = release.table()
    assert heads == ["path", "format", "layer", "site", "latents", "L0", "size"]
    assert rows[2][1:6] == ("gemma-scope-2", "12", "resid_post", "16,384", "small")
    assert len(list_release(GEMMA, site="attn_z", layer=3).saes) == 6
    assert list_release(GEMMA, layer=99).saes == []
    with pytest.raises(UsageError, match="Invalid --width many"):
        list_release(GEMMA, width="many")


def test_the_command_prints_a_table_or_json(gemma_scope_2):
    table = call("import", "--list", GEMMA)
    assert table.exit_code == 0, table.stderr
    assert f"516 SAEs in {GEMMA} at 0123456789ab" in table.stdout and len(table.stdout.splitlines()) < 40
    assert "Not SAEs and not importable: 1 crosscoder, 30 transcoders." in table.stderr
    record = json.loads(call("import", "--list", GEMMA, "--layer", 12, "--site", "mlp_out", "--json").stdout)
    assert record["commit"] == gemma_scope_2.commit and record["refused"] == {"transcoder": 30, "crosscoder": 1}
    assert len(record["saes"]) == 6 and record["saes"][0] == {
        "path": "mlp_out_all/layer_12_width_16k_l0_big",
        "address": f"hf://{GEMMA}/mlp_out_all/layer_12_width_16k_l0_big",
        "format": "gemma-scope-2",
        "model": "google/gemma-3-1b-pt",
        "layer": 12,
        "site": "mlp_out",
        "d_sae": 16384,
        "l0": "big",
        "bytes": 1002,
        "files": [f"mlp_out_all/layer_12_width_16k_l0_big/{name}" for name in ("params.safetensors", "config.json")],
    }
    few = call("import", "--list", GEMMA, "--layer", 12, "--width", "1m")
    assert few.exit_code == 0 and "No SAE in" in few.stderr
    for words, sentence in (
        ((GEMMA, "--width", "16k"), "--width, --site and --json need --list"),
        (("--list", GEMMA, "--name", "x"), "--list imports nothing and does not accept"),
        (("--list", "no/such/folder"), "There is no folder no/such/folder. Give a folder, owner/repo, or hf://"),
    ):
        refused = call("import", *words)
        assert refused.exit_code == UsageError.exit_code and sentence in refused.stderr


def test_qwen_scope_has_one_file_for_each_layer(hub):
    for layer in (0, 1, 10, 2):
        add(hub, f"layer{layer}.sae.pt")
    add(hub, "config.json", b"{}")
    release = list_release(QWEN)
    assert [sae.path for sae in release.saes] == [f"layer{n}.sae.pt" for n in (0, 1, 2, 10)]
    (record,) = (r for r in release.records() if r["layer"] == 10)
    assert record["address"] == f"hf://{QWEN}/layer10.sae.pt" and record["files"] == ["layer10.sae.pt", "config.json"]
    assert (record["model"], record["d_sae"], record["l0"]) == ("Qwen/Qwen3-1.7B-Base", 32768, "50")
    assert not hub.downloads


def test_configs_are_read_only_where_paths_say_nothing_and_only_some(hub):
    for number in range(MAX_CONFIGS + 10):
        add(hub, f"sae_{number}/sae_weights.safetensors")
        hook = {"model_name": "gpt2-small", "hook_name": f"blocks.{number}.hook_mlp_out"}
        add(hub, f"sae_{number}/cfg.json", json.dumps({"d_sae": 24576, "d_in": 768, "metadata": hook}).encode())
    add(hub, "broken/sae_weights.safetensors")
    add(hub, "broken/cfg.json", b"[")
    release = list_release("me/mine")
    assert len(release.saes) == MAX_CONFIGS + 11 and len(hub.downloads) == MAX_CONFIGS
    assert {name.rsplit("/", 1)[1] for _, name, _ in hub.downloads} == {"cfg.json"}
    known = [sae.description for sae in release.saes if sae.description.hook]
    assert len(known) == MAX_CONFIGS - 1  # the broken config is among those read
    assert (known[0].model, known[0].hook.site, known[0].d_sae) == ("gpt2", "mlp_out", 24576)
    # An SAE of unknown layer or width matches no filter for it.
    assert [sae.path for sae in list_release("me/mine", layer=3).saes] == ["sae_3"]
    assert [sae.path for sae in list_release("me/mine", layer=3, width="24k").saes] == ["sae_3"]
    assert list_release("me/mine", width="16k").saes == []


def test_a_local_folder_is_listed_without_runs_of_this_package(foreign_folder, tmp_path):
    for to in ("saelens", "sparsify", "dictionary-learning", "gemma-scope-2", "qwen-scope"):
        foreign_folder(to)
    (tmp_path / "run").mkdir()
    for name in ("sae.json", "sae.safetensors", "cfg.json"):
        (tmp_path / "run" / name).write_text("{}")
    records = {r["path"]: r for r in list_release(str(tmp_path)).records()}
    assert set(records) == {
        "saelens", "sparsify/layers.12", "dictionary-learning", "gemma-scope-2", "qwen-scope/layer12.sae.pt",
    }  # fmt: skip
    assert all((r["layer"], r["d_sae"]) == (12, 16) for p, r in records.items() if not p.startswith("qwen"))
    assert records["qwen-scope/layer12.sae.pt"]["layer"] == 12
    assert records["saelens"]["address"] == str(tmp_path / "saelens")
    with pytest.raises(UsageError, match="contains no SAE of a known format"):
        list_release(str(tmp_path / "run"))


def test_first_generation_gemma_scope(hub):
    for path in ("layer_12/width_16k/average_l0_82", "layer_5/width_16k/average_l0_9", "embedding/width_4k/l0_6"):
        add(hub, f"{path}/params.npz")
    release = list_release("google/gemma-scope-2b-pt-res")
    assert [(s.path, s.description.hook.layer, s.description.l0) for s in release.saes] == [
        ("layer_5/width_16k/average_l0_9", 5, "9"),
        ("layer_12/width_16k/average_l0_82", 12, "82"),
    ]
    assert release.refused == {"embedding SAE": 1}
    assert list_release("google/gemma-scope-2b-pt-transcoders").refused == {"transcoder": 3}


def test_labels():
    assert 16384 in widths("16k") and 65536 in widths("65k") and 81920 in widths("80K") and widths("1000") == {1000}
    assert 1048576 in widths("1m")
    assert group_pattern("layers.12.mlp/trainer_3") == "layers.*.mlp/trainer_*"
    assert (span([0, 1, 2]), span([5, 12, 19]), span([None])) == ("0-2", "5, 12, 19", "-")
    assert span(range(0, 20, 2)) == "0 ... 18"

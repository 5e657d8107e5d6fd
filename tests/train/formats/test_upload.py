"""Uploads to the Hub, with a fake client: nothing is uploaded without confirmation, and uploads can be imported."""

from pathlib import Path

import pytest

from sae.common.errors import Interrupted, UsageError
from sae.train.formats.import_ import import_sae
from sae.train.formats.upload import upload_sae
from sae.train.sae import save_sae

from ...run_records import write_result_record, write_run_record


@pytest.fixture
def run(make_sae, tmp_path) -> Path:
    folder = tmp_path / "runs" / "batchtopk-L12"
    sae = make_sae("jumprelu", unit=True)
    save_sae(sae, folder, {**sae.origin, "variant": "batchtopk", "seed": 3})
    write_run_record(
        folder, variant="batchtopk", seed=3, d_in=sae.d_in, d_sae=sae.d_sae, resolved={"k": 32, "aux": None},
        cache="c0ffee" + "0" * 58, cache_folders=["/home/me"],
    )  # fmt: skip
    for name, metrics in (
        (
            "core",
            {
                "sparsity": {"l0": 80.5},
                "masked_sparsity": {"l0": 31.96},  # without outlier rows
                "reconstruction_quality": {"explained_variance": 1.2, "fve": 0.4},  # `explained_variance` is SAEBench's
                "masked_reconstruction_quality": {"explained_variance": 0.8, "fve": 0.91234},
            },
        ),
        ("sparse_probing_stdlib", {"sae": {"sae_top_1_test_accuracy": -1.0}}),
        ("tpp_stdlib", {"tpp_metrics": {"tpp_threshold_20_total_metric": 0.25}}),
    ):
        write_result_record(folder, name, eval_result_metrics=metrics)
    return folder


def test_a_saelens_export_and_a_card_are_uploaded_after_confirmation(hub, run):
    lines: list[str] = []

    def confirm(question: str) -> bool:
        assert not hub.uploads
        files = [line.split()[1] for line in lines if line.startswith("file")]
        assert files == ["README.md", "cfg.json", "sae_weights.safetensors"]
        assert question == "Upload these 3 files to https://huggingface.co/me/mine (private if new)?"
        return True

    url = upload_sae(run, "me/mine", private=True, confirm=confirm, say=lines.append)
    assert url == f"https://huggingface.co/me/mine at {hub.commit}"
    (first, repo, private), (second, target, files) = hub.uploads
    assert (first, repo, private, second, target) == ("create", "me/mine", True, "folder", "me/mine")
    card = files["README.md"].decode()
    assert card.startswith(
        '---\nlibrary_name: "saelens"\ntags: ["sparse-autoencoder", "saelens"]\nbase_model: "google/gemma-2-2b"\n---\n'
    )
    for line in (
        "# batchtopk on gemma-2-2b, blocks.12.hook_resid_post",
        "| L0 (active latents per token) | 31.96 |",
        "| explained variance | 0.9123 |",
        "sae import hf://me/mine",
        "| k | 32 |",
        f"| cache_digest | c0ffee{'0' * 58} |",
        "relative error",
    ):
        assert line in card, line
    assert "probing" not in card and "TPP" not in card and "| aux |" not in card
    assert b"/home/me" not in b"".join(files.values()) and b"/tmp" not in b"".join(files.values())


def test_nothing_is_uploaded_without_confirmation(hub, run):
    with pytest.raises(Interrupted, match="nothing was uploaded"):
        upload_sae(run, "me/mine", confirm=lambda question: False)
    assert not hub.uploads
    with pytest.raises(UsageError, match="Invalid --repo mine: expected owner/name"):
        upload_sae(run, "mine", confirm=lambda question: True)


def test_an_upload_can_be_imported(hub, run, tmp_path):
    upload_sae(run, "me/mine", confirm=lambda question: True)
    for name, data in hub.uploads[1][2].items():
        (hub.folder / name).write_bytes(data)
    imported = import_sae("hf://me/mine", out=tmp_path / "again")
    assert sorted(name for _, name, _ in hub.downloads) == ["cfg.json", "sae_weights.safetensors"]
    assert (imported.sae.origin["model"]["name"], imported.sae.origin["layer"]) == ("google/gemma-2-2b", 12)

"""Imports from the Hub, with a fake client: what is requested, downloaded, verified and rejected."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sae.common.errors import DamagedError, UnavailableError, UsageError
from sae.train.formats.hub import HubAddress, choose_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.release import RemoteFile

GEMMA_SCOPE = "google/gemma-scope-2b-pt-res"
FOLDER = "layer_12/width_16k/average_l0_82"


def test_only_the_needed_files_are_downloaded_from_one_commit(hub, foreign_folder, tmp_path):
    source = foreign_folder("gemma-scope", "jumprelu")
    (source / "about.json").unlink()
    hub.add(FOLDER, source)
    hub.add("layer_13/width_16k/average_l0_83", source)
    lines: list[str] = []
    imported = import_sae(f"hf://{GEMMA_SCOPE}@main/{FOLDER}", say=lines.append, out=tmp_path / "runs")
    assert hub.requests == [(GEMMA_SCOPE, "main", True)]
    assert hub.downloads == [(GEMMA_SCOPE, f"{FOLDER}/params.npz", hub.commit)]
    assert lines[0] == f"commit   {GEMMA_SCOPE} at {hub.commit}"
    assert lines[1].startswith(f"file     {FOLDER}/params.npz (")
    assert (imported.sae.origin["model"]["name"], imported.sae.origin["layer"]) == ("google/gemma-2-2b", 12)
    record = json.loads((imported.folder / "run.json").read_text())["imported_from"]
    assert (record["repository"], record["revision"], record["path"]) == (GEMMA_SCOPE, hub.commit, FOLDER)
    assert "/tmp" not in json.dumps(record)


def test_sparsify_downloads_the_config_above_which_names_the_model(hub, foreign_folder, tmp_path):
    source = foreign_folder("sparsify", "topk")
    (source / "layers.12" / "about.json").unlink()
    hub.add("", source)
    imported = import_sae("hf://EleutherAI/sae-things/layers.12", out=tmp_path / "runs")
    assert sorted(name for _, name, _ in hub.downloads) == [
        "config.json",
        "layers.12/cfg.json",
        "layers.12/sae.safetensors",
    ]
    assert (imported.sae.origin["model"]["name"], imported.sae.origin["layer"]) == ("google/gemma-2-2b", 12)


def test_a_folder_is_needed_only_in_a_repository_with_several_saes(hub, foreign_folder, tmp_path):
    hub.add("a/b", foreign_folder("saelens", "relu"))
    assert import_sae("hf://me/mine", out=tmp_path / "runs").format == "saelens"
    hub.add("c", tmp_path / "saelens")
    with pytest.raises(UsageError, match="me/mine contains 2 SAEs. Choose one:\n  hf://me/mine/a/b\n  hf://me/mine/c"):
        import_sae("hf://me/mine")
    with pytest.raises(UsageError, match="me/mine/nothing contains no SAE of a known format"):
        import_sae("hf://me/mine/nothing")


def test_a_download_with_another_checksum_is_rejected(hub, foreign_folder, tmp_path, monkeypatch):
    hub.add("", foreign_folder("saelens", "relu"))
    download = hub.download

    def download_corrupted(repo, filename, revision, local_dir):
        path = Path(download(repo, filename, revision, local_dir))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_corrupted)
    with pytest.raises(DamagedError, match="does not have the checksum that the Hub declares"):
        import_sae("hf://me/mine", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "a/../../b.json", "a\\..\\b", "a\x1b[2Jb"])
def test_a_repository_with_unsafe_names_is_rejected(hub, foreign_folder, name):
    hub.add("", foreign_folder("saelens", "relu"))
    hub.extra_names = [name]
    with pytest.raises(UsageError, match="Refused: me/mine contains .*, which points outside its folder"):
        import_sae("hf://me/mine")
    assert not hub.downloads


@pytest.mark.parametrize("text", ["hf://one", "hf://", "hf://a/b/../../c", "hf://a b/c", "hf:///x/y"])
def test_invalid_addresses_are_rejected(hub, text):
    with pytest.raises(UsageError, match="Invalid address .*: expected hf://owner/repo/folder"):
        import_sae(text)
    assert not hub.requests


def test_addresses():
    assert HubAddress.parse("hf://a/b") == ("a/b", None, "")
    assert HubAddress.parse("hf://a/b@v1/c/d/") == ("a/b", "v1", "c/d")
    files = [RemoteFile("c/params.npz", 1, None), RemoteFile("c/README.md", 1, None)]
    assert choose_sae(HubAddress("a/b", None, "c/params.npz"), files).files == (files[0],)


class UnknownClientError(Exception):
    """A stand-in for an exception of the HTTP client that is not an OSError."""


def client_error(error_type: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, status_code=404, request=None, text="", json=dict)
    try:
        return error_type("no", response=response)  # type: ignore[call-arg]
    except TypeError:
        return error_type("no")


@pytest.mark.parametrize(
    ("client_error_type", "error_type", "message"),
    [
        (GatedRepoError, UnavailableError, "me/mine is gated: accept its license"),
        (RepositoryNotFoundError, UnavailableError, "me/mine was not found on the Hub"),
        (RevisionNotFoundError, UsageError, "me/mine has no such revision"),
        (ConnectionError, UnavailableError, "Could not reach the Hub for me/mine: no"),
        (UnknownClientError, UnavailableError, "Could not reach the Hub for me/mine: no"),
    ],
)
def test_the_clients_errors_are_translated(hub, monkeypatch, client_error_type, error_type, message):
    def fail(*_: Any, **__: Any) -> None:
        raise client_error(client_error_type)

    monkeypatch.setattr(hub, "model_info", fail)
    with pytest.raises(error_type) as raised:
        import_sae("hf://me/mine")
    assert message in str(raised.value)

"""The Hub, with its client replaced where it would go out: what is asked for, what is shown, what leaves and what does not."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sae.common.errors import DamagedError, Interrupted, UnavailableError, UsageError
from sae.train.formats.export import export_sae
from sae.train.formats.hub import HubAddress, RemoteFile, select_files
from sae.train.formats.import_ import import_sae
from sae.train.formats.upload import upload_sae
from sae.train.sae import save_sae

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GEMMA = "google/gemma-scope-2b-pt-res"
PLACE = "layer_12/width_16k/average_l0_82"


class Hub:
    """One repository in a folder, and a record of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.fetched, self.uploaded = folder, [], [], []
        self.names: list[str] | None = None

    def add(self, place: str, source: Path) -> None:
        shutil.copytree(source, self.folder / place, dirs_exist_ok=True)

    # huggingface_hub.HfApi
    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        self.asked.append((repo, revision, files_metadata))
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        siblings = [
            SimpleNamespace(
                rfilename=path.relative_to(self.folder).as_posix(), size=path.stat().st_size,
                lfs=SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()) if path.suffix != ".json" else None,
            )
            for path in found
        ]  # fmt: skip
        siblings += [SimpleNamespace(rfilename=name, size=1, lfs=None) for name in self.names or ()]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.uploaded.append(("create", repo, private))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        files = {path.name: path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()}
        self.uploaded.append(("folder", repo_id, files))
        return SimpleNamespace(oid=COMMIT)

    # huggingface_hub.hf_hub_download
    def download(self, repo: str, filename: str, revision: str, local_dir: Path) -> str:
        self.fetched.append((repo, filename, revision))
        (target := Path(local_dir) / filename).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / filename, target)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    there = Hub(tmp_path / "hub")
    there.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: there)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", there.download)
    return there


@pytest.fixture
def theirs(make_sae, tmp_path):
    return lambda kind, to: export_sae(make_sae(kind, unit=True), to, tmp_path / f"{kind}-{to}").folder


# --- import ---------------------------------------------------------------------------------------------------------


def test_only_what_the_format_needs_is_fetched_from_one_commit_after_it_was_shown(hub, theirs, tmp_path):
    source = theirs("jumprelu", "gemma-scope")
    (source / "about.json").unlink()
    hub.add(PLACE, source)
    hub.add("layer_13/width_16k/average_l0_83", source)
    said: list[str] = []
    made = import_sae(f"hf://{GEMMA}@main/{PLACE}", say=said.append, out=tmp_path / "runs")
    assert hub.asked == [(GEMMA, "main", True)]
    assert hub.fetched == [(GEMMA, f"{PLACE}/params.npz", COMMIT)]
    assert said[0] == f"commit   {GEMMA} at {COMMIT}" and said[1].startswith(f"file     {PLACE}/params.npz (")
    assert (made.sae.origin["model"]["name"], made.sae.origin["layer"]) == ("google/gemma-2-2b", 12)
    record = json.loads((made.folder / "run.json").read_text())["imported_from"]
    assert (record["repository"], record["revision"], record["path"]) == (GEMMA, COMMIT, PLACE)
    assert "/tmp" not in json.dumps(record)


def test_sparsify_brings_the_run_above_it_which_names_the_model(hub, theirs, tmp_path):
    source = theirs("topk", "sparsify")
    (source / "layers.12" / "about.json").unlink()
    hub.add("", source)
    made = import_sae("hf://EleutherAI/sae-things/layers.12", out=tmp_path / "runs")
    assert sorted(name for _, name, _ in hub.fetched) == [
        "config.json",
        "layers.12/cfg.json",
        "layers.12/sae.safetensors",
    ]
    assert (made.sae.origin["model"]["name"], made.sae.origin["layer"]) == ("google/gemma-2-2b", 12)


def test_a_repository_with_one_sae_needs_no_folder_and_one_with_several_lists_them(hub, theirs, tmp_path):
    hub.add("a/b", theirs("relu", "saelens"))
    assert import_sae("hf://me/mine", out=tmp_path / "runs").format == "saelens"
    hub.add("c", tmp_path / "relu-saelens")
    with pytest.raises(UsageError, match="me/mine holds 2 SAEs. Choose one:\n  hf://me/mine/a/b\n  hf://me/mine/c"):
        import_sae("hf://me/mine")
    with pytest.raises(UsageError, match="me/mine/nothing holds no SAE of a known format"):
        import_sae("hf://me/mine/nothing")


def test_a_file_that_did_not_come_as_promised_is_refused(hub, theirs, tmp_path, monkeypatch):
    hub.add("", theirs("relu", "saelens"))
    whole = hub.download

    def other(repo, filename, revision, local_dir):
        path = Path(whole(repo, filename, revision, local_dir))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", other)
    with pytest.raises(DamagedError, match="does not have the checksum that the Hub declares"):
        import_sae("hf://me/mine", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "a/../../b.json", "a\\..\\b", "a\x1b[2Jb"])
def test_a_repository_with_names_that_leave_it_is_refused(hub, theirs, name):
    hub.add("", theirs("relu", "saelens"))
    hub.names = [name]
    with pytest.raises(UsageError, match="Refused: me/mine holds .*, which leads out of its folder"):
        import_sae("hf://me/mine")
    assert not hub.fetched


@pytest.mark.parametrize("text", ["hf://one", "hf://", "hf://a/b/../../c", "hf://a b/c", "hf:///x/y"])
def test_what_is_no_place_on_the_hub_is_refused(hub, text):
    with pytest.raises(UsageError, match="Invalid address .*: expected hf://owner/repo/folder"):
        import_sae(text)
    assert not hub.asked


def test_addresses():
    assert HubAddress.parse("hf://a/b") == ("a/b", None, "")
    assert HubAddress.parse("hf://a/b@v1/c/d/") == ("a/b", "v1", "c/d")
    files = [RemoteFile("c/params.npz", 1, None), RemoteFile("c/README.md", 1, None)]
    assert select_files(HubAddress("a/b", None, "c/params.npz"), files) == files[:1]


class Unheard(Exception):
    """What the client of HTTP raises, which is not always an OSError."""


def answered(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, status_code=404, request=None, text="", json=dict)
    try:
        return kind("no", response=response)  # type: ignore[call-arg]
    except TypeError:
        return kind("no")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (GatedRepoError, UnavailableError, "me/mine is gated: accept its licence"),
        (RepositoryNotFoundError, UnavailableError, "me/mine was not found on the Hub"),
        (RevisionNotFoundError, UsageError, "me/mine has no such revision"),
        (ConnectionError, UnavailableError, "Could not reach the Hub for me/mine: no"),
        (Unheard, UnavailableError, "Could not reach the Hub for me/mine: no"),
    ],
)
def test_what_the_hub_can_answer_is_a_sentence(hub, monkeypatch, error, kind, sentence):
    def fail(*_: Any, **__: Any) -> None:
        raise answered(error)

    monkeypatch.setattr(hub, "model_info", fail)
    with pytest.raises(kind) as raised:
        import_sae("hf://me/mine")
    assert sentence in str(raised.value)


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make_sae, tmp_path) -> Path:
    folder = tmp_path / "runs" / "batchtopk-L12"
    sae = make_sae("jumprelu", unit=True)
    save_sae(sae, folder, {**sae.origin, "variant": "batchtopk", "seed": 3})
    (folder / "run.json").write_text(json.dumps({"resolved": {"k": 32, "aux": None}, "cache": "c0ffee", "cache_folders": ["/home/me"]}))  # fmt: skip
    (folder / "evaluations").mkdir()
    for name, metrics in (
        ("core", {"sparsity": {"l0": 31.96}, "reconstruction_quality": {"explained_variance": 0.91234}}),
        ("sparse_probing_stdlib", {"sae": {"sae_top_1_test_accuracy": -1.0}}),
        ("tpp_stdlib", {"tpp_metrics": {"tpp_threshold_20_total_metric": 0.25}}),
    ):
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps({"eval_result_metrics": metrics}))
    return folder


def test_a_saelens_directory_and_a_card_go_out_after_the_question(hub, run):
    said: list[str] = []

    def confirm(question: str) -> bool:
        assert not hub.uploaded
        assert [line.split()[1] for line in said if line.startswith("file")] == ["README.md", "cfg.json", "sae_weights.safetensors"]  # fmt: skip
        assert question == "Upload these 3 files to https://huggingface.co/me/mine (private if new)?"
        return True

    url = upload_sae(run, "me/mine", private=True, confirm=confirm, say=said.append)
    assert url == f"https://huggingface.co/me/mine at {COMMIT}"
    (first, repo, private), (second, target, files) = hub.uploaded
    assert (first, repo, private, second, target) == ("create", "me/mine", True, "folder", "me/mine")
    card = files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "saelens"\ntags: ["sparse-autoencoder", "saelens"]\nbase_model: "google/gemma-2-2b"\n---\n')  # fmt: skip
    for line in (
        "# batchtopk on gemma-2-2b, blocks.12.hook_resid_post",
        "| L0 (active latents per token) | 31.96 |",
        "| explained variance | 0.9123 |",
        "| TPP, 20 latents, on texts of Python's standard library | 0.25 |",
        "sae import hf://me/mine",
        "| k | 32 |",
        "| cache_digest | c0ffee |",
        "relative error",
    ):
        assert line in card, line
    assert "probing" not in card and "| aux |" not in card
    assert b"/home/me" not in b"".join(files.values()) and b"/tmp" not in b"".join(files.values())


def test_nothing_leaves_when_the_answer_is_no_or_nobody_can_give_one(hub, run):
    with pytest.raises(Interrupted, match="nothing was uploaded"):
        upload_sae(run, "me/mine", confirm=lambda question: False)
    assert not hub.uploaded
    with pytest.raises(UsageError, match="Invalid --repo mine: expected owner/name"):
        upload_sae(run, "mine", confirm=lambda question: True)


def test_what_goes_out_comes_back(hub, run, tmp_path):
    upload_sae(run, "me/mine", confirm=lambda question: True)
    for name, data in hub.uploaded[1][2].items():
        (hub.folder / name).write_bytes(data)
    made = import_sae("hf://me/mine", out=tmp_path / "again")
    assert sorted(name for _, name, _ in hub.fetched) == ["cfg.json", "sae_weights.safetensors"]
    assert (made.sae.origin["model"]["name"], made.sae.origin["layer"]) == ("google/gemma-2-2b", 12)

"""Commands with an address: each refusal is one sentence, and no credential is printed, recorded or uploaded."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae.cache import object_store
from sae.cache.object_store import open_store
from sae.cli.main import app
from sae.cli.options import refuse_addresses
from sae.common.addresses import SCHEMES
from sae.common.errors import UsageError

from ..faulty_proxy import faulty_proxy
from ..object_store import SECRET

TOKEN = "fake-session-token-that-no-file-may-hold"
ADDRESS_SECRET = "hunter2-in-the-address"


def sae(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def harvest(tiny_model: Path, sentences: Path) -> list[object]:
    words = ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--context", 32, "--device", "cpu"]
    return [*words, "--tokens", 300, "--window", 256, "--out"]


def assert_nowhere(secrets: tuple[str, ...], folder: Path, *texts: str) -> None:
    """Assert that no secret occurs in a file under the folder, in the name of a file, or in a text."""
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in content or secret in str(path) for secret in secrets), path
    assert not any(secret in text for secret in secrets for text in texts)


def test_no_credential_is_written_or_printed(
    harvest: list[object], bucket: str, home: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    url = f"{bucket}/pile"
    code, told = sae(*harvest, url)
    assert code == 0 and f"--cache {url}" in told
    printed = [told] + [sae("cache", command, url)[1] for command in ("list", "info", "verify", "repair")]
    with faulty_proxy(s3_endpoint, lambda request: "403") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        code, told = sae("cache", "verify", url)
        assert code == 4 and "the store refused the credentials (403 InvalidAccessKeyId)" in told.replace("\n", " ")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    store = open_store(url)
    objects = [store.get(key).decode("latin-1") for key, _ in store.list()]
    assert len(objects) > 20
    assert_nowhere((SECRET, TOKEN), home, *printed, told, *objects)


@pytest.mark.parametrize("address", ["s3://me:{}@bucket/pile", "s3://bucket/pile?X-Amz-Signature={}", "https://h/p#{}"])
def test_an_address_with_a_credential_is_refused_and_not_repeated(
    harvest: list[object], address: str, home: Path, bucket: str
) -> None:
    url = address.format(ADDRESS_SECRET)
    train = ["train", "--variant", "topk", "--layer", 0, "--cache", url]
    tools = (["cache", command, url] for command in ("list", "info", "verify", "repair", "rm"))
    for words in ([*harvest, url], train, *tools):
        code, told = sae(*words)
        assert code == 2 and "Give credentials in the environment" in told.replace("\n", " "), told
        assert_nowhere((ADDRESS_SECRET,), home, told)


@pytest.mark.slow
def test_what_is_refused_in_one_sentence(harvest: list[object], bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(code: int, sentence: str, url: str) -> None:
        for words in ([*harvest, url], ["cache", "verify", url]):
            found, told = sae(*words)
            assert found == code and sentence in " ".join(told.split()), told
            assert "Traceback" not in told and "Debug source" not in told

    refused(4, "the bucket does not exist (404 NoSuchBucket). Create it, or correct the address.", "s3://no-bucket/p")
    refused(2, "unknown scheme ftp://: expected s3://", "ftp://host/pile")
    refused(2, "names no bucket", "s3://")
    refused(2, "s3:/b/p is not an address: expected s3://b/p.", "s3:/b/p")
    code, told = sae(*harvest, "https://host/pile")
    assert code == 2 and "https://host/pile can only be read. To write, use one of s3://," in told.replace("\n", " ")
    code, told = sae("cache", "list", "piles")
    assert code == 2 and "piles is not an address: expected one such as s3://bucket/prefix." in told.replace("\n", " ")
    train = ["train", "--variant", "topk", "--cache", f"{bucket}/pile"]
    for words in (
        ["export", "run", "--to", "saelens", "--cache"], ["import", "files", "--cache"],
        ["reproduce", "003", "--cache"],
        ["export", "run", "--to", "saelens", "--out"], ["import", "files", "--out"], ["dashboard", "run", "--out"],
        [*train, "--out"], [*train, "--local-folder"], ["train", "--resume"],
        ["compare", "runs/a"],
        ["evaluate", "runs/a", "--data"], ["evaluate"], ["import"],
    ):  # fmt: skip
        code, told = sae(*words, "s3://bucket/pile")
        assert code == 2 and "s3://bucket/pile is an address, but only a path on a disk" in " ".join(told.split()), told
    assert not list(Path().glob("s3:*"))
    monkeypatch.setattr(object_store, "RETRY", {**object_store.RETRY, "max_retries": 0})
    monkeypatch.setattr(object_store, "PAUSE", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # as without a network
    refused(4, "the store cannot be reached or stopped answering", f"{bucket}/pile")
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setattr("sae.common.packages.installed_version", lambda name: None)
    refused(4, "needs obstore, which is not installed: pip install 'sae-pipeline[remote]'", f"{bucket}/pile")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_only_a_folder_can_stand_an_address_is_refused(scheme: str) -> None:
    address = f"{scheme}://{'/' * (scheme == 'file')}bucket/pile"
    for value in (Path(address), [Path("runs"), Path(address)]):
        with pytest.raises(UsageError, match=f"^{address} is an address, but only a path on a disk is accepted here"):
            refuse_addresses([None, value])
    refuse_addresses([address, Path(f"activations/{scheme}"), [Path("runs")], None])

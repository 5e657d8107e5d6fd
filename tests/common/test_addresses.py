"""An address where only a path on a disk is accepted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import sae
from sae.common.addresses import disk_path
from sae.common.errors import UsageError
from sae.common.files import sae_home


@pytest.mark.parametrize(
    "call",
    [
        lambda address: sae.load_sae(address),
        lambda address: sae.import_sae(address),
        lambda address: sae.import_sae("files", cache=address),
        lambda address: sae.import_sae("files", out=address),
        lambda address: sae.export_sae(address, "saelens"),
        lambda address: sae.train_saes("relu", out=address),
        lambda address: sae.train_controls([address]),
        lambda address: sae.evaluate_saes([address]),
        lambda address: sae.evaluate_saes(["runs/a"], data=address),
        lambda address: sae.evaluate_saes(["runs/a"], controls=[address]),
    ],
)
def test_functions_refuse_an_address_as_it_was_given(call: Callable[[str], object]) -> None:
    with pytest.raises(UsageError, match="^s3://bucket/pile is an address, but only a path on a disk is accepted"):
        call("s3://bucket/pile")
    assert not os.listdir()


def test_the_home_folder_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_HOME", "s3://bucket/home")
    with pytest.raises(UsageError, match="^SAE_HOME=s3://bucket/home is an address"):
        sae_home()


@pytest.mark.parametrize("address", ["s3://me:secret@bucket/pile", "gs://bucket/pile?key=secret", "az://c/p#secret"])
def test_a_credential_is_not_repeated(address: str) -> None:
    for given in (address, Path(address)):
        with pytest.raises(UsageError) as refused:
            disk_path(given)
        assert f"{address[:2]}://... is an address" in str(refused.value) and "secret" not in str(refused.value)


def test_what_only_looks_like_an_address_is_a_path() -> None:
    for name in ("s3", "s3/pile", "my-s3:/pile", "./s3:/pile", "activations/http"):
        assert disk_path(name) == Path(name)

"""Records that were written are read back, and changed records are never read silently."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec
import pytest

from sae.common import records
from sae.common.errors import DamagedError
from sae.common.records import RecordKind, UncheckedRecordWarning


class Inner(TypedDict):
    name: str
    values: list[float]


class Example(TypedDict):
    step: int
    inner: Inner
    note: NotRequired[str]


KIND = RecordKind(Example, "Write it again.")
CONTENT: dict[str, Any] = {
    "step": 3,
    "inner": {"name": "né\ud800", "values": [1, 0.1, 1e300]},
    "newer": {"field": [None]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    KIND.write(tmp_path / "example.json", CONTENT)
    return tmp_path / "example.json"


def test_what_is_written_is_read(path: Path) -> None:
    assert KIND.read(path) == CONTENT


def test_the_digest_is_the_sha256_of_the_sorted_content(path: Path) -> None:
    text = r'{"inner":{"name":"n\u00e9\ud800","values":[1,0.1,1e+300]},"newer":{"field":[null]},"step":3}'
    assert json.loads(path.read_text())["content_digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_another_layout_of_the_same_content_is_read(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert KIND.read(path) == CONTENT


def test_every_flipped_bit_is_found_or_changes_nothing(path: Path) -> None:
    data, unnoticed = path.read_bytes(), []
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            content = KIND.read(path)
        except DamagedError:
            continue
        if content != CONTENT:
            unnoticed.append(bit)
    assert not unnoticed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": "3", "inner": CONTENT["inner"]}, r"expected `int`, got `str` - at `\$.step`"),
        ({"step": True, "inner": CONTENT["inner"]}, r"expected `int`, got `bool` - at `\$.step`"),
        ({"step": 3, "inner": {"name": "x", "values": [None]}}, r"got `null` - at `\$.inner.values\[0\]`"),
        ({"step": 3}, "missing required field `inner`"),
        ([3], "expected `object`, got `array`"),
        (None, "expected `object`, got `null`"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(path: Path, content: Any, message: str) -> None:
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=message):
        KIND.read(path)
    if isinstance(content, dict):
        with pytest.raises(msgspec.ValidationError):
            KIND.write(path, content)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"step": ' + b"9" * 5000 + b"}", "integer"),
        (b'{"step": 3', "Expecting ',' delimiter"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_not_json_is_refused(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"example.json cannot be read \(.*{message}.*Write it again\."):
        KIND.read(path)


def test_a_missing_record_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="nothing.json is missing. Write it again."):
        KIND.read(tmp_path / "nothing.json")


def test_an_edit_is_refused_until_the_digest_is_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_warned", False)
    content = json.loads(path.read_text()) | {"step": 4}
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match="does not match its content_digest.*delete 'content_digest' from the file"):
        KIND.read(path)
    del content["content_digest"]
    path.write_text(json.dumps(content))
    with pytest.warns(UncheckedRecordWarning, match="example.json has no content_digest.*`sae cache repair` adds"):
        assert KIND.read(path)["step"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KIND.read(path)  # one warning per process is enough


@pytest.mark.parametrize("digest", ["", "0" * 64, 0, False, [], {}])
def test_whatever_stands_in_place_of_the_digest_is_compared(path: Path, digest: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content_digest": digest}))
    with pytest.raises(DamagedError, match="does not match its content_digest"):
        KIND.read(path)


def test_the_digest_can_stand_in_an_object_and_cover_a_part(tmp_path: Path) -> None:
    kind = RecordKind(Example, "Write it again.", digest_in="inner", covered=lambda content: content["inner"])
    path = tmp_path / "example.json"
    kind.write(path, CONTENT)
    written = json.loads(path.read_text())
    assert set(written["inner"]) == {"name", "values", "content_digest"} and kind.read(path) == CONTENT
    path.write_text(json.dumps(written | {"step": 5}))
    assert kind.read(path)["step"] == 5
    written["inner"]["name"] = "another"
    path.write_text(json.dumps(written))
    with pytest.raises(DamagedError, match="content_digest"):
        kind.read(path)


def test_a_record_is_written_again_only_if_it_changes(path: Path) -> None:
    before = path.stat().st_mtime_ns, path.stat().st_ino
    KIND.write_if_changed(path, CONTENT)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    KIND.write_if_changed(path, CONTENT | {"step": 4})
    assert KIND.read(path)["step"] == 4
    path.write_text("{")
    KIND.write_if_changed(path, CONTENT)
    assert KIND.read(path) == CONTENT

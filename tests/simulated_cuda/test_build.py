"""Where the simulated GPU cannot be built, its tests are skipped, with the reason."""

from pathlib import Path

import pytest

from . import build
from .build import CannotSimulate, build_hooks


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotSimulate, match=r"there is no C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX"):
        build_hooks(tmp_path)


def test_with_one_that_cannot_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no header of torch' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CannotSimulate, match=r"cannot build cuda_hooks\.cpp:\nno header of torch"):
        build_hooks(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_it_is_built_once_for_a_torch_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    first = build_hooks(tmp_path / "cache")
    assert build_hooks(tmp_path / "cache") == first and first.exists()
    assert (tmp_path / "calls").read_text() == "x\n"
    monkeypatch.setattr(build, "find_torch", lambda: (tmp_path, "2.99.0"))
    assert build_hooks(tmp_path / "cache") != first


def test_with_a_torch_that_has_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_torch", lambda: (tmp_path, "2.13.0+cu130"))
    with pytest.raises(CannotSimulate, match=r"torch 2\.13\.0\+cu130 has a CUDA of its own"):
        build_hooks(tmp_path)

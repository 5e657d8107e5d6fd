"""Check that other libraries compute the same from our exports, and that we compute the same from their files.

    python -m venv env-saelens && env-saelens/bin/pip install sae-lens==6.54.12 torch==2.13.0
    python -m venv env-dl && env-dl/bin/pip install --no-deps dictionary-learning==0.1.0
    env-dl/bin/pip install torch==2.13.0 einops numpy safetensors tqdm
    python -m venv env-sparsify && env-sparsify/bin/pip install eai-sparsify==1.3.3 torch==2.13.0
    python -m venv env-saebench && env-saebench/bin/pip install sae-bench==0.6.0 sae-lens==6.28.2 torch==2.13.0

    python benchmarks/peers/formats.py RUNS... \
        --library saelens=env-saelens/bin/python --library saelens=env-saebench/bin/python \
        --library dictionary_learning=env-dl/bin/python --library sparsify=env-sparsify/bin/python \
        --library saebench=env-saebench/bin/python

Every run is exported to every format that can store it. Each library loads the exports that it can read, and encodes
and decodes 4,096 rows of the run's cache in float64. Latents and reconstructions are compared with those of the run:
latents that are active on one side only, and the relative error |ours - theirs| / |ours|. Then each library writes SAEs
of its own classes with random weights, and we import and compare them. Every library loads files as its users do, but
files that would come from the Hub are read from the folder. `--fixtures` writes small versions of the exports and of
the libraries' files for tests/train/formats.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.common.errors import UsageError
from sae.train.formats.base import Format
from sae.train.formats.canonical import CanonicalSAE, from_canonical
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.verify import sample_run_rows
from sae.train.sae import SAE, load_sae, save_sae

WORKER = Path(__file__).with_name("formats_worker.py")
SMALL = (8, 16)


class Peer(NamedTuple):
    library: str
    python: str


class Agreement(NamedTuple):
    mismatches: int  # (row, latent) pairs active on one side only
    f: float
    x_hat: float

    def __str__(self) -> str:
        return f"{max(self.f, self.x_hat):.0e}" + (f", {self.mismatches} on one side only" if self.mismatches else "")


def agreement(sae: SAE, x_RD: Tensor, path: Path) -> Agreement:
    theirs, sae64 = load_file(path), sae.double()
    with torch.no_grad():
        f_RF = torch.cat([sae64.encode(x) for x in x_RD.double().split(256)])
        recon_RD = sae64.decode(f_RF, x_RD.double())
    mismatches = int(((f_RF != 0) != (theirs["f"] != 0)).sum())
    return Agreement(mismatches, relative_error(f_RF, theirs["f"]), relative_error(recon_RD, theirs["x_hat"]))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


def run_worker(peer: Peer, action: str, folder: Path, request: Any, x_RD: Tensor) -> str:
    """Let a library's worker read or write, and return the library's name and version."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    save_file({"x": x_RD}, folder / "rows.safetensors")
    subprocess.run([peer.python, str(WORKER), peer.library, action, str(folder)], check=True)
    return json.loads((folder / "about.json").read_text())["library"]


def compare_exports(runs: list[Path], peers: list[Peer], work: Path) -> list[tuple[str, str, str, dict[str, str]]]:
    """For each run and format: recipe, activation chain, format, and the agreement with each library."""
    made: dict[str, tuple[Path, str, Any]] = {}
    lines: dict[str, dict[str, str]] = {}
    for run in runs:
        for to in Format.exported():
            name = f"{run.name}--{to}"
            try:
                made[name] = (run, to, export_sae(run, to, work / "exports" / name))
                lines[name] = {}
            except UsageError:
                continue
    _, rows = sample_run_rows(load_sae(runs[0]).origin, load_hook(runs[0]), None)
    assert rows is not None, "the cache of the runs was not found"
    requests = {name: {"format": to, "folder": str(m.folder)} for name, (_, to, m) in made.items()}
    for number, peer in enumerate(peers):
        folder = work / f"read-{number}"
        library = run_worker(peer, "read", folder, requests, rows.x_RD)
        for name, (run, _, _) in made.items():
            if (answer := folder / f"{name}.safetensors").exists():
                lines[name][library] = str(agreement(load_sae(run), rows.x_RD, answer))
                answer.unlink()
    return [(run.name.split("-L")[0], chain_name(made[n][2]), to, lines[n]) for n, (run, to, _) in made.items()]


def load_hook(run: Path) -> Any:
    from sae.train.formats.metadata import run_hook

    return run_hook(load_sae(run))


def chain_name(exported: Any) -> str:
    return exported.metadata["training_architecture"]


def compare_imports(peers: list[Peer], work: Path, x_RD: Tensor, d_sae: int) -> list[tuple[str, str, str, str]]:
    """For each SAE that a library wrote: library, case, the variant it was imported as, and the agreement."""
    lines = []
    for number, peer in enumerate(peers):
        folder = work / f"write-{number}"
        library = run_worker(peer, "write", folder, {"d_sae": d_sae}, x_RD)
        for case in sorted(path.parent for path in folder.glob("*/outputs.safetensors")):
            (outputs := case / "outputs.safetensors").rename(kept := work / f"{number}-{case.name}.safetensors")
            made = import_sae(case, out=work / "runs", name=f"{number}-{case.name}")
            found = agreement(made.sae, x_RD, kept)
            kept.rename(outputs)
            lines.append((library, case.name, made.sae.origin["variant"], str(found)))
    return lines


def fixtures(peers: list[Peer], folder: Path, work: Path) -> None:
    """Small SAEs with every activation, the libraries' outputs for our exports, and the libraries' own files."""
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    D, F = SMALL
    x_RD = torch.randn(16, D, generator=generator)
    draw = lambda *shape: 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W_dec = draw(F, D)
    matrices = (draw(D, F), 0.2 * draw(F), W_dec / W_dec.norm(dim=1, keepdim=True), draw(D))
    ours = {
        "relu": CanonicalSAE(*matrices, "relu"),
        "topk": CanonicalSAE(*matrices, "topk", k=4),
        "jumprelu": CanonicalSAE(*matrices, "jumprelu", threshold=draw(F).abs()),
        "gated": CanonicalSAE(*matrices, "gated", r_mag=draw(F), b_mag=draw(F)),
    }
    requests, made = {}, {}
    for name, canonical in ours.items():
        run = folder / "ours" / name
        save_sae(
            from_canonical(canonical, pre_bias=name in ("relu", "topk")),
            run,
            {"layer": 12, "model": {"name": "google/gemma-2-2b"}},
        )
        for to, fmt in ((to, Format.registry[to]) for to in Format.exported()):
            if canonical.convert_to(fmt.activations):
                made[f"{name}--{to}"] = export_sae(run, to, work / "small" / f"{name}--{to}")
                requests[f"{name}--{to}"] = {"format": to, "folder": str(made[f"{name}--{to}"].folder)}
    save_file({"x": x_RD}, folder / "rows.safetensors")
    for number, peer in enumerate(peers):
        for action, request in (("read", requests), ("written", {"d_sae": F})):
            place = work / f"small-{action}-{number}"
            library = run_worker(peer, "read" if action == "read" else "write", place, request, x_RD).replace(" ", "-")
            answers = {name: place / f"{name}.safetensors" for name in requests}
            if action == "written":
                answers = {path.parent.name: path for path in place.glob("*/outputs.safetensors")}
            found = {name: load_file(path) for name, path in sorted(answers.items()) if path.exists()}
            if not found:
                continue
            for path in answers.values() if action == "written" else ():
                path.unlink()
                shutil.copytree(path.parent, folder / action / library / path.parent.name)
            # Stored in float32, since the errors that the tests look for are far larger.
            outputs = {f"{name}.{what}": t.float() for name, both in found.items() for what, t in both.items()}
            (folder / action).mkdir(exist_ok=True)
            save_file(outputs, folder / action / f"{library}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--library", action="append", required=True, metavar="NAME=PYTHON")
    parser.add_argument("--fixtures", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = [Peer(*text.split("=", 1)) for text in options.library]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        if options.fixtures:
            fixtures(peers, options.fixtures, work)
            return
        lines = compare_exports(options.runs, peers, work)
        libraries = list(dict.fromkeys(library for *_, found in lines for library in found))
        print("| recipe | activation | format | " + " | ".join(libraries) + " |\n|" + "---|" * (3 + len(libraries)))
        for recipe, kind, to, found in lines:
            print(f"| {recipe} | {kind} | {to} | " + " | ".join(found.get(library, "") for library in libraries) + " |")
        sae = load_sae(options.runs[0])
        _, rows = sample_run_rows(sae.origin, load_hook(options.runs[0]), None)
        assert rows is not None
        print("\n| written by | SAE | imported as | agreement |\n|---|---|---|---|")
        for line in compare_imports(peers, work, rows.x_RD / rows.x_RD.norm(dim=1).mean() * 4, 4 * sae.d_in):
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()

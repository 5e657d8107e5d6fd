"""Compare SAELens' mean correlation coefficient (arXiv 2505.20254) with our decoder PW-MCC on pairs of decoders.

    python -m venv env-saelens
    env-saelens/bin/pip install sae-lens==6.54.12

    python benchmarks/peers/stability_reference.py env-saelens/bin/python
    python benchmarks/peers/stability_reference.py env-saelens/bin/python --fixtures tests/evaluate/fixtures/stability

Prints both numbers for each pair and the largest difference. `--fixtures` writes the decoders and SAELens' numbers,
with which tests/evaluate/metrics/test_stability.py compares ours. stability_worker.py runs SAELens. No peer computes
the correlation of activations, the null or the recurring latents.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.evaluate.metrics.latent_matching import match_latents

SHAPES = {"narrow": (12, 30), "square": (24, 24), "wide": (60, 10)}  # d_sae, d_in


def make_decoders() -> dict[str, Tensor]:
    """Pairs of decoders: random pairs, and pairs that share half of their rows, permuted, with flipped signs and
    rescaled."""
    generator = torch.Generator().manual_seed(0)
    decoders = {}
    for name, (latents, width) in SHAPES.items():
        one, other = (torch.randn(latents, width, generator=generator) for _ in range(2))
        decoders |= {f"{name}.one": one, f"{name}.other": other}
        shared = torch.randperm(latents, generator=generator)[: latents // 2]
        scale = torch.randn(len(shared), 1, generator=generator)
        mixed = torch.cat([one[shared] * scale, other[: latents - len(shared)]])
        decoders |= {f"{name}-shared.one": one, f"{name}-shared.other": mixed}
    return {name: decoder.contiguous().clone() for name, decoder in decoders.items()}


def our_mcc(one: Tensor, other: Tensor) -> float:
    one, other = (torch.nn.functional.normalize(decoder, dim=1) for decoder in (one, other))
    return match_latents(lambda rows: one[rows] @ other.T, len(one)).total / len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="Python of the environment with SAELens")
    parser.add_argument("--fixtures", type=Path, help="folder to write the decoders and SAELens' numbers to")
    arguments = parser.parse_args()
    decoders = make_decoders()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "decoders.safetensors"
        save_file(decoders, file)
        command = [arguments.python, str(Path(__file__).with_name("stability_worker.py")), str(file)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAELens ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ours = {name: our_mcc(decoders[f"{name}.one"], decoders[f"{name}.other"]) for name in found["mcc"]}
    print(f"| decoders | SAELens {found['sae-lens']} | ours |\n|---|---|---|")
    for name, theirs in found["mcc"].items():
        print(f"| {name} | {theirs:.7f} | {ours[name]:.7f} |")
    print(f"largest difference: {max(abs(ours[name] - theirs) for name, theirs in found['mcc'].items()):.1e}")
    if arguments.fixtures:
        arguments.fixtures.mkdir(parents=True, exist_ok=True)
        save_file(decoders, arguments.fixtures / "decoders.safetensors")
        (arguments.fixtures / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Folders, files, small disks, models and text for the faults."""

import contextlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.command import Command


def read_files(folder: Path | str) -> dict[str, bytes]:
    """The bytes of every file in a folder, except hidden files such as the lock."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def same_bytes(folder: Path | str, original: str = "whole", leaving_out: str = "") -> bool:
    one, other = read_files(folder), read_files(original)
    return {n: data for n, data in one.items() if n != leaving_out} == {
        n: data for n, data in other.items() if n != leaving_out
    }


def copy_folder(name: str, original: str = "whole") -> Path:
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(original, name))


def count_commits(folder: Path) -> int:
    return len(list(folder.glob("commits/*.json")))


def wait_until(command: Command, reached: Callable[[], bool]) -> bool:
    while not reached():
        if not command.running:
            return False
        time.sleep(0.0005)
    return True


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


@contextlib.contextmanager
def disk(name: str, size: str) -> Iterator[Path | None]:
    """A small file system; None where mounting is not permitted."""
    Path(name).mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name]
    if subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield Path(name)
    finally:
        subprocess.run(["umount", name], check=True)


def remount(name: str, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", name], check=True)


def make_model(folder: str, seed: int) -> None:
    """A random Gemma 2 of two blocks with gemma-2-mini's tokenizer, as in tests/conftest.py."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from sae.harvest.mini import WEIGHTS

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.2)
    if folder == "nan":
        model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS, trust_remote_code=False).save_pretrained(folder)


def spoil_weights() -> None:
    import safetensors.torch

    Path("bare/model.safetensors").unlink()
    truncate(Path("torn/model.safetensors"))
    weights = safetensors.torch.load_file("lacking/model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    safetensors.torch.save_file(weights, "lacking/model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path("wide/config.json").read_text())
    Path("wide/config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def make_text() -> list[dict[str, str]]:
    words = "the quick brown fox jumps over a lazy dog while seven zebras quietly read their yellow books".split()
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(words, k=rng.randrange(20, 200)))} for _ in range(120)]
    Path("sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("long.txt").write_text("\n\n".join(" ".join(rng.choices(words, k=30_000)) for _ in range(4)))
    return rows

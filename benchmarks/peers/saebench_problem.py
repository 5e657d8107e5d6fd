"""The inputs for SAEBench and for our metrics: a model, three SAEs, contexts, two tables of labeled texts, and words.

Everything follows from a seed. The small problem has a model with planted first letters, and SAEs in which some of them
are absorbed, so that no metric is trivial. The large problem is for timing, on a given model.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from sae.harvest.mini import WEIGHTS
from sae.harvest.mini.spelling import SpellingWord, spelling_prompt, spelling_words
from sae.harvest.model import find_model, load_model
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae
from sae.train.variants.jumprelu import JumpReLU

PAD, EOS, BOS = 0, 1, 2
KINDS = ("relu", "topk", "jumprelu")
BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"


class Size(NamedTuple):
    """The sizes of a problem. `train` and `test` are SAEBench's set sizes: numbers of texts for one binary task."""

    d_sae: int
    k: int
    layer: int
    context: int  # tokens of a context of core, and the most tokens of a text
    contexts_per_batch: int
    reconstruction_batches: int
    sparsity_batches: int
    train: int
    test: int
    words_per_letter: int


SMALL = Size(512, 16, 0, 12, 4, 2, 3, 72, 72, 30)

# A table has two columns of labels: classes, and an attribute. One pair of classes is for SCR; the other classes are
# probed.
TABLES: dict[str, dict[str, Any]] = {
    BIOS: {"text": "hard_text", "class": "profession", "attribute": "gender", "probed": [0, 1, 2, 6, 9],
           "pair": {"professor": 21, "nurse": 13}, "values": [0, 1]},
    AMAZON: {"text": "text", "class": "category", "attribute": "rating", "probed": [1, 2, 3, 5, 6],
             "pair": {"Books": 24, "CDs_and_Vinyl": 26}, "values": [1.0, 5.0]},
}  # fmt: skip


def make_problem(folder: Path, size: Size, seed: int, model: Path | None = None) -> None:
    """Write everything into `folder`. The model is a copy of `model`, or the planted model if `model` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(model or WEIGHTS)
    known = usable(spelling_words(tokenizer), tokenizer)
    letters_AD = None
    if model is None:
        letters_AD = make_model(folder, known, seed)
        shutil.copy(WEIGHTS / "tokenizer.json", folder)
    else:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(model / name, folder)
    spaced = [word.text for word in known if word.text.startswith(" ") and len(word.text) > 3]
    tables = {name: make_table(table, spaced, size, rng) for name, table in TABLES.items()}
    (folder / "tables.json").write_text(json.dumps(tables))
    contexts = make_contexts([word.token for word in known], size, rng)
    make_saes(folder, contexts, letters_AD, size, seed)
    save_file({"tokens": contexts.to(torch.int32)}, folder / "contexts.safetensors")
    chosen = [
        w for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for w in [w for w in known if w.letter == a][: size.words_per_letter]
    ]
    about = {"seed": seed, **size._asdict(), "words": [word.text for word in sorted(chosen)]}
    (folder / "problem.json").write_text(json.dumps(about))


def usable(known: list[SpellingWord], tokenizer: Any) -> list[SpellingWord]:
    """The distinct words that are one token in a prompt, so that all prompts have the same length."""
    found, seen = [], set()
    around = [word for word in known if word.text.startswith(" ") and len(word.text) > 3][:2]
    lengths = [len(ids) for ids in tokenizer([spelling_prompt(around, word) for word in known])["input_ids"]]
    asked = tokenizer([spelling_prompt([word], around[0]) for word in known])["input_ids"]
    shown = [len(ids) for ids in asked]
    for word, length, other in zip(known, lengths, shown, strict=True):
        if length == min(lengths) and other == min(shown) and word.text not in seen:
            seen.add(word.text)
            found.append(word)
    return found


def make_model(folder: Path, known: list[SpellingWord], seed: int) -> Tensor:
    """A Gemma 2 of two blocks and width 32, exact in bfloat16, with a direction for each first letter (26, 32)."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=BOS,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    letters_AD = torch.linalg.qr(torch.randn(32, 32)).Q[:26].contiguous()
    strength_A = torch.linspace(0.4, 2.0, 26)  # letters early in the alphabet are hard to read from the activations
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.08 if "embed" in name else 0.2)
            elif "post" in name:
                parameter.fill_(-0.7)  # a block adds less than a third of what it would otherwise add
        for word in known:
            letter = ord(word.letter) - ord("A")
            model.model.embed_tokens.weight[word.token] += strength_A[letter] * letters_AD[letter]
    model.to(torch.bfloat16).save_pretrained(folder)
    return letters_AD


def make_saes(folder: Path, contexts: Tensor, letters_AD: Tensor | None, size: Size, seed: int) -> None:
    """One SAE of each kind, with rows of W_dec of length one.

    If `letters_AD` is given, each of the first 26 latents detects one letter. Two further latents per letter also fire
    on other directions and silence the letter's own latent, so they absorb the letter.
    """
    source, config = find_model(str(folder))
    model = load_model(source, config, dtype="float32", device="cpu")
    x_TD = model.capture(contexts[:16], [size.layer])[size.layer][:, 1:].flatten(0, 1)
    d_in = x_TD.shape[1]
    std = float(x_TD.norm(dim=1).mean()) / d_in**0.5  # of a latent's pre-activation
    chains = {"relu": ReLU(), "topk": TopK(size.k), "jumprelu": JumpReLU(size.d_sae, bandwidth=0.001)}
    for number, (kind, activation) in enumerate(chains.items()):
        random = torch.Generator().manual_seed(seed + 1 + number)
        dec_FD = normalize(torch.randn(size.d_sae, d_in, generator=random), dim=1)
        enc_FD = dec_FD + 0.3 / d_in**0.5 * torch.randn(size.d_sae, d_in, generator=random)
        if letters_AD is not None:
            dec_FD[:26] = letters_AD
            enc_FD[:26] = letters_AD
            for each in (26, 52):
                other_AD = dec_FD[each : each + 26].clone()
                dec_FD[each : each + 26] = normalize(letters_AD + 0.5 * other_AD, dim=1)
                enc_FD[each : each + 26] = normalize(letters_AD + other_AD, dim=1)
                enc_FD[:26] -= 0.8 * other_AD
        b_F = torch.randn(size.d_sae, generator=random)
        bias_F = {"relu": -1.5 + 0.2 * b_F, "topk": 0.1 * b_F, "jumprelu": 0.2 * b_F}[kind] * std
        bias_F[-8:] = -100 * std  # dead
        scale = {"relu": 0.4, "topk": 0.25, "jumprelu": 0.15}[kind]  # so that x_hat is about as long as x
        found = {
            "W_enc": scale * enc_FD.T,
            "W_dec": dec_FD,
            "b_enc": scale * bias_F,
            "b_dec": 0.1 * std * torch.randn(d_in, generator=random),
        }
        if kind == "jumprelu":
            found["activation.0.threshold"] = scale * std * (1 + torch.rand(size.d_sae, generator=random))
        sae = SAE(d_in, size.d_sae, [activation], pre_bias=kind != "jumprelu")
        sae.load_state_dict(found)
        save_sae(sae, folder / "saes" / kind, {"layer": size.layer})


def make_contexts(tokens: list[int], size: Size, rng: random.Random) -> Tensor:
    """(N, S): windows packed with documents as SAEBench packs them, with BOS at the beginning and between documents,
    and occasionally an EOS."""
    n = size.contexts_per_batch * (size.reconstruction_batches + size.sparsity_batches)
    rows = [[BOS, *rng.choices(tokens, k=size.context - 1)] for _ in range(n)]
    for number, row in enumerate(rows):
        if number % 3 == 1:
            row[rng.randrange(2, size.context)] = BOS
        if number % 4 == 2:
            row[rng.randrange(2, size.context)] = EOS
    return torch.tensor(rows)


def make_table(table: dict[str, Any], spaced: list[str], size: Size, rng: random.Random) -> dict[str, Any]:
    """Rows in random order, with enough texts of every class and attribute. Some words of a text belong to its class or
    its attribute; the other words come from one list for all texts."""
    labels = [*table["probed"], *table["pair"].values()]
    own = {label: rng.sample(spaced, 2) for label in [*labels, *map(str, table["values"])]}
    common = rng.sample(spaced, 200)

    def text(label: int, value: Any) -> str:
        kinds = rng.choices(
            [own[label], own[str(value)], common], weights=[3, 3, 4], k=rng.randrange(4, size.context + 2)
        )
        return "".join(rng.choice(kind) for kind in kinds).strip()

    found = {}
    for split, count in (("train", size.train), ("test", size.test)):
        quota = count // 4
        rows, seen = [], set()
        first, second = table["pair"].values()
        for label in labels:
            for value in table["values"]:
                on_diagonal = (label, value) in ((first, table["values"][0]), (second, table["values"][1]))
                for _ in range(2 * quota + 3 if on_diagonal else quota + 3):
                    while (written := text(label, value)) in seen:
                        pass
                    seen.add(written)
                    rows.append((written, label, value))
        rng.shuffle(rows)
        columns = (table["text"], table["class"], table["attribute"])
        found[split] = {name: list(column) for name, column in zip(columns, zip(*rows, strict=True), strict=True)}
    return found

"""The inputs for SAEBench's RAVEL and ours: made-up entities and facts, a Gemma 2 that learned most facts, and SAEs.

Everything follows from a seed. The name of an entity has two words, of which only the last is unique. The first block
has no attention, so that later blocks read the facts at the last word; exchanging activations there changes the
answers. Values have one or two words, questions have several lengths, and some of the facts that are asked about
differ from those that the model was trained on.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import Gemma2Config, Gemma2ForCausalLM

from sae.evaluate.datasets.ravel import RAVEL, file_name
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae
from sae.train.variants.jumprelu import JumpReLU

LAYER, K, WIDTH, D_SAE = 0, 8, 32, 96
FIRST, ENTITIES = ("ba", "de", "fi", "go", "hu", "ja"), 16  # of each type
VALUES = {
    "town": {
        "Land": ("oak", "elm", "ash", "red elm"),
        "Tongue": ("fen", "gal", "hol", "old gal"),
        "Tint": ("blue", "green", "grey"),
    },
    "sage": {"Field": ("stars", "stones", "songs", "deep songs"), "Home": ("north", "south", "east")},
}
WORDS = ("the", "of", "is", "in", "we", "say", "that", "a", "and", "has", "sage", "town")
UNKNOWN = 0.15  # share of the facts for which the model learned a wrong answer
STEPS, SAE_STEPS = 300, 250


def last_names(entity_type: str) -> list[str]:
    return [f"{entity_type[0]}{number}" for number in range(ENTITIES)]


def templates(entity_type: str, attribute: str) -> list[str]:
    """Questions of three lengths."""
    word = attribute.lower()
    return [f"%s {word}", f"the {word} of %s is", f"we say that the {entity_type} %s has the {word}"]


def make_ravel_problem(folder: Path, seed: int) -> None:
    """Write everything into `folder`: tokenizer, model, facts in the Hub's schema, SAEs, and problem.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    learned, asked = {}, {}
    for entity_type, values in VALUES.items():
        names = [f"{rng.choice(FIRST)} {last}" for last in last_names(entity_type)]
        learned[entity_type] = {entity: {a: rng.choice(of) for a, of in values.items()} for entity in names}
        asked[entity_type] = {
            entity: {a: rng.choice(values[a]) if rng.random() < UNKNOWN else value for a, value in own.items()}
            for entity, own in learned[entity_type].items()
        }
        write_facts(folder, entity_type, asked[entity_type])
    tokenizer = make_tokenizer(folder)
    model = train_model(folder, tokenizer, learned, seed)
    train_saes(folder, tokenizer, model, seed)
    (folder / "problem.json").write_text(json.dumps({"seed": seed, "layer": LAYER, "k": K}))


def write_facts(folder: Path, entity_type: str, asked: dict[str, dict[str, str]]) -> None:
    """The four files of the Hub's schema."""
    questions = {attribute: templates(entity_type, attribute) for attribute in VALUES[entity_type]}
    parts: dict[str, Any] = {
        "attribute_to_prompts": questions,
        "entity_attributes": asked,
        "prompt_to_split": {text: "train" for texts in questions.values() for text in texts},
        "entity_to_split": dict.fromkeys(asked, "train"),
    }
    to = folder / RAVEL
    to.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        (to / file_name(entity_type, part)).write_text(json.dumps(content))


def make_tokenizer(folder: Path) -> Tokenizer:
    """One token per word, with <bos> before each text."""
    values = " ".join(value for of_type in VALUES.values() for of in of_type.values() for value in of)
    attributes = [attribute.lower() for of_type in VALUES.values() for attribute in of_type]
    lasts = [name for entity_type in VALUES for name in last_names(entity_type)]
    words = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", *FIRST, *lasts, *WORDS, *attributes, *values.split()])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def sentences(learned: dict[str, dict[str, dict[str, str]]]) -> Iterator[tuple[str, str]]:
    """Every question with its answer as the model learns it."""
    for entity_type, entities in learned.items():
        for entity, own in entities.items():
            for attribute, value in own.items():
                for template in templates(entity_type, attribute):
                    yield template % entity, value


def train_model(folder: Path, tokenizer: Tokenizer, learned: dict[str, Any], seed: int) -> Gemma2ForCausalLM:
    """A Gemma 2 of three blocks that continues each question with its answer and the beginning of another question."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, architectures=["Gemma2ForCausalLM"],
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False).zero_()
    rows = [tokenizer.encode(f"{question} {answer} the town of").ids for question, answer in sentences(learned)]
    width = max(map(len, rows))
    ids_NS = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        chosen_NS = ids_NS[torch.randint(len(ids_NS), (64,), generator=generator)]
        logits_NSV = model(chosen_NS).logits[:, :-1]
        loss = cross_entropy(logits_NSV.flatten(0, 1), chosen_NS[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"the model's loss is {float(loss.detach()):.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float().eval().requires_grad_(False)


def train_saes(folder: Path, tokenizer: Tokenizer, model: Gemma2ForCausalLM, seed: int) -> None:
    """An SAE of each kind on the residual stream after LAYER, with decoder rows of length one."""
    names = [f"{first} {last}" for kind in VALUES for first in FIRST for last in last_names(kind)]
    x_TD = torch.cat([residual(model, tokenizer.encode(f"the town of {name} is").ids) for name in names])
    for number, kind in enumerate(("relu", "topk", "jumprelu")):
        torch.manual_seed(seed + number)
        scale = float(x_TD.norm(dim=1).mean()) / WIDTH**0.5
        activation = {"relu": ReLU(), "topk": TopK(K), "jumprelu": JumpReLU(D_SAE, bandwidth=0.001)}[kind]
        sae = SAE(WIDTH, D_SAE, [activation], pre_bias=kind != "jumprelu")
        weights = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
        weights["W_dec"] = normalize(torch.randn(D_SAE, WIDTH), dim=1)
        weights["W_enc"] = weights["W_dec"].T.clone()
        if kind == "jumprelu":
            weights["activation.0.threshold"] = torch.full((D_SAE,), 0.3 * scale)
        trained = [weights[name].requires_grad_() for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
        optimizer = torch.optim.Adam(trained, lr=3e-3)
        for _ in range(SAE_STEPS):
            recon_TD, f_TF = forward(weights, x_TD, kind, scale)
            loss = (recon_TD - x_TD).square().sum(1).mean() + (
                0 if kind == "topk" else 0.3 * scale * f_TF.sum(1).mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                weights["W_dec"].copy_(normalize(weights["W_dec"], dim=1))
        sae.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
        l0 = float((f_TF != 0).sum(1).float().mean())
        error = float((recon_TD - x_TD).detach().square().sum() / x_TD.square().sum())
        print(f"{kind}: squared error {error:.3f}, L0 {l0:.1f}")
        save_sae(sae.eval().requires_grad_(False), folder / "saes" / kind, {"layer": LAYER})


def residual(model: Gemma2ForCausalLM, ids: list[int]) -> Tensor:
    """The residual stream after LAYER, without the first position."""
    hidden: Tensor = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
    return hidden


def forward(weights: dict[str, Tensor], x_TD: Tensor, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    shift_D = 0 if kind == "jumprelu" else weights["b_dec"]
    z_TF = (x_TD - shift_D) @ weights["W_enc"] + weights["b_enc"]
    f_TF = z_TF.relu()
    if kind == "topk":
        top = f_TF.topk(K, dim=1)
        f_TF = torch.zeros_like(f_TF).scatter(1, top.indices, top.values)
    elif kind == "jumprelu":
        f_TF = f_TF * (z_TF > 0.3 * scale)
    return f_TF @ weights["W_dec"] + weights["b_dec"], f_TF

"""Tiny tokenizers with the special tokens, post-processors and chat templates of well-known ones."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "the quick brown fox jumps over a lazy dog while seven zebras quietly read their yellow books in june"
TEXT = [f"{WORDS} <s> [CLS] <|im_start|> assistant user system model", WORDS.title(), WORDS.replace(" ", "\n")]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + (message['role'] if message['role'] == 'user' "
    "else 'model') + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def byte_level() -> Tokenizer:
    """Like GPT-2's, Llama 3's and Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """Like Gemma's and Llama 2's: spaces are replaced, text is not pre-split, and unknown characters become bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    texts = [text.replace(" ", " ▁") for text in TEXT[:2]]  # without newlines, which are pieces of their own
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200))
    model = json.loads(learned.to_str())["model"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary, merges = {piece: number for number, piece in enumerate(pieces)}, [tuple(m) for m in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> Tokenizer:
    """Like T5's and XLM-R's: special tokens are pieces of the model, and have the best score."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    backend.train_from_iterator(TEXT * 3, trainer)
    return backend


def wordpiece() -> Tokenizer:
    """Like BERT's, but split at spaces only, so that `[CLS]` reaches the model in one piece."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    backend.train_from_iterator(TEXT, trainer)
    return backend


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADER = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# name -> (backend, its special tokens, whether it puts BOS before a text, arguments of transformers' class)
SHAPES: dict[str, tuple[Any, list[str], bool, dict[str, Any]]] = {
    "gemma": (
        sentencepiece_bpe, ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], True,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
         "chat_template": GEMMA},
    ),
    "llama-2": (
        sentencepiece_bpe, ["<s>", "</s>"], False,
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA_2},
    ),
    "llama-3": (
        byte_level, HEADER, True,
        {"bos_token": HEADER[0], "eos_token": HEADER[4], "chat_template": LLAMA_3},
    ),
    "gpt-2": (byte_level, IM[:1], False, dict.fromkeys(("bos_token", "eos_token", "unk_token"), IM[0])),
    "pythia": (byte_level, [*IM[:1], "<|padding|>"], False, dict.fromkeys(("bos_token", "eos_token"), IM[0])),
    "qwen": (byte_level, IM, False, {"eos_token": IM[0], "pad_token": IM[0], "chat_template": CHATML}),
    "qwen-chat": (byte_level, IM, False, {"eos_token": IM[2], "pad_token": IM[0], "chat_template": CHATML}),
    "smollm2": (
        byte_level, IM, False,
        {"bos_token": IM[1], "eos_token": IM[2], "unk_token": IM[0], "pad_token": IM[2], "chat_template": CHATML},
    ),
    "marked": (
        byte_level, IM, False, {"bos_token": IM[1], "eos_token": IM[2], "chat_template": CHATML_MARKED}
    ),
    "chatml-only": (byte_level, IM[1:], False, {"bos_token": IM[1], "eos_token": IM[2], "chat_template": CHATML}),
    "untold": (byte_level, ["<|im_start|>", "</s>"], False, {"bos_token": "<|im_start|>", "eos_token": "</s>"}),
    "own-turns": (
        byte_level, ["<turn>", "<end>"], False,
        {"bos_token": "<turn>", "eos_token": "<end>",
         "chat_template": "{% for message in messages %}{{ '<turn>' + message['content'] + '<end>' }}{% endfor %}"},
    ),
    "nothing": (byte_level, [], False, {}),
    "unigram": (unigram, ["<s>", "</s>", "<unk>"], True,
                {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "wordpiece": (wordpiece, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], False,
                  {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}),
}  # fmt: skip


def make_tokenizer(shape: str) -> Any:
    """A transformers tokenizer that is built like a well-known one."""
    from transformers import PreTrainedTokenizerFast

    make, special, adds_bos, names = SHAPES[shape]
    backend = make()
    backend.add_special_tokens(special)
    if adds_bos:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_model(folder: Path, tokenizer: Any) -> Path:
    """A random Llama of two blocks, width 16, with this tokenizer, saved in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

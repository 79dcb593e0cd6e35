"""Tiny tokenizers that know a chat template's special tokens, trained on a few sentences."""

import functools
import importlib.util
import pathlib
import re

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# Found without importing the package, which takes a while.
FOLDER = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
SENTENCES = [
    "What is the weather in Paris? It is nine degrees, and it rains in the morning.",
    "Name a colour of the sea. Blue, mostly, but sometimes it is green or grey.\n\nAnd then?\n",
    "You are a helpful assistant. Be brief. Let me think about the answer first.",
    '{"name": "get_weather", "arguments": {"place": "Paris", "days": 2}}',
]
# What templates write as one token: <|im_end|>, <start_of_turn>, [INST], </think>, ...
SPECIAL = re.compile(r"<\|[^|<>{}]+\|>|<｜[^｜<>{}]+｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]")
THINKING = ("<think>", "</think>")


def template_of(name: str) -> str:
    """Return a chat template of the installed TRL package."""
    return (FOLDER / f"{name}.jinja").read_text()


@functools.cache
def _trained(kind: str) -> str:
    """Return a trained tokenizer without special tokens, as JSON."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        letters = [chr(code) for code in range(33, 127)]
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=[*letters, "▁", "\n"],
            special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        )
        # No token has a space inside: words are apart while it is trained.
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", True)
    backend.train_from_iterator(SENTENCES, trainer)
    if kind != "bytes":
        if kind == "llama2":
            # A space is put before every piece of text between special tokens.
            backend.pre_tokenizer = pre_tokenizers.Sequence([])
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            start = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence([*start, decoders.Strip(" ", 1, 0)])
        else:
            # "metaspace": only before the first piece of a text, as in Mistral's.
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
            backend.decoder = decoders.Metaspace("▁", "first", False)
    return backend.to_str()


def make_tokenizer(
    template: str, eos: str, bos: str | None = None, kind: str = "bytes"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template, whose special tokens are those of the template.

    kind: "bytes" for byte-level BPE; "llama2" or "metaspace" for tokenizers like SentencePiece's.
    A tokenizer with BOS starts each text with it, as most do.
    """
    backend = Tokenizer.from_str(_trained(kind))
    named = dict.fromkeys([*filter(None, (bos, eos)), *sorted(set(SPECIAL.findall(template)))])
    backend.add_special_tokens(list(named))
    backend.add_tokens([token for token in THINKING if token in template])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            f"{bos} $A", None, [(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer

"""A tokenizer whose tokens are letters, for tests that count tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of small letters, digits and blanks, with an EOS and no BOS."""
    tokens = ["<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.Split("\0", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")

"""Trains a tokenizer on film reviews: python -m experiments.imdb_tokenizer --data=DIR_OR_HUB_NAME
--out=DIR

A byte-level BPE as GPT-2's, of 8,192 pieces, from the train and unsupervised reviews, in Hugging
Face format. The same reviews give the same tokenizer.
"""

import itertools
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import readers, sources

END = "<|endoftext|>"  # between texts, as GPT-2's: before a review and after it
SPLITS = ("train", "unsupervised")


def train(texts, pieces: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `pieces` pieces, END among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )


def reviews(path: str):
    """The texts that a policy is trained on, as the imdb source reads them."""
    splits = readers.find_splits(path)
    rows = itertools.chain.from_iterable(splits[name]() for name in SPLITS)
    return (sources.imdb(readers.fields_of(record))[1][0] for _, record in rows)


def main():
    from absl import flags

    from dpo_jax import command_line

    data = flags.DEFINE_string("data", "stanfordnlp/imdb", "The reviews: hub name or folder.")
    out = flags.DEFINE_string("out", None, "Where the tokenizer goes; must not exist.")
    pieces = flags.DEFINE_integer("pieces", 8192, "Size of the vocabulary.")
    flags.mark_flags_as_required(["out"])

    def make_tokenizer():
        if pathlib.Path(out.value).exists():
            raise FileExistsError(f"--out={out.value} exists: give another name, or remove it.")
        tokenizer = train(reviews(data.value), pieces.value)
        tokenizer.save_pretrained(out.value)
        print(f"{len(tokenizer)} pieces in {out.value}")

    command_line.run(make_tokenizer, __doc__)


if __name__ == "__main__":
    main()

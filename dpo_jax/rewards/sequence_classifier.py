"""Reward models that others trained: sequence classifiers of one label, in Hugging Face format.

Such a model reads whole conversations in text, through its own chat template, as its authors
trained it: the prompt as the messages that it is, or as one user turn, and the completion as the
assistant's turn after it, without a generation prompt. A model without a chat template reads prompt
and completion as one text, with the special tokens that its tokenizer adds. The reward is the
head's output at the last token, which is chosen as transformers does.
"""

import dataclasses
import datetime
import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import numpy as np

from dpo_jax.console import say, warn
from dpo_jax.data.chat import Chat
from dpo_jax.data.ledger import Malformed
from dpo_jax.data.rows import shared_length
from dpo_jax.models import hf, loading
from dpo_jax.rewards.reward_model import token_reward
from dpo_jax.sampling.prompts import Conversation

TAKES = (
    "config.reward.kind='model' takes a sequence classifier with num_labels=1 "
    "(LlamaForSequenceClassification, for example), or a model that the rm stage has trained"
)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier whose weights are on a mesh."""

    path: str
    tokenizer: object
    max_positions: int
    pad_id: int | None  # of its config.json: transformers reads no reward at this token
    reward_tokens: Callable  # list of (prompt, completion) ids -> rewards, float64 [n]


def check(path: str) -> None:
    """Check that a model gives one number for a text; raises ValueError that says why not."""
    folder, adapters = loading.find(path)
    shapes = loading.stored_names(folder, adapters)
    hf_config = hf.read_config(folder)
    head = shapes.get("score.weight")
    if head is None:
        kinds = ", ".join(getattr(hf_config, "architectures", None) or ["none is named"])
        raise ValueError(
            f"config.reward.path={path}: the model has no reward head (a tensor score.weight) "
            f"among its weights (architectures in config.json: {kinds}), and a random one would "
            f"give random rewards. {TAKES}."
        )
    # The config under an adapter is that of a language model.
    labels = head[0] if adapters else hf_config.num_labels
    if labels != 1:
        raise ValueError(
            f"config.reward.path={path}: the model has {labels} labels (num_labels or id2label in "
            f"config.json), so that its output is not one reward. {TAKES}."
        )
    # What else its maths may have, such as quantised weights.
    loading.open_checkpoint(path, head="reward")


@functools.cache  # its weights lie on the devices once, on whatever days templates are written
def _opened(path: str, batch_size: int, mesh) -> Classifier:
    """Return a classifier with its weights on the mesh."""
    check(path)
    checkpoint = loading.open_checkpoint(path, head="reward")
    has_template = bool(checkpoint.tokenizer.chat_template)
    reads = "conversations in its own chat template"
    if not has_template:
        reads = "prompt and completion as one text, as its tokenizer has no chat template"
    say(f"reward model {path}: not trained with dpo_jax, so it reads {reads}")
    return Classifier(
        path=path,
        tokenizer=checkpoint.tokenizer,
        max_positions=checkpoint.config.max_positions,
        pad_id=getattr(checkpoint.hf_config, "pad_token_id", None),
        reward_tokens=token_reward(checkpoint, batch_size, mesh),
    )


@functools.cache
def of_texts(
    path: str, batch_size: int, mesh, on_long: str, date: datetime.date | None
) -> Callable:
    """Return the reward that a classifier gives for prompts and completions as text.

    batch_size: texts at a time, over all devices. on_long: config.reward.on_long. date: what the
    chat template takes for today; None: today.
    """
    classifier = _opened(path, batch_size, mesh)
    chat = Chat(classifier.tokenizer, date=date or datetime.date.today())
    has_warned = False

    def reward(prompts, completions, _tokens, conversations=None) -> np.ndarray:
        nonlocal has_warned
        ids = _token_ids(classifier, chat, prompts, completions, conversations)
        cut_texts = 0
        for index, tokens in enumerate(ids):
            if not tokens:
                raise ValueError(
                    f"config.reward.path={path}: the text of prompt and completion "
                    f"{index + 1} is empty, and this reward model's tokenizer adds no token to it: "
                    "there is nothing to read. Leave out empty prompts."
                )
            if len(tokens) <= classifier.max_positions:
                continue
            if on_long == "error":
                raise _too_long(classifier, len(tokens), prompts[index], completions[index])
            ids[index] = _without_start(tokens, classifier)
            cut_texts += 1
        if cut_texts and not has_warned:
            has_warned = True
            warn(
                f"{cut_texts} of {len(ids)} texts are longer than the {classifier.max_positions} "
                f"positions of the reward model {path}: their starts are left out (reward.on_long)."
            )
        return classifier.reward_tokens(_in_two_parts(prompts, ids))

    return reward


def _token_ids(
    classifier: Classifier,
    chat: Chat,
    prompts: Sequence[str],
    completions: Sequence[str],
    conversations: Sequence[Conversation | None] | None,
) -> list[list[int]]:
    """Return the ids of each prompt with its completion, up to the token that is read."""
    if not prompts:
        return []  # tokenizers refuse an empty list
    tokenizer = classifier.tokenizer
    has_template = bool(tokenizer.chat_template)
    texts = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        conversation = conversations[index] if conversations is not None else None
        if conversation is not None and not has_template:
            raise ValueError(
                f"config.reward.path={classifier.path}: the prompts are conversations, and the "
                "tokenizer of this reward model has no chat template to read them in. Give one "
                "with a template (chat_template.jinja beside its tokenizer_config.json), or "
                "prompts of plain text."
            )
        if has_template:
            texts.append(_written(classifier, chat, prompt, completion, conversation))
        else:
            texts.append(prompt + completion)
    # A template writes BOS itself: the tokenizer's would be a second one.
    encoded = tokenizer(texts, add_special_tokens=not has_template, verbose=False)
    return [_up_to_last(tokens, classifier.pad_id) for tokens in encoded.input_ids]


def _written(
    classifier: Classifier,
    chat: Chat,
    prompt: str,
    completion: str,
    conversation: Conversation | None,
) -> str:
    """Return a prompt and its completion as the classifier's template writes them."""
    if conversation is None:
        conversation = Conversation([dict(role="user", content=prompt)])
    answer = dict(role="assistant", content=conversation.begun + completion)
    try:
        return chat.whole([*conversation.messages, answer], conversation.tools)
    except Malformed as error:
        raise ValueError(
            f"config.reward.path={classifier.path}: this reward model cannot read the prompt "
            f"{_start(prompt)!r}: {error}."
        ) from error


def _up_to_last(tokens: list[int], pad_id: int | None) -> list[int]:
    """Return ids up to the one at which transformers reads the head: the last that is not padding.

    Where padding and EOS are one token, that is the token before the EOS.
    """
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad_id:
        end -= 1
    return tokens[:end]


def _without_start(tokens: list[int], classifier: Classifier) -> list[int]:
    """Return the last ids of a text, as many as the model has positions, after its BOS if any."""
    has_bos = tokens[0] == classifier.tokenizer.bos_token_id
    kept = classifier.max_positions - has_bos
    return tokens[:has_bos] + tokens[len(tokens) - kept :]


def _in_two_parts(
    prompts: Sequence[str], ids: list[list[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (start, rest) of each text.

    Neighbours of one prompt have the same start, which is computed once for all of them.
    """
    parts = []
    for _, group in itertools.groupby(zip(prompts, ids, strict=True), key=operator.itemgetter(0)):
        of_prompt = [tokens for _, tokens in group]
        # The rest has a token at least: the reward is read at its last one.
        start = min(len(tokens) - 1 for tokens in of_prompt)
        for tokens, following in itertools.pairwise(of_prompt):
            start = min(start, shared_length(tokens, following))
        for tokens in of_prompt:
            whole = np.array(tokens, np.int32)
            parts.append((whole[:start], whole[start:]))
    return parts


def _too_long(classifier: Classifier, length: int, prompt: str, completion: str) -> ValueError:
    return ValueError(
        f"config.reward.path={classifier.path}: the completion {_start(completion)!r} of the "
        f"prompt {_start(prompt)!r} has {length} tokens with its prompt, and the model has "
        f"{classifier.max_positions} positions. Use shorter prompts (data.max_prompt_length) or "
        "completions (sampling.max_new_tokens), or leave out the start of such texts with "
        "--config.reward.on_long=cut."
    )


def _start(text: str) -> str:
    """Return the start of a text, for an error."""
    return text if len(text) <= 60 else text[:60] + "..."

"""The user's own rows: from the fields of a record to a prompt and its responses."""

from dataclasses import dataclass

from dpo_jax.data.ledger import Malformed, Unusable

# Plain text, or chat messages: [{"role": ..., "content": ...}, ...], with whatever other keys of a
# message have a value.
Text = str | list
ONE_PAIR = ((0, 1),)


@dataclass(frozen=True)
class Row:
    """A prompt, its responses, best first, and its pairs.

    A conversation that does not say what is prompt and what is response has an empty prompt, [],
    and is the one response.
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), indices of responses
    tools: list | None = None  # definitions of the tools that the model may call
    label: bool | None = None  # of unpaired rows: whether the response was liked
    shape: str = ""  # what the row was recognised as


@dataclass(frozen=True)
class TextExample:
    """A prompt and its responses: (completion,) for SFT, (chosen, rejected) for pairs."""

    prompt: Text
    responses: tuple[Text, ...]
    where: str  # the file or data set, and the row in it counted from 1
    tools: list | None = None


def local(fields: dict) -> Row:
    """The user's own rows: prompt, chosen and rejected; or prompt and completion, for SFT.

    Instead of the last two also `text`, or `messages`. Each may be text or chat messages; `chosen`
    and `rejected` may hold the whole conversation.
    """
    # Tables have a null where a row lacks a field.
    given = {name for name, value in fields.items() if value is not None}
    if given & {"chosen", "rejected"}:
        names = ("chosen", "rejected") if "rejected" in given else ("chosen",)
    else:
        names = tuple(name for name in ("completion", "messages", "text") if name in given)[:1]
    if not names:
        raise Malformed("none of the fields 'chosen', 'completion', 'messages', 'text' is there")
    responses = tuple(_content(fields, name) for name in names)
    # The whole text is the completion, of an empty prompt.
    if names == ("text",):
        return Row("", responses)
    prompt = _content(fields, "prompt") if "prompt" in given else None
    if any(isinstance(part, list) for part in (prompt, *responses)):
        prompt, responses = _chat(prompt, responses)
    else:
        prompt = text_field(fields, "prompt")
    return Row(prompt, responses, ONE_PAIR if len(responses) == 2 else ())


def text_field(fields: dict, name: str) -> str:
    """Return a field that must be text."""
    if fields.get(name) is None:
        raise Malformed(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise Malformed(f"field {name!r} is not text", shown(fields[name]))
    return fields[name]


def number_field(fields: dict, name: str) -> float:
    """Return a field that must be a number."""
    if not isinstance(fields.get(name), int | float):
        raise Malformed(f"field {name!r} is missing or not a number", shown(fields.get(name)))
    return fields[name]


def _content(fields: dict, name: str) -> Text:
    """Return a field that must be text or chat messages, with role and content alone."""
    if not isinstance(fields.get(name), list):
        return text_field(fields, name)
    messages = []
    for message in fields[name]:
        match message:
            case {"role": str(role), "content": str(content)}:
                messages.append({"role": role, "content": content})
            case _:
                raise Malformed(
                    f"field {name!r} holds more than messages, each a role and a content in text",
                    shown(message),
                )
    return messages


def shown(value) -> str:
    """Return a value and its type, short enough for a message."""
    text = repr(value)
    if len(text) >= 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def _chat(prompt: Text | None, responses: tuple[Text, ...]) -> tuple[list, tuple[list, ...]]:
    """Return chat messages as (prompt, responses).

    Each given response is either the answer alone or the whole conversation.
    """
    chats = [_messages("assistant", response) for response in responses]
    if prompt is None and len(chats) == 1:
        return [], tuple(chats)  # where the response starts is a question of config.data.turns
    given = _messages("user", prompt or [])
    if not all(chats):
        raise Unusable("empty response")
    starts_with_prompt = chats[0][: len(given)] == given
    # An assistant's turn first, and no prompt in it: the responses are answers alone.
    if given and chats[0][0]["role"] == "assistant" and not starts_with_prompt:
        start, answers = given, chats
    else:
        # Whole conversations. A prompt of text is only their last turn, so it does not say where
        # the answers start.
        is_whole_prompt = isinstance(prompt, list) and given
        turn = len(given) if is_whole_prompt else _last_shared_turn(chats)
        start, answers = chats[0][:turn], [chat[turn:] for chat in chats]
        differ = any(chat[:turn] != start for chat in chats)
        if differ or any(message not in start for message in given):
            raise Malformed("the conversation does not continue 'prompt'", shown(start))
    roles = [[message["role"] for message in answer] for answer in answers]
    # What is trained on is what an assistant says, from its first turn to its last.
    for turns in roles:
        if not start or turns[:1] != ["assistant"] or turns[-1] != "assistant":
            raise Malformed(
                "the response is not an assistant's turn after a prompt", f"roles {roles}"
            )
    return start, tuple(answers)


def _messages(role: str, content: Text) -> list:
    """Return text as the one message of a role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _last_shared_turn(chats: list[list]) -> int:
    """Return where the last assistant turn starts, up to which all conversations are the same."""
    turn = 0
    shortest = min(map(len, chats))
    # The last message of each is never shared: something must be left to answer.
    while turn < shortest - 1 and all(chat[turn] == chats[0][turn] for chat in chats):
        turn += 1
    # Back to where every conversation has an assistant's turn.
    while turn > 0:
        if all(chat[turn]["role"] == "assistant" for chat in chats):
            return turn
        turn -= 1
    raise Unusable("no shared assistant turn")

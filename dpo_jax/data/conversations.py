"""Chat messages in a row: under whatever names, and parted into prompt and answers."""

import json

from dpo_jax.data.ledger import Malformed, Unusable
from dpo_jax.data.rows import Text, json_of, shown, text_field

# The role of a chat message, in lower case -> the name that chat templates know it by.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Roles of turns in which the assistant calls a tool, as JSON text.
CALLS = ("function_call", "tool_call")
# Keys of messages and of scored answers, by which a struct of lists is known.
STRUCT_KEYS = {"role", "from", "answer", "response"}
# Keys by which some sets say whether a turn is trained on. The assistant's turns are, others not.
TRAINED = ("weight", "train", "training", "loss")


def list_of_structs(value):
    """Return a field's list of messages or answers, which may stand as a struct of lists.

    Tables of `datasets` have them so: {"role": ["user", ...], "content": ["Why?", ...]}. Any other
    value is returned as it is.
    """
    if not isinstance(value, dict) or not value.keys() & STRUCT_KEYS:
        return value
    lists = without_nulls(value)
    lengths = set()
    for part in lists.values():
        # A single message, or an object of another kind.
        if not isinstance(part, list):
            return value
        lengths.add(len(part))
    if len(lengths) != 1:
        return value
    return [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]


def without_nulls(struct: dict) -> dict:
    """Return a struct without its empty keys. What is inside its values stays."""
    return {key: part for key, part in struct.items() if part is not None}


def is_trained_on(message: dict) -> bool:
    """Return whether a message says nothing against being trained on."""
    return all(message.get(key, True) for key in TRAINED)


def as_context(messages: list) -> list:
    """Return messages that are only read, without keys that say whether they are trained on."""
    found = []
    for message in messages:
        found.append({key: value for key, value in message.items() if key not in TRAINED})
    return found


def is_role(value) -> bool:
    """Return whether a value is a role that a chat message may have, under any of its names."""
    return isinstance(value, str) and value.strip().lower() in {*ROLES, *CALLS, "function"}


def is_chat(value) -> bool:
    """Return whether a value is chat messages, or one of them."""
    messages = value if isinstance(value, list) else [value]
    for message in messages:
        if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
            return False
    return bool(messages)


def content_field(fields: dict, name: str) -> Text:
    """Return a field that must be text or chat messages."""
    if isinstance(fields.get(name), list) or is_chat(fields.get(name)):
        return read_messages(fields[name], name)
    return text_field(fields, name)


def read_messages(value, name: str) -> list[dict]:
    """Return the messages in a field, one or a list, under the names that chat templates know."""
    return [_message(message, name) for message in (value if isinstance(value, list) else [value])]


def _message(message, name: str) -> dict:
    """Return a chat message: role, content as one text, and its other keys as they are."""
    if not isinstance(message, dict):
        raise Malformed(
            f"field {name!r} holds something else than messages, each with 'role' and 'content'",
            shown(message),
        )
    message = without_nulls(message)
    # ShareGPT calls them from and value.
    role_key = "role" if "role" in message else "from"
    content_key = "content" if "content" in message else "value"
    role = message.get(role_key)
    if role in CALLS:
        return _call(role, message.get(content_key), name)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if role == "function" and "name" in message:
        known = "tool"  # what a function returned, as OpenAI's older rows call it
    if not known:
        raise Malformed(
            f"field {name!r} has a message whose role is none of "
            f"{', '.join(dict.fromkeys(ROLES.values()))} (or human, gpt, ...)",
            shown(role),
            "if this is a text that is meant as it stands, such as an answer in JSON, write the "
            "row as chat messages, whose content is never read as anything else",
        )
    found = {"role": known}
    if content_key in message:
        found["content"] = _text_of(message[content_key], name)
    for key, value in message.items():
        # OpenAI's rows and tables have empty lists of calls.
        is_nothing = key == "tool_calls" and not value
        says_the_usual = key in TRAINED and (known != "assistant" or value)
        if key not in (role_key, content_key) and not is_nothing and not says_the_usual:
            found[key] = value
    if isinstance(found.get("function_call"), str):
        call = json_of(found["function_call"], f"'function_call' in field {name!r}")
        found["function_call"] = call
    if isinstance(found.get("function_call"), dict):
        # OpenAI's older name of a single call.
        found["tool_calls"] = [{"type": "function", "function": found.pop("function_call")}]
    if isinstance(found.get("tool_calls"), str):
        found["tool_calls"] = json_of(found["tool_calls"], f"'tool_calls' in field {name!r}")
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = [_call_without_nulls(call) for call in found["tool_calls"]]
    if isinstance(found.get("refusal"), str) and not found.get("content"):
        # OpenAI's answers have either.
        found["content"] = found.pop("refusal")
    if len(found) == 1:
        raise Malformed(f"field {name!r} has a message without content", shown(message))
    return found


def _call_without_nulls(call):
    """Return a call of a tool without empty keys; its arguments are as the row has them."""
    if not isinstance(call, dict):
        return call  # which the chat template refuses
    if "arguments" in call and call["arguments"] is None:
        call = call | {"arguments": {}}
    call = without_nulls(call)
    if isinstance(call.get("function"), dict):
        call["function"] = _call_without_nulls(call["function"])
    return call


def _text_of(content, name: str) -> str:
    """Return the content of a message as one text; it may be a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Malformed(f"field {name!r} has a message whose content is not text", shown(content))
    texts = []
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            kind = part.get("type") or "text"
            # A part of another kind may have a text beside what it shows.
            if kind in ("text", "input_text", "output_text"):
                texts.append(part["text"])
                continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
            continue
        raise Malformed(
            f"field {name!r} has a message with a part of type {kind!r}; only text can be used",
            shown(part),
        )
    return "".join(texts)


def _call(role: str, content, name: str) -> dict:
    """Return a turn that is a tool call in JSON text as an assistant's message with tool_calls."""
    calls = json_of(content, f"a {role} turn of field {name!r}")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or "name" not in call:
            raise Malformed(
                f"field {name!r} has a {role} turn that is not a call, "
                '{"name": ..., "arguments": ...}',
                shown(call),
            )
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
        found.append({"type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": found}


def as_messages(role: str, content: Text) -> list:
    """Return text as the one message of a role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def split_chat(prompt: Text | None, responses: tuple[Text, ...]) -> tuple[list, tuple[list, ...]]:
    """Return chat messages as (prompt, responses).

    Each given response is either the answer alone or the whole conversation.
    """
    chats = [as_messages("assistant", response) for response in responses]
    if not all(chats):
        raise Unusable("empty response")
    if not prompt:
        # Where the response of one conversation starts is a question of config.data.turns.
        turn = last_shared_turn(chats) if len(chats) > 1 else 0
        start, answers = chats[0][:turn], [chat[turn:] for chat in chats]
    elif isinstance(prompt, list):
        start, answers = _after_messages(prompt, chats)
    else:
        start, answers = _after_text(prompt, chats)
    if not start:
        return [], tuple(answers)
    for answer in answers:
        roles = [message["role"] for message in answer]
        # What is trained on is what an assistant says, from its first turn to its last.
        if roles[:1] != ["assistant"] or roles[-1] != "assistant":
            raise Malformed(
                "a response does not begin and end with an assistant's turn", f"roles {roles}"
            )
    return start, tuple(answers)


def _after_messages(prompt: list, chats: list[list]) -> tuple[list, list[list]]:
    """Return (prompt, answers) of conversations that may begin with the prompt's messages."""
    given, asked = split_system(prompt)
    # Some sets have one of the answers in the prompt already.
    if asked and any(same_messages(asked[-1:], chat) for chat in chats):
        asked = asked[:-1]
    answers = []
    # One side may be whole, and the other the answer alone.
    for chat in chats:
        system, turns = split_system(chat)
        if asked and same_messages(asked, turns[: len(asked)]):
            answers.append(turns[len(asked) :])
        elif turns and turns[0]["role"] == "assistant" and not system:
            answers.append(turns)  # the answer alone
            continue
        else:
            raise Malformed(
                "the conversation does not continue 'prompt'",
                f"{shown(chat[: len(prompt)])} after {shown(prompt)}",
            )
        if given and system and not same_messages(given, system):
            raise Malformed(
                "the conversation and 'prompt' have different system turns",
                f"{shown(system[0].get('content'))} and {shown(given[0].get('content'))}",
            )
        # The system turn may be in one of them alone.
        given = given or system
    return [*given, *asked], answers


def _after_text(prompt: str, chats: list[list]) -> tuple[list, list[list]]:
    """Return (prompt, answers) of conversations beside a prompt of text."""
    # Conversations that have no turn but the assistant's and its tools' are answers alone.
    if all(chat[0]["role"] == "assistant" and not _asks(chat) for chat in chats):
        return as_messages("user", prompt), chats
    # A text does not say where the answers start: it may be the first turn, the last, or all.
    turn = last_turn(chats[0]) if len(chats) == 1 else last_shared_turn(chats)
    start = chats[0][:turn]
    if not is_said(prompt, start) and not says_turn(prompt, start):
        asked = [message.get("content", "") for message in start if message["role"] == "user"]
        raise Malformed(
            "field 'prompt' says something else than the conversation",
            f"{shown(prompt)}; the user says {shown(asked[-1] if asked else '')}",
        )
    if len(chats) == 1:
        return [], chats
    return start, [chat[turn:] for chat in chats]


def last_turn(messages: list) -> int:
    """Return where the last assistant turn of a conversation starts."""
    for turn in reversed(range(len(messages))):
        if messages[turn]["role"] == "assistant" and turn:
            return turn
    raise Unusable("no assistant turn after a prompt")


def last_shared_turn(chats: list[list]) -> int:
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


def split_system(messages: list) -> tuple[list, list]:
    """Return the system turn that messages begin with, if any, and the rest."""
    start = int(bool(messages) and messages[0]["role"] in ("system", "developer"))
    return messages[:start], messages[start:]


def _asks(messages: list) -> bool:
    return any(message["role"] == "user" for message in messages)


def same_messages(these: list, those: list) -> bool:
    """Return whether messages are the same, whatever white space is around what they say."""
    return len(these) == len(those) and all(map(_equal, these, those))


def _equal(this: dict, that: dict) -> bool:
    if this == that:
        return True
    stripped = []
    for message in (this, that):
        stripped.append(message | {"content": message.get("content", "").strip()})
    return stripped[0] == stripped[1]


def is_said(text: str, messages: list) -> bool:
    """Return whether messages say what a text says, white space aside."""
    said = " ".join(squeezed(message.get("content", "")) for message in messages)
    return squeezed(text) in said


def says_turn(text: str, messages: list) -> bool:
    """Return whether a text says what the user does in one of the messages."""
    asked = [message.get("content", "") for message in messages if message["role"] == "user"]
    return any(turn.strip() and squeezed(turn) in squeezed(text) for turn in asked)


def squeezed(text: str) -> str:
    """Return a text with one space wherever it has white space."""
    return " ".join(text.split())


def transcript(text: Text) -> str:
    """Return a conversation as a person reads it, each turn after its role; text as it is.

    Reasoning is left out, and what a tool is called with is JSON.
    """
    if isinstance(text, str):
        return text
    turns = [f"{message['role'].capitalize()}: {_said(message)}" for message in text]
    return "\n\n".join(turns)


def reply(text: Text) -> str:
    """Return a response as a person reads it: one turn without its role; text as it is."""
    if isinstance(text, list) and len(text) == 1:
        return _said(text[0])
    return transcript(text)


def _said(message: dict) -> str:
    """Return what a message says: its content and its calls of tools."""
    parts = [message.get("content", "").strip()]
    for call in message.get("tool_calls", ()):
        parts.append(json.dumps(call.get("function", call), ensure_ascii=False))
    return "\n".join(part for part in parts if part)

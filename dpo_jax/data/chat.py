"""Conversations as text: everything that knows chat templates.

A tokenizer's chat template is a program that writes messages as text. It may write a conversation
differently from its beginning: it may move the system text, write today's date, or leave out the
reasoning of earlier turns. This file renders a prompt and its responses, finds which part of the
text each assistant turn is, and refuses what a template silently leaves out. Templates are treated
as black boxes: where a turn starts and ends is found by rendering other conversations.
"""

import dataclasses
import datetime
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dpo_jax.data.conversations import TRAINED
from dpo_jax.data.ledger import Malformed
from dpo_jax.data.limits import limited
from dpo_jax.data.rows import shared_length

# A template reads reasoning from one of these keys.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Takes the place of transformers' function that gives templates today's date: a macro of the same
# name, so that it does not matter how a template calls it. Templates get no functions from outside,
# so the macro looks up each directive, such as "%d", in a table. The newline at the end is trimmed.
FIXED_DATE = """\
{%- macro strftime_now(format) -%}
    {%- set directives = DIRECTIVES -%}
    {%- set read = namespace(directive='') -%}
    {%- for character in format -%}
        {%- if read.directive or character == '%' -%}
            {%- set read.directive = read.directive + character -%}
            {%- if read.directive in directives -%}
                {{- directives[read.directive] -}}
                {%- set read.directive = '' -%}
            {%- endif -%}
        {%- else -%}
            {{- character -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if read.directive -%}
        {{- raise_exception('unknown format of a date: ' + format) -}}
    {%- endif -%}
{%- endmacro %}
"""
# What may stand between "%" and a letter: "-" for no leading zeros, and the like.
DATE_FLAGS = ("", "-", "_", "0", "^", "#", "E", "O")
DATE_LETTERS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf"
# How the generation prompts of some templates end: in a mark that opens the thinking.
OPENED = re.compile(
    r"[<\[](?!/)(?!\W*end)[^<>\[\]]*(think|thought|reason)[^<>\[\]]*[>\]]\s*$", re.I
)
# A mark that closes it.
CLOSING = re.compile(r"[<\[]\W*(/|end)[^<>\[\]]*(think|thought|reason)[^<>\[\]]*[>\]]", re.I)
# What rows often hold that a template does not write.
IGNORED = ("tools", "tool_calls", "name", "system", "reasoning", *REASONING)
# What the template is given in any case, and how it is set, or what would break the rendering.
GIVEN = {
    "messages": "these are the row's",
    "conversation": "the messages are the row's",
    "tools": "these are the row's, from its column 'tools'",
    "add_generation_prompt": "the prompt ends where an answer begins, with what opens its turn",
    "continue_final_message": "the prompt ends where an answer begins",
    "strftime_now": "templates take the day on which the stage began for today",
    "raise_exception": "templates refuse a conversation by it",
} | dict.fromkeys(
    (
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    ),
    "it is about tokens, which data's other fields set",
)
# Text that no message holds, and that templates neither strip nor escape.
PROBE = "Zq9xJv3kProbe"
# How far into its turn an answer's text may begin, in characters, after what ends the prompt.
LONGEST_LEAD = 64
# What a template may take for one conversation; the largest take milliseconds.
RENDERING_SECONDS = 10
RENDERING_MEMORY = 10**9  # bytes
LONGEST_TEXT = 1 << 23  # characters that it may write
LARGEST_NUMBER = 10_000_000  # that a template may hold
LONGEST_REASON = 1000  # characters of what it says where it refuses one

Message = dict
Span = tuple[int, int]


@dataclass(frozen=True)
class Response:
    """A response as text, to be read after its prompt."""

    text: str
    # The parts that are trained on, as (start, end) in characters of the text. None: all of it.
    spans: tuple[Span, ...] | None = None
    other_turns: int = 0  # turns of users and tools inside it, which are not trained on
    is_laid_behind: bool = False  # the template writes prompt and response differently in one piece
    is_inside_thinking: bool = False  # the prompt opens the thinking, and the response is all in it
    reasoning_left_out: int = 0  # turns before the last whose reasoning the template leaves out


@dataclass(frozen=True)
class Rendered:
    """A prompt and its responses as text."""

    prompt: str
    responses: tuple[Response, ...]
    is_chat: bool = False
    reasoning_left_out: int = 0  # turns of the prompt whose reasoning the template leaves out
    is_developer_system: bool = False  # a developer's messages are written as the system's
    is_without_cue: bool = False  # without the mark that opens the thinking before an answer


@dataclass(frozen=True)
class Chat:
    """The settings by which conversations become text, with a tokenizer's chat template.

    options: what the template is to be given, such as enable_thinking. ignore: keys of messages
    that a template may leave out. date: the day that templates take for today.
    """

    tokenizer: object
    options: dict = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    date: datetime.date = field(default_factory=datetime.date.today)
    _known: "_Known" = field(default_factory=lambda: _Known(), repr=False, compare=False)

    def check(self, where: str) -> None:
        """Check that there is a template to write the messages at `where` with.

        Raises ValueError where there is none, and for an option that the template does not read.
        """
        if not (self.tokenizer.chat_template or self.options.get("chat_template")):
            raise ValueError(
                f"{where} holds chat messages, but the tokenizer has no chat template. Use a model "
                "with one (chat_template.jinja beside tokenizer_config.json), or plain text: a "
                "column of questions is read as text where it is named as the prompt, "
                "--config.data.columns=prompt=COLUMN. A column of system text or tools makes all "
                "rows chat: leave it out with --config.data.ignore=system,tools."
            )
        if not self._known.has_checked_options:
            self._check_options()
            self._known.has_checked_options = True

    def _check_options(self) -> None:
        """Check that the template reads the options; raises ValueError, or it would ignore them."""
        for name in self.options:
            if name in GIVEN:
                raise ValueError(f"data.template.{name} cannot be set: {GIVEN[name]}.")
        read = set()
        meant = set()
        for template in self._templates():
            variables, assigned = _variables(template)
            read |= variables
            meant |= variables - assigned
        unknown = sorted(set(self.options) - read - {"chat_template"})
        if unknown:
            own = meant - set(GIVEN) - set(self.tokenizer.special_tokens_map)
            raise ValueError(
                f"data.template.{unknown[0]}: the chat template does not read {unknown[0]!r}. "
                f"Options that it reads: {', '.join(sorted(own)) or 'none'}."
            )

    def misspelt_ignore(self) -> list[str]:
        """Return warnings of names to ignore that no message had, and that look misspelt."""
        warnings = []
        for name in self.ignore:
            like = difflib.get_close_matches(name, IGNORED, n=1, cutoff=0.75)
            if like and name not in IGNORED and name not in self._known.ignored:
                warnings.append(
                    f"data.ignore has {name!r}, which no message has; did you mean {like[0]!r}?"
                )
        return warnings

    def _templates(self) -> list[str]:
        """Return the template, or all of a tokenizer with several: some are for tools alone."""
        named = self.options.get("chat_template")
        known = self.tokenizer.chat_template
        if isinstance(known, dict) and not named:
            return list(known.values())
        return [self.tokenizer.get_chat_template(named, None)]

    def prompt(self, messages: Sequence[Message], tools: list | None = None) -> str:
        """Return a prompt's text, which ends where an answer begins.

        Raises Malformed where the template refuses it, or leaves out something that it holds.
        """
        return self.example(messages, (), tools).prompt

    def example(
        self,
        prompt: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        tools: list | None = None,
    ) -> Rendered:
        """Return a prompt and its responses as text.

        A response's text continues the prompt's: together they are the conversation as the template
        writes it, up to the white space that some templates put after the last EOS. Where the
        template writes the prompt differently once it is answered, the response is what the
        template writes from the answer on. The prompt is then the one to sample from, unless it
        ends in a mark that opens the thinking and a response is of several turns, which the
        template writes without the mark: then all responses follow the prompt without it.

        Raises Malformed where the template refuses the conversation or leaves out something that it
        holds, and where a response cannot be found in it.
        """
        tools = _listed_tools(tools)
        prompt = _listed_calls(prompt)
        responses = [_listed_calls(response) for response in responses]
        messages = [*prompt, *itertools.chain.from_iterable(responses)]
        for message in messages:
            self._known.ignored.update(name for name in self.ignore if name in message)
        errors = []
        for form in _forms(messages, tools, self._content_as_parts()):
            try:
                rendered = self._example(
                    [form.apply(message) for message in prompt],
                    [[form.apply(message) for message in response] for response in responses],
                    form.apply_to_tools(tools),
                )
            except (_Refused, Malformed) as error:
                errors.append(error)
                continue
            return dataclasses.replace(rendered, is_developer_system=form.developer_is_system)
        # The first form is the row's own, or the only one for the template. Where the template
        # refuses it and takes another, what is wrong with that one says more.
        for error in errors:
            if isinstance(error, Malformed):
                raise error
        raise Malformed(
            "the chat template refuses this conversation",
            str(errors[0]),
            "change the row to what the template takes, or use a template that takes the row",
        )

    def whole(self, messages: Sequence[Message], tools: list | None = None) -> str:
        """Return a conversation that ends in an answer, exactly as the template writes it.

        That is with the white space after its end, if the template writes any. Raises Malformed
        where the template refuses it or leaves out something that a message before the answer
        holds, and where it writes no answer at all.
        """
        tools = _listed_tools(tools)
        messages = _listed_calls(messages)
        last = len(messages) - 1
        refusals = []
        for form in _forms(messages, tools, self._content_as_parts()):
            formed = [form.apply(message) for message in messages]
            formed_tools = form.apply_to_tools(tools)
            try:
                text = self._render(formed, formed_tools)
                lost = self._lost_keys(formed, last, formed_tools, is_answer=True)
            except _Refused as error:
                refusals.append(error)
                continue
            self._check_tools(formed[:-1], formed_tools, text)
            for index in range(last):
                self._check(formed, index, formed_tools, text, is_answer=False)
            # What a sampled answer says may look like a mark of the template, and be left out.
            if "content" in lost:
                raise Malformed("the chat template does not write the assistant's answer")
            return text
        raise Malformed("the chat template refuses this conversation", str(refusals[0]))

    def _content_as_parts(self) -> bool | None:
        """Return whether the template takes content as a list of parts; None: cannot be told.

        Templates of vision models take parts, some of them nothing else.
        """
        if self._known.takes_parts is None:
            takes_parts = None
            for content, answer in ((PROBE, False), (_parts(PROBE), True)):
                text = self._render_or_none([{"role": "user", "content": content}], None, True)
                if takes_parts is None and text and PROBE in text:
                    takes_parts = answer
            self._known.takes_parts = (takes_parts,)
        return self._known.takes_parts[0]

    def _example(self, prompt: list, responses: list[list], tools: list | None) -> Rendered:
        """Return a prompt and its responses as text; raise _Refused for a form not understood."""
        prompt_text = self._render(prompt, tools, cue=True)
        _check_form(prompt, prompt_text)
        self._check_tools(prompt, tools, prompt_text)
        left_out = 0
        for index in range(len(prompt)):
            left_out += self._check(prompt, index, tools, prompt_text, is_answer=False)
        wholes = [self._render([*prompt, *response], tools) for response in responses]
        shared = self._shared_prompt(prompt, responses, tools, prompt_text, wholes)
        found = []
        for response, whole in zip(responses, wholes, strict=True):
            found.append(self._response(prompt, response, tools, shared, whole))
        return Rendered(
            prompt=shared,
            responses=tuple(found),
            is_chat=True,
            reasoning_left_out=left_out,
            is_without_cue=shared != prompt_text,
        )

    def _shared_prompt(
        self, prompt: list, responses: list[list], tools: list | None, text: str, wholes: list[str]
    ) -> str:
        """Return the prompt's text that all responses follow.

        text: of the prompt to sample from. It may end in a mark that opens the thinking, which the
        template writes before the last turn of a conversation alone. Behind it, an earlier turn
        would be trained on as thinking.
        """
        if not OPENED.search(text):
            return text
        for response, whole in zip(responses, wholes, strict=True):
            turns = sum(message["role"] == "assistant" for message in response)
            if turns < 2 or response[0]["role"] != "assistant" or whole.startswith(text):
                continue
            start, cue = self._start([*prompt, *response], len(prompt), tools, whole, text)
            if OPENED.search(cue) and text == whole[:start] + cue:
                return whole[:start]
        return text

    def _response(
        self, prompt: list, response: list, tools: list | None, prompt_text: str, whole: str
    ) -> Response:
        """Return the text of a response and which parts of it are trained on.

        whole: prompt and response as the template writes them.
        """
        messages = [*prompt, *response]
        _check_form(response, whole)
        left_out = 0
        for index in range(len(prompt), len(messages)):
            left_out += self._check(messages, index, tools, whole, is_answer=True)

        is_laid_behind = not whole.startswith(prompt_text)
        if is_laid_behind:
            start, cue = self._start(messages, len(prompt), tools, whole, prompt_text)
            self._check_places(messages, len(prompt), tools, start)
        else:
            start, cue = len(prompt_text), ""
        end = start + len(self._without_tail(whole[start:]))
        if cue.strip():
            start += self._cue_length(response[0], cue, whole[start:end])

        text = whole[start:end]
        spans = None
        if len(response) > 1:
            spans = self._spans(messages, len(prompt), tools, whole, (start, end))
        return Response(
            text=text,
            spans=spans,
            other_turns=sum(message["role"] != "assistant" for message in response),
            is_laid_behind=is_laid_behind,
            is_inside_thinking=bool(OPENED.search(prompt_text) and not CLOSING.search(text)),
            reasoning_left_out=left_out,
        )

    def _cue_length(self, message: Message, cue: str, text: str) -> int:
        """Return the length of the cue that an answer's text starts with: it is not to be doubled.

        Raises Malformed where the cue closes the thinking that the text begins with.
        """
        for same in (cue, cue.strip()):
            if text.startswith(same):
                return len(same)
        reasoning = _reasoning(message).strip()
        if reasoning and reasoning in text:
            raise _contradicts(cue)
        return 0

    def _without_tail(self, text: str) -> str:
        """Return the text without the white space that some templates put after the EOS."""
        return without_tail(text, self.tokenizer.eos_token)

    # where turns start and end

    def _spans(
        self, messages: list, first: int, tools: list | None, whole: str, answer: Span
    ) -> tuple[Span, ...]:
        """Return the parts of an answer of several turns that are an assistant's, from its start.

        answer: where it starts and ends in the whole.
        """
        spans = self._marked_spans(messages, tools, whole, answer)
        try:
            spans = spans or self._found_spans(messages, first, tools, whole, answer)
        except _Refused as error:  # the template cannot write the beginning alone
            raise _not_found(first) from error
        return tuple((start - answer[0], end - answer[0]) for start, end in spans)

    def _marked_spans(
        self, messages: list, tools: list | None, whole: str, answer: Span
    ) -> list[Span]:
        """Return the parts of the answer that the template itself marks as generated, if any."""
        template = self._template(tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self.tokenizer.special_tokens_map | self.options | {"chat_template": template}
        # It has been rendered before, without marks.
        (text,), (marks,) = render_jinja_template(
            [messages], tools=tools, return_assistant_tokens_mask=True, **options
        )
        if text != whole:
            return []
        answer_start, answer_end = answer
        spans = []
        for start, end in marks:
            # The generation prompt may hold the beginning of what is marked, such as "<think>".
            start, end = max(start, answer_start), min(end, answer_end)
            if start < end:
                spans.append((start, end))
        if spans and messages[-1]["role"] == "assistant":
            # Some templates leave the token that ends a turn outside of the mark. At the end of the
            # answer it is trained on in any case, as it is in an answer of one turn.
            spans[-1] = spans[-1][0], answer_end
        return spans

    def _found_spans(
        self, messages: list, first: int, tools: list | None, whole: str, answer: Span
    ) -> list[Span]:
        """Return where each assistant turn of the answer starts and ends in the whole."""
        answer_start, answer_end = answer
        spans = []
        last_end = answer_start
        previous = first - 1
        for turn in range(first, len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            start = answer_start
            if turn > first:
                before = self._render(messages[:turn], tools, cue=True)
                start, _ = self._start(messages, turn, tools, whole, before)
            end = answer_end
            if turn < len(messages) - 1:
                end = self._end(messages, turn, tools, whole, start)
                end = start + len(self._without_tail(whole[start:end]))
            if not last_end <= start <= end <= answer_end:
                raise _not_found(turn)
            # A template may write the text beside a call after the call's result: what users and
            # tools say has to stand between the turns, or it would be trained on.
            others = messages[previous + 1 : turn]
            if not _stands_between(others, whole[last_end:start], whole[answer_start:answer_end]):
                raise _not_found(turn)
            spans.append((start, end))
            last_end = end
            previous = turn
        return spans

    def _start(
        self, messages: list, turn: int, tools: list | None, whole: str, before: str
    ) -> tuple[int, str]:
        """Return where a turn's own text starts in the whole, and the cue that it lacks there.

        before: the conversation before the turn, with the generation prompt, whose end is the cue
        where the whole has less of it, as in "<think>" at the end of a prompt.
        """
        if whole.startswith(before):
            return len(before), ""
        # Only what the turn says is another text: what comes before it is the same.
        probed = [*messages]
        probed[turn] = _plain(messages[turn])
        text = self._render(probed, tools)
        lead, found, _ = text.partition(PROBE)
        if not found:
            raise _not_found(turn)
        said = _content(messages[turn - 1])
        aligned = self._alignment(lead, before, said)
        if aligned is None:
            raise _not_found(turn)
        length, cue = aligned
        start = len(lead) - length
        if whole[:start] == lead[:start]:
            return start, cue
        if _reasoning(messages[turn]):
            raise _contradicts(before[-LONGEST_LEAD:])
        raise _not_found(turn)

    def _alignment(self, lead: str, before: str, said: str) -> tuple[int, str] | None:
        """Return how many characters at the end of `lead` are an answer's, and the cue it lacks.

        lead: a conversation with an answer, up to what the answer says. before: the same
        conversation with the generation prompt. Both end in the header of the answer's turn, but
        for what the template writes in one of them only: a cue in `before`, or the white space or
        empty thinking block in `lead` before what an answer says. said: by the message before.
        Returns None where they have no such header.
        """
        same = self._not_inside_token(before, shared_length(lead, before))
        by_start = len(lead) - same, before[same:]
        if same in (len(lead), len(before)):
            return by_start
        last_words = said.strip()[-LONGEST_LEAD:]
        # The conversations differ in their middle, or both write something of their own before the
        # answer. In the first case they share their end, and in it what is said last.
        for length in range(LONGEST_LEAD + 1):
            for in_lead, in_before in ((length, 0), (0, length)):
                shared_lead = lead[: max(len(lead) - in_lead, 0)]
                shared_before = before[: max(len(before) - in_before, 0)]
                common = shared_length(shared_lead[::-1], shared_before[::-1])
                shared = shared_before[len(shared_before) - common :]
                if last_words and last_words in shared:
                    return len(lead) - len(shared_lead), before[len(shared_before) :]
        is_near = max(len(lead), len(before)) - same <= LONGEST_LEAD
        return by_start if is_near and (not last_words or last_words in before[:same]) else None

    def _not_inside_token(self, text: str, cut: int) -> int:
        """Return a cut in a text, moved before the added token that it would split.

        What two texts share may end inside of one, since many tokens begin with "<|".
        """
        for token in self.tokenizer.added_tokens_encoder:
            at = text.rfind(token, 0, cut + len(token))
            if at != -1 and at < cut < at + len(token):
                return at
        return cut

    def _end(self, messages: list, turn: int, tools: list | None, whole: str, start: int) -> int:
        """Return where a turn that others follow ends in the whole.

        start: where its text starts.
        """
        message = messages[turn]
        content = _content(message).strip()
        said_at = whole.find(content, start, start + LONGEST_LEAD + len(content))
        # What ends a turn of the same kind ends this one, which saves rendering it again.
        kind = (messages[turn + 1]["role"], bool(tools))
        is_plain = bool(content) and said_at >= 0 and not message.get("tool_calls")
        tail = self._known.tails.get(kind)
        # Without a tail to be seen, the same words elsewhere could be mistaken for the turn's.
        if is_plain and tail and whole.startswith(tail, said_at + len(content)):
            return said_at + len(content) + len(tail)
        end = self._rendered_end(messages, turn, tools, whole)
        if is_plain and end >= said_at + len(content):
            self._known.tails[kind] = whole[said_at + len(content) : end]
        return end

    def _rendered_end(self, messages: list, turn: int, tools: list | None, whole: str) -> int:
        """Return where a turn that others follow ends, found by rendering its beginning alone."""
        until = messages[: turn + 1]
        alone = self._render(until, tools)
        if whole.startswith(alone):
            return len(alone)
        # A template may end a conversation with a token that it has not between turns.
        open_text = self._without_cue(until, tools)
        if open_text and whole.startswith(open_text):
            return len(open_text)
        # Or it writes the last turn otherwise than an earlier one, as with an empty thinking block.
        # What follows the turn's text is then compared.
        for message in (_saying(messages[turn], PROBE), _plain(messages[turn])):
            probed = [*messages]
            probed[turn] = message
            try:
                _, _, after = self._render(probed, tools).partition(PROBE)
                until = probed[: turn + 1]
                alone = (self._render(until, tools), self._without_cue(until, tools))
            except _Refused:
                continue
            for text in alone:
                _, found, tail = text.partition(PROBE)
                following = after[len(tail) :]
                if found and following and after.startswith(tail) and whole.endswith(following):
                    return len(whole) - len(following)
        raise _not_found(turn)

    def _without_cue(self, messages: list, tools: list | None) -> str:
        """Return a conversation to be continued, without the generation prompt; "" if unknown."""
        question = [message for message in messages if message["role"] in ("system", "user")][:2]
        open_text = self._render(messages, tools, cue=True)
        try:
            asked = self._render(question, tools, cue=True)
            closed = self._render(question, tools)
        except _Refused:
            return ""
        # What only the first of the two has is the generation prompt. The second may have an EOS.
        same = len(closed.removesuffix(self.tokenizer.eos_token or ""))
        if not asked.startswith(closed[:same]):
            same = self._not_inside_token(asked, shared_length(asked, closed))
        cue = asked[same:]
        return open_text.removesuffix(cue) if open_text.endswith(cue) else ""

    # what a template leaves out

    def _check(
        self, messages: list, index: int, tools: list | None, text: str, is_answer: bool
    ) -> int:
        """Check that the text has what a message holds; return 1 if it lacks only old reasoning.

        Raises Malformed that names the key that is lost.
        """
        message = messages[index]
        lost = self._lost_keys(messages, index, tools, is_answer)
        lost = lost | self._lost_here(messages, index, tools, text, is_answer)
        lost = lost - (set(self.ignore) - {"content"})
        # Some rows have the same text under two names, and a template reads one of them.
        written = [value for key, value in message.items() if key not in lost]
        lost = {key for key in lost if message.get(key) not in written}
        role = message["role"]
        # A result's name is that of the call before it.
        if role not in ("system", "user", "assistant"):
            lost = lost - {"name"}
        # Templates leave the reasoning of earlier turns out by design. Where it is to be trained
        # on, that takes a template which writes it as long as the turn is the last one.
        reasoning = lost & set(REASONING)
        is_trained = is_answer and role == "assistant"
        left_out = 0
        if reasoning and not (is_trained and self._never_writes(messages, index, tools, reasoning)):
            left_out = 1
            lost = lost - reasoning
        if lost:
            keys = sorted(lost)
            names = ", ".join(map(repr, keys))
            # Ignored, the message would be trained on without what it says.
            if "content" in lost:
                advice = "use a template that does"
            elif lost & set(TRAINED):
                # Left out, the turn would be trained on after all.
                advice = "leave out this turn and those before it, or end the row before it"
            else:
                advice = _way_out(keys)
            raise Malformed(
                f"the chat template does not write {names} of {_a(role)} message",
                _shown(message.get(keys[0], message.get("content"))),
                advice,
            )
        return left_out

    def _never_writes(self, messages: list, index: int, tools: list | None, keys: set[str]) -> bool:
        """Return whether the template leaves out these keys of a turn that is the last one too."""
        until = messages[: index + 1]
        try:
            text = self._render(until, tools)
            lost = self._lost_keys(until, index, tools, is_answer=True)
        except _Refused:
            return False
        lost = lost | self._lost_here(until, index, tools, text, is_answer=True)
        return keys <= lost

    def _lost_keys(
        self, messages: list, index: int, tools: list | None, is_answer: bool
    ) -> frozenset:
        """Return the keys that the template does not write for this kind of message."""
        message = messages[index]
        held = {key: value for key, value in message.items() if _holds(key, value)}
        around = []
        for neighbour in (index - 1, index + 1):
            inside = 0 <= neighbour < len(messages)
            around.append(messages[neighbour]["role"] if inside else "")
        kinds = tuple((key, type(value).__name__) for key, value in sorted(held.items()))
        calls = len(held.get("tool_calls", ()))
        # What a template writes of a turn may depend on whether a question or an answer follows.
        later = frozenset(message["role"] for message in messages[index + 1 :])
        kind = (message["role"], kinds, calls, *around, later, bool(tools), is_answer)
        if kind not in self._known.lost_keys:
            whole = self._render(messages, tools, cue=not is_answer)
            lost = set()
            for key in held:
                if not self._writes(messages, index, key, tools, whole, cue=not is_answer):
                    lost.add(key)
            self._known.lost_keys[kind] = frozenset(lost)
        return self._known.lost_keys[kind]

    def _writes(
        self, messages: list, index: int, key: str, tools: list | None, whole: str, *, cue: bool
    ) -> bool:
        """Return whether the template writes a key of a message; whole: what it writes of all."""
        value = messages[index][key]
        probes = _probes(key, value, PROBE)
        for probed, other in zip(probes, _probes(key, value, PROBE[::-1]), strict=True):
            text = self._render_or_none(_replaced(messages, index, key, probed), tools, cue)
            if text is None or PROBE in text:
                continue
            # It may be written in another form, which then differs from text to text.
            if self._render_or_none(_replaced(messages, index, key, other), tools, cue) == text:
                return False
        if probes:
            return True
        try:
            text = self._render(_replaced(messages, index, key, None), tools, cue=cue)
        except _Refused:
            return True  # the template needs it
        return text != whole

    def _lost_here(
        self, messages: list, index: int, tools: list | None, text: str, is_answer: bool
    ) -> set[str]:
        """Return the keys whose own text the template leaves out of this message.

        A template may cut text by what it says, as up to "</think>".
        """
        message = messages[index]
        content = _content(message)
        lost = set()
        if content.strip() not in text:
            reasoning, mark, said = content.rpartition("</think>")
            if mark and reasoning.replace("<think>", "").strip():
                for rest in (said, said.lstrip()):
                    without = _with(messages, index, _saying(message, rest))
                    if self._render_or_none(without, tools, not is_answer) == text:
                        lost.add("reasoning")
                content = said
            for line in content.splitlines():
                if line.strip() and not _is_in(line.strip(), text):
                    rest = content.replace(line, "", 1)
                    without = _with(messages, index, _saying(message, rest))
                    if self._render_or_none(without, tools, not is_answer) == text:
                        lost.add("content")
        for key in ("tool_calls", *REASONING):
            value = message.get(key)
            if value and not all(_is_in(leaf, text) for leaf in _leaves(value)):
                without = _replaced(messages, index, key, None)
                if self._render_or_none(without, tools, not is_answer) == text:
                    lost.add(key)
        return lost

    def _check_places(self, messages: list, first: int, tools: list | None, start: int) -> None:
        """Check that nothing of a response is written before its start; raises Malformed.

        It would be lost there, since the prompt's text does not have it. first: the index of the
        response's first message.
        """
        if len(messages) == first + 1:
            return
        roles = tuple(message["role"] for message in messages)
        kind = (roles, first, bool(tools))
        if kind not in self._known.moved:
            moved = []
            for index in range(first, len(messages)):
                probed = _with(messages, index, _saying(messages[index], PROBE))
                text = self._render_or_none(probed, tools, False) or ""
                if 0 <= text.find(PROBE) < start:
                    moved.append(index)
            self._known.moved[kind] = tuple(moved)
        for index in self._known.moved[kind]:
            raise Malformed(
                f"the chat template moves {_a(roles[index])} message of a response to before the "
                "prompt",
                _shown(messages[index].get("content")),
                "put it into the prompt, or use a template that writes it in its place",
            )

    def _check_tools(self, prompt: list, tools: list | None, text: str) -> None:
        """Check that the template writes the definitions of tools; raises Malformed."""
        if not tools or "tools" in self.ignore:
            return
        roles = tuple(message["role"] for message in prompt)
        if roles not in self._known.loses_tools:
            self._known.loses_tools[roles] = self._render_or_none(prompt, None, True) == text
        names = [_function(tool).get("name") for tool in tools]
        names_found = all(_is_in(name, text) for name in names if isinstance(name, str))
        if self._known.loses_tools[roles] or not names_found:
            raise Malformed(
                "the chat template does not write the row's tools",
                ", ".join(map(str, names)),
                _way_out(["tools"]),
            )

    # rendering

    def _render(self, messages: list, tools: list | None, *, cue: bool = False) -> str:
        """Return messages as the template writes them; cue: with the generation prompt."""
        options = self.options | {"chat_template": self._template(tools)}
        try:
            with limited(RENDERING_SECONDS, RENDERING_MEMORY):
                text = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=cue, **options
                )
        except TimeoutError:
            raise self._fault(
                f"has not written a conversation within {RENDERING_SECONDS} seconds"
            ) from None
        except MemoryError:
            raise self._fault(
                f"takes more than {RENDERING_MEMORY / 1e9:.2g} GB of memory to write a conversation"
            ) from None
        except Exception as error:  # whatever the template raises: it is a program of its own
            raise _Refused(str(error)[:LONGEST_REASON]) from error
        if len(text) > LONGEST_TEXT:
            raise self._fault(
                f"writes {len(text):,} characters of one conversation; at most {LONGEST_TEXT:,} "
                "are read"
            )
        return text

    def _fault(self, what: str) -> ValueError:
        """Return the error for a template that does what none should, whatever the row."""
        return ValueError(
            f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} {what}. It may "
            "loop without an end: mend chat_template.jinja (or chat_template in "
            "tokenizer_config.json), or pass the row without what makes it loop."
        )

    def _render_or_none(self, messages: list, tools: list | None, cue: bool) -> str | None:
        """Return messages as text; None where the template refuses them."""
        try:
            return self._render(messages, tools, cue=cue)
        except _Refused:
            return None

    def _template(self, tools: list | None) -> str:
        """Return the template, with the date written in where it asks for today's."""
        # Some tokenizers have another template for conversations with tools.
        has_tools = bool(tools)
        if has_tools not in self._known.templates:
            named = self.options.get("chat_template")
            template = self.tokenizer.get_chat_template(named, tools)
            if "strftime_now" in template:
                template = _fixed_date(self.date) + template
            self._known.templates[has_tools] = template
        return self._known.templates[has_tools]

    def spells_special(self, messages: Iterable[Message]) -> bool:
        """Return whether what messages say spells a special token of the tokenizer."""
        if self._known.specials is None:
            added = self.tokenizer.added_tokens_decoder.values()
            specials = [re.escape(token.content) for token in added if token.special]
            self._known.specials = re.compile("|".join(specials) or "(?!)")  # (?!): nothing
        return any(self._known.specials.search(text) for text in _texts(messages))


@dataclass
class _Known:
    """What was found out about a template, so that it is asked once for many conversations."""

    templates: dict[bool, str] = field(default_factory=dict)  # by whether there are tools
    specials: re.Pattern | None = None  # all special tokens
    has_checked_options: bool = False
    ignored: set[str] = field(default_factory=set)  # names to ignore that messages had
    takes_parts: tuple[bool | None] | None = None  # content as a list of parts
    # What each kind of message loses in rendering: few kinds are met, and many messages.
    lost_keys: dict[tuple, frozenset] = field(default_factory=dict)
    tails: dict[tuple, str] = field(default_factory=dict)  # what ends a turn, by what follows it
    # Which messages of a response are written before it, by the roles of prompt and response.
    moved: dict[tuple, tuple[int, ...]] = field(default_factory=dict)
    loses_tools: dict[tuple, bool] = field(default_factory=dict)  # by the roles of the prompt


class _Refused(Exception):
    """The template raises an error for a conversation."""


@dataclass(frozen=True)
class _Form:
    """How what a row holds is given to the template."""

    arguments: str = ""  # of calls: "text", "object", or "" for as they are
    fills_content: bool = False  # "" where a message with calls has no content
    wraps_functions: bool = False  # calls and tools without "function" are put into one
    developer_is_system: bool = False
    as_parts: bool = False  # content as a list of parts

    def apply(self, message: Message) -> Message:
        """Return a message in this form."""
        message = dict(message)
        if self.as_parts and isinstance(message.get("content"), str):
            message["content"] = _parts(message["content"])
        if self.developer_is_system and message["role"] == "developer":
            message["role"] = "system"
        if message.get("tool_calls"):
            if self.fills_content:
                message.setdefault("content", "")
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return message

    def apply_to_tools(self, tools: list | None) -> list | None:
        """Return definitions of tools in this form."""
        if tools and self.wraps_functions:
            return [_wrapped(tool) for tool in tools]
        return tools

    def _call(self, call: dict) -> dict:
        if self.wraps_functions:
            call = _wrapped(call)
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._function(call["function"])}
        return self._function(call)

    def _function(self, function: dict) -> dict:
        arguments = function.get("arguments")
        if self.arguments == "text" and isinstance(arguments, dict | list):
            return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if self.arguments == "object" and isinstance(arguments, str):
            return {**function, "arguments": _parsed(arguments)}
        return function


def _forms(
    messages: list[Message], tools: list | None, takes_parts: bool | None
) -> Iterator[_Form]:
    """Yield the forms in which a template may take these messages, their own form first.

    Rows come with a call's arguments as an object or as its JSON, with null content or none at all
    beside calls, with calls in a "function" or bare, and with system texts of a developer. Some
    templates take only one of these. takes_parts: whether content is to be a list; None: unknown.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    is_bare = any("function" not in entry for entry in (*calls, *(tools or ())))
    is_developers = any(message["role"] == "developer" for message in messages)
    for as_parts in (False, True) if takes_parts is None else (takes_parts,):
        for developer_is_system in (False, True)[: 1 + is_developers]:
            for wraps_functions in (False, True)[: 1 + is_bare]:
                for arguments in ("", "object", "text")[: 3 if calls else 1]:
                    for fills_content in (False, True)[: 2 if calls else 1]:
                        yield _Form(
                            arguments,
                            fills_content,
                            wraps_functions,
                            developer_is_system,
                            as_parts,
                        )


def _wrapped(entry: dict) -> dict:
    """Return a call or a definition of a tool with what says which function in "function"."""
    if "function" in entry:
        return entry
    function = {key: value for key, value in entry.items() if key not in ("type", "id")}
    outer = {key: entry[key] for key in ("type", "id") if key in entry}
    return {"type": "function", **outer, "function": function}


def _listed_calls(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose tool calls are a list of objects; raises Malformed for other calls.

    One call may stand without a list, and the list as JSON. A call without arguments has {}.
    """
    found = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls is None or calls == "" or calls == []:
            found.append(message)
            continue
        listed = _parsed(calls, list | dict) if isinstance(calls, str) else calls
        if isinstance(listed, dict):
            listed = [listed]
        are_objects = isinstance(listed, list) and all(isinstance(call, dict) for call in listed)
        if not are_objects or not all(map(_function, listed)):
            raise Malformed(
                f"'tool_calls' of {_a(message['role'])} message is not a list of calls",
                _shown(calls),
                'a call is {"type": "function", "function": {"name": ..., "arguments": {...}}}',
            )
        found.append({**message, "tool_calls": [_with_arguments(call) for call in listed]})
    return found


def _with_arguments(call: dict) -> dict:
    """Return a call in which arguments that are null or blank are {}."""
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments", "" if set(call) <= {"name", "type", "id"} else {})
    is_blank = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    return {**call, "arguments": {}} if is_blank else call


def _listed_tools(tools) -> list | None:
    """Return definitions of tools as a list, None where there are none; raises Malformed."""
    if not tools:
        return None  # some templates write about tools where the list is empty
    listed = [tools] if isinstance(tools, dict) else tools
    if not isinstance(listed, list) or not all(map(_function, listed)):
        raise Malformed(
            "'tools' is not a list of definitions",
            _shown(tools),
            'a definition is {"type": "function", "function": {"name": ..., "parameters": {...}}}',
        )
    return listed


def _variables(template: str) -> tuple[set[str], set[str]]:
    """Return the names that a template may read from outside, and those that are its own.

    It may read its own names before it sets them, by mistake or to keep what is given.
    """
    import jinja2.meta

    # These tags are transformers' own, which jinja2 does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(plain)
    except Exception as error:  # jinja's, and what numbers and nesting beyond reason cause
        reason = (str(error) or type(error).__name__)[:LONGEST_REASON]
        raise ValueError(f"the chat template cannot be read: {reason}.") from error
    _check_numbers(tree)
    names = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
    assigned = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    # What it asks to be defined, or gives a default, is an option.
    for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter)):
        is_asked = node.name in ("defined", "undefined", "none", "default", "d")
        if is_asked and isinstance(node.node, jinja2.nodes.Name):
            assigned.discard(node.node.name)
    return names, assigned


def _check_numbers(tree) -> None:
    """Check that a template has no numbers to count to that no conversation has use of.

    No time limit ends one single operation, such as a power or a text that is repeated. Raises
    ValueError.
    """
    import jinja2

    for node in tree.find_all((jinja2.nodes.Pow, jinja2.nodes.Const)):
        is_number = isinstance(node, jinja2.nodes.Const) and type(node.value) in (int, float)
        if isinstance(node, jinja2.nodes.Pow) or (is_number and node.value > LARGEST_NUMBER):
            what = f"the number {node.value:.3g}" if is_number else "a power, **"
            raise ValueError(
                f"the chat template has {what} in line {node.lineno}, which could take for ever to "
                f"work out; write numbers up to {LARGEST_NUMBER:,}."
            )


def _fixed_date(date: datetime.date) -> str:
    """Return what stands before a template, so that it takes this day for today."""
    directives = {"%%": "%"}
    for flag, letter in itertools.product(DATE_FLAGS, DATE_LETTERS):
        directives[f"%{flag}{letter}"] = date.strftime(f"%{flag}{letter}")
    return FIXED_DATE.replace("DIRECTIVES", json.dumps(directives))


def _parts(text: str) -> list[dict]:
    """Return text as content in parts."""
    return [{"type": "text", "text": text}]


def _content(message: Message) -> str:
    """Return what a message says."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else content[0]["text"]


def _saying(message: Message, text: str) -> Message:
    """Return a message that says something else, in the form of its content."""
    is_text = isinstance(message.get("content", ""), str)
    return {**message, "content": text if is_text else _parts(text)}


def _plain(message: Message) -> Message:
    """Return a message that says the probe and holds nothing else."""
    return {"role": message["role"], "content": _saying(message, PROBE)["content"]}


def _parsed(text: str, kind=dict):
    """Return the JSON object in a text, or what else of a kind; the text where it holds none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, kind) else text


def _check_form(messages: list[Message], text: str) -> None:
    """Raise _Refused where the template has written a form as data, not what it holds."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and ("'type': 'text'" in text or '"type": "text"' in text):
            raise _Refused("content would be written as a list")
        for call in message.get("tool_calls") or ():
            arguments = _function(call).get("arguments")
            is_json = isinstance(arguments, str) and isinstance(_parsed(arguments), dict)
            if is_json and arguments not in text and json.dumps(arguments)[1:-1] in text:
                raise _Refused("arguments of a tool call would be JSON inside a JSON string")


def _function(call) -> dict:
    """Return a tool call's name and arguments, which most rows have under "function"."""
    if not isinstance(call, dict):
        return {}
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _reasoning(message: Message) -> str:
    """Return a message's reasoning, "" where it has none."""
    for key in REASONING:
        if message.get(key):
            return str(message[key])
    before, mark, _ = _content(message).partition("</think>")
    return before.replace("<think>", "") if mark else ""


def _holds(key: str, value) -> bool:
    """Return whether a key of a message carries content; role and ids do not."""
    if key in ("role", "id") or key.endswith("_id"):
        return False
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _probes(key: str, value, probe: str) -> list:
    """Return values like this one that hold the probe, each of which a template must write."""
    if key == "tool_calls" and isinstance(value, list):
        probes = []
        for index, call in enumerate(value):
            for probed in _probed_calls(call, probe):
                probes.append([*value[:index], probed, *value[index + 1 :]])
        return probes
    if key == "content" and isinstance(value, list):
        return [_parts(probe)]
    return [probe] if isinstance(value, str) else []


def _probed_calls(call, probe: str) -> list[dict]:
    """Return a tool call with the probe as its name, and one with it in its arguments."""
    function = _function(call)
    probed = [{**function, "name": probe}]
    if isinstance(function.get("arguments"), str):
        probed.append({**function, "arguments": json.dumps({probe: probe})})
    elif function.get("arguments"):
        probed.append({**function, "arguments": {probe: probe}})
    if isinstance(call, dict) and "function" in call:
        return [{**call, "function": function} for function in probed]
    return probed


def _leaves(value) -> Iterator[str]:
    """Yield the texts inside of a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if _holds(key, inner) and key != "type":
                yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)


def _is_in(piece: str, text: str) -> bool:
    """Return whether a text has a piece, stripped, as it is or as in JSON."""
    piece = piece.strip()
    if piece in text:
        return True
    return any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _stands_between(messages: list[Message], gap: str, answer: str) -> bool:
    """Return whether what these messages say stands in a gap between an answer's turns.

    What the answer has nowhere as it is, is written in another form, and cannot be looked for.
    """
    for message in messages:
        said = _content(message)
        if said.strip() and not gap.strip():
            return False
        if _is_in(said, answer) and not _is_in(said, gap):
            return False
    return True


def _replaced(messages: list[Message], index: int, key: str, value) -> list[Message]:
    """Return messages with another value for a key of one of them; None: without it."""
    message = {**messages[index], key: value}
    if value is None:
        del message[key]
        if key == "content":
            message[key] = ""
    return _with(messages, index, message)


def _with(messages: list[Message], index: int, message: Message) -> list[Message]:
    """Return messages with another one at a place."""
    return [*messages[:index], message, *messages[index + 1 :]]


def _contradicts(cue: str) -> Malformed:
    return Malformed(
        "the prompt already closes the thinking, but the response has reasoning",
        repr(cue),
        "let the template think, as many do with --config.data.template.enable_thinking=True",
    )


def _a(role: str) -> str:
    """Return a role with its article."""
    return f"an {role}" if role[:1] in "aeio" else f"a {role}"


def _way_out(keys: list[str]) -> str:
    """Return what to do about keys that a template does not write."""
    names = ",".join(keys)
    return f"use a template that does, or leave it out with --config.data.ignore={names}"


def _not_found(turn: int) -> Malformed:
    return Malformed(
        "the chat template writes the conversation so that an assistant turn cannot be told apart",
        f"message {turn + 1}",
        "use a template with {% generation %} marks, or rows of one answer each",
    )


def _shown(value) -> str:
    """Return a value, short enough for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) < 80 else text[:77] + "...")


def without_tail(text: str, eos: str | None) -> str:
    """Return the text without the white space after the EOS at its end."""
    stripped = text.rstrip()
    return stripped if eos and stripped.endswith(eos) else text


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    """Yield all that messages say: content, reasoning, tool calls and names."""
    for message in messages:
        for key, value in message.items():
            if key != "role" and _holds(key, value):
                yield from _leaves(value)

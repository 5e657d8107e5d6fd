"""Turn conversations into token ids with the tokenizer's chat template, and find which role wrote each token.

If the template has generation marks, they mark what the assistant wrote. Otherwise, and for other roles, the
conversation is rendered once per message, up to and including that message; what each rendering adds to the previous
one is the message's text. This text includes the header of the turn, which comes from the template. The assistant's own
part is the text after the generation prompt, including the token that ends the turn; the own part of any other role is
the content of its message.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from ..common.errors import UsageError, first_line
from ..common.files import digest_of
from ..common.special_tokens import special_tokens
from ..common.tokenizers import is_fast
from .documents import Conversation
from .encode import EncodedDocument, TemplateRefusal, spell

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
# Some templates print the current date. They print this one, so that a harvest can be continued on another day.
FIXED_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%H": "00", "%M": "00", "%S": "00"}
PROBE = "\ue000"  # a message content that occurs nowhere else
Span = tuple[int, int]  # characters of a rendered conversation


@dataclass(frozen=True)
class ChatEncoder:
    """Turns conversations into token ids and, if `roles` are given, marks the tokens that these roles wrote.

    Raises UsageError if the tokenizer has no chat template, or if its template is not valid Jinja.
    """

    tokenizer: Any
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "--chat-column needs a tokenizer with a chat template, but the tokenizer of this model has none. "
                "Choose an instruction-tuned model, or name a column of plain text with --text-column."
            )
        if not is_fast(self.tokenizer):
            raise UsageError(
                "--chat-column needs a tokenizer that returns the position of each token in the text. The tokenizer "
                f"of this model ({type(self.tokenizer).__name__}) is written in Python and does not. Convert the "
                "conversations to text, and name the column of that text with --text-column."
            )
        try:
            self.render([{"role": "user", "content": PROBE}])
        except TemplateRefusal as refusal:  # the template may accept only other roles
            if isinstance(refusal.__cause__, TemplateSyntaxError):
                raise UsageError(
                    f"The chat template of this tokenizer is not valid Jinja: {refusal}. Correct it in the model's "
                    "folder, or name a column of plain text with --text-column."
                ) from refusal

    @cached_property
    def template(self) -> str:
        """The tokenizer's template, with a fixed date."""
        template: str = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return template
        fixed = "".join(f" | replace('{code}', '{text}')" for code, text in FIXED_DATE.items())
        return f"{{% macro strftime_now(format) %}}{{{{ format{fixed} }}}}{{% endmacro %}}{template}"

    def identity(self) -> dict[str, Any]:
        """The entry of a cache's identity."""
        return {"template": digest_of(self.template), "roles": sorted(self.roles)}

    def encode(self, conversation: Conversation) -> EncodedDocument:
        """The ids of a conversation, including its template's special tokens, and the marks of its rows.

        Raises TemplateRefusal if the template rejects the conversation or prints a list of parts verbatim, and
        UsageError if the text written by the roles is not found.
        """
        text = self.render(conversation.messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = sorted(self.spans(conversation.messages, text)) if self.roles else []
        literals = self.literals(conversation.messages, text)
        ids: list[int] = []
        marks: list[int] = []
        for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            parts = spell(self.tokenizer, text[start:end]) if literals.get(start) == text[start:end] else [number]
            ids += parts
            marks += [int(any(first < end and start < last for first, last in spans))] * len(parts)
        return EncodedDocument(ids, marks if self.roles else ())

    def render(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        """The messages rendered as text; if `prompt` is set, followed by the header of the assistant's next turn."""
        return self._render(messages, add_generation_prompt=prompt)[0]

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[str, list[Span]]:
        present = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[present], chat_template=self.template, **self.tokenizer.special_tokens_map, **options
            )
        except Exception as error:  # raised by Jinja, by the template itself, or by an expression in it
            raise TemplateRefusal(first_line(error)) from error
        (text,), spans = rendered
        if any(str(message["content"]) in text for message in present if isinstance(message.get("content"), list)):
            raise TemplateRefusal("it expects text as content, but the content of a message is a list of parts")
        return text, [(int(first), int(last)) for first, last in spans[0]] if spans else []

    def literals(self, messages: Sequence[dict[str, Any]], text: str) -> dict[int, str]:
        """{position: token} for each special token that a message spells out. Such tokens are ordinary text.

        The positions are found by rendering the messages again with a mark inside each such token.
        """
        tokens = [token for token in special_tokens(self.tokenizer) if len(token) > 1]
        if not any(token in part for message in messages for part in strings(message) for token in tokens):
            return {}
        mark = next(character for character in map(chr, range(0xE000, 0xF8FF)) if character not in text)
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        broken = [replace_strings(message, lambda part: pattern.sub(break_with(mark), part)) for message in messages]
        marked = self.render(broken)
        if marked.replace(mark, "") != text:
            raise TemplateRefusal(
                "it renders a message that spells out a special token differently from other messages"
            )
        places = [match.start() - number for number, match in enumerate(re.finditer(mark, marked))]
        found = [(place - 1, pattern.match(text, place - 1)) for place in places]
        return {place: match[0] for place, match in found if match}

    def spans(self, messages: Sequence[dict[str, Any]], text: str) -> Iterator[Span]:
        """The characters of a rendered conversation that the roles wrote."""
        marked = ASSISTANT in self.roles and GENERATION_MARK.search(self.template) is not None
        if marked:
            yield from self._render(messages, return_assistant_tokens_mask=True)[1]
        for number, message in enumerate(messages):
            if message["role"] in self.roles and not (marked and message["role"] == ASSISTANT):
                start, end = (self.prefix_length(messages[:count], text) for count in (number, number + 1))
                first, last = self.own_part(messages, number, text, start, end)
                if first < last:
                    yield first, last

    def prefix_length(self, messages: Sequence[dict[str, Any]], text: str) -> int:
        """The number of characters that the first messages of a conversation, rendered on their own, have.

        Raises UsageError unless `text`, the rendered conversation, begins with these characters.
        """
        if not messages:
            return 0
        try:
            prefix = self.render(messages)
        except TemplateRefusal:
            prefix = None
        if prefix is None or not text.startswith(prefix):
            raise UsageError(
                f"This chat template does not render the first {len(messages)} messages in the same way on their "
                "own as within the whole conversation, so it is not clear what each role wrote. Use a tokenizer whose "
                "template has {% generation %} marks and pass --roles assistant, or leave out --roles."
            )
        return len(prefix)

    def own_part(self, messages: Sequence[dict[str, Any]], number: int, text: str, start: int, end: int) -> Span:
        """What the role itself wrote in message `number`, which adds text[start:end] to the rendered conversation."""
        if messages[number]["role"] == ASSISTANT:
            header = self.render(messages[:number], prompt=True) if number else ""
            if len(header) > start and text.startswith(header):
                return len(header), len(header) + len(text[len(header) : end].rstrip())
        content = "".join(strings(messages[number].get("content"))).strip()
        probe = self.render([*messages[:number], {**messages[number], "content": PROBE}])
        place = probe.find(PROBE)
        if text[place : place + len(content)] != content or not start <= place <= end - len(content):
            raise UsageError(
                f"This chat template changes the content of a message with the role {messages[number]['role']!r}, so "
                "it is not clear what that role wrote. Leave out --roles, or convert the column to text."
            )
        return place, place + len(content)


def strings(value: Any) -> Iterator[str]:
    """The strings in a message or its content; if the content is a list of parts, the text of each part."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            if name not in ("role", "type"):
                yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def replace_strings(value: Any, change: Any) -> Any:
    """A copy of a message in which `change` is applied to every string that `strings` yields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: one if name in ("role", "type") else replace_strings(one, change) for name, one in value.items()}
    return [replace_strings(one, change) for one in value] if isinstance(value, list) else value


def break_with(mark: str) -> Any:
    """A replacement for `re.sub` that puts a mark after the first character of each match."""
    return lambda match: match[0][0] + mark + match[0][1:]

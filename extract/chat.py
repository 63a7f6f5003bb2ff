"""Chat templates, rendered so that the same messages give the same text on every day.

A template is a program (Jinja) that a checkpoint brings along. It may ask for today's date and may draw at random; both
would put two different texts into one store, so the date comes from the recipe and random functions are refused. What
ends an assistant's turn is found by rendering conversations and comparing them, not by the name of a token.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from ..errors import CorpusError, KavaError, RecipeError

if TYPE_CHECKING:
    import jinja2.nodes

Message = dict[str, Any]

_USER, _ASSISTANT, _NEXT, _SYSTEM = "\ue000", "\ue001", "\ue002", "\ue003"
"""Contents of the conversations that are compared: characters that no template writes."""
_RANDOM: Final = {"random": "the filter `random`", "lipsum": "the function `lipsum`"}


@dataclass(frozen=True)
class TurnEnd:
    """Text that ends an assistant's turn, without the white space after it."""

    inner: str
    """After a turn that another message follows."""
    final: str
    """After the last message."""


@dataclass
class ChatTemplate:
    """A tokenizer's chat template with a fixed date."""

    tokenizer: Any
    """A Hugging Face tokenizer."""
    date: datetime.date | None = None
    """Date that the template prints as today's; None if it prints none."""

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """Render a conversation.

        Args:
            messages: at least one, in the form that Hugging Face templates read (`role`, `content`, ...).
            ask: whether to add the header that an assistant continues (`add_generation_prompt`).

        Raises:
            CorpusError: if the tokenizer has no template, or the template refuses these messages.
            RecipeError: if the template prints today's date and none is set, or draws at random.
        """
        self._refuse_random()
        try:
            return self._apply(list(messages), ask)
        except KavaError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        filled = [m | {"content": ""} if m.get("content") is None else m for m in messages]
        if filled != list(messages):  # A turn that only calls tools has no content; many templates expect a string.
            try:
                return self._apply(filled, ask)
            except KavaError:
                raise
            except Exception as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise CorpusError(
            f"the chat template cannot render messages of the roles {roles}: {reason}. Change the messages, or set "
            "chat_template: false"
        )

    def check(self) -> None:
        """Render a conversation, so that what is wrong with the template shows before any record is read.

        Raises:
            CorpusError: if there is no template, or it cannot render a question and an answer.
            RecipeError: if the template prints today's date and none is set, or draws at random.
        """
        self._probe([{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}])

    @cached_property
    def generation_prompt(self) -> str:
        """Header of an assistant's turn, which the assistant does not write itself; empty if there is none."""
        asked = [{"role": "user", "content": _USER}]
        plain, asking = self._probe(asked), self._probe(asked, ask=True)
        # Not always a continuation: some templates end a conversation that nobody is asked to continue.
        return asking.removeprefix(self._shared(plain, asking))

    @cached_property
    def turn_end(self) -> TurnEnd:
        """Text that ends an assistant's turn: what follows it both inside and at the end of a conversation."""
        turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
        final = self._probe(turns).rpartition(_ASSISTANT)[2]
        try:
            longer = self._probe([*turns, {"role": "user", "content": _NEXT}])
        except CorpusError:  # Templates of a single turn.
            longer = ""
        inner = longer.rpartition(_ASSISTANT)[2].partition(_NEXT)[0] if longer else final
        shared = self._shared(final, inner).rstrip()
        return TurnEnd(shared, shared or final.rstrip())

    @cached_property
    def constants(self) -> list[str]:
        """String constants of the template's program, longest first: it may look for any of them in a message."""
        import jinja2.nodes

        values = {node.value for node in self._program.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return sorted((value for value in values if value.strip()), key=lambda value: (-len(value), value))

    def _shared(self, first: str, second: str) -> str:
        """Return the longest common beginning of two texts that ends where a token of both ends."""
        length = next(
            (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        for text in (first, second):
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            length = max((stop for _, stop in encoding["offset_mapping"] if stop <= length), default=0)
        return first[:length]

    def _probe(self, turns: list[Message], *, ask: bool = False) -> str:
        """Render a conversation that stands for others, with a system prompt if the template insists on one."""
        try:
            return self.render(turns, ask=ask)
        except CorpusError:
            with suppress(CorpusError):
                return self.render([{"role": "system", "content": _SYSTEM}, *turns], ask=ask)
            raise

    def _apply(self, messages: list[Message], ask: bool) -> str:
        dates = {} if self.date is None else {"date_string": self.date.strftime("%d %b %Y")}
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, strftime_now=self._strftime_now, **dates
            )
        )

    def _strftime_now(self, form: str) -> str:
        if self.date is None:
            raise RecipeError(
                "chat_template_date: the chat template prints today's date, which would differ from day to day. Set "
                "chat_template_date to a fixed date, for example 2025-01-01"
            )
        return datetime.datetime.combine(self.date, datetime.time()).strftime(form)

    def _refuse_random(self) -> None:
        if self._random is not None:
            raise RecipeError(
                f"chat_template: the template calls {self._random}, so that no two renderings are equal. Give the "
                "tokenizer another template, or set chat_template: false"
            )

    @cached_property
    def _random(self) -> str | None:
        import jinja2.nodes

        filters = {node.name for node in self._program.find_all(jinja2.nodes.Filter)}
        names = {node.name for node in self._program.find_all(jinja2.nodes.Name)}
        used = (filters & {"random"}) | (names & {"lipsum"})
        return _RANDOM[min(used)] if used else None

    @cached_property
    def _program(self) -> jinja2.nodes.Template:
        """Syntax tree of the template."""
        import jinja2
        import jinja2.ext
        import jinja2.nodes

        class Generation(jinja2.ext.Extension):
            """The tag of transformers around what an assistant writes."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        try:
            source = self.tokenizer.get_chat_template()
        except ValueError:
            raise CorpusError(
                "the tokenizer has no chat template. Set chat_template: false, or use a model that has one"
            ) from None
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        try:
            return environment.parse(source)
        except jinja2.TemplateError as error:
            raise CorpusError(f"the chat template is not valid Jinja: {error}. Set chat_template: false") from None

"""Conversations as token ids, through the tokenizer's own chat template, and which of them the assistant says.

Those are marked by the template itself where it has generation markers. Else by the difference of what it renders: a
turn is what stands there with the message and not before it. Nothing is found by searching for strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError

SPEAKER = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what begins the assistant's part of a template


@dataclass(frozen=True, eq=False)
class Example:
    """Something whole that is trained on or scored. `ids` uint32 [n]; `scored` bool [n]: which are targets; `bytes`:
    of UTF-8 of what is scored, without special tokens; `cut`: tokens that were too many."""

    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_]
    bytes: int
    cut: int = 0


def conversation_text(messages: Sequence[Any], tools: Any = None) -> str:
    """The one way in which a conversation is written down: JSON of its messages, and its tools where it has any."""
    whole: dict[str, Any] = {"messages": list(messages)}
    if tools:
        whole["tools"] = tools
    return json.dumps(whole, ensure_ascii=False)  # keys in their order: templates write tools out as they are


def said_in(text: str) -> str:
    """What is said in a conversation, by all but the system: that by which two are akin."""
    messages = json.loads(text)["messages"]
    return "\n".join(str(m.get("content") or "") for m in messages if m.get("role") != "system")


class ChatTemplate:
    """A tokenizer's chat template, ready to encode conversations.

    Raises:
        DataError: the tokenizer has none.
    """

    def __init__(self, directory: Path, setting: str = "data.tokenizer") -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{setting}: {directory} cannot be read as a tokenizer ({error})") from None
        template = self.tokenizer.chat_template
        if not template:
            raise DataError(
                f"{setting}: {directory} has no chat template; take a tokenizer that has one, or put a "
                "chat_template.jinja into its folder"
            )
        self.directory, self.setting = directory, setting
        self.marks = isinstance(template, str) and MARKED.search(template) is not None
        self.special = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}

    def encode(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None, *, longest: int | None = None
    ) -> list[Example]:
        """Each conversation (of `conversation_text`) as an example, whose targets are the assistant's tokens.

        Args:
            progress: told conversations done and to do.
            longest: what has more tokens keeps its first so many; the rest is `cut`.

        Raises:
            DataError: the template refuses one, or does not show which tokens are the assistant's.
        """
        out = []
        for number, text in enumerate(texts):
            whole = json.loads(text)
            out.append(_shortened(self._encoded(whole["messages"], whole.get("tools")), longest))
            if progress is not None and (number % 256 == 255 or number + 1 == len(texts)):
                progress(number + 1, len(texts))
        return out

    def _encoded(self, messages: list[dict[str, Any]], tools: Any) -> Example:
        rendered = self._rendered(messages, tools)
        spans = self._spans(messages, tools, rendered)
        found = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        at_N2 = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        scored_N = np.zeros(len(at_N2), bool)
        for start, stop in spans:
            scored_N |= (at_N2[:, 0] >= start) & (at_N2[:, 1] <= stop) & (at_N2[:, 1] > at_N2[:, 0])
        ids_N = np.asarray(found["input_ids"], np.uint32)
        said = sum(len(_without(rendered[start:stop], self.special).encode()) for start, stop in spans)
        return Example(ids_N, scored_N, said)

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
            )
        except Exception as error:  # a template raises what it likes
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.setting}: the chat template of {self.directory} refuses a conversation: {said}; it is: "
                f"{_short(messages)}"
            ) from None

    def _spans(self, messages: list[dict[str, Any]], tools: Any, rendered: str) -> list[tuple[int, int]]:
        """Where the assistant speaks: (start, stop) in the rendered text, ascending."""
        if self.marks:
            return self._marked(messages, tools)
        out = []
        for at, message in enumerate(messages):
            if message.get("role") != SPEAKER:
                continue
            before = self._rendered(messages[:at], tools, prompt=True) if at else ""
            with_it = self._rendered(messages[: at + 1], tools)
            if not (with_it.startswith(before) and rendered.startswith(with_it)):
                raise DataError(
                    f"{self.setting}: the chat template of {self.directory} writes a turn otherwise when others "
                    "follow, so its tokens cannot be told by what it adds; put {% generation %} markers around what "
                    f"the assistant says; the conversation: {_short(messages)}"
                )
            out.append((len(before), self._end_of(rendered, len(before), len(with_it))))
        return out

    def _marked(self, messages: list[dict[str, Any]], tools: Any) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(int(start), int(stop)) for start, stop in spans[0]]

    def _end_of(self, rendered: str, start: int, stop: int) -> int:
        """Where a turn ends: with its last special token, if only blanks follow that; the template adds those."""
        text = rendered[start:stop]
        bare = text.rstrip()
        return start + len(bare) if any(bare.endswith(token) for token in self.special) else stop


def _shortened(example: Example, longest: int | None) -> Example:
    if longest is None or len(example.ids) <= longest:
        return example
    kept = example.scored[:longest]
    share = kept.sum() / max(1, example.scored.sum())
    return Example(example.ids[:longest], kept, round(example.bytes * float(share)), len(example.ids) - longest)


def _without(text: str, special: set[str]) -> str:
    for token in special:
        text = text.replace(token, "")
    return text


def _short(messages: Any) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}…"

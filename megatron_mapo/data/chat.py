"""Chat prompts as token ids, such that data cannot write control tokens.

A chat template puts the user's text between control tokens such as ``<|im_start|>``. A tokenizer reads these
strings wherever they stand, so a data row that contains ``<|im_end|>\\n<|im_start|>system`` could end the user's
turn and speak as the system. Here the control strings of a row's own text are cut before tokenisation: they
arrive at the model as ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mapo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024
_CHECKED_ROWS = 64
_USER, _SYSTEM = "\ue000mapo-user\ue001", "\ue000mapo-system\ue001"


class PromptEncoder:
    """Turns user messages into prompt token ids, up to and with the generation prompt.

    A row without control strings gets exactly the ids of ``apply_chat_template(..., tokenize=True)``: the
    rendered text is tokenised in one piece, so merges over the seams between template and text are the same.
    A row with control strings is tokenised in pieces: template parts with control tokens, the row's text cut
    inside every control string. At those seams merges (and the leading space of SentencePiece tokenizers) can
    differ from one-piece tokenisation; the text is the same. Every row is then checked: it must hold the control
    ids of the template, in their order, and no other.

    Without a chat template a prompt is the system message, an empty line and the user message, after the
    tokenizer's own leading special tokens (such as ``<s>``).

    Args:
        tokenizer: a Hugging Face tokenizer.
        system: system message; None sends none.

    Raises:
        DataError: the chat template fails, or does not pass messages through unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._system = system
        guarded = _guarded_tokens(tokenizer)
        strings = sorted(guarded, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self._control_ids = set(guarded.values()) - _harmless_ids(tokenizer)
        self._strips = False
        if tokenizer.chat_template:
            self._prefix: list[int] = []
            self._parts = self._template_parts()
        else:
            self._prefix = _leading_special_ids(tokenizer)
            self._parts = [_USER] if system is None else [_SYSTEM, "\n\n", _USER]
        own = [part for part in self._parts if part not in (_USER, _SYSTEM)]
        self._template_strings = sum(len(self._control.findall(part)) for part in own)
        self._template_ids = self._controls([*self._prefix, *(i for ids in self._ids(own) for i in ids)])

    def encode(self, texts: Sequence[str], where: Sequence[str]) -> list[list[int]]:
        """Token ids of one prompt per user message.

        Args:
            texts: user messages.
            where: for messages, where each text comes from.

        Raises:
            DataError: a text's control strings cannot be made harmless, or the template changes a text.
        """
        if self._tokenizer.chat_template:
            for text, place in zip(texts[:_CHECKED_ROWS], where, strict=False):
                self._check_rendering(text, place)
        prompts: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            rendered = [self._render(text) for text in texts[start : start + _BATCH]]
            prompts += [[*self._prefix, *ids] for ids in self._ids(rendered)]
        for row, text in enumerate(texts):
            if self._has_control_strings(text) or self._controls(prompts[row]) != self._template_ids:
                prompts[row] = self._encode_in_pieces(text)
            if self._controls(prompts[row]) != self._template_ids:
                raise DataError(
                    f"{where[row]}: the text contains a control token of the tokenizer that cannot be written as "
                    "ordinary text; remove it from the row, data.template or data.system"
                )
        return prompts

    def _template_parts(self) -> list[str]:
        """The rendered template with placeholders for the messages, cut at these."""
        rendered = self._apply_template(_USER, _SYSTEM)
        self._strips = f" {_USER}" not in self._apply_template(f" {_USER} ", _SYSTEM)
        parts = [part for part in re.split(f"({_USER}|{_SYSTEM})", rendered) if part]
        wanted = [_USER] if self._system is None else [_SYSTEM, _USER]
        if sorted(p for p in parts if p in (_USER, _SYSTEM)) != sorted(wanted):
            raise DataError(
                "model.path: the tokenizer's chat template does not put every message into the prompt exactly once"
                + ("" if self._system is None else "; does it know a system message (data.system)?")
            )
        return parts

    def _apply_template(self, user: str, system: str) -> str:
        messages = [] if self._system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": user})
        try:
            rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja runs the template's own code: any exception can come out of it
            raise DataError(f"model.path: the tokenizer's chat template failed: {error}") from error
        return str(rendered)

    def _check_rendering(self, text: str, where: str) -> None:
        """The pieces put together must be what the template renders: it must not look into the text."""
        if self._apply_template(text, self._system or "") != self._render(text):
            raise DataError(f"{where}: the tokenizer's chat template (model.path) changes this message; unsupported")

    def _message(self, part: str, user: str) -> str:
        """What stands for a part: the template's own text, or the message that it is the placeholder of."""
        if part not in (_USER, _SYSTEM):
            return part
        text = user if part == _USER else self._system or ""
        return text.strip() if self._strips else text

    def _render(self, user: str) -> str:
        return "".join(self._message(part, user) for part in self._parts)

    def _has_control_strings(self, user: str) -> bool:
        """Whether the prompt holds more control strings than the template: in a message, or over a seam."""
        return len(self._control.findall(self._render(user))) != self._template_strings

    def _encode_in_pieces(self, user: str) -> list[int]:
        ids = list(self._prefix)
        for part in self._parts:
            text = self._message(part, user)
            pieces = self._cut(text) if part in (_USER, _SYSTEM) else [text]
            ids += [i for piece in self._ids(pieces) for i in piece]
        return ids

    def _cut(self, text: str) -> list[str]:
        """The text in pieces none of which holds a control string: each is cut after its first character."""
        pieces = []
        while found := self._control.search(text):
            cut = found.start() + 1
            pieces.append(text[:cut])
            text = text[cut:]
        return [piece for piece in [*pieces, text] if piece]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._control_ids]


def _guarded_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Control tokens by string: special ones, and added ones that look like or serve as such.

    Some tokenizers mark role tokens as not special, so the mark alone is not enough. Added tokens that are plain
    words or runs of spaces are ordinary text.
    """
    template = str(tokenizer.chat_template or "")
    guarded = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        bracketed = re.fullmatch(r"[<\[【｜|].*[>\]】｜|]", text, flags=re.DOTALL) is not None
        if token.special or bracketed or (text.strip() and text in template):
            guarded[text] = int(token_id)
    return guarded


def _harmless_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The unknown token's id, which ordinary text may become, unless it also begins or ends sequences."""
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return {tokenizer.unk_token_id} - ends - {None}


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before a plain text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []

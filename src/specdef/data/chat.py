"""Prompts and completions in the words of a tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from specdef.errors import SpecDefError


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_texts(tokenizer: Any, prompt: str, completion: str, place: str) -> tuple[str, str]:
    """Write a user's turn and the assistant's as the model was trained to read them.

    Args:
        tokenizer: With a chat template.
        prompt: What the user says.
        completion: What the assistant answers.
        place: Where the row stands, for messages.

    Returns:
        All that stands before the answer, and the answer with what ends it. Together they are what the template makes of
        both turns, special tokens included.

    Raises:
        SpecDefError: The template cannot be used on these two turns, or writes the first otherwise once the second follows.
    """
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    hint = "Leave the chat template out."
    try:
        head = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a program of the tokenizer's authors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecDefError(
            f"{place}: the tokenizer's chat template fails ({reason[:120]}).", hint=hint
        ) from error
    if not whole.startswith(head):
        raise SpecDefError(
            f"{place}: the tokenizer's chat template writes a prompt otherwise once an answer follows.",
            hint=hint,
        )
    return head, whole[len(head) :]

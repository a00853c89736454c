"""Rows as TRL's and transformers' users have them, made into this project's.

    dialogue     {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}       or
                 {"conversations": [{"from": "system" | "human" | "gpt", "value": str}, ...]}        (ShareGPT)
    completion   {"prompt": P, "completion": C}
    preference   {"prompt": P, "chosen": C, "rejected": C}                                           or
                 {"chosen": dialogue, "rejected": dialogue}, whose common beginning is the prompt
    prompt       {"prompt": P}

P is a text, which a user says, or a list of messages; C is a text, or one message of the assistant, alone or in a list.
The last reply of a dialogue is the completion; one that ends with its user is a prompt. Fields beside these keep their
meaning (`score`, `provenance`, ...). What has no place in a record is refused, not left out: calls of tools, pictures
(see `unread_fields.py`), other roles, a system text in the middle of a dialogue.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from chatrlhf.data.json_row import Row, describe
from chatrlhf.data.unread_fields import NO_TOOLS, OF_MESSAGES, OF_ROWS, refuse_unread
from chatrlhf.errors import DataError

DIALOGUES = ("messages", "conversations")
REPLIES = ("completion", "chosen", "rejected")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
TEXTS = ("prompt", *REPLIES, "user_input")
LISTED = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # messages that were written as text


@dataclass(frozen=True)
class Message:
    """What one side said, or the system text before it."""

    role: str
    text: str
    name: str | None = None


def in_our_shape(row: Row) -> Row:
    """The row with this project's fields; as it is where it has them, but for numbers that a CSV file has as text.

    Raises:
        DataError: with place and field; also where the row says more than a record can hold.
    """
    refuse_unread(row, OF_ROWS)
    if row.of_text:
        row = _of_cells(row)
    is_ours = "user_input" in row or "turns" in row
    if is_ours or not (_dialogue(row) or _is_listed(row) or ("prompt" in row and "text" not in row)):
        return row
    rest = {name: value for name, value in row.values.items() if name not in ("prompt", *DIALOGUES, *REPLIES)}
    is_pair = "chosen" in row or "rejected" in row
    return replace(row, values=rest | (_pair(row) if is_pair else _completed(row)))


def _of_cells(row: Row) -> Row:
    """A row of a CSV file with its score as a number. Raises DataError for lists, which a cell cannot hold."""
    for field in TEXTS:
        if field in row and LISTED.match(row.values[field]):
            raise row.wrong(field, "its text is a list of messages, which would be learned as text; use JSONL")
    return row.with_numbers("score")


def _dialogue(row: Row) -> str | None:
    return next((field for field in DIALOGUES if field in row), None)


def _is_listed(row: Row) -> bool:
    return any(isinstance(row.values.get(field), list) for field in ("chosen", "rejected"))


def _pair(row: Row) -> dict[str, Any]:
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    is_whole = chosen[0].role != "assistant" or not ("prompt" in row or _dialogue(row))
    if not is_whole:
        prompt = _prompt(row)
    else:
        common = 0
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if not prompt:
            raise row.wrong("rejected", "it has no message in common with 'chosen' before the replies; add 'prompt'")
        _check_agreement(row, prompt, "chosen")
    replies = {"chosen": _reply(row, "chosen", chosen), "rejected": _reply(row, "rejected", rejected)}
    return _prompt_fields(row, prompt) | replies | _completion(row)


def _completion(row: Row) -> dict[str, Any]:
    return {"completion": _reply(row, "completion", _said(row, "completion"))} if "completion" in row else {}


def _completed(row: Row) -> dict[str, Any]:
    if isinstance(label := row.values.get("label"), bool) or (row.of_text and str(label).lower() in ("true", "false")):
        raise row.wrong(
            "label", "no stage trains on single replies that are called good or bad; give scores, or pairs of replies"
        )
    given = _completion(row)
    field = _dialogue(row)
    if field is None:
        return _prompt_fields(row, _prompt(row)) | given
    prompt = _messages(row, field)
    if prompt[-1].role == "assistant":
        if given:
            raise row.wrong("completion", f"{field!r} ends with a reply, too; remove one of them")
        given = {"completion": prompt[-1].text}
        prompt = prompt[:-1]
    _check_agreement(row, prompt, field)
    return _prompt_fields(row, prompt) | given


def _prompt(row: Row) -> list[Message]:
    """What stands before the replies, of a row that does not say it in them."""
    field = "prompt" if "prompt" in row else _dialogue(row)
    if field is not None and isinstance(row.values[field], list):
        messages = _messages(row, field)
        if messages[-1].role == "assistant":
            raise row.wrong(field, "it ends with a message of the assistant; a prompt ends with what is to be answered")
        return messages
    return [Message("user", row.text("prompt"))]


def _prompt_fields(row: Row, messages: list[Message]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if messages and messages[0].role == "system":
        if row.optional_text("system") not in (None, messages[0].text):
            raise row.wrong("system", "it is not what the first message says; remove one of them")
        fields["system"] = messages[0].text
        messages = messages[1:]
    if len(messages) == 1 and messages[0].role == "user" and messages[0].name is None:
        return fields | {"user_input": messages[0].text}
    turns = [{name: value for name, value in vars(message).items() if value is not None} for message in messages]
    return fields | {"turns": turns}


def _check_agreement(row: Row, messages: list[Message], field: str) -> None:
    """A prompt beside a whole dialogue is often its first question; where it is anything else, it is not ignored."""
    if "prompt" not in row:
        return
    if isinstance(row.values["prompt"], list):
        agrees = _messages(row, "prompt") == messages
    else:
        said = row.text("prompt").strip()
        agrees = said in [message.text.strip() for message in messages if message.role == "user"]
    if not agrees:
        raise row.wrong("prompt", f"it is not what {field!r} says; correct one of them, or remove prompt")


def _reply(row: Row, field: str, messages: list[Message]) -> str:
    if len(messages) != 1 or messages[0].role != "assistant":
        found = f"{len(messages)} messages" if len(messages) != 1 else f"one of the {messages[0].role}"
        raise row.wrong(field, f"expected one message of the assistant behind the prompt, got {found}")
    return messages[0].text


def _said(row: Row, field: str) -> list[Message]:
    value = row.values.get(field)
    if isinstance(value, list):
        return _messages(row, field)
    return [_message(row.row(field))] if isinstance(value, dict) else [Message("assistant", row.text(field))]


def _messages(row: Row, field: str) -> list[Message]:
    messages = [_message(each) for each in row.rows(field)]
    if not messages:
        raise row.wrong(field, "it holds no message")
    for number, message in enumerate(messages[1:], start=2):
        if message.role == "system":
            raise row.wrong(field, f"number {number} is a system text, which stands at the beginning or nowhere")
    return messages


def _message(row: Row) -> Message:
    refuse_unread(row, OF_MESSAGES)
    by = "from" if "from" in row and "role" not in row else "role"
    role = row.text(by)
    if role not in ROLES:
        allowed = "'system', 'user' or 'assistant'" if by == "role" else "'system', 'human' or 'gpt'"
        tools = f"; {NO_TOOLS}" if role.startswith(("tool", "function", "observation", "ipython")) else ""
        raise DataError(f"{row.place}, field {by!r}: expected {allowed}, got {describe(role)}{tools}")
    field = "value" if "value" in row.values and "content" not in row.values else "content"
    if isinstance(row.values.get(field), list):
        raise row.wrong(field, f"expected text, got {describe(row.values[field])}; join the texts of its parts")
    return Message(ROLES[role], row.text(field), row.optional_text("name"))

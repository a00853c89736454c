"""Fields that a record has no room for, and without which the model would learn something else than the row says.

They are refused where they hold anything. All other fields that nothing reads (ids, categories, sources) are ignored.
"""

from __future__ import annotations

from chatrlhf.data.json_row import Row

NO_TOOLS = "calls of tools have no place in a record; leave such rows out"
NO_MEDIA = "only text is trained on, and the reply would be learned without it; leave such rows out"
NO_REASONING = "a record has no room for reasoning beside the reply; write it into the reply, or remove the field"
NO_DOCUMENTS = "a record has no room for documents; write them into the prompt, or remove the field"

MEDIA = dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), NO_MEDIA)
TOOLS = dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), NO_TOOLS)
OF_MESSAGES = {
    **MEDIA,
    **TOOLS,
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), NO_REASONING),
    "documents": NO_DOCUMENTS,
}
OF_ROWS = {
    **MEDIA,
    **TOOLS,
    "reasoning_content": NO_REASONING,
    "documents": NO_DOCUMENTS,
    "history": "earlier turns are read as 'turns' or 'messages'; put them there, or remove the field",
    **dict.fromkeys(("system_prompt", "system_message"), "the system text is read as 'system'; rename the field"),
    "chat_template_kwargs": "templates are rendered without options of single rows; remove the field",
}


def refuse_unread(row: Row, fields: dict[str, str]) -> None:
    """Refuse a row, or a message, that holds anything in one of some fields.

    Args:
        fields: their names, each with what to do about it.

    Raises:
        DataError: with place and field.
    """
    for field, value in row.values.items():
        if value and field in fields:
            raise row.wrong(field, fields[field])

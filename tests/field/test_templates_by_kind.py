"""Kinds of chat templates that no table of public ones holds: what they look at, where they close a turn.

For each: prompts are `apply_chat_template`'s of the finished folder, rows begin as it shows the conversation (or are
refused by name), every earlier reply is trained up to the token that closes it, and the last one ends with that token.
"""

from __future__ import annotations

import pytest
from id_for_id import dialogues, messages_of, tokenizer
from transformers import AutoTokenizer

from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.templates import get_template
from chatrlhf.errors import DataError

ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN, CLOSE = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}"
TURNS = "{% for m in messages %}" + OPEN + "{{ m.content }}" + CLOSE + "{% endfor %}"
KINDS = {
    "turns of one side are one": (
        "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}" + OPEN + "{% endif %}"
        "{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}" + CLOSE + "{% endif %}"
        "{% endfor %}" + ASKS
    ),
    "a system text of its own": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        + TURNS
        + ASKS
    ),
    "the system text inside the last user's turn": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in rest %}"
        "{% if m.role == 'user' %}[INST] {% if s and m == users[-1] %}{{ s + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "EOS between turns alone": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\n' }}{% elif m.role == 'assistant' %}"
        "{{ 'A: ' + m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% else %}{{ m.content + '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    ),
    "EOS in front of the next turn": (
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}{{ eos_token }}{% endif %}"
        "{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content }}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "the last reply is left open": (
        "{% for m in messages %}"
        + OPEN
        + "{{ m.content }}{% if not (loop.last and m.role == 'assistant') %}"
        + CLOSE
        + ""
        "{% endif %}{% endfor %}" + ASKS
    ),
    "turns are counted": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + (loop.index | string) + ':' + m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' + ((messages | length + 1) | string) + ':' }}{% endif %}"
    ),
    "content is trimmed": (
        "{{ bos_token }}{% for m in messages %}" + OPEN + "{{ m.content | trim }}" + CLOSE + "{% endfor %}" + ASKS
    ),
    "earlier thoughts are left out": (
        "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c and not loop.last %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        + OPEN
        + "{{ c }}"
        + CLOSE
        + "{% endfor %}"
        + ASKS
    ),
    "all thoughts are left out": (
        "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        + OPEN
        + "{{ c }}"
        + CLOSE
        + "{% endfor %}"
        + ASKS
    ),
    "parts of a message": (
        "{% for m in messages %}" + OPEN + "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}" + CLOSE + "{% endfor %}" + ASKS
    ),
    "generation markers": (
        "{% for m in messages %}"
        + OPEN
        + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}" + CLOSE + "{% endif %}{% endfor %}" + ASKS
    ),
    "BOS in every turn": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    # What these show of a conversation without its last reply is no beginning of what they show with it.
    "lengths of messages": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (m.content | length | string) + '\n' + m.content }}"
        + CLOSE
        + "{% endfor %}"
        + ASKS
    ),
    "the number of messages": "{{ '# ' + (messages | length | string) + '\n' }}" + TURNS + ASKS,
    "a mark on the last message": (
        "{% for m in messages %}{% if loop.last and m.role == 'user' %}{{ '<|observation|>' }}{% endif %}" + OPEN + ""
        "{{ m.content }}" + CLOSE + "{% endfor %}" + ASKS
    ),
}
REFUSED = {"lengths of messages", "the number of messages", "a mark on the last message"}
CLOSED_BY = {name: "</s>" for name in KINDS if "EOS" in name or "user's turn" in name or "BOS" in name}


def trained_parts(ids: list[int], labels: list[int]) -> list[list[int]]:
    parts, inside = [], False
    for id, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            inside = False
            continue
        if not inside:
            parts.append([])
        inside = True
        parts[-1].append(id)
    return parts


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["byte-level", "Metaspace first"])
def test_a_kind_of_template(name, kind, tmp_path):
    own = tokenizer(kind)
    own.chat_template = KINDS[name]
    encoder = Encoder.of(own, get_template("chat", tokenizer=own), 10**6)
    encoder.save(tmp_path)
    left = AutoTokenizer.from_pretrained(tmp_path)
    closed_by = CLOSED_BY.get(name, "<|end|>" if name == "turns are counted" else "<|im_end|>")
    assert encoder.tokenizer.eos_token == closed_by
    for prompt, reply in dialogues(12, seed=5):
        messages = messages_of(prompt)
        asked = encoder.prompt(prompt)
        assert asked == left.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if name in REFUSED:
            with pytest.raises(DataError, match="asks for a reply by"):
                encoder.labelled(prompt, reply, "completion")
            assert encoder.judged(prompt, reply)[-1] == own.eos_token_id  # a reward model reads what is shown
            continue
        try:
            ids, labels = encoder.labelled(prompt, reply, "all_turns")
        except DataError:  # an earlier prompt had the system text elsewhere
            assert name == "the system text inside the last user's turn" and prompt.system
            ids, labels = encoder.labelled(prompt, reply, "completion")
            prompt = None
        whole = (
            left.apply_chat_template(messages_of(prompt, reply) if prompt else [], return_dict=False) if prompt else ids
        )
        text, shown = left.decode(ids[:-1]), left.decode(whole)
        assert shown.startswith(text.rstrip()) and ids[-1] == own.eos_token_id
        if prompt is not None:
            parts = trained_parts(ids, labels)
            assert len(parts) == 1 + sum(turn.role == "assistant" for turn in prompt.turns)
            assert all(part[-1] == own.eos_token_id for part in parts)


def test_an_empty_system_text_is_one():
    """As in `apply_chat_template`: the template's own default is left out."""
    own = tokenizer("byte-level")
    own.chat_template = KINDS["a system text of its own"]
    encoder = Encoder.of(own, get_template("chat", tokenizer=own), 10**6)
    prompts = [prompt for prompt, _ in dialogues(60) if prompt.system == ""]
    assert prompts
    for prompt in prompts:
        want = own.apply_chat_template(messages_of(prompt), add_generation_prompt=True, return_dict=False)
        assert encoder.prompt(prompt) == want and "Be kind" not in own.decode(want)

"""Templates that come with a model or a file reach nothing, end in time, and print no gigabytes."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from hostile import line_about
from tiny import tokenizer

from chatrlhf.data import render_limits
from chatrlhf.data.templates import Template
from chatrlhf.errors import DataError
from chatrlhf.models.classifier import _texts
from chatrlhf.tools.synth.llm.local_model import LocalModel

ARGUMENTS = {"messages": [{"role": "user", "content": "hello"}]}
REACHING = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "attr by map": "{{ ['']|map(attribute='__class__')|list }}",
    "globals of a function": "{{ raise_exception.__globals__['json'].__loader__ }}",
    "globals of the date": "{{ strftime_now.__globals__ }}",
    "builtins": "{{ cycler.__init__.__globals__.os.system('mkdir ' ~ proof) }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('mkdir ' ~ proof).read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "frame": "{{ (messages|map('upper')).gi_frame.f_builtins }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "deletion": "{{ messages.clear() }}",
}
# Each of these would take minutes, or gigabytes.
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "range": "{% for a in range(10**12) %}{% endfor %}",
    "power": "{{ 9**(9**9) }}",
    "power of a variable": "{% set n = messages|length + 8 %}{{ n**(n**n) }}",
    "constants, which are computed beforehand": "{{ ('a b ' * 9000000)|urlize|length }}" * 9,
}
LARGE = {
    "multiplication": "{{ 'x' * 10**10 }}",
    "multiplication of a variable": "{{ messages[0].content * 10**10 }}",
    "list": "{{ ([0] * 10**10)|length }}",
    "doubling": "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "center": "{{ 'x'|center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "indent": "{{ 'x\ny'|indent(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format method": "{{ '{:10000000000}'.format(1) }}",
    "replace": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "join": "{{ range(99999)|join('x' * 10**6) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list|length }}",
    "bounded loop": "{% for a in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}",
}
LONG = {
    "two million blanks": "{{ ' ' * 2000000 }}",
    "text again and again": "{% for a in range(99999) %}{{ 'hello again and again and again' }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(render_limits, "RENDERING_SECONDS", 0.1)
    monkeypatch.setattr(render_limits, "ROOM", 2**28)


def render(source: str, **more) -> str:
    return Template(source, "own.jinja").render(ARGUMENTS | more, (("eos_token", "</s>"),), True)


@pytest.mark.parametrize("name", REACHING)
def test_it_reaches_nothing(tmp_path, name):
    try:
        shown = render(REACHING[name], proof=str(tmp_path / "proof"))
        assert shown in ("", "[Undefined]")  # as of a name that is not there
    except DataError as error:
        assert str(error).startswith("own.jinja")
    assert not (tmp_path / "proof").exists()
    assert ARGUMENTS == {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("name", ENDLESS)
def test_it_ends_in_time(name):
    start = time.process_time()
    assert line_about(lambda: render(ENDLESS[name])).startswith("own.jinja")
    assert time.process_time() - start < 5


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("name", LARGE)
def test_it_gets_no_gigabytes(name):
    line = line_about(lambda: render(LARGE[name]))
    assert line.startswith("own.jinja")
    assert "it needs more than 0.25 GiB of memory" in line or "it has not ended after" in line


@pytest.mark.parametrize("name", LONG)
def test_it_prints_no_more_than_a_conversation(name):
    assert "characters for a conversation of" in line_about(lambda: render(LONG[name]))


def test_a_long_conversation_is_no_long_template():
    long = {"messages": [{"role": "user", "content": "hello " * 500_000}]}
    assert len(Template("{{ messages[0].content * 4 }}").render(long, (), True)) == 12_000_000


def test_other_threads_have_a_limit_too():
    said = []
    work = lambda: said.append(line_about(lambda: render(ENDLESS["loops"])))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert "it has not ended after 0.1 seconds" in said[0]


@pytest.mark.parametrize("name", ["loops", "multiplication", "two million blanks", "subclasses"])
def test_whoever_renders_has_the_limits(name):
    """A classifier's own template, and that of a model which writes data."""
    words = tokenizer()
    words.chat_template = (ENDLESS | LARGE | LONG | REACHING)[name]
    assert "reward_config.model" in line_about(lambda: _texts(words, "hello", "well"))
    writer = object.__new__(LocalModel)
    writer.tokenizer, writer.model = words, "mine"
    from chatrlhf.tools.synth.llm import Message

    assert "--model" in line_about(lambda: writer.prompt_ids((Message("user", "hello"),)))


def test_nesting_is_an_error():
    for source in ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if a %}" * 500 + "{% endif %}" * 500):
        assert line_about(lambda source=source: render(source)).startswith("own.jinja")

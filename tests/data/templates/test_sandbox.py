"""What templates may not do, each refused in one line, soon, and in little memory; and what they may."""

import datetime
import resource
import time

import jinja2
import pytest

from t5x_like.core.errors import UserError
from t5x_like.data.templates import limits
from t5x_like.data.templates.sandbox import SECONDS, ConversationRefused, Template, TemplateRefused

DOUBLED = "{% set ns = namespace(s=VALUE) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s FILTER }}"
MILLION = "{% set s = 'a' * 1000000 %}"


def doubled(value, step, then=""):
    return DOUBLED.replace("VALUE", value).replace("STEP", step).replace("FILTER", then)


# What the template is -> a part of the line.
CODE = {
    "{{ ().__class__.__base__.__subclasses__() }}": "access to attribute '__class__' of a tuple",
    "{{ raise_exception.__globals__ }}": "access to attribute '__globals__' of a function",
    "{{ messages.__init__ }}": "access to attribute '__init__'",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "access to attribute '__init__'",
    "{{ '{0.__class__}'.format(1) }}": "access to attribute 'format'",
    "{{ ''['format']('x') }}": "access to attribute 'format'",
    "{{ messages.append(1) }}": "it asks for what no template may do",
    "{% set ns = namespace(__class__=1) %}": "no attribute '__class__'",
    "{% include '/etc/passwd' %}": "it asks for another file",
    "{% import 'os' as os %}": "it asks for another file",
    "{% extends 'a' %}": "it asks for another file",
    "{{ messages | pprint }}": "line 1 is no Jinja: No filter named 'pprint'",
    "a\n{% for %}": "line 2 is no Jinja",
}
SIZES = {
    "product": "{{ 'a' * 10**9 }}",
    "product, turned": "{{ 10**9 * 'a' }}",
    "power": "{{ 9**99 }}",
    "repeated product": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "joined": doubled("'aa'", "ns.s ~ ns.s"),
    "added": doubled("'aa'", "ns.s + ns.s"),
    "lists in lists": doubled("['a']", "[ns.s, ns.s]"),
    "lists as JSON": doubled("['a']", "[ns.s, ns.s]", "| tojson"),
    "lists as a text": doubled("['a']", "[ns.s, ns.s]", "| string"),
    "replace": MILLION + "{{ s.replace('a', s) }}",
    "replace, a filter": MILLION + "{{ s | replace('a', s) }}",
    "join": MILLION + "{{ ([s] * 1000) | join }}",
    "join, a method": MILLION + "{{ s.join(['b'] * 1000) }}",
    "indent": "{% set s = 'a\n' * 1000000 %}{{ s | indent(1000) }}",
    "output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "endless rounds": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "many texts": MILLION + "{{ range(99999) | map('string') | map('replace', '1', s) | list | length }}",
    "many slices": MILLION
    + "{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = ns.s + [s[i:]] %}{% endfor %}",
    "round": "{{ messages | length | round(-30000000) }}",
    "round, of numbers alone": "{{ 5 | round(-300000000) }}",
    "a test of many": "{% set l = range(90000) | list %}{{ l | select('in', l * 9) | list | length }}",
    "equal lists in lists": doubled("[1]", "[ns.s, ns.s]", "== 1"),
    "tuples in tuples": doubled("(1,)", "(ns.s, ns.s)", "in {}"),
    "dicts in dicts": doubled("{}", "{'a': ns.s, 'b': ns.s}", "== 1"),
    "arguments": "{% set ns = namespace(s=1) %}{% macro f() %}{% set ns.s = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{% set _ = f(ns.s, ns.s) %}{% endfor %}{{ ns.s == 1 }}",
    "blocks": "{% set y = 'a' * 4000000 %}{% set x %}{% for i in range(300) %}{{ y }}{% endfor %}{% endset %}"
    "{{ x | length }}",
    "block of a macro": "{% macro f() %}{% for i in range(300) %}{{ 'a' * 400000 }}{% endfor %}{% endmacro %}"
    "{{ f() | length }}",
    "generation": "{% set y = 'a' * 400000 %}{% set x %}{% generation %}{% for i in range(300) %}{{ y }}{% endfor %}"
    "{% endgeneration %}{% endset %}{{ x | length }}",
    "indent, other ends of lines": "{% set s = 'a\r' * 1000000 %}{{ s | indent(1000) }}",
    "indent of JSON": "{{ (range(90000) | list) | tojson(indent='x' * 1000000) }}",
    "long lists in a list": MILLION + "{% set l = [s] * 9 %}{{ l == [s] }}",
    "macros": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "many macros": "{% macro f(n) %}{% if n > 1 %}{{ f(n - 1) }}{{ f(n - 2) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
FAILS = {
    "{{ raise_exception('no\nsystem') }}": "no system",
    "{{ 'a'.center(9) }}": None,
    "{{ '%99d' % 1 }}": None,
    "{{ lipsum() }}": "'lipsum' is undefined",
    "{{ messages + 1 }}": "TypeError",
    "{{ [[1], [2]] | sum(start=[]) }}": None,
}


def refusal(source, values=None):
    with pytest.raises(UserError) as caught:
        Template(source).render({"messages": []} | (values or {}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return caught.value


@pytest.mark.parametrize("source", CODE)
def test_code_files_and_hidden_attributes_are_refused(source):
    error = refusal(source)
    assert isinstance(error, TemplateRefused) and CODE[source] in str(error)


@pytest.mark.parametrize("case", SIZES)
def test_time_and_size_are_bounded(case, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 2.0)
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(refusal(SIZES[case]), TemplateRefused)
    assert time.monotonic() - began < SECONDS + 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # KiB


@pytest.mark.parametrize("source", FAILS)
def test_what_fails_with_a_conversation_is_one_line(source):
    error = refusal(source)
    assert FAILS[source] is None or (isinstance(error, ConversationRefused) and FAILS[source] in str(error))


def test_a_long_conversation_is_its_own_fault():
    long = [{"role": "user", "content": "x" * 5_000_000}]
    error = refusal("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": long})
    assert isinstance(error, ConversationRefused) and "too long" in str(error)


@pytest.mark.parametrize("text", ["a\nb\n", "a\n\nb", "", "a", "\n", "a\r\nb"])
def test_lines_are_indented_as_jinja_does(text):
    source = "{{ s | indent(2) }}|{{ s | indent(2, true) }}|{{ s | indent(2, blank=true) }}|{{ s | indent('x') }}"
    expected = jinja2.Environment().from_string(source).render(s=text)
    assert Template(source).render({"s": text}) == expected


def test_nothing_is_computed_while_a_template_is_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(limits.Meter, "whole", lambda self, value: calls.append(value) or value)
    template = Template("{{ 5 | round(2) }}{{ 'a' | upper }}{{ [1, 2] | length }}{{ 1 == 2 }}")
    assert not calls and template.render({}) == "5A2False" and calls


def test_what_chat_templates_use_is_there():
    now = datetime.datetime(2024, 7, 26)
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.role != 'x' -%}{%- set ns.n = ns.n + 1 -%}"
        "{{ m['content'] | trim ~ '|' + m.content.split('o')[0] }}{{ ':' if not loop.last else '.' }}"
        "{%- if loop.index0 == 1 -%}{%- break -%}{%- endif -%}{%- endfor -%}"
        "{{ ns.n }} {{ dict(b=1, a=['\u00e4']) | tojson }} {{ 7 % 2 == 1 }}{{ missing }}{{ strftime_now('%d %b %Y') }}"
        " {{ messages | map(attribute='role') | join(',') }} {{ messages[-1].get('role', '') | upper }}"
        " {{ 'a b' | replace(' ', '_') }} {{ messages is iterable and messages is not mapping }}"
    )
    messages = [{"role": role, "content": " halo "} for role in ("u", "x", "a", "t")]
    assert Template(source, now=now).render({"messages": messages}) == (
        'halo| hal:halo| hal:2 {"b": 1, "a": ["\u00e4"]} True26 Jul 2024 u,x,a,t T a_b True'
    )

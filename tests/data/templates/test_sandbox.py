"""What templates may not do, each refused in one line, soon, and in little memory; and what they may."""

import datetime
import resource
import time

import pytest

from t5x_like.core.errors import UserError
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
def test_time_and_size_are_bounded(case):
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(refusal(SIZES[case]), TemplateRefused)
    assert time.monotonic() - began < SECONDS + 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # KiB


@pytest.mark.parametrize("source", FAILS)
def test_what_fails_with_a_conversation_is_one_line(source):
    error = refusal(source)
    assert FAILS[source] is None or (isinstance(error, ConversationRefused) and FAILS[source] in str(error))


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

"""The chat templates that a config names (config.data.chat.template), as Jinja, and the tokens that they are made of.

What stands between {% generation %} and {% endgeneration %} the assistant writes: its text and the token that ends its
turn. `bos_token` and `eos_token` are those of the tokenizer, empty where it has none.
"""

# Each turn between <|im_start|>ROLE and <|im_end|>.
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Llama 3: a header of each turn, its text without white space at its ends, <|eot_id|>.
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# For any tokenizer that has an end token: roles are words on a line of their own, the end token ends an answer.
_PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\\n\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant:\\n' }}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
        {{- '\\n\\n' }}
    {%- else %}
        {{- message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}"""

# T5: the first question is the source as it stands, and its answer the target (arXiv 1910.10683, section 2.4); in a
# longer conversation roles are words before their texts.
_T5 = """\
{{- bos_token }}
{%- set several = (messages | selectattr('role', 'equalto', 'user') | list | length) > 1 %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '\\nassistant: ' if several else '\\n' }}
        {%- set end = eos_token if loop.last and not add_generation_prompt else '' %}
        {%- generation %}{{- message.content + end }}{%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'system' %}
        {{- message.content + '\\n' }}
    {%- else %}
        {{- message.role + ': ' + message.content if several else message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\nassistant: ' if several else '\\n' }}
{%- endif %}"""

TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA3, "plain": _PLAIN, "t5": _T5}
# Special tokens that a tokenizer must have: without them a turn would not end.
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": (),
    "t5": (),
}

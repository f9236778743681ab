"""A conversation, and chat templates that models come with or that use what few of them do."""

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "Sicher? Größe ☃ 日本"},
]
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% endif %}{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set c = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ m['content'] %}
{% else %}{% set c = m.content %}{% endif %}
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}
{% else %}{{ ' ' + c + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "loops": """{%- set ns = namespace(last=-1, seen=[]) -%}
{%- for m in messages if m.role != 'system' %}
    {%- if loop.first %}[{{ loop.length }}]{% endif %}{{ loop.index }}/{{ loop.revindex }}:{{ m.role }}
    {%- if loop.previtem is defined %}<{{ loop.previtem.role }}{% endif %}
    {%- if not loop.last %}>{{ loop.nextitem.role }}{% else %}.{% endif %}
    {%- set ns.last = loop.index0 %}{% set ns.seen = ns.seen + [m.role] %}
    {%- if m.role == 'assistant' %}{% continue %}{% endif %}{{ loop.cycle('a', 'b') }}
{%- else %}none{%- endfor %}{{ ns.last }}{{ ns.seen | join(', ') }}""",
    "macros": """{% macro turn(m, upper=false) %}
{{ (m.role | upper if upper else m.role) ~ ': ' ~ m.content | tojson }}{{ caller() if caller }}{% endmacro %}
{{ turn(messages[0]) }}{% call turn(messages[1], upper=true) %}!{% endcall %}{{ messages[0] | tojson(indent=2) }}
{%- generation %}{{ messages[2].reasoning_content.split(' ')[-1] }}{% endgeneration %}""",
    "filters": """{{ messages | map(attribute='role') | unique | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% set x %}{{ messages[1].content | trim }}{% endset %}
{{ x }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}'.format('b') }}{{ 'a' * 3 }}{{ 2 ** 5 }}{{ tools is none }}
{% for k, v in messages[2].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[1].content.replace('2', 'two') | indent(2) }}
{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ messages[::-1][0].role }}
{{ {'b': 1, 'a': 2} | dictsort }}{% with y = x ~ 1 %}{{ y }}{% endwith %}""",
}

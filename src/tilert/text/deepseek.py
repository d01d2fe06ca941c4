"""The prompt format of DeepSeek-V3.2, whose checkpoint has Python code in place of a chat template.

Turns of system, user and assistant as its encoding/encoding_dsv32.py writes them; no tools.
"""

from __future__ import annotations

MODEL_TYPES = ("deepseek_v32",)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}<｜User｜>{{ message.content }}<｜Assistant｜>"
    "{% if not (loop.last and thinking) %}</think>{% endif %}"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('accepted are the roles system, user and assistant') }}{% endif %}"
    "{% endfor %}{% if thinking and add_generation_prompt %}<think>{% endif %}"
)

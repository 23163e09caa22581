"""The chat template that an output is given: by name, as Jinja text, or the one that most of the models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from graftkit.checkpoints.sources import read_json
from graftkit.errors import nearest

FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"

KNOWN = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}### Instruction:\n{% elif message.role == 'assistant' %}### Response:\n"
        "{% elif message.role == 'user_context' %}### Input:\n{% endif %}"
        "{{ message.content | trim }}{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message.role != 'system' %}[|system|][|endofturn|]\n"
        "{% endif %}[|{{ message.role }}|]{{ message.content }}{% if message.role != 'user' %}[|endofturn|]{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{% set first = messages[0] %}{% set system = first.content + '\\n\\n' if first.role == 'system' else '' %}"
        "{{ bos_token }}{% for message in (messages[1:] if system else messages) %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('after an optional system message, user and assistant take turns') }}{% endif %}"
        "{% if message.role == 'user' %} [INST] {{ (system if loop.first else '') + message.content }} [/INST]"
        "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name: the prompts of the models that they are named after."""


def check(value: str) -> str:
    """A template as recipes give it. Raises ValueError for text that is neither a name nor a template."""
    if value in ("auto", *KNOWN) or "{" in value:
        return value
    names = ["auto", *KNOWN]
    close = nearest(value, names)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(names)}"
    raise ValueError(f"got {value[:80]!r}, expected Jinja text or the name of a template; {hint}")


def text_of(value: str, directories: Iterable[Path]) -> str:
    """The template's text; `auto` is what most of the models have, the first of equals, and empty where none has."""
    if value != "auto":
        return KNOWN.get(value, value)
    found = Counter(template for directory in directories if (template := _held(directory)))
    return found.most_common(1)[0][0] if found else ""


def _held(directory: Path) -> str:
    """The chat template of a model; empty where it has none."""
    if (directory / FILE).is_file():
        return (directory / FILE).read_text(encoding="utf-8").strip()
    told = read_json(directory / CONFIG, missing={}).get("chat_template")
    if isinstance(told, list):
        told = next((part.get("template") for part in told if part.get("name") == "default"), None)
    return told.strip() if isinstance(told, str) else ""

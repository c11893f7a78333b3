"""Chat templates in the styles of well-known models, short, on the built-in tokenizer with their special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.engine.tokenizers import variant


@dataclass(frozen=True)
class Style:
    """One way of writing a conversation.

    Attributes:
        eos: what the model ends an answer with.
        takes_system: whether a conversation may begin with a system message.
        begins_each_turn: whether a beginning of text stands before every turn.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    takes_system: bool = True
    begins_each_turn: bool = False

    def tokenizer(self, folder: Path) -> TokenizerWrapper:
        return variant(folder, special=self.special, eos=self.eos, chat_template=self.template)


_CHATML = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{{ '' }}{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

_DEFAULT_SYSTEM = (
    """\
{%- if messages[0].role != 'system' -%}<|im_start|>system
You are a careful assistant.<|im_end|>
{% endif -%}
"""
    + _CHATML
)

_LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

_GEMMA = """\
{{- bos_token -}}
{%- set first = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ (first if loop.first else '') + (m.content | trim) }}<end_of_turn>
{{ '' }}{%- endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('After the optional system message, roles must alternate user and assistant') -}}
{%- endif -%}
{%- if m.role == 'user' -%}[INST] {{ m.content }} [/INST]
{%- else -%}{{ ' ' + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# Answers before the last question lose what stands before </think>.
_THINKING = """\
{%- set asked = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}
{%- if m.role == 'assistant' and '</think>' in content and loop.index0 < asked.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
{{ '' }}{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

# The newline stands between turns and not behind the last one.
_BETWEEN = """\
{%- for m in messages -%}
{{- '\\n' if not loop.first -}}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_TIGHT = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# What ends a turn is the mark of the next role.
_NEXT_ROLE = """\
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# Its end of turn is not the end of sequence.
_OTHER_END = """\
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

# The mark behind an answer is another one where more follows.
_HARMONY = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|close|>' -}}
{%- else -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|close|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

# A space stands before the end of sequence, and the first user's turn has the system text.
_LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if m.role == 'user' -%}
{{- bos_token + '[INST] ' + (first | default('') if loop.first else '') + m.content }} [/INST]
{%- else -%}{{ ' ' + m.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

_PLAIN = """\
{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}
"""

_PARTS = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}{{- m.content -}}
{%- else -%}{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# One system message, the last, at the front; nothing of roles that it doesn't know.
_FRONT = """\
{%- set said = namespace(system='') -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- set said.system = m.content -%}{%- endif -%}{%- endfor -%}
{{- bos_token + said.system -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|user|>' + m.content -}}
{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' + m.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

_IM = ("<|im_start|>", "<|im_end|>")

STYLES: dict[str, Style] = {
    "chatml": Style(_CHATML, _IM, "<|im_end|>"),
    "chatml with default system text": Style(_DEFAULT_SYSTEM, _IM, "<|im_end|>"),
    "chatml with newlines between": Style(_BETWEEN, _IM, "<|im_end|>"),
    "chatml without newlines": Style(_TIGHT, _IM, "<|im_end|>"),
    "the next role's mark": Style(_NEXT_ROLE, ("[gMASK]", "<sop>"), "<|user|>"),
    "another end of turn": Style(_OTHER_END, ("<|endoftext|>",), "<|endoftext|>"),
    "another mark between": Style(
        _HARMONY, ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|close|>"), "<|return|>"
    ),
    "llama 2": Style(_LLAMA2, ("[INST]", "[/INST]", "</s>"), "</s>", begins_each_turn=True),
    "plain": Style(_PLAIN, ("</s>",), "</s>"),
    "parts": Style(_PARTS, _IM, "<|im_end|>"),
    "front": Style(_FRONT, (), "<|end|>"),
    "llama 3": Style(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": Style(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": Style(_MISTRAL, ("[INST]", "[/INST]", "</s>"), "</s>", takes_system=False),
    "thinking": Style(_THINKING, (*_IM, "<think>", "</think>"), "<|im_end|>"),
}

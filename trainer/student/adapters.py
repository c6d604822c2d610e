"""LoRA adapters over a frozen student (peft), its weights in 4 bits where asked (bitsandbytes).

Sources: LoRA arXiv 2106.09685; QLoRA arXiv 2305.14314 (nf4, double quantization, all linear layers).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store.errors import EngineError
from trainer.config import StudentConfig


def with_adapters(model: Any, config: StudentConfig, checkpoint: Path | None) -> Any:
    """The model frozen, with float32 LoRA adapters on every linear layer but the head.

    `checkpoint` holds adapters to go on with; None starts new ones, which change nothing at first (B = 0).
    Raises EngineError without peft.
    """
    _keep_differentiable(model)
    try:
        import peft
    except ImportError:
        raise EngineError('student.use_peft needs peft: pip install "ampo[qlora]"') from None
    if checkpoint is not None:
        return peft.PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def _keep_differentiable(model: Any) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, into a form
    that passes no gradient on: after one rollout nothing below the last layer would learn."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

"""A student's weights changed, and the log-probabilities to expect then."""

from __future__ import annotations

import torch

from trainer.student.policy import Policy


def change(policy: Policy, size: float) -> None:
    """Changes the weights that train, as an optimizer step does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def forward_logprobs(policy: Policy, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Returns [P - 1], by a forward pass of the transformers model."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

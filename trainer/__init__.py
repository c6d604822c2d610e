"""The online stage: GRPO that asks the store for guidance only where every rollout of a problem failed."""

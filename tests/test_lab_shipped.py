"""The models that ship are what `ampo lab build` makes: slow, by `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.build import build

LAB = Path(__file__).parent.parent / "lab"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher-terse", "teacher-totals"])
def test_a_model_built_again_from_its_seed_has_the_bits_that_ship(name: str, tmp_path: Path) -> None:
    build(tmp_path, only=[name])
    for part in (f"models/{name}/model.safetensors", "problems/train.jsonl", "problems/heldout.jsonl"):
        assert (tmp_path / part).read_bytes() == (LAB / part).read_bytes()

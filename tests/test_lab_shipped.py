"""The models that ship are what `ampo lab build` makes: slow, by `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.build import build
from lab.recipes import RECIPES

LAB = Path(__file__).parent.parent / "lab"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "shipped", "name"),
    [
        ("lab", LAB, "teacher-terse"),
        ("lab", LAB, "teacher-totals"),
        ("peers", LAB / "peers", "teacher-lucky"),
        ("peers", LAB / "peers", "teacher-near"),
    ],
)
def test_a_model_built_again_from_its_seed_has_the_bits_that_ship(
    recipe: str, shipped: Path, name: str, tmp_path: Path
) -> None:
    build(tmp_path, recipe=RECIPES[recipe], only=[name])
    for part in (f"models/{name}/model.safetensors", "problems/train.jsonl", "problems/heldout.jsonl"):
        assert (tmp_path / part).read_bytes() == (shipped / part).read_bytes()

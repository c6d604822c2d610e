"""The first ten minutes: the wheel, `ampo init`, `python -m ampo_rl`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lab.cli import init
from precompute.config_file import load_config
from store.errors import UserError, install_hint
from trainer.config import Config

ROOT = Path(__file__).parent.parent


def test_init_writes_two_configs_that_load_and_keeps_what_exists(tmp_path: Path) -> None:
    init(tmp_path / "new")
    own, lab = (
        load_config(Config, str(tmp_path / "new" / name), ["run.name=x"]) for name in ("my.toml", "lab.toml")
    )
    assert len(own.teachers) == 2
    for path in (*lab.problems.train.files, lab.student.model, *(teacher.model for teacher in lab.teachers)):
        assert Path(path).is_absolute()
        assert Path(path).exists()
    (tmp_path / "new" / "lab.toml").write_text("mine")
    with pytest.raises(UserError, match=r"exists, and is kept"):
        init(tmp_path / "new")
    assert (tmp_path / "new" / "lab.toml").read_text() == "mine"


def test_the_wheel_brings_configs_and_lab(tmp_path: Path) -> None:
    kept = shutil.ignore_patterns(".*", "build", "runs", "traces", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=kept, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("ampo_rl-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"lab/configs/{file.relative_to(ROOT / 'configs')}" for file in ROOT.glob("configs/**/*.*")}
    models = {str(file.relative_to(ROOT)) for file in ROOT.glob("lab/models/*/*")}
    assert configs | models | {"ampo_rl.py", "lab/problems/train.jsonl"} <= names


def test_the_module_runs_where_the_user_has_modules_of_our_names(tmp_path: Path) -> None:
    for name in ("cli", "store", "trainer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not yours')")
    done = subprocess.run(
        [sys.executable, "-m", "ampo_rl", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("ampo "), done.stderr


def test_every_install_hint_works_in_a_checkout() -> None:
    assert install_hint("vllm") == 'pip install -e ".[vllm]"'
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    folders = ("store", "precompute", "trainer", "lab", "docs", "configs")
    files = [
        file
        for each in folders
        for file in (ROOT / each).rglob("*.*")
        if file.suffix in (".py", ".md", ".toml")
    ]
    named = set()
    for file in [*files, ROOT / "README.md"]:
        text = file.read_text(encoding="utf-8")
        named |= set(re.findall(r"""(?:install_hint\(['"]|pip install -e "\.\[)([\w-]+)""", text))
        assert not re.search(r"pip install (?!-e|--no-deps|vllm-bnb-plugin)", text), file
    assert {"vllm", "qlora", "ray", "real", "reasoning-gym"} <= named <= extras.keys()

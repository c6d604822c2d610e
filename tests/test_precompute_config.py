"""Configuration: precedence, one default in one place, and errors that name the culprit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.config import PrecomputeConfig, ProblemsConfig
from precompute.config_file import load_config, toml_of
from store.errors import ConfigError
from trainer.config import Config, EvalConfig

ROOT = Path(__file__).parent.parent


def load(*overrides: str, path: Path | None = None) -> Config:
    return load_config(Config, str(path) if path else None, list(overrides))


def test_set_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[train]\nmax_steps = 7\nseed = 3\n")
    config = load("train.seed=5", path=path)
    assert (config.train.max_steps, config.train.seed, config.guidance.k) == (7, 5, 2)


def test_paths_know_the_home_directory_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "base.toml").write_text("[train]\nseed = 3\n")
    monkeypatch.setenv("BASE", str(tmp_path))
    path = tmp_path / "c.toml"
    path.write_text('extends = "$BASE/base.toml"\n[problems]\ntrain = "${DATA}/a.jsonl"\n')
    config = load("store.path=~/traces", "student.model=~/models/s", path=path)
    paths = (config.problems.train.name, config.store.path, config.student.model)
    assert paths == ("/data/a.jsonl", "/home/me/traces", "/home/me/models/s")
    assert config.train.seed == 3


def test_one_tracker_needs_no_list() -> None:
    assert load("run.report_to=wandb").run.report_to == ("wandb",)
    assert load("run.report_to=none").run.report_to == ()


def test_defaults_are_the_papers_run() -> None:
    config = load()
    assert (config.train.problems_per_step, config.train.mini_batch_problems) == (128, 64)
    assert (config.rollout.num_generations, config.rollout.max_completion_length) == (8, 8192)
    assert (config.train.learning_rate, config.train.weight_decay) == (1e-6, 0.1)
    assert (config.guidance.k, config.guidance.gamma, config.train.max_steps) == (2, 0.1, 510)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learnin_rate=1", "unknown key train.learnin_rate = 1; did you mean 'learning_rate'?"),
        ("gudance.k=1", "unknown key gudance = {'k': 1}; did you mean 'guidance'?"),
        ("train.zzz=1", "known keys: "),
        ("train.lr=1", "unknown key train.lr = 1; did you mean 'learning_rate'?"),
        ("train.num_generations=8", "did you mean 'rollout.num_generations'?"),
        ("train.temperature=1", "'teachers.temperature' or 'rollout.temperature' or 'eval.temperature'?"),
        ("store.path=$AMPO_NOWHERE/x", "the variable $AMPO_NOWHERE is not set"),
        ("train.max_steps=-1", "train.max_steps = -1: "),
        ("train.max_steps=many", "train.max_steps = 'many': "),
        ("train.learning_rate=nan", "train.learning_rate = nan"),
        ("rollout.base_urls=7", "rollout.base_urls = 7: write a list in brackets"),
        ('rollout.vllm_args={"a": 1}', "write a table in braces, e.g. {a = 1, b = true}"),
        ("teachers.a.samples=1", "teachers is a list of tables: write [[teachers]] above each"),
        ("run.name=a/b", "one folder name"),
        ("train=1", "write section.key=value"),
        ("train.max_steps", "write section.key=value"),
        ("train.max_steps.x=1", "train.max_steps"),
    ],
)
def test_an_error_names_key_value_and_what_would_be_right(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(override)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.mini_batch_problems=3",
            "[train] mini_batch_problems = 3 must divide problems_per_step = 128",
        ),
        ("eval.k=[16]", "[eval] k = 16 needs samples >= 16, not 8"),
        ("rollout.temperature=0.5", 'guidance.loss = "shaped_ratio" compares with stored log-probs'),
    ],
)
def test_keys_that_contradict_are_named_without_the_rest_of_their_section(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("train.seed=77", "guidance.loss=shaped_ratio", override)
    assert str(error.value).startswith(said)
    assert "77" not in str(error.value)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('[[student]]\nmodel = "x"\n', "student is one table: write [student], not [[student]]"),
        ('student = "x"\n', "student is one table: write [student] and its keys below"),
        ('[teachers]\nname = "a"\n', "teachers is a list of tables: write [[teachers]] above each"),
        (
            '[[teachers]]\nname = "a"\nmodel = "m"\nmax_samples = 3\n',
            "teacher 'a': max_samples = 3 needs until_verified; use samples for a fixed number",
        ),
    ],
)
def test_a_section_in_another_form_is_told_how_to_write_it(toml: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(toml)
    with pytest.raises(ConfigError) as error:
        load(path=tmp_path / "c.toml")
    assert str(error.value) == said


def test_teachers_are_reached_by_name_and_must_be_unique(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[teachers]]\nname = "a"\nmodel = "x"\n[[teachers]]\nname = "b"\nmodel = "y"\n')
    assert load("teachers.b.samples=4", path=path).teachers[1].samples == 4
    with pytest.raises(ConfigError, match="'c'"):
        load("teachers.c.samples=4", path=path)
    path.write_text('[[teachers]]\nname = "a"\nmodel = "x"\n[[teachers]]\nname = "a"\nmodel = "y"\n')
    with pytest.raises(ConfigError, match="occurs twice"):
        load(path=path)
    path.write_text('[[teachers]]\nname = "a"\n')
    with pytest.raises(ConfigError, match=r"teachers\[0\]\.model is missing"):
        load(path=path)


def test_bare_words_need_no_quotes_and_none_is_none() -> None:
    config = load("guidance.select=random", "store.path=/data/x", "student.system_prompt=none")
    assert (config.guidance.select, config.store.path, config.student.system_prompt) == (
        "random",
        "/data/x",
        None,
    )


@pytest.mark.parametrize(("text", "said"), [("[train", "not valid TOML"), ("\udcff", "not valid TOML")])
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=said) as error:
        load(path=path)
    assert str(path) in str(error.value)


@given(
    name=st.text(min_size=1, max_size=20).filter(lambda t: "/" not in t and t not in (".", "..")),
    prompt=st.one_of(st.none(), st.text(max_size=30)),
    rate=st.floats(0, 1),
    k=st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_a_resolved_config_reads_back_to_itself(
    name: str, prompt: str | None, rate: float, k: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = load().model_copy(update={"eval": EvalConfig(k=tuple(k))})
    run = config.run.model_copy(update={"name": name})
    student = config.student.model_copy(update={"system_prompt": prompt})
    train = config.train.model_copy(update={"learning_rate": rate})
    config = config.model_copy(update={"run": run, "student": student, "train": train})
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_bytes(toml_of(config).encode("utf-8", "surrogatepass"))
    assert load(path=path) == config


# The experiments of configs/evidence, which begin with a number, are lists of configs.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if not path.name[0].isdigit())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    # A method is laid over another config.
    assert load(path=path).problems.train or path.parent.name == "methods"


def files(folder: Path, **texts: str) -> str:
    """Writes NAME.toml for each; the path of the first."""
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{next(iter(texts))}.toml")


def test_a_file_says_what_differs_from_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files(
        tmp_path,
        base='[problems]\ntrain = "a"\neval = "b"\n[store]\npath = "s"\n'
        '[[teachers]]\nname = "ada"\nmodel = "m"\n',
        middle='extends = "base.toml"\n[problems]\neval = "c"\n',
    )
    top = files(tmp_path / "deep", top='extends = "../middle.toml"\n[problems]\nquestion_column = "q"\n')
    loaded = load_config(PrecomputeConfig, top, ["store.path=t"])
    assert loaded.problems == ProblemsConfig(train="a", eval="c", question_column="q")
    assert [teacher.name for teacher in loaded.teachers] == ["ada"]
    assert loaded.store.path == "t"


def test_a_list_of_teachers_takes_the_place_of_the_other_whole(tmp_path: Path) -> None:
    path = files(
        tmp_path,
        top='extends = "base.toml"\n[[teachers]]\nname = "bob"\nmodel = "m"\n',
        base='[[teachers]]\nname = "ada"\nmodel = "m"\n',
    )
    assert [teacher.name for teacher in load_config(PrecomputeConfig, path, []).teachers] == ["bob"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"a": 'extends = "a.toml"'}, "extends itself in the end: a.toml extends a.toml"),
        (
            {"a": 'extends = "b.toml"', "b": 'extends = "c.toml"', "c": 'extends = "b.toml"'},
            "a.toml extends b.toml extends c.toml extends b.toml",
        ),
        ({"a": 'extends = "gone.toml"'}, r"no config file at .*gone.toml \(.*a.toml extends it\)"),
        ({"a": 'extends = "b.toml"', "b": "x ="}, r"b.toml is not valid TOML: .*a.toml extends it"),
        ({"a": 'extends = ["b.toml"]'}, r"extends = \['b.toml'\]: give the path of one TOML file"),
        ({"a": '[store]\nextends = "b.toml"'}, "unknown key store.extends"),
    ],
)
def test_what_cannot_be_extended_is_one_line_that_names_the_files(
    texts: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(PrecomputeConfig, files(tmp_path, **texts), [])
    assert "\n" not in str(error.value)

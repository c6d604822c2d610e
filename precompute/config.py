"""Configuration: TOML into frozen pydantic models, and the sections that the offline stage reads.

Precedence: defaults < the file that `extends` names < file < `--set section.key=value`. An unknown key is an
error that names the nearest right one. Every default stands here (or in `trainer/config.py`) and nowhere
else.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from store.errors import ConfigError

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

AnswerForm = Literal["boxed", "answer_tags"]
"""How a final answer is marked: `\\boxed{42}` or `<answer>42</answer>`."""

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


NONE = "none"

SECRET = "secret"
"""Of an error whose input may be a key: it is not shown."""


def _secret(reason: str) -> PydanticCustomError:
    return PydanticCustomError(SECRET, "{reason}", {"reason": reason})


def checked_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    """The same. Raises for one that is none, and for one that carries a key."""
    for url in urls:
        if "@" in url or "?" in url:
            raise _secret("a URL carries no key; name the variable that holds it in api_key_env")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no URL; write http://HOST:PORT/v1")
    return urls


BaseUrls = Annotated[tuple[str, ...], AfterValidator(checked_urls)]
"""Addresses of OpenAI-compatible servers."""


def _can_be_none(model: type[BaseModel], key: Any) -> bool:
    field = model.model_fields.get(key)
    return field is not None and type(None) in get_args(field.annotation)


class Section(BaseModel):
    """A frozen table of the config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, table: Any) -> Any:
        """TOML has no null: "none" says it, where a key can be None."""
        if not isinstance(table, dict):
            return table
        return {
            key: None if value == NONE and _can_be_none(cls, key) else value for key, value in table.items()
        }


class ProblemsConfig(Section):
    """[problems]: where the problems are."""

    train: str = ""
    """Parquet or JSONL with the problems that teachers solve and the student trains on."""
    eval: str = ""
    """Held-out problems; empty switches evaluation during training off."""
    question_column: str | None = None
    """None: the first of `question`, `problem`, `prompt` that the file has."""
    answer_column: str | None = None
    """None: the first of `answer`, `gold`, `reward_model.ground_truth` that the file has."""


class StoreConfig(Section):
    """[store]: where the traces are."""

    path: str = "traces"
    part_traces: Positive = 512
    """A part file is written after this many verified traces..."""
    part_seconds: Annotated[float, Field(gt=0)] = 15.0
    """...or this many seconds, whichever comes first. Smaller parts lose less work to a crash."""


class VerifyConfig(Section):
    """[verify]: the verifier of teacher and student alike."""

    default: str = "math"
    """The kind of verification: a name in precompute.verify.base.VERIFIERS, or a function of yours as
    `module:function` or `file.py:function`."""
    workers: Positive = 2
    """Worker processes; each parses one answer at a time."""
    timeout: Annotated[float, Field(gt=0)] = 5.0
    """Seconds from dispatch until a worker is killed and the verdict is `timeout`."""
    memory_mb: Annotated[int, Field(ge=256)] = 2048
    """Address-space limit of a worker, in MiB."""


Script = Literal[
    "latin", "greek", "cyrillic", "cjk", "hiragana", "katakana", "hangul", "arabic", "hebrew", "devanagari",
    "bengali", "tamil", "telugu", "thai", "georgian", "armenian",
]  # fmt: skip
"""A writing system, as the names of Unicode's letters begin with."""


class FiltersConfig(Section):
    """[filters]: which verified traces are kept from the student. All are off unless they are asked for.

    What a filter holds back stays in the store with the reason; it counts as a try of its problem, and
    `until_verified` goes on looking for another.
    """

    min_tokens: Positive | None = None
    """In the teacher's tokens, as the next."""
    max_tokens: Positive | None = None
    max_repetition: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of n-grams that stood in the text before, at most; 0.3 catches loops."""
    repetition_ngram: Positive = 20
    """n, in words and single symbols."""
    scripts: tuple[Script, ...] = ()
    """The writing systems that letters may come from, e.g. ["latin", "greek"]; empty: any. Scripts are no
    languages: French is as latin as English is."""
    max_other_letters: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """With `scripts`: the share of letters that may come from others."""
    format: bool = False
    """Only traces with exactly one final answer in the teacher's form, and no broken one."""


VLLM_KEYS = {
    "model": "model",
    "revision": "revision",
    "dtype": "dtype",
    "max_num_seqs": "batch_size",
    **{key: key for key in ("quantization", "max_model_len", "gpu_memory_utilization", "enforce_eager")},
    "tensor_parallel_size": "tensor_parallel_size",
}
"""Argument of `vllm.LLM` -> the teacher's key that gives it."""


class TeacherConfig(Section):
    """One [[teachers]] table."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the store files its traces under."""
    model: str
    """A directory or a hub name."""
    revision: str | None = None
    engine: Literal["auto", "vllm", "transformers", "openai"] = "auto"
    """auto: vllm where it is installed and there is an accelerator, transformers otherwise. openai: the
    servers at `base_urls`."""
    samples: Positive = 1
    """Samples of each problem."""
    until_verified: Positive | None = None
    """Stop sampling a problem once it has this many verified traces that no filter holds back; None: always
    take `samples`."""
    max_samples: Positive | None = None
    """With `until_verified`: the most samples of a problem; None: `samples`."""
    system_prompt: str | None = BOXED_INSTRUCTION
    """None: the problem's own system turn, where it brought one. An empty string: no system turn."""
    chat_template: str | None = None
    """A file with a Jinja chat template. None: the tokenizer's own; a model that has none gets plain text
    behind its BOS token."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking = false}."""
    answer_form: AnswerForm | None = None
    """How its final answers are marked; None: as the system turn demands. The student's form is the student's
    own affair: a trace is rewritten into it when it is used."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: off."""
    max_tokens: Positive = 8192
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Positive = 64
    """Sequences at once (transformers: rows of a batch; vllm: max_num_seqs; openai: requests under way at
    all `base_urls` together)."""
    quantization: str | None = None
    """None: as the checkpoint says. transformers knows bitsandbytes (nf4, 4 bits); vllm is given the word as
    it stands: fp8, awq, bitsandbytes (with vllm-bnb-plugin) and what else it knows."""
    max_model_len: Positive | None = None
    """Positions for prompt and completion together (vllm); None: the longest prompt + max_tokens."""
    gpu_memory_utilization: Share = 0.9
    """vllm alone, as the next three."""
    tensor_parallel_size: Positive = 1
    """GPUs that share the model."""
    enforce_eager: bool | None = None
    """No CUDA graphs: starts sooner, draws slower. None: only where there is no GPU."""
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `vllm.LLM`, as they stand, e.g. {max_num_batched_tokens = 4096}."""
    base_urls: BaseUrls = ()
    """openai alone, as the next five: servers of one model, e.g. ["http://127.0.0.1:8000/v1"]; requests are
    spread over them."""
    served_model_name: str | None = None
    """The name that the servers know the model by; None: `model`, which gives the tokenizer in any case."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; None: no key is sent."""
    request_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds for one completion, waiting at the server included."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Further tries of a request, at growing distances, when a server is busy, fails or cannot be reached.
    After that the server is given up."""

    @model_validator(mode="after")
    def _sampling_plan_holds(self) -> Self:
        if self.max_samples is not None and self.until_verified is None:
            raise ValueError(
                f"max_samples = {self.max_samples} needs until_verified; use samples for a fixed number"
            )
        return self

    @field_validator("vllm_args")
    @classmethod
    def _named_keys_are_named(cls, more: dict[str, Any]) -> dict[str, Any]:
        for argument in more:
            if key := VLLM_KEYS.get(argument):
                raise ValueError(f"{argument} has a key of its own: set {key} instead")
        return more

    @field_validator("api_key_env")
    @classmethod
    def _key_is_named_not_given(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise _secret("name an environment variable in capitals, such as TEACHER_KEY, not the key itself")
        return name

    @property
    def sample_budget(self) -> int:
        """The most samples that one problem may get."""
        return self.max_samples or self.samples


ENGINE_KEYS = (
    *("dtype", "batch_size", "quantization", "max_model_len", "gpu_memory_utilization"),
    *("tensor_parallel_size", "enforce_eager", "vllm_args", "base_urls", "served_model_name"),
    *("api_key_env", "request_timeout", "max_retries"),
)
"""Keys of a teacher that say how its model is run, and nothing of what is drawn."""


def checked_engine_args(more: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises for a key that is none of ENGINE_KEYS, and for what a teacher could not have."""
    for key in more:
        if key not in ENGINE_KEYS:
            raise _secret(f"there is no {key}; known keys: {', '.join(ENGINE_KEYS)}")
    try:
        TeacherConfig.model_validate({"name": "checked", "model": "", **more})
    except ValidationError as error:
        # Its words alone: a value may hold a key.
        first = error.errors(include_url=False, include_input=False)[0]
        raise _secret(f"{_dotted(first['loc'])}: {first['msg']}") from None
    return more


class RayConfig(Section):
    """[ray]: what `--engine ray` takes of a cluster."""

    num_workers: Positive | None = None
    """Workers at once, each with the teacher loaded. None: as many as the cluster has room for when the
    teacher begins."""
    num_gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """None: the teacher's `tensor_parallel_size` where the cluster has GPUs, 0 elsewhere. A fraction shares
    one GPU; `gpu_memory_utilization` has to fit."""
    num_cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    problems_per_task: Positive = 512
    """Problems that a worker is given at a time, at most. At a task's end its last samples run alone: many
    problems keep an engine full, few spread the rest better over the workers. A task that is tried again goes
    on from what is written."""
    max_task_retries: Annotated[int, Field(ge=0)] = 3
    """How often the task of a worker that died is given to another before the run is given up."""


class PrecomputeConfig(Section):
    """The sections that `ampo precompute teachers` reads."""

    problems: ProblemsConfig = ProblemsConfig()
    store: StoreConfig = StoreConfig()
    verify: VerifyConfig = VerifyConfig()
    filters: FiltersConfig = FiltersConfig()
    ray: RayConfig = RayConfig()
    teachers: tuple[TeacherConfig, ...] = ()

    @field_validator("teachers")
    @classmethod
    def _names_are_unique(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [teacher.name for teacher in teachers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name {twice[0]!r} stands twice; every teacher needs its own")
        return teachers


C = TypeVar("C", bound=Section)


def load_config(schema: type[C], path: str | None, overrides: list[str]) -> C:
    """Reads `path` (None: defaults alone), applies `section.key=value` overrides, validates.

    Raises ConfigError with one line that names the key, the value and what would be right.
    """
    tree = read_tree(Path(path)) if path else {}
    for override in overrides:
        set_key(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(schema, error)) from None


EXTENDS = "extends"
"""At the top of a file: another file, relative to it, whose keys hold where this one says nothing."""


def read_tree(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tables over those of the file that it extends, key by key; a [[list]] is taken whole.

    Args:
        above: the files that extend this one, the first one first.
    """
    chain = (*above, path.resolve())
    if path.resolve() in above:
        names = " extends ".join(each.name for each in chain)
        raise ConfigError(f"{path.absolute()} extends itself in the end: {names}")
    try:
        tree = read_toml(str(path))
    except ConfigError as error:
        raise ConfigError(f"{error} ({above[-1]} extends it)" if above else str(error)) from None
    base = tree.pop(EXTENDS, None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path.absolute()}: extends = {_short(base)}: give the path of one TOML file")
    return _laid_over(read_tree(path.parent / base, above=chain), tree)


def _laid_over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    tables = {
        key: _laid_over(base[key], value)
        for key, value in tree.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **tree, **tables}


def read_toml(path: str) -> dict[str, Any]:
    """The file's tables."""
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no config file at {Path(path).absolute()}") from None
    except IsADirectoryError:
        raise ConfigError(f"{Path(path).absolute()} is a directory; --config takes a TOML file") from None
    except PermissionError:
        raise ConfigError(f"no permission to read {Path(path).absolute()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{Path(path).absolute()} is not valid TOML: {error}") from None


def set_key(tree: dict[str, Any], override: str) -> None:
    """Applies one `section.key=value`; `teachers.NAME.key=value` reaches into a [[teachers]] table."""
    dotted, equals, raw = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r}: write section.key=value, e.g. --set train.max_steps=100")
    table: Any = tree
    for depth, key in enumerate(keys[:-1]):
        table = _descend(table, key, ".".join(keys[: depth + 1]))
    if isinstance(table, _Named):
        raise ConfigError(f"--set {override!r}: write {table.dotted}.NAME.key=value")
    table[keys[-1]] = _parse_value(raw.strip())


class _Named:
    """The tables of a [[list]] by their names, for `--set teachers.NAME.key=value`."""

    def __init__(self, tables: dict[Any, dict[str, Any]], dotted: str) -> None:
        self.tables = tables
        self.dotted = dotted

    def named(self, name: str) -> dict[str, Any]:
        if name not in self.tables:
            known = ", ".join(map(str, self.tables))
            raise ConfigError(f"--set: {self.dotted} has no {name!r}; it has: {known}")
        return self.tables[name]


def _descend(table: dict[str, Any] | _Named, key: str, dotted: str) -> Any:
    if isinstance(table, _Named):
        return table.named(key)
    below = table.setdefault(key, {})
    if isinstance(below, list):
        return _Named({row.get("name"): row for row in below if isinstance(row, dict)}, dotted)
    if not isinstance(below, dict):
        raise ConfigError(f"--set: {dotted} is a value, not a section")
    return below


def _parse_value(raw: str) -> Any:
    """A TOML value; a bare word is a string, so that `--set guidance.select=random` needs no quotes."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def explain(schema: type[Section], error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    where = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_beside(schema, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where} = {_short(first['input'])}; {hint}"
    if first["type"] == "missing":
        return f"{where} is missing; it has no default"
    if first["type"] == SECRET:
        return f"{where}: {first['msg']}"
    if _is_section(schema, first["loc"]):
        return _of_section(first, where)
    reason = HOW_TO_WRITE.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
    return f"{where} = {_short(first['input'])}: {reason[:1].lower()}{reason[1:]}"


HOW_TO_WRITE = {
    "tuple_type": "write a list in brackets, e.g. [1, 2]",
    "dict_type": "write a table in braces, e.g. {a = 1, b = true}",
}
"""Kind of a pydantic error -> what is right in TOML."""


def _is_section(schema: type[Section], location: tuple[int | str, ...]) -> bool:
    """Whether a whole table, or a list of them, is meant, and no key."""
    model: type[BaseModel] = schema
    for part in location:
        if isinstance(part, str):
            below = _section_of(model, part)
            if below is model:
                return False
            model = below
    return True


def _of_section(first: Mapping[str, Any], where: str) -> str:
    """What is wrong with keys together: the reason names them, its other keys would hide it."""
    given = first["input"]
    if first["type"] == "tuple_type":
        return f"{where} is a list of tables: write [[{where}]] above each"
    if first["type"] == "model_type":
        listed = f", not [[{where}]]" if isinstance(given, list) else " and its keys below"
        return f"{where} is one table: write [{where}]{listed}"
    reason = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(given, dict) and "[" in where:
        return f"teacher {given.get('name')!r}: {reason}"
    return f"[{where}] {reason}" if where else reason


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_beside(schema: type[Section], location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = schema
    for part in location[:-1]:
        if isinstance(part, str):
            model = _section_of(model, part)
    return sorted(model.model_fields)


def _section_of(model: type[BaseModel], key: str) -> type[BaseModel]:
    annotation = model.model_fields[key].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return model


def toml_of(config: BaseModel) -> str:
    """The resolved config as TOML that `load_config` reads back to the same config."""
    lines: list[str] = []
    for name, value in config.model_dump(mode="json").items():
        for table in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            lines.extend(f"{key} = {_toml_value(item)}" for key, item in table.items())
            lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if value is None:
        return _toml_string(NONE)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_string(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'

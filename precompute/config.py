"""The sections of the configuration that the offline stage reads.

Every default is in this file (or in `trainer/config.py`) and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jinja2 import Environment, TemplateSyntaxError
from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from precompute.config_file import PathText, Section, dotted, secret_error
from store.records import AnswerForm

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def checked_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the URLs. Raises for one that is not a URL, or that carries a key."""
    for url in urls:
        if "@" in url or "?" in url:
            raise secret_error("a URL carries no key; name the variable that holds it in api_key_env")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not a URL; write http://HOST:PORT/v1")
    return urls


BaseUrls = Annotated[tuple[str, ...], AfterValidator(checked_urls)]
"""Addresses of OpenAI-compatible servers."""


def checked_template(text: str | None) -> str | None:
    """Returns the Jinja template. Raises for one that is not valid."""
    try:
        Environment().parse(text or "")
    except TemplateSyntaxError as error:
        raise ValueError(f"this is not valid Jinja: line {error.lineno}: {error.message}") from None
    return text


Template = Annotated[str | None, AfterValidator(checked_template)]
"""Jinja, e.g. "{{ question }} Answer with a number."; None: none."""


class ProblemColumns(Section):
    """Meaning of a row's columns (docs/data.md)."""

    question_column: str | None = None
    """None: the first of `question`, `problem`, `prompt`, ... that the file has."""
    answer_column: str | None = None
    """None: the first of `answer`, `gold`, `reward_model.ground_truth`, ... that the file has."""
    source_column: str | None = None
    """Origin or subject, for results by source; None: `data_source` or `source`."""
    metadata_column: str | None = None
    """Object with facts for verifier and templates; None: `metadata` or `extra_info`."""
    form: str | None = None
    """Form of a row: a name in precompute.problems.forms.PROBLEM_FORMS, or a function of yours as
    `module:function` or `file.py:function`; None: the first that fits."""
    template: Template = None
    """User turn, in Jinja over the row's columns; None: the question as it is."""


class ProblemFiles(ProblemColumns):
    """One set of problems: its files, and the columns that differ from those of [problems]."""

    files: tuple[PathText, ...] = ()
    """Files, directories, globs, or `hf:NAME:CONFIG[SPLIT]` for a data set of the Hub."""

    @model_validator(mode="before")
    @classmethod
    def _paths_are_enough(cls, given: Any) -> Any:
        if isinstance(given, cls):
            return given
        if not isinstance(given, str | list | tuple | dict):
            raise ValueError("give a path, a list of paths, or a table with files and columns")
        table = given if isinstance(given, dict) else {"files": given}
        files = table.get("files", ())
        return table | {"files": [files] if files else []} if isinstance(files, str) else table

    @model_serializer(mode="wrap")
    def _as_short_as_given(self, handler: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in handler(self).items() if value is not None}
        files = list(given["files"])
        if len(given) > 1:
            return given
        return "".join(files) if len(files) < 2 else files

    @property
    def name(self) -> str:
        """The first file, and the number of further ones, for messages."""
        first, more = "".join(self.files[:1]), len(self.files) - 1
        shown = first if first.startswith("hf:") else str(Path(first).absolute())
        return f"{shown} and {more} more" if more > 0 else shown


class ProblemsConfig(ProblemColumns):
    """[problems]: where the problems are. Its columns are those of train and eval alike."""

    train: ProblemFiles = ProblemFiles()
    """Problems that teachers solve and the student trains on: a path, a list of paths, or a table of `files`
    and columns of their own."""
    eval: ProblemFiles = ProblemFiles()
    """Held-out problems, as `train`; empty: none (but see eval.sets)."""
    limit: Positive | None = None
    """Only the first problems of train."""
    pass_rates: PathText | None = None
    """A trace store, e.g. of an `ampo eval`, whose share of verified samples is a problem's pass rate."""
    min_pass_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_pass_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Problems of train with another pass rate, or without one, are left out."""

    @model_validator(mode="after")
    def _rates_come_from_a_store(self) -> Self:
        if not self.pass_rates and (self.min_pass_rate > 0 or self.max_pass_rate < 1):
            raise ValueError("min_pass_rate and max_pass_rate need pass_rates, the path of a trace store")
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is above max_pass_rate: no problem has such a pass rate")
        return self

    def with_columns(self, files: ProblemFiles) -> ProblemFiles:
        """Returns the files with the columns of this section where they name none of their own."""
        own = {key: value for key, value in dict(files).items() if value is not None}
        columns = {key: getattr(self, key) for key in ProblemColumns.model_fields}
        return ProblemFiles.model_validate(columns | own)


class StoreConfig(Section):
    """[store]: where the traces are."""

    path: PathText = "traces"
    part_traces: Positive = 512
    """A part file is written after this many verified traces..."""
    part_seconds: Annotated[float, Field(gt=0)] = 15.0
    """...or with the first trace after this many seconds, whichever comes first. Smaller parts lose less work
    to a crash."""


class VerifyConfig(Section):
    """[verify]: the verifier of teacher and student alike."""

    default: str = "math"
    """Verifier of problems that name none: math, numeric, choice, exact, reasoning_gym, or a function of
    yours as `module:function` or `file.py:function` (docs/verifiers.md)."""
    by_source: dict[str, str] = Field(default_factory=dict)
    """The problem's source -> verifier, e.g. {gsm8k = "numeric"}."""
    threshold: float = 1.0
    """Least score of a correct answer, of verifiers that return a number."""
    simplified: bool = True
    """An expression that the question itself holds is no answer where the gold answer is a number."""
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
    """[filters]: which verified traces the student never sees. Every filter is off by default.

    A filtered trace stays in the store with the reason; it counts as a sample of its problem, and
    `until_verified` goes on looking for another.
    """

    min_tokens: Positive | None = None
    """Limit in the teacher's tokens, like `max_tokens`."""
    max_tokens: Positive | None = None
    max_repetition: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest share of n-grams that occur earlier in the text; 0.3 catches loops."""
    repetition_ngram: Positive = 20
    """n, in words and single symbols."""
    scripts: tuple[Script, ...] = ()
    """The writing systems that letters may come from, e.g. ["latin", "greek"]; empty: any. Scripts are not
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
    """Name of its traces in the store."""
    model: PathText
    """A directory or a hub name."""
    revision: str | None = None
    engine: str = "auto"
    """auto: vllm where it is installed and there is an accelerator, transformers otherwise. openai: the
    servers at `base_urls`. module:function or file.py:function: your own (precompute.engines.registry)."""
    samples: Positive = 1
    """Samples of each problem."""
    until_verified: Positive | None = None
    """Stop sampling a problem once it has this many verified traces that pass the filters; None: always
    take `samples`."""
    max_samples: Positive | None = None
    """With `until_verified`: the most samples of a problem; None: `samples`."""
    system_prompt: str | None = BOXED_INSTRUCTION
    """None: the problem's own system turn, where it brought one. An empty string: no system turn."""
    user_template: Template = None
    """User turn, in Jinja over `question` and the problem's metadata; None: the question as it is."""
    chat_template: PathText | None = None
    """A file with a Jinja chat template. None: the tokenizer's own; a model that has none gets plain text
    behind its BOS token."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking = false}."""
    answer_form: AnswerForm | None = None
    """Mark of its final answers: boxed, answer_tags, hashes (`#### x`), answer_line (`Answer: x`) or letter
    (`(B)`); None: as the prompt demands. A trace is rewritten into the student's form when it is used."""
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
    """None: as the checkpoint says. transformers knows bitsandbytes (nf4, 4 bits); vllm is given the word
    unchanged: fp8, awq, bitsandbytes (with vllm-bnb-plugin) and others."""
    max_model_len: Positive | None = None
    """Positions for prompt and completion together (vllm); None: the longest prompt + max_tokens."""
    gpu_memory_utilization: Share = 0.9
    """vllm alone, as the next three."""
    tensor_parallel_size: Positive = 1
    """GPUs that share the model."""
    enforce_eager: bool | None = None
    """No CUDA graphs: starts sooner, samples slower. None: only where there is no GPU."""
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `vllm.LLM`, unchanged, e.g. {max_num_batched_tokens = 4096}."""
    base_urls: BaseUrls = ()
    """openai alone, as the next seven: servers of one model, e.g. ["http://127.0.0.1:8000/v1"]; requests are
    spread over them."""
    served_model_name: str | None = None
    """The name that the servers know the model by; None: `model`, which gives the tokenizer in any case."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; None: no key is sent."""
    api: Literal["completions", "chat"] = "completions"
    """completions: ids in, and from vLLM ids out. chat: the server renders the messages and returns text; no
    tokenizer is needed, and a field with its reasoning becomes `<think>...</think>` before the text."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, unchanged, e.g. {reasoning_effort = "high"}."""
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
            raise secret_error("name a variable in capitals, such as TEACHER_KEY, not the key itself")
        return name

    @property
    def sample_budget(self) -> int:
        """The most samples that one problem may get."""
        return self.max_samples or self.samples


ENGINE_KEYS = (
    *("dtype", "batch_size", "quantization", "max_model_len", "gpu_memory_utilization"),
    *("tensor_parallel_size", "enforce_eager", "vllm_args", "base_urls", "served_model_name"),
    *("api_key_env", "api", "extra_body", "request_timeout", "max_retries"),
)
"""Keys of a teacher that control how its model is run, and not what is sampled."""


def checked_engine_args(more: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys. Raises for one that is not in ENGINE_KEYS, and for a value no teacher can have."""
    for key in more:
        if key not in ENGINE_KEYS:
            raise secret_error(f"unknown key {key}; known keys: {', '.join(ENGINE_KEYS)}")
    try:
        TeacherConfig.model_validate({"name": "checked", "model": "", **more})
    except ValidationError as error:
        # The message alone: a value may hold an API key.
        first = error.errors(include_url=False, include_input=False)[0]
        raise secret_error(f"{dotted(first['loc'])}: {first['msg']}") from None
    return more


class RayConfig(Section):
    """[ray]: what `--engine ray` uses of a cluster."""

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
    """Number of times that the task of a dead worker goes to another before the run fails."""


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
            raise ValueError(f"the name {twice[0]!r} occurs twice; every teacher needs its own")
        return teachers

"""The sections that the online stage reads, and the whole config: one TOML file serves every command.

Defaults are the paper's run (arXiv 2510.02227); `configs/lab.toml` overrides them for the bundled lab.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from precompute.config import (
    BOXED_INSTRUCTION,
    BaseUrls,
    Positive,
    PrecomputeConfig,
    ProblemFiles,
    Share,
    Template,
    checked_engine_args,
)
from precompute.config_file import NONE, PathText, Section, load_config
from store.records import AnswerForm

NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class StudentConfig(Section):
    """[student]: the model that learns."""

    model: PathText = ""
    """A directory or a hub name."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass and of frozen weights; auto: bfloat16 on CUDA, float32 elsewhere. Weights that
    train are float32, since steps of 1e-6 vanish in bfloat16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    use_peft: bool = False
    """Trains LoRA adapters and keeps the model itself frozen. Where `model` is a directory of adapters, those
    train on."""
    lora_r: Positive = 16
    lora_alpha: Positive = 32
    lora_targets: tuple[str, ...] = ()
    """Layers with adapters, e.g. ["q_proj", "v_proj"]; empty: all linear layers but the head."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters, in the update alone: above 0 its log-probabilities differ from sampling's."""
    load_in_4bit: bool = False
    """QLoRA: the frozen weights as nf4 with double quantization (bitsandbytes). Needs use_peft."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: about a third slower, far less memory."""
    system_prompt: str | None = BOXED_INSTRUCTION
    """None: the problem's own system turn, if any. An empty string: no system turn."""
    user_template: Template = None
    """User turn, in Jinja over `question` and the problem's metadata; None: the question as it is."""
    chat_template: PathText | None = None
    """A file with a Jinja chat template. None: the tokenizer's own, or plain text after the BOS token."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    answer_form: AnswerForm | None = None
    """Form in which the student must mark its final answer, as a teacher's; None: as the prompt demands."""

    @model_validator(mode="after")
    def _frozen_weights_need_adapters(self) -> Self:
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit = true freezes the weights: set use_peft = true to train adapters")
        return self


class RolloutConfig(Section):
    """[rollout]: how the student samples."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """G, the samples of each problem."""
    max_prompt_length: Positive = 1024
    """Tokens; a problem with a longer prompt is left out, with a warning."""
    max_completion_length: Positive = 8192
    """Tokens; a sample that is cut here is never correct."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Share = 1.0
    """Below 1, sampler and trainer disagree and the ratio is biased."""
    top_k: Count = 0
    """0: off; biased as top_p."""
    batch_size: Positive = 128
    """Sequences that are sampled at once."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers samples with the model that trains. vllm has a copy, which gets every step's weights."""
    base_urls: BaseUrls = ()
    """vllm's servers of the student, e.g. ["http://127.0.0.1:8000/v1"], which see `sync_dir` under the same
    path; empty: a process on the student's device."""
    served_model_name: str | None = None
    """Name of the student at the servers; None: `student.model`."""
    sync_dir: PathText | None = None
    """Directory, seen by all ranks, through which weights reach vllm, e.g. /dev/shm; None: the run's."""
    sync_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Nats a token by which the log-probabilities of vllm and trainer may differ, on average over a step's
    samples. None: 0.005 where both compute in float32, 0.1 in bfloat16, no limit with top_p or top_k."""
    vllm_gpu_memory_utilization: Share = 0.4
    """Share of the GPU's memory for vllm while it samples; the student's weights come on top."""
    vllm_sleep: bool = True
    """Frees vllm's memory for the update, between two steps' sampling; on a GPU alone."""
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm.LLM`, e.g. {enforce_eager = true}; they win over those that ampo
    derives from other keys."""

    @model_validator(mode="after")
    def _servers_are_vllm(self) -> Self:
        if self.base_urls and self.engine != "vllm":
            raise ValueError('base_urls are servers of vllm: set engine = "vllm", or leave them out')
        return self

    max_refills: Count = 0
    """Rounds in which other problems replace groups that train nothing (all solved, or all failed without a
    trace) until the step is full (DAPO's dynamic sampling); 0: off."""


class GuidanceConfig(Section):
    """[guidance]: when the store is queried, and which traces replace failed samples. trigger, select and
    loss may also be module:function or file.py:function of your own (docs/extending.md)."""

    trigger: str = "all_fail"
    """all_fail: AMPO. never: GRPO. always. solved_at_most: at most as many samples are correct as that key
    says. hybrid: all_fail, and a seeded `rate` of the other groups."""
    solved_at_most: Count = 0
    start: Count = 0
    """Steps before the first query."""
    rate: Annotated[float, Field(ge=0, le=1)] = 0.3
    select: str = "comprehension"
    """comprehension, random, shortest, longest, likelihood, round_robin (over teachers), worst."""
    place: Literal["failed", "any", "instead", "extra", "buffer"] = "failed"
    """failed: traces replace failed samples. any: they replace any. instead: the group's own samples leave
    the update. extra: they train beside them. buffer: they wait for an update of their own."""
    insert: Literal["trace", "prefix", "hint", "context"] = "trace"
    """trace: the whole trace trains. prefix: the student completes its first tokens. hint: it samples again
    with the first part in its prompt. context: its own samples are distilled from itself with all of it."""
    share: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 0.75)
    """Shares of the trace that prefix and hint try in turn, until a sample is correct."""
    share_end: Share | None = None
    """With it, `share` is one number that falls to this one at the last step, as a cosine does."""
    hint_text: str = "\n\nA correct solution, or the first part of one:\n"
    """Text between the question and the trace, of hint and context."""
    buffer: Positive = 32
    """Traces of one update from the buffer, which follows a step that leaves as many waiting."""
    buffer_learning_rate: NotNegative | None = None
    """None: train.learning_rate."""
    baseline: Literal["members", "student"] = "members"
    """Rewards whose mean the advantages refer to: those of the group as it trains, or of its own samples."""
    k: Positive = 2
    """k0: most traces of a group."""
    score: Literal["mean_logprob", "mean_prob"] = "mean_logprob"
    """mean_logprob: the paper's section 3.3. mean_prob: as in the published code."""
    gamma: Annotated[float, Field(gt=0)] = 0.1
    """gamma in f(x) = x / (x + gamma), the weight of a teacher's token."""
    loss: str = "shaped"
    """shaped: x = pi_theta (the published runs). shaped_ratio: x = pi_theta / pi_teacher (equation 7). nll,
    nll_p, nll_phi, nll_entropy, srft, mixture, policy, policy_uncertain, self_kl: docs/methods.md."""
    weight: NotNegative = 1.0
    """Weight of the guided tokens' loss."""
    weight_schedule: Literal["constant", "linear", "cosine", "after"] = "constant"
    """constant, linear or cosine to `weight_end` at the last step, or after: 0 up to `weight_warmup`."""
    weight_end: NotNegative = 0.0
    weight_warmup: Count = 0
    """Steps in which the weight rises from 0, of linear and cosine."""
    complement: bool = False
    """Weighs the student's tokens by 1 - weight (CHORD)."""
    teachers: tuple[str, ...] = ()
    """Only these teachers' traces are used; empty: those of all teachers in the store."""

    @model_validator(mode="after")
    def _inserts_fit(self) -> Self:
        if self.insert != "trace" and (self.place == "buffer" or self.reads_teacher_logprobs):
            raise ValueError('insert = "trace" alone goes with place = "buffer" and loss = "shaped_ratio"')
        if (self.insert == "context") != (self.loss == "self_kl"):
            raise ValueError('insert = "context" and loss = "self_kl" go together: set both or none')
        if self.share_end is not None and len(self.share) > 1:
            raise ValueError(f"share_end is the end of one share, and share has {len(self.share)}")
        return self

    @property
    def reads_teacher_logprobs(self) -> bool:
        """True if the loss needs the teacher's own tokens and log-probabilities."""
        return self.loss == "shaped_ratio"


class TrainConfig(Section):
    """[train]: the update."""

    max_steps: Count = 510
    """Sampling steps in all, those before a resume included."""
    problems_per_step: Positive = 128
    mini_batch_problems: Positive = 64
    """Problems of one optimizer step."""
    max_tokens_per_microbatch: Positive = 32768
    """Prompt and response tokens of one forward pass, padding included. Changes memory, never the result."""
    objective: str = "clip"
    """Loss of the student's tokens: clip, cispo, srft, or module:function of your own."""
    loss_type: str = "ampo"
    """Reduction over tokens and sequences: ampo, dr_grpo, dapo, grpo, or module:function of your own."""
    scale_rewards: Literal["none", "group"] = "none"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio that is clipped: each token's, or the geometric mean over a response (GSPO)."""
    eps_low: NotNegative = 0.2
    eps_high: NotNegative = 0.2
    """Above eps_low: clip-higher (DAPO)."""
    dual_clip: NotNegative = 0.0
    """Largest ratio that counts where the advantage is negative, e.g. 3.0; 0: off."""
    is_cap: NotNegative = 2.0
    """Largest weight pi_trainer / pi_sampler of a token, which corrects for the engine; 0: no correction."""
    mask_truncated_completions: bool = False
    """Samples cut at rollout.max_completion_length count in their group's mean and train nothing."""
    entropy_coef: NotNegative = 0.001
    beta: NotNegative = 0.0
    """Weight of the KL to the student before training; 0 keeps no reference model."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The 8-bit ones are bitsandbytes', for one process; paged: moved to host memory when the GPU is full."""
    learning_rate: NotNegative = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: NotNegative = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Count = 0

    @field_validator("dual_clip")
    @classmethod
    def _a_ratio_of_one_is_never_clipped(cls, bound: float) -> float:
        if 0 < bound <= 1:
            raise ValueError("give a ratio above 1, e.g. 3.0, or 0 to switch dual clipping off")
        return bound

    @model_validator(mode="after")
    def _mini_batches_fill_a_step(self) -> Self:
        if self.problems_per_step % self.mini_batch_problems:
            raise ValueError(
                f"mini_batch_problems = {self.mini_batch_problems} must divide "
                f"problems_per_step = {self.problems_per_step}"
            )
        return self


class SftConfig(Section):
    """[sft]: supervised steps on the store's verified traces before RL; train.max_steps = 0: SFT alone."""

    steps: Count = 0
    """Optimizer steps; 0: no SFT."""
    traces: Literal["all", "shortest"] = "all"
    """All traces that fit, or of each problem the one with the fewest student tokens."""
    traces_per_step: Positive = 64
    learning_rate: NotNegative = 1e-5
    """Constant."""


class EvalConfig(Section):
    """[eval]: held-out problems during training."""

    sets: dict[str, ProblemFiles] = Field(default_factory=dict)
    """Name -> problems, as `problems.eval`: further held-out sets, each with a curve of its own."""
    every: Count = 10
    """Steps between evaluations, and before the first and after the last step; 0: never."""
    samples: Positive = 8
    """n samples of each problem: avg@n, and the unbiased pass@k for each k <= n."""
    temperature: NotNegative = 0.6
    top_p: Share = 1.0
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8)
    engine: Literal["auto", "vllm", "transformers", "openai"] = "auto"
    """Engine of `ampo eval` alone. auto: vllm where it is installed and an accelerator is available."""
    engine_args: Annotated[dict[str, Any], AfterValidator(checked_engine_args)] = Field(default_factory=dict)
    """Keys of a [[teachers]] table for vllm and openai under `ampo eval`, e.g. {tensor_parallel_size = 2} or
    {base_urls = ["http://127.0.0.1:8000/v1"]}."""

    @field_validator("sets")
    @classmethod
    def _names_fit_metrics(cls, sets: dict[str, ProblemFiles]) -> dict[str, ProblemFiles]:
        for name in sets:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"{name!r}: a set's name has letters, digits, '.', '_' and '-'")
        return sets

    @model_validator(mode="after")
    def _k_fits_samples(self) -> Self:
        if max(self.k) > self.samples:
            raise ValueError(f"k = {max(self.k)} needs samples >= {max(self.k)}, not {self.samples}")
        return self


class RunConfig(Section):
    """[run]: the run's directory, checkpoints and logs."""

    dir: PathText = "runs"
    name: str = "ampo"
    save_every: Positive = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Checkpoints that are kept."""
    log_completions_every: Count = 10
    """Steps between tables of sample completions; 0: never."""
    num_completions_to_print: Positive = 4
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics beside metrics.jsonl; each needs the extra of its name."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_needs_no_list(cls, given: Any) -> Any:
        return (() if given == NONE else (given,)) if isinstance(given, str) else given

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not name or "/" in name or name in {".", ".."}:
            raise ValueError("a run's name is one folder name, e.g. ampo-seed0")
        return name


RENAMED = {
    "warmup.sft_steps": "sft.steps",
    "warmup.sft_traces": "sft.traces",
    "warmup.traces_per_step": "sft.traces_per_step",
    "warmup.learning_rate": "sft.learning_rate",
    "train.format_weight": "rewards.format",
    "train.offload_optimizer": 'train.optim = "paged_adamw_8bit"',
    "guidance.ratio": "guidance.loss",
}
"""Former key -> today's, for the error."""
DEFAULT_REWARDS = {"correct": 0.9, "format": 0.1}


class Config(PrecomputeConfig):
    """The whole config."""

    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    rewards: dict[str, float] = DEFAULT_REWARDS
    """Name or module:function -> weight; those that are not given keep their default; 0: off."""
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _renamed_keys(cls, tree: Any) -> Any:
        for former, key in RENAMED.items():
            section, _, name = former.partition(".")
            if isinstance(tree, dict) and name in (tree.get(section) or {}):
                raise ValueError(f"unknown key {former}: it is {key} now")
        return tree

    @property
    def eval_sets(self) -> dict[str, ProblemFiles]:
        """Name -> held-out problems; that of `problems.eval` is empty."""
        own = {"": self.problems.eval} if self.problems.eval.files else {}
        return own | self.eval.sets

    @field_validator("rewards")
    @classmethod
    def _default_rewards(cls, given: dict[str, float]) -> dict[str, float]:
        return DEFAULT_REWARDS | given

    @model_validator(mode="after")
    def _teachers_probabilities_are_of_temperature_1(self) -> Self:
        if self.guidance.reads_teacher_logprobs and self.rollout.temperature != 1.0:
            raise ValueError(
                'guidance.loss = "shaped_ratio" compares with stored log-probs of temperature 1: set '
                f"rollout.temperature = 1.0, not {self.rollout.temperature}"
            )
        return self


def read_config(path: str | Sequence[str] | None, overrides: Sequence[str] | None) -> Config:
    """Returns the whole config from TOML files and `--set` overrides; UserError for what does not fit."""
    return load_config(Config, path, list(overrides or []))

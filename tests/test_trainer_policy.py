"""The policy's log-probabilities, against the model's own logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, token_logprobs
from run_examples import run

from store.errors import ConfigError, EngineError, RunError
from trainer.config import StudentConfig
from trainer.student import head
from trainer.student.batches import pad
from trainer.student.head import target_values
from trainer.student.load import load_policy
from trainer.student.policy import Policy

ROWS = [(2, 10, 11, 12, 13, 1), (2, 20, 21, 1)]
CPU = torch.device("cpu")


@torch.no_grad()
def test_statistics_agree_with_full_logits(policy: Policy) -> None:
    batch = pad(ROWS, [3, 2], pad_id=0, device=CPU)
    logits = policy.model(input_ids=batch.input_ids).logits
    expected = token_logprobs(logits, batch.input_ids).masked_fill(~batch.target_mask, 0.0)
    logprobs, entropy = policy.logprobs_and_entropy(batch)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.logprobs(batch), logprobs, rtol=1e-6, atol=1e-6)
    # Entropy of the distribution that token 3 of row 0 was drawn from: row 2 of the logits.
    p = logits[0, 2].softmax(-1)
    assert entropy[0, 3].item() == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    assert entropy[0, 1].item() == 0.0


def test_entropy_of_a_fair_coin_is_ln_2_and_impossible_tokens_add_nothing() -> None:
    bias = torch.tensor([0.0, 0.0, -1e9])
    values = target_values(torch.ones(1, 2), torch.zeros(3, 2), bias, torch.tensor([1]), entropy=True)
    logprobs, entropy = values
    assert logprobs.item() == pytest.approx(math.log(0.5))
    assert entropy.item() == pytest.approx(math.log(2))


def test_logits_in_slices_give_the_same_values_and_gradients(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pad(ROWS, [3, 2], pad_id=0, device=CPU)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        policy.model.zero_grad()
        logprobs, entropy = policy.logprobs_and_entropy(batch)
        (logprobs.sum() + entropy.sum()).backward()
        return logprobs.detach(), policy.model.get_input_embeddings().weight.grad.clone()

    whole_values, whole_gradient = run()
    monkeypatch.setitem(head.SLICE_VALUES, "cpu", 100)  # three entries of the vocabulary at a time
    values, gradient = run()
    torch.testing.assert_close(values, whole_values)
    torch.testing.assert_close(gradient, whole_gradient)


@torch.no_grad()
def test_log_probabilities_are_those_of_the_sampling_temperature() -> None:
    model, batch = tiny_model(), pad(ROWS, [3, 2], pad_id=0, device=CPU)
    warm = Policy(model, tiny_tokenizer(), dtype=torch.float32, temperature=2.0).logprobs(batch)
    logits = model(input_ids=batch.input_ids).logits
    expected = (logits[0, 4] / 2.0).log_softmax(-1)[1]
    assert warm[0, 5].item() == pytest.approx(float(expected), rel=1e-4)


def test_bfloat16_computes_but_keeps_float32_weights(model_dir: Path) -> None:
    student = StudentConfig(model=str(model_dir), dtype="bfloat16", device="cpu")
    loaded = load_policy(student, temperature=1.0)
    logprobs = loaded.logprobs(pad(ROWS, [3, 2], pad_id=0, device=CPU))
    logprobs.sum().backward()
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    exact = load_policy(StudentConfig(model=str(model_dir), device="cpu"), temperature=1.0)
    difference = logprobs - exact.logprobs(pad(ROWS, [3, 2], pad_id=0, device=CPU))
    assert 0 < difference.abs().max().item() < 0.2


def test_a_head_that_does_more_than_a_matrix_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model whose logits are scaled after the head (as Granite's are) must not train on wrong numbers.
    forward = type(tiny_model()).forward

    def scaled(self: object, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits / 3
        return output

    monkeypatch.setattr(type(tiny_model()), "forward", scaled)
    with pytest.raises(EngineError, match="Qwen2ForCausalLM is not supported"):
        load_policy(StudentConfig(model=str(model_dir), device="cpu"), temperature=1.0)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        load_policy(StudentConfig(model=str(tmp_path / "nothing")), temperature=1.0)
    assert str(error.value).endswith(f"there is no directory {tmp_path / 'nothing'}")
    assert "\n" not in str(error.value)


def test_cuda_where_there_is_none_is_refused(model_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(EngineError, match="no CUDA device"):
        load_policy(StudentConfig(model=str(model_dir), device="cuda"), temperature=1.0)


def test_padding_with_the_eos_id_changes_nothing(policy: Policy) -> None:
    ours = tiny_tokenizer()
    ours.pad_token = ours.eos_token
    same = Policy(policy.model, ours, dtype=torch.float32)
    assert (policy.pad_id, same.pad_id, same.eos_id) == (0, 1, 1)
    for other in (policy, same):
        batch = pad(ROWS, [3, 2], pad_id=other.pad_id, device=CPU)
        # The EOS that ends a response is a target token, those behind it are padding.
        assert batch.target_mask.tolist()[1] == [False, False, True, True, False, False]
    padded = [policy.logprobs(pad(ROWS, [3, 2], pad_id=p, device=CPU)) for p in (0, 1)]
    assert torch.equal(padded[0], padded[1])


def test_a_template_from_a_file_goes_into_checkpoints_and_may_not_change_there(
    model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    student = StudentConfig(model=str(model_dir), device="cpu", chat_template=str(file))
    loaded = load_policy(student, temperature=1.0)
    assert loaded.tokenizer.chat_template == file.read_text()
    loaded.model.save_pretrained(tmp_path / "checkpoint")
    loaded.tokenizer.save_pretrained(tmp_path / "checkpoint")
    again = load_policy(student, temperature=1.0, weights=tmp_path / "checkpoint")
    assert again.tokenizer.chat_template == file.read_text()
    file.write_text("Q: {{ messages[-1].content }}")
    with pytest.raises(RunError, match="another chat template"):
        load_policy(student, temperature=1.0, weights=tmp_path / "checkpoint")


def test_gradient_checkpointing_changes_memory_not_gradients(model_dir: Path) -> None:
    gradients = []
    for switch in (False, True):
        student = StudentConfig(model=str(model_dir), device="cpu", gradient_checkpointing=switch)
        loaded = load_policy(student, temperature=1.0)
        loaded.logprobs(pad(ROWS, [3, 2], pad_id=0, device=CPU)).sum().backward()
        gradients.append(loaded.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert math.isfinite(float(gradients[0].sum()))


def with_added(path: Path, *tokens: str, pad: str = "<pad>", template: str | None = None) -> Path:
    """The tiny student whose tokenizer has tokens that its embedding lacks."""
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    made.pad_token = pad
    made.chat_template = template or made.chat_template
    tiny_model().save_pretrained(path)
    made.save_pretrained(path)
    return path


def test_padding_that_the_embedding_lacks_is_done_with_the_eos(tmp_path: Path) -> None:
    policy = load_policy(StudentConfig(model=str(with_added(tmp_path, "<P>", pad="<P>"))), temperature=1.0)
    assert policy.pad_id == policy.eos_id
    policy.logprobs(pad(ROWS, [3, 2], pad_id=policy.pad_id, device=CPU))


def test_a_prompt_of_such_a_token_is_one_line_before_anything_is_sampled(world: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<S>{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"holds '<S>' \(\d+\), which was added to the tokenizer and not"):
        run(world, with_added(tmp_path, "<S>", template=template))


def test_a_template_whose_turn_end_is_no_eos_is_warned_of(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m.content }}<user>{% endfor %}"
    run(world, with_added(tmp_path, template=template), run__name="turns", train__max_steps=0)
    assert "ends an answer with '<user>', which is no EOS token of the model ('<eos>')" in caplog.text

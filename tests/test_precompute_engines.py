"""The transformers engine: draws that depend on the request alone, completions that end where they should."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from precompute_examples import by_id, forward_logits, forward_logprobs
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from precompute.config import TeacherConfig
from precompute.engines import Request, Sampling
from precompute.engines.checks import eos_ids
from precompute.engines.decoding import response_decoder
from precompute.engines.registry import most_prompt_tokens, prepare_engine
from precompute.engines.seeded_sampler import BLOCK, FEW_BLOCKS, inverse_cdf
from precompute.engines.transformers_engine import TransformersEngine
from precompute.engines.vllm_engine import llm_options
from store.errors import EngineError

END = 2
OTHER_END = 40
CONTEXT = 96


def random_model(eos: int | list[int] = END, *, intermediate_size: int = 96) -> Any:
    """Two layers with weights wide enough that some tokens are likely and others are not."""
    return tiny_model(
        5,
        vocab_size=103,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=eos,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Three special tokens and a hundred characters, one token each."""
    tokens = ["<pad>", "<start>", "<end>", *(chr(number) for number in range(0x100, 0x100 + 100))]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sampling(**changes: Any) -> Sampling:
    return Sampling(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 24} | changes))


def request(number: int, *, length: int = 0, seed: int | None = None) -> Request:
    """A prompt of its own for each number; lengths 3 to 12 unless one is given."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(7, 100, (length or 3 + number % 10,), generator=generator).tolist()
    return Request(
        request_id=f"r{number}", prompt_ids=tuple(ids), seed=1000 + number if seed is None else seed
    )


def test_a_request_gives_the_same_completion_alone_and_in_any_batch(tokenizer: Any) -> None:
    engine = TransformersEngine(random_model(), tokenizer, batch_size=16)
    requests = [request(number) for number in range(40)]
    together = by_id(engine.generate(requests, sampling()))
    shuffled = by_id(engine.generate(requests[::-1][3:], sampling()))
    assert len(together) == 40
    for each in requests[:8]:
        (alone,) = engine.generate([each], sampling())
        assert alone.token_ids == together[each.request_id].token_ids == shuffled[each.request_id].token_ids
        assert alone.logprobs == pytest.approx(together[each.request_id].logprobs, abs=1e-4)


def test_a_prompt_that_many_share_is_computed_once_and_they_draw_what_they_draw_alone(tokenizer: Any) -> None:
    model = random_model()
    passes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].shape))
    engine = TransformersEngine(model, tokenizer, batch_size=16)
    # Four prompts of 3 to 6 tokens, six samples of each: 16 rows begin, others join.
    shared = [request(number % 4, seed=number) for number in range(24)]
    named = [replace(each, request_id=f"r{number}") for number, each in enumerate(shared)]
    together = by_id(engine.generate(named[::-1], sampling()))
    prompts = [tuple(shape) for shape in passes if shape[1] > 1]
    # The short ones first: 16 rows begin with two prompts six times and a third of 5 tokens four times; its
    # last column is computed with the first drawn token.
    assert prompts[0] == (3, 4)
    assert max(rows for rows, _ in prompts) == 3
    for each in named:
        (alone,) = engine.generate([each], sampling())
        assert alone.token_ids == together[each.request_id].token_ids
        assert alone.logprobs == pytest.approx(together[each.request_id].logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 20}]
)
def test_both_kinds_of_logprobs_are_those_of_a_forward(tokenizer: Any, changes: dict[str, Any]) -> None:
    model = random_model()
    drawing = sampling(**changes)
    requests = [request(number) for number in range(12)]
    engine = TransformersEngine(model, tokenizer, batch_size=16)
    models = by_id(engine.generate(requests, drawing))
    found = by_id(engine.generate(requests, replace(drawing, logprobs="sampler")))
    for each in requests:
        completion = found[each.request_id]
        assert models[each.request_id].token_ids == completion.token_ids
        own = forward_logprobs(model, each, completion)
        assert models[each.request_id].logprobs == pytest.approx(own, abs=1e-4)
        probs = (forward_logits(model, each, completion) / drawing.temperature).softmax(-1)
        for row, token, logprob in zip(probs, completion.token_ids, completion.logprobs, strict=True):
            descending = row.sort(descending=True).values
            before = int((row > row[token]).sum())  # tokens likelier than the drawn one
            kept = descending[: drawing.top_k or None]
            kept = kept[kept.cumsum(0) - kept < drawing.top_p * kept.sum()]
            assert before < len(kept)
            assert logprob == pytest.approx(float((row[token] / kept.sum()).log()), abs=1e-4)


def test_a_completion_ends_behind_its_first_eos_of_any_kind(tokenizer: Any) -> None:
    # One id in the generation config, the other in the tokenizer.
    assert eos_ids(random_model(eos=OTHER_END).generation_config, tokenizer) == (END, OTHER_END)
    engine = TransformersEngine(random_model(eos=OTHER_END), tokenizer, batch_size=64)
    found = list(engine.generate([request(number) for number in range(64)], sampling(max_tokens=40)))
    stopped = [c for c in found if c.finish_reason == "stop"]
    cut = [c for c in found if c.finish_reason == "length"]
    assert {c.token_ids[-1] for c in stopped} == {END, OTHER_END}
    assert all(not {END, OTHER_END} & set(c.token_ids[:-1]) for c in stopped)
    assert cut
    assert all(len(c.token_ids) == 40 and not {END, OTHER_END} & set(c.token_ids) for c in cut)
    assert all(len(c.logprobs) == len(c.token_ids) for c in found)


def test_padding_with_the_eos_id_changes_nothing(tokenizer: Any) -> None:
    requests = [request(number) for number in range(32)]
    own = by_id(TransformersEngine(random_model(), tokenizer).generate(requests, sampling()))
    model = random_model()
    model.generation_config.pad_token_id = END
    model.config.pad_token_id = END
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert by_id(TransformersEngine(model, tokenizer).generate(requests, sampling())) == own
    assert len({len(c.token_ids) for c in own.values()}) > 3


def test_a_bin_holds_its_lower_edge_and_an_empty_bin_nothing() -> None:
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64).expand(5, -1)
    places = torch.tensor([[0.0], [0.2], [0.25], [0.7], [0.75]], dtype=torch.float64)
    assert inverse_cdf(probs, places)[:, 0].tolist() == [0, 0, 2, 2, 3]


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([9, FEW_BLOCKS * BLOCK, FEW_BLOCKS * BLOCK + 1, 9 * BLOCK, 10 * BLOCK + 7]),
    place=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
)
def test_a_uniform_number_draws_the_token_whose_bin_holds_it(seed: int, size: int, place: float) -> None:
    # Half of the tokens have a hundred-millionth of the others' mass, every third has none, nor has a whole
    # block and the last two.
    probs = torch.rand(2, size, generator=torch.Generator().manual_seed(seed)) * (1 - 1e-8) + 1e-8
    probs[:, 1::2] *= 1e-8
    probs[:, 1::3] = 0.0
    probs[:, BLOCK : 2 * BLOCK] = probs[:, -2:] = 0.0
    uniform = torch.tensor([[place], [place / 2]], dtype=torch.float64)
    tokens = inverse_cdf(probs, uniform)
    edges = probs.double().cumsum(-1)
    total = edges[:, -1:]
    upper, weight = edges.gather(1, tokens), probs.double().gather(1, tokens)
    assert bool((weight > 0).all())
    # Sums in float32 move an edge by as much as the probabilities' own rounding.
    assert bool((upper - weight <= uniform * total + 1e-6 * total).all())
    assert bool((upper >= uniform * total - 1e-6 * total).all())


def test_draws_follow_the_softmax(tokenizer: Any) -> None:
    model, temperature = random_model(), 1.5
    requests = [request(3, seed=seed) for seed in range(4000)]
    found = TransformersEngine(model, tokenizer, batch_size=1000).generate(
        requests, sampling(temperature=temperature, max_tokens=1)
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=103).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([requests[0].prompt_ids])).logits[0, -1]
    expected = 4000 * (logits / temperature).softmax(-1).double()
    likely = expected >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]])
    # Chi-square with n bins has mean n - 1 and standard deviation sqrt(2 (n - 1)); five of them is far out.
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom >= 5
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_the_models_own_generation_defaults_stay_out_and_come_back(tokenizer: Any) -> None:
    requests = [request(number) for number in range(8)]
    plain = by_id(TransformersEngine(random_model(), tokenizer).generate(requests, sampling()))
    model = random_model()
    model.generation_config.update(
        repetition_penalty=3.0, temperature=0.1, top_k=1, max_length=7, do_sample=True
    )
    model.generation_config.suppress_tokens = list(range(7, 50))
    engine = TransformersEngine(model, tokenizer)
    defaults = model.generation_config
    assert by_id(engine.generate(requests, sampling())) == plain
    assert model.generation_config is defaults
    assert defaults.repetition_penalty == 3.0


def test_a_model_in_training_comes_back_as_it_was(tokenizer: Any) -> None:
    model = random_model().train()
    model.config.use_cache = False
    modes: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    completions = TransformersEngine(model, tokenizer, batch_size=1).generate(
        [request(1), request(2)], sampling()
    )
    next(completions)
    assert model.training
    list(completions)
    assert model.training
    assert model.config.use_cache is False
    assert not any(modes)
    # The weights can still be trained: nothing was made under inference mode.
    model(input_ids=torch.tensor([[7, 8, 9]])).logits.sum().backward()


def test_rows_that_have_ended_are_no_longer_computed(tokenizer: Any) -> None:
    model = random_model()
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    engine = TransformersEngine(model, tokenizer, batch_size=32)
    found = list(engine.generate([request(number) for number in range(32)], sampling(max_tokens=60)))
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 32
    assert rows[-1] <= 16
    # Those that ended first are handed over while the others go on.
    lengths = [len(completion.token_ids) for completion in found]
    assert max(lengths[:16]) <= min(lengths[16:])
    assert len({completion.request_id for completion in found}) == 32


def test_others_take_the_places_of_rows_that_have_ended(tokenizer: Any) -> None:
    model = random_model()
    rows: list[int] = []

    def note(_: Any, inputs: Any, __: Any) -> None:
        if inputs[0].shape[1] == 1:  # a token's pass, not a prompt's
            rows.append(inputs[0].shape[0])

    model.model.embed_tokens.register_forward_hook(note)
    requests = [request(number) for number in range(128)]
    engine = TransformersEngine(model, tokenizer, batch_size=16)
    found = by_id(engine.generate(iter(requests), sampling(max_tokens=60)))
    tokens = sum(len(completion.token_ids) for completion in found.values())
    assert len(found) == 128
    # Without others in their places the batches of 16 would run at little more than half of their width.
    assert tokens / (16 * len(rows)) > 0.7
    assert max(rows) == 16


def test_a_prompt_that_leaves_no_room_is_refused_when_it_is_taken(tokenizer: Any) -> None:
    engine = TransformersEngine(random_model(), tokenizer, batch_size=1)
    completions = engine.generate([request(1, length=5), request(2, length=80)], sampling())
    assert next(completions).request_id == "r1"
    with pytest.raises(
        EngineError, match=r"max_tokens = 24 and a prompt of 80 tokens .* 96 positions; .* 16 at most"
    ):
        next(completions)
    assert len(list(engine.generate([request(1, length=90)], sampling(max_tokens=6)))) == 1
    with pytest.raises(EngineError, match="request r5 has an empty prompt"):
        next(engine.generate([Request(request_id="r5", prompt_ids=(), seed=1)], sampling()))


def test_logits_that_are_not_finite_are_named(tokenizer: Any) -> None:
    model = random_model()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(EngineError, match="logits are not finite"):
        list(TransformersEngine(model, tokenizer).generate([request(1)], sampling()))


def test_a_model_that_cannot_be_loaded_is_named(tokenizer: Any, tmp_path: Path) -> None:
    for model in (str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(EngineError, match=f"model {model!r} cannot be loaded: ") as caught:
            TransformersEngine.load(model, tokenizer)
        assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    random_model().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(EngineError, match="broken' cannot be loaded"):
        TransformersEngine.load(str(broken), tokenizer)


def teacher(**changes: Any) -> TeacherConfig:
    return TeacherConfig(**{"name": "ada", "model": "m", "max_tokens": 24} | changes)


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("vllm", {"tensor_parallel_size": 2}, "tensor_parallel_size = 2 needs as many GPUs; there are 0"),
        ("transformers", {"quantization": "awq"}, "quantization = 'awq' is not for transformers"),
        ("openai", {}, 'engine "openai" needs base_urls'),
        ("vllm", {"quantization": "bitsandbytes"}, "pip install vllm-bnb-plugin"),
        ("transformers", {"quantization": "bitsandbytes"}, 'pip install -e ".[qlora]"'),
    ],
)
def test_what_an_engine_cannot_honour_is_said_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, engine: str, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("precompute.engines.checks.find_spec", lambda _: None)
    with pytest.raises(EngineError, match="teacher 'ada': ") as caught:
        prepare_engine(teacher(**changes), engine)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vllm_is_told_what_the_teachers_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = llm_options(teacher(), max_length=80)
    assert (plain["dtype"], plain["enforce_eager"], plain["max_model_len"]) == ("float32", True, 80)
    assert "gpu_memory_utilization" not in plain
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = teacher(
        quantization="fp8",
        tensor_parallel_size=4,
        gpu_memory_utilization=0.5,
        batch_size=7,
        vllm_args={"max_num_batched_tokens": 4096},
    )
    told = llm_options(said, max_length=80)
    assert (told["dtype"], told["enforce_eager"], told["quantization"]) == ("auto", False, "fp8")
    assert (told["tensor_parallel_size"], told["gpu_memory_utilization"], told["max_num_seqs"]) == (4, 0.5, 7)
    assert told["max_num_batched_tokens"] == 4096
    assert llm_options(teacher(enforce_eager=True), max_length=80)["enforce_eager"] is True


def test_vllms_arguments_with_a_key_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_seqs has a key of its own: set batch_size instead"):
        teacher(vllm_args={"max_num_seqs": 3})


def test_the_longest_prompt_is_what_max_tokens_leaves(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    # The model has 96 positions, and max_tokens is 24.
    assert most_prompt_tokens(teacher(model=str(tmp_path), max_model_len=34)) == (10, "max_model_len = 34")
    assert most_prompt_tokens(teacher(model=str(tmp_path))) == (72, f"the 96 positions of '{tmp_path}'")
    with pytest.raises(EngineError, match="there is no directory"):
        most_prompt_tokens(teacher(model=str(tmp_path / "absent")))
    # Behind a server only the tokenizer has to be here.
    assert most_prompt_tokens(teacher(model=str(tmp_path / "absent"), base_urls=["http://h/v1"])) is None


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_draws_with_weights_of_four_bits(tokenizer: Any, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    random_model().save_pretrained(tmp_path / "odd")
    with pytest.raises(EngineError, match=r"a multiple of 64; model.layers.0.mlp.down_proj has 96: leave"):
        TransformersEngine.load(str(tmp_path / "odd"), tokenizer, quantization="bitsandbytes", device="cpu")
    model = random_model(intermediate_size=128)
    model.save_pretrained(tmp_path / "even")
    engine = TransformersEngine.load(
        str(tmp_path / "even"), tokenizer, quantization="bitsandbytes", device="cpu"
    )
    projection = engine._model.model.layers[0].mlp.up_proj.weight
    # 128 x 64 weights of half a byte.
    assert (projection.dtype, projection.numel()) == (torch.uint8, 128 * 64 // 2)
    for name, layer in engine._model.named_modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            narrow = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            wide = model.get_parameter(f"{name}.weight").data
            # Of normal weights nf4 loses 0.09 of their size.
            assert (narrow - wide).norm() / wide.norm() < 0.11
            wide.copy_(narrow)
    requests = [request(number) for number in range(16)]
    found = by_id(engine.generate(requests, sampling()))
    for each in requests:
        expected = forward_logprobs(model, each, found[each.request_id])
        # On some CPUs bitsandbytes computes in bfloat16.
        assert found[each.request_id].logprobs == pytest.approx(expected, abs=0.4)


def test_tags_that_are_special_tokens_stay_in_the_text_and_control_tokens_do_not() -> None:
    plain, tagged = tiny_tokenizer(), tiny_tokenizer()
    tagged.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|turn|>"]})
    ids = tagged("<think>a</think><|turn|>b")["input_ids"]
    ids += [tagged.eos_token_id, tagged.pad_token_id]
    assert tagged.decode(ids, skip_special_tokens=True) == "ab"
    assert response_decoder(tagged)(ids) == "<think>a</think>b"
    assert response_decoder(plain)([*plain("ab")["input_ids"], plain.eos_token_id]) == "ab"

"""Servers of every kind by chat or completions, and prompts that one of them does not answer."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from precompute_examples import jsonl, traces_of

from precompute.config import PrecomputeConfig
from precompute.config_file import load_config
from precompute.run import pipeline
from precompute.run.progress import Reporter
from store.errors import EngineError
from store.upkeep.compaction import forget
from trainer.config import Config
from trainer.eval_model import evaluate_model

pytest.importorskip("openai")

Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""(path, body) -> (status, body); bytes are sent as they are."""


class Server:
    """An HTTP server of one model, `adder`, which answers by a function."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        """Of all requests for a completion."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                found = {"object": "list", "data": [{"id": "adder", "object": "model", "owned_by": "me"}]}
                self.answer(*((200, found) if self.path == "/v1/models" else (404, {})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                self.answer(*server.reply(self.path, body))

            def answer(self, status: int, body: Any) -> None:
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if sent[:1] == b"<" else "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    started: list[Server] = []

    def start(reply: Reply) -> Server:
        started.append(Server(reply))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def asked(body: dict[str, Any]) -> int:
    """The n of the question `n+n`."""
    found = re.search(r"(\d+)\+", body["messages"][-1]["content"])
    assert found is not None
    return int(found[1])


def chat(content: Any, *, reason: str = "stop", **message: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "finish_reason": reason, "message": answer}
    return {"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 7}}


def right(_: str, body: dict[str, Any]) -> tuple[int, Any]:
    return 200, chat(f"It is \\boxed{{{2 * asked(body)}}}.")


class Lines(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def config_of(path: Path, url: str, *, problems: int = 6, **changes: Any) -> PrecomputeConfig:
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(problems)]
    teacher = {"name": "adder", "model": "adder", "engine": "openai", "api": "chat", "base_urls": [url]}
    teacher |= {"max_tokens": 50, "max_retries": 1, "batch_size": 4}
    return PrecomputeConfig.model_validate(
        {
            "problems": {"train": str(jsonl(path / "problems.jsonl", *rows))},
            "store": {"path": str(path / "traces")},
            "verify": {"workers": 1},
            "teachers": [teacher | changes],
        }
    )


def run(path: Path, url: str, **changes: Any) -> list[str]:
    """Runs the pipeline; returns the lines it reported."""
    reporter = Lines()
    pipeline.run(config_of(path, url, **changes), reporter=reporter)
    return [line for line in reporter.lines if "loading" not in line]


def test_a_chat_server_gets_messages_and_needs_no_tokenizer(
    serve: Callable[[Reply], Server], tmp_path: Path
) -> None:
    server = serve(right)
    changes = {"top_p": 0.9, "top_k": 20, "extra_body": {"reasoning_effort": "high"}}
    assert run(tmp_path, server.url, **changes) == []
    traces = traces_of(tmp_path / "traces")
    assert [trace.is_correct for trace in traces] == [True] * 6
    assert {(trace.n_tokens, trace.token_ids, trace.logprobs) for trace in traces} == {(7, (), ())}
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["max_tokens"], body["top_p"], body["top_k"]) == ("adder", 50, 0.9, 20)
    assert body["reasoning_effort"] == "high"
    assert len({body["seed"] for body in server.bodies}) == 6
    plan = pipeline.plan(config_of(tmp_path, server.url, **changes))
    assert "0+0" in plan.teachers[0].first_prompt


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_apart_becomes_a_thought_before_the_text(
    serve: Callable[[Reply], Server], tmp_path: Path, field: str
) -> None:
    def reply(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        n = asked(body)
        if n == 0:
            return 200, chat(None, reason="length", **{field: "first \\boxed{0}"})
        return 200, chat(f"\\boxed{{{2 * n}}}", **{field: "\nlet me see\n"})

    run(tmp_path, serve(reply).url, problems=2)
    texts = {trace.text: (trace.verdict, trace.finish_reason) for trace in traces_of(tmp_path / "traces")}
    assert texts == {
        "<think>\nfirst \\boxed{0}": ("no_answer", "length"),
        "<think>\nlet me see\n</think>\n\n\\boxed{2}": ("match", "stop"),
    }


def test_a_server_that_wants_max_completion_tokens_gets_them(
    serve: Callable[[Reply], Server], tmp_path: Path
) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "max_tokens" in body:
            return 400, {"error": {"message": "Use 'max_completion_tokens' instead."}}
        return right(path, body)

    server = serve(reply)
    assert run(tmp_path, server.url) == []
    assert server.bodies[-1]["max_completion_tokens"] == 50


def test_a_model_behind_a_chat_server_is_evaluated(serve: Callable[[Reply], Server], tmp_path: Path) -> None:
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(4)]
    settings = {
        "student.model": "adder",
        "problems.eval": str(jsonl(tmp_path / "problems.jsonl", *rows)),
        "eval.samples": 1,
        "eval.k": [1],
        "eval.engine": "openai",
        "eval.engine_args.api": "chat",
        "eval.engine_args.base_urls": [serve(right).url],
        "verify.workers": 1,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    evaluation, _ = evaluate_model(load_config(Config, None, overrides), Reporter(), out=tmp_path / "out")
    assert evaluation.overall.pass_at[1].value == 1.0


REFUSED = {"error": {"message": "too hot to handle"}}
BAD: dict[str, tuple[int, Any, str]] = {
    "400": (400, REFUSED, "400 too hot to handle"),
    "403": (403, REFUSED, "403 too hot to handle"),
    "413": (413, REFUSED, "413 too hot to handle"),
    "422": (422, {"detail": "no"}, "422"),
    "error body": (200, REFUSED, "its answer has no completion: too hot to handle"),
    "html": (200, b"<html>sorry</html>", "its answer has no completion: <html>sorry</html>"),
    "no choices": (200, {"choices": []}, "its answer has no completion"),
    "null choice": (200, {"choices": [None]}, "its answer has no completion"),
    "null text": (200, chat(None), "its completion has no text"),
    "cut json": (200, b'{"choices": [{"mess', "Unterminated string"),
    "a list": (200, [1, 2], "its answer has no completion"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_prompt_without_an_answer_is_counted_and_the_rest_goes_on(
    serve: Callable[[Reply], Server], tmp_path: Path, kind: str
) -> None:
    status, answer, reason = BAD[kind]

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (status, answer) if asked(body) == 3 else right(path, body)

    server = serve(reply)
    (line,) = run(tmp_path, server.url)
    assert line.startswith("adder: 1 samples of 1 problems failed, e.g. ")
    assert reason in line
    assert "ampo store forget --teacher adder --failed" in line
    traces = traces_of(tmp_path / "traces")
    assert sum(trace.is_correct for trace in traces) == 5
    (failed,) = (trace for trace in traces if trace.finish_reason == "error")
    assert (failed.verdict, failed.text) == ("error", "")
    assert reason in failed.verdict_detail
    before = len(server.bodies)
    assert run(tmp_path, server.url) == []  # it is not tried again...
    assert len(server.bodies) == before
    forget(tmp_path / "traces", "adder", failed=True)
    server.reply = right
    assert run(tmp_path, server.url) == []  # ...unless asked
    assert len(server.bodies) == before + 1
    assert all(trace.is_correct for trace in traces_of(tmp_path / "traces"))


def test_a_server_that_refuses_everything_ends_the_run_and_nothing_is_kept(
    serve: Callable[[Reply], Server], tmp_path: Path
) -> None:
    server = serve(lambda *_: (400, {"error": {"message": "unknown field: seed"}}))
    for problems, failed in ((6, 6), (100, 16)):
        with pytest.raises(EngineError, match=rf"all {failed} samples failed: .*400 unknown field: seed"):
            run(tmp_path, server.url, problems=problems)
    assert traces_of(tmp_path / "traces") == []


def test_half_a_surrogate_pair_in_an_answer_is_replaced(
    serve: Callable[[Reply], Server], tmp_path: Path
) -> None:
    run(tmp_path, serve(lambda *_: (200, chat("\ud83d \\boxed{0} \ud83d\ude00"))).url, problems=1)
    (trace,) = traces_of(tmp_path / "traces")
    assert trace.text == "\ufffd \\boxed{0} \U0001f600"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda path, body: (404, {}), 'has no completions API: set api = "chat"'),
        (
            lambda path, body: (400, {}) if isinstance(body["prompt"], list) else (200, {"choices": []}),
            'takes prompts as text and not as token ids: set api = "chat"',
        ),
    ],
    ids=["chat alone", "text alone"],
)
def test_a_server_without_prompts_of_ids_is_named_before_the_run(
    serve: Callable[[Reply], Server], tmp_path: Path, model_dir: Path, reply: Reply, said: str
) -> None:
    changes = {"api": "completions", "model": str(model_dir), "served_model_name": "adder"}
    with pytest.raises(EngineError) as error:
        run(tmp_path, serve(reply).url, **changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)

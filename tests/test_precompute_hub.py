"""A model that is not there: one question to the hub, one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from precompute.config import TeacherConfig
from precompute.engines.checks import check_there, why_not_there
from precompute.engines.registry import load_tokenizer
from store.errors import EngineError


class Hub(HTTPServer):
    """Answers as huggingface.co does, by HTTP status and X-Error-Code, and remembers what it was asked."""

    status, code = 404, "RepoNotFound"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        assert isinstance(self.server, Hub)
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("X-Error-Message", "as asked")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def serve_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    serve_at(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_mistyped_name_is_asked_for_once(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError) as error:
        load_tokenizer(TeacherConfig(name="ada", model="owner/modle"))
    assert str(error.value) == (
        "teacher 'ada': model 'owner/modle': there is no such directory, and "
        f"{hub.url} gives you no such model: is the name right? (a private or gated one needs its terms at "
        f"{hub.url}/owner/modle and `hf auth login`)"
    )
    assert hub.asked == ["/owner/modle/resolve/main/config.json"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "needs its terms at "),
        (404, "RevisionNotFound", "gives you no revision 'v2' of it"),
        (404, "EntryNotFound", None),
        (503, "", None),
    ],
)
def test_what_the_hub_answers_is_said_in_ones_own_words(
    hub: Hub, status: int, code: str, said: str | None
) -> None:
    hub.status, hub.code = status, code
    reason = why_not_there("owner/model", "v2")
    assert reason is None if said is None else said in str(reason)
    assert hub.asked == ["/owner/model/resolve/v2/config.json"]


def test_a_hub_that_cannot_be_reached_is_tried_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    serve_at("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(EngineError) as error:
        check_there("owner/model", None, named="student.model = 'owner/model'")
    line = str(error.value)
    assert line.startswith("student.model = 'owner/model': there is no such directory, it was not downloaded")
    assert "(`hf download owner/model`), and http://127.0.0.1:1 cannot be reached (" in line
    assert line.endswith("set HF_HUB_OFFLINE=1")
    assert capfd.readouterr() == ("", "")


def put_into_cache(cache: Path, model: str) -> None:
    """As a download leaves it."""
    downloaded = cache / f"models--{model.replace('/', '--')}"
    (downloaded / "snapshots" / "c0ffee").mkdir(parents=True)
    (downloaded / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("c0ffee")


def test_what_was_downloaded_is_there_but_never_asked_for_in_vain(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_into_cache(tmp_path / "cache", "owner/model")
    assert why_not_there("owner/model", None) is None
    assert len(hub.asked) == 1
    serve_at("http://127.0.0.1:1", monkeypatch)
    assert str(why_not_there("owner/model", None)).endswith(
        "set HF_HUB_OFFLINE=1 to take it as it was downloaded"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_not_there("owner/model", None) is None


def test_nobody_is_asked_offline_nor_for_what_can_be_no_hubs(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
) -> None:
    assert why_not_there(str(model_dir), None) is None
    for model in ("owner/model.gguf", str(tmp_path)):
        (tmp_path / "model.gguf").touch()
        assert str(why_not_there(model, None)).startswith("GGUF weights are not loaded here: give the model")
    assert why_not_there("not a name", None) == (
        "it is neither a directory nor a name that a hub could have (OWNER/NAME)"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(why_not_there("owner/other", None)).endswith("HF_HUB_OFFLINE is set: unset it to download")
    assert hub.asked == []

"""A model of the hub: its config.json is read before anything else is downloaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from eaft_prune.checkpoints.families import check_file
from eaft_prune.config import ModelSettings
from eaft_prune.core.types import UserError
from eaft_prune.packs.sources import model_path

CONFIG = "/some/model/resolve/main/config.json"
COMMIT = "c" * 40
MOE = {**tiny.MOE, "model_type": "mixtral"}
REFUSED = {
    "no experts": ({"model_type": "llama"}, "no experts of this model"),
    "unknown": ({"model_type": "no_such_moe"}, "not known to this version of transformers"),
    **{
        method: (
            {**MOE, "quantization_config": {"quant_method": method, "bits": 4}},
            f"quant_method = '{method}'.*quantise what comes out",
        )
        for method in ("gptq", "awq", "bitsandbytes")
    },
}


@dataclass
class Hub:
    """A hub with one model, of which only config.json is there; `asked` names what it was asked."""

    config: dict[str, Any]
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub({})

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            made.asked.append(self.path)
            there = self.path.endswith("/config.json")
            body = json.dumps(made.config).encode() if there else b"{}"
            self.send_response(200 if there else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", '"e"')
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    names = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", names)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


SETTINGS = ModelSettings(name="m", hub_id="some/model")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_is_not_downloaded(hub: Hub, case: str) -> None:
    hub.config, said = REFUSED[case]
    with pytest.raises(UserError, match=rf"model.hub_id = 'some/model': .*{said}"):
        model_path(SETTINGS, check=check_file)
    assert {path for path in hub.asked if "some" in path} == {CONFIG}
    hub.asked.clear()
    with pytest.raises(UserError, match=said):
        model_path(SETTINGS, check=check_file)
    assert not any("some" in path for path in hub.asked)


def test_what_can_be_pruned_is_asked_for_after_its_config(hub: Hub) -> None:
    hub.config = MOE
    model_path(SETTINGS, check=check_file)
    asked = [path for path in hub.asked if "some" in path]
    assert asked.index(CONFIG) < asked.index("/api/models/some/model/revision/main")

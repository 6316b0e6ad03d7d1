"""Pushing to the hub: the real client of huggingface_hub against a small server that keeps what it is sent."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from fermisvd.errors import FormatError
from fermisvd.format import validate_checkpoint
from fermisvd.hf import load_model
from fermisvd_convert.cli import app
from fermisvd_convert.convert import convert
from fermisvd_convert.hub import HubError, check_repository, push
from tests.support import multimodal

TOKEN = "hf_test"
REPOSITORY = "ann/small-model"


class StandIn(ThreadingHTTPServer):
    """A hub with one user, ann of the organization lab, and at most one repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.role = "write"
        self.name: str | None = None  # of the repository; None: there is none
        self.private = False
        self.files: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}  # part of a path -> status
        self.asked: list[str] = []

    def holds(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        self.name, self.files, self.private = name, dict(files), private

    @property
    def changed(self) -> bool:
        return any(path.startswith("POST") for path in self.asked)


class Answers(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_):
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {self.path}")
        status = next((status for part, status in self.server.refused.items() if part in self.path), None)
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self.answer({"error": "because\nthe test says so"}, status)
        return status is not None

    def do_GET(self):
        hub = self.server
        if self.refused():
            return
        if self.path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"role": hub.role}}
            self.answer({"name": "ann", "type": "user", "orgs": [{"name": "lab"}], "auth": token})
        elif hub.name is None or hub.name not in self.path:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "size": len(d), "oid": "0"} for name, d in hub.files.items()])
        else:
            self.answer({"id": hub.name, "private": hub.private, "siblings": [{"rfilename": f} for f in hub.files]})

    def do_POST(self):
        hub = self.server
        if self.refused():
            return
        path = urlsplit(self.path).path
        assert not parse_qs(urlsplit(self.path).query)
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if hub.name is None:
                hub.holds(name, {".gitattributes": b"*"}, asked.get("visibility") == "private")
                self.answer({"url": f"{hub.url}/{name}"})
            else:
                self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
        elif path == f"/api/models/{hub.name}/preupload/main":
            files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(self.body)["files"]]
            self.answer({"files": files})
        elif path == f"/api/models/{hub.name}/commit/main":
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del hub.files[line["value"]["path"]]
                else:
                    assert line["key"] == "header", line
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{hub.name}/commit/1"})
        elif path == "/api/validate-yaml":
            assert ModelCard(json.loads(self.body)["content"]).data.to_dict()["library_name"] == "transformers"
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": f"the stand-in does not know {path}"}, 400)


@pytest.fixture
def hub(monkeypatch):
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("def f(x):\n    return x\n\n" * 400)
    return path


SETTINGS = {"ranks": "uniform", "samples": 8, "sequence_length": 32, "heal_steps": 0, "refit": False}


@pytest.fixture(scope="module")
def converted(tiny_llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("push") / "out"
    convert(str(tiny_llama), out, 0.3, calibration=[str(text)], **SETTINGS)
    return out


@pytest.fixture
def out(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("private", [False, True])
def test_every_file_is_sent_and_nothing_else(hub, out, private):
    address = push(out, REPOSITORY, private)
    assert address == f"{hub.url}/{REPOSITORY}"
    assert hub.name == REPOSITORY and hub.private == private
    assert hub.files.pop(".gitattributes") == b"*"
    assert hub.files == contents(out)
    assert {"model.safetensors", "config.json", "fermisvd.json", "README.md", "tokenizer.json"} <= hub.files.keys()


def test_card_names_the_repository_it_was_pushed_to_last(hub, out):
    for name in (REPOSITORY, "lab/another"):
        hub.name = None
        push(out, name)
        card = hub.files["README.md"].decode()
        assert f"\nvllm serve {name}\n" in card and f'AutoModelForCausalLM.from_pretrained("{name}")' in card
    assert REPOSITORY not in card


def test_pushing_again_replaces_weights_and_leaves_what_is_not_ours(hub, out):
    earlier = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["notes.md", "adapter/adapter_model.safetensors"]
    hub.holds(REPOSITORY, dict.fromkeys(["fermisvd.json", *earlier, *others], b"old"))
    push(out, REPOSITORY)
    assert hub.files == contents(out) | dict.fromkeys(others, b"old")


def test_convert_pushes_and_a_failed_upload_is_mended_without_converting_again(hub, tiny_llama, text, tmp_path):
    out = tmp_path / "o u t"
    options = ["--ranks", "uniform", "--samples", 8, "--sequence-length", 32, "--heal-steps", 0, "--no-refit"]
    hub.refused["/commit/"] = 403
    result = run("convert", tiny_llama, out, "--remove", 0.3, "--calibration", text, *options, "--push-to", REPOSITORY)
    assert result.exit_code == 2 and "Traceback" not in result.output
    error = " ".join(result.output.split("fermisvd: ")[1].split())
    assert "may not write" in error and f"fermisvd push '{out}' {REPOSITORY}" in error
    assert "held-back tokens" in result.output  # the closing table comes before the upload
    validate_checkpoint(out)
    assert hub.files.keys() == {".gitattributes"}
    hub.refused.clear()
    result = run("push", out, REPOSITORY)
    assert result.exit_code == 0, result.output
    assert f"pushed to {hub.url}/{REPOSITORY}\n" in result.output
    assert hub.files == contents(out) | {".gitattributes": b"*"}


def test_a_wrapper_is_pushed_and_loaded_back(hub, text, tmp_path):
    """Its files call its layers otherwise than transformers."""
    source, out, back = multimodal.save("gemma3_mm", tmp_path / "source"), tmp_path / "out", tmp_path / "back"
    options = ["--ranks", "uniform", "--samples", 8, "--sequence-length", 32, "--heal-steps", 0, "--no-refit"]
    budget = ["--remove", 0.3, "--calibration", text, "--dtype", "float32"]
    result = run("convert", source, out, *budget, *options, "--push-to", REPOSITORY)
    assert result.exit_code == 0, result.output
    for name, data in hub.files.items():
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(data)
    assert all(name.startswith("language_model.model.layers.") for name in validate_checkpoint(back).group_of())
    model, twin = (load_model(folder) for folder in (back, multimodal.dense_twin(source, out, tmp_path / "twin")))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, dense = (each(input_ids=ids).logits for each in (model, twin))
    torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-3)
    assert f'AutoModelForMultimodalLM.from_pretrained("{REPOSITORY}")' in (back / "README.md").read_text()


def test_broken_checkpoint_is_not_pushed(hub, out):
    (out / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(FormatError):
        push(out, REPOSITORY)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["noslash", "a/b/c", "ann/a b", "ann/-x", "ann/a..b", "ann/", "/x", ""])
def test_bad_names_are_refused_without_asking_the_hub(hub, name):
    with pytest.raises(HubError, match="not a repository's name"):
        check_repository(name)
    assert hub.asked == []


def test_what_could_not_be_pushed_is_refused_before_the_work(hub, tmp_path, monkeypatch):
    """`convert` would say that the model is not there, had it begun."""

    def refused(message: str, repository: str = REPOSITORY, *options: str) -> None:
        result = run("convert", tmp_path / "none", "out", "--remove", "0.2", "--push-to", repository, *options)
        assert result.exit_code == 2 and "no such folder" not in result.output
        assert result.output.startswith(f"fermisvd: {repository}: ") and "Traceback" not in result.output
        assert message in " ".join(result.output.split())
        assert TOKEN not in result.output and not hub.changed

    refused("must be OWNER/NAME", "noslash")
    refused("ann is neither bob", "bob/x")
    hub.role = "read"
    refused("may only read")
    hub.role = "write"
    hub.holds(REPOSITORY, {"fermisvd.json": b"", "config.json": b""})
    refused("exists and is public", REPOSITORY, "--private")
    hub.holds(REPOSITORY, {".gitattributes": b"", "config.json": b"", "model.safetensors": b""})
    refused("holds files and is no FermiSVD checkpoint")
    hub.refused["whoami"] = 500
    refused("because the test says so (HTTP 500)")
    hub.refused.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused("does not take the login; run `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused("no token found")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("offline mode")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    refused("the hub cannot be used")


def test_what_may_be_pushed_is_not_refused(hub):
    check_repository(REPOSITORY)
    check_repository("lab/x")
    hub.role = "fineGrained"  # may be scoped to an organization that whoami does not list
    check_repository("other/x")
    hub.holds(REPOSITORY, {".gitattributes": b"", "README.md": b""})
    check_repository(REPOSITORY)
    hub.holds(REPOSITORY, {"fermisvd.json": b"", "config.json": b""}, private=True)
    check_repository(REPOSITORY, private=True)
    assert not hub.changed


@pytest.mark.parametrize(("part", "status"), [("repos/create", 403), ("preupload", 403), ("commit", 413)])
def test_a_refused_upload_says_how_to_push_again(hub, out, part, status):
    hub.refused[part] = status
    with pytest.raises(HubError, match=rf"HTTP {status}\); .*complete, push it again: fermisvd push \S+ {REPOSITORY}$"):
        push(out, REPOSITORY)
    assert not {"model.safetensors", "config.json"} & hub.files.keys()
    validate_checkpoint(out)


def test_private_needs_a_repository():
    result = run("convert", "m", "out", "--remove", "0.2", "--private")
    assert result.exit_code == 2 and "--push-to" in result.output

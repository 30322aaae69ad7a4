"""Hugging Face hubs on this machine: one data set among other files, or whole repositories that can be written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from servers import Files

REPOSITORY = "somebody/pairs"
OLD, NEW = "a1" * 20, "b2" * 20  # commits


def publish(files: Files, commit: str, content: Mapping[str, bytes], *revisions: str, **card: str) -> None:
    """Let ``files`` hold a commit of the data set, under its own name and those of branches."""
    siblings = [listed(name, data) for name, data in content.items()]
    info = {"_id": "0", "id": REPOSITORY, "sha": commit, "siblings": siblings, "cardData": card, "tags": []}
    for revision in (commit, *revisions):
        files.content[f"/api/datasets/{REPOSITORY}/revision/{revision}"] = json.dumps(info).encode()
    for name, data in content.items():
        files.content[f"/datasets/{REPOSITORY}/resolve/{commit}/{name}"] = data


def listed(name: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 130}
    return {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs}


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub take a server for the hub."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", address)
    if "transformers.utils.hub" in sys.modules:  # which remembers the hub that it asked first
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub:
    """A hub that can be written to: repositories in memory, large files beside them.

    A data set's name begins with ``datasets/``. ``refuse`` says how requests are refused: the beginning of "METHOD
    path" → status and headers. ``cut`` says after how many bytes an answer breaks off: the same → bytes, once.
    """

    def __init__(self) -> None:
        self.address = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}  # COMMIT where there is no other
        self.large: dict[str, bytes] = {}  # by sha256, as Git LFS stores them
        self.private: dict[str, bool] = {}
        self.refuse: dict[str, tuple[int, dict[str, str]]] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[str] = []
        self.ranges: list[str] = []  # of the requests for a part of a file

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content: bytes, or what becomes JSON."""
        self.asked.append(f"{method} {path}")
        for start, (status, headers) in self.refuse.items():
            if self.asked[-1].startswith(start):
                return status, headers, {"error": "as the test wants it"}
        if path == "/api/whoami-v2":
            return 200, {}, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos[name], self.private[name] = {}, asked["visibility"] == "private"
            return 200, {}, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" must be one of [...]'}] if "llama9" in json.loads(body)["content"] else []
            return 400 if errors else 200, {}, {"errors": errors, "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = [
                file
                | (
                    {}
                    if file["oid"] in self.large
                    else {"actions": {"upload": {"href": f"{self.address}/{file['oid']}"}}}
                )
                for file in json.loads(body)["objects"]
            ]
            return 200, {}, {"objects": wanted}
        if method == "PUT":
            self.large[path[1:]] = body
            return 200, {}, {}
        found = re.match(r"/(?:api/(?:models/)?)?((?:datasets/)?[^/]+/[^/]+)(?:/(\w+)/?(.*))?$", path)
        name, verb, rest = found.groups() if found else ("", None, "")
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "no such repository"}
        files, commit = self.repos[name], self.commits.get(name, COMMIT)
        if verb == "preupload":
            planned = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {}, {"files": planned}
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            return 200, {}, {"commitOid": COMMIT, "commitUrl": f"{self.address}/{name}/commit/{COMMIT}"}
        if verb in ("resolve", "revision", "tree") and rest.partition("/")[0] not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "no such revision"}
        if verb == "resolve":
            content = files.get(rest.partition("/")[2])
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, {"error": "no such file"}
            return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}, content
        if verb == "tree":
            below = [listed(file, data) for file, data in files.items() if file.startswith(rest.partition("/")[2])]
            tree = [each | {"type": "file", "path": each["rfilename"], "oid": each["blobId"]} for each in below]
            return (200, {}, tree) if tree else (404, {"X-Error-Code": "EntryNotFound"}, {"error": "no such folder"})
        siblings = [listed(".gitattributes", b""), *(listed(file, content) for file, content in files.items())]
        private = self.private.get(name, False)
        return 200, {}, {"id": name, "private": private, "sha": commit, "siblings": siblings, "tags": []}


@contextmanager
def serve(hub: Hub, token: str = "hf_secret") -> Iterator[str]:
    """Serves a hub to whoever has the token, and yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, headers, found = hub.answer(self.command, path, body)
            if self.command != "PUT" and self.headers["Authorization"] != f"Bearer {token}":
                status, headers, found = 401, {}, {"error": "no token"}
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            wanted = self.headers.get("Range")
            if wanted and isinstance(found, bytes):
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                data = data[start:]
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: hub.cut.pop(f"{self.command} {path}", None)])

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()

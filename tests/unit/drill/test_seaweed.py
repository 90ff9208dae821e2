"""The local S3 server starts on whatever ports are free, keeps its objects, and leaves nothing."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from job.drill import seaweed
from job.drill.seaweed import Identity, SeaweedServer
from job.errors import ConfigError, StorageError
from tests.services import JOB, s3_client, wait_until

POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject"],
            "Resource": ["arn:aws:s3:::bucket/runs/*"],
        },
        {
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": ["arn:aws:s3:::bucket"],
            "Condition": {"StringLike": {"s3:prefix": ["runs/*"]}},
        },
    ],
}
BY_POLICY = Identity("no-delete", "nodeletekey", "nodeletesecret", policy=POLICY)


def code_of(call, **arguments):
    """The error code of a call; "" if it succeeds."""
    try:
        call(**arguments)
    except ClientError as error:
        return error.response["Error"]["Code"]
    return ""


def leftovers(server):
    """The unix sockets of the server that are still there."""
    ports = [port + offset for port in server._ports.values() for offset in (0, 10_000)]
    return [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    """The program of the server is replaced by one that says something and ends."""
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho all is lost\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(seaweed, "_program", lambda: program)


def test_objects_survive_kill_and_restart_and_a_new_server(tmp_path):
    with SeaweedServer(tmp_path, buckets=("bucket", "other")) as server:
        endpoint, pid = server.endpoint, server.pid
        with s3_client(server) as client:
            client.put_object(Bucket="other", Key="a", Body=b"1")
        server.kill()
        assert server.pid is None
        with s3_client(server) as client, pytest.raises(Exception, match="Could not connect"):
            client.head_object(Bucket="other", Key="a")
        server.restart()
        assert server.endpoint == endpoint
        assert server.pid != pid
        with s3_client(server) as client:
            assert client.get_object(Bucket="other", Key="a")["Body"].read() == b"1"
        with pytest.raises(ConfigError, match="another S3 server"), SeaweedServer(tmp_path):
            pass
        assert leftovers(server)
    assert not leftovers(server)
    # As after `make s3`, Ctrl-C, `make s3`: what was pasted before still holds.
    with SeaweedServer(tmp_path, buckets=("bucket", "other")) as again:
        assert again.environment() == server.environment()
        with s3_client(again) as client:
            assert client.get_object(Bucket="other", Key="a")["Body"].read() == b"1"


def test_a_port_that_is_taken_is_no_obstacle(tmp_path, monkeypatch):
    with socket.socket() as stranger:
        taken = seaweed._free_ports()
        stranger.bind((seaweed.HOST, taken["filer"]))
        stranger.listen()
        choices = iter([taken, seaweed._free_ports()])
        monkeypatch.setattr(seaweed, "_free_ports", lambda: next(choices))
        with SeaweedServer(tmp_path, buckets=("bucket",)) as server, s3_client(server) as client:
            client.put_object(Bucket="bucket", Key="a", Body=b"1")
    assert list(choices) == []


def test_ports_in_use_are_not_chosen():
    ports = seaweed._free_ports()
    everything = [port + offset for port in ports.values() for offset in (0, 10_000)]
    assert len(set(everything)) == 10
    with socket.socket() as stranger:
        stranger.bind((seaweed.HOST, ports["s3"]))
        stranger.listen()
        assert not seaweed._is_free(ports["s3"])


def test_a_server_that_does_not_start_says_why(tmp_path, no_server):
    with pytest.raises(StorageError, match="all is lost"), SeaweedServer(tmp_path / "s3"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="a file is in the place of a folder"),
        SeaweedServer(tmp_path / "file"),
    ):
        pass


def test_a_missing_package_is_named_with_the_mend(tmp_path, monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with (
        pytest.raises(ConfigError, match=r"pip install 's4gan-job\[drill\]'"),
        SeaweedServer(tmp_path),
    ):
        pass


def test_the_server_does_not_outlive_a_killed_parent(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from job.drill.seaweed import SeaweedServer\n"
        "with SeaweedServer(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        server_pid = int(parent.stdout.readline())
        os.kill(server_pid, 0)  # it runs
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(server_pid))
    # Nobody was left to remove its sockets; a server that comes back to the folder does it.
    with SeaweedServer(tmp_path) as server:
        assert server.pid != server_pid
    assert not leftovers(server)


def test_keys_are_for_nobody_elses_eyes(s3_server):
    for name in ("identities.json", "server.json"):
        assert (s3_server.folder / name).stat().st_mode & 0o077 == 0
    assert JOB.secret_key not in repr(JOB)


def test_the_environment_is_all_that_a_client_needs(s3_env, bucket):
    import boto3

    client = boto3.Session().client("s3")  # the default one remembers another test's keys
    client.put_object(Bucket=bucket, Key="a", Body=b"1")
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == b"1"
    client.close()


def test_the_environment_of_an_identity_has_its_keys(s3_server):
    environment = s3_server.environment(JOB)
    assert environment["AWS_ACCESS_KEY_ID"] == JOB.access_key
    assert environment["AWS_SECRET_ACCESS_KEY"] == JOB.secret_key
    assert environment["AWS_ENDPOINT_URL"] == s3_server.endpoint


def test_a_wrong_secret_is_refused(s3_server, bucket):
    stranger = Identity("job", JOB.access_key, "wrong")
    with s3_client(s3_server, identity=stranger) as client:
        assert code_of(client.put_object, Bucket=bucket, Key="a") == "SignatureDoesNotMatch"


def test_a_job_reads_its_data_and_nothing_else(s3_server, bucket):
    with s3_client(s3_server) as client:
        for key in ("data/a", "database/a", "runs/second/a", "other/a"):
            client.put_object(Bucket=bucket, Key=key, Body=b"1")
    with s3_client(s3_server, identity=JOB) as client:
        assert client.get_object(Bucket=bucket, Key="data/a")["Body"].read() == b"1"
        assert client.list_objects_v2(Bucket=bucket, Prefix="data/")["KeyCount"] == 1
        for key in ("database/a", "runs/second/a", "other/a"):
            assert code_of(client.get_object, Bucket=bucket, Key=key) == "AccessDenied"
        for key in ("data/a", "data/new", "database/a"):
            assert code_of(client.put_object, Bucket=bucket, Key=key) == "AccessDenied"
            assert code_of(client.delete_object, Bucket=bucket, Key=key) == "AccessDenied"
        assert code_of(client.create_bucket, Bucket="another") == "AccessDenied"
    with s3_client(s3_server) as client:
        assert client.head_object(Bucket=bucket, Key="data/a")["ContentLength"] == 1


def test_a_job_owns_its_run(s3_server, bucket):
    where = {"Bucket": bucket, "Key": "runs/first/a"}
    with s3_client(s3_server, identity=JOB) as client:
        client.put_object(**where, Body=b"1", IfNoneMatch="*")
        assert code_of(client.put_object, **where, IfNoneMatch="*") == "PreconditionFailed"
        client.copy_object(Bucket=bucket, Key="runs/first/b", CopySource=where)
        upload = client.create_multipart_upload(Bucket=bucket, Key="runs/first/c")["UploadId"]
        part = {"Bucket": bucket, "Key": "runs/first/c", "UploadId": upload}
        etag = client.upload_part(**part, PartNumber=1, Body=b"part")["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
        client.complete_multipart_upload(**part, MultipartUpload=parts)
        assert client.list_objects_v2(Bucket=bucket, Prefix="runs/first/")["KeyCount"] == 3
        client.delete_object(**where)
        assert code_of(client.get_object, **where) == "NoSuchKey"


@pytest.mark.parametrize("prefix", ["", "run", "runs", "runs/second/", "other/"])
def test_listing_is_granted_by_prefix(s3_server, bucket, prefix):
    with s3_client(s3_server, identity=JOB) as client:
        assert code_of(client.list_objects_v2, Bucket=bucket, Prefix=prefix) == "AccessDenied"


def test_a_policy_can_grant_writing_without_deleting(tmp_path):
    with SeaweedServer(tmp_path, buckets=("bucket",), identities=(BY_POLICY,)) as server:
        where = {"Bucket": "bucket", "Key": "runs/a"}
        with s3_client(server, identity=BY_POLICY) as client:
            client.put_object(**where, Body=b"1")
            assert client.list_objects_v2(Bucket="bucket", Prefix="runs/")["KeyCount"] == 1
            assert code_of(client.delete_object, **where) == "AccessDenied"
            assert code_of(client.put_object, Bucket="bucket", Key="a") == "AccessDenied"
            assert code_of(client.list_objects_v2, Bucket="bucket") == "AccessDenied"
            assert client.get_object(**where)["Body"].read() == b"1"


def is_running(pid):
    try:
        # A zombie has ended; only its parent, which is not us, could reap it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_emptied_prefixes_are_left_alone(s3_server, bucket):
    """The server would clean them minutes later, and lose what is written then from its lists."""
    master, filer = s3_server.shell_addresses
    said = subprocess.run(
        [seaweed._program(), "shell", f"-master={master}", f"-filer={filer}"],
        input=f"s3.bucket.allowEmptyFolders -name {bucket}\nexit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Allow empty folders: enabled" in said.stdout

"""The metadata service answers as an instance's does, for us and for botocore."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from botocore.credentials import InstanceMetadataProvider
from botocore.utils import InstanceMetadataFetcher

from job.drill.imds import FakeImds, Instance
from tests.services import s3_client, wait_until

TOKEN = "X-aws-ec2-metadata-token"
TTL = "X-aws-ec2-metadata-token-ttl-seconds"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


def ask(imds, method, path, headers=(), timeout_s=30):
    """Status and text of a reply."""
    address = urlsplit(imds.endpoint).netloc
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request(method, path, headers=dict(headers))
        with connection.getresponse() as response:
            return response.status, response.read().decode()


def new_token(imds, ttl="60"):
    status, token = ask(imds, "PUT", "/latest/api/token", {TTL: ttl})
    assert status == 200
    return token


def look(imds, path):
    return ask(imds, "GET", path, {TOKEN: new_token(imds)})


def fetcher(imds, **options):
    return InstanceMetadataFetcher(
        timeout=30, num_attempts=1, base_url=imds.endpoint, env={}, **options
    )


@pytest.mark.parametrize("headers", [{}, {TOKEN: "wrong"}])
def test_without_a_valid_token_nothing_is_told(imds, headers):
    assert ask(imds, "GET", "/latest/meta-data/instance-id", headers)[0] == 401


@pytest.mark.parametrize("headers", [{}, {TTL: "0"}, {TTL: "21601"}, {TTL: "soon"}])
def test_a_token_needs_a_time_to_live(imds, headers):
    assert ask(imds, "PUT", "/latest/api/token", headers)[0] == 400


def test_a_token_is_not_given_through_a_proxy(imds):
    headers = {TTL: "60", "X-Forwarded-For": "10.0.0.1"}
    assert ask(imds, "PUT", "/latest/api/token", headers)[0] == 403


def test_expired_tokens_are_refused(imds):
    token = new_token(imds)
    assert ask(imds, "GET", "/latest/meta-data/instance-id", {TOKEN: token})[0] == 200
    imds.expire_tokens()
    assert ask(imds, "GET", "/latest/meta-data/instance-id", {TOKEN: token})[0] == 401


def test_the_time_to_live_counts(imds, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("job.drill.imds.time.monotonic", lambda: now[0])
    token = new_token(imds, "60")
    now[0] += 59
    assert ask(imds, "GET", ACTION, {TOKEN: token})[0] == 404
    now[0] += 1
    assert ask(imds, "GET", ACTION, {TOKEN: token})[0] == 401


def test_without_tokens_required_the_first_version_works():
    with FakeImds(tokens_required=False) as imds:
        assert ask(imds, "GET", "/latest/meta-data/instance-id")[0] == 200
        assert ask(imds, "GET", "/latest/meta-data/instance-id", {TOKEN: "wrong"})[0] == 401


def test_the_instance_describes_itself():
    instance = Instance(life_cycle="on-demand", instance_type="p4d.24xlarge", instance_id="i-1")
    with FakeImds(instance) as imds:
        assert look(imds, "/latest/meta-data/instance-life-cycle") == (200, "on-demand")
        assert look(imds, "/latest/meta-data/instance-type") == (200, "p4d.24xlarge")
        assert look(imds, "/latest/meta-data/instance-id") == (200, "i-1")
        where = "/latest/meta-data/placement/availability-zone"
        assert look(imds, where) == (200, "us-east-1a")
        assert look(imds, "/latest/meta-data/no-such-thing")[0] == 404
        assert look(imds, "/latest/meta-data/iam/security-credentials/")[0] == 404


def test_a_notice_names_what_will_happen_and_when(imds):
    assert look(imds, ACTION)[0] == 404
    before = datetime.now(UTC).replace(microsecond=0)
    imds.notice(in_s=90)
    after = datetime.now(UTC)
    status, text = look(imds, ACTION)
    notice = json.loads(text)
    assert (status, notice["action"]) == (200, "terminate")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", notice["time"])
    announced = datetime.fromisoformat(notice["time"]) - timedelta(seconds=90)
    assert before <= announced <= after
    imds.notice(action="hibernate")
    assert json.loads(look(imds, ACTION)[1])["action"] == "hibernate"


def test_a_rebalance_recommendation_is_no_notice(imds):
    assert look(imds, REBALANCE)[0] == 404
    imds.rebalance()
    status, text = look(imds, REBALANCE)
    assert status == 200
    assert list(json.loads(text)) == ["noticeTime"]
    assert look(imds, ACTION)[0] == 404


def test_what_was_announced_can_be_taken_back(imds):
    imds.notice()
    imds.rebalance()
    imds.clear()
    assert look(imds, ACTION)[0] == 404
    assert look(imds, REBALANCE)[0] == 404


@contextlib.contextmanager
def hanging_request(imds):
    """A connection on which a request was made that the service has taken and does not answer."""
    connection = http.client.HTTPConnection(urlsplit(imds.endpoint).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", ACTION)
        wait_until(lambda: imds.requests != [])
        yield connection


def test_a_hanging_service_never_answers(imds):
    imds.hang = True
    with hanging_request(imds) as connection:
        connection.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.getresponse()
    assert [(request.path, request.status) for request in imds.requests] == [(ACTION, None)]
    imds.hang = False
    assert look(imds, ACTION)[0] == 404


def test_leaving_does_not_wait_for_who_hangs():
    with contextlib.ExitStack() as stack:
        with FakeImds() as imds:
            imds.hang = True
            connection = stack.enter_context(hanging_request(imds))
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()


def test_every_request_is_in_the_log(imds):
    look(imds, ACTION)
    assert [(r.method, r.path, r.status) for r in imds.requests] == [
        ("PUT", "/latest/api/token", 200),
        ("GET", ACTION, 404),
    ]
    imds.forget()
    assert imds.requests == []


def test_botocore_takes_the_roles_credentials_and_the_region():
    instance = Instance(access_key="AKIDEXAMPLE", secret_key="secret", session_token="session")
    with FakeImds(instance) as imds:
        found = InstanceMetadataProvider(fetcher(imds)).load().get_frozen_credentials()
        assert found == ("AKIDEXAMPLE", "secret", "session", None)
        assert ("GET", "/latest/meta-data/iam/security-credentials/s4gan-job", 200) in [
            (request.method, request.path, request.status) for request in imds.requests
        ]


def test_botocore_finds_no_credentials_without_a_role(imds):
    assert fetcher(imds).retrieve_iam_role_credentials() == {}


def test_the_job_works_with_the_keys_of_its_instance(s3_server, bucket, monkeypatch):
    import boto3

    instance = Instance(access_key=s3_server.access_key, secret_key=s3_server.secret_key)
    with FakeImds(instance) as imds:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in imds.environment().items():
            monkeypatch.setenv(name, value)
        session = boto3.session.Session(region_name="us-east-1")
        client = session.client("s3", endpoint_url=s3_server.endpoint)
        with contextlib.closing(client):
            client.put_object(Bucket=bucket, Key="mine", Body=b"1")
    with s3_client(s3_server) as client:
        assert client.get_object(Bucket=bucket, Key="mine")["Body"].read() == b"1"


def test_leaving_ends_all_threads_and_the_port():
    with FakeImds() as imds:
        assert look(imds, ACTION)[0] == 404
    with pytest.raises(ConnectionRefusedError):
        ask(imds, "GET", ACTION)

"""Findings to a web hook and to an SNS topic; the address stays secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import boto3
import pytest
from moto import mock_aws

from job.errors import ConfigError
from job.monitor.health import Finding
from job.monitor.notify import Notifier

RUN = "s3://bucket/runs/katzen-größer"
FOUND = Finding("d_stuck", "problem", 500, 400, 0.693, "Loss_D stays at 0.693", ("--x 1",))


class Hook:
    """A server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.status = 200
        self.posted: list[Any] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                hook.posted.append(
                    (self.headers["Content-Type"], json.loads(self.rfile.read(length)))
                )
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/secret"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


def test_a_finding_is_posted(hook: Hook) -> None:
    notifier = Notifier(hook.url, RUN)
    notifier.finding(FOUND)
    notifier.close()
    ((kind, content),) = hook.posted
    assert kind == "application/json"
    assert content["text"].splitlines() == [
        RUN,
        "problem: Loss_D stays at 0.693 (since iteration 400, d_stuck); try: --x 1",
        f"s4gan diagnose {RUN}",
    ]
    assert (content["run"], content["rule"], content["since"]) == (RUN, "d_stuck", 400)


def test_notes_are_not_sent(hook: Hook) -> None:
    notifier = Notifier(hook.url, RUN)
    notifier.finding(Finding("slight_overfit", "note", 5, 5, 0.1, "x", ()))
    notifier.close()
    assert hook.posted == []


def test_a_hook_that_refuses_is_said_without_its_address(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.status = 403
    notifier = Notifier(hook.url, RUN)
    notifier.finding(FOUND)
    notifier.finding(FOUND)
    notifier.close()
    assert len(hook.posted) == 2
    assert "the finding was not sent: the hook answered 403" in caplog.text
    assert "secret" not in caplog.text


def test_a_hook_that_is_not_there_is_said_without_its_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notifier = Notifier("http://127.0.0.1:9/secret", RUN)
    notifier.finding(FOUND)
    notifier.close()
    assert "the finding was not sent" in caplog.text
    assert "secret" not in caplog.text


@mock_aws
def test_a_finding_goes_to_a_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    sns = boto3.Session().client("sns", region_name="eu-west-1")
    sqs = boto3.Session().client("sqs", region_name="eu-west-1")
    topic = sns.create_topic(Name="alarms")["TopicArn"]
    url = sqs.create_queue(QueueName="seen")["QueueUrl"]
    arn = "arn:aws:sqs:eu-west-1:123456789012:seen"
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    notifier = Notifier(topic, RUN)
    notifier.finding(FOUND)
    notifier.close()
    (message,) = sqs.receive_message(QueueUrl=url)["Messages"]
    content = json.loads(message["Body"])
    assert content["Subject"] == "problem: katzen-gr??er"
    assert content["Message"].startswith(f"{RUN}\nproblem: Loss_D")


def test_without_an_address_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S4GAN_NOTIFY", raising=False)
    notifier = Notifier.from_environment(RUN)
    notifier.finding(FOUND)
    notifier.close()


@pytest.mark.parametrize(
    "address", ["me@example.org", "https:///x", "arn:aws:sns:here", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("S4GAN_NOTIFY", address)
    with pytest.raises(ConfigError, match="S4GAN_NOTIFY: is neither") as caught:
        Notifier.from_environment(RUN)
    assert address not in str(caught.value)

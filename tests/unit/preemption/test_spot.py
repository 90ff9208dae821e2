"""A spot notice becomes a stop with a deadline; anything else the service says becomes nothing."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from job.drill.imds import FakeImds
from job.events import Notice
from job.preemption import StopRequest, spot, watch_spot
from job.preemption.spot import ACTION_PATH, REBALANCE_PATH
from tests.services import wait_until

TOKEN_PATH = "/latest/api/token"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "POLL_S", 0.01)


@pytest.fixture
def stop() -> StopRequest:
    return StopRequest()


class Told(list[Notice]):
    """What was told, but for the machine's description, which comes first wherever one answers."""

    def append(self, notice: Notice) -> None:
        if notice.kind != "machine":
            super().append(notice)


@pytest.fixture
def told() -> list[Notice]:
    return Told()


def point_at(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def on_ec2(imds: FakeImds, monkeypatch: pytest.MonkeyPatch) -> FakeImds:
    point_at(monkeypatch, imds.environment())
    return imds


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spot-watch"]


def polls(imds: FakeImds, count: int) -> Callable[[], bool]:
    """Whether the notice has been asked for so often since `forget`."""
    return lambda: sum(one.path == ACTION_PATH for one in imds.requests) >= count


# ---------------------------------------------------------------- what is announced


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_a_notice_asks_to_stop_with_a_deadline(on_ec2, stop, told, action):
    with watch_spot(stop, told.append):
        wait_until(polls(on_ec2, 2))
        assert not stop.requested
        assert stop.seconds_left is None
        on_ec2.notice(in_s=120, action=action)
        wait_until(lambda: stop.requested)
    assert stop.reason == "a spot notice"
    assert 0 < stop.seconds_left <= 120
    (notice,) = told
    assert notice.kind == "spot_notice"
    assert f"will {action} in" in notice.message
    assert notice.fields["action"] == action
    assert notice.fields["at"].endswith("Z")
    assert 0 < notice.fields["seconds_left"] <= 120


def test_a_notice_is_in_the_ledger_before_the_loop_can_stop(on_ec2, stop):
    requested_when_told: list[bool] = []
    on_ec2.notice()
    with watch_spot(stop, lambda notice: requested_when_told.append(stop.requested)):
        wait_until(lambda: stop.requested)
    assert requested_when_told == [False]


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), SystemExit(1)])
def test_a_notice_stops_even_if_nobody_can_be_told(on_ec2, stop, error):
    tries: list[Notice] = []

    def tell(notice: Notice) -> None:
        tries.append(notice)
        raise error

    on_ec2.notice()
    with watch_spot(stop, tell):
        wait_until(lambda: not watching())
    assert stop.seconds_left is not None
    assert len(tries) == 1


def test_after_the_notice_nobody_is_asked_any_more(on_ec2, stop, told):
    on_ec2.notice()
    with watch_spot(stop, told.append):
        wait_until(lambda: not watching())
        assert stop.requested
    assert len(told) == 1


def test_a_time_that_is_over_leaves_no_negative_time(on_ec2, stop, told):
    on_ec2.notice(in_s=-30)
    with watch_spot(stop, told.append):
        wait_until(lambda: stop.requested)
    assert told[0].fields["seconds_left"] == 0
    assert stop.seconds_left <= 0


def test_a_notice_adds_its_deadline_to_an_earlier_signal(on_ec2, stop, told):
    stop.request("SIGTERM")
    on_ec2.notice(in_s=100)
    with watch_spot(stop, told.append):
        wait_until(lambda: stop.seconds_left is not None)
    assert stop.reason == "SIGTERM"


def test_a_rebalance_recommendation_asks_for_one_save_and_training_goes_on(on_ec2, stop, told):
    on_ec2.rebalance()
    with watch_spot(stop, told.append):
        wait_until(lambda: len(told) == 1)
        on_ec2.forget()
        wait_until(polls(on_ec2, 3))
        assert stop.take_save_request()
        assert not stop.take_save_request()
        assert not stop.requested
        assert [notice.kind for notice in told] == ["rebalance_recommendation"]
        assert not any(one.path == REBALANCE_PATH for one in on_ec2.requests)
        on_ec2.notice()
        wait_until(lambda: stop.requested)
    assert [notice.kind for notice in told] == ["rebalance_recommendation", "spot_notice"]


# ---------------------------------------------------------------- the service


def test_one_token_serves_many_polls_and_a_lost_one_is_renewed(on_ec2, stop, told):
    with watch_spot(stop, told.append):
        wait_until(polls(on_ec2, 3))
        assert sum(one.path == TOKEN_PATH for one in on_ec2.requests) == 1
        on_ec2.expire_tokens()
        on_ec2.notice()
        wait_until(lambda: stop.requested)
    assert sum(one.path == TOKEN_PATH for one in on_ec2.requests) == 2
    assert any(one.status == 401 for one in on_ec2.requests)


def test_it_never_asks_without_a_token(on_ec2, stop, told):
    on_ec2.tokens_required = False
    with watch_spot(stop, told.append):
        wait_until(polls(on_ec2, 1))
    assert on_ec2.requests[0].path == TOKEN_PATH


def test_a_service_that_hangs_for_a_while_is_asked_again(on_ec2, stop, told, monkeypatch):
    monkeypatch.setattr(spot, "TIMEOUT_S", 0.05)
    with watch_spot(stop, told.append):
        wait_until(polls(on_ec2, 1))
        on_ec2.forget()
        on_ec2.hang = True
        wait_until(lambda: len(on_ec2.requests) > spot.TRIES_WITHOUT_ANSWER + 1)
        assert watching(), "it has answered before, so this is an instance"
        monkeypatch.setattr(spot, "TIMEOUT_S", 5.0)
        on_ec2.hang = False
        on_ec2.notice()
        wait_until(lambda: stop.requested)


def test_a_service_that_never_answers_is_given_up_in_silence(
    on_ec2, stop, told, monkeypatch, caplog, capfd
):
    monkeypatch.setattr(spot, "TIMEOUT_S", 0.05)
    on_ec2.hang = True
    with watch_spot(stop, told.append):
        wait_until(lambda: not watching())
    assert len(on_ec2.requests) == spot.TRIES_WITHOUT_ANSWER
    assert (told, stop.requested, caplog.text) == ([], False, "")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("variable", spot.IN_THE_CLOUD)
def test_in_a_container_on_an_instance_silence_is_told(on_ec2, stop, told, monkeypatch, variable):
    """By default the service is one hop too far for a container."""
    monkeypatch.setattr(spot, "TIMEOUT_S", 0.05)
    monkeypatch.setenv(variable, "anything")
    on_ec2.hang = True
    with watch_spot(stop, told.append):
        wait_until(lambda: not watching())
    (notice,) = told
    assert notice.kind == "spot_watch_off"
    assert "HttpPutResponseHopLimit of 2" in notice.message
    assert not stop.requested


def test_nobody_listening_is_no_instance(imds, stop, told, monkeypatch, capfd):
    with FakeImds() as gone:
        pass
    point_at(monkeypatch, gone.environment())
    with watch_spot(stop, told.append):
        wait_until(lambda: not watching())
    assert (told, stop.requested) == ([], False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["true", "TRUE", "True"])
def test_it_can_be_switched_off(on_ec2, stop, told, monkeypatch, value):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", value)
    on_ec2.notice()
    with watch_spot(stop, told.append):
        assert not watching()
    assert on_ec2.requests == []


def test_no_proxy_is_asked_for_the_instances_own_service(on_ec2, stop, told, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    on_ec2.notice()
    with watch_spot(stop, told.append):
        wait_until(lambda: stop.requested)


@pytest.mark.parametrize("failing", [False, True], ids=["ends", "raises"])
def test_the_thread_ends_with_the_block(on_ec2, stop, told, monkeypatch, failing):
    monkeypatch.setattr(spot, "POLL_S", 3600.0)

    def block() -> None:
        with watch_spot(stop, told.append):
            wait_until(polls(on_ec2, 1))
            assert len(watching()) == 1
            if failing:
                raise KeyboardInterrupt

    if failing:
        with pytest.raises(KeyboardInterrupt):
            block()
    else:
        block()
    assert not watching()


# ---------------------------------------------------------------- nonsense


class Nonsense(http.server.BaseHTTPRequestHandler):
    """Gives out a token, and then whatever it was made with."""

    status, body = 200, b""

    def do_PUT(self) -> None:
        self._reply(200, b"token")

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        self._reply(self.status, self.body)

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def nonsense(request: pytest.FixtureRequest, monkeypatch) -> Iterator[list[str]]:
    status, body = request.param
    asked: list[str] = []
    handler = type("Handler", (Nonsense,), {"status": status, "body": body, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv(
        "AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/"
    )
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "nonsense",
    [
        (200, b"<html>log in to this network</html>"),
        (200, b""),
        (200, b"\xff\xfe"),
        (200, b"null"),
        (200, b"[]"),
        (200, b'{"action": "terminate"}'),
        (200, b'{"time": "2026-01-01T00:00:00Z"}'),
        (200, b'{"action": "terminate", "time": "soon"}'),
        (200, b'{"action": "terminate", "time": null}'),
        (401, b"unauthorized"),
        (403, b"forbidden"),
        (500, b"broken"),
        (302, b""),
    ],
    indirect=True,
)
def test_whoever_answers_nonsense_is_no_instance(nonsense, stop, told, capfd):
    with watch_spot(stop, told.append):
        wait_until(lambda: not watching())
    assert len(nonsense) >= spot.TRIES_WITHOUT_ANSWER
    assert (told, stop.requested) == ([], False)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- what machine this is


def test_the_machine_is_told_once(on_ec2, stop):
    told: list[Notice] = []
    with watch_spot(stop, told.append):
        wait_until(polls(on_ec2, 3))
    (notice,) = told
    assert (notice.kind, notice.message) == ("machine", "")
    assert notice.fields == {
        "instance_type": "g5.xlarge",
        "life_cycle": "spot",
        "zone": "us-east-1a",
    }

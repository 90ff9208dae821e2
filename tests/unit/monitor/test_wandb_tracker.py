"""The W&B mirror: what it sends, and that whatever W&B does neither delays nor ends a training."""

from __future__ import annotations

import os
import pwd
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.errors import CommError

from job.config import Config, config_from_dict
from job.events import EvalEvent, Notice, TrainEvent
from job.monitor import wandb_run, wandb_tracker
from job.monitor.wandb_run import RunFacts
from job.monitor.wandb_tracker import WandbTracker
from job.run import RunIdentity

IDENTITY = RunIdentity(run_id="0123", wandb_id="s4gan-0123", created_at="2024-01-01T00:00:00+00:00")
TRAIN = TrainEvent(
    iteration=500,
    loss_ce=2.47,
    loss_fm=0.037,
    loss_st=1.5,
    loss_d=0.184,
    loss_g=3.9737,
    st_count=2,
    lr_g=2.5e-4,
    lr_d=1e-4,
    images_per_s=12.5,
)
EVAL = EvalEvent(
    iteration=500,
    train_miou=0.75,
    val_miou=0.5,
    class_iou=(0.5, None),
    pixel_accuracy=0.8,
    best_miou=0.5,
    previous_best=None,
)


def losses_at(iteration: int) -> TrainEvent:
    return replace(TRAIN, iteration=iteration)


WANDB_VARIABLES = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody has logged in."""
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


class RecordedRun:
    """Stands where W&B's own run would, and remembers what it is told."""

    url = "https://wandb.example/runs/s4gan-0123"

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.dir = str(Path(arguments["dir"]) / "wandb" / "offline-run-1" / "files")
        self.metrics: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.ending: list[str] = []
        self.resumed = False
        self.summary: dict[str, Any] = {}
        self.id = arguments["id"]

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def mark_preempting(self) -> None:
        self.ending.append("preempting")

    def finish(self, *, exit_code: int) -> None:
        self.ending.append(f"finished {exit_code}")


class RecordedInit:
    """`wandb.init`: raises what is in `errors`, one a call, then gives runs."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.modes: list[str] = []
        self.runs: list[RecordedRun] = []
        self.make: Callable[[dict[str, Any]], RecordedRun] = RecordedRun

    def __call__(self, **arguments: Any) -> RecordedRun:
        self.modes.append(arguments["mode"])
        if self.errors:
            raise self.errors.pop(0)
        self.runs.append(self.make(arguments))
        return self.runs[-1]


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> RecordedInit:
    recorded = RecordedInit()
    monkeypatch.setattr(wandb, "init", recorded)
    return recorded


class Mirror:
    """A tracker, what it has said, and where its files are."""

    def __init__(self, folder: Path, **wandb_settings: Any) -> None:
        self.config = config_from_dict({"wandb": wandb_settings}, source="test")
        self.folder = folder
        self.told: list[Notice] = []
        self.tracker = WandbTracker(
            self.config, IDENTITY, folder, self.told.append, facts=RunFacts(uri="s3://b/runs/x")
        )

    @property
    def said(self) -> list[str]:
        """What the console shows."""
        return [notice.message for notice in self.told]

    def end(self, *, exit_code: int = 0, preempted: bool = False) -> Mirror:
        self.tracker.close(exit_code=exit_code, preempted=preempted)
        return self


@pytest.fixture
def mirror(tmp_path: Path) -> Callable[..., Mirror]:
    def make(**wandb_settings: Any) -> Mirror:
        return Mirror(tmp_path, **wandb_settings)

    return make


def log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)


# ---------------------------------------------------------------- real wandb


def comes_to_hold(record: Path, text: bytes) -> bool:
    """wandb's own process closes the file, a moment after `finish` has returned."""
    give_up_at = time.monotonic() + 10
    while time.monotonic() < give_up_at:
        if text in record.read_bytes():
            return True
        time.sleep(0.02)
    return False


def test_without_a_key_a_real_run_is_written_offline_and_one_line_said(
    mirror: Callable[..., Mirror], capfd: pytest.CaptureFixture[str]
) -> None:
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.tracker.evaluation(EVAL)
    ours.end()
    files = ours.folder / "wandb"
    assert ours.said == [f"W&B: offline, files in {files} (set WANDB_API_KEY to go online)"]
    (record,) = files.rglob("*.wandb")
    assert comes_to_hold(record, b"Training Loss/Cross Entropy")
    assert comes_to_hold(record, b"Metrics/Train-Val Gap")
    assert ours.tracker.outcome == "offline; upload with: s4gan wandb-sync s3://b/runs/x"
    assert not ours.tracker.finished_online
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def _fresh_wandb() -> Iterator[None]:
    """wandb reads the environment once a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("_fresh_wandb")
def test_a_server_that_does_not_answer_leads_to_a_real_offline_run(
    mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 4)
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.end()
    (line,) = ours.said
    assert line.startswith("W&B: not reachable (")
    assert line.endswith("); going on offline")
    (record,) = (ours.folder / "wandb").glob("offline-run-*/*.wandb")
    assert comes_to_hold(record, b"Training Loss/Cross Entropy")
    assert not ours.tracker.finished_online


# ---------------------------------------------------------------- what is sent


def test_losses_go_to_the_guides_charts(init: RecordedInit, mirror: Callable[..., Mirror]) -> None:
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.end()
    assert init.runs[0].logged == [
        {
            "iteration": 500,
            "Training Loss/Cross Entropy": 2.47,
            "Training Loss/Feature Matching": 0.037,
            "Training Loss/Self-Training": 1.5,
            "Training Loss/Discriminator": 0.184,
            "Training Loss/Total Generator": 3.9737,
            "Self-Training/Confidence Count": 2,
            "Learning Rate/Generator": 2.5e-4,
            "Learning Rate/Discriminator": 1e-4,
            "sent/train": 500,
        }
    ]


def test_evaluations_go_to_the_guides_charts(
    init: RecordedInit, mirror: Callable[..., Mirror]
) -> None:
    ours = mirror()
    ours.tracker.evaluation(EVAL)
    ours.end()
    assert init.runs[0].logged == [
        {
            "iteration": 500,
            "Metrics/Training mIoU": 0.75,
            "Metrics/Validation mIoU": 0.5,
            "Metrics/Train-Val Gap": 0.25,
            "IoU/class 0": 0.5,
            "sent/eval": 500,
        }
    ]


def test_everything_is_drawn_over_the_iteration_and_the_best_miou_summed_up(
    init: RecordedInit, mirror: Callable[..., Mirror]
) -> None:
    mirror().end()
    metrics = init.runs[0].metrics
    assert metrics["iteration"] == {"hidden": True}
    assert metrics["*"] == {"step_metric": "iteration"}
    assert metrics["Metrics/Validation mIoU"] == {"step_metric": "iteration", "summary": "max"}


def test_other_events_send_nothing(init: RecordedInit, mirror: Callable[..., Mirror]) -> None:
    ours = mirror()
    ours.tracker.step_done(1)
    ours.tracker.evaluation_started(1)
    ours.tracker.notice(Notice("note", "a note", {}))
    ours.end()
    assert init.runs[0].logged == []
    assert len(ours.said) == 1


def test_every_attempt_continues_the_one_run_with_its_whole_configuration(
    init: RecordedInit, mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    for _ in range(2):
        mirror(project="p", entity="e", tags=["a", "b"]).end()
    for run in init.runs:
        sent = run.arguments
        assert sent["id"] == "s4gan-0123"
        assert sent["resume"] == "allow"
        assert (sent["project"], sent["entity"], sent["tags"]) == ("p", "e", ["a", "b"])
        assert sent["dir"] == str(tmp_path)
        assert sent["config"]["train"] == Config().to_dict()["train"]
    assert len(init.runs) == 2


def test_events_keep_their_order(init: RecordedInit, mirror: Callable[..., Mirror]) -> None:
    ours = mirror()
    for iteration in range(200):
        ours.tracker.train(losses_at(iteration))
    ours.end()
    assert [values["iteration"] for values in init.runs[0].logged] == list(range(200))


# ---------------------------------------------------------------- online and its end


def test_with_a_key_the_run_is_online_and_its_address_said(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    ours = mirror().end()
    assert init.modes == ["online"]
    assert ours.said == [f"W&B: {RecordedRun.url}"]
    assert ours.told[0].fields["url"] == ours.tracker.url == RecordedRun.url
    assert ours.tracker.finished_online
    assert ours.tracker.outcome == RecordedRun.url
    assert init.runs[0].ending == ["finished 0"]


def test_a_preempted_attempt_is_marked_so_before_it_finishes(
    init: RecordedInit, mirror: Callable[..., Mirror]
) -> None:
    mirror().end(exit_code=75, preempted=True)
    assert init.runs[0].ending == ["preempting", "finished 75"]


@pytest.mark.parametrize("error", [CommError("no route\nto host"), wandb.Error("x")])
def test_a_failed_start_goes_on_offline_with_one_line(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    log_in(monkeypatch)
    init.errors = [error]
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.end()
    first_line = str(error).splitlines()[0]
    assert init.modes == ["online", "offline"]
    assert ours.said == [f"W&B: not reachable ({first_line}); going on offline"]
    assert len(init.runs[0].logged) == 1
    assert init.runs[0].ending == ["finished 0"]
    assert not ours.tracker.finished_online
    assert ours.tracker.outcome == "offline; upload with: s4gan wandb-sync s3://b/runs/x"


@pytest.mark.parametrize(
    "errors",
    [[CommError("down"), CommError("disk full")], [OSError("disk full")], [RuntimeError()]],
    ids=["twice", "system", "textless"],
)
def test_no_failure_to_start_reaches_the_training(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    errors: list[Exception],
) -> None:
    log_in(monkeypatch)
    last = str(errors[-1]) or "RuntimeError"
    init.errors = list(errors)
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.tracker.evaluation(EVAL)
    ours.end()
    assert ours.tracker.outcome == (
        f"could not start ({last}); training was not affected, the ledger has everything"
    )
    assert ours.said[-1] == f"W&B: {ours.tracker.outcome}"
    assert not ours.tracker.finished_online


class RefusingRun(RecordedRun):
    """A run that takes two lines and then nothing more."""

    def log(self, values: dict[str, Any]) -> None:
        if len(self.logged) == 2:
            raise CommError("connection lost\nmore")
        super().log(values)


class UnfinishableRun(RecordedRun):
    def finish(self, *, exit_code: int) -> None:
        raise TimeoutError("still uploading")


def test_an_error_while_sending_is_said_once_and_ends_the_mirror_alone(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    init.make = RefusingRun
    ours = mirror()
    for iteration in range(10):
        ours.tracker.train(losses_at(iteration))
    ours.end()
    assert ours.said[1:] == [
        "W&B: stopped working (connection lost); training was not affected, "
        "the ledger has everything"
    ]
    assert not ours.tracker.finished_online


def test_an_error_while_finishing_is_said_and_not_raised(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    init.make = UnfinishableRun
    ours = mirror()
    ours.tracker.train(TRAIN)
    ours.end()
    assert ours.tracker.outcome.startswith("stopped working (still uploading)")
    assert ours.said[-1] == f"W&B: {ours.tracker.outcome}"
    assert not ours.tracker.finished_online


def test_a_start_that_hangs_delays_neither_training_nor_end(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def hang(arguments: dict[str, Any]) -> RecordedRun:
        answered.wait(30)
        return RecordedRun(arguments)

    init.make = hang
    monkeypatch.setattr(wandb_tracker, "JOIN_TIMEOUT_S", 0.2)
    try:
        start = time.monotonic()
        ours = mirror()
        for iteration in range(100):
            ours.tracker.train(losses_at(iteration))
        ours.end()
        assert time.monotonic() - start < 5
        assert ours.tracker.outcome == (
            f"did not finish within 0.2 s; its files are in {ours.folder / 'wandb'}"
        )
        assert ours.said[-1] == f"W&B: {ours.tracker.outcome}"
        assert not ours.tracker.finished_online
    finally:
        answered.set()
        for thread in threading.enumerate():
            if thread.name == "wandb":
                thread.join(10)


def test_what_is_queued_while_wandb_starts_is_sent_once_it_has(
    init: RecordedInit, mirror: Callable[..., Mirror]
) -> None:
    answered = threading.Event()

    def slow(arguments: dict[str, Any]) -> RecordedRun:
        answered.wait(30)
        return RecordedRun(arguments)

    init.make = slow
    ours = mirror()
    for iteration in range(3):
        ours.tracker.train(losses_at(iteration))
    answered.set()
    ours.end()
    assert len(init.runs[0].logged) == 3


def test_the_limits_leave_time_within_a_spot_notice() -> None:
    assert wandb_tracker.JOIN_TIMEOUT_S <= 90
    assert wandb_tracker.FINISH_TIMEOUT_S < wandb_tracker.JOIN_TIMEOUT_S


# ---------------------------------------------------------------- modes and keys


def test_disabled_does_nothing_at_all(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    threads = threading.active_count()
    ours = mirror(mode="disabled")
    assert threading.active_count() == threads
    ours.tracker.train(TRAIN)
    ours.tracker.evaluation(EVAL)
    ours.end()
    assert init.modes == []
    assert ours.said == []
    assert list(ours.folder.iterdir()) == []
    assert not ours.tracker.finished_online
    assert ours.tracker.outcome == "disabled by wandb.mode"


@pytest.mark.parametrize(
    ("configured", "variable", "modes"),
    [
        ("auto", None, ["online"]),
        ("auto", "online", ["online"]),
        ("auto", "offline", ["offline"]),
        ("auto", "disabled", []),
        ("offline", None, ["offline"]),
        ("online", "offline", ["online"]),
    ],
)
def test_with_a_key_the_mode_is_the_configured_one_then_the_variables(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    variable: str | None,
    modes: list[str],
) -> None:
    log_in(monkeypatch)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    mirror(mode=configured).end()
    assert init.modes == modes


def test_who_chose_offline_is_not_told_to_set_a_key(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    ours = mirror(mode="offline").end()
    assert "WANDB_API_KEY" not in ours.said[0]


def mode_found(init: RecordedInit, mirror: Callable[..., Mirror]) -> str:
    mirror().end()
    (mode,) = init.modes
    return mode


def write_netrc(
    monkeypatch: pytest.MonkeyPatch, folder: Path, host: str, *, raw: bytes | None = None
) -> None:
    path = folder / "netrc"
    path.write_bytes(raw or f"machine {host}\n  login user\n  password {'k' * 40}\n".encode())
    monkeypatch.setenv("NETRC", str(path))


def default_host() -> str:
    return wandb.Settings().base_url.partition("://")[2].rstrip("/")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_is_found(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv(name, "k" * 40)
    assert mode_found(init, mirror) == "online"


def test_an_empty_key_is_none(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert mode_found(init, mirror) == "offline"


def test_the_key_of_a_login_is_found_in_netrc(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_netrc(monkeypatch, tmp_path, default_host())
    assert mode_found(init, mirror) == "online"


def test_the_netrc_file_in_the_home_folder_is_found(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_netrc(monkeypatch, tmp_path, default_host())
    (tmp_path / "netrc").rename(tmp_path / ".netrc")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mode_found(init, mirror) == "online"


@pytest.mark.parametrize(
    "raw", [b"machine github.com login a password b\n", b"machine", b"what is this", b"\n"]
)
def test_a_netrc_without_our_host_or_broken_means_offline(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    raw: bytes,
) -> None:
    write_netrc(monkeypatch, tmp_path, "", raw=raw)
    assert mode_found(init, mirror) == "offline"


def test_a_login_of_an_older_wandb_is_found(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_netrc(monkeypatch, tmp_path, "api.wandb.ai")
    assert mode_found(init, mirror) == "online"


@pytest.mark.parametrize("host", ["wandb.example.com", "localhost:8080"])
def test_a_login_at_ones_own_server_is_found(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    host: str,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    write_netrc(monkeypatch, tmp_path, host)
    assert mode_found(init, mirror) == "online"


def test_a_netrc_that_is_not_text_means_offline(
    init: RecordedInit,
    mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_netrc(monkeypatch, tmp_path, "", raw=b"machine caf\xe9 login a password b\n")
    assert mode_found(init, mirror) == "offline"


def test_a_user_without_a_home_is_offline(
    init: RecordedInit, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError(os.getuid())

    monkeypatch.delenv("NETRC")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert mode_found(init, mirror) == "offline"

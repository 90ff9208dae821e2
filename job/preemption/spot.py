"""Watching for the spot notice: EC2 says two minutes ahead when it takes an instance back.

The notice is asked for inside the container, as nothing signals a Batch job when it comes. Outside
of EC2 the watch ends by itself, in silence. In a container on EC2 that cannot reach the service (by
default it is one network hop too far) it says so. Source: Amazon EC2 User Guide, "Spot Instance
interruption notices" and "EC2 instance rebalance recommendations".
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from job.events import Notice
from job.preemption.stop import StopRequest

log = logging.getLogger(__name__)

POLL_S = 5.0
"""As the EC2 User Guide advises."""
TIMEOUT_S = 2.0
TOKEN_TTL_S = 21_600
"""The longest the service gives."""
TRIES_WITHOUT_ANSWER = 3
"""Then this is no EC2 instance, or one whose service a container cannot reach."""
IN_THE_CLOUD = ("AWS_BATCH_JOB_ID", "ECS_CONTAINER_METADATA_URI_V4")
"""Variables that AWS sets in a container which does run on such an instance."""
DEFAULT_ENDPOINT = "http://169.254.169.254"
ACTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
MACHINE_PATHS = {
    "instance_type": "/latest/meta-data/instance-type",
    "life_cycle": "/latest/meta-data/instance-life-cycle",
    "zone": "/latest/meta-data/placement/availability-zone",
}
"""What an instance says of itself: `g5.xlarge`, `spot` or `on-demand`, `us-east-1a`."""
_UNUSABLE = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
"""No answer, or none that the documented service would give."""
# Never through a proxy: the service answers on the instance itself only.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class MetadataService:
    """EC2's instance metadata service, version 2 (with a session token)."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = ""

    def get(self, path: str) -> bytes | None:
        """Content under a path; None if there is none.

        Raises:
            OSError: the service does not answer, or refuses.
        """
        for fresh in (False, True):
            if not self._token or fresh:
                self._token = self._request("PUT", "/latest/api/token").decode()
            try:
                return self._request("GET", path)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or fresh:  # 401: the token has run out
                    raise
        raise AssertionError("unreachable")

    def _request(self, method: str, path: str) -> bytes:
        headers = (
            {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
            if method == "PUT"
            else {"X-aws-ec2-metadata-token": self._token}
        )
        request = urllib.request.Request(self._endpoint + path, method=method, headers=headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            error.close()
            raise


@contextlib.contextmanager
def watch_spot(stop: StopRequest, tell: Callable[[Notice], None]) -> Iterator[None]:
    """Within this block a thread turns a spot notice into a stop with a deadline.

    A rebalance recommendation (the instance may be next) asks for a checkpoint, once, and training
    goes on. The first answer also tells which machine this is.

    Args:
        stop: is asked to stop.
        tell: takes a notice for console and ledger, on the watching thread.
    """
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        yield
        return
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or DEFAULT_ENDPOINT
    done = threading.Event()
    watch = _Watch(MetadataService(endpoint), stop, tell, done)
    thread = threading.Thread(target=watch.run, name="spot-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(4 * TIMEOUT_S)


class _Watch:
    """The thread's work."""

    def __init__(
        self,
        service: MetadataService,
        stop: StopRequest,
        tell: Callable[[Notice], None],
        done: threading.Event,
    ) -> None:
        self._service = service
        self._stop = stop
        self._tell = tell
        self._done = done
        self._rebalance_seen = False
        self._answered = False

    def run(self) -> None:
        """Poll until a notice comes, the block ends, or nobody has ever answered."""
        silent = 0
        while True:
            try:
                if self._look():
                    return
                silent = 0
            except _UNUSABLE:
                silent += 1
                if silent >= TRIES_WITHOUT_ANSWER and not self._answered:
                    self._warn_if_needed()
                    return
            if self._done.wait(POLL_S):
                return

    def _warn_if_needed(self) -> None:
        if any(os.environ.get(name) for name in IN_THE_CLOUD):
            self._tell(
                Notice(
                    "spot_watch_off",
                    "warning: the instance's metadata service does not answer, so a spot notice "
                    "would not be seen; give the instances an HttpPutResponseHopLimit of 2",
                )
            )

    def _tell_machine(self) -> None:
        """For the ledger: what the attempt runs on, from which its cost is made later."""
        fields = {name: self._service.get(path) for name, path in MACHINE_PATHS.items()}
        if fields["instance_type"] is not None:
            known = {name: text.decode() for name, text in fields.items() if text is not None}
            self._tell(Notice("machine", "", known))

    def _look(self) -> bool:
        """One poll; whether the notice has come."""
        text = self._service.get(ACTION_PATH)
        if text is not None:
            notice = json.loads(text)
            action, at = str(notice["action"]), str(notice["time"])
            left_s = _seconds_until(at)
            try:
                # Before the flag: the loop may stop at once, and the ledger closes soon after.
                self._tell(
                    Notice(
                        "spot_notice",
                        f"Spot notice: this machine will {action} in {left_s:.0f} s; "
                        "saving after this iteration",
                        {"action": action, "at": at, "seconds_left": left_s},
                    )
                )
            except BaseException:  # whatever it is, the notice counts
                log.exception("the spot notice could not be told")
            self._stop.request("a spot notice", within_s=left_s)
            return True
        if not self._answered:
            self._answered = True
            self._tell_machine()
        if not self._rebalance_seen and self._service.get(REBALANCE_PATH) is not None:
            self._rebalance_seen = True
            self._tell(
                Notice(
                    "rebalance_recommendation",
                    "EC2 expects to take this machine back sooner than usual; saving now, "
                    "training goes on",
                )
            )
            self._stop.request_save()
        return False


def _seconds_until(time: str) -> float:
    """From now to an ISO 8601 time in UTC; never negative."""
    then = datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())

"""Telling somebody who does not look: findings to a web hook or an SNS topic.

The address is a secret of its owner (whoever has a hook's address may write to it), so it comes
from the environment and stands in no configuration, ledger or checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from job.errors import ConfigError, reason
from job.monitor.health import Finding

log = logging.getLogger(__name__)

VARIABLE = "S4GAN_NOTIFY"
TIMEOUT_S = 10.0
CLOSE_S = 10.0
MAX_SUBJECT = 100
"""Characters. Source: Amazon SNS API Reference, Publish."""
_TOPIC = re.compile(r"arn:aws[a-z-]*:sns:([a-z0-9-]+):\d{12}:[\w-]+")


class Notifier:
    """Sends findings on a thread of its own; what cannot be sent is logged, and forgotten.

    Args:
        address: https://... (a POST of JSON; `text` is what Slack and its like show) or the ARN of
            an SNS topic; empty: nobody is told.
        run_uri: of the run.

    Raises:
        ConfigError: the address is neither.
    """

    def __init__(self, address: str, run_uri: str) -> None:
        self._address = address
        self._run_uri = run_uri
        self._topic = _TOPIC.fullmatch(address)
        url = urlsplit(address)
        if address and not self._topic and not (url.scheme in ("http", "https") and url.netloc):
            raise ConfigError(
                f"{VARIABLE}: is neither a web hook nor an SNS topic",
                mend="set it to https://... or arn:aws:sns:REGION:ACCOUNT:TOPIC, or unset it",
            )
        self._queue: queue.Queue[Finding | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, name="notify", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, run_uri: str) -> Notifier:
        """To the address in `S4GAN_NOTIFY`."""
        return cls(os.environ.get(VARIABLE, ""), run_uri)

    def finding(self, finding: Finding) -> None:
        """Queue a finding; notes are not worth a message."""
        if self._address and finding.severity != "note":
            self._queue.put(finding)

    def close(self, within_s: float | None = None) -> None:
        """Wait until all is sent.

        Args:
            within_s: seconds, at most; None: a few.
        """
        self._queue.put(None)
        self._thread.join(CLOSE_S if within_s is None else max(0.0, min(CLOSE_S, within_s)))

    def _serve(self) -> None:
        while (finding := self._queue.get()) is not None:
            try:
                if self._topic:
                    self._publish(self._topic[1], finding)
                else:
                    self._post(finding)
            except Exception as error:  # whoever is to be told must not end the training
                log.warning("%s: the finding was not sent: %s", VARIABLE, self._hidden(error))

    def _post(self, finding: Finding) -> None:
        content = {"text": self._text(finding), "run": self._run_uri, **finding.to_dict()}
        request = urllib.request.Request(
            self._address,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass

    def _publish(self, region: str, finding: Finding) -> None:
        from botocore.config import Config

        from job.storage.s3 import aws_session

        client: Any = aws_session().client(
            "sns",
            region_name=region,
            config=Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S),
        )
        subject = f"{finding.severity}: {self._run_uri.rstrip('/').rpartition('/')[2]}"
        client.publish(
            TopicArn=self._address,
            Subject=subject.encode("ascii", "replace").decode()[:MAX_SUBJECT],
            Message=self._text(finding),
        )

    def _text(self, finding: Finding) -> str:
        return f"{self._run_uri}\n{finding.line()}\ns4gan diagnose {self._run_uri}"

    def _hidden(self, error: Exception) -> str:
        """What went wrong, without the address."""
        if isinstance(error, urllib.error.HTTPError):
            return f"the hook answered {error.code}"
        return reason(error).replace(self._address, VARIABLE)

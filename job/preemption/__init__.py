"""Being asked to stop: by a signal, or by EC2's notice that it takes the machine back."""

from job.preemption.spot import watch_spot
from job.preemption.stop import StopRequest, stop_with_stdin

__all__ = ["StopRequest", "stop_with_stdin", "watch_spot"]

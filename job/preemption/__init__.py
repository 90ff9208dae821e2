"""Being asked to stop."""

from job.preemption.stop import StopRequest

__all__ = ["StopRequest"]

"""The scheduler: which tokens of which requests each step computes. Plain Python."""

from jaxengine.scheduler.scheduler import ScheduledBatch, ScheduledSequence, Scheduler, TokenUpdate
from jaxengine.scheduler.shards import ShardedScheduler

__all__ = ["ScheduledBatch", "ScheduledSequence", "Scheduler", "ShardedScheduler", "TokenUpdate"]

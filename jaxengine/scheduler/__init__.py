"""The scheduler: which tokens of which requests each step computes. Plain Python."""

from jaxengine.scheduler.batch import ScheduledBatch, ScheduledSequence, TokenUpdate
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.scheduler.shards import ShardedScheduler

__all__ = ["ScheduledBatch", "ScheduledSequence", "Scheduler", "ShardedScheduler", "TokenUpdate"]

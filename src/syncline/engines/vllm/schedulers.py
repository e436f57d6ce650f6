"""vLLM's two schedulers, `Holding`. vLLM's engine core imports them by name (`scheduler_cls`), nobody else does."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from syncline.engines.vllm.holding import Holding


class HoldingScheduler(Holding, Scheduler):
    pass


class HoldingAsyncScheduler(Holding, AsyncScheduler):
    pass

"""A step of ours as a step of datatrove: the one module that knows both."""

from datatrove.pipeline.base import PipelineStep

from aquila_sft.data.tasks import Work


class DatatroveStep(PipelineStep):
    """Tasks rank, rank + world_size, … of one step; no documents pass through datatrove's own pipeline."""

    type = "AQUILA"

    def __init__(self, step: str, work: Work) -> None:
        super().__init__()
        self.name, self.work = f"prepare {step}", work
        self.step = step

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        from aquila_sft.data import workers

        workers.one_thread()
        step = next(step for step in self.work.steps if step.name == self.step)
        for task in step.tasks(self.work)[rank::world_size]:
            with self.track_time():
                step.run(self.work, task)
            self.stat_update("tasks")
        yield from data or ()

"""The trainer of a run that has a folder."""

from .kernels.choice import reason_against_kernels
from .loop import Trainer
from .plan import Run, default_log_interval
from .variant import Variant


class RunTrainer(Trainer):
    """Trains the variant of a run."""

    def __init__(self, run: Run, variant: Variant, device: str) -> None:
        if not reason_against_kernels(device):
            variant.use_kernels()
        super().__init__(variant, run.steps, device, run.config.accumulate, run.config.precision)
        self.run = run
        self.steps_done = 0  # number of steps already done when this trainer was prepared
        self.logged = 0  # number of steps done when metrics were last logged
        self.digest = ""  # digest of everything that determines the run, as in run.json
        self.log_every = run.requested.get("log_every") or default_log_interval(run.steps)  # steps

    def logs_after(self, steps_done: int) -> bool:
        """Whether metrics are due after `steps_done` steps. They are also logged with every checkpoint."""
        return steps_done % self.log_every == 0 or steps_done == self.steps

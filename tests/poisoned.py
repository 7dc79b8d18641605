"""train.py with gradients that are no numbers: poison() for the tests of this process, run as a script for one of two.

RANK=1 python tests/poisoned.py recipe=pretrain …     # each process leaves a hash of the weights it ends with
"""

import hashlib
import sys
from pathlib import Path

from aquila_sft import pretrain, runtime


def poison(places: set, patch=setattr, times: float = float("nan")) -> None:
    """Gradients of the first parameter are multiplied, in the steps whose data begin at these places."""
    own = pretrain.Trainer.step

    def step(self, loaded):
        factor = times if self.loader.place(loaded.step) in places else 1.0
        hook = next(self.model.parameters()).register_hook(lambda gradient: gradient * factor)
        try:
            return own(self, loaded)
        finally:
            hook.remove()

    patch(pretrain.Trainer, "step", step)


def tell_weights() -> None:
    own = pretrain.Trainer.run

    def run_and_tell(self, first_step):
        logged = own(self, first_step)
        content = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        file = self.checkpoints.parents[1] / f"weights-{runtime.rank()}"
        file.write_text(hashlib.sha256(content).hexdigest())
        return logged

    pretrain.Trainer.run = run_and_tell


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train

    poison({40} if runtime.rank() == 1 else set())
    tell_weights()
    sys.exit(train.main(sys.argv[1:]))

"""The two ways in which a run ends without being wrong: the user's input is at fault, or a signal stopped it.

Both reach the user as one line and an exit status (train.py); everything else is a bug and keeps its traceback.
"""

DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 3  # exit statuses of `python train.py`


class UserError(ValueError):
    """Configuration or data at fault. The message is one line: what, where, which value, what to do."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written; the same command goes on from there."""

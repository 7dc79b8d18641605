"""The ways in which a run ends without being wrong: the user's input or disk is at fault, or a signal stopped it.

Each reaches the user as one line and an exit status (train.py); everything else is a bug and keeps its traceback.
"""

import errno
import os

DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 3  # exit statuses of `python train.py`

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class UserError(ValueError):
    """Configuration, data or disk at fault. The message is one line: what, where, which value, what to do."""


class Stopped(BaseException):
    """A signal ended the run, or it waits for jobs that it submitted; the same command goes on from what is there.

    Raised wherever a signal comes, in the middle of a library too: like KeyboardInterrupt it is no Exception, which
    libraries catch and turn into errors of their own.
    """


def disk_fault(error: Exception) -> str | None:
    """What a disk refused, in the system's words: 'No space left on device'. None for an error of another kind.

    Libraries that write for us pass on the words of an OSError, not always its number.
    """
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return os.strerror(error.errno)
    return next((words for words in map(os.strerror, DISK_FAULTS) if words in str(error)), None)

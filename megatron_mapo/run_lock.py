"""One start of a run at a time: whoever writes into a run's folder holds its lock."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from megatron_mapo.errors import ConfigError

_POLL_SECONDS = 0.1


class RunLock:
    """The lock on ``.lock`` in a run's folder. The kernel frees it when its process ends, however it ends.

    It is flock and not a lock of the package filelock: that one leaves a file behind where the file system has no
    flock, which a killed run would never remove. Programs that this process starts do not inherit it.

    Args:
        folder: of the run; it need not exist.
        patience: seconds to wait for the holder to end. A launcher that is killed takes its trainers along a moment
            later, and its command may be repeated at once.
    """

    def __init__(self, folder: Path, patience: float = 5.0) -> None:
        self.folder, self.patience = folder, patience
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / ".lock").open("ab")
        except OSError as error:
            raise ConfigError(f"run.output_dir: cannot write to {self.folder}: {error.strerror}") from error
        deadline = time.monotonic() + self.patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.release()
                    raise ConfigError(
                        f"run.name: another start of this run is at work in {self.folder}; wait for its end, or choose "
                        "another run.name"
                    ) from None
            except OSError as error:
                print(f"warning: no lock on {self.folder} ({error.strerror}): start this run only once", flush=True)
                return
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Free the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None

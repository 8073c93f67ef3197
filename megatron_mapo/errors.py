"""What a user can cause. Every message says what happened and which key or file to change.

The command line prints these as one line and exits with ``exit_code``; anything else is a bug and
keeps its traceback.
"""


class MapoError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class MainFailed(MapoError):
    """On the other ranks: rank 0 has met a bug. It keeps the traceback, and takes part in nothing any more."""


class ConfigError(MapoError):
    """A configuration key is unknown, mistyped, out of range, or contradicts another key."""

    exit_code = 2


class DataError(MapoError):
    """A dataset, a data row, a prompt or a model folder cannot be used as it is."""

    exit_code = 3


class RewardError(MapoError):
    """A reward function raised, hung, or returned something that is not a finite number."""

    exit_code = 4


class RolloutError(MapoError):
    """A generation server is missing, died, refused a request, or answered with something else."""

    exit_code = 5


class ServersOut(RolloutError):
    """No server holds the current weights; those that answer serve again after a weight update."""


class ServersLost(RolloutError):
    """No server is left, and none came back within ``rollout.wait_timeout``."""


class WeightSyncError(RolloutError):
    """The servers' weights could not be updated, or differ from the trainer's after an update."""

    exit_code = 6


class CheckpointError(MapoError):
    """A checkpoint is missing, incomplete, or does not fit the model or the configuration."""

    exit_code = 7


class TrainingError(MapoError):
    """Training cannot go on: not-finite numbers, or server and trainer disagree on log-probs."""

    exit_code = 8


class HangError(MapoError):
    """A rank made no progress for ``trainer.hang_timeout`` seconds; all ranks were ended."""

    exit_code = 12


class HubError(MapoError):
    """The Hugging Face hub refused an upload, or could not be reached."""

    exit_code = 9


class ClusterError(MapoError):
    """A Ray cluster had no room for the run in time, or lost a node or a process of it."""

    exit_code = 13


class Preempted(MapoError):
    """A signal asked the run to end, and it saved a checkpoint first. The same command goes on from there.

    The code is ``EX_TEMPFAIL`` of sysexits.h: try again.
    """

    exit_code = 75

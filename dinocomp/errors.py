"""Errors meant for the person at the keyboard: what was found, what was expected, what to type next."""


class DinocompError(Exception):
    """Base of every error that is the user's to mend. Shown without a traceback unless one is asked for."""


class ConfigError(DinocompError):
    """A key, value or combination of the configuration is wrong."""


class DataError(DinocompError):
    """Images, shards or the paths to them are wrong."""


class WeightsError(DinocompError):
    """A file of weights is missing, unreadable, unsafe, or does not fit the network."""


class TrainingError(DinocompError):
    """Training cannot go on: its numbers, the disk or the object store are at fault, not the command."""

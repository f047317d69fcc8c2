"""What can be said about a run: the schema, merging, checking, and what follows from it."""

from dinocomp.config.dump import to_yaml
from dinocomp.config.load import LoadedConfig, all_keys, load_config
from dinocomp.config.overrides import split_arguments
from dinocomp.config.schema import Config

__all__ = ["Config", "LoadedConfig", "all_keys", "load_config", "split_arguments", "to_yaml"]

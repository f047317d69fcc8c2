"""From a configuration to objects: the only room that knows all the others. Read it from `build_run` on.

Below it no configuration is passed: every constructor takes plain arguments.
"""

from dinocomp.build.data import build_loader, crop_settings, mask_settings
from dinocomp.build.facts import facts_of_the_run_here, known_facts
from dinocomp.build.loggers import build_loggers
from dinocomp.build.machine import join_processes, on_gpu
from dinocomp.build.memory import plan_memory
from dinocomp.build.model import backbone_arguments, build_model, build_networks, count_parameters
from dinocomp.build.optim import build_optimizer, build_schedules
from dinocomp.build.run import Run, build_run, build_training
from dinocomp.build.start import Start, check_start

__all__ = [
    "Run",
    "Start",
    "backbone_arguments",
    "build_loader",
    "build_loggers",
    "build_model",
    "build_networks",
    "build_optimizer",
    "build_run",
    "build_schedules",
    "build_training",
    "check_start",
    "count_parameters",
    "crop_settings",
    "facts_of_the_run_here",
    "join_processes",
    "known_facts",
    "mask_settings",
    "on_gpu",
    "plan_memory",
]

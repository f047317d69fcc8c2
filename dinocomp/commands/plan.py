"""`dinocomp plan`: what a run would be."""

import argparse

from dinocomp.commands.types import gigabytes, positive
from dinocomp.errors import DinocompError

TEXT = "say what a run would be, without training"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("yaml", metavar="YAML", help="a path, or the name of a shipped run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, and recipes=[a,b]")
    parser.add_argument("--world-size", type=positive, default=1, metavar="N", help="training processes (default 1)")
    parser.add_argument(
        "--gpu-memory",
        type=gigabytes,
        metavar="GB",
        help="memory of each GPU (GB): say whether the run fits, or what does",
    )
    parser.add_argument(
        "--full", action="store_true", help="list every key, not only those that differ from the defaults"
    )


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.config import load_config, split_arguments
    from dinocomp.config.plan import describe

    loaded = load_config(*split_arguments([arguments.yaml, *arguments.overrides]))

    from dinocomp.build import count_parameters, plan_memory  # slow imports come after the settings are found right
    from dinocomp.config.distil import frozen_teacher
    from dinocomp.data import count_images

    config = loaded.config
    dataset_size, note = None, ""
    try:
        dataset_size = count_images(config.train.dataset_path, config.data.cache_dir)
    except DinocompError as error:  # a plan is useful before the images are there
        note = str(error)
    limit = None if arguments.gpu_memory is None else arguments.gpu_memory * 1e9
    print(
        describe(
            loaded,
            arguments.world_size,
            dataset_size,
            count_parameters(config),
            full=arguments.full,
            dataset_note=note,
            memory=plan_memory(config, arguments.world_size, limit),
            frozen=frozen_teacher(config),
        ),
        end="",
    )

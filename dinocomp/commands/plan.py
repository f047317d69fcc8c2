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
        "--images", type=positive, metavar="N", help="plan for so many images (default: those of train.dataset_path)"
    )
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
    from dinocomp.config.auto import Facts
    from dinocomp.config.plan import describe

    yaml, words = split_arguments([arguments.yaml, *arguments.overrides])
    loaded = load_config(yaml, words)

    # Slow imports come after the settings are found right.
    from dinocomp.build import count_parameters, facts_of_the_run_here, plan_memory
    from dinocomp.config.distil import frozen_teacher
    from dinocomp.data import Survey, survey_images

    found, note = Survey(None, None), ""
    try:
        found = survey_images(loaded.config.train.dataset_path, fetch=False, cache_dir=loaded.config.data.cache_dir)
    except DinocompError as error:  # a plan is useful before the images are there
        note = str(error)
    if arguments.images is not None:
        found = found._replace(images=arguments.images)
    begun = facts_of_the_run_here(loaded.config, arguments.world_size)
    loaded = load_config(yaml, words, begun or Facts(found.images, found.side, arguments.world_size))
    config = loaded.config
    limit = None if arguments.gpu_memory is None else arguments.gpu_memory * 1e9
    print(
        describe(
            loaded,
            arguments.world_size,
            found.images,
            count_parameters(config),
            full=arguments.full,
            dataset_note=note,
            memory=plan_memory(config, arguments.world_size, limit),
            frozen=frozen_teacher(config),
        ),
        end="",
    )

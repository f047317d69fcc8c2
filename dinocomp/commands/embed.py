"""`dinocomp embed`: class tokens of images, to a file."""

import argparse
import logging

from dinocomp.commands.types import positive, whole

TEXT = "write the class tokens of images to a .npy or .parquet file"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a run's folder, a file of weights, timm:NAME, hf:FOLDER, s3://bucket/run"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="a folder, shards, digits, or image files")
    parser.add_argument("output", metavar="OUT", help="NAME.npy (and NAME.names.json), or NAME.parquet")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images of a forward pass (64)")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    parser.add_argument("--workers", type=whole, default=0, metavar="N", help="processes that decode (0: this one)")


def run(arguments: argparse.Namespace) -> None:
    import dinocomp
    from dinocomp.commands.show import _device

    logging.basicConfig(format="%(message)s")  # images that are left out
    device = _device(arguments.device)
    images = arguments.images[0] if len(arguments.images) == 1 else arguments.images
    names, vectors = dinocomp.load(arguments.weights).embed(
        images, arguments.output, batch_size=arguments.batch_size, device=device, workers=arguments.workers
    )
    print(f"{arguments.output}: {len(names):,} images, {vectors.shape[1]} numbers each")

"""`dinocomp export`: weights for other libraries."""

import argparse

from dinocomp.commands.types import positive

TEXT = "write weights for another library, with preprocessing and a model card"
_TARGETS = {
    "hub": "published names as .pth, with a hubconf.py for torch.hub",
    "hf": "transformers",
    "timm": "timm",
    "onnx": "ONNX",
    "safetensors": "published names, with metadata",
    "torch": "a program of torch.export",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN|WEIGHTS", help="a run's folder, a teacher, a checkpoint, or a DINOv2 file or folder"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(_TARGETS),
        help="; ".join(f"{name}: {text}" for name, text in _TARGETS.items()),
    )
    parser.add_argument("folder", metavar="DIR", help="a new folder for the files")
    parser.add_argument(
        "--size", type=positive, metavar="PX", help="side of the images, for onnx and torch (that of training)"
    )


def run(arguments: argparse.Namespace) -> None:
    from dinocomp.interop.export import export

    differs = export(arguments.source, arguments.to, arguments.folder, arguments.size)
    print(f"written: {arguments.folder} (README.md says how to load it; its licence is left to you)")
    if differs:
        print(differs)

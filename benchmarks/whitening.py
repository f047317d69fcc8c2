"""How much of a run's k-NN accuracy is learnt: its teacher beside raw pixels and its random start, all also whitened.

    python -m benchmarks.whitening output/e --seeds 0 1 2

Class tokens of an untrained network all point the same way. KoLeo spreads them, and that alone raises k-NN accuracy,
though nothing was learnt of images; whitening does the same without training. What a run taught is what its teacher has
above its whitened start.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinocomp.build.evaluation import labelled_pair
from dinocomp.build.model import build_networks
from dinocomp.config import load_config
from dinocomp.evaluate.features import Features, extract_features
from dinocomp.evaluate.knn import knn_accuracy
from dinocomp.evaluate.pixels import Thumbnails
from dinocomp.interop import load


def whiten(train: Tensor, val: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Both turned, shifted and scaled so that the columns of `train` have mean 0, variance 1 and no correlation.

    Args:
        train, val: [n, D] and [m, D].
        least: directions in which `train` spreads less than this share of the most are left out.

    Returns:
        [n, D'] and [m, D'], D' at most D.
    """
    mean = train.mean(0)
    _, spread, directions = torch.linalg.svd((train - mean).double(), full_matrices=False)  # [D], [D, D]
    kept = spread > least * spread[0]
    scaled = directions[kept].T / spread[kept] * len(train) ** 0.5  # [D, D']
    return ((train - mean).double() @ scaled).float(), ((val - mean).double() @ scaled).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its output folder")
    parser.add_argument("--k", type=int, help="neighbours; default: the first of the run's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of random starts")
    given = parser.parse_args()
    teacher = load(given.run)
    config = load_config(str(given.run / "config.yaml")).config
    pair = labelled_pair(config)
    if pair is None:
        parser.error(f"{given.run}: k-NN needs labelled images to train on and held-out ones")
    k, temperature = given.k or config.evaluation.knn_k[0], config.evaluation.knn_temperature
    resize, crop = teacher.view
    extract = partial(
        extract_features,
        resize=resize,
        crop=crop,
        normalize=teacher.transform.normalize,
        batch_size=config.evaluation.batch_size,
    )

    def show(name: str, net: torch.nn.Module, least: float = 1e-4) -> None:
        train, val = (extract(net.eval(), images) for images in (pair.train, pair.val))
        both = [(train.vectors, val.vectors), whiten(train.vectors, val.vectors, least)]
        raw, white = (
            knn_accuracy(Features(a, train.labels), Features(b, val.labels), ks=[k], temperature=temperature)[k]
            for a, b in both
        )
        print(f"{name}: {100 * raw:.1f} %, whitened {100 * white:.1f} %", flush=True)

    show("raw pixels", Thumbnails(), least=0.1)  # most differences of neighbouring pixels are noise
    for seed in given.seeds:
        torch.manual_seed(seed)
        show(f"random start {seed}", build_networks(config).backbone)
    show("teacher", teacher.net)


if __name__ == "__main__":
    main()

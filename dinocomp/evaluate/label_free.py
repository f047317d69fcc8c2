"""What features are worth where nobody has labelled anything.

None of these is accuracy. Their use is to compare moments of one run, or runs on the same images: effective ranks fall
when features collapse, and neighbours that change with the crop say that features see the crop, not the image.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Subset

from dinocomp.data import CropSettings, Images
from dinocomp.evaluate.choose import draw
from dinocomp.evaluate.features import class_tokens, equal_passes
from dinocomp.evaluate.views import AugmentedViews


def label_free_measures(views: Tensor) -> dict[str, float]:
    """All measures of one backbone.

    Args:
        views: [n, 1 + V, D], features of n images: of the plain image, then of V augmented views of it.

    Returns:
        `rankme` (of at most min(n, D) directions), `lidar` (of at most min(n - 1, D)) and `neighbour_consistency`
        (of at most 1).
    """
    return {
        "rankme": rankme(views[:, 0]),
        "lidar": lidar(views[:, 1:]),
        "neighbour_consistency": neighbour_consistency(views),
    }


def label_free_words(values: Mapping[str, float], directions: int) -> str:
    """Label-free measures in one line, effective ranks beside the most that they can be."""
    most = dict.fromkeys(("rankme", "lidar"), f" of {directions}")
    return ", ".join(f"{name} {value:.3g}{most.get(name, '')}" for name, value in values.items())


def rankme(features: Tensor) -> float:
    """Effective rank of features [n, D]: in how many directions they spread, from 1 to min(n, D).

    exp of the entropy of the singular values' shares (Garrido et al. 2023, RankMe, equation 2).
    """
    return _effective_rank(torch.linalg.svdvals(features.double()))


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of what tells images apart, once what tells views of an image apart is divided away.

    exp of the entropy of the shares of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, the matrix of linear discriminant
    analysis with each image for a class (Thilak et al. 2024, LiDAR, equations 1 to 3).

    Args:
        views: [n, V, D], of V augmented views of n images.
        delta: added to the diagonal of S_w, as in the paper.
    """
    views = views.double()
    means = views.mean(dim=1)  # [n, D]
    between = means - means.mean(dim=0)  # [n, D]
    within = (views - means[:, None]).flatten(0, 1)  # [n * V, D]
    s_b = between.T @ between / len(between)  # [D, D]
    s_w = within.T @ within / len(within) + delta * torch.eye(views.shape[-1], dtype=torch.float64)  # [D, D]
    values, vectors = torch.linalg.eigh(s_w)
    whiten = vectors * values.rsqrt()  # [D, D]; a rotation of S_w^-1/2, which leaves the eigenvalues as they are
    return _effective_rank(torch.linalg.eigvalsh(whiten.T @ s_b @ whiten).clamp_min(0))


def neighbour_consistency(views: Tensor, k: int = 10) -> float:
    """Share of an image's k nearest images (by cosine, among the plain ones) that stay when it is augmented.

    1 where augmentation changes nothing, about k / n where neighbours are chance.

    Args:
        views: [n, 1 + V, D], the plain image's features first.
    """
    n, k = len(views), min(k, len(views) - 1)
    unit = F.normalize(views.float(), dim=-1)  # [n, 1 + V, D]
    plain, itself = unit[:, 0], torch.arange(n)

    def neighbours(of: Tensor) -> Tensor:  # [n, D] -> [n, n], whether they are among the k nearest
        similarity = of @ plain.T
        similarity[itself, itself] = -math.inf
        return torch.zeros(n, n, dtype=torch.bool).scatter_(1, similarity.topk(k).indices, True)

    before = neighbours(plain)
    kept = [(before & neighbours(unit[:, view])).sum().item() for view in range(1, unit.shape[1])]
    return sum(kept) / (len(kept) * n * k)


def _effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values' shares; 0 where all are 0."""
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total > 0 else 0.0


def extract_views(
    backbone: torch.nn.Module,
    images: Images,
    *,
    count: int,
    views: int,
    settings: CropSettings,
    resize: int,
    normalize: torch.nn.Module,
    batch_size: int,
    num_workers: int = 0,
    timeout_seconds: float = 0,
    autocast: torch.dtype | None = None,
    skip_bad: bool = False,
) -> Tensor:
    """Class tokens [n, 1 + V, D] (fp32, CPU) of a fixed draw of images, on every rank; all ranks must call it together.

    The plain view, then V augmented ones, drawn by the image's number alone. No global random generator is read or
    moved.

    Args:
        count: images to draw; those that cannot be decoded are left out.
        views: V.
        settings: of the augmentation; views are first global crops of it.
        resize: of the plain view, see `evaluation_view`, whose crop is a global crop's size.
        batch_size: views a forward pass.
        normalize, num_workers, timeout_seconds, autocast, skip_bad: see `extract_features`.
    """
    index = draw(len(images), count)
    rank, world_size = dist.get_global_rank(), dist.get_world_size()
    mine = Subset(AugmentedViews(images, settings, views, resize, skip_bad), index[rank::world_size])
    size = settings.global_crops_size
    nothing = torch.zeros(1, 1 + views, 3, size, size, dtype=torch.uint8), torch.zeros(0, dtype=torch.bool)
    device = next(backbone.parameters()).device
    batch = max(1, batch_size // (1 + views))  # images
    loader = equal_passes(mine, len(index), nothing, device, batch, num_workers, timeout_seconds)
    found = []
    for pixels, good in loader:  # uint8 [b, 1 + V, 3, G, G], [b]
        cls = class_tokens(backbone, normalize, pixels.flatten(0, 1), autocast)  # [b * (1 + V), D]
        found.append(cls.unflatten(0, pixels.shape[:2])[: len(good)][good])
    return torch.cat(dist.all_gather_object(torch.cat(found)))

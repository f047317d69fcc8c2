"""When the gauges of the teacher mean collapse. Numbers alone: nothing slow is imported for it."""

import math
from collections.abc import Mapping

# Where it begins: of the spread of features, of the prototypes in use, of the entropy's share of log K.
LEAST_SPREAD = 0.05
LEAST_PROTOTYPES = 1.5
MOST_ENTROPY = 0.999


def signs_of_collapse(gauges: Mapping[str, float], prototypes: Mapping[str, int]) -> list[str]:
    """What the gauges say is wrong, in words; nothing where all is well.

    Args:
        gauges: `feature_std`, and `entropy_H` and `prototypes_H` of each loss H ("dino", "ibot") that is on.
        prototypes: K of each loss's head.
    """
    signs = []
    if gauges["feature_std"] < LEAST_SPREAD:
        signs.append(f"the teacher's features are nearly the same for all images (spread {gauges['feature_std']:.2g})")
    for loss, count in prototypes.items():
        used, entropy = gauges.get(f"prototypes_{loss}", math.nan), gauges.get(f"entropy_{loss}", math.nan)
        if used < LEAST_PROTOTYPES:
            signs.append(f"the {loss} targets use {used:.1f} of {count} prototypes")
        if entropy > MOST_ENTROPY * math.log(count):
            signs.append(f"the {loss} targets are the same for all {count} prototypes, and teach nothing")
    return signs

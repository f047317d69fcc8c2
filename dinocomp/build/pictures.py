"""Pictures of the teacher's features, from a configuration."""

from dinocomp.build.start import Start
from dinocomp.callbacks.pictures import Pictures
from dinocomp.config import Config, derive
from dinocomp.data import Images
from dinocomp.evaluate.features import AUTOCAST


def build_pictures(config: Config, start: Start, images: Images) -> Pictures | None:
    """What draws at each evaluation; None where `evaluation.pictures` is off.

    Args:
        images: to draw: the labelled pair's held-out ones where there is a pair, else those that are trained on.
    """
    if not config.evaluation.pictures:
        return None
    resize, crop = derive.evaluation_crop(config)
    return Pictures(
        images,
        folder=start.output,
        resize=resize,
        crop=crop,
        temperature=config.teacher.teacher_temp,
        autocast=AUTOCAST[start.precision],
    )

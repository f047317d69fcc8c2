"""What an evaluation measures, from a configuration."""

from functools import partial

from dinocomp.build.data import crop_settings, opening
from dinocomp.build.pictures import build_pictures
from dinocomp.build.start import Start
from dinocomp.callbacks.evaluation import Measures
from dinocomp.config import Config, derive
from dinocomp.data import Images, evaluation_pair
from dinocomp.evaluate import Chosen, draw, match_classes
from dinocomp.evaluate.features import AUTOCAST
from dinocomp.evaluate.online import LabelledPair, measure_knn, measure_label_free
from dinocomp.evaluate.pixels import measure_pixels
from dinocomp.method import DINOv2


def labelled_pair(config: Config) -> LabelledPair | None:
    """What k-NN is measured on, labels numbered alike; None where nothing is labelled.

    Raises:
        DataError: as `evaluation_pair` and `match_classes`.
    """
    evaluation = config.evaluation
    pair = evaluation_pair(
        config.train.dataset_path, evaluation.train_dataset_path, evaluation.val_dataset_path, **opening(config)
    )
    if pair is None:
        return None
    train, val = pair
    return LabelledPair(
        Chosen(train, draw(len(train), evaluation.train_images)),
        Chosen(val, draw(len(val), evaluation.val_images), match_classes(train, val), train.classes or None),
    )


def build_measures(config: Config, start: Start, model: DINOv2, images: Images, pair: LabelledPair | None) -> Measures:
    """k-NN of features and raw pixels on a labelled pair, label-free measures, and pictures, as far as wanted.

    Args:
        images: what the run trains on; label-free measures look at the pair's held-out ones instead, where there are.
    """
    evaluation = config.evaluation
    resize, crop = derive.evaluation_crop(config)
    loading = {
        "normalize": model.normalize,
        "batch_size": evaluation.batch_size,
        "num_workers": config.train.num_workers,
        "timeout_seconds": config.data.timeout_seconds,
        "autocast": AUTOCAST[start.precision],
        "skip_bad": config.data.on_bad_image == "skip",
    }
    knn = pixels = label_free = None
    directions = 0
    if pair:
        knn, pixels = (
            partial(
                measure,
                pair=pair,
                resize=resize,
                crop=crop,
                ks=evaluation.knn_k,
                temperature=evaluation.knn_temperature,
                **loading,
            )
            for measure in (measure_knn, measure_pixels)
        )
    if evaluation.label_free == "always" or (evaluation.label_free == "auto" and not pair):
        looked_at = pair.val if pair else images
        directions = min(derive.architecture(config.student).embed_dim, len(looked_at), evaluation.label_free_images)
        label_free = partial(
            measure_label_free,
            images=looked_at,
            count=evaluation.label_free_images,
            views=evaluation.label_free_views,
            settings=crop_settings(config),
            resize=resize,
            **loading,
        )
    pictures = build_pictures(config, start, pair.val if pair else images)
    return Measures(pair, knn, pixels, label_free, directions, pictures)

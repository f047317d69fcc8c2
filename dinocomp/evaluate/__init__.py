"""What the features are worth."""

from dinocomp.evaluate.choose import Chosen, draw, match_classes
from dinocomp.evaluate.features import Features, extract_features, gather_features
from dinocomp.evaluate.knn import knn_accuracy, nearest
from dinocomp.evaluate.label_free import extract_views, label_free_measures

__all__ = [
    "Chosen",
    "Features",
    "draw",
    "extract_features",
    "extract_views",
    "gather_features",
    "knn_accuracy",
    "label_free_measures",
    "match_classes",
    "nearest",
]

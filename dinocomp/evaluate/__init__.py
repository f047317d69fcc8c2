"""What the features are worth."""

from dinocomp.evaluate.features import Features, extract_features, gather_features
from dinocomp.evaluate.knn import knn_accuracy

__all__ = ["Features", "extract_features", "gather_features", "knn_accuracy"]

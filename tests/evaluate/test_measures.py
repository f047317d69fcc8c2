"""Protocols on given features: against scikit-learn, and by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.neighbors import KNeighborsClassifier

from dinocomp.data import ClassName
from dinocomp.errors import DataError
from dinocomp.evaluate import Features
from dinocomp.evaluate.choose import check_labels, few_of_each, hold_out, match_classes
from dinocomp.evaluate.confusion import confusion_matrix, intersection_over_union, to_csv, worst_classes
from dinocomp.evaluate.logistic import c_grid, logistic_regression
from dinocomp.evaluate.neighbours import knn, knn_top, spread
from dinocomp.evaluate.retrieval import average_precision, retrieval
from tests.evaluate.test_knn import clusters


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x, dim=1).numpy()


def left_out(features: Features) -> Features:
    """The same behind two images that could not be decoded."""
    return Features(
        torch.cat([torch.zeros(2, 8), features.vectors]), torch.cat([torch.tensor([-1, -1]), features.labels])
    )


# k-NN


def test_knn_predicts_what_scikit_learn_does() -> None:
    train, val = clusters(300, 1.0, 1), clusters(100, 1.0, 2)
    result, predicted = knn(left_out(train), left_out(val), ks=[7, 20], temperature=0.07, num_classes=5)
    for k in (7, 20):
        # On the unit sphere 2 * cosine = 2 - distance^2, so votes are exp(-distance^2 / (2 * temperature)).
        reference = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / (2 * 0.07)), algorithm="brute")
        reference.fit(unit(train.vectors), train.labels.numpy())
        likely = reference.predict_proba(unit(val.vectors))  # [100, 5]
        assert result["top1"][str(k)] == pytest.approx((likely.argmax(1) == val.labels.numpy()).mean(), abs=1e-9)
        if k == 7:
            assert np.array_equal(predicted[2:].numpy(), likely.argmax(1))
    assert result["top5"] == {"7": 1.0, "20": 1.0}  # there are five classes


def test_second_best_by_hand() -> None:
    angles = torch.tensor([0.1, 0.2, 0.3])
    train = Features(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([2, 0, 1]))
    ranked = knn_top(train, torch.tensor([[1.0, 0.0]]), ks=[1, 3], temperature=0.07, num_classes=4)
    assert ranked[1].tolist() == [[2, 0, 1, 3]] and ranked[3].tolist() == [[2, 0, 1, 3]]


def test_few_shot() -> None:
    """The mean over tries is that of k-NN on the images that were drawn."""
    train, val = clusters(200, 0.8, 1), clusters(80, 0.8, 2)
    done: list[int] = []
    few_shot = {"shots": [1, 4], "tries": 3, "advance": done.append}
    result, _ = knn(train, val, ks=[5, 100], temperature=0.07, num_classes=5, **few_shot)
    assert done == [1] * 7, "for the progress bar: all images, and each draw"
    by_hand: list[float] = []
    for seed in range(3):
        index = few_of_each(train.labels, 4, seed)
        assert torch.bincount(train.labels[index]).tolist() == [4] * 5
        few = Features(train.vectors[index], train.labels[index])
        by_hand.append(knn(few, val, ks=[5], temperature=0.07, num_classes=5)[0]["top1"]["5"])
    assert len(set(by_hand)) > 1, "the tries are other draws"
    four = result["few_shot"]["4"]
    assert set(four) == {"5"}, "100 neighbours of 20 images"
    assert four["5"] == pytest.approx({"mean": np.mean(by_hand), "std": np.std(by_hand, ddof=1), "tries": 3})
    assert spread([0.25]) == {"mean": 0.25, "std": 0.0, "tries": 1}


# Logistic regression


def test_logistic_regression_is_scikit_learns() -> None:
    train, val = clusters(200, 1.2, 1), clusters(100, 1.2, 2)
    values = [1e-4, 0.1, 10.0]
    result, predicted = logistic_regression(left_out(train), left_out(val), c_values=values)
    held = hold_out(train.labels, 0.1).numpy()
    x, y = train.vectors.double().numpy(), train.labels.numpy()
    scores = [LogisticRegression(C=c, max_iter=1000).fit(x[~held], y[~held]).score(x[held], y[held]) for c in values]
    assert [entry["held_out_top1"] for entry in result["grid"]] == pytest.approx(scores)
    best = values[int(np.argmax(scores))]  # the first, and so the smallest, of those that are equal
    assert result["C"] == best and result["converged"]
    model = LogisticRegression(C=best, max_iter=1000).fit(x, y)
    assert np.array_equal(predicted[2:].numpy(), model.predict(val.vectors.double().numpy()))
    assert result["top1"] == model.score(val.vectors.double().numpy(), val.labels.numpy())


def test_two_classes_with_a_gap_between_their_labels() -> None:
    train = Features(torch.tensor([[0.0], [0.1], [1.0], [1.1]] * 5), torch.tensor([1, 1, 4, 4] * 5))
    result, predicted = logistic_regression(train, train, c_values=[10.0])
    assert predicted.tolist() == train.labels.tolist() and result["top1"] == 1.0


def test_of_equally_good_regularisations_the_strongest_is_taken() -> None:
    train = clusters(100, 0.01, 1)
    result, _ = logistic_regression(train, train, c_values=[1.0, 10.0, 100.0])
    assert [entry["held_out_top1"] for entry in result["grid"]] == [1.0] * 3 and result["C"] == 1.0


def test_fits_that_do_not_converge_are_told() -> None:
    train = clusters(60, 1.0, 1)
    result, _ = logistic_regression(train, train, c_values=[1e5], max_iterations=1)
    assert not result["converged"] and not result["grid"][0]["converged"]


def test_c_grid_of_the_reference() -> None:
    assert c_grid(45) == pytest.approx(np.logspace(-6, 5, 45)) and c_grid(12)[::11] == pytest.approx([1e-6, 1e5])


# Retrieval


def test_average_precision_is_scikit_learns_with_ties() -> None:
    similarity = torch.randint(6, (20, 50)).float()  # most are equal to others
    relevant = torch.rand(20, 50) < 0.2
    relevant[:, 0] = True
    expected = [average_precision_score(r.numpy(), s.numpy()) for r, s in zip(relevant, similarity, strict=True)]
    assert average_precision(similarity, relevant).tolist() == pytest.approx(expected)


def test_retrieval_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinocomp.evaluate.retrieval._AT_ONCE", 1000)  # a few queries at a time
    train, val = clusters(300, 1.0, 1), clusters(40, 1.0, 2)
    done: list[int] = []
    result = retrieval(left_out(train), left_out(val), advance=done.append)
    assert len(done) > 1 and sum(done) == 40, "for the progress bar"
    cosine = unit(val.vectors) @ unit(train.vectors).T
    relevant = (val.labels[:, None] == train.labels).numpy()
    expected = np.mean([average_precision_score(r, c) for r, c in zip(relevant, cosine, strict=True)])
    order = np.argsort(-cosine, axis=1)
    for k in (1, 5):
        first = np.take_along_axis(relevant, order[:, :k], 1).any(1).mean()
        assert result["recall"][str(k)] == pytest.approx(first)
    assert result["map"] == pytest.approx(expected, abs=1e-6)
    assert result["queries"] == 40 and result["left_out"] == 0


def test_leave_one_out_by_hand() -> None:
    """Nobody finds itself, and who is alone in its class does not search."""
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0])
    images = Features(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 2]))
    # Image 0 finds 1, 2, 3: its class at place 2. Image 2 finds 1, 0, 3: at place 2. The others have none to find.
    result = retrieval(images)
    assert result["map"] == pytest.approx(0.5) and result["recall"] == {"1": 0.0, "5": 1.0}
    assert result["queries"] == 2 and result["left_out"] == 2 and result["leave_one_out"]


# Confusion


def test_confusion_and_worst_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, -1])
    predicted = torch.tensor([0, 1, 1, 1, 1, 1, 0, 2, 0])
    matrix = confusion_matrix(labels, predicted, 4)
    assert np.array_equal(matrix.numpy(), sklearn_confusion(labels[:-1], predicted[:-1], labels=range(4)))
    worst = worst_classes(matrix, ["a", "b", "c", "d"])
    assert worst == [
        {"class": "a", "images": 3, "recall": 1 / 3, "taken_for": [{"class": "b", "images": 2, "share": 2 / 3}]},
        {"class": "b", "images": 4, "recall": 3 / 4, "taken_for": [{"class": "a", "images": 1, "share": 1 / 4}]},
    ]
    assert to_csv(matrix, ["a", "b", 'c,"', "d"]).splitlines() == [
        *("class,taken_for,images", "a,a,1", "a,b,2", "b,a,1", "b,b,3", '"c,""","c,""",1')
    ]


def test_intersection_over_union_by_hand() -> None:
    iou = intersection_over_union(torch.tensor([[4, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert iou[:2].tolist() == pytest.approx([4 / 7, 3 / 6]) and iou[2].isnan()


# Which images


def test_what_is_held_out() -> None:
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] + [-1] * 5)
    held = hold_out(labels, 0.1)
    assert [int(held[labels == label].sum()) for label in (0, 1, 2, -1)] == [4, 1, 0, 0]
    assert torch.equal(held, hold_out(labels, 0.1)) and not torch.equal(held, hold_out(labels, 0.1, seed=1))
    assert not hold_out(labels, 0.0).any()


class Named:
    def __init__(self, path: str, *ids: str) -> None:
        self.path, self.classes = path, [ClassName(i, i) for i in ids]


def test_classes_are_matched_by_name() -> None:
    assert match_classes(Named("t", "ant", "bee", "cat"), Named("v", "bee", "cat")) == [1, 2]
    assert match_classes(Named("t", "ant", "bee"), Named("v", "ant", "bee")) is None
    with pytest.raises(DataError, match="1 of the 2 classes of v are not in t: dog"):
        match_classes(Named("t", "ant", "bee"), Named("v", "bee", "dog"))


def test_labels_that_nothing_can_be_measured_with() -> None:
    two, three = torch.tensor([0, 1, -1]), torch.tensor([0, 2, 1])
    check_labels(three, two, [], "t")
    check_labels(two, three, [], "t", drawn=True)
    with pytest.raises(DataError, match="no image of t is of these classes, which are asked for: cat"):
        check_labels(two, three, ["ant", "bee", "cat"], "t")
    with pytest.raises(DataError, match=r"t has 1 class\(es\)"):
        check_labels(torch.tensor([0, 0, -1]), two, [], "t")

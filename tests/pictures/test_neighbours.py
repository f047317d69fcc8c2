"""Neighbours by hand."""

import torch

from dinocomp.pictures import nearest_images, neighbours_picture
from dinocomp.pictures.canvas import RIGHT, WRONG
from dinocomp.pictures.neighbours import spread_queries

# At 0, 10, 25 and 90 degrees, of several lengths, which must not matter.
DEGREES = torch.tensor([0.0, 10.0, 25.0, 90.0]).deg2rad()
VECTORS = torch.stack([DEGREES.cos(), DEGREES.sin()], dim=1) * torch.tensor([[1.0], [9.0], [0.1], [2.0]])


def test_the_nearest_by_angle_and_not_oneself() -> None:
    found = nearest_images(VECTORS, [0, 2], k=2)
    assert found.index.tolist() == [[1, 2], [1, 0]]
    torch.testing.assert_close(found.similarity, torch.tensor([[10.0, 25.0], [15.0, 25.0]]).deg2rad().cos())
    assert nearest_images(VECTORS, [3], k=9).index.tolist() == [[2, 1, 0]]


def test_each_class_asks_before_one_asks_twice() -> None:
    assert spread_queries(torch.tensor([5, 5, 5, 1, 2, 1]), 4) == [0, 3, 4, 1]
    assert spread_queries(torch.tensor([5, 5, 5, 1, 2, 1]), 3) == [0, 3, 4]
    assert spread_queries(torch.full((5,), -1), 3) == [0, 1, 2]
    assert spread_queries(torch.tensor([0, 0]), 8) == [0, 1]


def colours(picture) -> set[str]:
    return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in picture.getcolors(1 << 24)}


def test_frames_where_labels_are_known() -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    picture = neighbours_picture(images, VECTORS, torch.tensor([0, 0, 1, 1]), ["cat", "dog"], queries=2)
    assert picture.width == 780 and {RIGHT, WRONG} <= colours(picture)
    for labels in (torch.full((4,), -1), torch.tensor([0, -1, -1, -1])):
        assert not {RIGHT, WRONG} & colours(neighbours_picture(images, VECTORS, labels))
    same = neighbours_picture(images, VECTORS, torch.zeros(4, dtype=torch.int64))  # without names, too
    assert RIGHT in colours(same) and WRONG not in colours(same)


def test_of_features_that_are_zero() -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert neighbours_picture(images, torch.zeros(2, 8), torch.tensor([-1, -1])).width == 780

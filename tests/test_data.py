import pytest
import torch

from adaptvit.data import HELD_OUT, digits


def test_every_digit_is_in_one_split_and_every_class_in_both() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1797 - HELD_OUT, HELD_OUT)
    for split in (data.train, data.test):
        assert set(split.labels.tolist()) == set(range(10))


def test_an_item_is_a_normalised_image_and_its_label() -> None:
    data = digits(size=24, margin=2)
    image, label = data.test[0]
    assert (image.shape, image.dtype, type(label)) == ((1, 24, 24), torch.float32, int)
    assert data.train.images.mean().abs() < 1e-5
    assert data.train.images.std().sub(1).abs() < 1e-5
    pixels = data.pixels(image)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_the_margin_is_black() -> None:
    pixels = digits(size=32, margin=4).pixels(digits(size=32, margin=4).test.images)
    edge = torch.ones(32, 32, dtype=torch.bool)
    edge[4:-4, 4:-4] = False
    torch.testing.assert_close(pixels[..., edge], torch.zeros_like(pixels[..., edge]), atol=1e-6, rtol=0)


def test_training_images_move_and_test_images_do_not() -> None:
    data = digits()
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.test[0][0], data.test[0][0])


def test_augmentation_follows_the_global_seed() -> None:
    data, visits = digits(), []
    for _ in range(2):
        torch.manual_seed(3)
        visits.append(data.train[5][0])
    assert torch.equal(*visits)


def test_a_margin_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin must lie in \[0, 8\).*got 8"):
        digits(size=16, margin=8)

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from conftest import write_mvtec
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from anomalib_cpr import training_images
from anomalib_cpr.training_images import TrainingImages, load_training_images, split_transform, turn, with_turned_copies

NORMALIZE = v2.Normalize([0.5] * 3, [0.25] * 3)


class Items(Dataset):
    def __init__(self, images, labels=None, augment=None):
        self.images, self.labels, self.augment = images, labels or [0] * len(images), augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index] if self.augment is None else self.augment(self.images[index])
        return SimpleNamespace(image=image, gt_label=torch.tensor(self.labels[index]))


def load(dataset, transform=None, seed=0, workers=0):
    return load_training_images(DataLoader(dataset, batch_size=2, num_workers=workers), transform, seed)


def test_images_are_resized_and_not_normalised():
    images = [torch.rand(3, 20, 30) for _ in range(3)]
    loaded = load(Items(images), v2.Compose([v2.Resize((8, 16), antialias=False), NORMALIZE]))
    assert loaded.size == (8, 16)
    for image, own in zip(images, loaded.images, strict=True):
        assert torch.allclose(own, v2.functional.resize(image[None], [8, 16], antialias=False)[0])
    assert torch.allclose(loaded.normalize(loaded.images), (loaded.images - 0.5) / 0.25)
    batches = list(loaded.batches(2, torch.device("cpu")))
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.allclose(torch.cat(batches), (loaded.images - 0.5) / 0.25)


@pytest.mark.parametrize(
    "transform", [None, NORMALIZE, v2.Resize((8, 8)), v2.Compose([v2.Resize((8, 8)), NORMALIZE, v2.Identity()])]
)
def test_split_transform_changes_nothing_in_total(transform):
    image = torch.rand(1, 3, 16, 16)
    before, normalize = split_transform(transform)
    whole = image if transform is None else transform(image)
    parts = before(image)
    assert torch.equal(parts if normalize is None else normalize(parts), whole)


def test_grey_images():
    assert load(Items([torch.rand(1, 8, 8) for _ in range(2)])).images.shape == (2, 3, 8, 8)


def test_augmentations_of_the_user_are_drawn_once_and_repeat_for_any_number_of_workers():
    dataset = Items([torch.rand(3, 8, 8) for _ in range(4)], augment=v2.RandomHorizontalFlip(0.5))
    first = load(dataset, seed=1).images
    assert torch.equal(first, load(dataset, seed=1, workers=2).images)
    assert any(not torch.equal(first, load(dataset, seed=seed).images) for seed in range(2, 8))
    dataset.augment = v2.RandomInvert(1.0)
    assert torch.allclose(load(dataset).images[0], 1 - dataset.images[0])


def test_reading_leaves_the_global_generators_alone():
    dataset = Items([torch.rand(3, 8, 8) for _ in range(3)], augment=v2.RandomHorizontalFlip(0.5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(dataset)
    assert torch.equal(torch.rand(3), expected)


def test_anomalous_images_are_left_out(caplog):
    images = [torch.full((3, 8, 8), float(i) / 4) for i in range(4)]
    loaded = load(Items(images, [0, 1, 0, 0]))
    assert loaded.images[:, 0, 0, 0].tolist() == [0, 0.5, 0.75]
    assert "1 of 4 training images are labelled anomalous" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items([]), "There are no training images"),
        (Items([torch.rand(3, 8, 8)]), "only 1 training image.*at least 2"),
        (Items([torch.rand(3, 8, 8)] * 2, [1, 1]), "All training images are labelled anomalous"),
        (Items([torch.rand(3, 8, 8), torch.rand(3, 8, 16)]), r"differ in size.*\(8, 16\) and \(8, 8\)"),
    ],
)
def test_unusable_data(dataset, message):
    with pytest.raises(ValueError, match=message):
        load_training_images(
            DataLoader(dataset, batch_size=2) if len(dataset) else SimpleNamespace(dataset=dataset), None, 0
        )


def test_unreadable_file_is_named(tmp_path):
    root = write_mvtec(tmp_path, train=3)
    broken = root / "screw" / "train" / "good" / "001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    datamodule = MVTecAD(root=root, category="screw", num_workers=0)
    datamodule.setup()
    with pytest.raises(RuntimeError, match=r"train.good.001.png cannot be read.*Repair or remove it"):
        load_training_images(datamodule.train_dataloader(), None, 0)


def test_pixels_are_those_of_the_file(mvtec_root):
    datamodule = MVTecAD(root=mvtec_root, category="screw", num_workers=0)
    datamodule.setup()
    loaded = load_training_images(datamodule.train_dataloader(), None, 0)
    path = datamodule.train_data.samples.image_path[0]
    assert torch.equal(
        (loaded.images[0] * 255).round().byte(), torch.from_numpy(cv2.imread(path)[..., ::-1].copy()).permute(2, 0, 1)
    )


def slow_turn(image, degrees):
    """Bilinear reading of each turned pixel, the image continued by its mirror image."""
    height, width = image.shape

    def pixel(y, x):
        y, x = y % (2 * height), x % (2 * width)
        return image[min(y, 2 * height - 1 - y), min(x, 2 * width - 1 - x)]

    result = np.zeros((height, width))
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    for y, x in np.ndindex(height, width):
        right, up = x + 0.5 - width / 2, height / 2 - y - 0.5
        # counter-clockwise by the angle: what is seen here lay clockwise by it
        from_right, from_up = cosine * right + sine * up, cosine * up - sine * right
        column, row = from_right + width / 2 - 0.5, height / 2 - from_up - 0.5
        left, top = int(np.floor(column)), int(np.floor(row))
        for dy, dx in np.ndindex(2, 2):
            weight = (1 - abs(column - left - dx)) * (1 - abs(row - top - dy))
            result[y, x] += weight * pixel(top + dy, left + dx)
    return result


@pytest.mark.parametrize(("size", "degrees"), [((8, 8), 90), ((9, 14), 4), ((14, 9), -33.5), ((6, 6), 180)])
def test_turn(size, degrees):
    image = torch.rand(2, *size, generator=torch.Generator().manual_seed(8))
    turned = turn(image, degrees)
    for channel, own in zip(image, turned, strict=True):
        np.testing.assert_allclose(own.numpy(), slow_turn(channel.double().numpy(), degrees), atol=1e-5)


def test_turned_copies_follow_their_photograph():
    images = TrainingImages(torch.rand(3, 3, 8, 8), NORMALIZE, ["a", "b", "c"])
    more = with_turned_copies(images, [90, -5])
    assert (len(more), more.copies, more.paths) == (9, 3, list("aaabbbccc"))
    for index, image in enumerate(images.images):
        assert torch.equal(more.images[3 * index], image)
        torch.testing.assert_close(more.images[3 * index + 1], image.rot90(1, (1, 2)), atol=1e-5, rtol=0)
        assert torch.equal(more.images[3 * index + 2], turn(image, -5))
    assert with_turned_copies(images, []) is images
    assert images.photographs is images
    assert torch.equal(more.photographs.images, images.images)
    assert (more.photographs.paths, more.photographs.copies) == (list("abc"), 1)


@pytest.mark.parametrize(("free", "moved"), [(10**9, True), (4 * 8 * 3 * 16 * 16 * 4, False), (None, False)])
def test_images_move_to_a_device_that_has_room(monkeypatch, free, moved):
    monkeypatch.setattr(training_images, "available_bytes", lambda _: free)
    images = TrainingImages(torch.rand(8, 3, 16, 16), None)
    images.to_device(torch.device("meta"))
    assert (images.images.device.type == "meta") == moved

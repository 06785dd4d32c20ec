"""The same image gives the same answer: precision, modes, threads, batches, and the ten-thousandth time."""

import contextlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from conftest import TINY_BACKBONE, draw, torch_threads, write_mvtec
from lightning import seed_everything

from anomalib_cpr import Cpr

IMAGES = 11  # batches of 8 leave 3


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model that tells good from bad, with the threshold halfway between the two; images and their labels."""
    folder = tmp_path_factory.mktemp("numbers")
    data = MVTecAD(root=write_mvtec(folder / "data", train=12), category="screw", train_batch_size=4, num_workers=0)
    seed_everything(1, verbose=False)
    model = Cpr(**TINY_BACKBONE, descriptor_channels=16, k=3, image_size=64)
    engine = Engine(default_root_dir=folder, max_steps=30, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.fit(model, datamodule=data)
    rng = np.random.default_rng(7)
    pictures = [draw(rng, defect=index % 2 == 1)[0] for index in range(IMAGES)]
    images = torch.from_numpy(np.stack(pictures)[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    model.eval()
    with torch.no_grad():
        raw = model.model(model.pre_processor(images))
    bad = torch.arange(IMAGES) % 2 == 1
    good_end, bad_start = raw.pred_score[~bad].max(), raw.pred_score[bad].min()
    assert good_end < bad_start, "the toy is too hard to test labels with"
    model.post_processor._image_threshold.fill_((good_end + bad_start) / 2)
    return model, images, bad, pictures


def in_batches(model, images, size):
    """Raw scores and maps, and labels, of a model that sees so many images at a time."""
    raw = [model.model(model.pre_processor(part)) for part in images.split(size)]
    labels = [model(part).pred_label for part in images.split(size)]
    return (
        *(torch.cat([getattr(part, name) for part in raw]) for name in ("pred_score", "anomaly_map")),
        torch.cat(labels),
    )


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("condition", "batch_size", "tolerance"),
    [
        (contextlib.nullcontext, IMAGES, 0),
        (torch.no_grad, IMAGES, 0),
        (torch.inference_mode, IMAGES, 0),
        (deterministic, IMAGES, 0),
        (lambda: torch_threads(1), IMAGES, 1e-6),
        (lambda: torch_threads(2), IMAGES, 1e-6),
        (contextlib.nullcontext, 1, 0),
        (contextlib.nullcontext, 8, 0),
        (lambda: torch.autocast("cpu", torch.bfloat16), IMAGES, 2e-2),
        (lambda: torch.autocast("cpu", torch.float16), IMAGES, 2e-3),
        (lambda: torch.autocast("cpu", torch.bfloat16), 1, 2e-2),
    ],
)
def test_same_answer(fitted, condition, batch_size, tolerance):
    model, images, bad, _ = fitted
    with torch.no_grad():
        score, anomaly_map, label = in_batches(model, images, IMAGES)
    with condition():
        results = in_batches(model, images, batch_size)
    assert [result.dtype for result in results] == [torch.float32, torch.float32, torch.bool]
    assert torch.equal(label, bad)
    assert torch.equal(results[2], bad)
    for found, expected in zip(results[:2], (score, anomaly_map), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [({"precision": "bf16-mixed"}, 2e-2), ({"deterministic": True}, 0), ({"inference_mode": False}, 0)],
)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_same_answer_through_the_engine(fitted, tmp_path, arguments, tolerance, batch_size):
    model, images, bad, pictures = fitted
    for index, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{index:02}.png"), picture)
    with torch.no_grad():
        expected = model(images)
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu", **arguments)
    predictions = engine.predict(model, dataloaders=_loader(tmp_path, batch_size))
    torch.use_deterministic_algorithms(False)  # Lightning leaves it on
    assert torch.equal(torch.cat([batch.pred_label for batch in predictions]), bad)
    post = model.post_processor
    for name, spread in (
        ("pred_score", post.image_max - post.image_min),
        ("anomaly_map", post.pixel_max - post.pixel_min),
    ):
        found = torch.cat([getattr(batch, name) for batch in predictions])
        own = getattr(expected, name)
        torch.testing.assert_close(found.view_as(own), own, rtol=0, atol=max(tolerance, 1e-6) / float(spread))


def _loader(folder, batch_size):
    from anomalib.data import PredictDataset

    dataset = PredictDataset(folder)
    return torch.utils.data.DataLoader(dataset, batch_size, collate_fn=dataset.collate_fn)


def test_deterministic_training_is_the_same_training(tiny_datamodule, tiny_model, tmp_path):
    results = []
    for deterministic in (False, True):
        seed_everything(3, verbose=False)
        model = tiny_model()
        engine = Engine(
            default_root_dir=tmp_path, max_steps=2, logger=False, accelerator="cpu", deterministic=deterministic
        )
        engine.fit(model, datamodule=tiny_datamodule)
        torch.use_deterministic_algorithms(False)
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for its memory")
def test_ten_thousand_predictions(fitted, capsys):
    """One image after the other, as on a line: no answer drifts, and no memory is lost."""
    model, images, *_ = fitted
    held = []
    with torch.inference_mode():
        first = [model(image[None]) for image in images]
        for count in range(1, 10_001):
            result = model(images[count % IMAGES][None])
            if count % 1000 == 0:
                held.append(resident_megabytes())
        for image, expected in zip(images, first, strict=True):
            result = model(image[None])
            assert torch.equal(result.anomaly_map, expected.anomaly_map)
            assert torch.equal(result.pred_score, expected.pred_score)
    with capsys.disabled():
        print("\nMB after each thousand predictions:", " ".join(f"{value:.1f}" for value in held))
    assert held[-1] - held[0] < 5

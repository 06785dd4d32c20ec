"""Tiny data and models, so that every test trains in seconds."""

import os
from contextlib import contextmanager
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest

TINY_BACKBONE = {"backbone": "test_resnet", "layers": ["layer1", "layer2"], "pre_trained": False}


def pytest_collection_modifyitems(items):
    """Run the tests of exports and their runtimes last.

    Twice, CPython 3.11 crashed in ``subprocess.Popen`` some tests after them, in one process with everything else: the
    memory of a code object was gone. On their own, and without them, no run did. The README's command gives them a
    process of their own.
    """
    items.sort(key=lambda item: item.path.name in {"test_export.py", "test_parity.py"})


def draw(rng, size=64, *, defect=False):
    """A bright disc on a dark, noisy background; a defect is a red stroke on the disc."""
    image = rng.normal(60, 6, (size, size, 3)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((size, size), np.uint8)
    centre = (size // 2 + int(rng.integers(-2, 3)), size // 2 + int(rng.integers(-2, 3)))
    cv2.circle(image, centre, size // 3, (200, 190, 170), -1)
    if defect:
        start = (centre[0] - size // 8, centre[1] - size // 8 + int(rng.integers(0, size // 6)))
        end = (start[0] + size // 5, start[1] + size // 12)
        cv2.line(mask, start, end, 255, max(2, size // 20))
        image[mask > 0] = (30, 30, 200)
    return image, mask


def write_mvtec(root: Path, category: str = "screw", train: int = 6, test: int = 3, size: int = 64) -> Path:
    """Write a data set in MVTec AD's layout and return its root."""
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/scratch", "ground_truth/scratch"):
        (root / category / folder).mkdir(parents=True, exist_ok=True)
    for index in range(train):
        cv2.imwrite(str(root / category / "train" / "good" / f"{index:03}.png"), draw(rng, size)[0])
    for index in range(test):
        cv2.imwrite(str(root / category / "test" / "good" / f"{index:03}.png"), draw(rng, size)[0])
        image, mask = draw(rng, size, defect=True)
        cv2.imwrite(str(root / category / "test" / "scratch" / f"{index:03}.png"), image)
        cv2.imwrite(str(root / category / "ground_truth" / "scratch" / f"{index:03}_mask.png"), mask)
    return root


def train_tiny(datamodule, folder: Path, steps: int, **arguments) -> Path:
    """Train a tiny model and return its checkpoint."""
    import torch
    from anomalib.engine import Engine

    from anomalib_cpr.lightning_model import Cpr

    torch.manual_seed(0)
    model = Cpr(**TINY_BACKBONE, descriptor_channels=8, k=2, image_size=64, **arguments)
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, max_steps=steps)
    engine.fit(model, datamodule=datamodule)
    (path,) = folder.rglob("model.ckpt")
    return path


@contextmanager
def torch_threads(count: int):
    """Compute with so many threads; with another number, sums differ in the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("mvtec"))


@pytest.fixture(scope="session")
def data_root():
    """Development data; tests that need them skip where they are absent."""
    root = Path(os.environ.get("CPR_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"development data are not at {root}; set CPR_DATA_ROOT")
    return root


@pytest.fixture
def tiny_datamodule(mvtec_root):
    from anomalib.data import MVTecAD

    return MVTecAD(root=mvtec_root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)


@pytest.fixture
def tiny_model():
    """Makes a model that trains in seconds; keyword arguments override."""
    from anomalib_cpr.lightning_model import Cpr

    def make(**arguments):
        return Cpr(**{**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, "image_size": 64, **arguments})

    return make

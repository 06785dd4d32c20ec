from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import TINY_BACKBONE, write_mvtec
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torchvision.transforms import v2

from anomalib_cpr import real_anomalies, training
from anomalib_cpr.lightning_model import Cpr
from anomalib_cpr.real_anomalies import KnownAnomalies, hold_out, place, read_folder, read_from_test_set
from anomalib_cpr.synthetic_anomalies import SyntheticAnomalyGenerator
from anomalib_cpr.training import TrainingData, draw_image_pairs
from anomalib_cpr.training_images import TrainingImages

RESIZE = v2.Resize((32, 48), antialias=False)


@pytest.fixture
def known():
    """Two grey images, whose defect is a white and a black bar."""
    images = torch.full((2, 3, 32, 48), 0.5)
    masks = torch.zeros(2, 1, 32, 48, dtype=torch.bool)
    masks[0, :, 10:14, 20:30] = True
    masks[1, :, 20:28, 5:8] = True
    images[0, :, 10:14, 20:30], images[1, :, 20:28, 5:8] = 1, 0
    return KnownAnomalies(images, masks, torch.ones(2, 1, 8, 12), torch.tensor([[0, 1, 2], [3, 1, 0]]))


@pytest.mark.parametrize(
    ("degrees", "scale", "position"),
    [(0, 1, (0, 0)), (0, 1, (1, 1)), (90, 1, (0.5, 0.5)), (30, 0.7, (0.2, 0.9)), (211, 1.4, (0.6, 0.1))],
)
def test_place_against_opencv(degrees, scale, position):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.random((40, 60, 3)).astype(np.float32), (0, 0), 2)
    mask = np.zeros((40, 60), np.uint8)
    mask[12:20, 30:36] = 1
    mask[18:20, 26:40] = 1
    rows, columns = mask.nonzero()
    matrix = cv2.getRotationMatrix2D((columns.mean(), rows.mean()), degrees, scale)
    x, y = matrix @ np.stack([columns, rows, np.ones(len(rows))])
    for axis, (places, side, share) in enumerate(((x, 60, position[1]), (y, 40, position[0]))):
        first, last = max(places.min(), 0), min(places.max(), side - 1)
        matrix[axis, 2] += -first + share * (side - 1 - last + first)
    expected = cv2.warpAffine(image, matrix, (60, 40), flags=cv2.INTER_LINEAR)
    expected_mask = cv2.warpAffine(mask.astype(np.float32), matrix, (60, 40), flags=cv2.INTER_LINEAR) > 0.5
    moved, moved_mask = place(
        torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None] > 0, degrees, scale, position
    )
    assert moved_mask.sum() > 0.5 * scale**2 * len(rows)
    assert (moved_mask[0].numpy() != expected_mask).mean() < 0.005
    inside = cv2.erode(expected_mask.astype(np.uint8), np.ones((3, 3))) > 0
    difference = np.abs(moved.permute(1, 2, 0).numpy() - expected)[inside]
    assert difference.max() < 0.05  # OpenCV knows positions to a thirty-second of a pixel


def test_a_defect_larger_than_the_image_stays_where_it_is():
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    image = torch.rand(3, 16, 16)
    moved, moved_mask = place(image, mask, 0, 1, (0.3, 0.8))
    assert torch.allclose(moved, image, atol=1e-5)
    assert moved_mask.all()


def test_pasting_changes_what_the_mask_says_and_nothing_else(known):
    queries = torch.rand(200, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    before = torch.zeros(200, 1, 32, 48, dtype=torch.bool)
    before[:, :, :2] = True
    pasted, masks = known.paste(queries, before, torch.Generator().manual_seed(2))
    added = masks & ~before
    share = added.flatten(1).any(1).float().mean().item()
    assert 0.12 < share < 0.28, "a fifth of the queries"
    assert (masks | ~before).all(), "old masks stay"
    changed = (pasted != queries).any(1, keepdim=True)
    assert not (changed & ~masks).any()
    assert (changed & added).sum() > 0.95 * added.sum()
    assert (pasted.amin() >= 0) & (pasted.amax() <= 1)
    assert not torch.equal(pasted, queries)
    again, _ = known.paste(queries, before, torch.Generator().manual_seed(2))
    assert torch.equal(pasted, again)


def test_pasted_defects_have_the_opacity_of_the_paper(known, monkeypatch):
    """Without change of appearance and place, a white bar on black shows the opacity itself."""
    monkeypatch.setattr(real_anomalies, "APPEARANCE_PROBABILITY", 0)
    monkeypatch.setattr(real_anomalies, "PLACE_PROBABILITY", 0)
    monkeypatch.setattr(real_anomalies, "PASTE_PROBABILITY", 1)
    monkeypatch.setattr(real_anomalies, "MOST_PASTED", 1)
    white = KnownAnomalies(known.images[:1], known.masks[:1], known.foregrounds[:1], known.neighbours[:1])
    empty = torch.zeros(300, 1, 32, 48, dtype=torch.bool)
    pasted, masks = white.paste(torch.zeros(300, 3, 32, 48), empty, torch.Generator().manual_seed(0))
    assert (masks == known.masks[:1]).all()
    opacity = pasted[:, 0, 12, 25]
    assert 0.5 <= opacity.min() < 0.52
    assert 0.98 < opacity.max() <= 1


def test_queries_are_known_defects_with_their_own_references(known, monkeypatch):
    monkeypatch.setattr(real_anomalies, "QUERY_PROBABILITY", 1)
    monkeypatch.setattr(real_anomalies, "PASTE_PROBABILITY", 0)
    monkeypatch.setattr(training, "augment", lambda images, _: images)
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 32, 48) / 10
    data = TrainingData(TrainingImages(images, None), torch.zeros(4, 3, dtype=torch.long), "object", known)
    foregrounds = torch.zeros(4, 1, 8, 12)
    pairs = draw_image_pairs(data, foregrounds, SyntheticAnomalyGenerator(), 4, torch.Generator().manual_seed(0))
    for query, mask, reference in zip(pairs.queries, pairs.anomalies, pairs.references, strict=True):
        which = int(torch.equal(query, known.images[1]))
        assert torch.equal(query, known.images[which])
        assert torch.equal(mask, known.masks[which])
        assert round(10 * reference[0, 0, 0].item()) in known.neighbours[which].tolist()
    assert pairs.weights.min() > 0.9, "of foregrounds of the query (1) and the reference (0), the larger one counts"


def test_share_of_queries(known):
    replaced, which = known.draw_queries(20000, torch.Generator().manual_seed(0))
    assert replaced.float().mean().item() == pytest.approx(0.025, abs=0.005)
    assert set(which.tolist()) == {0, 1}


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def test_folder(tmp_path):
    image, mask = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
    mask[10:20, 30:50] = 255
    image[mask > 0] = (0, 0, 255)
    write(tmp_path / "defects" / "scratch" / "1.jpg", image)
    write(tmp_path / "defects" / "2.png", image[..., 0])
    write(tmp_path / "masks" / "scratch" / "1_mask.png", mask)
    write(tmp_path / "masks" / "2.png", mask)
    images, masks, paths = read_folder(tmp_path / "defects", None, RESIZE)
    assert images.shape == (2, 3, 32, 48)
    assert masks.shape == (2, 1, 32, 48)
    assert masks[0].sum() == 50
    assert [path.rsplit("/", 1)[1] for path in paths] == ["2.png", "1.jpg"]
    assert images[1][0][masks[1][0]].min() > 0.8, "red, and in its place"

    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png has no mask: expected 2\.png or 2_mask\.png in .*masks"):
        read_folder(tmp_path / "defects", None, RESIZE)
    write(tmp_path / "masks" / "2.png", np.zeros((64, 96), np.uint8))
    with pytest.raises(ValueError, match=r"mask of the known anomaly .*2\.png is empty"):
        read_folder(tmp_path / "defects", None, RESIZE)
    with pytest.raises(FileNotFoundError, match=r"known_anomaly_masks='.*nowhere' is not a folder"):
        read_folder(tmp_path / "defects", tmp_path / "nowhere", RESIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read_folder(tmp_path / "empty", None, RESIZE)


@pytest.fixture
def data(tmp_path):
    root = write_mvtec(tmp_path / "data", test=4)
    return MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)


@pytest.mark.parametrize("pre_processor", [False, True])
def test_without_a_step_before_the_normalisation(data, tmp_path, pre_processor):
    processor = PreProcessor(v2.Normalize([0.5] * 3, [0.2] * 3)) if pre_processor else False
    model = Cpr(**TINY_BACKBONE, descriptor_channels=8, k=3, known_anomalies=2, pre_processor=processor)
    engine = Engine(max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=data)
    assert len(model.held_out) == 2


def test_choice_from_the_test_set(data):
    data.setup()
    samples = data.test_data.samples
    defects = samples.index[samples.label_index == 1].tolist()
    images, masks, paths = read_from_test_set(data.test_data, defects[1:3], RESIZE)
    assert paths == samples.image_path[defects[1:3]].tolist()
    assert masks.any(3).any(2).all()
    assert images.shape == (2, 3, 32, 48)
    assert read_from_test_set(data.test_data, 2, RESIZE)[2] == read_from_test_set(data.test_data, 2, RESIZE)[2]
    good = samples.index[samples.label_index == 0].tolist()[0]
    for choice, message in (
        ([good], "has no defect"),
        ([99], "index 99 is outside the test set of 8 images"),
        (4, "has 4 defects, and one must stay"),
        (0, "known_anomalies=0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_from_test_set(data.test_data, choice, RESIZE)


class Look(Callback):
    """Which images were measured."""

    def __init__(self):
        self.seen = {}

    def _look(self, stage, batch):
        self.seen.setdefault(stage, []).extend(batch.image_path)

    def on_validation_batch_end(self, *arguments):
        self._look("validate", arguments[3])

    def on_test_batch_end(self, *arguments):
        self._look("test", arguments[3])


def make(**arguments):
    arguments = {**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, **arguments}
    return Cpr(pre_processor=Cpr.configure_pre_processor((64, 64)), **arguments)


def test_known_defects_leave_the_test_set_for_good(data, tmp_path):
    def engine(look):
        return Engine(
            default_root_dir=tmp_path / "run", logger=False, callbacks=[look], enable_progress_bar=False, max_steps=2
        )

    look = Look()
    model = make(known_anomalies=2)
    engine(look).train(model, datamodule=data)
    assert len(model.held_out) == 2
    for stage in ("validate", "test"):
        assert len(set(look.seen[stage])) == 6
        assert not set(look.seen[stage]) & set(model.held_out)
    assert len(data.test_data) == 8, "the data module is as it was"

    # The checkpoint remembers, in a model that was told nothing.
    (checkpoint,) = (tmp_path / "run").rglob("model.ckpt")
    look = Look()
    engine(look).test(make(), datamodule=data, ckpt_path=checkpoint)
    assert not set(look.seen["test"]) & set(model.held_out)
    assert len(look.seen["test"]) == 6
    loaded, look = Cpr.load_from_checkpoint(checkpoint), Look()
    engine(look).test(loaded, datamodule=data)
    assert len(look.seen["test"]) == 6
    assert len(engine(Look()).predict(loaded, datamodule=data)) == 2, "predictions are for all images"
    assert len(data.test_data) == 8

    # Another model on the same data is measured on all of them.
    look = Look()
    engine(look).train(make(), datamodule=data)
    assert len(look.seen["test"]) == 8


def test_folder_inside_the_test_set_leaves_it_too(data, tmp_path):
    folder = data.root / "screw" / "test" / "scratch"
    model = make(known_anomalies=folder, known_anomaly_masks=data.root / "screw" / "ground_truth" / "scratch")
    look = Look()
    Engine(
        default_root_dir=tmp_path / "run", logger=False, callbacks=[look], enable_progress_bar=False, max_steps=1
    ).fit(model, datamodule=data)
    assert len(model.held_out) == 4
    assert not any("scratch" in path for path in look.seen["validate"])


def test_folder_elsewhere_leaves_the_test_set_alone(data, tmp_path):
    source = write_mvtec(tmp_path / "other", test=2) / "screw"
    model = make(known_anomalies=source / "test" / "scratch", known_anomaly_masks=source / "ground_truth" / "scratch")
    Engine(default_root_dir=tmp_path / "run", logger=False, enable_progress_bar=False, max_steps=1).fit(
        model, datamodule=data
    )
    assert model.held_out == []


def test_one_seed_gives_one_result(data, tmp_path):
    states = []
    for _ in range(2):
        seed_everything(3, verbose=False)
        model = make(known_anomalies=2)
        engine = Engine(
            default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_steps=3, limit_val_batches=0
        )
        engine.fit(model, datamodule=data)
        states.append({name: value.clone() for name, value in model.model.state_dict().items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_test_set_is_needed_for_indices(tiny_datamodule, tmp_path):
    tiny_datamodule.setup()
    loader = tiny_datamodule.train_dataloader()
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_steps=1)
    with pytest.raises(ValueError, match="Pass a data module to the Engine, or give a folder"):
        engine.fit(make(known_anomalies=[0]), train_dataloaders=loader)


def test_hold_out_matches_folder_and_name_on_another_machine(data):
    data.setup()
    path = data.test_data.samples.image_path[0]
    moved = "/elsewhere/" + "/".join(path.split("/")[-2:])
    assert hold_out(data, [moved]) == 1
    assert len(data.test_data) == 7
    real_anomalies.give_back(data)
    real_anomalies.give_back(SimpleNamespace())
    assert len(data.test_data) == 8

# SPDX-License-Identifier: Apache-2.0
"""DrawnParts draws itself once, and never destroys what it has not drawn."""

import json
import multiprocessing
from pathlib import Path

import cv2
import pytest
import torch
from anomalib.data import AnomalibDataModule, get_datamodule

import anomalib_cpr
from anomalib_cpr import DrawnParts, drawing
from anomalib_cpr.drawn_data import STAMP


def small(root, category="bracket", **arguments):
    return DrawnParts(root=root, category=category, **{"train_images": 3, "image_size": 64, **arguments})


def contents(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    small(root).prepare_data()
    return root


def test_layout_is_mvtec_ads(drawn):
    assert [path.name for path in drawn.iterdir()] == ["bracket"], "nothing is left beside it"
    expected = {STAMP} | {f"train/good/{index:03}.png" for index in range(3)}
    expected |= {f"test/good/{index:03}.png" for index in range(12)}
    for defect in drawing.DEFECTS["bracket"]:
        for index in range(7):
            expected |= {f"test/{defect}/{index:03}.png", f"ground_truth/{defect}/{index:03}_mask.png"}
    assert set(contents(drawn / "bracket")) == expected


def test_files_hold_the_drawings(drawn):
    part = drawing.draw("bracket", "stain", 4, size=64)
    image = cv2.imread(str(drawn / "bracket/test/stain/004.png"))[..., ::-1]
    mask = cv2.imread(str(drawn / "bracket/ground_truth/stain/004_mask.png"), cv2.IMREAD_UNCHANGED)
    assert (image == part.image).all()
    assert (mask == part.mask).all()


def test_two_drawings_are_equal_to_the_byte(drawn, tmp_path):
    small(tmp_path).prepare_data()
    assert contents(tmp_path) == contents(drawn)


def test_what_is_there_is_not_drawn_again(drawn, monkeypatch):
    monkeypatch.setattr(drawing, "draw", None)
    small(drawn).prepare_data()
    small(drawn).setup()


@pytest.mark.parametrize("reason", ["arguments", "version", "file"])
def test_what_is_stale_is_drawn_again(reason, tmp_path, monkeypatch):
    small(tmp_path).prepare_data()
    before = contents(tmp_path / "bracket")
    wanted = {}
    if reason == "arguments":
        wanted = {"train_images": 2, "drawing_seed": 5}
    elif reason == "version":
        monkeypatch.setattr(drawing, "VERSION", drawing.VERSION + 1)
    else:
        (tmp_path / "bracket/test/stain/003.png").unlink()
    small(tmp_path, **wanted).prepare_data()
    after = contents(tmp_path / "bracket")
    stamp = json.loads(after[STAMP])
    assert (stamp["arguments"]["train_images"], stamp["arguments"]["version"]) == (
        wanted.get("train_images", 3),
        drawing.VERSION,
    )
    assert set(stamp["files"]) == set(after) - {STAMP}
    assert (after == before) == (reason == "file")
    assert [path.name for path in tmp_path.iterdir()] == ["bracket"]


@pytest.mark.parametrize(
    ("foreign", "stamp"),
    [
        ("bracket/train/good/mine.png", None),  # somebody's own images
        ("bracket/notes.txt", "drawn"),  # beside the drawings, which are stale
        ("bracket/train/good/000.png", "{}"),  # a file of the stamp's name, but not a stamp
        ("bracket", None),  # not even a folder
    ],
)
def test_foreign_files_stay_as_they_are(foreign, stamp, tmp_path):
    if stamp == "drawn":
        small(tmp_path, train_images=2).prepare_data()
    (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / foreign).write_bytes(b"mine")
    if stamp == "{}":
        (tmp_path / "bracket" / STAMP).write_text(stamp)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"has not drawn, e\.g\. .*Choose another root"):
        small(tmp_path).prepare_data()
    assert contents(tmp_path) == before


def test_a_foreign_file_does_not_hinder_while_the_drawings_are_right(tmp_path):
    small(tmp_path).prepare_data()
    (tmp_path / "bracket/.DS_Store").write_bytes(b"mine")
    small(tmp_path).setup()
    assert (tmp_path / "bracket/.DS_Store").read_bytes() == b"mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "bracket").mkdir()
    small(tmp_path).prepare_data()
    assert (tmp_path / "bracket" / STAMP).is_file()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/bracket").symlink_to(tmp_path / "disk", target_is_directory=True)
    for train_images in (2, 3):
        small(tmp_path / "root", train_images=train_images).prepare_data()
    assert (tmp_path / "root/bracket").is_symlink()
    assert len(list((tmp_path / "disk/train/good").iterdir())) == 3


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(category, defect, index, **_):
        raise KeyboardInterrupt if (category, defect, index) == ("bracket", "good", 2) else StopAsyncIteration

    draw = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *args, **kw: draw(*args, **kw) if args[2] < 2 else interrupt(*args))
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == []


def prepare(root, barrier):
    barrier.wait(60)
    small(root).prepare_data()


@pytest.mark.parametrize("stale", [False, True])
def test_two_processes_at_once(stale, drawn, tmp_path):
    if stale:
        small(tmp_path, train_images=2).prepare_data()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=prepare, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(tmp_path) == contents(drawn)


def test_setup_without_prepare_data(tmp_path):
    datamodule = small(tmp_path, train_batch_size=2, eval_batch_size=40)
    datamodule.setup()
    assert isinstance(datamodule, AnomalibDataModule)
    assert (datamodule.name, datamodule.category, datamodule.task) == ("DrawnParts", "bracket", "segmentation")

    batch = next(iter(datamodule.train_dataloader()))
    assert batch.image.shape == (2, 3, 64, 64)
    assert not batch.gt_label.any()
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.image.shape == (40, 3, 64, 64)
    assert batch.gt_mask.shape == (40, 64, 64)
    assert torch.equal(batch.gt_mask.flatten(1).any(dim=1), batch.gt_label.bool())
    assert int(batch.gt_label.sum()) == 4 * 7


def test_larger_test_sets_begin_with_the_same_images(drawn, tmp_path):
    small(tmp_path, good_test_images=13, defective_test_images=8).prepare_data()
    larger, usual = contents(tmp_path / "bracket"), contents(drawn / "bracket")
    assert len(larger) - len(usual) == 1 + 4 * 2  # one good image, and of each defect one with its mask
    for name in set(usual) - {STAMP}:
        assert larger[name] == usual[name], name


def test_other_splits(drawn):
    datamodule = small(drawn, val_split_mode="from_test", seed=1)
    datamodule.setup()
    assert len(datamodule.test_data) + len(datamodule.val_data) == 40


def test_get_datamodule(drawn):
    # anomalib makes a pair of the image size.
    arguments = {"root": str(drawn), "train_images": 3, "image_size": 64}
    datamodule = get_datamodule({"class_path": "DrawnParts", "init_args": arguments})
    assert type(datamodule) is anomalib_cpr.DrawnParts
    assert datamodule.image_size == 64


@pytest.mark.parametrize("name", ["DrawnParts", "anomalib_cpr.DrawnParts", "anomalib_cpr.drawn_data.DrawnParts"])
def test_the_command_line_knows_it(name, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    config = parser.parse_args(["--data", name, "--data.category", "pills", f"--data.root={tmp_path}"])
    datamodule = parser.instantiate_classes(config).data
    assert (type(datamodule), datamodule.category, datamodule.root) == (DrawnParts, "pills", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "bottle"}, "Invalid category='bottle'; expected one of bracket, gear, fabric, pills, loose_"),
        ({"train_images": 1}, "Invalid train_images=1; expected 2 or more"),
        ({"good_test_images": 0}, "Invalid good_test_images=0, defective_test_images=7; expected 1 or more"),
        ({"defective_test_images": 0}, "Invalid good_test_images=12, defective_test_images=0; expected 1 or more"),
        ({"image_size": 32}, "Invalid image_size=32; parts are drawn with 64 pixels or more"),
        ({"image_size": (64, 128)}, r"Invalid image_size=\(64, 128\); parts are drawn on squares"),
        ({"drawing_seed": -1}, "Invalid seed=-1 of the drawing"),
    ],
)
def test_errors_name_the_value_before_anything_is_drawn(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_default_root_of_anomalib():
    assert DrawnParts(root=None).root.name == "DrawnParts"
    assert DrawnParts().root == Path("datasets/DrawnParts")

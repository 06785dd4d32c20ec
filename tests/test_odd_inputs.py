"""What production does to images: files of every kind, shape and damage, through the Engine and the command line.

Each row gives the right result, or one error that names the file and the way out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, MVTecAD, PredictDataset
from anomalib.engine import Engine
from conftest import TINY_BACKBONE, draw, write_mvtec
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from anomalib_cpr import cli, image_files
from anomalib_cpr.image_files import complaint, examine, examine_all, files_of
from anomalib_cpr.lightning_model import Cpr

PICTURE = draw(np.random.default_rng(0))[0][..., ::-1].copy()  # RGB
GREY = np.asarray(Image.fromarray(PICTURE).convert("L"))
TURNED = Image.Exif()
TURNED[image_files.ORIENTATION] = 6


def picture(mode="RGB", size=(64, 64)):
    return Image.fromarray(PICTURE).resize(size).convert(mode)


def cut(file, share=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def saved_and_cut(folder, name, share=0.5):
    picture().save(folder / name)
    cut(folder / name, share)


# name -> how to write it
READABLE = {
    "1x1": lambda folder: picture(size=(1, 1)).save(folder / "a.png"),
    "7x5": lambda folder: picture(size=(5, 7)).save(folder / "a.png"),
    "4000x200": lambda folder: picture(size=(200, 4000)).save(folder / "a.png"),
    "grey": lambda folder: picture("L").save(folder / "a.png"),
    "grey with alpha": lambda folder: picture("LA").save(folder / "a.png"),
    "RGBA": lambda folder: picture("RGBA").save(folder / "a.png"),
    "palette": lambda folder: picture("P").save(folder / "a.png"),
    "1 bit": lambda folder: picture("1").save(folder / "a.png"),
    "16 bit colour": lambda folder: cv2.imwrite(str(folder / "a.png"), PICTURE[..., ::-1].astype(np.uint16) * 257),
    "16 bit that holds 8": lambda folder: Image.fromarray(GREY.astype(np.uint16)).save(folder / "a.png"),
    "float of 0 to 255": lambda folder: tifffile.imwrite(folder / "a.tiff", GREY.astype(np.float32)),
    "CMYK": lambda folder: picture("CMYK").save(folder / "a.jpg", quality=95),
    "EXIF": lambda folder: picture(size=(96, 64)).save(folder / "a.jpg", exif=TURNED),
    "black": lambda folder: Image.new("RGB", (64, 64)).save(folder / "a.png"),
    "constant": lambda folder: Image.new("RGB", (64, 64), (90, 90, 90)).save(folder / "a.png"),
    "white": lambda folder: Image.new("RGB", (64, 64), (255, 255, 255)).save(folder / "a.png"),
    "upper case": lambda folder: picture().save(folder / "A.JPEG"),
    "GIF in a PNG's clothes": lambda folder: picture().save(folder / "a.png", format="GIF"),
    "appended bytes": lambda folder: (
        picture().save(folder / "a.png"),
        (folder / "a.png").open("ab").write(b"x" * 500),
    ),
    "not ASCII": lambda folder: (
        (folder / "Größe 日本 ñ").mkdir(),
        picture().save(folder / "Größe 日本 ñ" / "ü b.png"),
    ),
    "long": lambda folder: (
        folder.joinpath(*["x" * 250] * 12).mkdir(parents=True),
        picture().save(folder.joinpath(*["x" * 250] * 12, "y" * 240 + ".png")),
    ),
    "folder that is a link to itself": lambda folder: (
        picture().save(folder / "a.png"),
        (folder / "loop").symlink_to(folder),
    ),
}
# name -> (how to write it, file, what is said about it)
UNREADABLE = {
    "cut off PNG": (lambda folder: saved_and_cut(folder, "a.png"), "a.png", "OSError: image file is truncated"),
    "end of a PNG missing": (lambda folder: saved_and_cut(folder, "a.png", 0.99), "a.png", "truncated"),
    "cut off JPEG": (lambda folder: saved_and_cut(folder, "a.jpg"), "a.jpg", "truncated"),
    "cut off BMP": (lambda folder: saved_and_cut(folder, "a.bmp"), "a.bmp", "truncated"),
    "cut off TIFF": (lambda folder: saved_and_cut(folder, "a.tiff"), "a.tiff", "truncated"),
    "zero bytes": (lambda folder: (folder / "a.png").touch(), "a.png", r"empty \(0 bytes\)"),
    "text": (
        lambda folder: (folder / "a.png").write_text("not an image"),
        "a.png",
        "not an image that Pillow knows .it begins with b'not an image'",
    ),
    "16 bit grey": (
        lambda folder: Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "a.png"),
        "a.png",
        r"its values, \d+ to \d+, would be clipped to 0..255. Convert it to 8 bits",
    ),
    "float of 0 to 1": (
        lambda folder: tifffile.imwrite(folder / "a.tiff", GREY.astype(np.float32) / 255),
        "a.tiff",
        "taken for 0..255, so it would be black. Convert it to 8 bits",
    ),
    "float colours": (
        lambda folder: tifffile.imwrite(folder / "a.tiff", PICTURE.astype(np.float32) / 255),
        "a.tiff",
        "not an image that Pillow knows",
    ),
    "NaN": (
        lambda folder: tifffile.imwrite(folder / "a.tiff", np.where(GREY > 100, np.nan, GREY).astype(np.float32)),
        "a.tiff",
        r"has \d+ pixels that are NaN or infinite",
    ),
    "infinity": (
        lambda folder: tifffile.imwrite(folder / "a.tiff", np.where(GREY > 100, np.inf, GREY).astype(np.float32)),
        "a.tiff",
        "NaN or infinite",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    data = MVTecAD(root=write_mvtec(folder / "data"), category="screw", train_batch_size=2, num_workers=0)
    model = Cpr(**TINY_BACKBONE, descriptor_channels=8, k=3, image_size=64)
    Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, max_steps=8).fit(model, datamodule=data)
    (path,) = folder.rglob("model.ckpt")
    return path


@pytest.fixture
def predict(checkpoint, tmp_path):
    def run(folder, **arguments):
        model = Cpr.load_from_checkpoint(checkpoint, visualizer=False)
        engine = Engine(default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False)
        return engine.predict(model, data_path=folder, **arguments)

    return run


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", READABLE)
def test_predict_what_can_be_read(predict, checkpoint, folder, name):
    READABLE[name](folder)
    (batch,) = predict(folder)
    assert batch.anomaly_map.shape[-2:] == (64, 64)
    assert batch.anomaly_map.isfinite().all()
    assert batch.pred_score.isfinite().all()
    # The same as the picture's pixels, decoded here, and looked at by the model alone.
    with Image.open(batch.image_path[0]) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    expected = Cpr.load_from_checkpoint(checkpoint).eval()(pixels)
    assert torch.allclose(batch.anomaly_map, expected.anomaly_map[:, 0], atol=1e-5)
    like_the_original = name not in {"black", "constant", "white", "1x1", "7x5"}
    assert not like_the_original or abs(pixels.mean() - GREY.mean() / 255) < 0.12


@pytest.mark.parametrize("name", UNREADABLE)
def test_predict_names_what_cannot_be_read_before_the_first_image(predict, folder, name):
    write, file, message = UNREADABLE[name]
    picture().save(folder / "0.png")
    write(folder)
    with pytest.raises(ValueError, match=message) as error:
        predict(folder)
    assert "1 of 2 images cannot be used" in str(error.value)
    assert str(folder / file) in str(error.value)
    assert "Repair or remove" in str(error.value)


@pytest.mark.parametrize("name", [*READABLE, *UNREADABLE])
def test_train_with_it(tiny_model, folder, tmp_path, name):
    if name in READABLE:
        READABLE[name](folder)
    else:
        UNREADABLE[name][0](folder)
    for index in range(2):
        picture().save(folder / f"other{index}.png")
    data = Folder(
        "odd", normal_dir=folder, train_batch_size=2, num_workers=0, test_split_mode="none", val_split_mode="none"
    )
    model = tiny_model()
    engine = Engine(
        default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False, max_steps=1, limit_val_batches=0
    )
    if name in READABLE:
        engine.fit(model, datamodule=data)
        assert len(model.model.bank) == 3
        assert all(value.isfinite().all() for value in model.model.state_dict().values())
    else:
        with pytest.raises(ValueError, match=UNREADABLE[name][2]) as error:
            engine.fit(model, datamodule=data)
        assert "1 of 3 training images cannot be used" in str(error.value)
        assert str(folder / UNREADABLE[name][1]) in str(error.value)


# --- damage that only reading every pixel finds: named when the data loader fails


def damage_the_middle(file):
    """Header and end stay as they are."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "workers"),
    [("fit", 0), ("train", 0), ("validate", 0), ("test", 0), ("test", 1), ("predict", 0)],
)
def test_the_error_of_the_data_loader_names_every_damaged_file(checkpoint, tmp_path, stage, workers):
    root = write_mvtec(tmp_path / "data")
    where = "train/good" if stage == "fit" else "test/scratch"
    damaged = [root / "screw" / where / f"00{index}.png" for index in (1, 2)]
    for file in damaged:
        damage_the_middle(file)
        assert examine(file).problem is None
        assert examine(file, decode=True).problem
    data = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=2, num_workers=workers)
    model = Cpr.load_from_checkpoint(checkpoint, visualizer=False)
    engine = Engine(default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False, max_steps=1)
    with pytest.raises((OSError, RuntimeError, SyntaxError), match=r"2 of .* images.* cannot be used") as error:
        getattr(engine, stage)(model, datamodule=data)
    for file in damaged:
        assert str(file) in str(error.value)
    assert "anomalib-cpr check FOLDER" in str(error.value)
    # What failed can be done again once the files are repaired.
    for file in damaged:
        picture().save(file)
    data = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=2, num_workers=0)
    getattr(engine, stage)(model, datamodule=data)


# --- data sets in MVTec AD's layout: (what is done to it, what is said about it, None if it works)


def masks_of(root):
    return sorted((root / "ground_truth" / "scratch").glob("*.png"))


def change_masks(change):
    def apply(root):
        for path in masks_of(root):
            Image.fromarray(change(np.asarray(Image.open(path)))).save(path)

    return apply


def all_alike(content):
    def apply(root):
        for path in (root / "train" / "good").glob("*.png"):
            Image.fromarray(content).save(path)

    return apply


def of_many_sizes(root):
    for index, path in enumerate(sorted([*root.glob("t*/*/*.png")])):
        size = [(64, 64), (96, 64), (30, 200), (5, 7)][index % 4]
        Image.open(path).copy().resize(size).save(path)
        mask = root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        if path.parts[-3] == "test" and mask.exists():
            Image.open(mask).copy().resize(size, Image.Resampling.NEAREST).save(mask)


def remove(pattern, keep=0):
    def apply(root):
        for path in sorted(root.glob(pattern))[keep:]:
            path.unlink()

    return apply


DATA_SETS = {
    "masks empty": (change_masks(lambda mask: mask * 0), None),
    "masks inverted": (change_masks(lambda mask: 255 - mask), None),
    "masks of another size": (change_masks(lambda mask: cv2.resize(mask, (100, 30))), None),
    "masks in colour": (change_masks(lambda mask: np.stack([mask] * 3, -1)), None),
    "a mask cut off": (
        lambda root: cut(masks_of(root)[1]),
        "1 of 9 validation images and masks.*001_mask.png: OSError",
    ),
    "a mask missing": (lambda root: masks_of(root)[1].unlink(), "001_mask.png: the mask of .*001.png is missing"),
    "all masks missing": (lambda root: shutil.rmtree(root / "ground_truth"), "002_mask.png: the mask of .*missing"),
    "no defects": (lambda root: (shutil.rmtree(root / "ground_truth"), shutil.rmtree(root / "test" / "scratch")), None),
    "identical images": (all_alike(PICTURE), None),
    "black images": (all_alike(PICTURE * 0), None),
    "images of one pixel": (all_alike(PICTURE[:1, :1]), None),
    "many sizes": (of_many_sizes, None),
    "two images": (remove("train/good/*.png", keep=2), None),
    "one image": (remove("train/good/*.png", keep=1), "only 1 training image"),
    "no image": (remove("train/good/*.png"), "There are no training images. Check `root`"),
    "a link to nowhere": (
        lambda root: (root / "train" / "good" / "z.png").symlink_to("nowhere.png"),
        "z.png: it is a link that leads nowhere",
    ),
    "a link to itself": (
        lambda root: (root / "test" / "good" / "z.png").symlink_to("z.png"),
        "z.png: it is a link that leads nowhere",
    ),
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_set(tiny_model, tmp_path, name):
    change, message = DATA_SETS[name]
    root = write_mvtec(tmp_path / "data")
    change(root / "screw")
    data = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)
    model = tiny_model(visualizer=False)
    engine = Engine(default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False, max_steps=1)
    if message is not None:
        with pytest.raises((ValueError, OSError, RuntimeError), match=rf"(?s){message}"):
            engine.train(model, datamodule=data)
        return
    (metrics,) = engine.train(model, datamodule=data)
    assert all(0 <= value <= 1 for value in metrics.values())
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    for batch in engine.predict(model, datamodule=data):
        assert batch.anomaly_map.isfinite().all()
        assert batch.pred_score.isfinite().all()


def test_many_sizes_give_the_same_in_any_batch(checkpoint, tmp_path):
    """anomalib's collate function stretches them to the largest of a batch; the data module resizes them before."""
    root = write_mvtec(tmp_path / "data")
    of_many_sizes(root / "screw")
    results = []
    for batch_size in (1, 4):
        data = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=batch_size, num_workers=0)
        engine = Engine(default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False)
        model = Cpr.load_from_checkpoint(checkpoint, visualizer=False)
        batches = engine.predict(model, datamodule=data, ckpt_path=checkpoint)
        assert len(batches) == -(-6 // batch_size)
        results.append(torch.cat([batch.anomaly_map for batch in batches]))
    assert torch.allclose(*results, atol=1e-5)
    assert results[0].amax((1, 2)).max() > 0.2


def test_a_cut_off_test_image_is_told_before_a_long_training(tiny_model, tmp_path):
    """Validated on other images, so training does not need it."""
    root = write_mvtec(tmp_path / "data", test=4)
    data = MVTecAD(root=root, category="screw", train_batch_size=2, num_workers=0, val_split_mode="none")
    cut(root / "screw" / "test" / "good" / "000.png")
    engine = Engine(
        default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False, max_steps=1, limit_val_batches=0
    )
    model = tiny_model(visualizer=False)
    with pytest.warns(UserWarning, match=r"(?s)1 of .* test images and masks cannot be used.*000.png"):
        engine.fit(model, datamodule=data)
    with pytest.raises(ValueError, match=r"1 of 12 test images and masks cannot be used:\n.*000.png"):
        engine.test(model, datamodule=data)


# --- output folders


@pytest.mark.skipif(os.name != "posix", reason="rights and limits of POSIX")
def test_output_folders_that_take_nothing(checkpoint, folder, tmp_path):
    """In a process of its own, which gives up an administrator's rights and limits the size of its files."""
    picture().save(folder / "a.png")
    script = f"""
import os, resource, signal
from pathlib import Path
from anomalib.engine import Engine
from anomalib_cpr.lightning_model import Cpr
models = [Cpr.load_from_checkpoint({str(checkpoint)!r}) for _ in range(3)]  # each keeps its folder of pictures
def predict(out):
    model = models.pop()
    try:
        engine = Engine(default_root_dir=out, logger=False, enable_progress_bar=False)
        engine.predict(model, data_path={str(folder)!r})
    except Exception as error:
        print("FOUND", out, type(error).__name__, error)
root = Path({str(tmp_path)!r})
(root / "in_the_way").mkdir()
(root / "in_the_way" / "Cpr").touch()
predict(root / "in_the_way")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
predict(root / "full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
(root / "read_only").mkdir(mode=0o555)
if os.geteuid() == 0:
    os.seteuid(65534)
predict(root / "read_only")
"""
    for parent in (folder, tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, timeout=200
    )
    found = [line.removeprefix("FOUND ") for line in result.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == 3, result.stdout + result.stderr
    assert found[0].startswith(f"{tmp_path}/in_the_way NotADirectoryError [Errno 20] Not a directory: '{tmp_path}")
    assert found[1].startswith(f"{tmp_path}/full OSError [Errno 27] File too large")
    assert found[2].startswith(f"{tmp_path}/read_only PermissionError [Errno 13] Permission denied: '{tmp_path}")


# --- what the check knows


class Own(Dataset):
    """Not anomalib's: it may read what Pillow cannot."""

    image_filenames = ("a.raw",)

    def __getitem__(self, index):
        return index

    def __len__(self):
        return 1


def test_files_of_data_sets(mvtec_root):
    data = MVTecAD(root=mvtec_root, category="screw", num_workers=0)
    data.setup()
    train, test = files_of(data.train_data), files_of(data.test_data)
    assert len(train) == 6
    assert len(test) == 6 + 3
    assert sum("ground_truth" in file for file in test) == 3
    single = PredictDataset(train[0])
    assert files_of(single) == train[:1]
    assert files_of(Subset(data.train_data, [3, 1])) == [train[3], train[1]]
    assert files_of(ConcatDataset([single, data.train_data])) == [train[0], *train]
    assert files_of(Own()) == files_of(None) == files_of(Subset(Own(), [0])) == []


def test_complaint_names_ten_and_counts_the_rest(tmp_path):
    for index in range(12):
        (tmp_path / f"{index:02}.png").touch()
    picture().save(tmp_path / "good.png")
    files = examine_all([str(path) for path in sorted(tmp_path.iterdir())])
    message = complaint(files, "pictures")
    assert message.startswith("12 of 13 pictures cannot be used:")
    assert message.count("0 bytes") == 10
    assert "… and 2 more" in message
    assert complaint(files[-1:], "pictures") is None


def test_only_suspicious_files_are_decoded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "load", None)
    for name in ("a.png", "a.jpg"):
        assert examine(tmp_path / name).problem is None


# --- the command line


def test_check_command(tmp_path, capsys):
    root = write_mvtec(tmp_path / "data") / "screw"
    assert cli.main(["check", str(root)]) == 0
    assert capsys.readouterr().out == "15 files, all can be read.\n"
    damage_the_middle(root / "test" / "good" / "001.png")
    (root / "train" / "good" / "z.png").symlink_to("z.png")
    masks = masks_of(root)
    Image.new("L", (64, 64)).save(masks[0])
    Image.new("L", (40, 30), 255).save(masks[1])
    masks[2].unlink()
    picture(size=(96, 64)).save(root / "train" / "good" / "turned.jpg", exif=TURNED)
    assert cli.main(["check", str(root)]) == 1
    output = capsys.readouterr().out
    for text in (
        f"{root / 'test' / 'good' / '001.png'}: ",
        f"{root / 'train' / 'good' / 'z.png'}: it is a link that leads nowhere",
        f"{masks[2]}: the mask of {root / 'test' / 'scratch' / '002.png'} is missing.",
        "Images of 2 sizes (height x width): 64x64 (11), 64x96 (1).",
        "Images with an EXIF rotation, which anomalib ignores (1): ",
        f"Empty masks, where nothing counts as found (1): {masks[0]}.",
        f"Masks that cover most of the image; are they inverted (1)? {masks[1]}.",
        f"Masks of another size than their image, which are stretched (1): {masks[1]}.",
        "17 files, 3 to repair or remove.",
    ):
        assert text in output, output


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_check_command_without_images(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert cli.main(["check", str(tmp_path / name)]) == 2
    assert str(tmp_path / name) in capsys.readouterr().out


def anomalib(command, *arguments):
    """anomalib's command line, in this process."""
    parameters = {**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, "image_size": 64, "visualizer": False}
    given = [f"--model.{name}={value}" for name, value in parameters.items()]
    return AnomalibCLI([command, "--model=Cpr", *given, "--trainer.enable_progress_bar=false", *arguments])


def test_command_line_predicts_the_readable(checkpoint, folder, tmp_path):
    for name in ("grey", "RGBA", "palette", "CMYK", "not ASCII", "4000x200"):
        own = folder / name
        own.mkdir()
        READABLE[name](own)
    out = f"--default_root_dir={tmp_path / 'out'}"
    anomalib("predict", f"--data={folder}", f"--ckpt_path={checkpoint}", out)


def test_command_line_names_the_unreadable(checkpoint, folder, tmp_path):
    picture().save(folder / "0.png")
    saved_and_cut(folder, "1.png")
    out = f"--default_root_dir={tmp_path / 'out'}"
    with pytest.raises(ValueError, match=rf"1 of 2 images cannot be used:\n  {folder}/1.png: OSError: .*truncated"):
        anomalib("predict", f"--data={folder}", f"--ckpt_path={checkpoint}", out)
    root = write_mvtec(tmp_path / "data")
    cut(root / "screw" / "train" / "good" / "003.png")
    data = ("--data=MVTecAD", f"--data.root={root}", "--data.category=screw", "--data.num_workers=0")
    with pytest.raises(ValueError, match=r"(?s)1 of 6 training images cannot be used:.*good/003.png"):
        anomalib("train", *data, "--trainer.max_steps=1", out)

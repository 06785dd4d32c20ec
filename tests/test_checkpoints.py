"""Checkpoints that are damaged, foreign or crafted: refused with their way out, no code run, nothing half loaded."""

import os
import pickle
import warnings

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim
from conftest import TINY_BACKBONE, write_mvtec
from torchvision.transforms import v2

from anomalib_cpr import cli
from anomalib_cpr.checkpoint_check import check_file
from anomalib_cpr.lightning_model import Cpr

HEAD = "model.metric_heads.0.0.weight"
BANK = "model.bank."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("data"))


@pytest.fixture
def datamodule(root):
    return MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)


def make(**arguments):
    given = {"descriptor_channels": 8, "k": 3, "image_size": 64, "visualizer": False, **arguments}
    return Cpr(**{**TINY_BACKBONE, **given})


@pytest.fixture(scope="module")
def checkpoints(root, tmp_path_factory):
    """Files of two trainings, with a plain and with an int8 bank."""
    paths = {}
    for dtype in ("float32", "int8"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(dtype)
        data = MVTecAD(root=root, category="screw", train_batch_size=2, num_workers=0)
        engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, max_steps=2)
        engine.fit(make(bank_dtype=dtype), datamodule=data)
        (paths[dtype],) = folder.rglob("model.ckpt")
    return paths


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# --- files: (how to make it of a good checkpoint's bytes and content, what is said about it)


def flip_a_bit(path, content, data, mark):
    del mark
    place = data.index(content["state_dict"][HEAD].numpy().tobytes()[:64])
    path.write_bytes(data[: place + 9] + bytes([data[place + 9] ^ 1]) + data[place + 10 :])


FILES = {
    "cut off": (lambda path, _, data, __: path.write_bytes(data[: len(data) // 2]), "not a complete checkpoint"),
    "last byte missing": (lambda path, _, data, __: path.write_bytes(data[:-1]), "not a complete checkpoint|damaged"),
    "empty": (lambda path, *_: path.write_bytes(b""), r"\(0 bytes\) is not a complete checkpoint"),
    "text": (lambda path, *_: path.write_text("epoch: 3"), "not a complete checkpoint"),
    "a bit flipped": (flip_a_bit, "does not match its checksum"),
    "code beside the weights": (
        lambda path, content, _, mark: torch.save({**content, "more": Code(mark)}, path),
        r"it asks for posix\.mkdir, and a file that asks for more than tensors and plain values can run code",
    ),
    "code in the hyper-parameters": (
        lambda path, content, _, mark: torch.save({**content, "hyper_parameters": {"k": Code(mark)}}, path),
        "can run code",
    ),
    "code in a bare pickle": (lambda path, _, __, mark: path.write_bytes(pickle.dumps(Code(mark))), "another kind"),
    "a whole model": (lambda path, *_: torch.save(make(), path), r"it asks for anomalib_cpr\.lightning_model\.Cpr"),
    "a list": (lambda path, *_: torch.save([1, 2], path), "not a checkpoint of anomalib"),
    "a bare state dict": (
        lambda path, content, *_: torch.save(content["state_dict"], path),
        "not a checkpoint of anomalib.*import-checkpoint",
    ),
}


def everything(model):
    """What a checkpoint may change."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    own = (model.seed, model.resolved_kind, model.held_out, model.training_paths, model._trained_on)
    return state, (*own, repr(model.pre_processor.transform), model.post_processor.image_sensitivity)


def assert_unchanged(model, before):
    state, own = everything(model)
    assert own == before[1]
    assert state.keys() == before[0].keys()
    for name, value in state.items():
        assert torch.equal(value.nan_to_num(-7), before[0][name].nan_to_num(-7)), name


def load_directly(path, model, datamodule):
    del model, datamodule
    Cpr.load_from_checkpoint(path)


def through(command):
    def run(path, model, datamodule):
        folder = path.parent / "out"
        engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, max_steps=4)
        getattr(engine, command)(model, datamodule=datamodule, ckpt_path=path)

    return run


WAYS = {"load_from_checkpoint": load_directly, **{command: through(command) for command in ("fit", "test", "predict")}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_file(checkpoints, datamodule, tmp_path, name, way):
    make_file, message = FILES[name]
    good = checkpoints["float32"]
    path, mark = tmp_path / "x.ckpt", tmp_path / "code was run"
    make_file(path, torch.load(good, weights_only=True), good.read_bytes(), mark)
    model = make()
    before = everything(model)
    with pytest.raises(Exception, match=message) as error:
        WAYS[way](path, model, datamodule)
    assert str(path) in str(error.value)
    assert not mark.exists()
    assert_unchanged(model, before)


def test_code_in_a_file_to_import(tmp_path, root, capsys):
    path, mark = tmp_path / "x.pth", tmp_path / "code was run"
    torch.save({"lrb.conv.0.4.weight": Code(mark)}, path)
    data = ["--data", "MVTecAD", "--data.root", str(root), "--data.category", "screw"]
    assert cli.main(["import-checkpoint", str(path), "--output", str(tmp_path / "y.ckpt"), *data]) == 1
    assert "cannot be read as weights" in capsys.readouterr().out
    assert not mark.exists()
    assert not (tmp_path / "y.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"lrb.conv.0.4.weight": torch.full((8, 256, 1, 1), float("nan"))}, "holds NaN or infinite numbers"),
        (lambda _: {"lrb.conv.0.4.weight": torch.zeros(8, 256, 1, 1)}, "does not fit backbone.*is missing"),
        (lambda state: state, "is not a checkpoint of the CPR authors' code"),
    ],
)
def test_content_of_a_file_to_import(checkpoints, tmp_path, root, capsys, change, message):
    path = tmp_path / "x.pth"
    torch.save(change(torch.load(checkpoints["float32"], weights_only=True)["state_dict"]), path)
    data = ["--data", "MVTecAD", "--data.root", str(root), "--data.category", "screw"]
    assert cli.main(["import-checkpoint", str(path), "--output", str(tmp_path / "y.ckpt"), *data]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert message.partition(".*")[0] in output or "NaN" in output
    assert not (tmp_path / "y.ckpt").exists()


# --- contents: (what is changed in a good checkpoint, what is said about it)


def of_state(**changes):
    """Replaces tensors; a callable makes them of the old ones, None removes them."""

    def apply(content):
        for name, change in changes.items():
            full = next(key for key in content["state_dict"] if key.replace(".", "_").endswith(name))
            old = content["state_dict"].pop(full)
            if change is not None:
                content["state_dict"][full] = change(old)

    return apply


def of_own(**changes):
    return lambda content: content["cpr"].update(changes)


def spoil(value):
    def apply(tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[3] = value
        return tensor

    return apply


def without_last(tensor):
    return tensor[:-1]


CONTENTS = {
    "no state": (lambda content: content.pop("state_dict"), "has no state_dict"),
    "state of numbers": (lambda content: content["state_dict"].update({HEAD: 3}), "no state dict of tensors"),
    "later format": (of_own(format=99), r"format 99, this anomalib_cpr reads 1 to \d+\. Upgrade"),
    "format 0": (of_own(format=0), "format 0, this anomalib_cpr reads 1 to"),
    "format in words": (of_own(format="two"), "damaged: its format is 'two'"),
    "another kind": (of_own(kind="robot"), "its kind is 'robot', not 'object' or 'texture'"),
    "a seed in words": (of_own(seed="x"), "its seed is 'x'"),
    "k in words": (of_own(k="x"), "its k is 'x'"),
    "no references": (of_own(k=0), "its k is 0, not 1 or more"),
    "windows in words": (of_own(window_sizes="x"), "its window_sizes is 'x'"),
    "even windows": (of_own(window_sizes=[4, 2]), r"its window_sizes are \[4, 2\], not two odd numbers"),
    "one window": (of_own(window_sizes=[3]), r"its window_sizes are \[3\], not two odd numbers"),
    "outlines that are no yes or no": (of_own(follow_edges=1), "its follow_edges is 1"),
    "coherence that is no yes or no": (of_own(coherent_matching="x"), "its coherent_matching is 'x'"),
    "relative that is no yes or no": (of_own(relative_to_image=2), "its relative_to_image is 2"),
    "no blur": (of_own(blur_sigma=0.0), "its blur_sigma is 0.0, not above 0"),
    "blur that is no number": (of_own(blur_sigma=float("nan")), "its blur_sigma is nan, not above 0"),
    "paths in words": (of_own(training_paths="x"), "its training_paths is 'x'"),
    "own part a word": (lambda content: content.update(cpr="x"), "damaged"),
    "NaN in a head": (
        of_state(metric_heads_0_0_weight=spoil(float("nan"))),
        "numbers in model.metric_heads.0.0.weight are NaN",
    ),
    "infinity in the backbone": (
        of_state(network_layer1_0_conv1_weight=spoil(float("inf"))),
        "conv1.weight are NaN or infinite",
    ),
    "NaN in the codebook": (of_state(codebook=spoil(float("nan"))), "codebook are NaN or infinite"),
    "NaN in the bank": (of_state(bank_descriptors_2=spoil(float("nan"))), "descriptors_2 are NaN"),
    "a head missing": (of_state(metric_heads_1_0_bias=None), "metric_heads.1.0.bias is missing"),
    "a head of another shape": (
        of_state(metric_heads_0_0_weight=without_last),
        r"metric_heads\.0\.0\.weight has shape",
    ),
    "codebook of another size": (of_state(codebook=without_last), "codebook has shape"),
    "threshold missing": (of_state(post_processor__image_threshold=None), "_image_threshold is missing"),
    "a weight too many": (lambda content: content["state_dict"].update(extra=torch.zeros(1)), "extra is unknown"),
    "no bank": (
        lambda content: [content["state_dict"].pop(name) for name in [*content["state_dict"]] if BANK in name],
        "bank is damaged: it holds only nothing",
    ),
    "half a bank": (of_state(bank_descriptors_2=None), "it holds only histograms, foregrounds, descriptors_1"),
    "fewer histograms": (of_state(bank_histograms=without_last), "different numbers of images"),
    "fewer descriptors": (of_state(bank_descriptors_1=without_last), "different numbers of images"),
    "other channels": (of_state(bank_descriptors_1=lambda old: old[:, :-1]), "have 7 channels"),
    "other size of one scale": (of_state(bank_descriptors_2=lambda old: old[..., 1:]), "not of one image size"),
    "other size of the foreground": (of_state(bank_foregrounds=lambda old: old[..., 1:]), "not of one image size"),
    "histograms of another grid": (of_state(bank_histograms=lambda old: old[:, :16]), "blocks=4"),
    "histograms of other words": (of_state(bank_histograms=lambda old: old[..., :5]), "codebook_size=5"),
    "histograms that are none": (of_state(bank_histograms=lambda old: old - 1), "not shares of visual words"),
    "flat histograms": (of_state(bank_histograms=lambda old: old.flatten(1)), "histograms has shape"),
    "descriptors of double precision": (of_state(bank_descriptors_1=lambda old: old.double()), "torch.float64"),
    "descriptors of integers": (of_state(bank_descriptors_1=lambda old: old.long()), "torch.int64"),
    "a finer bank": (of_state(bank_descriptors_1=lambda old: old.half()), "not finer"),
    "8 bits without factors": (of_state(bank_scales_1=None), "has no scales"),
    "factors of another shape": (of_state(bank_scales_1=lambda old: old[..., 1:]), "not one factor per descriptor"),
    "a bank elsewhere": (
        lambda content: content["state_dict"].update({BANK + "file_key": torch.arange(32, dtype=torch.uint8)}),
        "descriptors lie in a file of their own: give it as bank_file",
    ),
    "pre-processor of nonsense": (
        lambda content: content.update(anomalib_pre_processor_config={"transform": {"name": "os.system"}}),
        ".",
    ),
}


@pytest.mark.parametrize("way", ["load_from_checkpoint", "test"])
@pytest.mark.parametrize("name", CONTENTS)
def test_content(checkpoints, datamodule, tmp_path, name, way):
    change, message = CONTENTS[name]
    dtype = "int8" if "factors" in name else "float32"
    content = torch.load(checkpoints[dtype], weights_only=True)
    change(content)
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    # One that has something to lose, and of another size and kind.
    model = Cpr.load_from_checkpoint(checkpoints[dtype])
    model.visualizer = None
    model.resolved_kind, model.seed = "texture", 12
    model.pre_processor = Cpr.configure_pre_processor((32, 48))
    with torch.no_grad():
        model.model.metric_heads[0][0].weight.add_(1)
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError, KeyError, TypeError), match=message):
        WAYS[way](path, model, datamodule)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"descriptor_channels": 4}, r"Give Cpr the arguments of its training \(.*descriptor_channels=8"),
        ({"codebook_size": 5}, "codebook_size=12"),
        ({"layers": ["layer2", "layer1"]}, None),
        ({"blocks": 4}, "it was made with blocks=5"),
    ],
)
def test_model_of_another_configuration(checkpoints, datamodule, tmp_path, arguments, message):
    if message is None:
        with pytest.raises(ValueError, match="has stride"):
            make(**arguments)
        return
    model = make(**arguments)
    before = everything(model)
    path = tmp_path / "x.ckpt"
    path.write_bytes(checkpoints["float32"].read_bytes())
    for way in ("fit", "test"):
        with pytest.raises(RuntimeError, match=message):
            WAYS[way](path, model, datamodule)
        assert_unchanged(model, before)
    state = torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="does not fit"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_checkpoint_of_another_model(datamodule, tmp_path):
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    padim = Padim(backbone="resnet18", pre_trained=False, pre_processor=Padim.configure_pre_processor((64, 64)))
    engine.fit(padim, datamodule=datamodule)
    (path,) = tmp_path.rglob("model.ckpt")
    model = make()
    before = everything(model)
    for way in ("test", "load_from_checkpoint"):
        with pytest.raises(ValueError, match=r"not a checkpoint of Cpr.*Was it written by another model\?"):
            WAYS[way](path, model, datamodule)
    assert_unchanged(model, before)


# --- what is a good checkpoint stays one


def test_a_checkpoint_of_format_1(checkpoints, datamodule, tmp_path):
    """Its time knew fewer arguments, and kept less beside the weights."""
    content = torch.load(checkpoints["float32"], weights_only=True)
    content["cpr"] = {"format": 1, "seed": 3, "kind": "object"}
    for name in ("max_references", "bank_on_host", "resume_point_minutes", "seed", "clustering_backend"):
        del content["hyper_parameters"][name]
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    old = Cpr.load_from_checkpoint(path).eval()
    new = Cpr.load_from_checkpoint(
        checkpoints["float32"], blur_sigma=4, follow_edges=False, coherent_matching=False, relative_to_image=False
    ).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(old(images).anomaly_map, new(images).anomaly_map), "it was trained with a blur of 4 pixels"
    assert Cpr.load_from_checkpoint(path, follow_edges=True).model.follow_edges
    assert Cpr.load_from_checkpoint(path, coherent_matching=True).model.coherent_matching
    assert Cpr.load_from_checkpoint(path, relative_to_image=True).model.relative_to_image
    assert Cpr.load_from_checkpoint(path, blur_sigma=3).model.scorer.kernel.numel() == 25
    own = Cpr.load_from_checkpoint(checkpoints["float32"]).eval()
    assert not torch.equal(own(images).anomaly_map, new(images).anomaly_map)
    assert old.seed == 3
    WAYS["test"](path, make(), datamodule)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"format": 9, "unaligned_matching": True, "k": 11},
            "took all 11 references at the coarse scale, where now 10",
        ),
        ({"format": 10, "unaligned_matching": True, "k": 11}, None),
        ({"format": 9, "unaligned_matching": True, "k": 10}, None),
        ({"format": 9, "k": 11}, None),
        ({"format": 10, "window_sizes": [999, 999]}, "searched the whole map for patches of stride 4 too"),
        ({"format": 11, "window_sizes": [999, 999]}, None),
        ({"format": 10, "window_sizes": [3, 999]}, None),
    ],
)
def test_a_checkpoint_whose_maps_are_others_today(checkpoints, tmp_path, own, words):
    content = torch.load(checkpoints["float32"], weights_only=True)
    content["cpr"] |= {"coherent_matching": False, **own}
    content["hyper_parameters"] |= {"k": None, "window_sizes": None}
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Cpr.load_from_checkpoint(path)
    about_maps = [str(one.message) for one in seen if "maps and scores differ" in str(one.message)]
    assert [words in message for message in about_maps] == [True] if words else not about_maps


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"k": 1}, False),
        ({"k": 50}, False),
        ({"bank_dtype": "float16"}, False),
        ({"bank_dtype": "int4"}, False),
        ({"max_references": 2}, False),
        ({}, True),
    ],
)
def test_other_values_where_they_may_differ(checkpoints, arguments, same):
    images = torch.rand(2, 3, 64, 64)
    expected = Cpr.load_from_checkpoint(checkpoints["float32"]).eval()(images)
    result = Cpr.load_from_checkpoint(checkpoints["float32"], **arguments).eval()(images)
    assert result.anomaly_map.isfinite().all()
    assert torch.equal(result.anomaly_map, expected.anomaly_map) == same


def test_another_image_size_says_so(checkpoints):
    model = Cpr.load_from_checkpoint(checkpoints["float32"]).eval()
    model.pre_processor = Cpr.configure_pre_processor((32, 48))
    with pytest.raises(ValueError, match=r"32x48 pixels cannot be compared with the reference bank.*64x64"):
        model(torch.rand(1, 3, 64, 64))


def test_user_who_trusts_a_file_may_load_it(checkpoints, tmp_path):
    mark = tmp_path / "code was run"
    torch.save({**torch.load(checkpoints["float32"], weights_only=True), "more": Code(mark)}, tmp_path / "x.ckpt")
    Cpr.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert mark.exists()


def test_what_is_no_local_file_is_left_to_lightning(tmp_path):
    check_file("https://example.com/model.ckpt")
    with pytest.raises(FileNotFoundError):
        Cpr.load_from_checkpoint(tmp_path / "absent.ckpt")


def test_transforms_that_a_checkpoint_cannot_carry_stay_a_warning(root, datamodule, tmp_path):
    """anomalib's rule; the check must not make an error of it."""
    del root
    transform = v2.Compose([v2.Resize((64, 64)), v2.RandomInvert(0.0), v2.Normalize([0.5] * 3, [0.2] * 3)])
    model = Cpr(**TINY_BACKBONE, descriptor_channels=8, k=3, visualizer=False)
    model.pre_processor.transform = transform
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_steps=1)
    engine.fit(model, datamodule=datamodule)
    (path,) = tmp_path.rglob("model.ckpt")
    Cpr.load_from_checkpoint(path)

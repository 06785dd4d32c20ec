"""Training, resuming and evaluating through anomalib's real Engine."""

from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import BTech, Folder, MVTec3D, MVTecAD, Visa
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator
from anomalib.models import Padim
from conftest import draw, write_mvtec
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torchvision.transforms import v2

from anomalib_cpr import drawing, lightning_bank, lightning_model, lightning_preparation
from anomalib_cpr.drawn_data import DrawnParts
from anomalib_cpr.gallery_pictures import ImageReader, find_training_images, reference_pictures
from anomalib_cpr.lightning_model import Cpr
from anomalib_cpr.matching_choice import WEAK_OPACITY, Evidence, Matching
from anomalib_cpr.metric_head import MetricHead
from anomalib_cpr.scoring_settings import PAPER_SETTINGS, TRAINING_SETTINGS, settings_of
from anomalib_cpr.training_steps import learning_rate_factor


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "num_batches" not in name}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture
def engine(tmp_path):
    def make(**arguments):
        return Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, **arguments)

    return make


class Spy(Callback):
    """Counts steps and keeps what was logged."""

    def __init__(self, stop_at=None, error=KeyboardInterrupt):
        self.steps, self.logged, self.stop_at, self.error = 0, {}, stop_at, error

    def on_train_batch_end(self, trainer, *_):
        self.steps += 1
        self.logged.update(trainer.logged_metrics)
        if trainer.global_step == self.stop_at:
            raise self.error


def test_whole_round(engine, tiny_model, tiny_datamodule, tmp_path):
    """Fit, validate, test, predict; the checkpoint gives the same predictions in a fresh model."""
    spy = Spy()
    model, own = tiny_model(), engine(max_epochs=1, callbacks=[spy], log_every_n_steps=1)
    own.fit(model, datamodule=tiny_datamodule)
    assert spy.steps == 3, "6 images in batches of 2"
    assert {"train_loss", "train_loss_positive", "train_loss_negative"} <= set(spy.logged)
    own.validate(model, datamodule=tiny_datamodule)
    (metrics,) = own.test(model, datamodule=tiny_datamodule)
    assert metrics["image_AUROC"] >= 0.5
    predictions = own.predict(model, datamodule=tiny_datamodule)
    assert sum(len(batch.image) for batch in predictions) == 6
    assert all(batch.anomaly_map.shape[-2:] == (64, 64) for batch in predictions)
    assert list(tmp_path.rglob("images/**/*.png")), "the visualizer drew"

    (checkpoint,) = tmp_path.rglob("model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    assert_same(weights(model.model), weights(loaded.model))
    assert loaded.resolved_kind == "object"
    images = torch.rand(2, 3, 50, 70)
    model.eval(), loaded.eval()
    assert torch.equal(model(images).pred_score, loaded(images).pred_score)
    fresh = engine().predict(tiny_model(), datamodule=tiny_datamodule, ckpt_path=checkpoint)
    for first, second in zip(predictions, fresh, strict=True):
        assert torch.equal(first.pred_score, second.pred_score)
        assert torch.equal(first.anomaly_map, second.anomaly_map)


@pytest.mark.parametrize(("image_size", "expected"), [(64, (64, 64)), ([48, 80], (48, 80))])
def test_image_size(engine, tiny_model, tiny_datamodule, tmp_path, image_size, expected):
    model = tiny_model(image_size=image_size)
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint, weights_only=True).eval()
    assert loaded(torch.rand(1, 3, 50, 70)).anomaly_map.shape[-2:] == expected


def test_turned_copies_join_the_gallery(engine, tiny_model, tiny_datamodule, tmp_path):
    """The pairs of a step never show one photograph twice, and `explain` finds out which copy a reference is."""
    model = tiny_model(rotations=[90, -5], k=3)
    seen = []
    compare = model.compare_pairs
    model.compare_pairs = lambda *a: seen.append(model._training_data.neighbours) or compare(*a)
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    assert len(model.model.bank) == 18, "6 images, each with 2 copies"
    assert (seen[0] // 3 != torch.arange(18)[:, None] // 3).all()
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    assert (loaded.rotations, loaded.copies_in_bank) == ((90, -5), 3)
    reader = ImageReader(loaded.pre_processor, loaded.device, loaded.rotations)
    files = find_training_images(loaded.training_paths)
    pictures = reference_pictures(loaded.model, reader, files, [3, 4, 5])
    assert all(picture.as_trained for picture in pictures)
    name = files[3].name
    assert [picture.name for picture in pictures] == [name, f"{name}, turned by 90°", f"{name}, turned by -5°"]
    torch.testing.assert_close(pictures[1].colours, pictures[0].colours.rot90(1, (1, 2)), atol=1e-5, rtol=0)


USUAL, WHOLE, ALL_OF_WHOLE = Matching(10, (3, 1)), Matching(10, (999, 999)), Matching(13, (999, 999))


@pytest.mark.parametrize(
    ("given", "looks", "values", "expected"),
    [
        ({}, 3.0, {USUAL: 1.0, Matching(13, (3, 1)): 1.1, WHOLE: 1.4, ALL_OF_WHOLE: 1.35}, WHOLE),
        ({}, 3.0, {USUAL: 1.0, Matching(13, (3, 1)): 1.3, WHOLE: 1.6, ALL_OF_WHOLE: 1.9}, ALL_OF_WHOLE),
        ({}, 3.0, {USUAL: 1.0, Matching(13, (3, 1)): 1.3, WHOLE: 1.4, ALL_OF_WHOLE: 1.5}, Matching(13, (3, 1))),
        ({}, 3.0, {USUAL: 1.0, Matching(13, (3, 1)): 1.4, WHOLE: 1.2, ALL_OF_WHOLE: 1.3}, Matching(13, (3, 1))),
        ({}, 1.2, {USUAL: 1.0, Matching(13, (3, 1)): 1.4, WHOLE: 1.2, ALL_OF_WHOLE: 1.3}, Matching(13, (3, 1))),
        ({}, 1.2, {USUAL: 1.0, Matching(13, (3, 1)): 1.1, WHOLE: 1.4, ALL_OF_WHOLE: 1.5}, ALL_OF_WHOLE),
        ({}, 1.05, {USUAL: 1.0, Matching(13, (3, 1)): 1.4}, Matching(13, (3, 1))),
        ({}, 1.05, {USUAL: 1.0, Matching(13, (3, 1)): 1.2}, USUAL),
        ({}, 1.05, None, USUAL),  # no anomaly found a place
        ({"k": 3}, 3.0, {Matching(3, (3, 1)): 1.0, Matching(3, (999, 999)): 2.0}, Matching(3, (999, 999))),
        ({"k": 3}, 1.05, "not asked", Matching(3, (3, 1))),
        (
            {"window_sizes": [5, 3]},
            3.0,
            {Matching(10, (5, 3)): 1, Matching(13, (5, 3)): 2},
            Matching(13, (5, 3)),
        ),
        ({"k": 3, "window_sizes": [5, 3]}, 3.0, "not asked", Matching(3, (5, 3))),
        (
            {
                "k": 3,
                "window_sizes": [5, 3],
                "coherent_matching": True,
                "averaged_descriptors": False,
                "recoloured_anomalies": 0.1,
            },
            "not asked",
            "not asked",
            Matching(3, (5, 3)),
        ),
    ],
)
def test_references_and_windows_are_chosen_by_evidence(
    engine, tiny_model, monkeypatch, tmp_path, given, looks, values, expected
):
    """And whatever was chosen is in the checkpoint, for those who load it in one way or another."""
    asked, root = [], write_mvtec(tmp_path / "data", train=14)
    datamodule = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)

    def look(queries, references):
        asked.append("looks")
        assert [len(queries), len(references)] == [12, 12]
        assert queries[0].shape == references[0].shape[1:]
        return looks

    def compare(model, images, in_bank, weak, _generator, options, _track):
        asked.append("compares")
        assert weak.blend == WEAK_OPACITY
        assert len(model.bank) == len(images) == len(in_bank) == 14, "once the heads are trained"
        assert list(options) == list(values or [USUAL, Matching(13, (3, 1))])
        return {option: Evidence(values[option], 2 * values[option] ** 2) for option in options} if values else {}

    for module in (lightning_preparation, lightning_bank):
        monkeypatch.setattr(module, "ENOUGH_IMAGES", 6)
    monkeypatch.setattr(lightning_preparation, "looseness", look)
    monkeypatch.setattr(lightning_bank, "compare_matchings", compare)
    model = tiny_model(**{"k": None, **given})
    model.model.feature_extractor.weights_loaded.fill_(True)
    model.model.pre_trained = True  # random weights in fact
    trainer = engine(max_steps=1)
    trainer.fit(model, datamodule=datamodule)
    assert (model.model.k, model.model.window_sizes) == expected
    aligned = looks != 3.0 and expected.window_sizes != (999, 999)
    assert model.model.coherent_matching is given.get("coherent_matching", aligned), "not for loose parts"
    assert model.model.unaligned_matching is (looks == 3.0)
    assert model.model.averaged_descriptors is (looks == 3.0), "only of loose parts"
    assert model.model.colour_matching is (looks == 3.0)
    assert (len(model.model.bank.colours) == 14) is (looks == 3.0)
    assert asked == [*(["looks"] if looks != "not asked" else []), *(["compares"] if values != "not asked" else [])]

    (checkpoint,) = tmp_path.rglob("model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    assert (loaded.model.k, loaded.model.window_sizes) == expected
    assert loaded.model.averaged_descriptors is loaded.model.colour_matching is (looks == 3.0)
    other = tiny_model(**{"k": None, **given})
    trainer.test(other, datamodule=datamodule, ckpt_path=str(checkpoint))
    assert (other.model.k, other.model.window_sizes) == expected
    assert other.model.averaged_descriptors is (looks == 3.0)
    overruled = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, window_sizes=[1, 1], k=4)
    assert (overruled.model.k, overruled.model.window_sizes) == (4, (1, 1))


def test_a_resumed_training_decides_anew(engine, tiny_model, monkeypatch, tmp_path):
    """It went on without coherent matching, where the checkpoint had searched the whole map."""
    root = write_mvtec(tmp_path / "data", train=14)
    datamodule = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)
    best = WHOLE

    def compare(_model, _images, _in_bank, _weak, _generator, options, _track):
        return {option: Evidence(2.0 if option == best else 1.0, 5.0) for option in options}

    for module in (lightning_preparation, lightning_bank):
        monkeypatch.setattr(module, "ENOUGH_IMAGES", 6)
    monkeypatch.setattr(lightning_preparation, "looseness", lambda *_: 1.2)
    monkeypatch.setattr(lightning_bank, "compare_matchings", compare)
    decided = []
    for steps in (1, 2):
        model = tiny_model(k=None)
        model.model.feature_extractor.weights_loaded.fill_(True)
        model.model.pre_trained = True  # random weights in fact
        checkpoints = [*tmp_path.rglob("model.ckpt")]
        engine(max_steps=steps).fit(model, datamodule=datamodule, ckpt_path=checkpoints[0] if checkpoints else None)
        decided.append((model.model.window_sizes, model.model.coherent_matching))
        best = USUAL
    assert decided == [((999, 999), False), ((3, 1), True)]


def test_a_checkpoint_brings_its_k_its_windows_its_blur_and_its_outlines(engine, tiny_model, tiny_datamodule, tmp_path):
    """To whoever names none: the threshold in it belongs to them. As do the authors' values to their checkpoints."""
    engine(max_steps=1).fit(
        tiny_model(
            k=4,
            window_sizes=[5, 3],
            blur_sigma=4,
            follow_edges=False,
            coherent_matching=False,
            relative_to_image=False,
        ),
        datamodule=tiny_datamodule,
    )
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    model = tiny_model(k=None)
    engine().test(model, datamodule=tiny_datamodule, ckpt_path=str(checkpoint))
    assert (model.model.k, model.model.window_sizes) == (4, (5, 3))
    assert model.model.scorer.kernel.numel() == 33
    assert not model.model.follow_edges
    assert not model.model.coherent_matching
    assert not model.model.relative_to_image
    other = tiny_model(
        window_sizes=[1, 1], blur_sigma=1, follow_edges=True, coherent_matching=True, relative_to_image=True
    )
    engine().test(other, datamodule=tiny_datamodule, ckpt_path=str(checkpoint))
    assert other.model.window_sizes == (1, 1)
    assert other.model.scorer.kernel.numel() == 9
    assert other.model.follow_edges
    assert other.model.coherent_matching
    assert other.model.relative_to_image


@pytest.mark.parametrize(
    ("kind", "coherent", "unaligned", "expected"),
    [
        ("object", None, None, (True, False)),
        ("texture", None, None, (False, True)),
        ("texture", True, None, (True, False)),
        ("object", False, None, (False, False)),
        ("object", None, True, (False, True)),
        ("texture", None, False, (False, False)),
    ],
)
def test_objects_are_matched_coherently_and_textures_as_unaligned(
    kind, coherent, unaligned, expected, engine, tiny_model, tiny_datamodule, tmp_path
):
    model = tiny_model(kind=kind, coherent_matching=coherent, unaligned_matching=unaligned)
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    assert (model.model.coherent_matching, model.model.unaligned_matching) == expected
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint)
    assert (loaded.model.coherent_matching, loaded.model.unaligned_matching) == expected
    overruled = Cpr.load_from_checkpoint(checkpoint, unaligned_matching=True, coherent_matching=None)
    assert (overruled.model.coherent_matching, overruled.model.unaligned_matching) == (False, True)


@pytest.mark.parametrize("averaged", [True, False])
def test_descriptors_are_averaged_as_the_bank_of_a_checkpoint_is(
    averaged, engine, tiny_model, tiny_datamodule, tmp_path
):
    model = tiny_model(averaged_descriptors=averaged)
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    assert model.model.averaged_descriptors is averaged
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    images = torch.rand(2, 3, 64, 64)
    loaded = Cpr.load_from_checkpoint(checkpoint, averaged_descriptors=None).eval()
    assert loaded.model.averaged_descriptors is averaged
    assert torch.equal(loaded.model(images).anomaly_map, model.eval().model(images).anomaly_map)
    by_state = tiny_model(averaged_descriptors=None)
    by_state.load_state_dict(model.state_dict())
    assert by_state.model.averaged_descriptors is averaged
    message = f"made with averaged_descriptors={averaged}, which a bank keeps"
    with pytest.raises(RuntimeError, match=message):
        Cpr.load_from_checkpoint(checkpoint, averaged_descriptors=not averaged)
    with pytest.raises(RuntimeError, match=message):
        tiny_model(averaged_descriptors=not averaged).load_state_dict(model.state_dict())


def test_colours_are_weighed_by_good_images_and_stay_with_the_bank(engine, tiny_model, tiny_datamodule, tmp_path):
    arguments = {"unaligned_matching": True, "colour_matching": True}
    model = tiny_model(**arguments)
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    assert len(model.model.bank.colours) == len(model.model.bank)
    scale = float(model.model.bank.colour_scale)
    assert scale not in (0, 1)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    images = torch.rand(2, 3, 64, 64)
    for given in ({}, {"colour_matching": None}, {"bank_dtype": "int4"}):
        loaded = Cpr.load_from_checkpoint(checkpoint, **given).eval()
        assert loaded.model.colour_matching
        assert float(loaded.model.bank.colour_scale) == scale
        if "bank_dtype" not in given:
            assert torch.equal(loaded.model(images).anomaly_map, model.eval().model(images).anomaly_map)
    message = "made with colour_matching=True, which a bank keeps"
    with pytest.raises(RuntimeError, match=message):
        Cpr.load_from_checkpoint(checkpoint, colour_matching=False)
    with pytest.raises(RuntimeError, match="made with colour_matching=False"):
        model.load_state_dict(tiny_model(unaligned_matching=True).state_dict())


@pytest.mark.parametrize("stage", ["compare_matchings", "colour_scale_of"])
def test_a_bank_that_nothing_was_decided_on_is_dropped(engine, tiny_model, tmp_path, monkeypatch, stage):
    """So that the checkpoint of an interrupted training has a bank that was."""
    for module in (lightning_preparation, lightning_bank):
        monkeypatch.setattr(module, "ENOUGH_IMAGES", 6)
    root = write_mvtec(tmp_path / "data", train=14)
    datamodule = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)
    asked, real = [], getattr(lightning_bank, stage)

    def interrupted(*arguments):
        asked.append(stage)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(lightning_bank, stage, interrupted)
    model = tiny_model(k=None, unaligned_matching=True, colour_matching=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        engine(max_steps=1).fit(model, datamodule=datamodule)
    (checkpoint,) = tmp_path.rglob("interrupted.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint)
    assert len(asked) == 2
    assert float(loaded.model.bank.colour_scale) not in (0, 1)
    assert len(loaded.model.bank) == 14


@pytest.mark.parametrize("arguments", [{"max_references": 4}, {"rotations": [90.0]}, {"bank_file": "bank"}])
def test_colours_go_wherever_a_bank_goes(engine, tiny_model, tiny_datamodule, tmp_path, arguments):
    if "bank_file" in arguments:
        arguments = {"bank_file": str(tmp_path / "bank")}
    model = tiny_model(unaligned_matching=True, colour_matching=True, **arguments)
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    bank = model.model.bank
    assert len(bank.colours) == len(bank) == len(bank.histograms)
    (checkpoint,) = (path for path in tmp_path.rglob("*.ckpt") if path.name == "model.ckpt")
    loaded = Cpr.load_from_checkpoint(checkpoint).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.model(images).anomaly_map, model.eval().model(images).anomaly_map)
    assert torch.equal(loaded.model.bank.colours, bank.colours)


def test_parts_cannot_be_both_aligned_and_not(tiny_model):
    with pytest.raises(ValueError, match="coherent_matching=True contradicts unaligned_matching=True"):
        tiny_model(coherent_matching=True, unaligned_matching=True)


@pytest.mark.parametrize(
    ("kind", "loose", "given", "expected"),
    [
        ("texture", False, {}, (0.3, 0.0)),
        ("object", False, {}, (0.0, 0.15)),
        ("object", True, {}, (0.3, 0.15)),
        ("object", False, {"recoloured_anomalies": 0.6}, (0.6, 0.15)),
        ("object", False, {"recoloured_anomalies": 0.9}, (0.9, 0.1)),
        ("object", True, {"displaced_anomalies": 0.9}, (0.1, 0.9)),
        ("texture", False, {"displaced_anomalies": 0.2}, (0.3, 0.2)),
        ("texture", True, {"recoloured_anomalies": 0.0}, (0.0, 0.0)),
        ("object", False, {"displaced_anomalies": 0.0}, (0.0, 0.0)),
    ],
)
def test_shares_of_recoloured_and_displaced_anomalies(
    engine, tiny_model, tiny_datamodule, monkeypatch, kind, loose, given, expected
):
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((trainer.global_step, pl_module._synthesise.recoloured, pl_module._synthesise.displaced))

    monkeypatch.setattr(Cpr, "_survey_looseness", lambda *_: 3.0 if loose else 1.0)
    monkeypatch.setattr(Cpr, "_decide_on_matching", lambda *_, **__: None)
    model = tiny_model(kind=kind, **given)
    engine(max_steps=1, limit_val_batches=0, callbacks=[Look()]).fit(model, datamodule=tiny_datamodule)
    assert seen == [(0, *map(pytest.approx, expected))]


def test_untrained_features_and_few_images_tell_nothing_about_windows(engine, tiny_model, tiny_datamodule, monkeypatch):
    monkeypatch.setattr(lightning_preparation, "looseness", None)
    engine(max_steps=1, limit_val_batches=0).fit(tiny_model(), datamodule=tiny_datamodule)
    monkeypatch.setattr(lightning_preparation, "ENOUGH_IMAGES", 2)
    engine(max_steps=1, limit_val_batches=0).fit(tiny_model(), datamodule=tiny_datamodule)


@pytest.mark.data
@pytest.mark.parametrize(("category", "varied"), [("pills", True), ("gear", True), ("bracket", False)])
def test_more_references_for_drawn_parts_that_vary(engine, data_root, tmp_path, category, varied):
    model = Cpr(
        backbone_weights=data_root / "weights" / "densenet201_to_denseblock2.pth",
        descriptor_channels=16,
        image_size=160,
        seed=0,
    )
    data = DrawnParts(root=tmp_path, category=category, image_size=160, train_images=40, num_workers=0)
    engine(max_steps=10, limit_val_batches=0).fit(model, datamodule=data)
    assert (model.model.k > 10) == varied


def test_scores_do_not_tie(engine, tiny_model, tiny_datamodule):
    model = tiny_model()
    engine(max_steps=2).fit(model, datamodule=tiny_datamodule)
    tiny_datamodule.setup()
    model.eval()
    images = torch.stack([model.pre_processor(item.image[None])[0] for item in tiny_datamodule.test_data])
    scores = model.model(images).pred_score
    assert ((scores >= 0) & (scores <= 1)).all()
    assert len(scores.unique()) == len(scores)


def test_one_seed_gives_one_result(engine, tiny_model, mvtec_root):
    results = []
    for workers in (0, 1):
        seed_everything(3, verbose=False)
        data = MVTecAD(root=mvtec_root, category="screw", train_batch_size=2, num_workers=workers)
        model = tiny_model()
        engine(max_steps=3, limit_val_batches=0).fit(model, datamodule=data)
        results.append(weights(model.model))
    assert_same(*results)
    seed_everything(4, verbose=False)
    other = tiny_model()
    engine(max_steps=3, limit_val_batches=0).fit(other, datamodule=data)
    assert not torch.equal(results[0]["metric_heads.0.0.weight"], other.model.metric_heads[0][0].weight)


def test_training_in_bfloat16_repeats_and_leaves_the_rest_in_float32(engine, tiny_model, tiny_datamodule):
    results = []
    for precision in ("bfloat16", "bfloat16", "float32"):
        seed_everything(3, verbose=False)
        model = tiny_model(training_precision=precision)
        engine(max_steps=3, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
        results.append(weights(model.model))
    first, again, exact = results
    assert_same(first, again)
    assert all(value.dtype != torch.bfloat16 for value in first.values())
    for name in ("global_retriever.codebook", "bank.histograms", "bank.foregrounds"):
        assert torch.equal(first[name], exact[name]), name
    assert not torch.equal(first["metric_heads.0.0.weight"], exact["metric_heads.0.0.weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_steps_keep_memory_and_the_bank_gets_it_back(engine, tiny_model, tiny_datamodule, monkeypatch, fails):
    calls = []
    monkeypatch.setattr(lightning_model, "keep_freed_memory", lambda: calls.append("keep"))
    for module in (lightning_model, lightning_bank):
        monkeypatch.setattr(module, "return_freed_memory", lambda: calls.append("return"))
    model = tiny_model()
    remember = model.model.remember
    monkeypatch.setattr(model.model, "remember", lambda *args: (calls.append("bank"), remember(*args))[1])
    if fails:

        def fail(*_):
            raise ValueError("a step fails")

        monkeypatch.setattr(model, "compare_pairs", fail)
        with pytest.raises(ValueError, match="a step fails"):
            engine(max_steps=2, limit_val_batches=0, accelerator="cpu").fit(model, datamodule=tiny_datamodule)
        assert calls == ["keep", "return"]
    else:
        engine(max_steps=2, limit_val_batches=0, accelerator="cpu").fit(model, datamodule=tiny_datamodule)
        assert calls == ["keep", "keep", "return", "bank", "return"]


def test_heads_are_centred_once_before_the_first_step(engine, tiny_model, tiny_datamodule, monkeypatch):
    centred = []
    original = MetricHead.centre
    monkeypatch.setattr(MetricHead, "centre", lambda head, features: (centred.append(head), original(head, features)))
    model = tiny_model()
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    assert centred == model.model.heads
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    engine(max_steps=1, limit_val_batches=0).fit(tiny_model(centred_start=False), datamodule=tiny_datamodule)
    assert len(centred) == 2, "neither trained heads nor those of the paper"


def test_a_seed_of_its_own_gives_one_result(engine, tiny_model, tiny_datamodule):
    """For anomalib's command line, which takes --seed_everything and never applies it."""
    results = []
    for _ in range(2):
        torch.seed()
        model = tiny_model(seed=3)
        engine(max_steps=2, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
        results.append(weights(model.model))
    assert_same(*results)


def test_a_fit_does_not_depend_on_what_the_model_has_loaded_before(engine, tiny_model, tiny_datamodule, tmp_path):
    papers = {"blur_sigma": 4, "follow_edges": False, "coherent_matching": False, "relative_to_image": False}
    engine(max_steps=1).fit(tiny_model(**papers), datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    model = tiny_model(relative_to_image=False)
    engine().test(model, datamodule=tiny_datamodule, ckpt_path=str(checkpoint))
    assert settings_of(model.model) == {**PAPER_SETTINGS, "k": 3}
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    assert settings_of(model.model) == {**TRAINING_SETTINGS, "k": 3, "relative_to_image": False}


@pytest.mark.parametrize("steps", [5, 100, 300])
def test_the_first_step_has_its_learning_rate(engine, tiny_model, tiny_datamodule, steps):
    """Also in a second fit, whose scheduler is made before it has a plan of its own."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])
            raise ZeroDivisionError

    model = tiny_model()
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    with pytest.raises(ZeroDivisionError):
        engine(max_steps=steps, limit_val_batches=0, callbacks=[Look()]).fit(model, datamodule=tiny_datamodule)
    assert seen == [1e-3 * learning_rate_factor(0, steps, "cosine", 20)]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_before_the_steps_of_a_second_fit_leaves_the_first(
    engine, tiny_model, tiny_datamodule, tmp_path, monkeypatch, stop
):
    model, own = tiny_model(), engine(max_steps=2, limit_val_batches=0)
    own.fit(model, datamodule=tiny_datamodule)
    before = weights(model.model)
    monkeypatch.setattr(lightning_preparation, "load_training_images", mock.Mock(side_effect=stop))
    with pytest.raises(SystemExit if stop is KeyboardInterrupt else stop):
        own.fit(model, datamodule=tiny_datamodule)
    assert_same(before, weights(model.model))
    assert not [*tmp_path.rglob("resume.ckpt"), *tmp_path.rglob("interrupted.ckpt")]


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({"kind": "texture"}, lambda images: images, "kind='texture' was given, but .* was trained as 'object'"),
        ({}, lambda images: images.flip(0), r"trained on another image in place of .*000\.png"),
    ],
)
def test_a_training_resumes_with_what_it_had(
    engine, tiny_model, tiny_datamodule, tmp_path, monkeypatch, arguments, change, message
):
    interrupt(engine, tiny_model(), tiny_datamodule, 2, max_steps=4)
    (usable,) = tmp_path.rglob("interrupted.ckpt")
    load = lightning_preparation.load_training_images

    def load_others(*given):
        images = load(*given)
        images.images = change(images.images)
        return images

    monkeypatch.setattr(lightning_preparation, "load_training_images", load_others)
    with pytest.raises(ValueError, match=message):
        engine(max_steps=4).fit(tiny_model(**arguments), datamodule=tiny_datamodule, ckpt_path=usable)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_other_numbers_than_float32_are_refused(engine, tiny_model, tiny_datamodule, precision):
    with pytest.raises(ValueError, match=f"precision='{precision}': retrieval needs float32"):
        engine(max_steps=1, precision=precision).fit(tiny_model(), datamodule=tiny_datamodule)


def interrupt(engine, model, datamodule, stop_at, error=KeyboardInterrupt, **limits):
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        engine(callbacks=[Spy(stop_at, error)], limit_val_batches=0, **limits).fit(model, datamodule=datamodule)


@pytest.mark.parametrize(
    ("limits", "arguments"),
    [
        ({"max_steps": 6}, {}),
        ({"max_epochs": 2}, {}),
        ({"max_steps": 6, "accumulate_grad_batches": 2}, {}),
        ({"max_steps": 6}, {"max_references": 4}),  # the checkpoint's bank has forgotten two images
        ({"max_epochs": 2}, {"bank_dtype": "int4"}),  # and here, what exactly the foregrounds were
    ],
)
def test_interrupted_training_resumes_bit_identically(
    engine, tiny_model, tiny_datamodule, tmp_path, monkeypatch, limits, arguments
):
    seed_everything(5, verbose=False)
    whole = tiny_model(**arguments)
    engine(limit_val_batches=0, **limits).fit(whole, datamodule=tiny_datamodule)

    seed_everything(5, verbose=False)
    interrupt(engine, tiny_model(**arguments), tiny_datamodule, 4, **limits)
    (usable,) = tmp_path.rglob("interrupted.ckpt")

    seed_everything(99, verbose=False)  # the checkpoint's seed counts
    monkeypatch.setattr(lightning_preparation, "collect_samples", None)  # nothing is learned twice
    monkeypatch.setattr(lightning_preparation, "cluster_centres", None)
    resumed, spy = tiny_model(**arguments), Spy()
    engine(limit_val_batches=0, callbacks=[spy], **limits).fit(resumed, datamodule=tiny_datamodule, ckpt_path=usable)
    assert spy.steps == 2 * limits.get("accumulate_grad_batches", 1), "six steps in all, four were done"
    assert_same(weights(whole.model), weights(resumed.model))


class StopAfter(Callback):
    """Ctrl-C after so many batches."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_start(self, *_):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("name", ["interrupted.ckpt", "resume.ckpt"])
@pytest.mark.parametrize("batches", [3, 4, 5, 8])
def test_a_step_of_several_batches_is_done_again_as_a_whole(
    engine, tiny_model, tiny_datamodule, tmp_path, name, batches
):
    limits = {"max_steps": 3, "accumulate_grad_batches": 3, "limit_val_batches": 0}
    whole = tiny_model(seed=5)
    engine(**limits).fit(whole, datamodule=tiny_datamodule)
    with pytest.raises(SystemExit):
        engine(callbacks=[StopAfter(batches)], **limits).fit(tiny_model(seed=5), datamodule=tiny_datamodule)
    (point,) = tmp_path.rglob(name)
    resumed = tiny_model(seed=5)
    engine(**limits).fit(resumed, datamodule=tiny_datamodule, ckpt_path=point)
    assert_same(weights(whole.model), weights(resumed.model))


def test_resume_points_lie_between_steps(engine, tiny_model, tiny_datamodule, tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_):
            for point in tmp_path.rglob("resume.ckpt"):
                loops = torch.load(point, weights_only=True)["loops"]["fit_loop"]
                seen.append(loops["epoch_loop.batch_progress"]["current"]["processed"])

    limits = {"max_steps": 3, "accumulate_grad_batches": 3, "limit_val_batches": 0}
    engine(callbacks=[Look()], **limits).fit(tiny_model(resume_point_minutes=0.0), datamodule=tiny_datamodule)
    assert seen == [3, 3, 3, 6, 6, 6]


@pytest.mark.parametrize("name", ["interrupted.ckpt", "resume.ckpt"])
def test_train_tests_what_it_has_trained_and_not_what_it_went_on_from(
    engine, tiny_model, tiny_datamodule, tmp_path, name
):
    interrupt(engine, tiny_model(), tiny_datamodule, 2, max_steps=6)
    (point,) = tmp_path.rglob(name)
    before = torch.load(point, weights_only=True)["state_dict"]["model.metric_heads.0.0.weight"]
    model, own = tiny_model(), engine(max_steps=6)
    (metrics,) = own.train(model, datamodule=tiny_datamodule, ckpt_path=point)
    after = weights(model.model)
    assert not torch.equal(after["metric_heads.0.0.weight"], before)
    checkpoint = own.trainer.checkpoint_callback.best_model_path
    loaded = tiny_model()
    (again,) = engine().test(loaded, datamodule=tiny_datamodule, ckpt_path=checkpoint)
    assert_same(after, weights(loaded.model))
    assert metrics == again
    if name == "interrupted.ckpt":  # asked for by itself, it is tested
        own.test(model, datamodule=tiny_datamodule, ckpt_path=point)
        assert torch.equal(model.model.state_dict()["metric_heads.0.0.weight"], before)


def test_an_engine_that_goes_on_with_another_model(engine, tiny_model, tiny_datamodule, tmp_path):
    class Fail(Callback):
        def on_train_batch_end(self, _trainer, pl_module, *_):
            if isinstance(pl_module, Padim):
                raise ZeroDivisionError

    engine(max_steps=1, limit_val_batches=0).fit(tiny_model(), datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    own = engine(max_steps=2, limit_val_batches=0, callbacks=[Fail()])
    own.predict(tiny_model(), datamodule=tiny_datamodule, ckpt_path=checkpoint)
    with pytest.raises(ZeroDivisionError):
        own.fit(Padim(layers=["layer1"], n_features=8, pre_trained=False), datamodule=tiny_datamodule)


def test_ctrl_c_keeps_a_usable_checkpoint(engine, tiny_model, tiny_datamodule, tmp_path):
    interrupt(engine, tiny_model(), tiny_datamodule, 2, max_steps=50)
    (usable,) = tmp_path.rglob("interrupted.ckpt")
    (metrics,) = engine().test(tiny_model(), datamodule=tiny_datamodule, ckpt_path=usable)
    assert "image_AUROC" in metrics


def test_an_error_keeps_a_resume_point_without_bank(engine, tiny_model, tiny_datamodule, tmp_path):
    interrupt(engine, tiny_model(), tiny_datamodule, 2, ZeroDivisionError, max_steps=50)
    (point,) = tmp_path.rglob("resume.ckpt")
    state = torch.load(point, weights_only=True)["state_dict"]
    assert state["model.bank.descriptors_1"].numel() == 0
    assert len(state["model.bank.histograms"]) == 6
    with pytest.raises(RuntimeError, match=r"resume\.ckpt, holds no bank"):
        engine().test(tiny_model(), datamodule=tiny_datamodule, ckpt_path=point)


def test_resume_points_come_by_the_clock_and_go_when_training_ends(engine, tiny_model, tiny_datamodule, tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_):
            seen.append(len(list(tmp_path.rglob("resume.ckpt"))))

    engine(max_steps=3, callbacks=[Look()]).fit(tiny_model(resume_point_minutes=0), datamodule=tiny_datamodule)
    assert seen == [0, 1, 1]
    assert not list(tmp_path.rglob("resume.ckpt"))


def test_checkpoints_of_any_moment_can_be_tested(engine, tiny_model, tiny_datamodule, tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path / "own", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    model = tiny_model()
    engine(max_steps=5, limit_val_batches=0, callbacks=[keeper]).fit(model, datamodule=tiny_datamodule)
    paths = sorted((tmp_path / "own").glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        assert "image_AUROC" in engine().test(tiny_model(), datamodule=tiny_datamodule, ckpt_path=path)[0]


def test_bank_is_never_stale(engine, tiny_model, tiny_datamodule):
    """What the bank holds after fit is what the heads say now."""
    model = tiny_model()
    engine(max_epochs=2).fit(model, datamodule=tiny_datamodule)
    tiny_datamodule.setup()
    model.eval()
    items = tiny_datamodule.train_data
    images = torch.stack([model.pre_processor(item.image[None])[0] for item in items])
    descriptors = model.model.describe(model.model.feature_extractor(images), images)
    for held, own in zip(model.model.bank.descriptors, descriptors, strict=True):
        assert torch.allclose(held, own, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_small_bank(engine, tiny_model, tiny_datamodule, tmp_path, caplog, dtype):
    """Coarse and reduced: trained, announced, saved, loaded, tested."""
    caplog.set_level("INFO")
    model, own = tiny_model(bank_dtype=dtype, max_references=4), engine(max_epochs=2)
    own.fit(model, datamodule=tiny_datamodule)
    assert f"the reference bank will hold 4 of them and take 0 MB ({dtype}) on cpu" in caplog.text
    assert len(model.model.bank) == len(model.model.bank.histograms) == 4
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    assert_same(weights(model.model), weights(Cpr.load_from_checkpoint(checkpoint, map_location="cpu").model))
    (metrics,) = engine().test(
        tiny_model(bank_dtype=dtype, max_references=4), datamodule=tiny_datamodule, ckpt_path=checkpoint
    )
    assert metrics["image_AUROC"] >= 0.5
    with pytest.raises(RuntimeError, match="bank_dtype='float32'"):
        engine().test(tiny_model(), datamodule=tiny_datamodule, ckpt_path=checkpoint)


def test_bank_in_a_file(engine, tiny_model, tiny_datamodule, tmp_path):
    """Trained, tested, and loaded from another place; the same training without a file gives the same maps."""
    file, images = tmp_path / "bank" / "descriptors", torch.rand(2, 3, 64, 64)
    arguments = {"seed": 3, "bank_dtype": "int4"}
    model = tiny_model(**arguments, bank_file=str(file))
    engine(max_epochs=2).fit(model, datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    expected = tiny_model(**arguments)
    engine(max_epochs=2).fit(expected, datamodule=tiny_datamodule)
    assert not any("descriptors" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])
    engine().test(tiny_model(**arguments, bank_file=str(file)), datamodule=tiny_datamodule, ckpt_path=checkpoint)
    moved = file.replace(tmp_path / "moved")
    with pytest.raises(RuntimeError, match=r"bank_file=.* does not exist"):
        Cpr.load_from_checkpoint(checkpoint, map_location="cpu")
    loaded = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", bank_file=str(moved)).eval()
    assert torch.equal(loaded(images).anomaly_map, expected.eval()(images).anomaly_map)


def test_finished_training_is_loaded_smaller(engine, tiny_model, tiny_datamodule, tmp_path):
    model = tiny_model()
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    small = Cpr.load_from_checkpoint(checkpoint, map_location="cpu", bank_dtype="float16", max_references=2)
    assert len(small.model.bank) == 2
    assert small.model.bank.descriptors_1.dtype == torch.float16


def test_checkpoint_of_the_first_format(engine, tiny_model, tiny_datamodule, tmp_path):
    model = tiny_model()
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    (path,) = tmp_path.rglob("model.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["cpr"] = {"format": 1, "seed": 1, "kind": "object"}
    checkpoint["state_dict"] = {name: tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()}
    for name in ("bank_dtype", "max_references", "bank_on_host"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    assert_same(weights(model.model), weights(Cpr.load_from_checkpoint(path, map_location="cpu").model))
    (metrics,) = engine().test(tiny_model(), datamodule=tiny_datamodule, ckpt_path=path)
    assert "image_AUROC" in metrics


def test_training_on_other_data_starts_anew(engine, tiny_model, tiny_datamodule, tmp_path):
    model = tiny_model()
    engine(max_steps=1).fit(model, datamodule=tiny_datamodule)
    codebook = model.model.global_retriever.codebook.clone()
    other = MVTecAD(root=write_mvtec(tmp_path / "data", train=4), category="screw", train_batch_size=2, num_workers=0)
    engine(max_steps=1).fit(model, datamodule=other)
    assert len(model.model.bank) == 4
    assert not torch.equal(codebook, model.model.global_retriever.codebook)


def test_one_engine_fits_twice(engine, tiny_model, tiny_datamodule):
    own = engine()
    own.fit(tiny_model(training_steps=2), datamodule=tiny_datamodule)
    with pytest.warns(UserWarning, match="No step was trained.*Make a new Engine for each fit"):
        own.fit(tiny_model(training_steps=2), datamodule=tiny_datamodule)
    assert own.trainer.global_step == 2


@pytest.mark.parametrize(
    ("kind", "training_steps", "expected"),
    [("object", None, 1000), ("texture", None, 500), ("object", "paper", 40_000), ("texture", "paper", 500)],
)
def test_default_steps(engine, tiny_model, tiny_datamodule, kind, training_steps, expected):
    planned = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            planned.append(pl_module._plan.steps)
            trainer.should_stop = True

    engine(callbacks=[Look()]).fit(tiny_model(kind=kind, training_steps=training_steps), datamodule=tiny_datamodule)
    assert planned == [expected]


@pytest.mark.parametrize(
    ("limits", "arguments", "steps"),
    [
        ({}, {"training_steps": 2}, 2),
        ({"max_steps": 4}, {"training_steps": 2}, 4),
        ({"max_epochs": 2}, {"training_steps": 2}, 6),
        ({"max_time": {"seconds": 0.001}}, {}, 1),
        ({"limit_train_batches": 1}, {}, 1),
        ({"fast_dev_run": True}, {}, 1),
    ],
)
def test_limits(engine, tiny_model, tiny_datamodule, limits, arguments, steps):
    own = engine(**limits)
    own.fit(tiny_model(**arguments), datamodule=tiny_datamodule)
    assert own.trainer.global_step == steps


@pytest.mark.parametrize("kind", ["object", "texture", "auto"])
def test_kind_is_said_and_followed(engine, tiny_model, tiny_datamodule, kind, caplog):
    caplog.set_level("INFO")
    model = tiny_model(kind=kind)
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=tiny_datamodule)
    resolved = "texture" if kind == "texture" else "object"
    assert model.resolved_kind == resolved
    assert f"Kind: {resolved}" in caplog.text
    assert ("category 'screw' of MVTecAD" in caplog.text) == (kind == "auto")
    assert bool(model.model.bank.foregrounds.eq(1).all()) == (resolved == "texture")


@pytest.mark.parametrize(("category", "kind"), [("bracket", "object"), ("gear", "object"), ("fabric", "texture")])
def test_auto_decides_for_unknown_data(engine, tiny_model, tmp_path, category, kind):
    (tmp_path / "good").mkdir()
    for index in range(6):
        image = drawing.draw(category, index=index, size=128).image
        cv2.imwrite(str(tmp_path / "good" / f"{index}.png"), image[..., ::-1])
    data = Folder(
        name="screw", root=tmp_path, normal_dir="good", normal_split_ratio=0.34, num_workers=0, train_batch_size=2
    )
    seed_everything(0, verbose=False)
    model = tiny_model(image_size=(128, 128))
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    assert model.resolved_kind == kind


def test_evaluators(engine, tiny_model, tiny_datamodule):
    metrics = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUPR(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    (result,) = engine(max_steps=2).train(
        tiny_model(evaluator=Evaluator(test_metrics=metrics)), datamodule=tiny_datamodule
    )
    assert {"image_AUROC", "pixel_AUPR", "pixel_AUPRO"} <= set(result)


@pytest.mark.parametrize(
    "trainer", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}]
)
def test_trainer_options(engine, tiny_model, tiny_datamodule, trainer):
    model = tiny_model()
    engine(max_steps=2, **trainer).train(model, datamodule=tiny_datamodule)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_augmentations_of_the_data_module_are_respected(engine, tiny_model, mvtec_root):
    data = MVTecAD(
        root=mvtec_root, category="screw", train_batch_size=2, num_workers=0, train_augmentations=v2.RandomInvert(1.0)
    )
    model = tiny_model()
    seen = []
    original = model._learn_retrieval
    model._learn_retrieval = lambda images: (seen.append(images.images.mean().item()), original(images))
    engine(max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    plain = torch.stack([1 - item.image for item in _plain(mvtec_root)]).mean().item()
    assert seen[0] == pytest.approx(plain, abs=1e-3)


def _plain(root):
    data = MVTecAD(root=root, category="screw", num_workers=0)
    data.setup()
    return data.train_data


class TestBadInput:
    def test_no_texture_folder(self, engine, tiny_model, tiny_datamodule, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            engine(max_steps=1).fit(tiny_model(anomaly_source_path=tmp_path / "nowhere"), datamodule=tiny_datamodule)

    def test_empty_texture_folder(self, engine, tiny_model, tiny_datamodule, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty"):
            engine(max_steps=1).fit(tiny_model(anomaly_source_path=tmp_path / "empty"), datamodule=tiny_datamodule)

    def test_one_training_image(self, engine, tiny_model, tmp_path):
        data = MVTecAD(root=write_mvtec(tmp_path / "data", train=1), category="screw", num_workers=0)
        with pytest.raises(ValueError, match="only 1 training image"):
            engine(max_steps=1).fit(tiny_model(), datamodule=data)

    def test_image_smaller_than_the_grid(self, engine, tiny_model, tiny_datamodule):
        with pytest.raises(ValueError, match="4x4 cells is smaller than the retrieval grid of 5x5"):
            engine(max_steps=1).fit(tiny_model(image_size=(16, 16)), datamodule=tiny_datamodule)

    def test_size_that_does_not_fit_the_strides(self, engine, tiny_model, tiny_datamodule):
        with pytest.raises(ValueError, match="60x60 does not fit the strides"):
            engine(max_steps=1).fit(
                tiny_model(image_size=None, pre_processor=Cpr.configure_pre_processor((60, 60))),
                datamodule=tiny_datamodule,
            )

    def test_checkpoint_of_another_configuration(self, engine, tiny_model, tiny_datamodule, tmp_path):
        engine(max_steps=1).fit(tiny_model(), datamodule=tiny_datamodule)
        (checkpoint,) = tmp_path.rglob("model.ckpt")
        with pytest.raises(RuntimeError, match="8 channels, the model descriptor_channels=16"):
            Cpr.load_from_checkpoint(checkpoint, descriptor_channels=16)

    def test_checkpoint_of_a_later_format(self, engine, tiny_model, tiny_datamodule, tmp_path):
        engine(max_steps=1).fit(tiny_model(), datamodule=tiny_datamodule)
        (path,) = tmp_path.rglob("model.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["cpr"]["format"] = 99
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=r"format 99.*Upgrade anomalib_cpr"):
            Cpr.load_from_checkpoint(path)

    def test_resuming_with_other_data(self, engine, tiny_model, tiny_datamodule, tmp_path):
        engine(max_steps=1).fit(tiny_model(), datamodule=tiny_datamodule)
        (checkpoint,) = tmp_path.rglob("model.ckpt")
        data = MVTecAD(root=write_mvtec(tmp_path / "data", train=4), category="screw", num_workers=0)
        with pytest.raises(ValueError, match="trained on 6 images of 64x64 pixels, the data module gives 4"):
            engine(max_steps=2).fit(tiny_model(), datamodule=data, ckpt_path=checkpoint)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rotations": [5, 365]}, r"rotations=\[5, 365\]: expected angles in degrees, none twice"),
            ({"rotations": [0]}, r"rotations=\[0\]"),
            ({"kind": "thing"}, "kind='thing': must be 'object', 'texture' or 'auto'"),
            ({"k": 0}, "k=0"),
            ({"clustering_backend": "scipy"}, "clustering_backend='scipy'"),
            ({"learning_rate_schedule": "linear"}, "learning_rate_schedule='linear'"),
            ({"training_steps": 0}, "training_steps=0"),
            ({"recoloured_anomalies": -0.1}, r"recoloured_anomalies=-0\.1: must be a share in 0\.\.1"),
            ({"recoloured_anomalies": float("nan")}, "recoloured_anomalies=nan"),
            ({"displaced_anomalies": 2}, "displaced_anomalies=2: must be a share"),
            ({"recoloured_anomalies": 0.6, "displaced_anomalies": 0.6}, "displaced_anomalies=0.6 are shares"),
            ({"boundary_weight": 0}, "boundary_weight=0: must be a number above 0"),
            ({"boundary_weight": float("inf")}, "boundary_weight=inf"),
            ({"boundary_weight": float("nan")}, "boundary_weight=nan"),
            ({"training_steps": "many"}, "training_steps='many'"),
            ({"image_size": 64, "pre_processor": False}, "image_size=64 is for the default pre-processor"),
            ({"image_size": (60, 64)}, r"image_size=\(60, 64\): expected height and width"),
            ({"image_size": (64, 64, 3)}, "expected height and width"),
            ({"training_precision": "float64"}, "training_precision='float64'"),
            ({"bank_dtype": "half"}, "bank_dtype='half'"),
        ],
    )
    def test_arguments(self, tiny_model, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny_model(**arguments)


def _image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def _btech(root):
    rng = np.random.default_rng(0)
    for index in range(4):
        _image(root / "01" / "train" / "ok" / f"{index}.png", draw(rng)[0])
        _image(root / "01" / "test" / "ok" / f"{index}.png", draw(rng)[0])
        image, mask = draw(rng, defect=True)
        _image(root / "01" / "test" / "ko" / f"{index}.png", image)
        _image(root / "01" / "ground_truth" / "ko" / f"{index}.png", mask)
    return BTech(root=root, category="01", train_batch_size=2, eval_batch_size=2, num_workers=0)


def _mvtec_3d(root):
    rng = np.random.default_rng(0)
    for split, label in (("train", "good"), ("validation", "good"), ("test", "good"), ("test", "hole")):
        for index in range(4):
            image, mask = draw(rng, defect=label == "hole")
            folder = root / "bagel" / split / label
            _image(folder / "rgb" / f"{index:03}.png", image)
            _image(folder / "gt" / f"{index:03}.png", mask)
            _image(folder / "xyz" / f"{index:03}.tiff", np.ones((64, 64, 3), np.float32))
    return MVTec3D(root=root, category="bagel", train_batch_size=2, eval_batch_size=2, num_workers=0)


def _visa(root):
    rng = np.random.default_rng(0)
    split = root / "visa_pytorch" / "candle"
    for index in range(4):
        _image(split / "train" / "good" / f"{index}.JPG", draw(rng)[0])
        _image(split / "test" / "good" / f"{index}.JPG", draw(rng)[0])
        image, mask = draw(rng, defect=True)
        _image(split / "test" / "bad" / f"{index}.JPG", image)
        _image(split / "ground_truth" / "bad" / f"{index}.png", mask)
    return Visa(root=root, category="candle", train_batch_size=2, eval_batch_size=2, num_workers=0)


def _grey_folder(root):
    rng = np.random.default_rng(0)
    for index in range(4):
        _image(root / "good" / f"{index}.png", draw(rng)[0][..., 0])
        _image(root / "good_test" / f"{index}.png", draw(rng)[0][..., 0])
        image, mask = draw(rng, defect=True)
        _image(root / "bad" / f"{index}.png", image[..., 0])
        _image(root / "mask" / f"{index}.png", mask)
    return Folder(
        name="parts",
        root=root,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="bad",
        mask_dir="mask",
        train_batch_size=2,
        eval_batch_size=2,
        num_workers=0,
    )


@pytest.mark.parametrize("make", [_btech, _mvtec_3d, _visa, _grey_folder])
def test_data_modules(engine, tiny_model, tmp_path, make):
    (metrics,) = engine(max_epochs=1).train(tiny_model(), datamodule=make(tmp_path / "data"))
    assert "image_AUROC" in metrics
    assert "pixel_AUROC" in metrics

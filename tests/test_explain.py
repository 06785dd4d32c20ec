"""What an explanation says is what the model does."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from conftest import TINY_BACKBONE, draw, write_mvtec
from matplotlib.figure import Figure
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr import Cpr, ExplanationVisualizer, explain_picture
from anomalib_cpr.cli import main
from anomalib_cpr.coarse_to_fine import match_scales
from anomalib_cpr.colours import as_stored
from anomalib_cpr.explain import (
    PatchAtScale,
    _judge,
    best_matches,
    explain,
    foreground_in_use,
    load,
    peaks,
    usual_distances,
)
from anomalib_cpr.explain_picture import draw_explanation, save_explanation, shown_references
from anomalib_cpr.gallery_pictures import (
    ImageReader,
    ReferencePicture,
    find_training_images,
    identify_gallery,
    reference_pictures,
)
from anomalib_cpr.global_retrieval import histogram_distance
from anomalib_cpr.matching import match
from anomalib_cpr.outline import follow_edges
from anomalib_cpr.relative import lower_the_rest
from anomalib_cpr.scoring import fuse
from anomalib_cpr.unaligned import fuse_plainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model: folder, data module, checkpoint, module."""
    folder = tmp_path_factory.mktemp("explained")
    root = write_mvtec(folder / "data", train=6, test=2)
    datamodule = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)
    arguments = {**TINY_BACKBONE, "descriptor_channels": 8, "k": 3}
    # A metric with a buffer, which a model without this evaluator does not have.
    evaluator = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    module = Cpr(**arguments, pre_processor=Cpr.configure_pre_processor((64, 64)), evaluator=evaluator)
    engine = Engine(max_steps=2, default_root_dir=folder / "run", enable_progress_bar=False)
    engine.fit(module, datamodule=datamodule)
    checkpoint = folder / "model.ckpt"
    engine.trainer.save_checkpoint(checkpoint)
    return folder, datamodule, checkpoint, load(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def query(run):
    module = run[3]
    reader = ImageReader(module.pre_processor, module.device)
    colours = reader.colours(run[0] / "data" / "screw" / "test" / "scratch" / "000.png")
    return colours, reader.normalize(colours)


@pytest.mark.parametrize(
    ("height", "width", "window", "k"),
    [
        (5, 7, 3, 4),
        (4, 4, 1, 1),  # no window, one reference
        (2, 6, 5, 2),  # window reaches beyond both sides
        (1, 1, 3, 3),  # a single cell
        (5, 7, 11, 4),  # all but one column
        (5, 7, 13, 4),  # just everything
        (40, 30, 999, 3),  # the whole map, in pieces
    ],
)
def test_best_match_is_the_minimum_that_matching_finds_and_lies_where_it_says(height, width, window, k):
    generator = torch.Generator().manual_seed(height * width)
    gallery = F.normalize(torch.randn(6, 5, height, width, generator=generator), dim=1)
    query = F.normalize(torch.randn(5, height, width, generator=generator), dim=0)
    references = torch.randperm(6, generator=generator)[:k]

    found, own_place = best_matches([query] * 2, [gallery[references]] * 2, [window, 1])

    expected = match(query[None], gallery, references[None], window)[0].amin(0)
    torch.testing.assert_close(found.distance, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.per_reference.amin(0), found.distance)
    torch.testing.assert_close(own_place.per_reference, match(query[None], gallery, references[None], 1)[0])
    for row in range(height):
        for column in range(width):
            own, down, right = (int(value[row, column]) for value in (found.reference, found.row, found.column))
            assert 0 <= down < height
            assert 0 <= right < width
            assert max(abs(down - row), abs(right - column)) <= window // 2
            there = gallery[references[own], :, down, right]
            distance = 1 - float(there @ query[:, row, column])
            assert distance == pytest.approx(float(found.distance[row, column]), abs=1e-5)


def test_peaks_are_the_largest_apart_and_not_faint():
    anomaly_map = torch.zeros(60, 60)
    anomaly_map[10, 10], anomaly_map[11, 11], anomaly_map[40, 50], anomaly_map[50, 5] = 1.0, 0.95, 0.6, 0.3

    assert peaks(anomaly_map, 4) == [(10, 10), (40, 50)]  # (11, 11) is the same place, (50, 5) below 40 %
    assert peaks(anomaly_map, 1) == [(10, 10)]
    assert peaks(torch.zeros(8, 8), 4) == []


def test_explanation_is_made_of_what_the_model_predicts(run, query):
    model = run[3].model
    prediction = model(query[1])
    found = explain(model, query[1])

    assert found.score == pytest.approx(float(prediction.pred_score), abs=1e-6)
    torch.testing.assert_close(found.anomaly_map, prediction.anomaly_map[0, 0])
    # The parts that are drawn give the map that the model gives.
    foregrounds = torch.cat([found.foreground[None], found.reference_foregrounds])
    again, score = model.score([m.per_reference[None] for m in found.matches], foregrounds[None], query[1])
    torch.testing.assert_close(again[0, 0], found.anomaly_map, atol=1e-5, rtol=0)
    assert float(score) == pytest.approx(found.score, abs=1e-5)
    drawn = fuse([distance[None, None] for distance in found.distances], query[1].shape[-2:])[0, 0]
    share, again = found.shares
    assert 0.1 < share == again < 1
    outlined = follow_edges(share * (drawn * foreground_in_use(found))[None, None], query[1])
    torch.testing.assert_close(lower_the_rest(outlined)[0, 0], found.anomaly_map, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width", "k", "on_the_whole"), [(3, 5, 4, 10), (4, 4, 1, 10), (3, 2, 5, 2)])
def test_best_matches_over_the_whole_map_are_those_from_coarse_to_fine(height, width, k, on_the_whole, monkeypatch):
    monkeypatch.setattr("anomalib_cpr.unaligned.ON_THE_WHOLE", on_the_whole)
    generator = torch.Generator().manual_seed(height * width)
    sizes = [(2 * height, 2 * width), (height, width)]
    galleries = [F.normalize(torch.randn(6, 5, *size, generator=generator), dim=1) for size in sizes]
    queries = [F.normalize(torch.randn(5, *size, generator=generator), dim=0) for size in sizes]
    chosen = torch.randperm(6, generator=generator)[:k]
    windows = (999, 999)
    found = best_matches(queries, [gallery[chosen] for gallery in galleries], windows, on_the_whole=True)
    expected = match_scales([query[None] for query in queries], galleries, chosen[None], windows, (None, None))
    for one, distances, query, gallery in zip(found, expected, queries, galleries, strict=True):
        torch.testing.assert_close(one.per_reference, distances[0], atol=1e-6, rtol=0)
        there = gallery[chosen][one.reference, :, one.row, one.column].permute(2, 0, 1)
        torch.testing.assert_close(one.distance, 1 - (there * query).sum(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0].distance, expected[0][0].amin(0))
    kept = expected[1][0].mean((1, 2)).argsort()[:on_the_whole]
    torch.testing.assert_close(found[1].distance, expected[1][0][kept].amin(0))


@pytest.mark.parametrize("unaligned", [True, False])
def test_explanation_of_matching_over_the_whole_map(run, query, unaligned):
    model = load(run[2], torch.device("cpu")).model
    model.coherent_matching, model.unaligned_matching, model.window_sizes = False, unaligned, (999, 999)
    found = explain(model, query[1])
    references = torch.tensor([found.references])
    queries = model.describe(model.feature_extractor(query[1]), query[1])
    for one, expected in zip(found.matches, model.match(queries, references), strict=True):
        torch.testing.assert_close(one.per_reference, expected[0], atol=1e-5, rtol=0)
    # What good parts show is what they are scored by: each as a query, with its own references.
    patch = found.patches[0]
    for number, image in enumerate(found.references):
        own = [held[image : image + 1].float() for held in model.bank.descriptors]
        distances = histogram_distance(model.bank.histograms[image : image + 1], model.bank.histograms)
        distances[0, image] = torch.inf
        matched = model.match(own, distances.topk(3, largest=False).indices)
        for scale, distance in zip(patch.scales, matched, strict=True):
            row, column = scale.cell
            assert scale.on_good_parts[number] == pytest.approx(float(distance[0, :, row, column].amin()), abs=1e-5)


@pytest.mark.parametrize("on_the_whole", [10, 2])
@pytest.mark.parametrize("relative", [True, False])
def test_explanation_of_unaligned_matching(run, query, relative, on_the_whole, monkeypatch):
    monkeypatch.setattr("anomalib_cpr.unaligned.ON_THE_WHOLE", on_the_whole)
    model = load(run[2], torch.device("cpu")).model
    model.coherent_matching, model.unaligned_matching, model.relative_to_image = False, True, relative
    found = explain(model, query[1])
    kept = found.matches[1].per_reference.mean((1, 2)).argsort()[:on_the_whole]
    means = [found.matches[0].per_reference.mean(0), found.matches[1].per_reference[kept].mean(0)]
    coarse = found.matches[1]
    assert set(coarse.reference.unique().tolist()) <= set(kept.tolist()), "the match is among those that count"
    torch.testing.assert_close(coarse.distance, coarse.per_reference[kept].amin(0), atol=1e-6, rtol=0)
    for shown, mean in zip(found.distances, means, strict=True):
        torch.testing.assert_close(shown, mean)
    scales = [share * distance[None, None] for share, distance in zip(found.shares, found.distances, strict=True)]
    outlined = follow_edges(fuse_plainer(scales, query[1].shape[-2:]) * foreground_in_use(found), query[1])
    expected = lower_the_rest(outlined) if relative else outlined
    torch.testing.assert_close(expected[0, 0], found.anomaly_map, atol=1e-5, rtol=0)
    assert (found.shares == [1, 1]) is not relative
    assert len(set(found.shares)) == 1 + relative, "each scale has its own"


def test_references_are_in_order_with_the_distances_of_retrieval(run, query):
    model = run[3].model
    found = explain(model, query[1])
    histograms = model.global_retriever(model.feature_extractor(query[1])[0])
    distances = histogram_distance(histograms, model.bank.histograms)[0]
    assert found.references == distances.argsort()[:3].tolist()
    assert found.histogram_distances == pytest.approx(distances.sort().values[:3].tolist(), abs=1e-5)


def test_usual_distances_leave_out_the_image_itself():
    histograms = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0))
    distances = histogram_distance(histograms, histograms).fill_diagonal_(float("inf"))
    torch.testing.assert_close(usual_distances(histograms), distances.amin(1).sort().values)
    assert len(usual_distances(histograms[:1])) == 0
    assert len(usual_distances(histograms[:3], copies=3)) == 0


def test_a_hot_patch_is_followed_to_the_match_of_its_cell(run, query):
    found = explain(run[3].model, query[1], patches=2)
    assert 1 <= len(found.patches) <= 2
    assert found.patches[0].value == pytest.approx(float(found.anomaly_map.max()))
    for patch in found.patches:
        for level, (scale, match_) in enumerate(zip(patch.scales, found.matches, strict=True)):
            assert scale.distance == pytest.approx(float(match_.distance[scale.cell]))
            assert scale.match == (int(match_.row[scale.cell]), int(match_.column[scale.cell]))
            assert min(scale.per_reference) == pytest.approx(scale.distance, abs=1e-6)
            side = 4 * 2**level
            assert abs(scale.cell[0] * side - patch.pixel[0]) <= 16
        assert patch.cause in {"background", "references", "usual", "unmatched"}


@pytest.mark.parametrize(
    ("own", "others", "good", "unlike", "cause"),
    [
        (0.1, 0.9, [0.1], 0.5, "background"),
        (0.9, 0.9, [0.5], 0.5, "usual"),  # good parts differ as much here
        (0.9, 0.9, [0.1], 1.0, "references"),
        (0.9, 0.9, [0.1], 0.5, "unmatched"),
        (0.9, 0.9, [], 0.0, "unmatched"),  # a gallery of one image
    ],
)
def test_cause(own, others, good, unlike, cause):
    scales = [PatchAtScale((0, 0), (0, 0), 0, 0.25, [0.25], good)] * 2
    assert _judge(scales, own, others, unlike)[0] == cause
    by_colour, verdict = _judge(scales, own, others, unlike, 0.81)
    assert by_colour == ("background" if cause == "background" else "colour")
    assert "0.81" in verdict or cause == "background"


def test_a_wrong_colour_is_explained(run, query, tmp_path):
    model = load(run[2], torch.device("cpu")).model
    model.coherent_matching, model.unaligned_matching = False, True
    bank = model.bank
    bank.coloured, bank.colours = True, as_stored(torch.zeros(len(bank), 3, *bank.descriptors_2.shape[-2:]))
    found = {}
    for scale in (0.0, 8.0):
        bank.colour_scale = torch.tensor(scale)
        found[scale] = explain(model, query[1])
        expected = model.match(model.describe(model.feature_extractor(query[1]), query[1]), torch.tensor([[0, 1, 2]]))
        torch.testing.assert_close(found[scale].distances[2], expected[2][0].mean(0))
        assert len(found[scale].matches) == 2
        assert found[scale].shares[2] == 1, "colours are relative already"
    assert "colour" not in {patch.cause for patch in found[0.0].patches}
    assert "colour" in {patch.cause for patch in found[8.0].patches}
    pictures = [ReferencePicture(str(rank)) for rank in range(3)]
    save_explanation(found[8.0], torch.rand(3, *found[8.0].anomaly_map.shape), pictures, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_more_than_one_image_is_refused(run):
    with pytest.raises(ValueError, match="one image at a time"):
        explain(run[3].model, torch.zeros(2, 3, 64, 64))


# --- pictures of the references


def test_a_checkpoint_knows_its_training_images(run):
    module = run[3]
    files = find_training_images(module.training_paths)
    assert [file.name for file in files] == [f"{index:03}.png" for index in range(6)]
    reader = ImageReader(module.pre_processor, module.device)
    assert all(picture.as_trained for picture in reference_pictures(module.model, reader, files, range(6)))


def test_pictures_of_other_images_are_told(run, tmp_path):
    module = run[3]
    for index in range(6):
        image = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{index:03}.png"), image)
    reader = ImageReader(module.pre_processor, module.device)
    files = find_training_images(module.training_paths, tmp_path)
    assert not any(picture.as_trained for picture in reference_pictures(module.model, reader, files, range(6)))


def test_files_that_are_gone_have_no_picture(run):
    module = run[3]
    files = find_training_images(["/nowhere/000.png"] * 6)
    reader = ImageReader(module.pre_processor, module.device)
    assert [p.colours for p in reference_pictures(module.model, reader, files, [0, 1])] == [None, None]
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        find_training_images([], run[0] / "nowhere")


def test_a_reduced_gallery_is_recognised_by_its_histograms(run):
    module = run[3]
    reader = ImageReader(module.pre_processor, module.device)
    files = find_training_images(module.training_paths)
    bank = module.model.bank
    whole = bank.histograms
    try:
        bank.histograms = whole[[4, 1]]
        assert [file.name for file in identify_gallery(module.model, reader, files)] == ["004.png", "001.png"]
    finally:
        bank.histograms = whole


# --- drawing, command, visualizer


def test_picture_is_drawn_with_and_without_references(run, query):
    module = run[3]
    found = explain(module.model, query[1])
    reader = ImageReader(module.pre_processor, module.device)
    for files in ([None] * 6, find_training_images(module.training_paths)):
        pictures = reference_pictures(module.model, reader, files, found.references)
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[20:30, 20:30] = True
        assert isinstance(draw_explanation(found, query[0], pictures, mask=mask, threshold=0.1), Figure)


@pytest.mark.parametrize(
    ("count", "matched", "expected"),
    [
        (3, [], [0, 1, 2]),
        (10, [9, 2], [*range(10)]),
        (80, [70, 3, 70], [*range(9), 70]),
        (80, [*range(40, 52)], [*range(40, 52)]),
        (80, [], [*range(10)]),
    ],
)
def test_of_many_references_those_are_shown_that_matter(count, matched, expected):
    patches = [SimpleNamespace(scales=[SimpleNamespace(reference=rank)]) for rank in matched]
    assert shown_references(SimpleNamespace(references=range(count), patches=patches)) == expected


def test_picture_with_more_references_than_there_is_room_for(run, query, monkeypatch):
    module = run[3]
    found = replace(explain(module.model, query[1]), patches=[])  # which references they match is chance
    reader = ImageReader(module.pre_processor, module.device)
    pictures = reference_pictures(module.model, reader, [None] * 6, found.references)
    monkeypatch.setattr(explain_picture, "SHOWN_REFERENCES", 2)
    figure = draw_explanation(found, query[0], pictures)
    assert sum("gives" in axes.get_title() for axes in figure.axes) == 2
    assert any("2 of 3 references are shown" in text.get_text() for text in figure.texts)


def test_command_writes_a_picture_per_image_and_says_why(run, tmp_path, capsys):
    folder, checkpoint = run[0], run[2]
    code = main(
        ["explain", "--ckpt", str(checkpoint), str(folder / "data" / "screw" / "test"), "-o", str(tmp_path / "out")]
    )
    assert code == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["test_good_000.png", "test_good_001.png", "test_scratch_000.png", "test_scratch_001.png"]
    picture = cv2.imread(str(tmp_path / "out" / names[0]))
    assert picture.shape == (1120, 1400, 3)
    assert picture.std() > 20  # something is drawn
    output = capsys.readouterr().out
    assert "score 0." in output
    assert "  1. " in output


def test_command_takes_grey_images_and_other_sizes(run, tmp_path, capsys):
    image = cv2.cvtColor(draw(np.random.default_rng(1), 100, defect=True)[0], cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(tmp_path / "grey.png"), image[:80])
    main(["explain", "--ckpt", str(run[2]), str(tmp_path / "grey.png"), "-o", str(tmp_path / "out")])
    assert "grey.png: score" in capsys.readouterr().out


def test_errors_name_what_is_wrong(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--ckpt", str(tmp_path / "nothing.ckpt"), str(run[0] / "data")])
    assert "nothing.ckpt does not exist" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no images"):
        main(["explain", "--ckpt", str(run[2]), str(tmp_path)])


def test_visualizer_explains_during_a_test(run, tmp_path):
    _, datamodule, checkpoint, _ = run
    module = Cpr.load_from_checkpoint(checkpoint, map_location="cpu")
    module.visualizer = ExplanationVisualizer(limit=3, output_dir=tmp_path / "images")
    engine = Engine(default_root_dir=tmp_path / "run", enable_progress_bar=False)
    engine.test(module, datamodule=datamodule, verbose=False)
    explained = sorted((tmp_path / "images" / "explanations").rglob("*.png"))
    usual = [file for file in (tmp_path / "images").rglob("*.png") if "explanations" not in file.parts]
    assert len(explained) == 3
    assert len(usual) == 4
    assert cv2.imread(str(explained[0])).shape == (1120, 1400, 3)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_a_bank_in_fewer_bytes_is_explained_as_it_predicts(run, query, dtype):
    module = Cpr.load_from_checkpoint(run[2], map_location="cpu", bank_dtype=dtype, evaluator=False).eval()
    found = explain(module.model, query[1])
    again, _ = module.model.score(
        [m.per_reference[None] for m in found.matches], foreground_in_use(found)[None, None], query[1]
    )
    torch.testing.assert_close(again[0, 0], found.anomaly_map, atol=1e-4, rtol=0)

"""Exported files score like the model that they come from, and the model stays what it was."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.models import get_model
from anomalib.visualization.image.item_visualizer import visualize_image_item
from conftest import TINY_BACKBONE, train_tiny

from anomalib_cpr import export
from anomalib_cpr.colours import as_stored
from anomalib_cpr.global_retrieval import histogram_distance, smallest
from anomalib_cpr.lightning_model import Cpr

SIZES = [(64, 64), (50, 70), (128, 96)]


@pytest.fixture(scope="module")
def datamodule(mvtec_root):
    return MVTecAD(root=mvtec_root, category="screw", train_batch_size=2, eval_batch_size=3, num_workers=0)


@pytest.fixture(scope="module")
def checkpoint(datamodule, tmp_path_factory):
    return train_tiny(datamodule, tmp_path_factory.mktemp("trained"), steps=8)


@pytest.fixture
def model(checkpoint):
    return Cpr.load_from_checkpoint(checkpoint, weights_only=True).eval()


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer leaves its cache in the working directory


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """Exported with any input size."""
    folder = tmp_path_factory.mktemp("exported")
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True)
    return {"onnx": model.to_onnx(folder), "openvino": model.to_openvino(folder), "torch": model.to_torch(folder)}


@pytest.fixture(scope="module")
def unaligned(checkpoint, tmp_path_factory):
    """A model that matches as loose parts are matched, and its exported files: at stride 8, three of six references."""
    patch = pytest.MonkeyPatch()
    patch.setattr("anomalib_cpr.unaligned.ON_THE_WHOLE", 3)
    folder = tmp_path_factory.mktemp("unaligned")
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True, unaligned_matching=True, k=6)
    # A training would average those of the bank as well, and know the colours of its images.
    bank, generator = model.model.bank, torch.Generator().manual_seed(0)
    bank.averaged = bank.coloured = True
    cells = bank.descriptors_2.shape[-2:]
    bank.colours = as_stored(torch.randn(len(bank), 3, *cells, generator=generator) * 0.2)
    bank.colour_scale = torch.tensor(1.5)
    yield model.eval(), {"onnx": model.to_onnx(folder), "openvino": model.to_openvino(folder)}
    patch.undo()


@pytest.fixture(scope="module")
def anywhere(checkpoint, tmp_path_factory):
    """A model that searches the whole map, and its exported files."""
    folder = tmp_path_factory.mktemp("anywhere")
    arguments = {"unaligned_matching": True, "window_sizes": [999, 999], "k": 4}
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True, **arguments)
    return model.eval(), {"onnx": model.to_onnx(folder), "openvino": model.to_openvino(folder)}


@pytest.fixture(scope="module")
def image_paths(mvtec_root):
    return sorted((mvtec_root / "screw" / "test").rglob("*.png"), reverse=True)  # defects first


def run(path, images):
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    # As users do it: without any configuration.
    compiled = ov.Core().compile_model(path, "CPU")
    result = compiled({"input": images.numpy()})
    return {output.any_name: result[output] for output in compiled.outputs}


def assert_like(model, path, images, tolerance=1e-5):
    with torch.no_grad():
        expected = model(images)
    found = run(path, images)
    assert set(found) == {"pred_score", "pred_label", "anomaly_map", "pred_mask"}
    assert np.abs(found["pred_score"] - expected.pred_score.numpy()).max() < tolerance
    assert np.abs(found["anomaly_map"] - expected.anomaly_map.numpy()).max() < tolerance
    # The threshold is the score of one of the images: for that one, a bit decides.
    decided = (expected.pred_score - 0.5).abs().numpy() > tolerance
    assert np.array_equal(found["pred_label"][decided], expected.pred_label.numpy()[decided])


def images_of(paths, count, size):
    images = torch.stack([read_image(path, as_tensor=True) for path in (paths * 2)[:count]])
    return torch.nn.functional.interpolate(images, size, mode="bilinear")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_any_batch_and_any_size(model, files, image_paths, form, batch, size):
    assert_like(model, files[form], images_of(image_paths, batch, size))


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize(("batch", "size"), [(1, (64, 64)), (5, (50, 70))])
@pytest.mark.parametrize("matching", ["unaligned", "anywhere"])
def test_textures_and_loose_parts(model, unaligned, anywhere, image_paths, matching, form, batch, size):
    matched, files = {"unaligned": unaligned, "anywhere": anywhere}[matching]
    images = images_of(image_paths, batch, size)
    assert_like(matched, files[form], images)
    assert matched.model.unaligned_matching
    assert not torch.allclose(matched(images).anomaly_map, model(images).anomaly_map, atol=1e-2)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_fixed_size(model, image_paths, tmp_path_factory, batch):
    folder = tmp_path_factory.getbasetemp() / "fixed"
    path = folder / "weights" / "onnx" / "model.onnx"
    if not path.exists():
        model.to_onnx(folder, input_size=(48, 80))
    assert_like(model, path, images_of(image_paths, batch, (48, 80)))


def test_pickled_model_records_no_gradients(model, files, image_paths, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(files["torch"], device="cpu")
    result = inferencer.predict(image_paths[0])
    assert not result.anomaly_map.requires_grad
    expected = model(read_image(image_paths[0], as_tensor=True)[None])
    assert torch.equal(result.pred_score, expected.pred_score)
    assert torch.equal(torch.as_tensor(result.anomaly_map), expected.anomaly_map[:, 0])
    assert expected.anomaly_map.max() > 0.1, "a picture with a defect"


@pytest.mark.parametrize("value", [0, 127, 255])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (400, 20), (64, 64)])
def test_inferencers_take_any_image(model, files, monkeypatch, size, value):
    """Constant ones of odd sizes, as tensor and as array of bytes."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    image = torch.full((3, *size), value / 255)
    expected = model(image[None])
    assert expected.anomaly_map.isfinite().all()
    of_torch = TorchInferencer(files["torch"], device="cpu").predict(image)
    of_openvino = OpenVINOInferencer(files["openvino"], "CPU").predict(np.full((*size, 3), value, dtype=np.uint8))
    for result in (of_torch, of_openvino):
        assert 0 <= float(np.asarray(result.pred_score).squeeze()) <= 1
        assert float(np.asarray(result.pred_score).squeeze()) == pytest.approx(float(expected.pred_score), abs=1e-4)
        assert np.abs(np.asarray(result.anomaly_map).squeeze() - expected.anomaly_map.numpy().squeeze()).max() < 1e-4


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1000, 50)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_exported_file_and_constant_images(model, files, form, size, value):
    assert_like(model, files[form], torch.full((2, 3, *size), value))


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_exported_file_calls_pixels_without_a_value_anomalous(model, files, image_paths, form, value):
    """NaN exceeds no threshold; a file that handed it on would call the image good."""
    images = images_of(image_paths[-3:], 3, (64, 64)).as_subclass(torch.Tensor).clone()
    expected = model(images)
    images[1, 0, 20:24, 30] = value
    result = run(files[form], images)
    assert result["pred_label"].squeeze().tolist()[1]
    assert result["pred_score"].squeeze()[1] == 1
    assert (result["anomaly_map"][1, 0, 20:24, 30] == 1).all()
    assert np.isfinite(result["anomaly_map"]).all()
    # Runtimes whose resizing multiplies neighbours by 0 make them NaN as well, but not more.
    assert (result["anomaly_map"][1] == 1).sum() <= 6 * 3
    for index in (0, 2):
        assert np.abs(result["anomaly_map"][index] - expected.anomaly_map[index].numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "form", ["torch", *(pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "openvino"))]
)
def test_engine_exports_from_the_checkpoint(checkpoint, model, image_paths, tmp_path, form):
    """As anomalib's integration tests do it: a fresh model, and the checkpoint's path."""
    fresh = Cpr(**TINY_BACKBONE, descriptor_channels=8, k=2)
    engine = Engine(default_root_dir=tmp_path, logger=False)
    path = engine.export(fresh, form, ckpt_path=checkpoint, export_root=tmp_path)
    if form == "torch":
        assert torch.equal(
            torch.load(path, weights_only=False)["model"](images_of(image_paths, 2, (64, 64)))[0],
            model(images_of(image_paths, 2, (64, 64)))[0],
        )
    else:
        assert_like(model, path, images_of(image_paths, 2, (64, 64)))


def test_export_changes_nothing_in_the_model(model, image_paths, tmp_path):
    images = images_of(image_paths, 2, (64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images)
    model.train()
    modes = [part.training for part in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    paths = [model.to_openvino(tmp_path), model.to_torch(tmp_path), model.to_onnx(tmp_path), model.to_torch(tmp_path)]
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert model.state_dict().keys() == before.keys()
    # NaN stands for thresholds that were not determined
    assert all(
        torch.equal(value.nan_to_num(-7), before[name].nan_to_num(-7)) for name, value in model.state_dict().items()
    )
    model.eval()
    assert torch.equal(model(images).anomaly_map, expected.anomaly_map)
    assert_like(model, paths[0], images)
    assert_like(model, paths[2], images)


def test_failed_export_leaves_the_model_as_it_was(model, tmp_path):
    model.train()
    with pytest.raises(ValueError, match="dynamo"):
        model.to_onnx(tmp_path, dynamo=False)
    assert model.training
    assert model.model.metric_heads[0][0].weight.requires_grad


@pytest.mark.parametrize("matching", ["aligned", "unaligned", "anywhere"])
def test_openvino_computes_in_float32_also_where_the_cpu_prefers_bfloat16(files, unaligned, anywhere, matching):
    core = ov.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    path = {"aligned": files, "unaligned": unaligned[1], "anywhere": anywhere[1]}[matching]["openvino"]
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    rounded = [
        operation.get_friendly_name()
        for operation in compiled.get_runtime_model().get_ops()
        if operation.rt_info["runtimePrecision"].astype(str) == "bf16"
    ]
    assert rounded == []


@pytest.mark.parametrize("matching", ["aligned", "unaligned", "anywhere"])
def test_openvino_finds_nothing_to_rewrite(files, unaligned, anywhere, matching):
    """What its CPU plugin rewrites, it may compute in bfloat16, where the CPU has that; seen on any CPU."""
    path = {"aligned": files, "unaligned": unaligned[1], "anywhere": anywhere[1]}[matching]["openvino"]
    operations = ov.Core().read_model(path).get_ops()
    assert {op.get_type_name() for op in operations}.isdisjoint({"Divide", "Subtract", "Unsqueeze"})
    versions = {op.get_type_name(): op.get_type_info().version_id for op in operations}
    executed = {"Pad": "opset1", "MaxPool": "opset1", "Interpolate": "opset4"}
    if matching == "aligned":
        executed["Softmax"] = "opset1"
    assert {name: versions[name] for name in executed} == executed


class Distances(torch.nn.Module):
    def __init__(self, gallery):
        super().__init__()
        self.register_buffer("gallery", gallery)

    def forward(self, histograms):
        distances = histogram_distance(histograms, self.gallery)
        return distances, smallest(distances, 10)


def test_ties_and_empty_bins_survive_export(tmp_path):
    """Doubled images tie exactly; words that do not occur have a share of 0, whose logarithm must stay finite."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(64, np.ones(12) / 12, size=(40, 25)) * generator.integers(0, 2, (40, 25, 12))
    gallery = torch.from_numpy(counts / 64).float()
    gallery[20:] = gallery[:20]
    module = Distances(gallery).eval()
    path = tmp_path / "distances.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        module,
        (gallery[:2],),
        path,
        dynamo=True,
        opset_version=export.OPSET,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    query = gallery[5:16]
    distances, references = (value.numpy() for value in module(query))
    order = np.lexsort((np.broadcast_to(np.arange(40), distances.shape), distances))[:, :10]
    assert np.array_equal(np.sort(references), np.sort(order))
    session = onnxruntime.InferenceSession(path)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (
        session.run(None, {session.get_inputs()[0].name: query.numpy()}),
        list(compiled(query.numpy()).values()),
    ):
        assert np.allclose(found[0], distances, atol=1e-4)
        assert np.array_equal(np.sort(found[1]), np.sort(references))


def readers_behind_scales(operation):
    """Kinds of the operations that read a constant, looking through what turns integers into numbers."""
    for reader in (target.get_node() for target in operation.output(0).get_target_inputs()):
        if reader.get_type_name() in {"Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize"}:
            yield from readers_behind_scales(reader)
        else:
            yield reader.get_type_name()


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(CompressionType.FP16, 0.02), (CompressionType.INT8, 0.2), (CompressionType.INT8_PTQ, 0.3)],
)
def test_compression_leaves_retrieval_and_distances_alone(model, datamodule, image_paths, tmp_path, kind, tolerance):
    path = model.to_openvino(tmp_path, compression_type=kind, datamodule=datamodule)
    compressed = ov.Core().read_model(path)
    constants = {op.get_friendly_name(): op for op in compressed.get_ops() if op.get_type_name() == "Constant"}
    quantisers = [op for op in compressed.get_ops() if op.get_type_name() == "FakeQuantize"]
    assert bool(quantisers) == (kind == CompressionType.INT8_PTQ)
    for quantiser in quantisers:
        readers = [reader.get_node() for reader in quantiser.output(0).get_target_inputs()]
        assert all(reader.get_type_name() in {"Convolution", "GroupConvolution"} for reader in readers)
    eight_bits = {"<Type: 'int8_t'>", "<Type: 'uint8_t'>"}
    small = [op for op in constants.values() if str(op.get_element_type()) in eight_bits]
    assert bool(small) == (kind != CompressionType.FP16)
    assert {reader for op in small for reader in readers_behind_scales(op)} <= {"Convolution", "GroupConvolution"}
    exact = {"MatMul", "Gather", "GatherND", "TopK", "Log", "Maximum", "ReduceSum", "Interpolate", "Pad", "Power"}
    for op in compressed.get_ops():
        if op.get_type_name() in exact:
            assert all(value.get_node().get_type_name() != "FakeQuantize" for value in op.input_values())
    if kind == CompressionType.FP16:
        stored = {str(op.get_element_type()) for name, op in constants.items() if export.DESCRIPTORS in name}
        assert stored == {"<Type: 'float16'>"}
        retrieval = [op for op in compressed.get_ops() if op.get_type_name() == "MatMul"]
        assert [str(op.input_value(0).get_element_type()) for op in retrieval] == ["<Type: 'float32'>"]
    images = images_of(image_paths, 5, (64, 64))
    with torch.no_grad():
        expected = model(images)
    assert np.abs(run(path, images)["pred_score"] - expected.pred_score.numpy()).max() < tolerance


def test_quantisation_asks_for_images(model, tmp_path):
    with pytest.raises(ValueError, match="INT8_PTQ needs images"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


@pytest.mark.parametrize(
    ("dtype", "onnx_type", "openvino_type"),
    [
        ("float16", onnx.TensorProto.FLOAT16, "f16"),
        ("int8", onnx.TensorProto.INT8, "i8"),
        ("int4", onnx.TensorProto.UINT8, "u8"),
    ],
)
def test_small_banks_stay_small(checkpoint, image_paths, tmp_path, dtype, onnx_type, openvino_type):
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True, bank_dtype=dtype, max_references=4).eval()
    path = model.to_onnx(tmp_path)
    shape = [4, 4 if dtype == "int4" else 8, 16, 16]
    held = [tensor.data_type for tensor in onnx.load(path).graph.initializer if list(tensor.dims) == shape]
    assert set(held) == {onnx_type}
    assert_like(model, path, images_of(image_paths, 2, (64, 64)))
    path = model.to_openvino(tmp_path)
    constants = [op for op in ov.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    held = [op.get_element_type().get_type_name() for op in constants if list(op.get_output_shape(0)) == shape]
    assert set(held) == {openvino_type}
    assert_like(model, path, images_of(image_paths, 2, (64, 64)))


def test_one_file_where_it_can_be_and_two_beyond_the_limit(model, files, image_paths, tmp_path, monkeypatch):
    assert [path.name for path in files["onnx"].parent.iterdir()] == ["model.onnx"]
    monkeypatch.setattr(export, "ONE_FILE_LIMIT", 1000)
    path = model.to_onnx(tmp_path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert_like(model, path, images_of(image_paths, 2, (64, 64)))
    assert_like(model, model.to_openvino(tmp_path), images_of(image_paths, 2, (64, 64)))


def test_checkpoint_of_a_training_with_other_metrics(tiny_model, datamodule, tmp_path):
    """AUPRO has a buffer, which must not keep a checkpoint from being loaded without that metric, or with it."""
    metrics = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, max_steps=1)
    engine.fit(tiny_model(evaluator=metrics, visualizer=False), datamodule=datamodule)
    (path,) = tmp_path.rglob("model.ckpt")
    Cpr.load_from_checkpoint(path, weights_only=True)
    with_other = Evaluator(
        test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="a_"), AUPRO(fields=["anomaly_map", "gt_mask"])]
    )
    Cpr.load_from_checkpoint(path, weights_only=True, evaluator=with_other)


def test_all_draw_the_same_heat_map(checkpoint, files, mvtec_root, datamodule, image_paths, tmp_path, monkeypatch):
    """Pictures of `anomalib predict` beside those drawn from the inferencers' results."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True, visualizer=True)
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    batches = engine.predict(model, datamodule=datamodule)
    pictures = list(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == len(image_paths)
    torch_one, openvino_one = (
        TorchInferencer(files["torch"], device="cpu"),
        OpenVINOInferencer(files["openvino"], "CPU"),
    )
    for batch in batches:
        for item in batch.items:
            expected = np.asarray(
                visualize_image_item(item, fields=["image"], overlay_fields=[("image", ["anomaly_map"])])
            )
            for inferencer in (torch_one, openvino_one):
                result = inferencer.predict(item.image_path)
                item.anomaly_map = torch.as_tensor(np.asarray(result.anomaly_map)).squeeze()
                drawn = np.asarray(
                    visualize_image_item(item, fields=["image"], overlay_fields=[("image", ["anomaly_map"])])
                )
                assert drawn.shape == expected.shape
                assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 2
    del mvtec_root


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_default_arguments(mvtec_root, tmp_path, form):
    """All of the default but the weights, which are not to be had without internet."""
    data = MVTecAD(root=mvtec_root, category="screw", train_batch_size=2, eval_batch_size=2, num_workers=0)
    model = get_model("cpr", pre_trained=False)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, devices=1)
    engine.fit(model, datamodule=data)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    path = engine.export(get_model("cpr", pre_trained=False), form, ckpt_path=checkpoint, export_root=tmp_path)
    assert_like(model.eval(), path, torch.rand(2, 3, 256, 200), tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx", "openvino"])
def test_command_line_in_a_fresh_process(checkpoint, model, image_paths, tmp_path, form):
    command = ["export", "--model", "Cpr", "--ckpt_path", str(checkpoint), "--export_type", form]
    script = "import sys; from anomalib.cli.cli import main; sys.argv = ['anomalib', *sys.argv[1:]]; main()"
    subprocess.run(
        [sys.executable, "-c", script, *command, "--default_root_dir", str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    (path,) = (path for path in tmp_path.rglob("model.*") if path.suffix in {".pt", ".onnx", ".xml"})
    if form != "torch":
        assert_like(model, path, images_of(image_paths, 2, (64, 64)))

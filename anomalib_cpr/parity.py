# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr parity``: does an exported model score like its checkpoint?

Exports a checkpoint through anomalib's own pipeline, sends the same images through anomalib's Engine and through each
exported file, and reports how far scores, maps and labels differ.

Retrieval is discrete. A visual word or the K-th reference can change with the last bit of a feature, and then a score
changes although nothing is wrong. Images with another set of references are therefore counted apart. Which references
an exported file retrieves is read from the file itself: its graph holds them, and a copy of the file gets them as one
more output. Whether the copy scores bit for bit like the file is checked along.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from rich.console import Console
from rich.table import Table

from .command_arguments import existing_file, output_file, read_datamodule
from .lightning_model import Cpr
from .progress import progress_bar

TAKES_REST = True  # what argparse does not know is read as arguments of the data module
ENGINE = "engine"
TRUST = "TRUST_REMOTE_CODE"
COMPRESSIONS = {"openvino": None, **{f"openvino-{kind.value}": kind for kind in CompressionType}}
FORMATS = ("torch", "onnx", *COMPRESSIONS, "tensorrt")
DEFAULT_FORMATS = ("torch", "onnx", "openvino")
TOLERANCE = 1e-3
PACKAGES = ("anomalib", "nncf", "onnxruntime", "openvino", "torch")


class Prediction(NamedTuple):
    """What a runtime says about one image.

    Attributes:
        score (float): Normalised image score.
        label (bool): Anomalous or not.
        anomaly_map (np.ndarray): Normalised, ``(height, width)``.
        references (frozenset[int]): Training images that were compared with.
        confirmed (bool): The references belong to this very score, bit for bit.
    """

    score: float
    label: bool
    anomaly_map: np.ndarray
    references: frozenset[int]
    confirmed: bool = True


@dataclass
class Differences:
    """Differences of one format to the Engine, image by image, and what it costs.

    Attributes:
        name (str): Format.
        bytes (int): Size of its files.
        threshold (float): Above it, a score means an anomaly.
        milliseconds (list[float]): Latency of each image.
        labels_equal (int): Images with the label of the Engine.
        labels_at_threshold (int): Images with another label whose scores lie at the threshold within TOLERANCE: it is
            the score of one image, where anomalib chose it on these images, and the last bit decides.
        flips (int): Images with another set of references.
        unconfirmed (int): Images whose references could not be read without changing the score.
        scores (list[float]): |Δ score| of images with the same references.
        maps (list[float]): Largest |Δ map| of these.
        map_means (list[float]): Mean |Δ map| of these.
        flipped_scores (list[float]): |Δ score| of the flipped images.
    """

    name: str
    bytes: int
    threshold: float = 0.5
    milliseconds: list[float] = field(default_factory=list)
    labels_equal: int = 0
    labels_at_threshold: int = 0
    flips: int = 0
    unconfirmed: int = 0
    scores: list[float] = field(default_factory=list)
    maps: list[float] = field(default_factory=list)
    map_means: list[float] = field(default_factory=list)
    flipped_scores: list[float] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of images compared."""
        return len(self.scores) + len(self.flipped_scores)

    def add(self, expected: Prediction, found: Prediction) -> None:
        """Compare one image.

        Args:
            expected (Prediction): Of the Engine.
            found (Prediction): Of the format.
        """
        if expected.label == found.label:
            self.labels_equal += 1
        elif max(abs(prediction.score - self.threshold) for prediction in (expected, found)) <= TOLERANCE:
            self.labels_at_threshold += 1
        self.unconfirmed += not found.confirmed
        difference = np.abs(expected.anomaly_map.astype(np.float64) - found.anomaly_map)
        if expected.references == found.references:
            self.scores.append(abs(expected.score - found.score))
            self.maps.append(float(difference.max()))
            self.map_means.append(float(difference.mean()))
        else:
            self.flips += 1
            self.flipped_scores.append(abs(expected.score - found.score))

    def row(self) -> dict[str, Any]:
        """The line of the report, as plain data; differences are those of images with the same references."""
        return {
            "format": self.name,
            "images": self.images,
            "labels_equal": self.labels_equal,
            "labels_at_threshold": self.labels_at_threshold,
            "score_max_abs": max(self.scores, default=0.0),
            "score_mean_abs": float(np.mean(self.scores)) if self.scores else 0.0,
            "map_max_abs": max(self.maps, default=0.0),
            "map_mean_abs": float(np.mean(self.map_means)) if self.maps else 0.0,
            "reference_flips": self.flips,
            "flipped_score_max_abs": max(self.flipped_scores, default=0.0),
            "ms_median": float(np.median(self.milliseconds)) if self.milliseconds else None,
            "bytes": self.bytes,
        }


class Timed:
    """Calls a model and keeps how long it took."""

    def __init__(self, model: Callable) -> None:
        self.model = model
        self.milliseconds: list[float] = []

    def __call__(self, *args: Any) -> Any:  # noqa: ANN401
        """Call the model."""
        start = time.perf_counter()
        result = self.model(*args)
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        return result


@contextmanager
def recorded_references(model: Cpr) -> Iterator[list[list[int]]]:
    """Collect the references that a model retrieves while it predicts.

    Args:
        model (Cpr): In this process.

    Yields:
        list[list[int]]: Filled with the references of each image.
    """
    retriever, found = model.model.global_retriever, []
    nearest, shadowed = retriever.nearest, vars(retriever).get("nearest")

    def recorder(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        references = nearest(*args, **kwargs)
        found.extend(references.tolist())
        return references

    retriever.nearest = recorder  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del retriever.nearest
        if shadowed is not None:
            retriever.nearest = shadowed  # type: ignore[method-assign]


# --- runtimes: each is opened with the exported file and predicts one image file


@contextmanager
def trusting_own_files() -> Iterator[None]:
    """Let anomalib load a pickled model, which it refuses unless told to: this process has just written it."""
    before = os.environ.get(TRUST)
    os.environ[TRUST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRUST]
        else:
            os.environ[TRUST] = before


class TorchRuntime:
    """The pickled model in anomalib's ``TorchInferencer``.

    Args:
        path (Path): File ``.pt``.
        threads (int | None): Of torch.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        del threads  # set for the whole process
        with trusting_own_files():
            self.inferencer = cast("Any", TorchInferencer(path, device="cpu"))
        self.module = cast("Cpr", self.inferencer.model)
        self.timed = Timed(self.module)
        self.inferencer.model = self.timed  # anomalib calls whatever stands here

    def predict(self, path: Path) -> Prediction:
        """Predict one image file."""
        with recorded_references(self.module) as references:
            result: Any = self.inferencer.predict(path)
        return Prediction(
            float(result.pred_score), bool(result.pred_label), _plane(result.anomaly_map), frozenset(references[0])
        )


class OnnxRuntime:
    """The ``.onnx`` file in ONNX Runtime.

    Args:
        path (Path): File ``.onnx``.
        threads (int | None): Of a convolution.
        providers (Sequence[str]): ONNX Runtime's execution providers.
    """

    def __init__(
        self, path: Path, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        import onnxruntime  # noqa: PLC0415 - optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        self.names = [output.name for output in session.get_outputs()]
        self.timed = Timed(lambda image: session.run(None, {"input": image}))
        with onnx_with_references(path) as (copy, name):
            self.witness = onnxruntime.InferenceSession(copy, options, providers=list(providers))
        self.wanted = ["pred_score", "anomaly_map", name]

    def predict(self, path: Path) -> Prediction:
        """Predict one image file."""
        image = np.asarray(read_image(path, as_tensor=True))[None]
        result = dict(zip(self.names, self.timed(image), strict=True))
        score, anomaly_map, references = self.witness.run(self.wanted, {"input": image})
        return Prediction(
            float(result["pred_score"][0]),
            bool(result["pred_label"][0]),
            _plane(result["anomaly_map"]),
            frozenset(references[0].tolist()),
            np.array_equal(score, result["pred_score"]) and np.array_equal(anomaly_map, result["anomaly_map"]),
        )


class OpenVinoRuntime:
    """The ``.xml`` file in anomalib's ``OpenVINOInferencer``.

    Args:
        path (Path): File ``.xml``, with the ``.bin`` beside it.
        threads (int | None): Of one inference.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import openvino  # noqa: PLC0415 - optional

        config = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.inferencer = OpenVINOInferencer(path, device="CPU", config=config)
        self.timed = self.inferencer.model = Timed(self.inferencer.model)
        core = openvino.Core()
        model = core.read_model(path)
        model.add_outputs([openvino_references(model)])
        self.witness = core.compile_model(model, "CPU", config)

    def predict(self, path: Path) -> Prediction:
        """Predict one image file."""
        result: Any = self.inferencer.predict(path)
        witness = self.witness(self.inferencer.pre_process(np.asarray(read_image(path, as_tensor=False))))
        references = witness[len(self.witness.outputs) - 1]
        return Prediction(
            float(result.pred_score[0]),
            bool(result.pred_label[0]),
            _plane(result.anomaly_map),
            frozenset(references[0].tolist()),
            np.array_equal(witness["pred_score"], result.pred_score)
            and np.array_equal(witness["anomaly_map"].squeeze(), _plane(result.anomaly_map)),
        )


@contextmanager
def onnx_with_references(path: Path) -> Iterator[tuple[Path, str]]:
    """A copy of an exported ONNX file that puts out the retrieved references as well.

    Args:
        path (Path): Exported file.

    Yields:
        tuple[Path, str]: The copy, beside the file because of external data, and the name of the new output. The copy
            is removed at the end.

    Raises:
        RuntimeError: If the graph holds no retrieval, or several.
    """
    import onnx  # noqa: PLC0415 - optional

    model = onnx.load(str(path), load_external_data=False)
    used = {name for node in model.graph.node for name in node.input}
    found = [node.output[1] for node in model.graph.node if node.op_type == "TopK" and node.output[1] in used]
    name = _only(found, path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    copy = path.with_name(f"{path.stem}.references.onnx")
    try:
        onnx.save(model, str(copy))
        yield copy, name
    finally:
        copy.unlink(missing_ok=True)


def openvino_references(model: Any) -> Any:  # noqa: ANN401 - openvino.Model, openvino.Output
    """The output of the graph's nodes that holds the retrieved references.

    Args:
        model (ov.Model): Exported model.

    Returns:
        ov.Output: To be added to the model's outputs.

    Raises:
        RuntimeError: If the graph holds no retrieval, or several.
    """
    found = [
        node.output(1)
        for node in model.get_ops()
        # The visual word of a cell is a TopK as well, of four dimensions.
        if node.get_type_name() == "TopK"
        and node.output(1).get_target_inputs()
        and node.output(1).get_partial_shape().rank.get_length() == 2
    ]
    return _only(found, model.get_friendly_name())


def _only(found: list, what: object) -> Any:  # noqa: ANN401
    if len(found) != 1:
        raise RuntimeError(
            f"{what}: {len(found)} places in the graph look like the retrieval of references, expected 1."
        )
    return found[0]


def _plane(anomaly_map: Any) -> np.ndarray:  # noqa: ANN401
    return np.asarray(anomaly_map).squeeze()


# --- the comparison


def engine_predictions(model: Cpr, datamodule: AnomalibDataModule) -> dict[str, Prediction]:
    """Run a model over the test images through anomalib's Engine.

    Args:
        model (Cpr): Trained.
        datamodule (AnomalibDataModule): Its test images are predicted.

    Returns:
        dict[str, Prediction]: By path of the image.
    """
    result: dict[str, Prediction] = {}
    with tempfile.TemporaryDirectory() as folder, recorded_references(model) as references:
        engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", devices=1)
        batches: Any = engine.predict(model, datamodule=datamodule)
        for batch in batches or []:
            for index, path in enumerate(batch.image_path):
                result[path] = Prediction(
                    float(batch.pred_score[index]),
                    bool(batch.pred_label[index]),
                    _plane(batch.anomaly_map[index]),
                    frozenset(references[len(result)]),
                )
    return result


def export(model: Cpr, name: str, root: Path, datamodule: AnomalibDataModule) -> Path:
    """Export one format through anomalib's pipeline.

    Args:
        model (Cpr): Trained.
        name (str): One of :data:`FORMATS`.
        root (Path): Folder.
        datamodule (AnomalibDataModule): Calibrates INT8.

    Returns:
        Path: The file to be opened.
    """
    if name == "torch":
        return model.to_torch(root)
    if name in {"onnx", "tensorrt"}:
        return model.to_onnx(root)
    return model.to_openvino(
        root, model_file_name=name, compression_type=COMPRESSIONS[name], datamodule=datamodule if "_" in name else None
    )


def open_runtime(name: str, path: Path, threads: int | None = None) -> Any:  # noqa: ANN401
    """Open an exported file.

    Args:
        name (str): One of :data:`FORMATS`.
        path (Path): From :func:`export`.
        threads (int | None): Threads; None leaves them to the runtime.

    Returns:
        Any: With ``predict(path)`` and ``timed``.
    """
    if name == "torch":
        return TorchRuntime(path, threads)
    if name == "onnx":
        return OnnxRuntime(path, threads)
    if name == "tensorrt":
        return OnnxRuntime(path, threads, ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    return OpenVinoRuntime(path, threads)


def compare(
    checkpoint: Path,
    datamodule: AnomalibDataModule,
    formats: Sequence[str] = DEFAULT_FORMATS,
    root: Path | None = None,
    threads: int | None = None,
    *,
    progress: bool = True,
) -> list[Differences]:
    """Compare exported formats with the checkpoint in anomalib's Engine.

    Latencies are of single images, without reading them; the formats take turns, image by image.

    Args:
        checkpoint (Path): Of a finished training.
        datamodule (AnomalibDataModule): Its test images are compared.
        formats (Sequence[str]): Of :data:`FORMATS`.
        root (Path | None): Where to leave the exported files; None removes them.
        threads (int | None): Threads of each runtime; None leaves them to the runtime.
        progress (bool): Show a progress bar.

    Returns:
        list[Differences]: Of the eager model itself, image by image instead of in batches, and of each format.
    """
    if threads:
        torch.set_num_threads(threads)
    model = cast("Cpr", Cpr.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, visualizer=False))
    expected = engine_predictions(model, datamodule)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        root = root or Path(folder)
        eager = EagerRuntime(model)
        runtimes: dict[str, Any] = {ENGINE: eager}
        sizes = {ENGINE: checkpoint.stat().st_size}
        for name in formats:
            path = export(model, name, root, datamodule)
            sizes[name] = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))
            runtimes[name] = open_runtime(name, path, threads)
        threshold = float(cast("Any", model.post_processor).normalized_image_threshold)
        results = [Differences(name, sizes[name], threshold) for name in runtimes]
        track = progress_bar("Images", len(expected), enabled=progress)
        try:
            for path, prediction in track(expected.items()):
                found = {name: runtime.predict(Path(path)) for name, runtime in runtimes.items()}
                for result in results:
                    result.add(prediction, found[result.name])
        except KeyboardInterrupt:  # what was compared so far is still true
            pass
        for result in results:
            result.milliseconds = runtimes[result.name].timed.milliseconds
    return results


class EagerRuntime:
    """The model itself, pre- and post-processing included, one image at a time.

    Args:
        model (Cpr): Trained.
    """

    def __init__(self, model: Cpr) -> None:
        self.model = model
        self.timed = Timed(model)

    @torch.inference_mode()
    def predict(self, path: Path) -> Prediction:
        """Predict one image file."""
        with recorded_references(self.model) as references:
            result = self.timed(read_image(path, as_tensor=True)[None])
        return Prediction(
            float(result.pred_score), bool(result.pred_label), _plane(result.anomaly_map), frozenset(references[0])
        )


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``anomalib-cpr parity``.

    Args:
        parser (argparse.ArgumentParser): To be extended.
    """
    parser.add_argument("--ckpt", type=existing_file, required=True, metavar="FILE", help="checkpoint of a trained Cpr")
    parser.add_argument(
        "--data",
        required=True,
        metavar="CLASS",
        help="data module, with --data.root, --data.category ... as in anomalib",
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(DEFAULT_FORMATS), help="what to compare")
    parser.add_argument("--export-root", type=Path, metavar="FOLDER", help="keep the exported files here")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every runtime (default: its own choice)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the report to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print the report.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0 if every uncompressed format keeps within the tolerance, 1 otherwise.
    """
    _check_installed(arguments.formats)
    datamodule = read_datamodule("parity", ["--data", arguments.data, *arguments.rest])
    results = compare(arguments.ckpt, datamodule, arguments.formats, arguments.export_root, arguments.threads)
    if arguments.json is not None:
        report = {**environment(arguments, datamodule), "rows": [result.row() for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    show(results)
    return int(any(faults(result) for result in results))


def _check_installed(formats: Sequence[str]) -> None:
    """Refuse before the first prediction what could only fail after all of them."""
    runtimes = {
        name: "openvino" if name.startswith("openvino") else "onnxruntime" for name in formats if name != "torch"
    }
    missing = sorted({module for module in runtimes.values() if find_spec(module) is None})
    if missing:
        without = [name for name in formats if runtimes.get(name) not in missing]
        raise SystemExit(
            f"{' and '.join(missing)} missing: pip install {' '.join(missing)}, or leave out what needs it: --formats "
            f"{' '.join(without) or 'torch'}."
        )


def faults(result: Differences) -> list[str]:
    """What is wrong with a format that promises the checkpoint's float32 scores.

    Args:
        result (Differences): Of one format.

    Returns:
        list[str]: Empty for compressed formats, whose differences are for the user to judge.
    """
    if COMPRESSIONS.get(result.name) is not None:
        return []
    row = result.row()
    found = []
    differ = row["images"] - row["labels_equal"] - row["labels_at_threshold"]
    if differ:
        found.append(f"{differ} labels differ")
    if row["score_max_abs"] > TOLERANCE:
        found.append(f"|Δ score| {row['score_max_abs']:.1e} above {TOLERANCE:.0e} with the same references")
    if row["reference_flips"] > 0.01 * row["images"]:
        found.append(f"{row['reference_flips']} reference flips, above 1 %")
    return found


def show(results: Sequence[Differences]) -> None:
    """Print the report as a table.

    Args:
        results (Sequence[Differences]): Of all formats.
    """
    table = Table(title=f"Difference to the checkpoint in anomalib's Engine, {results[0].images} images")
    for heading in ("Format", "Labels equal", "|Δ score| max", "mean", "|Δ map| max", "mean", "Reference flips"):
        table.add_column(heading, justify="left" if heading == "Format" else "right")
    for heading in ("there |Δ score|", "ms, median", "MB"):
        table.add_column(heading, justify="right")
    console = Console()
    for result in results:
        row = result.row()
        numbers = [f"{row[key]:.1e}" for key in ("score_max_abs", "score_mean_abs", "map_max_abs", "map_mean_abs")]
        flipped = f"{row['flipped_score_max_abs']:.1e}" if row["reference_flips"] else "-"
        speed = f"{row['ms_median']:.1f}" if row["ms_median"] is not None else "-"
        labels = f"{row['labels_equal']} of {row['images']}"
        table.add_row(
            row["format"], labels, *numbers, str(row["reference_flips"]), flipped, speed, f"{row['bytes'] / 1e6:.1f}"
        )
    console.print(table)
    console.print("Scores and maps are normalised (0..1). Differences are of images with the same references.")
    for result in results:
        if result.unconfirmed:
            console.print(f"{result.name}: references of {result.unconfirmed} images could not be read exactly.")
        if result.labels_at_threshold:
            console.print(
                f"{result.name}: {result.labels_at_threshold} labels differ where the score is the threshold, within "
                f"{TOLERANCE:.0e}; anomalib's adaptive threshold is the score of one of the images it was chosen on."
            )
        for fault in faults(result):
            console.print(f"{result.name}: {fault}.")


def environment(arguments: argparse.Namespace, datamodule: AnomalibDataModule) -> dict[str, Any]:
    """What the numbers depend on.

    Args:
        arguments (argparse.Namespace): Of the command.
        datamodule (AnomalibDataModule): The data.

    Returns:
        dict[str, Any]: Plain data.
    """
    found = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    return {
        "checkpoint": arguments.ckpt.name,
        "data": f"{type(datamodule).__name__}/{getattr(datamodule, 'category', '')}",
        "threads": arguments.threads,
        "machine": platform.machine(),
        "versions": dict(sorted(found.items())),
    }

# SPDX-License-Identifier: Apache-2.0
"""What CPR adds to anomalib's export so that a file scores like its checkpoint. anomalib's pipeline does the rest.

Retrieval is discrete: a visual word, and with it a reference, can change with the last bit of a feature. So an exported
model has to compute in float32 what the checkpoint computes in float32, also where a runtime would rather save:
OpenVINO computes in bfloat16 by default on every CPU that can, FP16 compression rounds constants, and quantisation to
INT8 would round distances. The functions here say, in the file itself, what may not be rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from torch import nn

if TYPE_CHECKING:
    import openvino as ov

# An ONNX file is one protobuf message, and those end at 2^31 bytes. The rest is left to the graph itself.
ONE_FILE_LIMIT = 2**31 - 2**27
OPSET = 18  # the exporter's own; asked for another, it makes this one and tries to convert it
DESCRIPTORS = "bank.descriptors"
NETWORKS = ("feature_extractor", "metric_heads")
REWRITTEN = ("Pad", "MaxPool", "Interpolate", "Softmax", "Unsqueeze", "Subtract", "Divide")
FULL_PRECISION = "precise_0"  # OpenVINO's name for "infer in the original precision" in the information at run time


@contextmanager
def ready_for_export(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the module is as it was before.

    Without it, an export leaves a model in evaluation mode, and a pickled model would record gradients wherever it is
    used: ``TorchInferencer`` does not switch them off.

    Args:
        module (nn.Module): The model.
    """
    modes = {part: part.training for part in module.modules()}
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for part, mode in modes.items():
            part.training = mode


def fits_one_file(module: nn.Module) -> bool:
    """Whether weights and bank fit into an ONNX file; otherwise they have to lie beside it.

    Args:
        module (nn.Module): The model.

    Returns:
        bool: True below 2 GB.
    """
    return sum(tensor.nbytes for tensor in module.state_dict().values()) < ONE_FILE_LIMIT


def convolutions_of(model: "ov.Model") -> list[Any]:
    """The convolutions of backbone and heads, which is nearly all that they compute.

    Args:
        model (ov.Model): Converted from ONNX.

    Returns:
        list[Any]: Operations (``openvino.Node``).

    Raises:
        RuntimeError: If the kernels cannot be told from each other by their names.
    """
    kernels = [
        operation
        for operation in model.get_ops()
        if operation.get_type_name() in {"Convolution", "GroupConvolution"}
        and any(part in _constant_name(operation.input_value(1)) for part in NETWORKS)
    ]
    if not kernels:
        raise RuntimeError("The converted model has no convolution that is named after the backbone or the heads.")
    return kernels


def networks_of(model: "ov.Model") -> set[str]:
    """Names of the operations that turn an image into features and descriptors: convolutions, mostly.

    The rest, that is retrieval, foreground, matching and scoring, is what must not be rounded.

    Args:
        model (ov.Model): Converted from ONNX.

    Returns:
        set[str]: Friendly names: all that lies before the last convolution with a learned kernel of the backbone and
            of the heads.

    Raises:
        RuntimeError: If the kernels cannot be told from each other by their names.
    """
    found: set[str] = set()
    pending = convolutions_of(model)
    while pending:
        operation = pending.pop()
        if operation.get_friendly_name() not in found:
            found.add(operation.get_friendly_name())
            pending.extend(value.get_node() for value in operation.input_values())
    return found


def _constant_name(value: Any) -> str:  # noqa: ANN401 - openvino.Output
    """Name of the constant behind a kernel, with the casts and scales of compression between them."""
    node = value.get_node()
    while node.get_type_name() != "Constant" and node.get_input_size():
        node = node.input_value(0).get_node()
    return node.get_friendly_name()


def compress_weights(model: "ov.Model") -> "ov.Model":
    """Store the kernels of backbone and heads in 8 bits; they are the only weights that may be rounded.

    A codebook in 8 bits gives other visual words, a foreground in 8 bits another foreground: on MVTec AD screw, pixel
    AP fell from 0.637 to 0.478 when all constants were rounded, and not at all with the kernels alone.

    Args:
        model (ov.Model): Converted from ONNX.

    Returns:
        ov.Model: The same, smaller by three quarters of its networks (not of its bank, which has ``bank_dtype``).
    """
    import nncf  # noqa: PLC0415 - optional, and slow to import

    return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=_all_but_convolutions(model)))


def quantise(model: "ov.Model", datamodule: AnomalibDataModule | None) -> "ov.Model":
    """Post-training quantisation of the convolutions only, on the validation images, as anomalib does it.

    What lies between them stays in float32: with the additions and concatenations of a DenseNet quantised as well, all
    distances on MVTec AD screw grew beyond the normalisation's end, and every image scored 1.

    Args:
        model (ov.Model): Converted from ONNX.
        datamodule (AnomalibDataModule | None): Its validation images calibrate.

    Returns:
        ov.Model: Convolutions in INT8; all else as it was.

    Raises:
        ValueError: If there is no data module.
    """
    import nncf  # noqa: PLC0415 - optional, and slow to import

    if datamodule is None:
        raise ValueError("compression_type=INT8_PTQ needs images to calibrate with: give datamodule (--data).")
    datamodule.setup("fit")
    images = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
    return nncf.quantize(model, images, ignored_scope=nncf.IgnoredScope(names=_all_but_convolutions(model)))


def _all_but_convolutions(model: "ov.Model") -> list[str]:
    kept = {operation.get_friendly_name() for operation in convolutions_of(model)}
    return [
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() not in {"Constant", "Parameter", "Result"}
        and operation.get_friendly_name() not in kept
    ]


def keep_full_precision(path: Path, *, compress_to_fp16: bool = False) -> None:
    """Say in an OpenVINO file that its operations are to be computed in float32, whatever the CPU prefers.

    Args:
        path (Path): The ``.xml`` file; it and its ``.bin`` are rewritten.
        compress_to_fp16 (bool): Store kernels and descriptors in FP16. Histograms, codebook and everything else that
            retrieval and scoring compare with stay float32.
    """
    import openvino as ov  # noqa: PLC0415 - optional

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is about to be replaced
    model = core.read_model(path)
    networks = networks_of(model) if compress_to_fp16 else set()
    _settle(model)
    for operation in model.get_ops():
        name = operation.get_friendly_name()
        may_be_rounded = operation.get_type_name() == "Constant" and (name in networks or DESCRIPTORS in name)
        if not may_be_rounded:
            operation.rt_info[FULL_PRECISION] = ""
    ov.save_model(model, path, compress_to_fp16=compress_to_fp16)


def _settle(model: "ov.Model") -> None:
    """Write operations as OpenVINO's CPU plugin would rewrite them, because its own rewriting forgets the precision."""
    for operation in model.get_ordered_ops():
        if operation.get_type_name() not in REWRITTEN:
            continue
        new = _as_executed(operation) or _as_sum_or_product(operation)
        if new is not None:
            new.set_friendly_name(operation.get_friendly_name())
            operation.output(0).replace(new.output(0))


def _as_executed(operation: Any) -> Any:  # noqa: ANN401 - openvino.Node
    """Pad, MaxPool, Interpolate and Softmax in the versions that the plugin executes, Unsqueeze as Reshape."""
    from openvino import opset1  # noqa: PLC0415 - optional
    from openvino.utils.node_factory import NodeFactory  # noqa: PLC0415 - optional

    kind, inputs, attributes = operation.get_type_name(), operation.input_values(), operation.get_attributes()
    shape = _shape_of(operation)
    if kind == "Pad":
        return opset1.pad(*inputs[:3], attributes["pad_mode"], *inputs[3:])
    if kind == "MaxPool" and set(attributes["dilations"]) == {1}:
        names = ("strides", "pads_begin", "pads_end", "kernel", "rounding_type", "auto_pad")
        return opset1.max_pool(inputs[0], *(attributes[name] for name in names))
    if kind == "Softmax":
        return opset1.softmax(inputs[0], attributes["axis"] % len(shape))
    if kind == "Interpolate" and -1 not in shape[2:]:
        sizes = [opset1.constant(np.array(shape[2:])), opset1.constant(np.ones(2, np.float32))]
        axes = opset1.constant(np.array([2, 3]))
        return NodeFactory("opset4").create(kind, [inputs[0], *(node.output(0) for node in (*sizes, axes))], attributes)
    if kind == "Unsqueeze" and shape.count(-1) < 2:
        return opset1.reshape(inputs[0], np.array(shape), special_zero=False)
    return None


def _as_sum_or_product(operation: Any) -> Any:  # noqa: ANN401 - openvino.Node
    """Differences and quotients of maps as sums and products.

    x subtracted from a number is -x plus that number, both as large as x: scalars would make yet another operation.
    """
    from openvino import opset1  # noqa: PLC0415 - optional

    kind, inputs, shape = operation.get_type_name(), operation.input_values(), _shape_of(operation)
    if kind == "Subtract" and _is_scalar(inputs[0]) and -1 not in shape[1:]:
        value = np.full(shape[1:], inputs[0].get_node().data.item(), np.float32)
        return opset1.add(opset1.multiply(inputs[1], np.full(shape[1:], -1, np.float32)), value)
    if kind == "Subtract" and _is_map(operation):
        return opset1.add(inputs[0], opset1.multiply(inputs[1], np.full(shape[1:], -1, np.float32)))
    if kind == "Divide" and _is_map(operation):
        return opset1.multiply(inputs[0], opset1.power(inputs[1], np.full(shape[1:], -1, np.float32)))
    return None


def _shape_of(operation: Any) -> list[int]:  # noqa: ANN401 - openvino.Node
    """Of its first output, -1 where it is not known."""
    return [-1 if side.is_dynamic else side.get_length() for side in operation.get_output_partial_shape(0)]


def _is_map(operation: Any) -> bool:  # noqa: ANN401 - openvino.Node
    """Whether it combines two computed maps, of a known size, into one. Compressed kernels are float16."""
    shape = operation.get_output_partial_shape(0)
    computed = all(value.get_node().get_type_name() != "Constant" for value in operation.input_values())
    is_map = shape.rank.is_static and shape.rank.get_length() == 4
    is_map = is_map and operation.get_element_type().to_string() == "f32"
    return computed and is_map and not any(side.is_dynamic for side in list(shape)[1:])


def _is_scalar(value: Any) -> bool:  # noqa: ANN401 - openvino.Output
    node = value.get_node()
    return node.get_type_name() == "Constant" and node.data.size == 1 and node.data.dtype == np.float32

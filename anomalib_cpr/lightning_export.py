# SPDX-License-Identifier: Apache-2.0
"""anomalib's export of CPR, in a state in which the file scores like the model."""

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from lightning.pytorch import LightningModule

from .export import OPSET, compress_weights, fits_one_file, keep_full_precision, quantise, ready_for_export


class FaithfulExport(ExportMixin, LightningModule):
    """What differs from anomalib's export."""

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Pickle the model, see anomalib's ``ExportMixin.to_torch``. The pickled one records no gradients."""
        with ready_for_export(self):
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # noqa: ANN401
        """Export to ONNX, see anomalib's ``ExportMixin.to_onnx``. One file, as long as ONNX allows it (2 GB)."""
        kwargs.setdefault("external_data", not fits_one_file(self))
        kwargs.setdefault("opset_version", OPSET)
        with ready_for_export(self):
            return super().to_onnx(*args, **kwargs)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to OpenVINO, see anomalib's ``ExportMixin.to_openvino``. The file asks for float32 arithmetic."""
        to_fp16 = compression_type == CompressionType.FP16
        path = super().to_openvino(
            export_root, model_file_name, input_size, None if to_fp16 else compression_type, **kwargs
        )
        keep_full_precision(path, compress_to_fp16=to_fp16)
        return path

    def _compress_ov_model(self, model: Any, compression_type: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compress the networks, and neither the codebook nor the foreground."""
        if compression_type == CompressionType.INT8:
            return compress_weights(model)
        return super()._compress_ov_model(model, compression_type, *args, **kwargs)

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        """Quantise only the convolutions, on the images that anomalib would take."""
        return quantise(model, datamodule)

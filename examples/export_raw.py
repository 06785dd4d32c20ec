# SPDX-License-Identifier: Apache-2.0
"""Export a model whose files put out raw scores: no threshold, no normalisation, nothing cut off at 0 and 1.

python export_raw.py model.ckpt FOLDER
"""

import sys

from anomalib_cpr import Cpr

model = Cpr.load_from_checkpoint(sys.argv[1], map_location="cpu", weights_only=True)
model.post_processor = None
print(model.to_onnx(sys.argv[2], model_file_name="raw"))
print(model.to_openvino(sys.argv[2], model_file_name="raw"))

# SPDX-License-Identifier: Apache-2.0
"""Inspect an image with an exported model and OpenVINO alone: `pip install openvino pillow`.

    python openvino_inference.py model.xml image.png

Input `input`: float32 in 0..1, RGB, (batch, 3, height, width). Any batch and any size, unless the model was exported
with `input_size`; resizing and normalisation are in the graph, so do neither of them.
Outputs: `pred_score` (batch,) and `anomaly_map` (batch, 1, height, width), of the size of the training, normalised to
0..1 with the threshold at 0.5, and what lies above it: `pred_label` (batch,) and `pred_mask`. A model exported without
post-processor (export_raw.py) has raw scores and maps, and only these two.
"""

import sys

import numpy as np
import openvino
from PIL import Image

model = openvino.Core().compile_model(sys.argv[1], "CPU", {"PERFORMANCE_HINT": "LATENCY"})
image = np.asarray(Image.open(sys.argv[2]).convert("RGB"), np.float32) / 255
result = model({"input": image.transpose(2, 0, 1)[None]})
label = result["pred_label"][0] if len(model.outputs) == 4 else False
print(f"score {result['pred_score'][0]:.4f}", "anomalous" if label else "")
heat = (255 * result["anomaly_map"][0, 0].clip(0, 1)).astype(np.uint8)
Image.fromarray(heat).resize((image.shape[1], image.shape[0])).save("heat.png")

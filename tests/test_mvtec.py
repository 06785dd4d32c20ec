# SPDX-License-Identifier: Apache-2.0
"""MVTec is MVTecAD under its old name."""

import inspect

import pytest

from anomalib_cpr import MVTec


def test_is_mvtecad_under_another_name():
    from anomalib.data import MVTecAD

    assert issubclass(MVTec, MVTecAD)
    assert inspect.signature(MVTec) == inspect.signature(MVTecAD)
    assert MVTec(category="cable").name == "MVTec"


@pytest.mark.parametrize("config", [{"class_path": "MVTec"}, {"class_path": "anomalib.data.MVTec"}])
def test_get_datamodule(config):
    from anomalib.data import get_datamodule

    datamodule = get_datamodule({**config, "init_args": {"category": "screw", "train_batch_size": 3}})
    assert type(datamodule) is MVTec
    assert (datamodule.category, datamodule.train_batch_size) == ("screw", 3)

# SPDX-License-Identifier: Apache-2.0
import pytest

from anomalib_cpr.messages import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no such layer"), "ValueError: no such layer"),
        (RuntimeError("\nline one\nline two"), "RuntimeError: line one"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_first_line(error, expected):
    assert first_line(error) == expected

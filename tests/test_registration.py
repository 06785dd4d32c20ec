# SPDX-License-Identifier: Apache-2.0
"""Every form in which anomalib lets one ask for a model or a data set, with the real anomalib."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

import anomalib_cpr
from anomalib_cpr import doctor, registration


@pytest.fixture(autouse=True)
def hook_on(monkeypatch):
    monkeypatch.delenv("ANOMALIB_CPR_AUTOLOAD", raising=False)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)


def needs_entry_point():
    if not [point for point in metadata.entry_points(group="torch.backends") if point.name == "anomalib_cpr"]:
        pytest.skip("the package is not installed, so torch does not call its hook: pip install -e .")


def test_every_form_resolves_without_an_import_of_the_package():
    needs_entry_point()
    findings = doctor.check_registration()
    assert len(findings) == 10
    assert [finding for finding in findings if finding.status != doctor.OK] == []


def test_command_line_prints_the_configuration():
    needs_entry_point()
    # anomalib's command line takes class names and dotted paths, for its own models as well: "padim" is refused.
    code = f"""
import contextlib, io, json
from anomalib.cli.cli import main
outcomes = {{}}
for model in ("Cpr", "anomalib.models.Cpr", "anomalib_cpr.Cpr", "cpr", "padim"):
    out = io.StringIO()
    sys.argv = ["anomalib", "train", "--model", model, "--data", "MVTec", "--print_config"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            outcomes[model] = [end.code, out.getvalue()]
print({doctor.PROBE_MARK!r} + json.dumps(outcomes))
"""
    output, outcomes = doctor._run_probe(code)
    assert outcomes is not None, output
    for model in ("Cpr", "anomalib.models.Cpr", "anomalib_cpr.Cpr"):
        code, text = outcomes[model]
        assert code == 0
        assert f"class_path: {'anomalib_cpr.Cpr' if model == 'Cpr' else model}" in text
        assert "class_path: anomalib_cpr.MVTec" in text
        assert "codebook_size:" in text
    assert outcomes["cpr"][0] == outcomes["padim"][0] == 2


def test_register_is_idempotent():
    import anomalib.data
    import anomalib.models

    before = (anomalib.models.Cpr, anomalib.data.MVTec, list(anomalib.models.__all__), list(anomalib.data.__all__))
    registration.register()
    after = (anomalib.models.Cpr, anomalib.data.MVTec, list(anomalib.models.__all__), list(anomalib.data.__all__))
    assert before == after
    assert registration.failures() == {}
    assert after[2].count("Cpr") == 1


def test_register_without_anomalib_does_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "anomalib.models", raising=False)
    monkeypatch.delitem(sys.modules, "anomalib.data", raising=False)
    registration.register()
    assert "anomalib.models" not in sys.modules


def test_public_names():
    assert set(anomalib_cpr.__all__) <= set(dir(anomalib_cpr))
    assert anomalib_cpr.Cpr.__name__ == "Cpr"
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = anomalib_cpr.NoSuchName


def test_version_is_that_of_the_metadata():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{anomalib_cpr.__version__}"\n' in project

# SPDX-License-Identifier: Apache-2.0
"""anomalib-cpr doctor: what it finds, what it advises, and its exit code."""

import subprocess

import pytest

from anomalib_cpr import cli, doctor
from anomalib_cpr.doctor import FAILED, MISSING, NOTE, OK, Finding


@pytest.fixture
def absent(monkeypatch):
    """Make distributions look uninstalled."""
    real = doctor._version

    def hide(*names):
        monkeypatch.setattr(doctor, "_version", lambda name: None if name in names else real(name))

    return hide


@pytest.fixture
def probe(monkeypatch):
    """Replace the fresh process by a fixed answer."""

    def answer(output, results):
        monkeypatch.setattr(doctor, "_run_probe", lambda _: (output, results))

    return answer


@pytest.mark.parametrize(
    ("results", "exit_code"),
    [
        ({'get_model("cpr")': None}, 0),
        ({'get_model("cpr")': None, "list_models()": "LookupError: not listed"}, 1),
        (None, 1),  # the process ended with a traceback
    ],
)
def test_exit_code(monkeypatch, capsys, probe, results, exit_code):
    monkeypatch.setattr(doctor, "check_faiss", list)
    monkeypatch.setattr(doctor, "_hook_entry_points", lambda: ["hook"])
    probe("Traceback\nValueError: reason", results)
    assert cli.main(["doctor"]) == exit_code
    printed = capsys.readouterr().out
    for title in ("Versions", "Registration with anomalib", "Weights", "Devices", "Extras"):
        assert title in printed
    assert results is not None or "ValueError: reason" in printed


def test_missing_anomalib_says_what_to_install(capsys, absent):
    absent("anomalib", "torchvision", "rich", "openvino")
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert 'pip install "anomalib>=2.7,<2.8"' in printed
    assert "pip install torchvision" in printed
    assert "pip install rich" in printed  # and the report came without it
    assert 'pip install "anomalib[openvino]"' in printed


def test_opt_out_is_named_and_not_a_failure(monkeypatch, probe):
    monkeypatch.setenv("ANOMALIB_CPR_AUTOLOAD", "0")
    probe("", {"list_models()": None})
    hook, form = doctor.check_registration()
    assert (hook.status, form.status) == (NOTE, OK)
    assert "ANOMALIB_CPR_AUTOLOAD=0" in hook.detail


def test_missing_entry_point_is_a_failure(monkeypatch, probe):
    monkeypatch.delenv("ANOMALIB_CPR_AUTOLOAD", raising=False)
    monkeypatch.setattr(doctor, "_hook_entry_points", list)
    probe("", {})
    assert doctor.check_registration()[0].status == FAILED


@pytest.mark.parametrize(
    ("installed", "results", "status", "text"),
    [
        ((), None, NOTE, "anomalib-cpr[faiss]"),
        (("faiss-cpu",), [0], OK, "0 GPU(s)"),
        (("faiss-gpu",), None, FAILED, "libcublas"),  # installed, but it refuses to be imported
        (("faiss-cpu", "faiss-gpu"), [1], FAILED, "overwrite each other"),
    ],
)
def test_faiss(monkeypatch, probe, installed, results, status, text):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name in installed else None)
    probe("Traceback\nImportError: libcublas.so.12", results)
    (finding,) = doctor.check_faiss()
    assert finding.status == status
    assert text in finding.detail + finding.advice


def test_probe_survives_the_end_of_its_process():
    output, results = doctor._run_probe("import os; os.abort()")
    assert results is None
    assert doctor._last_line(output)
    assert doctor._run_probe(f"print('{doctor.PROBE_MARK}[1]')")[1] == [1]


def test_probe_gives_up(monkeypatch):
    def never(*_, **__):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(doctor.subprocess, "run", never)
    assert doctor._run_probe("")[1] is None


def test_weights_not_at_hand(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    finding = doctor.check_weights()
    assert finding.status == MISSING
    assert "backbone_weights=FILE" in finding.advice


def test_weights_in_the_cache(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name: str(tmp_path / name))
    assert doctor.check_weights() == Finding("densenet201", OK, str(tmp_path / "model.safetensors"))


def test_weights_from_a_file(tmp_path):
    import timm
    import torch

    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("densenet201").state_dict(), file)
    assert doctor.check_weights(file).status == OK
    file.write_text("an error page saved under the name of the file", encoding="utf-8")
    assert doctor.check_weights(file).status == FAILED


def test_unfit_weights_file_is_a_failure(monkeypatch, capsys, tmp_path):
    for name in ("check_registration", "check_faiss"):
        monkeypatch.setattr(doctor, name, list)
    assert cli.main(["doctor", "--weights", str(tmp_path / "absent.pth")]) == 1
    assert "does not exist" in " ".join(capsys.readouterr().out.split())


def test_command_without_arguments_prints_help(capsys):
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("anomalib-cpr ")

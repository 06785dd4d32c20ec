"""The benchmark from configuration to report, with real jobs in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from conftest import TINY_BACKBONE, write_mvtec

from anomalib_cpr import benchmark, report
from anomalib_cpr.benchmark import Job, estimate, find_devices, plan_jobs, read_configuration, run_jobs, status_of
from anomalib_cpr.benchmark_job import build_model, load_timm_weights
from anomalib_cpr.benchmark_measuring import RawPredictions
from anomalib_cpr.cli import main

PROJECT = Path(__file__).parents[1]


def configuration(root, **changes):
    return {
        "title": "A test",
        "trainer": {"limit_val_batches": 0},
        "evaluation": {"size": [64, 64], "speed_seconds": 0.05, "throughput_batch": 2},
        "data": [
            {
                "name": "Parts",
                "class_path": "MVTecAD",
                "init_args": {"root": str(root), "train_batch_size": 2, "eval_batch_size": 4, "num_workers": 0},
                "categories": ["screw"],
            }
        ],
        "models": [
            {
                "name": "CPR",
                "class_path": "Cpr",
                "image_size": 64,
                "init_args": {**TINY_BACKBONE, "descriptor_channels": 8, "k": 3},
                "trainer": {"max_steps": 2},
            },
            {
                "name": "PaDiM",
                "class_path": "Padim",
                "image_size": 64,
                "init_args": {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 16},
            },
            {"name": "Broken", "class_path": "Padim", "init_args": {"backbone": "no_such_network", "n_features": 3}},
        ],
        **changes,
    }


def write_yaml(file, content):
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a benchmark that was run, its configuration file, and the exit code."""
    folder = tmp_path_factory.mktemp("benchmark")
    file = write_yaml(folder / "test.yaml", configuration(write_mvtec(folder / "data")))
    code = main(["benchmark", "-c", str(file), "-o", str(folder / "out"), "--devices", "cpu"])
    return folder / "out", file, code


def results(folder):
    return {json.loads(f.read_text())["job"]["model"]["name"]: json.loads(f.read_text()) for f in folder.glob("jobs/*")}


def test_all_that_a_job_should_tell(finished):
    found = results(finished[0])
    for name, steps in (("CPR", 2), ("PaDiM", 3)):
        result = found[name]
        assert result["status"] == "done"
        assert set(result["metrics"]) == {
            "image_AUROC", "image_AP", "image_F1max", "pixel_AUROC", "pixel_AP", "pixel_F1max", "AUPRO",
        }  # fmt: skip
        assert all(0 <= value <= 1 for value in result["metrics"].values())
        assert result["fit"]["steps"] == steps
        stages = result["fit"]["stages"]
        assert list(stages) == ["preparation", "steps", "after steps"]
        assert sum(stages.values()) == pytest.approx(result["fit"]["seconds"], rel=0.05)
        speed = result["speed"]
        assert 0 < speed["latency"]["p50_ms"] <= speed["latency"]["p95_ms"]
        assert speed["latency_with_decode"]["repetitions"] >= 5
        assert speed["throughput"]["batch"] == 2
        assert result["memory"]["fit_mb"] > result["memory"]["imports_mb"] > 50
        assert result["size"]["checkpoint_mb"] > result["size"]["bank_mb"] > 0
        assert result["data"] == {"train_images": 6, "test_good": 3, "test_anomalous": 3, "validation": "same_as_test"}
        assert len(result["images"]) == 6
        assert {"anomalib", "torch", "anomalib-cpr", "python"} <= set(result["versions"])
        assert result["hardware"]["cores"] >= 1
        assert (result["job"]["seed"], result["job"]["accelerator"]) == (0, "cpu")
    assert "Codebook" in found["CPR"]["fit"]["reported_stages"]
    assert found["CPR"]["fit"]["train_batch_size"] == 2


def test_a_failed_job_says_why_and_stops_nobody(finished):
    result = results(finished[0])["Broken"]
    assert finished[2] == 1
    assert result["status"] == "failed"
    assert "no_such_network" in result["reason"]
    assert "Traceback" in result["log"]


def test_finished_jobs_are_not_run_again_and_failed_ones_only_if_asked(finished, monkeypatch, capsys):
    folder, file, _ = finished

    def refuse(*_):
        raise AssertionError("a job was started")

    monkeypatch.setattr(benchmark, "_Running", refuse)
    assert main(["benchmark", "-c", str(file), "-o", str(folder), "--devices", "cpu", "--no-report"]) == 1
    assert "3 jobs, 0 to do" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="a job was started"):
        main(["benchmark", "-c", str(file), "-o", str(folder), "--devices", "cpu", "--retry-failed"])
    assert "3 jobs, 1 to do" in capsys.readouterr().out


def test_report_shows_results_failures_and_what_is_missing(finished, tmp_path):
    folder, file, _ = finished
    text = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    measured = results(folder)["CPR"]["metrics"]["pixel_AUROC"]
    for needed in (f"{100 * measured:.1f}", "failed", "no_such_network", "best **on the test set", "limit_val_batches"):
        assert needed in text
    # Published results stand beside: PaDiM's mean and screw (README of anomalib), CPR's mean.
    assert "| Image AUROC | " in text
    assert "PaDiM, published" in text
    for value in ("95.0", "84.5", "99.7"):
        assert value in text
    assert page.count("data:image/") >= 3
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert str(folder.parent) not in text.split("Configuration of each job")[0]

    assert main(["report", str(folder), "-o", str(tmp_path / "other"), "--without-images"]) == 0
    assert not list((tmp_path / "other" / "figures").glob("images*"))
    assert list((folder / "figures").glob("images*"))

    wider = yaml.safe_load(file.read_text(encoding="utf-8"))
    wider["seeds"] = [0, 1]
    written, resolved = read_configuration(write_yaml(tmp_path / "wider.yaml", wider))
    plan = benchmark.describe_plan(written, plan_jobs(written, resolved, "cpu", folder))
    (tmp_path / "jobs").mkdir()
    for job in (folder / "jobs").iterdir():
        (tmp_path / "jobs" / job.name).write_text(job.read_text(), encoding="utf-8")
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    text = report.write(report.load([tmp_path]), tmp_path)[0].read_text(encoding="utf-8")
    assert "6 jobs: 2 done, 1 failed, 3 missing" in text
    assert "(1 of 2: missing)" in text


def test_raw_predictions_are_those_of_the_model(tmp_path):
    root = write_mvtec(tmp_path / "data")
    datamodule = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)
    module = build_model(configuration(root)["models"][1])
    raw = RawPredictions((64, 64))
    engine = Engine(callbacks=[raw], default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu")
    engine.fit(module, datamodule=datamodule)  # validates: the post-processor has thresholds and normalises
    engine.test(module, datamodule=datamodule, verbose=False)
    scores, labels, maps, masks = raw.tensors()
    expected = []
    module.eval()
    for batch in datamodule.test_dataloader():
        with torch.no_grad():
            expected.append(module.model(module.pre_processor(batch.image)))
    torch.testing.assert_close(maps, torch.cat([e.anomaly_map for e in expected])[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, torch.cat([e.pred_score for e in expected]).flatten(), rtol=1e-4, atol=1e-4)
    assert float(scores.max()) > 1  # not normalised
    assert labels.sum() == 3
    assert bool((masks.flatten(1).any(1) == labels).all())


def test_time_limit_ends_a_job_and_all_that_it_started(tmp_path, capsys):
    file = write_yaml(tmp_path / "slow.yaml", configuration(write_mvtec(tmp_path / "data"), time_limit_minutes=0.01))
    arguments = ["benchmark", "-c", str(file), "-o", str(tmp_path / "out"), "--devices", "cpu", "--only", "CPR"]
    assert main(arguments) == 1
    result = results(tmp_path / "out")["CPR"]
    assert result["status"] == "timeout"
    assert "0.01 minutes" in result["reason"]
    assert "TIMEOUT" in capsys.readouterr().out
    assert "timeout" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(tmp_path, name):
    content = configuration(write_mvtec(tmp_path / "data"))
    content["models"][0]["trainer"] = {"max_steps": 100_000}
    content["models"] = [content["models"][2], content["models"][0]]  # one that fails at once, one that never ends
    file = write_yaml(tmp_path / "long.yaml", content)
    command = [sys.executable, "-c", "from anomalib_cpr.cli import main; import sys; sys.exit(main())"]
    command += ["benchmark", "-c", str(file), "-o", str(tmp_path / "out"), "--devices", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # Whoever runs the tests in the background may have them ignore Ctrl-C, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    log = tmp_path / "out" / "logs"
    deadline = time.monotonic() + 120
    while len(list(log.glob("*CPR*"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 jobs of this run are kept, 1 are to do" in output
    assert [json.loads(f.read_text())["status"] for f in (tmp_path / "out" / "jobs").iterdir()] == ["failed"]
    running = subprocess.run(["/bin/ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


def test_a_killed_process_is_a_failure_with_a_reason(tmp_path):
    written, resolved = read_configuration(write_yaml(tmp_path / "c.yaml", configuration(tmp_path)))
    job = plan_jobs(written, resolved, "cpu", tmp_path)[0]
    running = benchmark._Running(job, tmp_path, "cpu", 10)
    running.process.kill()
    running.process.wait()
    result = running.finish()
    assert (result["status"], result["reason"]) == ("failed", "the process was ended by SIGKILL (out of memory?)")


def test_jobs_of_several_devices_run_at_the_same_time(tmp_path, monkeypatch):
    written, resolved = read_configuration(
        write_yaml(tmp_path / "c.yaml", configuration(tmp_path, seeds=[0, 1])), ["models.0.name=A"]
    )
    jobs = plan_jobs(written, resolved, "gpu", tmp_path)
    started, running, most = [], set(), []

    class Fake:
        def __init__(self, job, folder, device, minutes):
            assert device not in running  # one job per device
            del folder, minutes
            running.add(device)
            started.append((job.name, device))
            most.append(len(running))
            self.job, self.device, self.seconds, self.polls = job, device, 1.0, 0

        def finish(self):
            self.polls += 1
            if self.polls < 2:
                return None
            running.discard(self.device)
            return {"status": "failed", "reason": "fake", "seconds": 1.0}

        def stop(self):
            running.discard(self.device)

    monkeypatch.setattr(benchmark, "_Running", Fake)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert run_jobs(jobs, tmp_path, ["0", "1"], 1) == 1
    assert max(most) == 2
    assert [name for name, _ in started] == [job.name for job in jobs]
    assert all(status_of(tmp_path, job) == "failed" for job in jobs)


# --- configuration


def test_plan_is_models_by_categories_by_seeds_and_names_do_not_depend_on_the_machine(tmp_path, monkeypatch):
    content = configuration("${oc.env:TEST_ROOT}/parts", seeds=[3, 4])
    content["data"][0]["categories"] = ["a", "b"]
    file = write_yaml(tmp_path / "c.yaml", content)
    names = []
    for root in ("/here", "/there"):
        monkeypatch.setenv("TEST_ROOT", root)
        written, resolved = read_configuration(file)
        jobs = plan_jobs(written, resolved, "cpu", tmp_path)
        names.append([job.name for job in jobs])
        assert jobs[0].specification["data"]["init_args"]["root"] == f"{root}/parts"
        assert "/here" not in json.dumps(jobs[0].specification["recorded"])
    assert names[0] == names[1]
    assert len(set(names[0])) == 2 * 2 * 3
    assert [name.rsplit("-", 1)[0] for name in names[0][:4]] == [
        "Parts-a-CPR-seed3",
        "Parts-a-PaDiM-seed3",
        "Parts-a-Broken-seed3",
        "Parts-b-CPR-seed3",
    ]


def test_a_result_depends_on_its_arguments_but_not_on_notes(tmp_path):
    def names(**changes):
        content = configuration(tmp_path)
        content["models"][0].update(changes)
        written, resolved = read_configuration(write_yaml(tmp_path / "c.yaml", content))
        return [job.name for job in plan_jobs(written, resolved, "cpu", tmp_path)]

    assert names(notes="Other words") == names()
    assert names(image_size=32)[0] != names()[0]
    assert names(image_size=32)[1:] == names()[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": []}, "unknown key 'model'"),
        ({"models": []}, "`models` is empty"),
        ({"models": [{"name": "x"}]}, "no `class_path`"),
        ({"models": [{"class_path": "Cpr"}, {"class_path": "anomalib_cpr.Cpr"}]}, "two entries of `models`"),
        ({"models": [{"class_path": "Cpr", "init_arg": {}}]}, "unknown key 'init_arg'"),
        (
            {"data": [{"class_path": "MVTecAD", "init_args": {"root": "${oc.env:NOT_SET_ANYWHERE}"}}]},
            "NOT_SET_ANYWHERE",
        ),
    ],
)
def test_wrong_configurations_are_refused_before_anything_runs(tmp_path, changes, message):
    file = write_yaml(tmp_path / "c.yaml", configuration(tmp_path, **changes))
    with pytest.raises(SystemExit, match=message):
        main(["benchmark", "-c", str(file), "--dry-run", "--devices", "cpu"])


def test_set_overrules_also_in_lists(tmp_path):
    file = write_yaml(tmp_path / "c.yaml", configuration(tmp_path))
    _, resolved = read_configuration(file, ["models.1.image_size=32", "seeds=[5]", "data.0.init_args.root=/x"])
    assert (resolved["models"][1]["image_size"], resolved["seeds"]) == (32, [5])
    assert resolved["data"][0]["init_args"]["root"] == "/x"
    with pytest.raises(ValueError, match="KEY=VALUE"):
        read_configuration(file, ["seeds"])


@pytest.mark.parametrize("file", sorted((PROJECT / "configs" / "benchmark").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_can_be_planned(file, monkeypatch, tmp_path):
    monkeypatch.setenv("CPR_DATA_ROOT", "/data")
    written, resolved = read_configuration(file)
    jobs = plan_jobs(written, resolved, "cpu", tmp_path)
    expected = (
        len(resolved["seeds"]) * len(resolved["models"]) * sum(len(data["categories"]) for data in resolved["data"])
    )
    assert len({job.name for job in jobs}) == expected


def test_estimate_uses_the_same_model_where_it_can():
    jobs = [Job(str(index), "", model, {}) for index, model in enumerate(["slow", "quick", "new"])]
    taken = {"slow": [600.0], "quick": [60.0, 120.0]}
    mean = (600 + 60 + 120) / 3
    assert estimate(jobs, taken, 1) == f"; about {round((600 + 90 + mean) / 60)} min left"
    assert estimate(jobs, taken, 2) == f"; about {round((600 + 90 + mean) / 120)} min left"
    assert estimate([], taken, 1) == ""


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_devices("auto") == ["0", "1"]
    assert find_devices("1") == ["1"]
    assert find_devices("cpu") == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # numbers count among the visible ones, as torch's do
    assert find_devices("auto") == ["5", "7"]
    assert find_devices("1") == ["7"]
    with pytest.raises(ValueError, match="torch sees 2"):
        find_devices("2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_devices("auto") == ["cpu"]


def test_backbone_weights_from_a_file_reach_models_of_anomalib(tmp_path):
    import timm

    network = timm.create_model("resnet18", pretrained=False)
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    file = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), file)
    model = {
        "class_path": "Patchcore",
        "init_args": {"backbone": "resnet18", "layers": ["layer2"]},
        "backbone_weights": str(file),
    }
    built = build_model(model)
    held = built.model.feature_extractor.feature_extractor.state_dict()
    for name, value in held.items():
        torch.testing.assert_close(value, network.state_dict()[name])
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_timm_weights(built, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="no TimmFeatureExtractor"):
        load_timm_weights(torch.nn.Linear(1, 1), file)

"""Two processes on the CPU against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from conftest import torch_threads, write_mvtec
from fit_in_ranks import make_data, make_model
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.utils.data import SequentialSampler

from anomalib_cpr import Cpr
from anomalib_cpr.ranks import BatchShare, refuse_sharded_models, share_of


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
def test_shares_are_a_partition_into_the_batches_of_one_process(batch_size, ranks):
    for count in range(ranks, 70):
        shares = [share_of(count, batch_size, rank, ranks) for rank in range(ranks)]
        assert all(shares), "no rank may be without a batch: it would not take part in the metrics"
        assert sorted(position for share in shares for position in share) == list(range(count))
        if count > batch_size * ranks:
            whole = [list(range(count))[start : start + batch_size] for start in range(0, count, batch_size)]
            own = [share[start : start + batch_size] for share in shares for start in range(0, len(share), batch_size)]
            assert sorted(own) == whole


def test_fewer_images_than_processes():
    with pytest.raises(ValueError, match=r"1 image cannot be shared out among 2 processes.*--trainer.devices 1"):
        share_of(1, 32, 0, 2)


def test_batch_share_follows_the_sampler():
    class Backwards(SequentialSampler):
        def __iter__(self):
            return iter(range(len(self.data_source) - 1, -1, -1))

    share = BatchShare(Backwards(range(7)), 2, rank=1, num_replicas=2)
    assert (list(share), len(share)) == ([4, 3, 0], 3)


def test_sharding_is_refused():
    refuse_sharded_models(DDPStrategy())
    with pytest.raises(ValueError, match=r"strategy=FSDPStrategy.*use strategy='ddp'"):
        refuse_sharded_models(FSDPStrategy())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """20 images to train on: 8, 8 and 4 for two ranks. 7 to test on: with a repeated one, both would have 4."""
    root = write_mvtec(tmp_path_factory.mktemp("data"), train=20, test=4)
    (root / "screw" / "test" / "good" / "003.png").unlink()
    return root


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the ranks: with another number of threads, sums differ in the last bits."""
    with torch_threads(1):
        yield


def launch(root, out, strategy="ddp", *, fails=False, **arguments):
    """Run the script in two ranks; return what each of them wrote."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("fit_in_ranks.py"), strategy, "2", root, out, repr(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    if fails:
        return result.stdout + result.stderr
    return [torch.load(path, weights_only=False) for path in sorted(out.glob("rank_*.pt"))]


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return [*launch(root, out), out]


class Look(Callback):
    """Gradients that two ranks have in the first step, each computed by itself; and what was learned before it."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.gradients, self.state = monkeypatch, [], {}

    def on_train_batch_start(self, _trainer, pl_module, *_):
        if self.gradients:
            return
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        for rank in range(2):
            with self.monkeypatch.context() as patch:
                patch.setattr(Cpr, "global_rank", property(lambda _, rank=rank: rank))
                loss = sum(pl_module.compare_pairs(*pl_module.draw_pairs(0, 0)))
            self.gradients.append(torch.autograd.grad(loss, list(pl_module.model.metric_heads.parameters())))


@pytest.fixture
def one(root, tmp_path, monkeypatch):
    """A single process with the seed of rank 0."""
    seed_everything(3, verbose=False)
    look = Look(monkeypatch)
    engine = Engine(default_root_dir=tmp_path, max_steps=1, callbacks=[look], limit_val_batches=0, accelerator="cpu")
    engine.fit(make_model(), datamodule=make_data(root))
    return look


def test_ranks_hold_the_same(two):
    first, second, _ = two
    assert (first["kind"], first["seed"], first["metrics"]) == (second["kind"], second["seed"], second["metrics"])
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(one, other)


def test_preparation_is_that_of_a_single_process(two, one):
    for name in (
        "global_retriever.codebook",
        "foreground_estimator.projection.weight",
        "foreground_estimator.projection.bias",
        "bank.histograms",
        "bank.foregrounds",
    ):
        assert torch.equal(two[0]["state"][f"model.{name}"], one.state[f"model.{name}"]), name


def test_gradients_are_the_mean_over_the_ranks(two, one):
    assert one.gradients[0][0].ne(one.gradients[1][0]).any(), "the ranks draw different pairs"
    for found, own, other in zip(two[0]["gradients"], *one.gradients, strict=True):
        torch.testing.assert_close(found, (own + other) / 2, rtol=1e-4, atol=1e-6)


def test_one_checkpoint_with_the_bank_of_a_single_process(two, root):
    *_, out = two
    (checkpoint,) = (path for path in out.rglob("*.ckpt") if not path.is_relative_to(out / "latest"))
    (version,) = (out / "results").rglob("v*")
    assert version.name == "v0"
    assert (version.parent / "latest").resolve() == version.resolve()
    assert checkpoint.is_relative_to(version)
    model = Cpr.load_from_checkpoint(checkpoint, map_location="cpu")
    held = [descriptors.clone() for descriptors in model.model.bank.descriptors]
    data = make_data(root)
    data.setup()
    items = [model.pre_processor(item.image[None])[0] for item in data.train_data]
    model.model.remember(torch.stack(items).split(8))
    for own, other in zip(model.model.bank.descriptors, held, strict=True):
        assert torch.equal(own, other)


def test_each_image_counts_once(two, root, tmp_path):
    """Metrics, thresholds and predictions of the checkpoint are those of a single process."""
    first, second, out = two
    (checkpoint,) = out.rglob("model.ckpt")
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    model, data = Cpr.load_from_checkpoint(checkpoint, map_location="cpu"), make_data(root)
    engine.validate(model, datamodule=data)
    for name, value in model.post_processor.state_dict().items():
        torch.testing.assert_close(first["state"][f"post_processor.{name}"], value, msg=name)
    (metrics,) = engine.test(model, datamodule=data)
    assert first["metrics"] == pytest.approx(metrics, abs=1e-6)
    predictions = engine.predict(model, datamodule=data)
    for rank in (first, second):
        assert [len(paths) for paths, *_ in rank["predictions"]] == [3, 3, 1]
        for (paths, anomaly_map, score), batch in zip(rank["predictions"], predictions, strict=True):
            assert paths == batch.image_path
            assert torch.equal(anomaly_map, batch.anomaly_map)
            assert torch.equal(score, batch.pred_score)
    pictures = [path.name for path in (out / "results").rglob("*.png") if "latest" not in path.parts]
    assert len(pictures) == 7


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook", "ddp_find_unused_parameters_true"])
def test_other_ways_to_start_processes(two, root, tmp_path, strategy):
    first = launch(root, tmp_path, strategy)[0]
    assert first["metrics"] == two[0]["metrics"]
    for name, value in two[0]["state"].items():
        assert torch.equal(value, first["state"][name]), name


@pytest.mark.slow
def test_resumes_as_if_never_interrupted(two, root, tmp_path):
    assert "ZeroDivisionError" in launch(root, tmp_path, fails=True, stop_at=2)
    (point,) = (path for path in tmp_path.rglob("resume.ckpt") if "latest" not in path.parts)
    first, second = launch(root, tmp_path, ckpt_path=str(point))
    for name, value in two[0]["state"].items():
        assert torch.equal(value, first["state"][name]), name
        assert torch.equal(value, second["state"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"bank_dtype": "int8", "max_references": 10},
        {"bank_dtype": "int4"},
        {"unaligned_matching": True, "colour_matching": True},
    ],
)
def test_other_banks(root, tmp_path, arguments):
    first, second = launch(root, tmp_path, **arguments)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


@pytest.mark.slow
def test_a_file_that_two_ranks_would_write_is_refused(root, tmp_path):
    output = launch(root, tmp_path, fails=True, bank_file=str(tmp_path / "bank"))
    assert "would be written by 2 processes at once. Train with devices=1" in output

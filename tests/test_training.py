import pytest
import torch

from anomalib_cpr.synthetic_anomalies import SyntheticAnomalyGenerator
from anomalib_cpr.training import (
    PairsAhead,
    TrainingData,
    draw_image_pairs,
    step_precision,
    training_autocast,
)
from anomalib_cpr.training_images import TrainingImages

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("float32", {"avx512_bf16": True}, "float32"),
        ("bfloat16", {}, "bfloat16"),
        ("auto", {"avx512_bf16": True}, "bfloat16"),
        ("auto", {"amx_bf16": True}, "bfloat16"),
        ("auto", {"avx512_f": True, "avx512_bf16": False}, "float32"),  # bfloat16 would be emulated
        ("auto", {}, "float32"),
    ],
)
def test_precision_is_what_the_processor_computes_with(monkeypatch, precision, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert step_precision(precision, CPU) == expected
    with training_autocast(precision, CPU):
        assert torch.is_autocast_enabled("cpu") == (expected == "bfloat16")


def test_precision_of_the_trainer_stays():
    with torch.autocast("cpu", torch.float16), training_autocast("bfloat16", CPU):
        assert torch.get_autocast_dtype("cpu") == torch.float16


def test_eight_bit_training_shows_levels_of_image_files():
    images = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    neighbours = torch.tensor([[1], [0], [3], [2]])
    drawn = {}
    for eight_bit in (True, False):
        data = TrainingData(TrainingImages(images, None), neighbours, "object", eight_bit=eight_bit)
        generator = torch.Generator().manual_seed(0)
        drawn[eight_bit] = draw_image_pairs(data, torch.ones(4, 1, 8, 12), SyntheticAnomalyGenerator(), 4, generator)
    for name in ("queries", "references"):
        levels = 255 * getattr(drawn[True], name)
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        exact = 255 * getattr(drawn[False], name)
        assert not torch.allclose(exact, exact.round(), atol=1e-2)
    assert torch.equal(drawn[True].anomalies, drawn[False].anomalies), "the same is drawn"


def drawer(device):
    """Draws pairs as the model does: from nothing but the numbers of the step."""
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(3)).to(device)
    neighbours = torch.tensor([[1], [0], [3], [2], [5], [4]])
    data = TrainingData(TrainingImages(images, None), neighbours, "object")
    foregrounds, synthesise = torch.ones(6, 1, 16, 16, device=device), SyntheticAnomalyGenerator()
    asked = []

    def draw(step, batch):
        asked.append((step, batch))
        generator = torch.Generator().manual_seed(100 * step + batch)
        return draw_image_pairs(data, foregrounds, synthesise, 4, generator), generator

    return draw, asked


def test_on_a_cpu_nothing_is_drawn_ahead():
    draw, asked = drawer(CPU)
    ahead = PairsAhead(draw, CPU)
    ahead.take(0, 0, following=(1, 1))
    assert asked == [(0, 0)]
    ahead.close()


@pytest.mark.gpu
def test_pairs_drawn_ahead_are_those_of_their_step():
    """Also where the next step is another than was said: at the end of an epoch, and in a resumed training."""
    device = torch.device("cuda")
    draw, asked = drawer(device)
    ahead = PairsAhead(draw, device)
    for step, batch, following in [(0, 0, (1, 1)), (1, 1, (2, 2)), (2, 0, (3, 1)), (3, 1, None), (4, 2, (5, 3))]:
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(20):  # the steps' own work, on their own stream
            busy = torch.tanh(busy @ busy)
        pairs, generator = ahead.take(step, batch, following)
        expected, other = draw(step, batch)
        for name, value in vars(expected).items():
            assert torch.equal(getattr(pairs, name), value), (step, name)
        assert torch.equal(generator.get_state(), other.get_state())
    ahead.close()
    assert (5, 3) in asked, "was begun, and came to its end"


@pytest.mark.gpu
def test_errors_of_pairs_drawn_ahead_reach_the_step():
    def draw(step, batch):
        del batch
        if step == 1:
            raise OSError("texture.png")
        return drawer(torch.device("cuda"))[0](0, 0)

    ahead = PairsAhead(draw, torch.device("cuda"))
    ahead.take(0, 0, following=(1, 1))
    with pytest.raises(OSError, match=r"texture\.png"):
        ahead.take(1, 1, following=(2, 2))
    ahead.close()

import pytest
import torch

from anomalib_cpr.reference_bank import ReferenceBank


def filled(count=3, channels=4, words=6, blocks=2, cells=((4, 6), (2, 3))):
    bank = ReferenceBank(channels, words, blocks)
    bank.histograms = torch.rand(count, blocks**2, words)
    bank.foregrounds = torch.rand(count, 1, *cells[0])
    bank.allocate(count, cells)
    bank.write(0, [torch.rand(count, channels, *c) for c in cells])
    return bank


def test_survives_a_state_dict():
    bank, other = filled(), ReferenceBank(4, 6, 2)
    other.load_state_dict(bank.state_dict())
    for name, buffer in bank.named_buffers():
        assert torch.equal(buffer, getattr(other, name))
    assert len(other) == 3


def test_loading_replaces_a_bank_of_another_size():
    bank = filled(count=5, cells=((8, 8), (4, 4)))
    bank.load_state_dict(filled(count=2).state_dict())
    assert len(bank) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 5}, r"descriptors have 5 channels, the model descriptor_channels=4"),
        ({"words": 7}, r"codebook_size=7, the model has blocks=2 and codebook_size=6"),
        ({"blocks": 3}, r"blocks=3 and codebook_size=6, the model has blocks=2"),
    ],
)
def test_bank_that_does_not_fit_the_configuration(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ReferenceBank(4, 6, 2).load_state_dict(filled(**arguments).state_dict())


@pytest.mark.parametrize("name", ["histograms", "foregrounds", "descriptors_2"])
def test_parts_that_do_not_fit_each_other(name):
    state = filled().state_dict()
    state[name] = state[name][:2]
    bank = ReferenceBank(4, 6, 2)
    with pytest.raises(RuntimeError, match="different numbers of images"):
        bank.load_state_dict(state)
    assert len(bank) == 0, "nothing may be loaded by halves"


def test_wrong_number_of_dimensions():
    state = filled().state_dict()
    state["descriptors_1"] = state["descriptors_1"][0]
    with pytest.raises(RuntimeError, match=r"descriptors_1 has shape \(4, 4, 6\)"):
        ReferenceBank(4, 6, 2).load_state_dict(state)


def test_clear_keeps_what_does_not_depend_on_the_heads():
    bank = filled()
    bank.clear()
    assert len(bank) == 0
    assert len(bank.histograms) == 3
    assert ReferenceBank(4, 6, 2).load_state_dict(bank.state_dict())


def test_predicted_size_is_the_real_one():
    bank = filled()
    descriptors = sum(d.numel() * 4 for d in bank.descriptors) / 1e6
    assert bank.size_for(3, [(4, 6), (2, 3)]) == pytest.approx(descriptors)
    assert bank.megabytes > descriptors


def test_empty_bank_and_other_size_are_refused():
    with pytest.raises(RuntimeError, match=r"bank is empty.*anomalib train --model Cpr"):
        ReferenceBank(4, 6, 2).check((4, 6))
    with pytest.raises(ValueError, match=r"32x32 pixels cannot be compared.*16x24 pixels"):
        filled().check((8, 8))

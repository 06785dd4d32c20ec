import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr import reference_bank
from anomalib_cpr.quantisation import restore
from anomalib_cpr.reference_bank import DTYPES, ReferenceBank, coarse_foregrounds


def filled(count=3, channels=4, words=6, blocks=2, cells=((4, 6), (2, 3)), **storage):
    generator = torch.Generator().manual_seed(count)
    bank = ReferenceBank(channels, words, blocks, **storage)
    bank.histograms = torch.rand(count, blocks**2, words, generator=generator)
    bank.foregrounds = torch.rand(count, 1, *cells[0], generator=generator)
    bank.allocate(count, cells)
    bank.write(0, [F.normalize(torch.randn(count, channels, *c, generator=generator), dim=1) for c in cells])
    bank.keep(torch.arange(count))
    return bank


def values(bank):
    """Descriptors of both scales as numbers."""
    return [restore(d, scales, bank.channels) for d, scales in zip(bank.descriptors, bank.scales, strict=True)]


def test_survives_a_state_dict():
    bank, other = filled(), ReferenceBank(4, 6, 2)
    other.load_state_dict(bank.state_dict())
    for name, buffer in bank.named_buffers():
        assert torch.equal(buffer, getattr(other, name))
    assert len(other) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_that_descriptors_are_averaged_survives_a_state_dict(tmp_path, dtype, in_a_file):
    paths = [tmp_path / "bank", tmp_path / "bank"] if in_a_file else [None, None]
    bank, other = filled(dtype=dtype, file=paths[0]), ReferenceBank(4, 6, 2, dtype, file=paths[1])
    for averaged in (True, False):
        bank.averaged = averaged
        other.load_state_dict(bank.state_dict())
        assert other.averaged is averaged
        assert len(other) == 3


def with_colours(count=3, **storage):
    """A bank that holds colours as well: 0 on the first image, 1 on the second, ..."""
    bank, cells = filled(count, **storage), ((4, 6), (2, 3))
    other = ReferenceBank(4, 6, 2, storage.get("dtype", "float32"), file=storage.get("file"))
    other.coloured = True
    other.histograms, other.foregrounds = bank.histograms, bank.foregrounds
    generator = torch.Generator().manual_seed(count)
    descriptors = [F.normalize(torch.randn(count, 4, *c, generator=generator), dim=1) for c in cells]
    other.allocate(count, cells)
    other.write(0, [*descriptors, torch.arange(count).float()[:, None, None, None].expand(-1, 4, 2, 3)])
    other.keep(torch.arange(count))
    other.colour_scale = torch.tensor(2.5)
    return other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_colours_survive_a_state_dict(tmp_path, dtype, in_a_file):
    file = tmp_path / "bank" if in_a_file else None
    bank, other = with_colours(dtype=dtype, file=file), ReferenceBank(4, 6, 2, dtype, file=file)
    other.load_state_dict(bank.state_dict())
    assert other.coloured
    assert other.colour_scale == 2.5
    assert torch.equal(other.colours, bank.colours)
    assert other.colours.data_ptr() != bank.colours.data_ptr()
    plain = filled(dtype=dtype)
    assert "colours" not in plain.state_dict(), "a bank without colours is as it always was"
    again = ReferenceBank(4, 6, 2, dtype)
    again.load_state_dict(with_colours(dtype=dtype).state_dict())
    again.load_state_dict(plain.state_dict())
    assert (again.coloured, again.colours.numel()) == (False, 0)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_colours_of_images_that_are_not_taken_over_are_forgotten(dtype):
    bank, other = with_colours(count=9), ReferenceBank(4, 6, 2, dtype, max_references=4)
    other.load_state_dict(bank.state_dict())
    kept = [bank.histograms.eq(histogram).all((1, 2)).nonzero().item() for histogram in other.histograms]
    assert len(kept) == 4
    assert other.colours[:, 0, 0, 0].tolist() == kept


def test_colours_of_another_number_of_images_are_refused():
    state = with_colours().state_dict()
    state["colours"] = state["colours"][:2]
    with pytest.raises(RuntimeError, match="different numbers of images"):
        ReferenceBank(4, 6, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("colour_scale", None, "only one of colours and colour_scale"),
        ("colours", None, "only one of colours and colour_scale"),
        ("colour_scale", torch.tensor(-1.0), "its colour_scale is -1.0; expected a number of 0 or more"),
        ("colour_scale", torch.tensor(float("nan")), "its colour_scale is nan"),
        ("colour_scale", torch.ones(2), "its colour_scale is"),
        ("colours", torch.zeros(3, 3, 2, 3), r"its colours have shape \(3, 2, 3\); expected \(4, 2, 3\)"),
        ("colours", torch.zeros(3, 4, 4, 6), r"its colours have shape \(4, 4, 6\)"),
    ],
)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_odd_colours_are_refused(tmp_path, entry, value, message, in_a_file):
    file = tmp_path / "bank" if in_a_file else None
    state, other = with_colours(file=file).state_dict(), ReferenceBank(4, 6, 2, file=file)
    if value is None:
        del state[entry]
    else:
        state[entry] = value
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_references", [None, 2, 9])
def test_predicted_size_is_the_real_one(dtype, max_references):
    kept = 3 if max_references is None else min(3, max_references)
    bank = filled(count=kept, dtype=dtype, max_references=max_references)
    held = sum(bank.get_buffer(name).nbytes for name in bank._per_descriptor) / 1e6
    assert bank.size_for(3, [(4, 6), (2, 3)]) == pytest.approx(held)
    assert bank.megabytes > held


@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptors_lie_channels_last_through_a_checkpoint(dtype, tmp_path):
    bank, other = filled(dtype=dtype), ReferenceBank(4, 6, 2, dtype)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for own, held in zip(bank.descriptors, other.descriptors, strict=True):
        assert held.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(own, held)
    assert other.get_buffer("descriptors_1").dtype == DTYPES[dtype]


@pytest.mark.parametrize("channels", [16, 64, 384])
def test_four_bits_take_an_eighth(channels):
    """Of the whole bank at 320 px, with retrieval grid and codebook as they are by default."""
    cells = [(80, 80), (40, 40)]
    whole = filled(1, channels, 12, 5, cells).megabytes
    assert filled(1, channels, 12, 5, cells, dtype="int4").megabytes <= whole / 8


def test_coarse_foregrounds():
    """At stride 8 the largest of four cells, in steps of 1 / 255; between them, what bilinear interpolation gives."""
    fine, coarse = filled(), filled(dtype="int4")
    largest = fine.foregrounds.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    references = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(fine.foregrounds_of(references), fine.foregrounds[references][:, :, 0])
    assert torch.allclose(coarse.foregrounds / 255, largest, atol=0.5 / 255 + 1e-6)
    expected = F.interpolate((largest * 255).round() / 255, scale_factor=2, mode="bilinear")[references][:, :, 0]
    assert torch.allclose(coarse.foregrounds_of(references), expected, atol=1e-6)
    assert fine.cells == coarse.cells == (4, 6)
    assert fine.holds_all_of(3)
    assert not fine.holds_all_of(4)
    assert not coarse.holds_all_of(3)


def test_a_bank_that_was_never_filled_is_loaded():
    bank = filled(dtype="int4")
    bank.load_state_dict(ReferenceBank(4, 6, 2).state_dict())
    assert len(bank) == len(bank.histograms) == 0


def test_an_odd_number_of_channels():
    bank, other = filled(channels=5, dtype="int8"), ReferenceBank(5, 6, 2, "int4")
    other.load_state_dict(bank.state_dict())
    for own, held in zip(values(bank), values(other), strict=True):
        assert torch.allclose(own, held, atol=0.15)
    with pytest.raises(RuntimeError, match=r"descriptors have 6 channels, the model descriptor_channels=8"):
        ReferenceBank(8, 6, 2, "int4").load_state_dict(other.state_dict())


def test_checkpoint_of_the_first_format_is_rearranged():
    state = {name: tensor.contiguous() for name, tensor in filled().state_dict().items()}
    assert not state["descriptors_1"].is_contiguous(memory_format=torch.channels_last)
    bank = ReferenceBank(4, 6, 2)
    bank.load_state_dict(state)
    assert bank.descriptors_1.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bank.descriptors_1, state["descriptors_1"])


@pytest.mark.parametrize(
    ("stored", "asked", "tolerance"),
    [
        ("float32", "float16", 1e-3),
        ("float32", "int8", 0.01),
        ("float16", "int8", 0.01),
        ("int8", "int8", 1e-7),
        ("float32", "int4", 0.15),
        ("int8", "int4", 0.15),
        ("int4", "int4", 1e-7),
    ],
)
@pytest.mark.parametrize("max_references", [None, 20])
def test_checkpoint_is_made_coarser_and_smaller_while_loading(stored, asked, tolerance, max_references):
    bank = filled(count=37, dtype=stored)
    other = ReferenceBank(4, 6, 2, asked, max_references)
    other.load_state_dict(bank.state_dict())
    kept = torch.arange(37)
    if max_references:
        bank.max_references = max_references
        kept = bank.representatives()
        assert len(other) == len(kept) == 20
    assert torch.equal(other.histograms, bank.histograms[kept])
    foregrounds = bank.foregrounds[kept]
    assert torch.equal(other.foregrounds, coarse_foregrounds(foregrounds) if asked == "int4" else foregrounds)
    for own, held in zip(values(bank), values(other), strict=True):
        assert torch.allclose(own[kept], held, atol=tolerance)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("int8", "float32"), ("int8", "float16"), ("float16", "float32"), ("int4", "int8"), ("int4", "float32")],
)
def test_a_coarse_bank_is_not_passed_off_as_a_fine_one(stored, asked):
    with pytest.raises(RuntimeError, match=f"descriptors are {stored}, the model has bank_dtype='{asked}'"):
        ReferenceBank(4, 6, 2, asked).load_state_dict(filled(dtype=stored).state_dict(), strict=False)


@pytest.mark.parametrize(("name", "message"), [("scales_1", "no scales"), ("descriptors_1", "torch.int16")])
def test_damaged_bank(name, message):
    state = filled(dtype="int8").state_dict()
    if name == "scales_1":
        del state[name]
    else:
        state[name] = state[name].short()
    with pytest.raises(RuntimeError, match=message):
        ReferenceBank(4, 6, 2, "int8").load_state_dict(state)


def test_on_host_only_the_small_parts_move():
    bank = filled(dtype="int8", on_host=True)
    expected = bank.descriptors_1.clone()
    bank.to("meta")
    assert bank.histograms.is_meta
    assert bank.foregrounds.is_meta
    assert torch.equal(bank.descriptors_1, expected)
    assert not bank.scales_2.is_meta
    assert set(bank.state_dict()) == set(filled(dtype="int8").state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "bank_dtype='bfloat16': must be one of 'float32', 'float16', 'int8', 'int4'"),
        ({"max_references": 0}, "max_references=0: must be at least 1"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceBank(4, 6, 2, **arguments)


def test_empty_bank_and_other_size_are_refused():
    with pytest.raises(RuntimeError, match=r"bank is empty.*anomalib train --model Cpr"):
        ReferenceBank(4, 6, 2).check((4, 6))
    with pytest.raises(ValueError, match=r"32x32 pixels cannot be compared.*16x24 pixels"):
        filled().check((8, 8))


def test_roots_belong_to_the_histograms_that_are_held(monkeypatch):
    bank = filled(count=5)
    assert bank.roots is None, "small galleries are compared as a whole"
    monkeypatch.setattr(reference_bank, "SHORTLIST", 1)
    first = bank.roots
    assert torch.allclose(first.square(), bank.histograms.flatten(1))
    assert bank.roots is first
    other = filled(count=5, channels=4)
    other.histograms = torch.rand(5, 4, 6)
    bank.load_state_dict(other.state_dict())
    assert torch.allclose(bank.roots.square(), other.histograms.flatten(1))
    bank.keep(torch.tensor([0, 2, 4]))
    assert torch.allclose(bank.roots.square(), other.histograms[[0, 2, 4]].flatten(1))


def test_a_bank_in_a_file_is_that_in_memory(tmp_path):
    """Written block by block, and read again through a checkpoint that holds none of the descriptors."""
    expected = filled()
    bank = filled(file=tmp_path / "folder" / "bank")
    assert list((tmp_path / "folder").iterdir()) == [tmp_path / "folder" / "bank"]
    state = bank.state_dict()
    assert set(state) == {"histograms", "foregrounds", "file_key"}
    other = ReferenceBank(4, 6, 2, file=tmp_path / "folder" / "bank")
    other.load_state_dict(state)
    for held in (bank, other):
        assert len(held) == 3
        assert held.megabytes == pytest.approx(expected.megabytes + 32e-6)
        for own, wanted in zip(held.descriptors, expected.descriptors, strict=True):
            assert torch.equal(own, wanted)
            assert own.is_contiguous(memory_format=torch.channels_last)
    other.descriptors_1.zero_()
    assert bank.descriptors_1.any(), "whoever writes into a bank that was loaded writes into memory of its own"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_with_descriptors_is_put_into_a_file(tmp_path, dtype):
    bank, other = filled(count=37), ReferenceBank(4, 6, 2, dtype, 20, file=tmp_path / "bank")
    expected = ReferenceBank(4, 6, 2, dtype, 20)
    for held in (other, expected):
        held.load_state_dict(bank.state_dict())
    again = ReferenceBank(4, 6, 2, dtype, 20, file=tmp_path / "bank")
    again.load_state_dict(other.state_dict())
    for own, wanted in zip(values(again), values(expected), strict=True):
        assert torch.equal(own, wanted)
    assert torch.equal(again.foregrounds, expected.foregrounds)


@pytest.mark.parametrize(("dtype", "kept"), [("float32", None), ("float16", None), ("int8", 20), ("int4", 20)])
def test_loading_leaves_a_file_that_another_checkpoint_needs(tmp_path, dtype, kept):
    path, bank = tmp_path / "bank", filled(count=37)
    ReferenceBank(4, 6, 2, dtype, kept, file=path).load_state_dict(bank.state_dict())
    ReferenceBank(4, 6, 2, dtype, kept, file=path).load_state_dict(bank.state_dict())  # the same once more
    before = path.read_bytes()
    bank.descriptors_2.neg_()
    with pytest.raises(RuntimeError, match=r"another checkpoint, which needs them\. Give another name, or delete"):
        ReferenceBank(4, 6, 2, dtype, kept, file=path).load_state_dict(bank.state_dict())
    assert path.read_bytes() == before
    path.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"not a complete file of descriptors\. Delete it, or give another name"):
        ReferenceBank(4, 6, 2, dtype, kept, file=path).load_state_dict(bank.state_dict())
    assert path.read_bytes() == b"something else"


def test_a_file_stays_on_the_host(tmp_path):
    bank = filled(dtype="int8", file=tmp_path / "bank")
    bank.to("meta")
    assert bank.histograms.is_meta
    assert not bank.descriptors_1.is_meta
    assert not bank.scales_2.is_meta


def test_an_unfinished_bank_leaves_the_file_of_the_last(tmp_path):
    bank = filled(file=tmp_path / "bank")
    state, held = bank.state_dict(), bank.descriptors_1.clone()
    bank.allocate(5, [(4, 6), (2, 3)])
    bank.write(0, [torch.ones(2, 4, 4, 6), torch.ones(2, 4, 2, 3)])
    bank.load_state_dict(state)
    assert torch.equal(bank.descriptors_1, held)


def test_a_full_disk_is_an_error_and_leaves_the_file_of_the_last(tmp_path, monkeypatch):
    bank = filled(file=tmp_path / "bank")
    before = (tmp_path / "bank").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: the file of the reference bank, .* takes .* MB"):
        bank.allocate(5, [(4, 6), (2, 3)])
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    assert (tmp_path / "bank").read_bytes() == before


def test_a_file_system_that_cannot_reserve_room(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    assert len(filled(file=tmp_path / "bank")) == 3


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs the list of processes")
def test_unfinished_files_of_other_processes(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        names = [f"bank.{platform.node()}.{int(ended.stdout)}.part", f"bank.{platform.node()}.{alive.pid}.part"]
        names += ["bank.elsewhere.1.part", "bank.old.part"]
        for name in names:
            (tmp_path / name).touch()
        expected = sorted(["bank", *names[1:]])
        bank = filled(file=tmp_path / "bank")
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
        bank.allocate(5, [(4, 6), (2, 3)])
        bank.discard_unfinished()
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
        assert len(bank) == 0
        alive.communicate(b"\n")


def test_a_resume_point_of_a_bank_in_a_file(tmp_path):
    bank = filled(file=tmp_path / "bank")
    state = bank.state_dict()
    bank.clear()
    point = bank.state_dict()
    bank.load_state_dict(state)
    bank.load_state_dict(point)
    assert len(bank) == 0
    assert len(bank.histograms) == 3
    plain = ReferenceBank(4, 6, 2)
    plain.load_state_dict(filled().state_dict())
    with pytest.raises(RuntimeError, match="give it as bank_file"):
        plain.load_state_dict(point)
    assert len(plain) == 3


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda path: path.unlink(), {}, "bank_file='.*bank', does not exist"),
        (lambda path: path.write_bytes(b"{}"), {}, "not a complete file of descriptors"),
        (lambda path: path.write_bytes(b"\x80\x00"), {}, "not a complete file of descriptors"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), {}, "not a complete file of descriptors"),
        (lambda path: filled(count=4, file=path), {}, "belongs to another checkpoint"),
        (Path.exists, {"file": None}, "give it as bank_file"),
        (Path.exists, {"dtype": "int4"}, "use bank_dtype='float32' and max_references=None"),
        (Path.exists, {"max_references": 2}, "use bank_dtype='float32' and max_references=None"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, damage, arguments, message):
    path = tmp_path / "bank"
    state = filled(file=path).state_dict()
    damage(path)
    with pytest.raises(RuntimeError, match=message):
        ReferenceBank(4, 6, 2, **{"file": path, **arguments}).load_state_dict(state)

# SPDX-License-Identifier: Apache-2.0
"""What the model remembers of the training images, as buffers that a checkpoint carries."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .colours import COLOUR_CHANNELS
from .global_retrieval import SHORTLIST, representatives, roots_of
from .mapped_file import complete, create, discard, read
from .quantisation import is_traced, pack, packed_channels, quantise, restore

BankDtype = Literal["float32", "float16", "int8", "int4"]

# From fine to coarse. uint8 stands for two components of 4 bits.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "int4": torch.uint8}
PARTS = ("descriptors_1", "descriptors_2", "scales_1", "scales_2")
KEY = "file_key"  # by which a checkpoint recognises the file of its descriptors
COLOURS, COLOUR_SCALE = "colours", "colour_scale"  # in a checkpoint that has them, see colour_matching of the model
AVERAGED = "averaged"  # in a checkpoint whose coarse descriptors are averaged, see averaged_descriptors of the model
_BLOCK = 16  # images that are converted at a time, so that a conversion needs no second bank


class ReferenceBank(nn.Module):
    """Histograms, foreground maps and descriptors of the training images.

    The buffers are empty until :meth:`allocate` and :meth:`write` fill them, or a checkpoint is loaded. A checkpoint
    with a larger or finer bank than the configuration asks for is reduced while it is loaded.

    Descriptors have the shape ``(gallery, channels, height, width)`` and lie in memory channels last, so that the
    matching reads each of them in one piece.

    A bank of 4 bits also holds its foregrounds smaller, once it is complete: at stride 8, in 8 bits. With that, all of
    it takes an eighth of the float32 bank. Colours, where they are held, come on top: 16 bytes per cell of stride 8, in
    any bank, on the device of the model, and in its checkpoint even if the descriptors are in a file.

    Args:
        descriptor_channels (int): Channels of the descriptors.
        codebook_size (int): Number of visual words in a histogram.
        blocks (int): Blocks per side of the retrieval grid.
        dtype (Literal["float32", "float16", "int8", "int4"]): How descriptors are stored; int8 has a scale per
            descriptor, int4 puts two channels into a byte (:mod:`anomalib_cpr.quantisation`).
        max_references (int | None): Keep at most so many images; None keeps all.
        on_host (bool): Leave the descriptors in main memory when the model moves to a device.
        file (str | Path | None): Keep the descriptors in this file, mapped into memory, and out of checkpoints; for
            banks that outgrow memory. A checkpoint then holds the key of the file that belongs to it.

    Attributes:
        averaged (bool): Coarse descriptors are averaged over neighbouring cells, so queries' must be as well.
        coloured (bool): Colours are held as well, as a third scale.

    Raises:
        ValueError: If a value is out of range.
    """

    histograms: Tensor
    foregrounds: Tensor
    descriptors_1: Tensor
    descriptors_2: Tensor
    scales_1: Tensor
    scales_2: Tensor
    file_key: Tensor
    colours: Tensor
    colour_scale: Tensor
    coloured = False  # also in models that were exported before there were colours

    def __init__(
        self,
        descriptor_channels: int,
        codebook_size: int,
        blocks: int,
        dtype: BankDtype = "float32",
        max_references: int | None = None,
        on_host: bool = False,
        file: str | Path | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"bank_dtype={dtype!r}: must be one of {', '.join(map(repr, DTYPES))}.")
        if max_references is not None and max_references < 1:
            raise ValueError(f"max_references={max_references}: must be at least 1, or None for all.")
        self.bank_dtype = dtype
        self.dtype = DTYPES[dtype]
        self.channels = descriptor_channels
        self.max_references = max_references
        self.file = None if file is None else Path(file)
        self.on_host = on_host or file is not None
        self.averaged = self.coloured = False
        self._roots: tuple[Tensor, Tensor] | None = None
        self.register_buffer("histograms", torch.zeros(0, blocks * blocks, codebook_size))
        self.register_buffer("foregrounds", torch.zeros(0, 1, 0, 0))
        # In a checkpoint only where they are used, so that one without them is as it always was.
        self.register_buffer(COLOURS, torch.zeros(0, COLOUR_CHANNELS, 0, 0), persistent=False)
        self.register_buffer(COLOUR_SCALE, torch.ones(()), persistent=False)
        stored = self._stored_channels(self.dtype)
        inside = file is None
        for scale in (1, 2):
            empty = torch.zeros(0, stored, 0, 0, dtype=self.dtype)
            self.register_buffer(f"descriptors_{scale}", empty, persistent=inside)
        if self.dtype == torch.int8:
            for scale in (1, 2):
                self.register_buffer(f"scales_{scale}", torch.zeros(0, 1, 0, 0), persistent=inside)
        if file is not None:
            self.register_buffer(KEY, torch.zeros(0, dtype=torch.uint8))

    def __len__(self) -> int:
        """Number of training images whose descriptors are held."""
        return self.descriptors_1.shape[0]

    @property
    def descriptors(self) -> list[Tensor]:
        """Descriptors per scale as they are stored, finest first, each ``(gallery, channels, height_i, width_i)``.

        In a bank of 4 bits, half as many channels of bytes.
        """
        return [self.descriptors_1, self.descriptors_2]

    @property
    def scales(self) -> list[Tensor | None]:
        """Factors of int8 descriptors per scale, ``(gallery, 1, height_i, width_i)``; None in other banks."""
        return [self.scales_1, self.scales_2] if self.dtype == torch.int8 else [None, None]

    @property
    def roots(self) -> Tensor | None:
        """Square roots of the histograms, by which large galleries are searched; None for galleries that are not.

        They are computed once and kept beside the histograms that they belong to; an exporter records the computation.
        """
        if len(self.histograms) <= 2 * SHORTLIST:
            return None
        if is_traced():
            return roots_of(self.histograms)
        if self._roots is None or self._roots[0] is not self.histograms:
            self._roots = (self.histograms, roots_of(self.histograms))
        return self._roots[1]

    @property
    def megabytes(self) -> float:
        """Memory of all buffers in MB (10^6 bytes)."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 1e6

    def foregrounds_of(self, references: Tensor) -> Tensor:
        """Foregrounds of some images.

        Args:
            references (Tensor): Indices into the bank, ``(batch, k)``.

        Returns:
            Tensor: In 0..1, ``(batch, k, height, width)`` at stride 4, float32.
        """
        found = self.foregrounds[references][:, :, 0]
        if found.dtype != torch.uint8:
            return found
        return F.interpolate(found.float() * (1 / 255), self.cells, mode="bilinear")

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width at stride 4 of the images whose foregrounds are held."""
        height, width = self.foregrounds.shape[-2:]
        return (2 * height, 2 * width) if self.foregrounds.dtype == torch.uint8 else (height, width)

    def holds_all_of(self, count: int) -> bool:
        """Whether a training can go on with what is held: exact histograms and foregrounds of all images.

        Args:
            count (int): Number of training images.

        Returns:
            bool: False after a reduction to representatives or to coarse foregrounds.
        """
        return len(self.histograms) == count and self.foregrounds.dtype != torch.uint8

    def count_for(self, count: int) -> int:
        """Number of images that are kept of ``count``."""
        return count if self.max_references is None else min(count, self.max_references)

    def size_for(self, count: int, cells: Sequence[tuple[int, int]]) -> float:
        """Memory that the descriptors of a training set will take, in MB (10^6 bytes).

        Args:
            count (int): Number of training images, of which at most ``max_references`` are kept.
            cells (Sequence[tuple[int, int]]): Height and width of the feature maps, per scale.

        Returns:
            float: Megabytes.
        """
        per_cell = self._stored_channels(self.dtype) * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0)
        sizes = [height * width for height, width in cells]
        colours = 4 * COLOUR_CHANNELS * sizes[-1] if self.coloured else 0
        return 1e-6 * self.count_for(count) * (per_cell * sum(sizes) + colours)

    def allocate(self, count: int, cells: Sequence[tuple[int, int]]) -> None:
        """Make room for descriptors; what was held before is freed first, so that there are never two copies.

        Args:
            count (int): Number of images.
            cells (Sequence[tuple[int, int]]): Height and width of the feature maps, per scale.
        """
        self.clear()
        if self.coloured:
            self.colours = self.colours.new_zeros(count, COLOUR_CHANNELS, *cells[1])
        shapes = {
            name: (count, getattr(self, name).shape[1], *cells[int(name[-1]) - 1]) for name in self._per_descriptor
        }
        if self.file is not None:
            self._hold(create(self.file, {name: (shape, getattr(self, name).dtype) for name, shape in shapes.items()}))
            return
        for name, shape in shapes.items():
            self._make_room(name, shape)

    def discard_unfinished(self) -> None:
        """Free descriptors that were not all written, and remove their file."""
        self.clear()
        if self.file is not None:
            discard(self.file)

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _finish_file(self) -> None:
        """Give the file of the descriptors its key, and its place."""
        if self.file is None or not len(self):
            return
        key = self._key_of(_some(len(self)))
        self._hold(complete(self.file, key))
        self.file_key = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)

    def _key_of(self, some: Tensor) -> str:
        """Of the content, so that processes that describe the same images come to the same key."""
        digest = hashlib.sha256()
        for name in self._per_descriptor:
            digest.update(getattr(self, name)[some].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _stored_channels(self, dtype: torch.dtype) -> int:
        return packed_channels(self.channels) if dtype == torch.uint8 else self.channels

    def _make_room(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
        held = getattr(self, name)
        layout = torch.channels_last if name.startswith("descriptors") else torch.contiguous_format
        setattr(self, name, torch.empty(shape, dtype=dtype or held.dtype, device=held.device, memory_format=layout))

    def write(self, start: int, descriptors: Sequence[Tensor]) -> None:
        """Store descriptors of consecutive images.

        Args:
            start (int): Index of the first image.
            descriptors (Sequence[Tensor]): Unit vectors per scale, ``(batch, channels, height_i, width_i)``; after
                them colours, as they are stored, if they are held.
        """
        for colours in descriptors[2:]:
            self.colours[start : start + len(colours)] = colours
        for held, factors, new in zip(self.descriptors, self.scales, descriptors[:2], strict=True):
            if self.dtype == torch.uint8:
                held[start : start + len(new)] = pack(new)
            elif factors is None:
                held[start : start + len(new)] = new
            else:
                held[start : start + len(new)], factors[start : start + len(new)] = quantise(new)

    def representatives(self) -> Tensor:
        """Which of the images with a histogram are to be kept: ``max_references`` that represent all.

        Returns:
            Tensor: Indices in ascending order, ``(count,)``, on the CPU.
        """
        return representatives(self.histograms.cpu(), self.count_for(len(self.histograms)))

    def keep(self, chosen: Tensor) -> None:
        """Forget histograms and foregrounds of all images but the chosen, and store theirs in their final form.

        Args:
            chosen (Tensor): Indices of shape ``(count,)``, in ascending order.
        """
        if len(chosen) < len(self.histograms):
            chosen = chosen.to(self.histograms.device)
            self.histograms, self.foregrounds = self.histograms[chosen], self.foregrounds[chosen]
        if self.bank_dtype == "int4":
            self.foregrounds = coarse_foregrounds(self.foregrounds)
        self._finish_file()

    def clear(self) -> None:
        """Free the descriptors. Histograms and foregrounds do not depend on the heads and stay."""
        for name in self._per_descriptor:
            held = getattr(self, name)
            setattr(self, name, held.new_zeros(0, held.shape[1], 0, 0))
        self.colours = self.colours.new_zeros(0, COLOUR_CHANNELS, 0, 0)
        if self.file is not None:
            self.file_key = self.file_key.new_zeros(0)

    @property
    def _per_descriptor(self) -> list[str]:
        return [name for name in PARTS if name in self._buffers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ReferenceBank":
        """Move with the model, except what was asked to stay in main memory."""
        staying = {name: self._buffers.pop(name) for name in self._per_descriptor} if self.on_host else {}
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers.update(staying)

    def check(self, cells: tuple[int, int]) -> None:
        """Refuse to compare with nothing, or with references of another size.

        Args:
            cells (tuple[int, int]): Height and width of the query's F1.

        Raises:
            RuntimeError: If the bank is empty.
            ValueError: If the references have another size.
        """
        if len(self) == 0:
            raise RuntimeError(
                "The reference bank is empty: this model has not been fitted. Run `anomalib train --model Cpr ...` or "
                "Engine().fit(model, datamodule), or load a checkpoint of a finished training "
                "(a resume point, resume.ckpt, holds no bank: continue its training with ckpt_path)."
            )
        own = tuple(self.descriptors_1.shape[-2:])
        if own != tuple(cells):
            raise ValueError(
                f"Images of {4 * cells[0]}x{4 * cells[1]} pixels cannot be compared with the reference bank, which was "
                f"built from images of {4 * own[0]}x{4 * own[1]} pixels. Use the size of the training."
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.averaged:
            destination[prefix + AVERAGED] = torch.tensor(True)
        if self.coloured:
            destination |= {prefix + COLOURS: self.colours, prefix + COLOUR_SCALE: self.colour_scale}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Take over a checkpoint, after checking that its parts fit each other and the configuration."""
        own = {prefix + name for name in (*PARTS, "histograms", "foregrounds", COLOURS, COLOUR_SCALE)}
        incoming = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name in own}
        self._roots = None  # loading may copy into the same tensor
        key = key_of_file(state_dict.get(prefix + KEY))
        problem = self.misfit(key, incoming)
        if problem:
            errors: list[str] = args[-1]
            errors.append(f"The checkpoint's reference bank does not fit the configuration: {problem}")
            return
        state_dict = dict(state_dict)
        self.averaged = bool(state_dict.pop(prefix + AVERAGED, False))
        colours, scale = (state_dict.pop(prefix + name, None) for name in (COLOURS, COLOUR_SCALE))
        self.coloured = colours is not None
        if key:
            self._hold({name: incoming[name] for name in self._per_descriptor})
        elif "descriptors_1" in incoming:
            state_dict |= self._reduced(incoming, prefix)
            self._finish_file()
        elif self.file is not None:
            self.clear()
        self.colours = self.colours.new_zeros(0, COLOUR_CHANNELS, 0, 0)
        if colours is not None and scale is not None:
            kept = self._chosen_of(incoming) if "descriptors_1" in incoming else torch.arange(len(colours))
            self.colours = colours[kept.to(colours.device)].to(self.colours.device)
            self.colour_scale = scale.clone().to(self.colours.device)
        for name in {*PARTS, KEY} - set(self.state_dict()):
            state_dict.pop(prefix + name, None)
        if self.file is not None:
            state_dict.setdefault(prefix + KEY, self.file_key)
        for name in self._buffers:
            tensor = state_dict.get(prefix + name)
            # Descriptors keep this bank's type, and were converted to it; foregrounds come in either of their forms.
            dtype = tensor.dtype if tensor is not None and name == "foregrounds" else getattr(self, name).dtype
            if tensor is not None and (tensor.shape, dtype) != (getattr(self, name).shape, getattr(self, name).dtype):
                self._make_room(name, tensor.shape, dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def misfit(self, key: str | None, incoming: dict[str, Tensor]) -> str | None:
        """What keeps the bank from taking over that of a checkpoint.

        Args:
            key (str | None): From :func:`key_of_file`.
            incoming (dict[str, Tensor]): Its tensors by name; those in the file are added.

        Returns:
            str | None: None if nothing does.
        """
        scale = incoming.pop(COLOUR_SCALE, None)
        return (
            self._map_file(key, incoming)
            or self._odd_colours(incoming, scale)
            or self._misfit(incoming)
            or self._reduction_of_file(key, incoming)
            or self._file_of_others(key, incoming)
        )

    def _map_file(self, key: str | None, incoming: dict[str, Tensor]) -> str | None:
        """Add the file's tensors to those of a checkpoint that has its key, or say why this cannot be."""
        if key is not None and self.file is None:
            return "its descriptors lie in a file of their own: give it as bank_file."
        if not key or self.file is None:
            return None
        if not self.file.is_file():
            return f"the file of its descriptors, bank_file={str(self.file)!r}, does not exist."
        try:
            found, tensors = read(self.file)
        except ValueError as error:
            return str(error)
        if found != key:
            return f"bank_file={str(self.file)!r} belongs to another checkpoint or another step of the training."
        incoming.update(tensors)
        return None

    @staticmethod
    def _odd_colours(incoming: dict[str, Tensor], scale: Tensor | None) -> str | None:
        if (COLOURS in incoming) != (scale is not None):
            return f"it has only one of {COLOURS} and {COLOUR_SCALE}."
        if scale is not None and (scale.ndim or not 0 <= float(scale) < float("inf")):
            return f"its {COLOUR_SCALE} is {scale.tolist()}; expected a number of 0 or more."
        coarse = incoming.get("descriptors_2")
        if scale is None or coarse is None or not len(coarse):
            return None
        found, expected = tuple(incoming[COLOURS].shape[1:]), (COLOUR_CHANNELS, *coarse.shape[-2:])
        return None if found == expected else f"its {COLOURS} have shape {found}; expected {expected}."

    def _reduction_of_file(self, key: str | None, incoming: dict[str, Tensor]) -> str | None:
        count = len(incoming.get("descriptors_1", ()))
        if key and (count > self.count_for(count) or incoming["descriptors_1"].dtype != self.dtype):
            stored = {dtype: name for name, dtype in DTYPES.items()}[incoming["descriptors_1"].dtype]
            return f"the file of its descriptors is not converted: use bank_dtype={stored!r} and max_references=None."
        return None

    def _file_of_others(self, key: str | None, incoming: dict[str, Tensor]) -> str | None:
        """Loading must not destroy what another checkpoint needs: is there a file that would become another?"""
        if (
            key is not None
            or self.file is None
            or not self.file.is_file()
            or not len(incoming.get("descriptors_1", ()))
        ):
            return None
        chosen = self._chosen_of(incoming)
        chosen = chosen[_some(len(chosen))]
        as_stored = ReferenceBank(self.channels, self.histograms.shape[2], 1, self.bank_dtype)
        as_stored.allocate(len(chosen), _cells(incoming))
        as_stored._copy(0, chosen, incoming)
        try:
            if read(self.file)[0] == as_stored._key_of(torch.arange(len(chosen))):
                return None
        except ValueError as error:
            return f"{error} Delete it, or give another name as bank_file."
        return (
            f"bank_file={str(self.file)!r} holds the descriptors of another checkpoint, which needs them. Give another "
            "name, or delete the file."
        )

    def _chosen_of(self, incoming: dict[str, Tensor]) -> Tensor:
        """Which images of a checkpoint's bank are taken over."""
        count = len(incoming["descriptors_1"])
        if count <= self.count_for(count):
            return torch.arange(count)
        return representatives(incoming.get("histograms", self.histograms).cpu(), self.count_for(count))

    def _reduced(self, incoming: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Entries of a checkpoint's bank that take another form here: other storage, fewer images."""
        count = len(incoming["descriptors_1"])
        chosen = self._chosen_of(incoming)
        if count == 0:  # a resume point
            self.clear()
            return {prefix + name: getattr(self, name) for name in self._per_descriptor}
        if len(chosen) == count and incoming["descriptors_1"].dtype == self.dtype and self.file is None:
            return {}
        # Written block by block into this bank's own buffers; loading then copies them onto themselves.
        self.allocate(len(chosen), _cells(incoming))
        for start in range(0, len(chosen), _BLOCK):
            block = chosen[start : start + _BLOCK]
            self._copy(start, block, incoming)
        names = ("histograms", "foregrounds")
        entries: dict[str, Tensor] = {name: incoming[name][chosen] for name in names if name in incoming}
        if self.bank_dtype == "int4" and "foregrounds" in entries:
            entries["foregrounds"] = coarse_foregrounds(entries["foregrounds"])
        entries.update({name: getattr(self, name) for name in self._per_descriptor})
        return {prefix + name: tensor for name, tensor in entries.items()}

    def _copy(self, start: int, block: Tensor, incoming: dict[str, Tensor]) -> None:
        """Take over some images of another bank: as they are stored there, or brought to this bank's type."""
        stored = [tensor[block.to(tensor.device)] for tensor in _both(incoming, "descriptors")]
        factors: list[Tensor | None] = [None, None]
        if stored[0].dtype == torch.int8:
            factors = [tensor[block.to(tensor.device)] for tensor in _both(incoming, "scales")]
        if stored[0].dtype != self.dtype:
            self.write(start, [restore(*pair, self.channels) for pair in zip(stored, factors, strict=True)])
            return
        own = zip(self.descriptors, self.scales, stored, factors, strict=True)
        for held, held_factors, new, new_factors in own:
            held[start : start + len(block)] = new
            if held_factors is not None and new_factors is not None:
                held_factors[start : start + len(block)] = new_factors

    def _misfit(self, incoming: dict[str, Tensor]) -> str | None:
        return self._other_configuration(incoming) or self._other_counts(incoming) or self._finer_than(incoming)

    def _other_configuration(self, incoming: dict[str, Tensor]) -> str | None:
        for name, tensor in incoming.items():
            if tensor.ndim != (3 if name == "histograms" else 4):
                return f"{name} has shape {tuple(tensor.shape)}."
        if "histograms" in incoming and incoming["histograms"].shape[1:] != self.histograms.shape[1:]:
            blocks, words = incoming["histograms"].shape[1:]
            own_blocks, own_words = self.histograms.shape[1:]
            return (
                f"it was made with blocks={round(blocks**0.5)} and codebook_size={words}, the model has "
                f"blocks={round(own_blocks**0.5)} and codebook_size={own_words}. Use the values of the checkpoint."
            )
        for name in ("descriptors_1", "descriptors_2"):
            if name in incoming and incoming[name].shape[1] != self._stored_channels(incoming[name].dtype):
                channels = incoming[name].shape[1] * (2 if incoming[name].dtype == torch.uint8 else 1)
                return (
                    f"its descriptors have {channels} channels, the model descriptor_channels={self.channels}. "
                    "Use the value of the checkpoint."
                )
        return None

    @staticmethod
    def _other_counts(incoming: dict[str, Tensor]) -> str | None:
        counts = {name: tensor.shape[0] for name, tensor in incoming.items()}
        if counts.get("descriptors_1") != counts.get("descriptors_2") or (
            counts.get("descriptors_1") and len(set(counts.values())) != 1
        ):
            return f"its parts hold different numbers of images: {counts}."
        return None

    def _finer_than(self, incoming: dict[str, Tensor]) -> str | None:
        if not len(incoming.get("descriptors_1", ())):
            return None
        names, order = {dtype: name for name, dtype in DTYPES.items()}, list(DTYPES.values())
        types = {tensor.dtype for name, tensor in incoming.items() if name.startswith("descriptors")}
        for dtype in types:
            if dtype not in names:
                return f"its descriptors are {dtype}; expected one of {', '.join(DTYPES)}."
            if order.index(dtype) > order.index(self.dtype):
                return (
                    f"its descriptors are {names[dtype]}, the model has bank_dtype={self.bank_dtype!r}. A bank can "
                    f"be made coarser while it is loaded, not finer: use bank_dtype={names[dtype]!r}."
                )
        if torch.int8 in types and not {"scales_1", "scales_2"} <= incoming.keys():
            return "its descriptors are int8 but it has no scales."
        return None


def key_of_file(entry: Tensor | None) -> str | None:
    """Read what a checkpoint says of a file of descriptors.

    Args:
        entry (Tensor | None): Its entry :data:`KEY`, bytes, if it has one.

    Returns:
        str | None: Key of the file; empty for a resume point, whose file is outdated; None if the descriptors are not
            in a file of their own.
    """
    return None if entry is None else bytes(entry.tolist()).hex()


def coarse_foregrounds(foregrounds: Tensor) -> Tensor:
    """Foregrounds at stride 8, in 8 bits: the largest of four, so that no part of an object gets fainter.

    On MVTec AD screw, whose object is thin, their mean costs 0.5 points of pixel AP and their largest nothing.

    Args:
        foregrounds (Tensor): In 0..1, ``(gallery, 1, height, width)`` at stride 4; what is coarse already stays.

    Returns:
        Tensor: Of 0..255 for 0..1, ``(gallery, 1, height / 2, width / 2)``, uint8.
    """
    if foregrounds.dtype == torch.uint8 or not foregrounds.numel():
        return foregrounds
    return (255 * F.max_pool2d(foregrounds, 2)).round().to(torch.uint8)


def _some(count: int) -> Tensor:
    """Images whose descriptors make the key of a file."""
    return torch.linspace(0, count - 1, min(count, _BLOCK)).round().long()


def _cells(incoming: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Height and width of the maps of a checkpoint's bank, per scale."""
    return [(tensor.shape[-2], tensor.shape[-1]) for tensor in _both(incoming, "descriptors")]


def _both(incoming: dict[str, Tensor], name: str) -> list[Tensor]:
    return [incoming[f"{name}_{scale}"] for scale in (1, 2)]

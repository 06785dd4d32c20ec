# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation in several processes, ranks: who does what, and what all of them must have in common.

Every rank holds all training images, since a pair may be drawn of any two. Codebook and foreground are learned by rank
0 and sent to the others. What is computed image by image (histograms, foreground maps, the reference bank, predictions)
is shared out in the batches that a single process would form, so that the numbers are the same.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler, Sampler


def refuse_sharded_models(strategy: Strategy) -> None:
    """Say early that a strategy which cuts the model into pieces has nothing to cut here.

    Args:
        strategy (Strategy): Of the trainer.

    Raises:
        ValueError: If it shards parameters.
    """
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004 - what the user chose is a value
            f"strategy={type(strategy).__name__} shards the parameters of a model over processes. Cpr trains two small "
            "heads of about a million parameters: use strategy='ddp', which shares out the image pairs."
        )


def exchange(tensors: Sequence[Tensor], spans: Sequence[tuple[int, int, int]], device: torch.device) -> None:
    """Give every rank the rows that the others have computed.

    Args:
        tensors (Sequence[Tensor]): Of the same number of rows, of equal shapes on all ranks; changed in place.
        spans (Sequence[tuple[int, int, int]]): First row, the one after the last, and the rank that has them.
        device (torch.device): Through which the process group communicates. The tensors may lie elsewhere.
    """
    for start, stop, owner in spans:
        for tensor in tensors:
            rows = tensor[start:stop]
            # Descriptors lie channels last; in that order a block is one piece of memory, as collectives ask for.
            rows = rows.permute(0, 2, 3, 1) if rows.ndim == 4 else rows
            sent = rows.to(device).contiguous()
            distributed.broadcast(sent, owner)
            if sent.data_ptr() != rows.data_ptr():
                rows.copy_(sent)


def send(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of rank 0.

    Args:
        tensors (Sequence[Tensor]): Of equal shapes on all ranks, on the device of the process group.
    """
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        distributed.broadcast(sent, 0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by their mean over the ranks, in one message.

    Args:
        tensors (Sequence[Tensor]): Of equal shapes on all ranks, of one type.
    """
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


# --- evaluation


def share_of(count: int, batch_size: int, rank: int, ranks: int) -> list[int]:
    """Positions in a data set that a rank evaluates: whole batches of a single process, each by one rank.

    Every position belongs to exactly one rank. (Lightning's own sampler repeats some, so that all ranks have equally
    many; metrics and thresholds then count these images twice.) Where there are too few for a batch each, every rank
    takes an equal part.

    Args:
        count (int): Length of the data set, at least ``ranks``.
        batch_size (int): Images per batch.
        rank (int): Of this process.
        ranks (int): Number of processes.

    Returns:
        list[int]: In ascending order; never empty.

    Raises:
        ValueError: If there are fewer images than ranks.

    Example:
        >>> share_of(7, 2, 0, 2), share_of(7, 2, 1, 2)
        ([0, 1, 4, 5], [2, 3, 6])
        >>> share_of(3, 32, 0, 2), share_of(3, 32, 1, 2)
        ([0, 1], [2])
    """
    if count < ranks:
        raise ValueError(
            f"{count} image{'s' if count != 1 else ''} cannot be shared out among {ranks} processes. "
            f"Evaluate with devices=1 (--trainer.devices 1)."
        )
    if count <= batch_size * (ranks - 1):
        each, more = divmod(count, ranks)
        start = rank * each + min(rank, more)
        return list(range(start, start + each + (rank < more)))
    return [position for position in range(count) if position // batch_size % ranks == rank]


class BatchShare(DistributedSampler):
    """The share of a rank, see :func:`share_of`.

    Args:
        sampler (Sampler | Iterable): Order of the images in a single process.
        batch_size (int): Images per batch.
        rank (int): Of this process.
        num_replicas (int): Number of processes.
    """

    def __init__(self, sampler: Sampler | Iterable, batch_size: int, rank: int, num_replicas: int) -> None:
        count = len(sampler) if isinstance(sampler, Sized) else len(list(sampler))
        super().__init__(range(count), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self._sampler = sampler
        self._share = share_of(count, batch_size, rank, num_replicas)
        self.num_samples, self.total_size = len(self._share), count

    def __iter__(self) -> Iterator[int]:
        """Yield indices into the data set."""
        order = list(self._sampler)
        return iter([order[position] for position in self._share])


def evaluate_each_image_once(trainer: Trainer, module: LightningModule) -> None:
    """Let this trainer share out what the module validates, tests and predicts by :class:`BatchShare`.

    Args:
        trainer (Trainer): Runs in several processes. Samplers that are already distributed stay.
        module (LightningModule): Only while the trainer works for a model of its kind.
    """
    connector: Any = trainer._data_connector  # noqa: SLF001 - Lightning has no public way
    if getattr(connector, "evaluates_each_image_once", False):
        return
    kind = type(module)  # not the module, which may be large and is not the last one to use this trainer
    original = connector._resolve_sampler  # noqa: SLF001

    def resolve(dataloader: DataLoader, shuffle: bool, mode: RunningStage | None = None) -> Any:  # noqa: ANN401
        evaluating = mode in {RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.PREDICTING}
        own = isinstance(trainer.lightning_module, kind)
        if not (evaluating and own and connector._requires_distributed_sampler(dataloader)):  # noqa: SLF001
            return original(dataloader, shuffle, mode=mode)
        batch_size = getattr(dataloader.batch_sampler, "batch_size", None) or dataloader.batch_size or 1
        return BatchShare(dataloader.sampler, batch_size, trainer.global_rank, trainer.world_size)

    connector._resolve_sampler = resolve  # noqa: SLF001
    connector.evaluates_each_image_once = True


def gather_predictions(trainer: Trainer) -> None:
    """Make the predictions of the trainer complete on every rank, in the order of a single process.

    Args:
        trainer (Trainer): At the end of a prediction.
    """
    loop = trainer.predict_loop
    if not loop.return_predictions:
        return
    held = [loop.predictions] if loop.num_dataloaders == 1 else loop.predictions
    broadcast, ranks = trainer.strategy.broadcast, range(trainer.world_size)
    for batches in held:
        counts = [broadcast(len(batches), rank) for rank in ranks]
        # One batch at a time: all at once, they would be held three times.
        everything = [
            broadcast(batches[turn] if rank == trainer.global_rank else None, rank)
            for turn in range(max(counts))
            for rank in ranks
            if turn < counts[rank]
        ]
        batches[:] = everything


def share_output_folder(trainer: Any) -> None:  # noqa: ANN401 - a Trainer, of which a private attribute is set
    """Let all ranks write into the folder of rank 0.

    anomalib 2.7's Engine makes a new version folder in each process, and ``latest`` points to that of the last one,
    which holds no checkpoint.

    Args:
        trainer (Trainer): About to fit.
    """
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # noqa: SLF001 - Lightning has no public way
        if own.parent == shared.parent:
            with suppress(OSError):  # not empty, then it was not made a moment ago
                own.rmdir()
    trainer.strategy.barrier()
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and not latest.exists():
        latest.unlink()
        latest.symlink_to(shared, target_is_directory=True)

# SPDX-License-Identifier: Apache-2.0
"""The reference bank in a fit: when it is built, how it is matched with, and its way into checkpoints and back."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from .checkpoint_check import BANK, FILE_KEY, check_content, check_file, misfit
from .colour_weight import WEIGHED_IMAGES, colour_scale_of
from .lightning_preparation import Preparation
from .matching_choice import (
    ASKED_IMAGES,
    CLEAR_CONTRAST,
    CLEAR_SEPARATION,
    ENOUGH_IMAGES,
    SMALL_AREA,
    USUAL_MATCHING,
    WEAK_OPACITY,
    Evidence,
    Matching,
    candidates,
    choose,
    compare_matchings,
    is_anywhere,
)
from .memory import is_out_of_memory, return_freed_memory, smaller_bank
from .progress import stage
from .ranks import exchange
from .reference_bank import AVERAGED, COLOURS, key_of_file
from .scoring_settings import apply_settings, settings_of
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .training import TrainingData
from .training_steps import step_generator
from .unaligned import ON_THE_WHOLE

if TYPE_CHECKING:
    from typing_extensions import Self

# 1 had no int8 banks and no max_references, 2 no int4 banks; up to 3 nothing was said of windows, and the blur was 4;
# up to 4 maps were smooth; up to 5 nothing was said of the number of references; up to 6 matching was not coherent;
# up to 7 distances were absolute, and outlines knew nothing of the largest value of the image; up to 8 descriptors were
# not averaged; up to 9 unaligned matching took all references at the coarse scale; up to 10 the whole map was
# searched at both scales; up to 11 no colours were compared.
CHECKPOINT_FORMAT = 12


class BankInCheckpoints(Preparation):
    """The part of :class:`Cpr` that keeps what predictions compare with."""

    evaluator: nn.Module | None
    saves_bank = True
    saves_alone = False  # of several processes

    def build_bank(self, *, alone: bool = False) -> None:
        """Describe the training images with the heads as they are now, if that was not done since the last step.

        Args:
            alone (bool): Of several processes only this one asks for it; otherwise they share the work.

        Raises:
            MemoryError: If it does not fit.
        """
        data, bank = self._training_data, self.model.bank
        if data is None or len(bank):
            return
        return_freed_memory()  # that of the steps is in pieces, and the bank may need all there is
        rank, ranks = (0, 1) if alone else (self.trainer.global_rank, self._ranks)
        batches = -(-len(data.images) // self._preparation_batch)
        tracked = self._track("Reference bank", batches)(self._batches(data.images))
        with stage("Reference bank"):
            try:
                in_bank = self.model.remember(tracked, rank, ranks, self._exchange_descriptors)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                device = bank.descriptors_1.device
                raise MemoryError(
                    f"The reference bank of {bank.count_for(len(data.images))} images does not fit into the memory of "
                    f"{device} ({error}). Resume with a smaller one: {smaller_bank(device)}. No step is lost."
                ) from error
        try:
            self._decide_on_matching(data, in_bank, alone=alone)
            if self.model.colour_matching and self.model.unaligned_matching:
                self._weigh_colours(data, in_bank, alone=alone)
        except BaseException:
            self.drop_bank()  # a checkpoint of the interrupted training would have a bank that nothing was decided on
            raise

    def drop_bank(self) -> None:
        """Free the descriptors of the training images."""
        self.model.bank.clear()
        if self._described is not None:  # with max_references, the bank has forgotten some
            self.model.bank.histograms, self.model.bank.foregrounds = self._described

    def _exchange_descriptors(self, spans: list[tuple[int, int, int]]) -> None:
        bank = self.model.bank
        colours = [bank.colours] if bank.coloured else []
        held = [tensor for tensor in (*bank.descriptors, *bank.scales, *colours) if tensor is not None]
        exchange(held, spans, self.device)

    def on_validation_start(self) -> None:
        """Build the bank that validation compares with."""
        self.build_bank()

    def on_train_end(self) -> None:
        """Leave a model that can predict, also where nothing was validated."""
        self.build_bank()

    def on_fit_end(self) -> None:
        """The same where the trainer had nothing left to train: in a second fit with one Engine."""
        if self.is_prepared and not len(self.model.bank):
            if self.trainer.ckpt_path is None and self.trainer.global_step > 0:
                rank_zero_warn(
                    "No step was trained, so the heads are random: this trainer has done all of its steps in an "
                    "earlier fit. Make a new Engine for each fit."
                )
            self.to(self.trainer.strategy.root_device)  # Lightning has already moved it to the CPU
            self.build_bank()
            self.cpu()

    def _decide_on_matching(self, data: TrainingData, in_bank: Tensor, *, alone: bool) -> None:
        """With how many references, in windows or over the whole map, by the evidence of the heads."""
        usual = Matching(
            self._pairs_k,
            (self.model.window_sizes[0], self.model.window_sizes[1])
            if "window_sizes" in self._given_settings
            else USUAL_MATCHING.window_sizes,
        )
        self._match_as(usual)
        available = len(in_bank) - data.images.copies  # an image is no reference of itself
        more = "k" not in self._given_settings
        whole_map = self._maybe_loose and "window_sizes" not in self._given_settings
        options = candidates(usual, available, more_references=more, whole_map=whole_map)
        if len(options) == 1 or available < ENOUGH_IMAGES or self._synthesise is None:
            return
        found = self._compare_matchings(data, in_bank, options, alone=alone)
        if not found:
            return
        chosen = choose(found)
        self._match_as(chosen)
        others = "; ".join(f"{matching}: {evidence}" for matching, evidence in found.items() if matching != chosen)
        rank_zero_info(
            f"Matching with {chosen}: weak synthetic anomalies add {found[chosen].contrast:.2f} times its score to a "
            f"good image, which is {found[chosen].separation:.1f} standard deviations of good images ({others}; the "
            f"usual one is left for {CLEAR_CONTRAST:g} times the former or {CLEAR_SEPARATION:g} times the latter). "
            "Overrule it with k and window_sizes."
            + (
                " The whole map takes long without a GPU, in proportion to k."
                if is_anywhere(chosen.window_sizes)
                else ""
            )
        )

    def _compare_matchings(
        self, data: TrainingData, in_bank: Tensor, options: Sequence[Matching], *, alone: bool
    ) -> dict[Matching, Evidence]:
        """Of weak anomalies, the same ones in each call."""
        assert self._synthesise is not None  # noqa: S101 - narrows the type
        structure = self._synthesise.structure_probability  # that of the training: it depends on the kind
        weak = SyntheticAnomalyGenerator(self.anomaly_source_path, 1.0, structure, WEAK_OPACITY, SMALL_AREA)
        generator = step_generator(int(self.seed or 0), 0, 0, 0)
        track = self._track("References", min(ASKED_IMAGES, len(data.images)))
        with stage("References"):
            found = compare_matchings(self.model, data.images, in_bank, weak, generator, options, track)
        # Ranks may differ in the last bits, and must match alike.
        return found if alone else self.trainer.strategy.broadcast(found)

    def _weigh_colours(self, data: TrainingData, in_bank: Tensor, *, alone: bool) -> None:
        """So that good images show no more by their colours than they do by the coarse descriptors."""
        track = self._track("Colours", min(WEIGHED_IMAGES, len(data.images)))
        with stage("Colours"):
            scale = colour_scale_of(self.model, data.images, in_bank, track)
        # Ranks may differ in the last bits, and must score alike.
        scale = scale if alone else self.trainer.strategy.broadcast(scale)
        self.model.bank.colour_scale = torch.full_like(self.model.bank.colour_scale, scale)

    def _match_as(self, matching: Matching) -> None:
        self.model.k, self.model.window_sizes = matching
        if "coherent_matching" not in self._given_settings:  # of what lies anywhere, neighbours share no reference
            self.model.coherent_matching = self._coherent_in_windows and not is_anywhere(matching.window_sizes)

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the bank and what a resumed training needs to know."""
        super().on_save_checkpoint(checkpoint)
        if self.saves_bank:
            self.build_bank(alone=self.saves_alone)
            checkpoint["state_dict"].update(self.model.bank.state_dict(prefix="model.bank."))
        checkpoint["cpr"] = {"format": CHECKPOINT_FORMAT, "seed": self.seed, "kind": self.resolved_kind}
        if self.held_out:
            checkpoint["cpr"]["held_out"] = self.held_out
        # The thresholds in the checkpoint belong to these, also where a model that names none of its own loads it.
        checkpoint["cpr"] |= settings_of(self.model)
        checkpoint["cpr"]["training_images"] = self._trained_on
        # By which `anomalib-cpr explain` finds the pictures of the references.
        checkpoint["cpr"]["training_paths"] = self.training_paths

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was decided in training, unless something is wrong with the checkpoint."""
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and trainer.ckpt_path is not None:
            check_file(trainer.ckpt_path)
        check_content(checkpoint, CHECKPOINT_FORMAT)
        if trainer is not None and trainer.testing and _within_train(self):
            # The Engine asks for the file that the training went on from: old weights, or a resume point, which has no
            # bank. Nobody who trains wants to test these.
            rank_zero_info("Tested is what was trained now, not the checkpoint that the training went on from.")
            checkpoint["state_dict"] = self.state_dict()
            checkpoint.pop("callbacks", None)  # which is the best checkpoint, say, was decided by this training
            self._hold_out(getattr(trainer, "datamodule", None))
            return
        self._check_fit(checkpoint["state_dict"], checkpoint.get("anomalib_components_enabled"), checkpoint)
        super().on_load_checkpoint(checkpoint)
        # Some metrics have buffers (AUPRO its limit), so the state of a training with other metrics would not fit.
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("evaluator.")]:
            del state[name]
        if isinstance(self.evaluator, nn.Module):
            state.update(self.evaluator.state_dict(prefix="evaluator."))
        own = checkpoint.get("cpr", {})
        self.seed, self.resolved_kind = own.get("seed"), own.get("kind")
        # A training that is resumed with known anomalies has just read them.
        self.held_out = own.get("held_out", self.held_out if self._known is not None else [])
        apply_settings(self.model, own, self._given_settings)
        if own.get("format", 1) < 10 and self.model.unaligned_matching and self.model.k > ON_THE_WHOLE:
            rank_zero_warn(
                f"This checkpoint is of a version that took all {self.model.k} references at the coarse scale, where "
                f"now {ON_THE_WHOLE} count: maps and scores differ, and its thresholds fit them worse. Train anew."
            )
        if own.get("format", 1) < 11 and is_anywhere(self.model.window_sizes):
            rank_zero_warn(
                "This checkpoint is of a version that searched the whole map for patches of stride 4 too, where now "
                "those of stride 8 lead there: maps and scores differ, and its thresholds fit them worse. Train anew."
            )
        # The trainer reads a checkpoint after `setup`, but before it asks for data.
        if trainer is not None and not trainer.predicting:
            self._hold_out(getattr(trainer, "datamodule", None))
        self._trained_on = own.get("training_images")
        self.training_paths = list(own.get("training_paths", []))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "Self":  # type: ignore[override]  # noqa: ANN401
        """Load a trained model, see anomalib's ``AnomalibModule.load_from_checkpoint``. No code in the file is run.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            args (Any): Of anomalib's method.
            kwargs (Any): Of anomalib's method: ``map_location``, ..., and arguments of the model to be replaced.

        Returns:
            Self: The model.

        Raises:
            RuntimeError: If it does not fit the arguments.
            ValueError: If the file is damaged, of another kind, or holds code.
        """
        if kwargs.get("weights_only", True) is not False:
            check_file(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights and bank if all of it fits; otherwise the model stays as it was.

        Args:
            state_dict (Mapping[str, Any]): Of a checkpoint.
            strict (bool): Refuse missing and unknown names.
            assign (bool): Take the tensors over in place of copying them.

        Returns:
            Any: Names that are missing or unknown, if ``strict`` lets them pass.

        Raises:
            RuntimeError: If it does not fit.
        """
        if strict:
            self._check_fit(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _check_fit(
        self,
        state: Mapping[str, Any],
        enabled: Mapping[str, bool] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        absent = [f"{name}." for name, value in (enabled or {}).items() if not value]
        if checkpoint is not None:
            absent.append("evaluator.")  # brought in line below
        expected = {name: value for name, value in self.state_dict().items() if not name.startswith(tuple(absent))}
        given = {name: value for name, value in state.items() if not name.startswith(tuple(absent))}
        problems = [misfit(given, expected, (checkpoint or {}).get("hyper_parameters"))]
        of_bank = self._misfit_of_bank(state)
        if of_bank is not None:
            problems.insert(0, f"The checkpoint's reference bank does not fit the configuration: {of_bank}")
        if any(problems):
            raise RuntimeError(" ".join(filter(None, problems)))

    def _misfit_of_bank(self, state: Mapping[str, Any]) -> str | None:
        """What the bank is going to refuse, asked before anything is copied."""
        parts = {name.removeprefix(BANK): value for name, value in state.items() if name.startswith(BANK)}
        averaged = bool(parts.pop(AVERAGED, False))
        if "averaged_descriptors" in self._given_settings and averaged != self.model.averaged_descriptors:
            return (
                f"it was made with averaged_descriptors={averaged}, which a bank keeps. Leave that argument out, "
                "or train anew."
            )
        if "colour_matching" in self._given_settings and (COLOURS in parts) != self.model.colour_matching:
            return (
                f"it was made with colour_matching={COLOURS in parts}, which a bank keeps. Give colour_matching=None, "
                "or train anew."
            )
        return self.model.bank.misfit(key_of_file(parts.pop(FILE_KEY, None)), parts)


def _within_train(module: "BankInCheckpoints") -> bool:
    """Whether this is the second half of ``Engine.train`` of a model, which fits and then tests."""
    from anomalib.engine import Engine  # noqa: PLC0415 - which asks anomalib for its models, of which this is one

    train = inspect.unwrap(Engine.train).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is train:
            return frame.f_locals.get("model") is module
        frame = frame.f_back
    return False

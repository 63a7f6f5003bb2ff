"""Hugging Face's Trainer with `CE + alpha * KV` as its loss, and the divergence from cached logits if asked for.

Devices, precision, checkpoints and the loop are the Trainer's. Ours are the loss, the batches (`feed`), held-out
metrics that weigh every token the same, and the end of a training that goes wrong: what is not finite is named with its
samples, and nothing is saved after it. Several ranks agree on each such end. Targets that are not this student's are
refused before, in `checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from ..errors import KavaError, StageError, TrainingError
from ..store.files import make_folder
from ..store.sealed import RECORD, read_sealed
from .alpha import AutoAlpha, Gradients, gradient_norms, gradients_of, schedule_factor
from .checkpoints import remove_older, seal_checkpoint
from .diagnostics import CollapseAlarm, Mean, StepClock, check_gradient, not_finite, spread_ratio
from .feed import Feed, share_step
from .objective import Objective, Pass
from .ranks import Ranks, agreed
from .settings import TrainSettings
from .shard import ShardedGradients, local, shard_anywhere, shard_errors
from .student import saving

PROJECTOR: Final = "projector.safetensors"
"""In a checkpoint: the projector on the student's side, where there is one."""

_Shared = tuple[torch.Tensor, float]
"""A mean over a batch, and the batch's share of the step; see `share_step`."""


class KVTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with a KV term beside the cross-entropy."""

    def __init__(
        self,
        *,
        objective: Objective,
        settings: TrainSettings,
        feed: Feed,
        ranks: Ranks,
        warn: Callable[[int, str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # The mean over a batch is our loss; without this the Trainer expects sums over accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.objective, self.settings, self.warn = objective, settings, warn
        self.kv_loss, self.projector = objective.kv_loss, objective.projector
        if self.projector is not None:
            self.projector.to(self.args.device)
        self.feed, self.ranks = feed, ranks
        self.auto = AutoAlpha(settings.kv_share, settings.alpha_steps) if settings.alpha == "auto" else None
        self._alarm = CollapseAlarm(settings.collapse_threshold)
        self._clock = StepClock()
        self.add_callback(self._clock)
        self._terms = Mean()
        self._looked_at = -1
        self._checked = False
        self._heldout: tuple[int, dict[str, float]] = (-1, {})

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, which also shards on CPUs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            shard_anywhere(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @property
    def sharded(self) -> bool:
        """Whether this process has shards of the student alone, and must do with it what all others do."""
        return bool(self.is_fsdp_enabled)

    @property
    def alpha(self) -> float:
        """The weight of the KV loss, without its schedule."""
        return self.auto.alpha if self.auto is not None else float(self.settings.alpha)

    @property
    def finished(self) -> bool:
        """Whether the last step is done, before this or in an earlier call."""
        return bool(0 < self.state.max_steps <= self.state.global_step)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`CE + alpha * KV` of one batch, in nats per predicted token, by its share of the step: see `share_step`."""
        found = self._forward(model, inputs)
        ce = found.ce / found.tokens.clamp(min=1)
        of_ce, of_kv, of_logits = inputs["shares"]
        terms = {"ce": ce.detach() * of_ce}
        loss = ce * of_ce
        # Accumulated batches share a step; one look at the first of them is enough.
        first_look, self._looked_at = self._looked_at != self.state.global_step, self.state.global_step
        if self.kv_loss is not None:
            if not self._checked and torch.is_grad_enabled():
                self._checked = True
                weights = {"keys": self.kv_loss.key_weight, "values": self.kv_loss.value_weight}
                check_gradient({name: layers for name, layers in found.student.items() if weights[name]})
            if first_look:
                self._measure_gradients((ce, of_ce), (found.kv["kv"], of_kv))
                self._measure_spread(found.student, inputs)
            alpha = self._weight()
            loss = loss + alpha * (found.kv["kv"] * of_kv)
            terms |= {name: value.detach() * of_kv for name, value in found.kv.items()}
            self._terms.add({"alpha": alpha})
        if self.settings.logits is not None and found.divergence is not None:
            weight = self.settings.logits.weight
            if first_look and self._measures:
                self._log_share("logits", weight, self._norms((ce, of_ce), (found.divergence, of_logits)))
            loss = loss + weight * (found.divergence * of_logits)
            terms["logits"] = found.divergence.detach() * of_logits
        finite = bool(torch.isfinite(loss))
        bad = [] if finite else [n for n, value in terms.items() if not torch.isfinite(value)] or ["alpha * kv"]
        self._stop_unless(finite, inputs, lambda: f"the loss ({', '.join(bad)})")
        self._terms.add({"loss": loss.detach(), **terms})
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's step of one batch; its gradient must be finite.

        Raises:
            TrainingError: if it is not.
        """
        self._clock.tokens += inputs["num_tokens"]
        if self.projector is not None and self._looked_at != self.state.global_step:
            self.projector.zero_grad()  # The Trainer does so for the model.
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        # Under loss scaling, which float16 needs, infinite gradients are ordinary: the scaler leaves the step out.
        if getattr(self.accelerator, "scaler", None) is None:
            self._check_gradients(inputs)
        if self.projector is not None and self.accelerator.sync_gradients:
            scaled = getattr(self.accelerator, "scaler", None) is not None
            self.projector.finish_gradient(self.ranks, None if scaled else self.args.max_grad_norm)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, which also moves the projector."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.projector is not None:
            rate = self.settings.projector_learning_rate or self.args.learning_rate
            group = {"params": [*self.projector.parameters()], "lr": rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group(group)
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As many things as there are batches: all that the Trainer's loop is to know, see `get_batch_samples`."""
        return DataLoader(range(self.feed.num_batches), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of the step in hand, whichever that is: also the first one after a checkpoint. Timed."""
        began, batches, error = self._clock.now(), [], None
        try:
            batches = self.feed.step(self.state.global_step, num_batches)
        except KavaError as found:
            error = found
        self._clock.waited += self._clock.now() - began
        share_step(batches, self.kv_loss, self.ranks, error)
        return batches, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out CE over all predicted tokens, per byte of text, and the KV loss; logs and returns them."""
        if self._heldout[0] == self.state.global_step:
            return self._heldout[1]
        model = self.model
        training = model.training
        model.eval()
        ce = tokens = text_bytes = 0.0
        means = Mean()
        with torch.no_grad(), closing(self.feed.heldout()) as batches:
            for batch, counts in batches:
                inputs = self._prepare_inputs(batch)
                found = self._forward(model, inputs)
                if not counts:
                    continue
                ce += float(found.ce.double())
                tokens += int(found.tokens)
                text_bytes += inputs["text_bytes"]
                if found.logits is not None and found.divergence is not None:
                    means.add({"logits": found.divergence}, len(found.logits))
                if self.kv_loss is not None:
                    means.add(found.kv, self.kv_loss.total_weight(inputs["kv_mask"], inputs["segments"]))
        model.train(training)
        ce, tokens, text_bytes = self.ranks.sum([ce, tokens, text_bytes])
        mean = ce / max(tokens, 1)
        metrics = {
            "heldout_ce": mean,
            "heldout_perplexity": float(torch.tensor(mean).exp()),
            "heldout_ce_per_byte": ce / max(text_bytes, 1),
            **{f"heldout_{name}": value for name, value in means.take(self.ranks).items()},
        }
        self.log(metrics)
        self._heldout = (self.state.global_step, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss, averaged since the last log, and speed and memory."""
        if "loss" in logs:
            logs |= self._terms.take(self.ranks) | self._clock.take(self.ranks)
        # The Trainer's loop, which is to know nothing of epochs, takes the whole training for one.
        self.state.epoch = self.feed.epochs(self.state.global_step)
        super().log(logs, start_time)

    def load_state(self, checkpoint: Path) -> None:
        """Takes up what `_save_checkpoint` left beside the Trainer's own files.

        Raises:
            StageError: if it is of a training with another kind of alpha, or of other batches.
        """
        state = read_sealed(checkpoint / RECORD)
        if (state["alpha"] is None) != (self.auto is None):
            was, now = ("auto", "a number") if self.auto is None else ("a number", "auto")
            raise agreed(
                StageError(
                    f"the checkpoint is of a training with train.alpha: {was}, this one has {now}: go on as it was "
                    "begun, or begin again with --force train"
                )
            )
        if state["feed"]["ranks"] == self.ranks.size and state.get("fsdp", False) != self.sharded:
            was = "shards" if state.get("fsdp", False) else "copies"
            raise agreed(
                StageError(
                    f"the checkpoint is of a training with {was} of the student, this one has train.fsdp: "
                    f"{str(self.sharded).lower()}: go on as it was begun, or begin again with --force train"
                )
            )
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.finished:
            # Asked to go on from the last step, the Trainer would take one more.
            if self.sharded:
                self._prepare_for_training(self.state.max_steps, None, str(checkpoint))
            else:
                self._load_from_checkpoint(str(checkpoint))
        self._heldout = (state["heldout"][0], state["heldout"][1])
        self.feed.load(state["feed"])
        if self.projector is not None:
            self.projector.load_state_dict(load_file(checkpoint / PROJECTOR, device=str(self.args.device)))
        self._terms.load(state["terms"][self.ranks.rank])
        self._alarm.above = set(state["above"])
        if self.auto is not None:
            self.auto = AutoAlpha(**state["alpha"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(Path(self.args.output_dir)), shard_errors():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        state = {
            "heldout": self._heldout,
            "feed": self.feed.state(self.state.global_step),
            "terms": self.ranks.gather(self._terms.state()),
            "above": sorted(self._alarm.above),
            "alpha": None if self.auto is None else asdict(self.auto),
            "fsdp": self.sharded,
        }
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            make_folder(folder)
            if self.projector is not None:
                save_file(self.projector.state_dict(), folder / PROJECTOR)
        # The Trainer would remove older checkpoints before this one is on the disk.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        seal_checkpoint(folder, state, self.ranks)
        if self.is_world_process_zero():
            remove_older(folder.parent, limit)

    def _weight(self) -> float:
        """Alpha in the step in hand."""
        factor = schedule_factor(self.settings.alpha_schedule, self.state.global_step, self.state.max_steps)
        return self.alpha * factor

    def _measure_gradients(self, ce: _Shared, kv: _Shared) -> None:
        """Both terms' gradients where it is time: for `alpha: auto`, for the log, or for both."""
        settings, step = self.settings, self.state.global_step
        later = settings.alpha_update_steps
        finding = self.auto is not None and (step < settings.alpha_steps or (later is not None and step % later == 0))
        if not finding and not self._measures:
            return
        of_ce, of_kv = self._norms(ce, kv)
        if finding and self.auto is not None:
            self.auto.update(of_ce, of_kv)
        self._log_share("kv", self._weight(), (of_ce, of_kv))

    @property
    def _measures(self) -> bool:
        """Whether gradients are measured for the log in the step in hand."""
        every = self.settings.measure_steps or max(100, self.settings.logging_steps)
        return bool(self.state.global_step % every == 0)

    def _norms(self, ce: _Shared, term: _Shared) -> tuple[float, float]:
        """See `gradient_norms`: the mean over ranks; of a sharded student, the norm of their mean."""
        if not self.sharded:
            norms = torch.stack(gradient_norms(ce[0], term[0], self._gradients(ce[0])))
            of_ce, of_term = self.accelerator.reduce(norms, "mean").tolist()
            return of_ce, of_term
        totals = self.ranks.sum([ce[1], term[1]])
        means = [
            value * (share * self.ranks.size / total if total else 1.0)
            for (value, share), total in zip((ce, term), totals, strict=True)
        ]
        of_shard = gradient_norms(means[0], means[1], self._gradients(ce[0]))
        of_ce, of_term = self.ranks.sum([float(norm) ** 2 for norm in of_shard])
        return math.sqrt(of_ce), math.sqrt(of_term)

    def _log_share(self, name: str, weight: float, norms: tuple[float, float]) -> None:
        if norms[0] > 0:
            self._terms.add({f"{name}_gradient_share": weight * norms[1] / norms[0]})

    def _measure_spread(self, student: Mapping[str, Mapping[int, torch.Tensor]], inputs: dict[str, Any]) -> None:
        """The spread of the student's own tensors in the step that is logged next, and the alarm."""
        if (self.state.global_step + 1) % self.settings.logging_steps:
            return
        assert self.kv_loss is not None
        mask, ratios = inputs["kv_mask"], {}
        for name in self.kv_loss.names:
            for place, layer in enumerate(self.kv_loss.layers):
                own, wanted = student[name][layer], inputs[name][:, :, place]
                if (ratio := spread_ratio(own[mask], wanted[mask])) is not None:
                    ratios[f"{name}_spread_{layer}"] = ratio
        self._terms.add(ratios)
        if self.projector is not None:
            self._terms.add(self.projector.distances())
        for name in self._alarm.check(ratios):
            self.warn(
                self.state.global_step + 1,
                f"{name} fell to {ratios[name]:.3g}: the student's vectors vary from token to token less than "
                f"{self.settings.collapse_threshold:g} times as much as the target's, they may be collapsing",
            )

    def _check_gradients(self, inputs: dict[str, Any]) -> None:
        """Stops all ranks where what is there of a step's gradient is not finite."""
        gradients = [local(p.grad) for p in self._learning if p.grad is not None]
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if self.sharded:
            # All ranks have one gradient: none can tell whose batch it was, and all look for the term.
            finite = not any(self.ranks.max([float(not finite)]))
        self._stop_unless(finite, inputs, lambda: f"the gradient ({self._blame(inputs)})")

    def _blame(self, inputs: dict[str, Any]) -> str:
        """Which terms have a gradient that is not finite, of a batch whose summed gradient is not."""
        # Of the model itself: what is around it for several ranks would wait for them.
        found = self._forward(self.model, self._prepare_inputs(inputs))
        terms = {"ce": found.ce / found.tokens.clamp(min=1)}
        terms |= {name: self._weight() * value for name, value in found.kv.items() if value.requires_grad}
        if self.settings.logits is not None and found.divergence is not None:
            terms["logits"] = self.settings.logits.weight * found.divergence
        bad = not_finite(terms, self._gradients(found.ce))
        if self.sharded:
            told = {name for names in self.ranks.gather(bad) for name in names}
            bad = [name for name in terms if name in told]
        return ", ".join(bad or ["of the sum of accumulated batches"])

    def _gradients(self, ce: torch.Tensor) -> Gradients:
        """Of single terms, with regard to the weights."""
        if self.sharded:
            return ShardedGradients(self.model, ce, self.ranks)
        return gradients_of(self._learning)

    @property
    def _learning(self) -> list[torch.nn.Parameter]:
        """All weights that the loss moves: the student's and the projector's."""
        return [*self.model.parameters(), *(self.projector.parameters() if self.projector is not None else ())]

    def _forward(self, model: Any, inputs: dict[str, Any]) -> Pass:
        # Where the Trainer prepares a model to train it whole, it gives it an autocast of its own.
        with self.accelerator.autocast():
            return self.objective(model, inputs, tapped=self.accelerator.unwrap_model(model))

    def _stop_unless(self, finite: bool, inputs: dict[str, Any], what: Callable[[], str]) -> None:
        """Stops all ranks where one has found something that is not finite, with the samples of all that have."""
        if not any(self.ranks.max([float(not finite)])):
            return
        found = self.ranks.gather(None if finite else (what(), inputs["sample_ids"]))
        told = [one for one in found if one is not None]
        samples = ", ".join(sample for _, ids in told for sample in ids)
        raise agreed(
            TrainingError(
                f"train: {told[0][0]} is not finite in step {self.state.global_step + 1}, samples {samples}; the last "
                "checkpoint was kept. Look at them with kava inspect --sample, or lower train.learning_rate or "
                "train.alpha"
            )
        )

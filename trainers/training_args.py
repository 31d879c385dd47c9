"""Arguments of `ProtoGenTrainer`."""

import json
import math
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments

from modeling_protogen.objectives import LOSS_WEIGHTS

from .losses import LOSSES, needs_of
from .text_files import parse_json

# What can be learned of drafts behind anchors.
ANCHORED = ("draft", "reconstruction")

# Arguments of transformers that would do nothing here, or harm, and why.
REFUSED = {
    "resume_from_checkpoint": "a command goes on from its output_dir by itself, and trainer.train() takes a checkpoint",
    "label_smoothing_factor": "the losses know no label smoothing",
    "neftune_noise_alpha": "the losses know no noise on embeddings",
    "remove_unused_columns": "the collator reads whole examples",
    "length_column_name": "lengths are those of instruction and context",
    "save_only_model": "nothing could go on from such checkpoints",
    "do_predict": "the held-out answers are always written",
}


@dataclass
class ProtoGenTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with the weights of the losses and the encoder's own learning rate.

    Other defaults than there: `ddp_find_unused_parameters=True`, `remove_unused_columns=False` (the collator reads
    whole examples), `optim="adamw_torch_fused"`, `report_to="none"`, `save_total_limit=2`, `disable_tqdm=False` at any
    verbosity, `logging_nan_inf_filter=False`, and memory pinned only where there is an accelerator.

    Raises:
        ValueError: if a loss is unknown, no weight is positive, or an argument would do nothing here.
    """

    # A dict once built; the command line gives JSON.
    losses: str | None = field(
        default=None,
        metadata={
            "help": f"Weight of each loss, as JSON or dict; the losses are {', '.join(LOSSES)}. By default those of "
            f"the model's own loss: {json.dumps(LOSS_WEIGHTS)}, duration with upsamples_prompt only."
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of all that is new."})
    encoder_learning_rate: float = field(
        default=5e-5, metadata={"help": "Learning rate of the pretrained encoder; 0 freezes it."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Evaluates and keeps an exponential moving average of the trained weights; 0 keeps the last."
        },
    )
    teacher_top_k: int = field(
        default=32,
        metadata={"help": "Tokens of the teacher that soft_reconstruction and on_policy learn from; 1 = argmax."},
    )
    num_anchors: int = field(
        default=0,
        metadata={
            "help": "Places in each answer that drafts of its next tokens are learned behind, in one pass, and drawn "
            "anew in each step; 0 learns whole answers."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "group_by_length puts examples of similar length into a batch: little is padding, but a batch is "
            "of one kind, which in the controlled world costs half of the exact match.",
            "choices": ["random", "group_by_length", "sequential"],
        },
    )
    # An encoder's pooler is not used. By itself, transformers stops looking for such under activation checkpointing.
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Let DDP detect unused parameters."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimiser, as in transformers."})
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb, ..."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the mean of earlier losses for one that is not finite."}
    )
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Hide the progress bar."})

    def __post_init__(self):
        defaults = {known.name: known.default for known in fields(self)}
        for name, reason in REFUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} cannot be set: {reason}.")
        has_accelerator = torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_accelerator
        # transformers refuses bf16 on a CPU that was not asked for.
        self.use_cpu = self.use_cpu or not has_accelerator
        if isinstance(self.losses, str):
            self.losses = parse_json(self.losses, f"losses={self.losses}")
            if not isinstance(self.losses, dict):
                raise ValueError(f"losses must be a mapping such as {json.dumps(LOSS_WEIGHTS)}, not {self.losses}.")
        unknown = sorted(set(self.losses or ()) - set(LOSSES))
        if unknown:
            raise ValueError(f"unknown losses: {', '.join(unknown)}; the losses are {', '.join(LOSSES)}.")
        for name, weight in (self.losses or {}).items():
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
                raise ValueError(f"losses: the weight of {name} must be a number, not {weight!r}.")
        if self.losses is not None and not any(weight > 0 for weight in self.losses.values()):
            raise ValueError("no loss has a positive weight.")
        if self.num_anchors < 0:
            raise ValueError(f"num_anchors={self.num_anchors} must be at least 0.")
        if self.num_anchors and not set(self.losses or ANCHORED) <= set(ANCHORED):
            raise ValueError(f"with num_anchors the losses are {' and '.join(ANCHORED)}; got {', '.join(self.losses)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1).")
        super().__post_init__()

    @property
    def needs(self) -> set[str]:
        """What the losses need ([`needs_of`])."""
        return needs_of(self.losses or ())

    @property
    def trains_token_head_alone(self) -> bool:
        """Whether nothing is learned through the decoder, so that evaluation reads the predictor's token head too."""
        return "token_head" in (self.losses or ()) and "answer_logits" not in self.needs

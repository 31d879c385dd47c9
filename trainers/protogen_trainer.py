"""The trainer: routes a batch through the model to weighted losses and logs each of them."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import CommitInfo
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import ProgressCallback, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.anchors import even_anchors, labels_behind, random_anchors
from modeling_protogen.objectives import IGNORE_INDEX, LOSS_WEIGHTS, argmax_tokens
from modeling_protogen.publishing import MODEL_FILES, model_card, pin_decoder, publish

from .averaging import WeightAverage
from .data import Example, ProtoGenCollator, examples_of, share_held_out
from .distillation import teacher_top_k
from .files import full_disk_named, write_atomically
from .grouped_attention import use_grouped_attention
from .losses import LOSSES
from .losses.token_head import head_answers, head_tokens
from .mixed_precision import keep_logits
from .resuming import begin_checkpoint, finish_checkpoint, finished_checkpoints, step_of
from .training_args import ProtoGenTrainingArguments

LOSS_WEIGHTS_NAME = "losses.safetensors"
AVERAGE_NAME = "average.safetensors"
# What the collator adds for the losses alone; the model does not take it.
LOSS_INPUTS = ("bank_e", "bank_m", "teacher_embeddings", "durations")


class ProgressLines(ProgressCallback):
    """The trainer's progress bars, named, with a short line for each log entry."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("train")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("evaluate", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            hidden = ("epoch", "total_flos", "runtime", "per_second")
            shown = [f"{name} {value:.4g}" for name, value in logs.items() if not name.endswith(hidden)]
            self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}")


class LengthGroupedEpochs(LengthGroupedSampler):
    """Examples grouped by length, in an order that seed and epoch alone decide: resuming finds it again."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def with_ids(collate: Callable, examples: list[Example]) -> dict:
    return {**collate(examples), "example_ids": [example.id for example in examples]}


class ExampleTrainer(Trainer):
    """
    The transformers trainer for [`Example`]s: group_by_length knows their lengths, and its epochs resume. Training and
    evaluation stop at a loss or a gradient that is not finite, before anything is saved of it. A checkpoint is on the
    disk, with checksums, before an older one goes.
    """

    # What losses learn themselves is no part of the model.
    loss_parameters: Sequence[nn.Parameter] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Ids and loss of each micro-batch since the optimizer's last step.
        self._micro_batches: list[tuple[list[str], torch.Tensor]] = []

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            # An error message has a line of its own.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    for bar in (callback.prediction_bar, callback.training_bar):
                        if bar is not None:
                            bar.close()

    def get_train_dataloader(self):
        collate, self.data_collator = self.data_collator, partial(with_ids, self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [example.num_characters for example in train_dataset or self.train_dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedEpochs(lengths, batch_size, self.args.seed)

    def training_step(self, model, inputs, *args):
        ids = inputs.pop("example_ids")
        loss = super().training_step(model, inputs, *args)
        self._micro_batches.append((ids, loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # Called once an optimizer's step, before it; under DeepSpeed after it, but before anything is saved.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite(grad_norm)
        return grad_norm

    def _check_finite(self, grad_norm: torch.Tensor | float | None) -> None:
        """Looks at one number from all processes, which costs one synchronisation; all of them stop together."""
        ids, losses = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        gradients = [p.grad.sum() for p in self.loss_parameters if p.grad is not None]
        # In float16 a gradient that overflows is skipped, and the loss is scaled down.
        if grad_norm is not None and self.accelerator.mixed_precision != "fp16":
            gradients.append(torch.as_tensor(grad_norm, device=losses[0].device))
        is_bad = ~torch.isfinite(torch.stack([number.float() for number in (*losses, *gradients)]))
        if not self.accelerator.reduce(is_bad.any().float()).item():
            return
        bad = is_bad.tolist()[: len(losses)]
        named = [id for row, wrong in zip(ids, bad, strict=True) if wrong or not any(bad) for id in row]
        found = gather_object([(any(bad), self._bad_loss() if any(bad) else "the gradient", named)])
        # A loss that is not finite leaves no process a gradient that is.
        found = [row for row in found if row[0]] or found
        what = " and ".join(sorted({name for _, name, _ in found})) + " is not finite"
        self._stop(f"{what} in step {self.state.global_step + 1}", [id for *_, row in found for id in row])

    def _bad_loss(self) -> str:
        return "the loss"

    def _stop(self, reason: str, ids: list[str]) -> None:
        """A checkpoint is good if a further step went well, which the newest of them may have prevented."""
        checkpoints = finished_checkpoints(self.args.output_dir)
        good = [path for path in checkpoints if step_of(path) < self.state.global_step]
        advice = ["lower the learning rate", "look at the examples"][: 1 + bool(ids)]
        advice += [f"remove {path}" for path in checkpoints[len(good) :]]
        if ids:
            reason += f", with the examples {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}"
        raise ValueError(
            f"{reason}; the last good checkpoint is {good[-1] if good else 'none'}: {', '.join(advice)}, and run the "
            "same command again."
        )

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with full_disk_named(output_dir):
                if self.args.should_save:
                    begin_checkpoint(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    finish_checkpoint(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        bad = [name for name, value in metrics.items() if name.endswith("_loss") and not math.isfinite(value)]
        if bad:
            self._stop(f"{bad[0]} is not finite after step {self.state.global_step}", [])
        return metrics


class ProtoGenTrainer(ExampleTrainer):
    """
    Trains the encoder and the heads; the decoder stays frozen.

    The loss is `sum(weight * loss(outputs, batch))` over `args.losses`; each component is logged as `loss_NAME`.
    Parameters of the losses themselves (a learned temperature) are optimised and kept in the checkpoints.

    Evaluation hands `compute_metrics` two predictions for each example: the tokens at the label's length, aligned with
    `label_ids`, and the one-step answer at the predicted length, cut at EOS; both padded with -100. Where nothing is
    learned through the decoder, both are the token head's. With `args.num_anchors` there is one prediction, the drafts
    behind places at even distances, and `label_ids` are what they should be, `(examples, num_anchors * draft_length)`.

    Args:
        model (`str`, `Path` or `ProtoGenForConditionalGeneration`): Hub id or folder of a checkpoint, or a model.
        args (`ProtoGenTrainingArguments`, *optional*): the defaults, in `trainer_output`.
        data_collator (`Callable`, *optional*): a [`ProtoGenCollator`] with what the losses need, by default.
        train_dataset (`datasets.Dataset` or `list[Example]`, *optional*): a dataset has the columns `instruction` and
            `response`, and may have `context` and `category`.
        eval_dataset (*optional*): the same, or a dict of them.
        processing_class (`ProtoGenProcessor`, *optional*): the checkpoint's by default, where `model` names one.
        **kwargs: as in `transformers.Trainer`.

    Raises:
        ValueError: if there is no processor, the losses do not go with the model, or they need a bank or embeddings
            and no collator has them.
    """

    # compute_loss returns a mean over the micro-batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | Path | ProtoGenForConditionalGeneration,
        args: ProtoGenTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | list[Example] | None = None,
        eval_dataset: Dataset | list[Example] | dict[str, Dataset | list[Example]] | None = None,
        processing_class: ProtoGenProcessor | None = None,
        **kwargs,
    ):
        if isinstance(model, (str, Path)):
            processing_class = processing_class or ProtoGenProcessor.from_pretrained(model)
            model = ProtoGenForConditionalGeneration.from_pretrained(model)
        args = ProtoGenTrainingArguments() if args is None else args
        self.data_name = hub_name_of(train_dataset)
        resolve_losses(model.config, args)
        if args.push_to_hub and model.config.thin:  # Now, not at the first checkpoint.
            pin_decoder(model.config, args.hub_private_repo, args.hub_token)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("a model alone cannot read text: give processing_class=ProtoGenProcessor(...).")
            lacking = sorted(args.needs & {"bank", "embeddings"})
            if lacking:
                raise ValueError(
                    f"the losses need what a dataset does not have ({', '.join(lacking)}): give "
                    "data_collator=ProtoGenCollator(...) with it."
                )
            categories = model.config.categories
            data_collator = ProtoGenCollator(processing_class, categories, finds_durations="durations" in args.needs)
        super().__init__(
            model,
            args,
            data_collator,
            as_examples(train_dataset),
            {name: as_examples(part) for name, part in eval_dataset.items()}
            if isinstance(eval_dataset, dict)
            else as_examples(eval_dataset),
            processing_class,
            **kwargs,
        )
        if self.train_dataset:
            note_held_out(self.model.config, self.train_dataset)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressLines)
        use_grouped_attention(self.model.decoder)
        self.losses = nn.ModuleDict({name: LOSSES[name]() for name in self.args.losses}).to(self.args.device)
        self.loss_parameters = list(self.losses.parameters())
        if self.args.encoder_learning_rate == 0 and self.model.encoder is not None:
            self.model.encoder.requires_grad_(False)
        self.average = None
        if self.args.ema_decay:
            if is_deepspeed_zero3_enabled():
                raise ValueError("ZeRO-3 spreads the weights that ema_decay averages: use ZeRO-2, or ema_decay=0.")
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            self.average = WeightAverage(trained, self.args.ema_decay)
            self.add_callback(self.average)
        # By whether the model was training.
        self._components = {True: defaultdict(list), False: defaultdict(list)}

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.swap()
            self.average = None
        return output

    def _bad_loss(self) -> str:
        components = self._components[True].items()
        bad = [name for name, sums in components if not torch.stack(sums).isfinite().all()]
        return f"the loss {' and '.join(bad)}" if bad else "the loss"

    def evaluate(self, *args, **kwargs):
        with self.average.in_place() if self.average is not None else nullcontext():
            return super().evaluate(*args, **kwargs)

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        keep_logits(self.model)
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model_inputs = {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}
        return_logits = "answer_logits" in self.args.needs or not (model.training or self.args.trains_token_head_alone)
        if model.training and "durations" in inputs:
            model_inputs["durations"] = inputs["durations"]
        if self.args.num_anchors:
            place = random_anchors if model.training else even_anchors
            model_inputs["anchors"] = place(inputs["labels"], self.args.num_anchors)
        outputs = model(**model_inputs, return_loss=False, return_logits=return_logits)
        if self.args.num_anchors:
            size = self.accelerator.unwrap_model(model).config.draft_length
            inputs["labels"] = labels_behind(inputs["labels"], model_inputs["anchors"], size)
        inputs = inputs | self._soft_targets(model, outputs, inputs)
        if "output_embeddings" in self.args.needs:
            decoder = self.accelerator.unwrap_model(model).decoder
            inputs["output_embeddings"] = decoder.get_output_embeddings().weight
        total = torch.zeros((), device=outputs.e.device)
        batch_size = total.new_tensor(len(inputs["labels"]))
        for name, weight in self.args.losses.items():
            # Only training texts are banked and embedded: evaluation leaves out what compares with that.
            if not model.training and self.losses[name].needs & {"bank", "embeddings"}:
                continue
            component = self.losses[name](outputs, inputs)
            sum_and_count = torch.stack([component.detach() * batch_size, batch_size])
            self._components[model.training][name].append(sum_and_count)
            total = total + weight * component
        return (total, outputs) if return_outputs else total

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _soft_targets(self, model, outputs, inputs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the teacher says of the labels and of the student's own answers, where a loss asks for it."""
        wanted, labels = {}, inputs["labels"]
        if "label_targets" in self.args.needs:
            wanted["label_targets"] = labels
        if "on_policy_targets" in self.args.needs:
            wanted["on_policy_targets"] = argmax_tokens(outputs.answer_logits, labels)
        if not wanted:
            return {}
        model, cache = self.accelerator.unwrap_model(model), outputs.prompt_cache
        prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
        if cache is None:
            cache, _ = model.read_prompt(*prompt, [])
        return {
            name: teacher_top_k(model.decoder, *prompt, answers, self.args.teacher_top_k, cache)
            for name, answers in wanted.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # An evaluation says how long it took, under its own prefix.
        timed = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime") and key != "train_runtime"]
        components = self._components[not timed]
        for name, values in components.items():
            total, count = self.accelerator.gather(torch.stack(values).sum(0)[None]).sum(0).tolist()
            logs[f"{timed[0]}_loss_{name}" if timed else f"loss_{name}"] = total / count
        components.clear()
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        # `predict` logs nothing: what it left is not the next evaluation's.
        self._components[False].clear()
        return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            # The first group's learning rate is the one that is logged.
            groups = {(False, True): [], (False, False): [], (True, True): [], (True, False): []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[name.startswith("encoder."), name in decayed].append(parameter)
            groups[False, False].extend(self.losses.parameters())
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.encoder_learning_rate if in_encoder else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                    }
                    for (in_encoder, decays), parameters in groups.items()
                    if parameters
                ],
                **kwargs,
            )
            # Processes average the gradients of what is wrapped, the model; and the trainer clears those only.
            self.optimizer.register_step_pre_hook(lambda *_: self._average_loss_gradients())
            self.optimizer.register_step_post_hook(lambda *_: self.losses.zero_grad())
        return self.optimizer

    def _average_loss_gradients(self) -> None:
        for parameter in self.losses.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        weights = self.losses.state_dict()
        if weights and self.args.should_save:
            write_atomically(Path(output_dir) / LOSS_WEIGHTS_NAME, lambda path: save_file(weights, path))
        if self.average is not None and self.args.should_save:
            write_atomically(Path(output_dir) / AVERAGE_NAME, lambda path: save_file(self.average.weights, path))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.losses.state_dict():
            self.losses.load_state_dict(load_file(Path(checkpoint) / LOSS_WEIGHTS_NAME))
        if checkpoint is not None and self.average is not None:
            self.average.load(load_file(Path(checkpoint) / AVERAGE_NAME))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if not loss.isfinite():  # Nothing can be generated from such a model.
                self._stop(f"eval_loss is not finite after step {self.state.global_step}", [])
            if prediction_loss_only:
                return loss, None, None
            prompt = {
                name: value for name, value in inputs.items() if name not in (*LOSS_INPUTS, "labels", "length_labels")
            }
            model = self.accelerator.unwrap_model(model)
            if self.args.num_anchors:
                drafts = inputs["labels"]
                tokens = argmax_tokens(outputs.answer_logits, drafts)
                return loss, tokens.view(len(labels), -1), drafts.view(len(labels), -1)
            if self.args.trains_token_head_alone:
                table = model.decoder.get_output_embeddings().weight
                tokens = head_tokens(outputs.e[:, :, 0], table).masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
                sequences, lengths = head_answers(model, model.predict(**prompt))
            else:
                tokens = argmax_tokens(outputs.answer_logits, labels)
                answers = model.generate(**prompt, return_dict_in_generate=True)
                sequences, lengths = answers.sequences, answers.lengths
        written = torch.arange(sequences.shape[1], device=labels.device) < lengths[:, None]
        return loss, (tokens, sequences.masked_fill(~written, IGNORE_INDEX)), labels

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> CommitInfo | None:
        """
        Uploads the model, the processor and a card with what the training and its last evaluation say, and nothing
        else of `output_dir`, to `args.hub_model_id`. On other processes than the first it returns None.

        Args:
            commit_message (`str`, defaults to `"End of training"`)
            license (`str`, *optional*): in the Hub's spelling; the decoder's by default.
            private (`bool`, *optional*): make a new repository private; `args.hub_private_repo` by default.
            revision (`str`, *optional*): branch; `args.hub_revision` by default.
            token (`str`, *optional*): `args.hub_token` by default.

        Raises:
            ValueError: if others could not load the decoder that a thin model leaves out, or there is no processor.
        """
        if self.processing_class is None:
            raise ValueError("a model alone cannot read text: give processing_class=ProtoGenProcessor(...).")
        args, state, thin = self.args, self.state, self.model.config.thin
        private = args.hub_private_repo if private is None else private
        token = token or args.hub_token
        if thin:
            pin_decoder(self.model.config, private, token)

        def write(folder, repo_id):
            self.save_model(folder, _internal_call=True)
            run = {"data": self.data_name} | settings_of(self)
            held_out = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), None)
            card = model_card(
                self.model,
                repo_id,
                thin,
                license=license,
                run=run,
                held_out=held_out,
                answers_json=self.processing_class.answer_format == "key_value_lines",
            )
            card.save(folder / "README.md")

        if not self.is_world_process_zero():
            with TemporaryDirectory() as folder:  # The processes gather their weights together.
                self.save_model(folder, _internal_call=True)
            return None
        return publish(
            write,
            args.hub_model_id or Path(args.output_dir).absolute().name,
            message=commit_message,
            replaces=MODEL_FILES,
            private=private,
            revision=revision or args.hub_revision,
            token=token,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        # Of `push_to_hub=True`. By itself transformers uploads all that is in `output_dir`, banks and all.
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Step {self.state.global_step}")


def settings_of(trainer: Trainer) -> dict:
    """What a training was made with, for its card."""
    args = trainer.args
    return extract_hyperparameters_from_trainer(trainer) | {
        "encoder_learning_rate": args.encoder_learning_rate,
        "losses": args.losses,
        "train_examples": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
    }


def hub_name_of(dataset: Dataset | list[Example] | None) -> str | None:
    """Hub id of a data set that was loaded from there."""
    files = (dataset.info.download_checksums or {}) if isinstance(dataset, Dataset) else {}
    names = {file.removeprefix("hf://datasets/").partition("@")[0] for file in files if file.startswith("hf://")}
    return names.pop() if len(names) == 1 else None


def as_examples(dataset: Dataset | list[Example] | None) -> list[Example] | None:
    return examples_of(dataset) if isinstance(dataset, Dataset) else dataset


def note_held_out(config: ProtoGenConfig, examples: list[Example]) -> None:
    """Notes the share of instructions that neither these examples nor those of earlier training hold."""
    shares = share_held_out(examples), config.validation_share
    config.validation_share = min(share for share in shares if share is not None)


def resolve_losses(config: ProtoGenConfig, args: ProtoGenTrainingArguments) -> None:
    """
    Where no losses are given, sets those of the model's own loss.

    Raises:
        ValueError: if the losses do not go with the model.
    """
    if args.losses is None and args.num_anchors:
        args.losses = {"draft": 1.0}
    if args.losses is None:
        args.losses = {name: w for name, w in LOSS_WEIGHTS.items() if name != "duration" or config.upsamples_prompt}
    if args.num_anchors and not config.decoder_sees_prompt:
        raise ValueError("num_anchors: the decoder reads the text before a draft: set decoder_sees_prompt: true.")
    if bool(args.num_anchors) != (config.first_tokens == "drafts"):
        raise ValueError("num_anchors and first_tokens: drafts need each other.")
    if "token_head" in args.losses and (config.arrangement, config.chunk_size) != ("e_only", 1):
        raise ValueError("the loss token_head reads a token off each proto-token: arrangement: e_only, chunk_size: 1.")
    if config.upsamples_prompt != ("duration" in args.losses):
        raise ValueError("upsamples_prompt: true and the loss duration need each other.")

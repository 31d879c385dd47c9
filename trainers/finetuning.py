"""The rival that takes no detour: the decoder itself, fine-tuned with low-rank adapters, answering token by token."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments

from modeling_protogen import ProtoGenProcessor
from modeling_protogen.objectives import IGNORE_INDEX, reconstruction_loss
from modeling_protogen.proto_tokens import position_ids

from .data import Example
from .grouped_attention import use_grouped_attention
from .protogen_trainer import ExampleTrainer, ProgressLines
from .resuming import last_complete_checkpoint


class PromptAndAnswerCollator:
    """
    Batches for a causal language model: `input_ids`, `attention_mask`, `position_ids` and `labels` `(batch, length)`,
    the prompt padded on the left and the answer on the right; -100 is the label of all but the answer's tokens.
    """

    def __init__(self, processor: ProtoGenProcessor):
        self.processor = processor

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        columns = zip(*((e.instruction, e.context, e.target) for e in examples), strict=True)
        batch = self.processor(*map(list, columns))
        labels = batch["labels"]
        is_token = labels != IGNORE_INDEX
        mask = torch.cat([batch["decoder_prompt_mask"], is_token.long()], dim=1)
        return {
            "input_ids": torch.cat([batch["decoder_prompt_ids"], labels.clamp_min(0)], dim=1),
            "attention_mask": mask,
            "position_ids": position_ids(mask),
            "labels": torch.cat([torch.full_like(batch["decoder_prompt_ids"], IGNORE_INDEX), labels], dim=1),
        }


class AnswerTrainer(ExampleTrainer):
    """The transformers trainer, with logits at the answers' positions only: there are few others' to pay for."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        predicts = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        outputs = model(**inputs, logits_to_keep=predicts, use_cache=False)
        loss = reconstruction_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def fine_tune(
    decoder: PreTrainedModel,
    processor: ProtoGenProcessor,
    examples: list[Example],
    args: TrainingArguments,
    rank: int,
) -> PreTrainedModel:
    """
    The decoder after training of low-rank adapters of this rank in all of its linear layers on the examples' answers,
    with the adapters merged into its weights. An interrupted run in `args.output_dir` goes on.
    """
    use_grouped_attention(decoder)
    adapted = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    trainer = AnswerTrainer(
        model=adapted,
        args=args,
        train_dataset=examples,
        data_collator=PromptAndAnswerCollator(processor),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLines)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir, trainer.accelerator.print))
    return adapted.merge_and_unload()

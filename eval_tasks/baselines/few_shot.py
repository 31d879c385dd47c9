"""The decoder as it is, with some answered examples in its prompt."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from modeling_protogen import ProtoGenProcessor
from modeling_protogen.autoregressive import up_to_eos
from modeling_protogen.configuration_protogen import as_list
from modeling_protogen.processing_protogen import PROMPT_TEMPLATE, pad_left, rendered_ids, text_ids, user_message

from .writing import Writer, Written


def few_shot(decoder: PreTrainedModel, processor: ProtoGenProcessor, shown: Sequence) -> Writer:
    """
    Greedy answers after examples in the processor's template, up to an empty line.

    Args:
        shown (`Sequence`): examples with `instruction`, `context` and `answer`.
    """
    template = processor.prompt_template or PROMPT_TEMPLATE
    tokenizer, eos = processor.decoder_tokenizer, as_list(decoder.generation_config.eos_token_id)

    def render(texts):
        """Messages and answers in turn, the last message without one."""
        *prompts, last = [template.replace("{message}", message) for message in texts[::2]]
        return "".join(f"{prompt}{answer}\n\n" for prompt, answer in zip(prompts, texts[1::2], strict=True)) + last

    labels = processor.encode_answers([example.answer for example in shown])["labels"]
    answers = [tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in labels]
    before = [
        text
        for example, answer in zip(shown, answers, strict=True)
        for text in (user_message(example.instruction, example.context), answer)
    ]

    def ends_with_empty_line(ids, scores, **kwargs):
        # An answer has none inside.
        return torch.tensor(["\n\n" in end for end in tokenizer.batch_decode(ids[:, -2:])], device=ids.device)

    def write(instructions, contexts, max_new_tokens):
        begin = tokenizer("").input_ids
        asked = map(user_message, instructions, contexts)
        ids, mask = pad_left([begin + rendered_ids(tokenizer, render, [*before, message]) for message in asked])
        inputs = {"input_ids": ids.to(decoder.device), "attention_mask": mask.to(decoder.device)}
        with torch.no_grad():
            written = decoder.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=eos[0] if eos else 0,
                stopping_criteria=StoppingCriteriaList([ends_with_empty_line]),
            )
        token_ids = up_to_eos(written[:, ids.shape[1] :], eos)
        whole = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        texts = [text.split("\n\n")[0].rstrip("\n") for text in whole]
        lines = [text_ids(tokenizer, text) for text in texts]
        return Written(processor.batch_decode(lines), token_ids)

    return write

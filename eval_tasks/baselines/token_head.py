"""The predictor alone: tokens read off proto-tokens by the loss `token_head`'s own head, without the decoder's pass."""

import torch

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.autoregressive import up_to_eos
from trainers.losses.token_head import head_answers

from .writing import Writer, Written


def token_head(model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor) -> Writer:
    """Answers have their predicted length, and end at EOS before it."""

    def write(instructions, contexts, max_new_tokens):
        inputs = processor(instructions, contexts).to(model.device)
        with torch.no_grad():
            tokens, lengths = head_answers(model, model.predict(**inputs, longest=max_new_tokens))
        rows = up_to_eos(tokens, model.config.eos_token_ids)
        token_ids = [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
        return Written(processor.batch_decode(token_ids), token_ids)

    return write

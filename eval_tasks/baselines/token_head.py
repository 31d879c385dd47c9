"""The predictor alone: tokens read off proto-tokens by the loss `token_head`'s own head, without the decoder's pass."""

import torch

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.autoregressive import up_to_eos
from trainers.losses.token_head import head_tokens

from .writing import Writer, Written


def token_head(model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor) -> Writer:
    """Its answers end at EOS, as training with that loss teaches."""

    def write(instructions, contexts, max_new_tokens, exactly=False):
        inputs = processor(instructions, contexts).to(model.device)
        with torch.no_grad():
            proto_tokens = model.predict(**inputs, longest=max_new_tokens).e[:, :, 0]
        tokens = head_tokens(proto_tokens, model.decoder.get_output_embeddings().weight)
        token_ids = up_to_eos(tokens, [] if exactly else [processor.decoder_tokenizer.eos_token_id])
        return Written(processor.batch_decode(token_ids), token_ids)

    return write

"""A model with an encoder that is trained for instructions and writes token by token, as FLAN-T5."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_protogen.processing_protogen import user_message

from .writing import Writer, Written, generated


def encoder_decoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_input_length: int = 512, **options
) -> Writer:
    """Greedy by default; `options` are those of transformers' `generate`."""

    def write(instructions, contexts, max_new_tokens, exactly=False):
        texts = list(map(user_message, instructions, contexts))
        inputs = tokenizer(
            texts,
            split_special_tokens=True,
            padding=True,
            truncation=True,
            max_length=max_input_length,
            return_tensors="pt",
        )
        token_ids = generated(model, inputs.to(model.device), max_new_tokens, exactly, **options)
        return Written(tokenizer.batch_decode(token_ids, skip_special_tokens=True), token_ids)

    return write

"""The decoder token by token: greedy, sampled, with drafts from the prompt, or with drafts from a smaller model."""

from transformers import PreTrainedModel

from modeling_protogen import ProtoGenProcessor

from .writing import Writer, Written, generated


def autoregressive(decoder: PreTrainedModel, processor: ProtoGenProcessor, **options) -> Writer:
    """
    With keys and values cached, greedy by default.

    Args:
        processor (`ProtoGenProcessor`): gives the prompts that ProtoGen has.
        options: of transformers' `generate`: `do_sample=True, temperature=0.7`, or `cache_implementation="static"`,
            with which it compiles the decoder on a GPU.
    """

    def write(instructions, contexts, max_new_tokens, exactly=False):
        inputs = processor(instructions, contexts).to(decoder.device)
        prompt = {"input_ids": inputs["decoder_prompt_ids"], "attention_mask": inputs["decoder_prompt_mask"]}
        token_ids = generated(decoder, prompt, max_new_tokens, exactly, **options)
        return Written(processor.batch_decode(token_ids), token_ids)

    return write


def one_by_one(write: Writer) -> Writer:
    """For what takes no batches."""

    def write_each(instructions, contexts, max_new_tokens, exactly=False):
        alone = [
            write([instruction], [context], max_new_tokens, exactly)
            for instruction, context in zip(instructions, contexts, strict=True)
        ]
        return Written([w.texts[0] for w in alone], [w.token_ids[0] for w in alone])

    return write_each


def prompt_lookup(decoder: PreTrainedModel, processor: ProtoGenProcessor, num_tokens: int = 10) -> Writer:
    """Drafts of `num_tokens` tokens are what followed the same words before; verified, so greedy (transformers)."""
    return one_by_one(autoregressive(decoder, processor, prompt_lookup_num_tokens=num_tokens))


def assisted(decoder: PreTrainedModel, processor: ProtoGenProcessor, assistant: PreTrainedModel) -> Writer:
    """Drafts are those of a smaller model with the same tokenizer; verified, so greedy (transformers)."""
    return one_by_one(autoregressive(decoder, processor, assistant_model=assistant))

"""ProtoGen in each of its modes; also multi-token prediction, which is a model of `latent_source="none"`."""

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.generation_protogen import MODES

from .writing import Writer, Written


def protogen(
    model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, mode: str = "one_step", **options
) -> Writer:
    """
    Args:
        mode (`str`), options: as in `generate`. Without a length, `one_step` and `refine` write the predicted one, and
            `exactly` is for these two alone.
    """

    def write(instructions, contexts, max_new_tokens, exactly=False):
        inputs = processor(instructions, contexts).to(model.device)
        if MODES[mode].is_at_once:
            length = {"length": max_new_tokens} if exactly else {}
        else:
            length = {"max_new_tokens": max_new_tokens, "processor": processor}
        output = model.generate(**inputs, mode=mode, return_dict_in_generate=not exactly, **length, **options)
        if exactly:
            return Written(processor.batch_decode(output), output.tolist())
        lengths = output.lengths.clamp(max=max_new_tokens).tolist()
        token_ids = [row[:n] for row, n in zip(output.sequences.tolist(), lengths, strict=True)]
        return Written(processor.batch_decode(token_ids), token_ids)

    return write

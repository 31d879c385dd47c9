"""One-step decoding by recorded passes against the same without; without a GPU the recordings run as they are."""

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, stir_slot_adapters
from test_generation import without_eos

from modeling_protogen import cuda_graphs

FIELDS = [
    {},
    {"decoder_sees_prompt": True},
    {"decoder_sees_prompt": True, "latent_source": "both", "first_tokens": "decoder"},
    {"decoder_sees_prompt": True, "latent_source": "decoder", "slot_adapter_rank": 2},
    {"decoder_sees_prompt": True, "latent_source": "decoder", "first_tokens": "decoder", "predictor_dim": 128},
    *(
        {"decoder_sees_prompt": True, "latent_source": source, "upsamples_prompt": True}
        | {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8}
        for source in ("encoder", "decoder")
    ),
    {"arrangement": "e_mN", "chunk_size": 3, "max_chunks": 3, "max_answer_length": 8, "num_e_tokens": 2},
    {"arrangement": "interleaved", "m_scope": "shared", "sink": "none"},
]


class RunAgain:
    """A recording's reading and writing places, and no graph."""

    def __init__(self, function, **arguments):
        self.function, self.arguments = function, {name: tensor.clone() for name, tensor in arguments.items()}
        self.output = function(**self.arguments)

    def __call__(self, **arguments):
        for name, argument in arguments.items():
            self.arguments[name].copy_(argument)
        again = self.function(**self.arguments)
        if isinstance(again, torch.Tensor):
            self.output.copy_(again)
        else:
            for name, value in vars(again).items():
                if isinstance(value, torch.Tensor):
                    getattr(self.output, name).copy_(value)
            if again.prompt_cache is not None:
                for layer, new in zip(self.output.prompt_cache.layers, again.prompt_cache.layers, strict=True):
                    layer.keys.copy_(new.keys)
                    layer.values.copy_(new.values)
        return self.output


NEEDS_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_recorded_answers_are_those_of_plain_passes(build, decoder_dir, fields, device, monkeypatch):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    without_eos(model)
    model.to(device)
    calls = [
        (processor(INSTRUCTIONS, CONTEXTS), torch.tensor([3, 8, 1])),
        (processor(INSTRUCTIONS[::-1], CONTEXTS[::-1]), torch.tensor([5, 6, 7])),
        (processor(INSTRUCTIONS[1:], CONTEXTS[1:]), torch.tensor([2, 4])),
        (processor(INSTRUCTIONS, CONTEXTS), None),
    ]
    calls = [(batch.to(device), length) for batch, length in calls]

    def written():
        return [model.generate(**batch, length=n, return_dict_in_generate=True) for batch, n in calls]

    plain = written()
    if device == "cpu":
        monkeypatch.setattr(cuda_graphs, "Recording", RunAgain)
        model.graphs = cuda_graphs.OneStepGraphs(model, [4, 8], input_multiple=16)
    else:
        model.use_cuda_graphs([4], input_multiple=16)
    for one, other in zip(written(), plain, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        torch.testing.assert_close(one.token_confidences, other.token_confidences)
        torch.testing.assert_close(one.uncertainties, other.uncertainties)
        torch.testing.assert_close(one.predicted_lengths, other.predicted_lengths)
    # Two sizes of batches with inputs of one padded length.
    assert len(model.graphs.predictions) == 2
    assert set(length for _, length in model.graphs.answers) == {4, 8}


def test_other_proto_tokens_are_not_those_of_the_recording(build, llama_dir, monkeypatch):
    model, processor = build(llama_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    prediction = model(**batch, return_logits=False)
    given = prediction.e.flip(0), prediction.m.flip(0)
    plain = model.generate(**batch, proto_tokens=given, length=8)
    monkeypatch.setattr(cuda_graphs, "Recording", RunAgain)
    model.graphs = cuda_graphs.OneStepGraphs(model, [8], input_multiple=16)
    assert torch.equal(model.generate(**batch, proto_tokens=given, length=8), plain)


def test_what_cannot_be_recorded_is_refused(build, llama_dir):
    with pytest.raises(ValueError, match="on a CUDA device; it is on cpu"):
        build(llama_dir)[0].use_cuda_graphs()
    with pytest.raises(ValueError, match="halves"):
        cuda_graphs.OneStepGraphs(build(llama_dir, arrangement="halves")[0], [8], 32)

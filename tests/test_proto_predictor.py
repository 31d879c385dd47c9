"""The predictor, part by part, against loops and torch's own layers."""

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, set_dropout
from torch import nn

from modeling_protogen.proto_predictor import MAX_DURATION, Upsampling, transformer_layer

UPSAMPLED = {"decoder_sees_prompt": True, "latent_source": "decoder", "upsamples_prompt": True}
TOKEN_BY_TOKEN = {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8}


@pytest.fixture
def batch():
    """States of two texts, the shorter padded on the left, and queries over them."""
    torch.manual_seed(0)
    padding = torch.tensor([[True, True, False, False, False], [False] * 5])
    return torch.randn(2, 5, 128), padding, torch.randn(2, 4, 128)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_layers_that_mix_the_source_are_torchs_own(batch, dim, no_grad):
    states, padding, _ = batch
    layer = transformer_layer(nn.TransformerEncoderLayer, dim).eval()
    reference = nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, 0.1, "gelu", batch_first=True, norm_first=True)
    reference.eval().load_state_dict(layer.state_dict())
    with torch.set_grad_enabled(not no_grad):
        found, expected = (part(states[..., :dim], src_key_padding_mask=padding) for part in (layer, reference))
    torch.testing.assert_close(found[~padding], expected[~padding])


@pytest.mark.parametrize("causal", [False, True])
def test_layers_of_queries_are_torchs_own(batch, causal):
    states, padding, queries = batch
    layer = transformer_layer(nn.TransformerDecoderLayer, 128).eval()
    reference = nn.TransformerDecoderLayer(128, 2, 512, 0.1, "gelu", batch_first=True, norm_first=True).eval()
    reference.load_state_dict(layer.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(4) if causal else None
    for inputs in ((queries, states), (queries[:, :1], states)):
        options = {"memory_key_padding_mask": padding, "tgt_is_causal": causal}
        options["tgt_mask"] = None if mask is None else mask[: inputs[0].shape[1], : inputs[0].shape[1]]
        torch.testing.assert_close(layer(*inputs, **options), reference(*inputs, **options))
    # Padding counts for nothing.
    other = torch.where(padding[..., None], 100.0, states)
    options = {"memory_key_padding_mask": padding, "tgt_mask": mask, "tgt_is_causal": causal}
    torch.testing.assert_close(layer(queries, other, **options), layer(queries, states, **options))


def test_layers_drop_in_training_only(batch):
    states, padding, queries = batch
    layer = transformer_layer(nn.TransformerDecoderLayer, 128)
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(0)
        one, other = (layer(queries, states, memory_key_padding_mask=padding) for _ in range(2))
        assert torch.equal(one, other) != training
    set_dropout(layer, 0.0)
    layer.train()
    assert torch.equal(layer(queries, states), layer(queries, states))


def gru_logits(upsampling: Upsampling, states: torch.Tensor, given: list[int] | None = None):
    """Logits and durations of one prompt without padding, with torch's own unit on states and one-hot durations."""
    classes, size = upsampling.gates_from_previous.weight.shape[0], upsampling.gates_from_memory.in_features
    unit = torch.nn.GRUCell(states.shape[-1] + classes, size)
    by_state, by_memory = upsampling.gates_from_state, upsampling.gates_from_memory
    unit.weight_ih.copy_(torch.cat([by_state.weight, upsampling.gates_from_previous.weight.T], dim=1))
    unit.bias_ih.copy_(by_state.bias)
    unit.weight_hh.copy_(by_memory.weight)
    unit.bias_hh.copy_(by_memory.bias)
    memory, previous, logits, durations = torch.zeros(size), 0, [], []
    for place, state in enumerate(upsampling.norm(states)):
        memory = unit(torch.cat([state, torch.eye(classes)[previous]]), memory)
        logits.append(upsampling.duration(state) + upsampling.duration_from_memory(memory))
        previous = logits[-1].argmax().item() if given is None else given[place]
        durations.append(previous)
    return torch.stack(logits), durations


@torch.no_grad()
def test_the_states_are_spread_as_in_a_loop():
    torch.manual_seed(0)
    upsampling = Upsampling(8)
    states, positions = torch.randn(3, 5, 8), torch.tensor([0, 1, 2, 5, 6, 40])
    mask = torch.tensor([[False, False, True, True, True], [True] * 5, [True] * 5])
    durations = torch.tensor([[0, 0, 2, 0, 4], [1, 1, 1, 1, 1], [-100] * 5])
    spread, source, of_durations = upsampling(states, mask, positions, durations)
    chosen = gru_logits(upsampling, states[2])[1]
    assert of_durations["length"].tolist() == [6, 5, sum(chosen)]

    for row, counts in enumerate([*durations[:2].tolist(), chosen]):
        stretches = []  # For each token of the answer: whose it is, and its place there from both ends.
        for place, count in enumerate(counts):
            stretches += [(place, step, count - step) for step in range(count)]
        for query, position in enumerate(positions.tolist()):
            if position < len(stretches):
                place, start, end = stretches[position]
            else:  # After the end: the last one's, as if it went on.
                place, end = 4, 0
                start = min(position - sum(counts[:4]), MAX_DURATION)
            expected = states[row, place] + upsampling.from_start.weight[start] + upsampling.from_end.weight[end]
            assert source[row, query] == place
            torch.testing.assert_close(spread[row, query], expected)


@torch.no_grad()
def test_each_duration_is_chosen_given_those_before_it():
    torch.manual_seed(0)
    upsampling = Upsampling(8)
    upsampling.gates_from_previous.weight.mul_(3)
    states, mask = torch.randn(2, 4, 8), torch.tensor([[False, True, True, True], [True] * 4])
    given = torch.tensor([[0, 3, 0, 5], [2, 0, 0, 1]])
    for durations in (None, torch.full((2, 4), -100), given):
        found = upsampling(states, mask, torch.arange(20), durations)[2]
        for row, start in enumerate((1, 0)):
            own = given[row, start:].tolist() if durations is given else None
            logits, counts = gru_logits(upsampling, states[row, start:], own)
            torch.testing.assert_close(found["duration_logits"][row, start:], logits)
            log_p = [logits[place].log_softmax(-1)[count] for place, count in enumerate(counts)]
            torch.testing.assert_close(found["log_duration_confidence"][row], sum(log_p))
            assert found["length"][row] == sum(counts)


@pytest.mark.parametrize("fields", [TOKEN_BY_TOKEN, {"chunk_size": 3, "max_chunks": 3}], ids=str)
@torch.no_grad()
def test_an_open_gate_copies_the_prompts_embeddings(build, llama_dir, fields):
    """Nothing but the copy is left of `e`, and of `m`: the embedding of the token that accounts for the chunk."""
    model, processor = build(llama_dir, **UPSAMPLED, **fields)
    predictor, inputs = model.proto_predictor, processor(INSTRUCTIONS, CONTEXTS)
    for projection in (predictor.e_projection, predictor.m_projection):
        if projection is not None:
            projection.output.weight.zero_()
    predictor.copy_gate.weight.zero_()
    predictor.copy_gate.bias.fill_(50.0)
    ids, mask = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    # The answer repeats the last three tokens, each three times.
    durations = torch.zeros_like(ids)
    durations[:, -3:] = 3
    prediction = model.predict(**inputs, durations=durations)
    size, chunks = fields["chunk_size"], fields["max_chunks"]
    table = model.decoder.get_input_embeddings().weight
    for chunk in range(chunks):
        expected = 16 * table[ids[:, -3 + (chunk * size + size // 2) // 3]]
        torch.testing.assert_close(prediction.e[:, chunk, 0], expected)
        if predictor.m_projection is not None:
            torch.testing.assert_close(prediction.m[:, chunk], expected)
    assert mask.sum(1).min() >= 3


@torch.no_grad()
def test_queries_of_a_chunk_start_from_the_states_at_each_of_its_tokens(build, llama_dir):
    model, processor = build(llama_dir, **UPSAMPLED, chunk_size=3, max_chunks=4, arrangement="e_m", num_e_tokens=2)
    predictor, seen = model.proto_predictor, {}
    predictor.upsampling.register_forward_hook(lambda module, args, output: seen.update(spread=output[0]))
    predictor.query_layers[0].register_forward_pre_hook(lambda module, args: seen.update(queries=args[0]))
    model.predict(**processor(INSTRUCTIONS, CONTEXTS))
    dim = model.config.predictor_dim
    assert seen["spread"].shape == (len(INSTRUCTIONS), 12, dim)
    for row, spread in enumerate(seen["spread"]):
        torch.testing.assert_close(seen["queries"][row, :2], predictor.queries[:2])
        for chunk in range(4):
            maps = predictor.chunk_reading.weight.split(dim, dim=1)
            start = sum(maps[place] @ spread[3 * chunk + place] for place in range(3))
            first = 2 + 3 * chunk  # Two of e, one of m.
            expected = predictor.queries[first : first + 3] + start
            torch.testing.assert_close(seen["queries"][row, first : first + 3], expected)


@torch.no_grad()
def test_the_length_is_the_sum_of_the_durations(build, llama_dir):
    model, processor = build(llama_dir, **UPSAMPLED, **TOKEN_BY_TOKEN)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    predictor = model.proto_predictor
    predictor.upsampling.duration.weight.zero_()
    predictor.upsampling.duration.bias[2] = 3.0
    predictor.upsampling.duration_from_memory.weight.zero_()
    predictor.upsampling.duration_from_memory.bias.zero_()
    prediction = model.predict(**inputs)
    expected = 2.0 * inputs["decoder_prompt_mask"].sum(1)
    torch.testing.assert_close(prediction.log_length_mean.exp(), expected)
    each = predictor.upsampling.duration.bias.log_softmax(0)[2]
    torch.testing.assert_close(prediction.log_duration_confidence, each * inputs["decoder_prompt_mask"].sum(1))
    given = model.predict(**inputs, durations=inputs["decoder_prompt_mask"])
    torch.testing.assert_close(given.log_length_mean.exp(), expected / 2)
    assert not torch.allclose(given.e, prediction.e)
    # An answer of nothing has one token.
    predictor.upsampling.duration.bias[0] = 9.0
    assert model.predict(**inputs).log_length_mean.tolist() == [0.0] * 3


@pytest.mark.parametrize("fields", [UPSAMPLED | TOKEN_BY_TOKEN, {"chunk_size": 3, "max_chunks": 4}], ids=str)
@torch.no_grad()
def test_the_first_chunks_do_not_depend_on_how_many_there_are(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    whole = model.predict(**inputs)
    size, most = model.config.chunk_size, model.config.max_chunks
    assert whole.e.shape[1] == most
    for longest in (1, size + 1, most * size, most * size + 9):
        part = model.predict(**inputs, longest=longest)
        chunks = min(-(-longest // size), most)
        assert part.e.shape[1] == part.m.shape[1] == chunks
        torch.testing.assert_close(part.e, whole.e[:, :chunks])
        torch.testing.assert_close(part.m, whole.m[:, :chunks])
        for name in ("log_length_mean", "log_length_variance", "error_mean", "error_variance"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name))


@pytest.mark.parametrize("layers", [[0], [1, 2]], ids=str)
@torch.no_grad()
def test_the_layers_that_are_read_and_no_others(build, llama_dir, layers):
    model, processor = build(llama_dir, decoder_sees_prompt=True, latent_source="decoder", decoder_layers_read=layers)
    inputs, seen = processor(INSTRUCTIONS, CONTEXTS), []
    model.proto_predictor.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    model.predict(**inputs)
    mask = inputs["decoder_prompt_mask"].bool()
    for row, (instruction, context) in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True)):
        ids = processor(instruction, context)["decoder_prompt_ids"]
        hidden = model.decoder(ids, output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[layer][0] for layer in layers], dim=1)
        torch.testing.assert_close(seen[0][row][mask[row]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["encoder", "decoder"])
def test_durations_are_chosen_under_autocast(build, llama_dir, source):
    """torch fuses layers with an even number of heads, whose states are narrower there than in training."""
    fields = {"latent_source": source, "predictor_dim": 128}
    model, processor = build(llama_dir, **UPSAMPLED | TOKEN_BY_TOKEN | fields)
    inputs = processor(INSTRUCTIONS[:2])
    with torch.no_grad():
        expected = model.predict(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.predict(**inputs)
    torch.testing.assert_close(found.duration_logits.float(), expected.duration_logits, rtol=0.1, atol=0.1)

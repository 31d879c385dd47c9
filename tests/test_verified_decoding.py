"""Verified decoding against transformers' own greedy `generate`."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, stir_slot_adapters

from eval_tasks.baselines.autoregressive import autoregressive
from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.autoregressive import DecoderState
from modeling_protogen.block_decoding import PredictorInputs, read_and_draft
from modeling_protogen.proto_tokens import position_ids
from trainers.data import Example
from trainers.decoders import load_decoder
from trainers.teacher import greedy_answers

MORE = [*INSTRUCTIONS, "tell me about paris", "what is the capital of france and who sat under the tree"]
MORE_CONTEXTS = [*CONTEXTS, None, "long context about the cat"]
TOKENS = 24
SEEN = {"decoder_sees_prompt": True}
CHUNKS = {"arrangement": "e_m", "chunk_size": 3, "max_chunks": 2}
UPSAMPLED = {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8, "upsamples_prompt": True}
FIELDS = [
    {},
    SEEN | {"latent_source": "decoder"},
    SEEN | {"latent_source": "decoder", "first_tokens": "decoder"},
    SEEN | {"latent_source": "both", "first_tokens": "decoder"} | CHUNKS,
    SEEN | {"latent_source": "both", "slot_adapter_rank": 2} | CHUNKS,
    SEEN | {"latent_source": "none", "slot_adapter_rank": 2},
    SEEN | {"latent_source": "decoder"} | UPSAMPLED,
    {"latent_source": "decoder"},
]


def without_eos(model):
    """No token ends an answer."""
    model.config.decoder_config.eos_token_id = None
    model.decoder.generation_config.eos_token_id = None


def greedy(model, processor, instruction, context):
    inputs = processor(instruction, context)
    written = model.decoder.generate(
        input_ids=inputs["decoder_prompt_ids"],
        attention_mask=inputs["decoder_prompt_mask"],
        do_sample=False,
        max_new_tokens=TOKENS,
        pad_token_id=0,
    )
    return written[0, inputs["decoder_prompt_ids"].shape[1] :].tolist()


def verified(model, processor, batch_size, /, **options):
    answers, outputs = [], []
    for first in range(0, len(MORE), batch_size):
        part = slice(first, first + batch_size)
        inputs = processor(MORE[part], MORE_CONTEXTS[part])
        output = model.generate(
            **inputs, mode="verified", max_new_tokens=TOKENS, return_dict_in_generate=True, **options
        )
        answers += [row[:n].tolist() for row, n in zip(output.sequences, output.lengths, strict=True)]
        outputs.append(output)
    return answers, outputs


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("ends", [True, False], ids=["eos", "no eos"])
def test_the_answer_is_the_greedy_one(build, decoder_dir, fields, ends):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    if not ends:
        without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    assert ends or all(len(answer) == TOKENS for answer in expected)
    # By default a draft is a chunk, which is no draft where a chunk is one token.
    options = {"block_size": 6} if model.config.chunk_size == 1 else {}
    for batch_size in (1, 2, 5):
        answers, outputs = verified(model, processor, batch_size, **options)
        assert answers == expected
        assert ends or all((output.num_drafts > 0).all() for output in outputs)


@pytest.mark.parametrize("thin", [False, True])
def test_every_eos_ends_an_answer_and_no_penalty_changes_one(build, llama_dir, tmp_path, thin):
    """Of the decoder's generation configuration its EOS count, in all that writes, also from a checkpoint."""
    folder = shutil.copytree(llama_dir, tmp_path / "decoder")
    plain, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(plain)
    whole = greedy(plain, processor, MORE[0], None)
    stop = whole[3]
    own = {"eos_token_id": [2, stop], "repetition_penalty": 1.3, "suppress_tokens": [whole[0]]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    model, processor = build(folder, decoder_sees_prompt=True, thin=thin)
    model.save_pretrained(tmp_path / "model")
    expected = whole[: min(whole.index(end) for end in (2, stop) if end in whole) + 1]
    for each in (model, ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "model")):
        assert each.config.eos_token_ids == [2, stop]
        assert greedy(each, processor, MORE[0], None) == expected
        inputs = processor(MORE[0])
        assert each.generate(**inputs, mode="verified", max_new_tokens=TOKENS)[0].tolist() == expected
        assert greedy_answers(each.decoder, processor, [Example("i", MORE[0], "", "")], TOKENS) == [expected]
        assert autoregressive(each.decoder, processor)([MORE[0]], [None], TOKENS).token_ids == [expected]
    _, decoder = load_decoder(str(folder), None, "float32", model.device)
    assert greedy_answers(decoder, processor, [Example("i", MORE[0], "", "")], TOKENS) == [expected]


def test_right_drafts_are_kept_and_save_passes(build, llama_dir, monkeypatch):
    """A decoder that says the same token whatever it reads is drafted without error."""
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    model.config.decoder_config.eos_token_id = None
    table = model.decoder.get_input_embeddings().weight
    with torch.no_grad():
        for layer in model.decoder.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Tied and of length 1: each token is the likeliest after itself.
        table.copy_(torch.nn.functional.normalize(table))
    forward = model.proto_predictor.forward
    monkeypatch.setattr(
        model.proto_predictor, "forward", lambda *args: replace(forward(*args), m=table[7].expand(1, 1, -1))
    )
    inputs = processor("who sat")
    inputs["decoder_prompt_ids"][:, -1] = 7
    output = model.generate(
        **inputs, mode="verified", max_new_tokens=TOKENS, block_size=8, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == [[7] * TOKENS]
    # The first with the prompt; then drafts of 5 tokens, 7, and what is left, each between two of the decoder's own.
    assert output.accepted_lengths.item() == pytest.approx((5 + 7 + 5) / 3)
    assert output.num_passes == 1 + 2 * 3


def plan_drafts(monkeypatch, expected, prompt_lengths, num_right):
    """Drafts that are right in the first `num_right(size)` places after the certain token, and wrong after that."""
    read = DecoderState.read

    def planned(self, ids, mask, predicts, slots=None, slot_mask=None):
        done = self.mask.sum(1) - prompt_lengths
        logits = read(self, ids, mask, predicts, slots, slot_mask)
        if slots is not None:
            table = logits.view(len(expected), -1, logits.shape[-1])
            for row, answer in enumerate(expected):
                right = num_right(table.shape[1] - 1)
                for slot in range(1, table.shape[1]):
                    at = done[row].item() + slot + 1
                    token = answer[at] if at < TOKENS else 0
                    table[row, slot, (token + (slot > right)) % table.shape[2]] = 1e4
        return logits

    monkeypatch.setattr(DecoderState, "read", planned)


def test_texts_of_a_batch_grow_at_different_paces(build, decoder_dir, monkeypatch):
    """Drafts that are right up to a random place, another for each text: what was wrong leaves no trace."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True, latent_source="decoder")
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    inputs = processor(MORE, MORE_CONTEXTS)
    random = torch.Generator().manual_seed(0)
    plan_drafts(
        monkeypatch,
        expected,
        inputs["decoder_prompt_mask"].sum(1),
        lambda size: torch.randint(0, size + 1, (1,), generator=random).item(),
    )
    output = model.generate(
        **inputs, mode="verified", max_new_tokens=TOKENS, block_size=6, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected
    assert output.num_passes < TOKENS
    assert 0.5 < output.accepted_lengths.mean() < 5
    assert output.accepted_lengths.unique().numel() > 1


@pytest.mark.parametrize("rows", [1, 5])
def test_wrong_drafts_cost_little(build, decoder_dir, monkeypatch, rows):
    """A draft and its verification write two tokens in two passes even then, and there are few of them."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE[:rows], MORE_CONTEXTS[:rows], strict=True)]
    inputs = processor(MORE[:rows], MORE_CONTEXTS[:rows])
    plan_drafts(monkeypatch, expected, inputs["decoder_prompt_mask"].sum(1), lambda size: 0)
    output = model.generate(
        **inputs, mode="verified", max_new_tokens=TOKENS, block_size=8, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected
    assert output.accepted_lengths.tolist() == [0] * rows
    assert output.num_passes == TOKENS
    assert output.num_drafts.tolist() == [5] * rows


def test_a_loaded_checkpoint_decodes_the_same(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True, latent_source="decoder", thin=True)
    model.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    assert verified(loaded, processor, 5)[0] == verified(model, processor, 5)[0]


def test_bad_requests_are_named(build, llama_dir):
    model, processor = build(llama_dir)
    inputs = processor(INSTRUCTIONS)
    with pytest.raises(ValueError, match="mode='fast' is not one of one_step, refine, adaptive, verified"):
        model.generate(**inputs, mode="fast")
    with pytest.raises(ValueError, match=r"block_size must lie in 1\.\.8 tokens; got 9"):
        model.generate(**inputs, mode="verified", block_size=9)
    with pytest.raises(ValueError, match="give decoder_prompt_ids"):
        model.generate(input_ids=inputs["input_ids"], mode="verified")


@pytest.mark.parametrize(("source", "rereads"), [("decoder", False), ("both", True), ("encoder", True)])
def test_drafts_are_what_training_on_continuations_sees(build, decoder_dir, source, rereads):
    model, processor = build(decoder_dir, latent_source=source, **SEEN, first_tokens="decoder", slot_adapter_rank=2)
    stir_slot_adapters(model)
    processor.encoder_reads_answer = rereads
    start, last, rest = [5, 9], 7, [8, 6, 11, 4]
    # The last token stands before the draft. Where the decoder's states are read, it is the answer's first in training.
    before, after = ([*start, last], rest) if source == "encoder" else (start, [last, *rest])
    batch = processor(INSTRUCTIONS[:2], CONTEXTS[:2], [after, after], [before, before])
    plain = processor(INSTRUCTIONS[:2], CONTEXTS[:2], answer_start=[start, start])
    with torch.no_grad():
        trained = model(**batch, first_tokens=batch["labels"][:, 0]).answer_logits.view(2, len(after), -1)[
            :, -len(rest) :
        ]
        prompt = [plain[name] for name in ("decoder_prompt_ids", "decoder_prompt_mask")]
        text = DecoderState(model.decoder, *prompt, model.config.layers_read)
        given = PredictorInputs(*model.encode(batch.get("input_ids"), batch.get("attention_mask")), None)
        last = torch.full((2, 1), last)
        drafted = read_and_draft(model, text, last, torch.ones_like(last), len(rest), lambda: given)
    torch.testing.assert_close(drafted, trained, atol=1e-4, rtol=1e-4)


def test_slots_for_the_first_tokens_are_those_of_training_but_where_the_decoder_is_certain(build, decoder_dir):
    model, processor = build(decoder_dir, **SEEN, first_tokens="slots", slot_adapter_rank=2)
    stir_slot_adapters(model)
    batch = processor(INSTRUCTIONS[:2], CONTEXTS[:2], [[8, 6, 11, 4]] * 2)
    prompt = [batch[name] for name in ("decoder_prompt_ids", "decoder_prompt_mask")]
    with torch.no_grad():
        trained = model(**batch).answer_logits.view(2, 4, -1)
        own = model.decoder(prompt[0], attention_mask=prompt[1], position_ids=position_ids(prompt[1])).logits[:, -1]
        text = DecoderState(model.decoder, *(part[:, :-1] for part in prompt), [])
        given = PredictorInputs(*model.encode(batch["input_ids"], batch["attention_mask"]), None)
        last = [part[:, -1:] for part in prompt]
        drafted = read_and_draft(model, text, *last, 4, lambda: given)
    torch.testing.assert_close(drafted[:, 0], own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drafted[:, 1:], trained[:, 1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drafted[:, 0], trained[:, 0], atol=0.1)


def test_the_encoder_reads_the_answer_so_far(build, llama_dir, monkeypatch):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(model)
    processor.encoder_reads_answer = True
    expected, _ = verified(model, processor, 2)
    read = []
    monkeypatch.setattr(model, "encode", lambda *inputs: read.append(inputs) or type(model).encode(model, *inputs))
    found, _ = verified(model, processor, 2, processor=processor)
    assert found == expected
    first = processor(MORE[:2], MORE_CONTEXTS[:2])
    assert torch.equal(read[0][0], first["input_ids"])
    again = processor(MORE[:2], MORE_CONTEXTS[:2], answer_start=[answer[:1] for answer in expected[:2]])
    assert torch.equal(read[1][0], again["input_ids"])
    assert torch.equal(read[1][1], again["attention_mask"])
    assert not torch.equal(again["input_ids"], first["input_ids"])

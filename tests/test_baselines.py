"""The ways to write an answer that ProtoGen is compared with."""

import json

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, save_encoder, word_tokenizer
from test_verified_decoding import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from eval_tasks.baselines.autoregressive import assisted, autoregressive, prompt_lookup
from eval_tasks.baselines.encoder_decoder import encoder_decoder
from eval_tasks.baselines.masked_diffusion import denoise, masked_diffusion, tokens_to_keep
from eval_tasks.baselines.one_pass import protogen
from eval_tasks.commands.evaluate import load_method
from modeling_protogen.sampling import Sampling

TOKENS = 24


@pytest.fixture
def bidirectional(tmp_path):
    folder = save_encoder(tmp_path, BertForMaskedLM, max_position_embeddings=64)
    return BertForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_all_that_verifies_writes_the_greedy_answer(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True, latent_source="decoder")
    expected = [greedy(model, processor, *pair) for pair in zip(INSTRUCTIONS, CONTEXTS, strict=True)]
    decoder = AutoModelForCausalLM.from_pretrained(decoder_dir)
    for write in (
        autoregressive(decoder, processor),
        prompt_lookup(decoder, processor),
        assisted(decoder, processor, AutoModelForCausalLM.from_pretrained(decoder_dir, num_hidden_layers=1)),
        protogen(model, processor, "verified"),
        protogen(model, processor, "adaptive", confidence_threshold=1),
    ):
        written = write(INSTRUCTIONS, CONTEXTS, TOKENS)
        assert written.token_ids == expected
        assert written.texts == processor.batch_decode(expected)


def test_exactly_so_many_tokens(build, llama_dir):
    model, processor = build(llama_dir)
    decoder = AutoModelForCausalLM.from_pretrained(llama_dir)
    written = autoregressive(decoder, processor)(INSTRUCTIONS, CONTEXTS, 8, exactly=True)
    assert [len(ids) for ids in written.token_ids] == [8, 8, 8]
    one_step = protogen(model, processor)(INSTRUCTIONS, CONTEXTS, 8, exactly=True)
    assert one_step.token_ids == model.generate(**processor(INSTRUCTIONS, CONTEXTS), length=8).tolist()


def test_samples_differ(build, llama_dir):
    _, processor = build(llama_dir)
    decoder = AutoModelForCausalLM.from_pretrained(llama_dir)
    torch.manual_seed(0)
    write = autoregressive(decoder, processor, do_sample=True, temperature=2.0)
    many = write([INSTRUCTIONS[0]] * 8, [None] * 8, 8)
    assert len({tuple(ids) for ids in many.token_ids}) > 4


def test_an_encoder_decoder_is_transformers_own():
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    written = encoder_decoder(model, tokenizer)(INSTRUCTIONS, CONTEXTS, 6, exactly=True)
    for row, (instruction, context) in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True)):
        text = f"{instruction}\n\n{context}" if context else instruction
        inputs = tokenizer(text, return_tensors="pt")
        alone = model.generate(**inputs, do_sample=False, min_new_tokens=6, max_new_tokens=6)
        assert written.token_ids[row] == alone[0].tolist()


def test_as_many_tokens_stay_as_there_are():
    counts = tokens_to_keep(torch.tensor([8, 7, 3, 0]), 4)
    assert counts.tolist() == [[2, 2, 2, 2], [2, 2, 2, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


@torch.no_grad()
def test_masked_diffusion_is_the_slow_loop(bidirectional):
    """Each text alone, one token after another by its probability, as the paper's algorithm 5 with blocks."""
    model, tokenizer = bidirectional
    mask_id, length, steps, block = 3, 12, 8, 6
    rows = [tokenizer(text).input_ids for text in INSTRUCTIONS]
    for row in rows:
        ids, prompt = torch.tensor([row + [mask_id] * length]), len(row)
        for start in (prompt, prompt + block):
            for count in (2, 2, 1, 1):
                p = model(ids).logits[0].softmax(-1)
                places = [at for at in range(start, start + block) if ids[0, at] == mask_id]
                places.sort(key=lambda at: -p[at].max().item())
                for at in places[:count]:
                    ids[0, at] = p[at].argmax()
        found = denoise(
            model, torch.tensor([row]), torch.ones(1, prompt).long(), mask_id, length, steps, block, Sampling()
        )
        assert found.tolist() == ids[:, prompt:].tolist()


def test_masked_diffusion_takes_ragged_batches(build, bidirectional, monkeypatch):
    """Without positions in the model, padding on the left changes nothing."""
    model, tokenizer = bidirectional
    torch.nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
    write = masked_diffusion(model, tokenizer, mask_token_id=3, tokens_per_step=2, block_size=4)
    together = write(INSTRUCTIONS, CONTEXTS, 7)
    for row, pair in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True)):
        alone = write(*([part] for part in pair), 7)
        assert together.token_ids[row] == alone.token_ids[0]
        assert len(alone.token_ids[0]) == 7


def test_impossible_blocks_are_named(bidirectional):
    model, _ = bidirectional
    with pytest.raises(ValueError, match="7 tokens must be a multiple of blocks of 4"):
        denoise(model, torch.tensor([[4]]), torch.tensor([[1]]), 3, 7, 8, 4, Sampling())


@pytest.mark.parametrize("asked", [{}, {"trust_remote_code": True}], ids=["unasked", "asked"])
def test_a_masked_diffusion_model_runs_its_code_only_when_asked(tmp_path, asked):
    auto_map = {"AutoConfig": "configuration_other.OtherConfig", "AutoModel": "modeling_other.OtherModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nraise ValueError('it ran')\n"
    (tmp_path / "configuration_other.py").write_text(code)
    with pytest.raises(ValueError, match="it ran" if asked else "trust_remote_code"):
        load_method("masked_diffusion", str(tmp_path), mask_token_id=0, **asked)
    assert (tmp_path / "ran").exists() == bool(asked)

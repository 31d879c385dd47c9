"""The encoder's tokens that the prompt's stand for, against the letters of both."""

import unicodedata

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from modeling_protogen import ProtoGenProcessor

TEXTS = ["play the rose is a rose by Zürich Symphony", "Instruction: Response:\n\n add the tune to my list", "日本の歌"]
# As Llama 3's: it strips what people write.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '<eos>\n' }}"
    "{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def encoder_tokenizer():
    """Lower case without accents, in word pieces, as MiniLM's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    every_letter = [2 * chr(code) for code in range(33, 127)]
    tokenizer.train_from_iterator(
        [*TEXTS, *every_letter], trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module", params=["plain", "begins"])
def decoder_tokenizer(request):
    """Bytes joined to parts of words, as SmolLM2's; it may begin texts with a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<bos>", "<eos>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    if request.param == "begins":
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def processor(encoder_tokenizer, decoder_tokenizer):
    decoder_tokenizer.chat_template = None
    return ProtoGenProcessor(encoder_tokenizer, decoder_tokenizer, aligns_encoder=True)


def letters(text):
    """In lower case, without accents and spaces."""
    plain = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"]
    return "".join("".join(plain).split())


def placed(processor, inputs, row=0):
    """
    What the prompt's tokens that stand for one of the encoder's say, all in a row, once each of them has been found to
    begin with a letter of that one.
    """
    mask = inputs["decoder_prompt_mask"][row].bool()
    ids, places = inputs["decoder_prompt_ids"][row][mask].tolist(), inputs["encoder_places"][row][mask].tolist()
    assert not inputs["encoder_places"][row][~mask].any()
    taken = [place for place in places if place]
    assert taken == sorted(taken), "both read in the same order"
    read = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][row])
    for id, place in zip(ids, places, strict=True):
        own = letters(processor.decoder_tokenizer.decode([id]))
        # A part of a character is no letter.
        if place and "�" not in own:
            assert own[0] in read[place].removeprefix("##"), (own, read[place])
        assert not place or read[place] not in processor.tokenizer.all_special_tokens
    return letters(processor.decoder_tokenizer.decode([id for id, place in zip(ids, places, strict=True) if place]))


@pytest.mark.parametrize("template", [None, "Say: {message}!\n", "{message}"])
def test_instructions_and_contexts(processor, template):
    processor.prompt_template = template
    texts, contexts = [*TEXTS, "  play a  rose \n"], ["", "my list is a list", "日本", "the rose"]
    inputs = processor(texts, contexts)
    for row, (text, context) in enumerate(zip(texts, contexts, strict=True)):
        assert placed(processor, inputs, row) == letters(text + context)
        alone = processor(text, context)
        assert torch.equal(
            alone["encoder_places"][0], inputs["encoder_places"][row][-alone["encoder_places"].shape[1] :]
        )


def test_chats(processor):
    processor.decoder_tokenizer.chat_template = CHAT_TEMPLATE
    chat = [
        {"role": "system", "content": "user: a list of the rose\n"},
        {"role": "user", "content": "  play the list: the rose"},
        {"role": "assistant", "content": "the rose"},
        {"role": "user", "content": "add a rose\n\nto the list"},
    ]
    assert placed(processor, processor(chat)) == letters("".join(message["content"] for message in chat))
    assert placed(processor, processor("play the rose", "the rose by Zürich")) == "playtherosetherosebyzurich"


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_control_tokens_of_people_are_text(processor, chat_template):
    processor.decoder_tokenizer.chat_template = chat_template
    text, context = "play <eos> the <bos> rose", "add <eos> the tune"
    inputs = processor(text, context)
    # The encoder does not know all signs: unknown words have a token too, which says nothing of its letters.
    unknown = processor.tokenizer.unk_token_id
    places = inputs["encoder_places"][0]
    ids = inputs["decoder_prompt_ids"][0][(places > 0) & (inputs["input_ids"][0][places] != unknown)]
    said = letters(processor.decoder_tokenizer.decode(ids))
    for word in ("play", "eos", "the", "rose", "add", "tune"):
        assert word in said
    assert letters(processor.decoder_tokenizer.decode(inputs["decoder_prompt_ids"][0][places > 0])) == letters(
        text + context
    )


@pytest.mark.parametrize("windows", [(512, 40), (20, 1024), (20, 40), (12, 1024)])
def test_contexts_that_are_cut(processor, windows):
    processor.max_input_length, processor.max_prompt_length = windows
    instruction, context = "play the rose", "a tune to my list, the rose " * 20
    inputs = processor(instruction, context)
    assert inputs["input_ids"].shape[1] <= windows[0]
    assert inputs["decoder_prompt_ids"].shape[1] <= windows[1]
    said = placed(processor, inputs)
    assert said.startswith(letters(instruction))
    assert letters(instruction + context).startswith(said)
    # What both read has a place.
    read = letters(processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)).replace("##", "")
    ids = inputs["decoder_prompt_ids"][0]
    prompt = letters(processor.decoder_tokenizer.decode(ids)).partition("instruction:")[2].removesuffix("response:")
    assert len(said) >= min(len(read), len(prompt)) - 3


def test_it_is_saved(processor, tmp_path):
    assert "encoder_places" in processor.model_input_names
    processor.save_pretrained(tmp_path)
    again = ProtoGenProcessor.from_pretrained(tmp_path)
    for name, tensor in processor(TEXTS).items():
        assert torch.equal(again(TEXTS)[name], tensor)


def test_what_cannot_be_aligned_is_refused(processor, encoder_tokenizer):
    for pair in ((ByT5Tokenizer(), encoder_tokenizer), (encoder_tokenizer, ByT5Tokenizer())):
        with pytest.raises(ValueError, match="a token holds, and ByT5Tokenizer does not say: take .* fast tokenizers"):
            ProtoGenProcessor(*pair, aligns_encoder=True)
    with pytest.raises(ValueError, match="aligns_encoder needs an encoder: leave it out for a model without one"):
        ProtoGenProcessor(encoder_tokenizer, encoder_tokenizer, aligns_encoder=True, for_encoder=False)


@torch.no_grad()
def test_the_encoders_states_are_put_on_the_prompts_embeddings(build, llama_dir):
    model, processor = build(llama_dir, decoder_sees_prompt=True, upsamples_prompt=True)
    inputs, found = processor(INSTRUCTIONS, CONTEXTS), []
    layer = model.proto_predictor.source_layers[0]
    layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    whole = model.predict(**inputs)
    states = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    embeddings = model.decoder.get_input_embeddings().weight
    predictor = model.proto_predictor
    for row, mask in enumerate(inputs["decoder_prompt_mask"].bool()):
        ids, places = inputs["decoder_prompt_ids"][row][mask], inputs["encoder_places"][row][mask]
        expected = predictor.decoder_readings[0](embeddings[ids]) + predictor.encoder_reading(states[row][places])
        rates = 1e4 ** (-torch.arange(0, 64, 2) / 64)
        angles = torch.arange(len(ids))[:, None] * rates
        expected += torch.cat([angles.sin(), angles.cos()], dim=1)
        torch.testing.assert_close(found[0][row][mask], expected, rtol=1e-4, atol=1e-5)
    inputs["encoder_places"][0, -1] += 1
    moved = model.predict(**inputs)
    assert not torch.equal(moved.e[0], whole.e[0])
    assert torch.equal(moved.e[1:], whole.e[1:])
    del inputs["encoder_places"]
    with pytest.raises(ValueError, match="needs encoder_places; a processor with aligns_encoder=True makes them"):
        model.predict(**inputs)

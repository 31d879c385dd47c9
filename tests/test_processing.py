import shutil

import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from transformers import AutoConfig

from modeling_protogen import ProtoGenProcessor
from modeling_protogen.processing_protogen import PROMPT_TEMPLATE


@pytest.fixture
def processor(encoder_dir, decoder_dir):
    return ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(decoder_dir), max_answer_length=5)


def prompts(processor, batch):
    rows = zip(batch["decoder_prompt_ids"], batch["decoder_prompt_mask"].bool(), strict=True)
    return [processor.decoder_tokenizer.decode(ids[mask]) for ids, mask in rows]


def test_the_encoder_reads_instruction_and_context_as_a_pair(processor):
    batch = processor(INSTRUCTIONS, CONTEXTS)
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    assert texts[1] == "[CLS] what color is the sky [SEP] the sky was red and blue [SEP]"
    assert texts[2].split("[PAD]")[0].strip() == "[CLS] name three animals [SEP]"
    assert batch["attention_mask"].sum(1).tolist() == [7, 14, 5]


def test_the_decoder_reads_a_chat_template_where_there_is_one(processor):
    last = prompts(processor, processor(INSTRUCTIONS, CONTEXTS))[1].split()
    message = ["what", "color", "is", "the", "sky", "the", "sky", "was", "red", "and", "blue"]
    if processor.decoder_tokenizer.chat_template:
        assert last == ["<bos>", *message, "<eos>", "answer"]
    else:
        assert [word for word in last if word != "<unk>"] == message


def test_prompts_are_padded_on_the_left(processor):
    batch = processor(INSTRUCTIONS, CONTEXTS)
    assert (batch["decoder_prompt_mask"][:, -1] == 1).all()
    assert batch["decoder_prompt_mask"].diff(dim=1).min() >= 0


def test_labels_end_in_eos_are_cut_and_remember_their_length(processor):
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    assert batch["length_labels"].tolist() == [7, 2, 5]
    texts = [processor.decode(row[row != -100], skip_special_tokens=False) for row in batch["labels"]]
    assert texts == ["the cat sat on the", "blue <eos>", "cat dog and bird <eos>"]
    assert processor.batch_decode(batch["labels"][2:]) == ["cat dog and bird"]


def test_one_text_equals_a_batch_of_one(processor):
    one, many = processor("name three animals", None, "cat"), processor(["name three animals"], [None], ["cat"])
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_long_contexts_are_cut_and_the_instruction_is_kept(encoder_dir, decoder_dir):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
        str(encoder_dir), str(decoder_dir), max_prompt_length=25
    )
    assert processor.max_input_length == 32
    batch = processor("what color is the sky", "red blue green " * 50)
    assert batch["input_ids"].shape[1] == 32
    encoded = processor.tokenizer.decode(batch["input_ids"][0])
    assert encoded.startswith("[CLS] what color is the sky [SEP] red blue green red")
    assert batch["decoder_prompt_ids"].shape[1] <= 25
    prompt = prompts(processor, batch)[0]
    assert "what color is the sky red blue green red" in prompt
    if processor.decoder_tokenizer.chat_template:
        assert prompt.endswith("answer"), "the template's end must survive the cut"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "instruction 0 is empty"),
        ((["who", "  \n"],), "instruction 1 is empty"),
        (("the cat " * 20,), "an instruction has 42 tokens and the encoder reads 32"),
        ((["who", "what"], ["a"]), "2 instructions, but 1 contexts"),
        ((["who", "what"], None, ["a"]), "2 instructions, but 1 answers"),
        (([{"role": "user"}],), "chat 0 must hold messages with role and content, both text; got"),
        (([{"role": "user", "content": " "}],), "instruction 0 is empty"),
        (([[{"role": "user", "content": "who"}]], ["red"]), "chat 0 has a context beside it"),
        (([[]],), "instruction 0 is empty"),
        (([],), "there is no instruction: give at least one"),
        ((None,), "text must be an instruction, a chat, or a list of these; got None"),
        (({"role": "user", "content": "who"},), "a message alone is no chat"),
        (([5],), "instruction 0 must be text; got 5"),
        (([[{"role": 1, "content": "who"}]],), "chat 0 must hold messages with role and content, both text; got"),
        ((["who"], [5]), "context 0 must be text; got 5"),
        ((["who"], None, [5]), "answer 0 must be text; got 5"),
        ((["who", "hi \ud83d"],), r"instruction 1 holds half a character, '\\ud83d' at place 3"),
        (([[{"role": "user", "content": "\ud83d"}]],), "chat 0 holds half a character"),
        (("who", "\udc00"), "context 0 holds half a character"),
        (("who", None, "\udc00"), "answer 0 holds half a character"),
    ],
)
def test_bad_input_is_one_clear_error(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(*arguments)


def test_unknown_options_are_refused(processor):
    with pytest.raises(TypeError, match="padding"):
        processor("who", padding=True)


def test_a_chat_of_one_user_message_is_an_instruction(processor):
    texts = [f"{i} {c}" if c else i for i, c in zip(INSTRUCTIONS, CONTEXTS, strict=True)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    batch, again = processor(texts, answer=ANSWERS), processor(chats, answer=ANSWERS)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch.keys() == processor.apply_chat_template(chats, tokenize=True).keys() | {"labels", "length_labels"}
    (alone,) = processor(chats[0])["decoder_prompt_ids"]
    assert alone.tolist() == processor(texts[0])["decoder_prompt_ids"][0].tolist()
    rendered = processor.apply_chat_template(chats)
    with pytest.raises(ValueError, match="tokenize needs add_generation_prompt"):
        processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=False)
    assert prompts(processor, batch) == [
        processor.decoder_tokenizer.decode(processor.decoder_tokenizer(text).input_ids) for text in rendered
    ]


def test_system_prompts_and_turns_are_read_in_the_chat_template_alone(encoder_dir, llama_dir):
    processor = with_options(encoder_dir, llama_dir)
    chat = [{"role": "system", "content": "short answer"}, {"role": "user", "content": "who sat"}]
    assert prompts(processor, processor(chat)) == ["<bos> short answer <eos> <bos> who sat <eos> answer"]
    assert processor.tokenizer.decode(processor(chat)["input_ids"][0]) == "[CLS] short answer who sat [SEP]"
    processor.prompt_template = PROMPT_TEMPLATE
    with pytest.raises(ValueError, match="has one user message and the chat has others"):
        processor(chat)


def test_control_tokens_of_people_are_text(encoder_dir, decoder_dir, llama_dir):
    processor = with_options(encoder_dir, decoder_dir)
    unknown = processor.decoder_tokenizer.unk_token_id
    batch = processor("who is <eos> sat [SEP] on", "red <eos> cat", "the <eos> mat")
    plain = processor("who is the sat the on", "red the cat", "the and mat")
    # The only ones are those that templates make; a word for a word, whatever the tokenizer makes of it.
    eos, sep = processor.decoder_tokenizer.eos_token_id, processor.tokenizer.sep_token_id
    for name, control in (("decoder_prompt_ids", eos), ("labels", eos), ("input_ids", sep)):
        assert (batch[name] == control).sum() == (plain[name] == control).sum(), name
    assert (batch["decoder_prompt_ids"] == unknown).sum() > (plain["decoder_prompt_ids"] == unknown).sum()
    assert batch["decoder_prompt_ids"][0, 0] == plain["decoder_prompt_ids"][0, 0]
    assert batch["decoder_prompt_ids"][0, -1] == plain["decoder_prompt_ids"][0, -1]


def test_control_tokens_beside_the_named_ones_are_text_too(encoder_dir, llama_dir):
    """As `<|start_header_id|>` is in Llama 3."""
    processor = with_options(encoder_dir, llama_dir)
    processor.decoder_tokenizer.add_tokens([AddedToken("<|header|>", special=True)])
    control = processor.decoder_tokenizer.convert_tokens_to_ids("<|header|>")
    assert "<|header|>" not in processor.decoder_tokenizer.all_special_tokens
    chat = [{"role": "user", "content": "who <|header|> sat"}]
    for batch in (processor("who <|header|> sat", "the <|header|>", "a <|header|>"), processor(chat)):
        assert not any((part == control).any() for part in batch.values())
    # A template makes them.
    processor.prompt_template = "<|header|> {message}"
    assert (processor("who <|header|> sat")["decoder_prompt_ids"] == control).sum() == 1


def test_a_byte_order_mark_is_no_text(processor):
    mark = "\ufeff"
    marked = processor(mark + "who sat", mark + "the sky", mark + "red")
    plain = processor("who sat", "the sky", "red")
    assert all(torch.equal(marked[name], plain[name]) for name in plain)
    chat = [{"role": "user", "content": "who sat"}]
    marked, plain = (processor([chat[0] | {"content": start + "who sat"}]) for start in (mark, ""))
    assert all(torch.equal(marked[name], plain[name]) for name in plain)


def test_labels_are_decoded_as_they_are(processor):
    labels = processor(INSTRUCTIONS, None, ["the cat", "red", "a"])["labels"]
    assert (labels == -100).any()
    assert processor.batch_decode(labels) == processor.batch_decode(labels.tolist()) == ["the cat", "red", "a"]
    assert processor.decode(labels[1]) == "red"


def test_prompts_leave_room_for_the_answer_in_the_decoders_window(encoder_dir, llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "short")
    config = AutoConfig.from_pretrained(llama_dir)
    config.max_position_embeddings = 20
    config.save_pretrained(tmp_path / "short")
    processor = with_options(encoder_dir, tmp_path / "short", max_answer_length=8)
    assert processor.max_prompt_length == 11
    assert processor("who", "the cat " * 10)["decoder_prompt_ids"].shape[1] == 11
    assert with_options(encoder_dir, llama_dir, max_answer_length=8).max_prompt_length == 1024
    with pytest.raises(ValueError, match="max_answer_length=19 leaves no room for a prompt: .* has 20 positions"):
        with_options(encoder_dir, tmp_path / "short", max_answer_length=19)


def test_a_prompt_longer_than_its_limit_is_refused(encoder_dir, decoder_dir):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
        str(encoder_dir), str(decoder_dir), max_prompt_length=6
    )
    with pytest.raises(ValueError, match="max_prompt_length is 6: shorten it"):
        processor("the cat sat on the mat", "red")


def test_fits_says_what_would_be_refused(processor):
    assert processor.fits("the cat")
    assert not processor.fits("the cat " * 20)
    processor.max_prompt_length = 1
    assert not processor.fits("the cat")


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = ProtoGenProcessor.from_pretrained(tmp_path)
    assert again.max_input_length == 32
    assert again.max_answer_length == 5
    first, second = processor(INSTRUCTIONS, CONTEXTS, ANSWERS), again(INSTRUCTIONS, CONTEXTS, ANSWERS)
    assert all(torch.equal(first[name], second[name]) for name in first)


def with_options(encoder_dir, decoder_dir, **options):
    return ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(decoder_dir), **options)


def test_a_given_template_takes_the_place_of_the_chat_template(encoder_dir, decoder_dir, tmp_path):
    processor = with_options(encoder_dir, decoder_dir, prompt_template="tell me {message} and answer")
    found = prompts(processor, processor(INSTRUCTIONS, CONTEXTS))
    assert found[0] == "tell me who sat on the mat and answer"
    assert found[1] == "tell me what color is the sky the sky was red and blue and answer"
    assert processor.decoder_prompt_length(INSTRUCTIONS[0]) == 9
    processor.save_pretrained(tmp_path)
    again = ProtoGenProcessor.from_pretrained(tmp_path)
    assert again.prompt_template == "tell me {message} and answer"
    assert prompts(again, again(INSTRUCTIONS, CONTEXTS)) == found


def test_without_a_template_a_plain_one_serves_where_there_is_no_chat_template(encoder_dir, decoder_dir):
    processor = with_options(encoder_dir, decoder_dir)
    plain = with_options(encoder_dir, decoder_dir, prompt_template=PROMPT_TEMPLATE)
    found = [prompts(p, p(INSTRUCTIONS, CONTEXTS)) for p in (processor, plain)]
    assert (found[0] == found[1]) == (processor.decoder_tokenizer.chat_template is None)


def test_braces_in_a_message_are_left_alone(encoder_dir, decoder_dir):
    processor = with_options(encoder_dir, decoder_dir, prompt_template="tell {message}")
    processor.decoder_tokenizer.add_tokens(["{message}", "{sky}"])
    assert prompts(processor, processor("who is {sky} {message}")) == ["tell who is {sky} {message}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "Instruction:"}, r"prompt_template='Instruction:' must hold \{message\}"),
        ({"answer_format": "json"}, "answer_format='json' is not one of text, key_value_lines"),
    ],
)
def test_impossible_options_are_named(encoder_dir, decoder_dir, options, message):
    with pytest.raises(ValueError, match=message):
        with_options(encoder_dir, decoder_dir, **options)


@pytest.fixture
def structured(encoder_dir, decoder_dir):
    """Tokens of the lines, as a tokenizer that keeps white space has them."""
    processor = with_options(encoder_dir, decoder_dir, answer_format="key_value_lines")
    tokenizer = processor.decoder_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|: | |[^ :\n]+"), "isolated")
    tokenizer.add_tokens([": ", "\n", " "])
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return processor


JSON_ANSWERS = ['{"name": "the cat", "color": "red"}', '{"who": "bird"}', '{"who": ""}']


def test_structured_answers_are_lines_inside_and_json_outside(structured, tmp_path):
    labels = structured(INSTRUCTIONS, None, JSON_ANSWERS)["labels"]
    inside = [structured.decoder_tokenizer.decode(row[row != -100]) for row in labels]
    assert inside == ["name: the cat\ncolor: red<eos>", "who: bird<eos>", "who: <eos>"]
    assert structured.batch_decode(labels.masked_fill(labels == -100, 2)) == JSON_ANSWERS
    assert structured.decode(labels[0]) == JSON_ANSWERS[0]
    # What cannot be read as lines stays, and what is a list of ids is taken as it is.
    said = structured.decoder_tokenizer("the cat", add_special_tokens=False).input_ids
    assert structured.decode(torch.tensor(said)) == "the cat"
    assert structured.encode_answers([said, [7, 2]])["labels"].tolist() == [said, [7, 2, -100]]
    structured.save_pretrained(tmp_path)
    again = ProtoGenProcessor.from_pretrained(tmp_path)
    assert again.answer_format == "key_value_lines"
    assert torch.equal(again(INSTRUCTIONS, None, JSON_ANSWERS)["labels"], labels)
    assert again.batch_decode(labels.masked_fill(labels == -100, 2)) == JSON_ANSWERS


def test_an_answer_that_is_not_flat_json_is_refused(structured):
    with pytest.raises(ValueError, match="one JSON object whose values are strings: '{\"a\": 1}'"):
        structured(INSTRUCTIONS[:2], None, [JSON_ANSWERS[0], '{"a": 1}'])


def test_json_is_text_where_nothing_else_is_said(encoder_dir, decoder_dir):
    processor = with_options(encoder_dir, decoder_dir)
    answer = '{"who": "cat"}'
    expected = [*processor.decoder_tokenizer(answer, add_special_tokens=False).input_ids, 2]
    assert processor("who", None, answer)["labels"].tolist() == [expected]
    lines = processor.decoder_tokenizer("who: cat", add_special_tokens=False).input_ids
    assert processor.decode(lines) == processor.decoder_tokenizer.decode(lines, skip_special_tokens=True)

import json
from dataclasses import replace

import pytest
import torch
from conftest import ANSWERS, INSTRUCTIONS

from modeling_protogen import ProtoGenProcessor
from trainers.data import (
    DataArguments,
    Example,
    ProtoGenCollator,
    batch_durations,
    categories_of,
    category_id,
    held_out_of,
    load_examples,
    split_by_instruction,
    with_own_texts,
)

ROWS = [
    {"instruction": f"name {i % 7}", "context": "", "response": f" answer {i} ", "category": "open"} for i in range(30)
]


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataArguments(data=str(path))


def test_rows_become_examples_and_repeated_ones_are_dropped(tmp_path):
    examples = load_examples(write(tmp_path, [*ROWS, ROWS[3]]))
    assert len(examples) == 30
    assert examples[3] == Example(examples[3].id, "name 3", "", "answer 3", "open")
    assert len({example.id for example in examples}) == 30


def test_ids_and_split_do_not_depend_on_order_or_neighbours(tmp_path):
    examples = load_examples(write(tmp_path, ROWS))
    reordered = load_examples(write(tmp_path, ROWS[:10:-1]))
    assert {e.id for e in reordered} < {e.id for e in examples}
    train, validation = split_by_instruction(examples, 0.5)
    assert len(train) + len(validation) == 30
    assert train
    assert validation
    assert not {e.instruction for e in train} & {e.instruction for e in validation}
    again, _ = split_by_instruction(reordered, 0.5)
    assert {e.id for e in again} <= {e.id for e in train}


def test_the_split_has_about_the_wanted_share():
    examples = [Example(str(i), f"instruction {i}", "", "x") for i in range(4000)]
    _, validation = split_by_instruction(examples, 0.1)
    assert 0.08 < len(validation) / 4000 < 0.12
    # A model is measured by what its own training held out.
    assert held_out_of(examples, 0.1) == validation
    with pytest.raises(ValueError, match="does not say what it held out"):
        held_out_of(examples, None)


def test_folders_of_datasets_and_other_columns(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"q": "who", "a": "a cat"}])
    columns = {"instruction_field": "q", "answer_field": "a", "context_field": None}
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        (example,) = load_examples(DataArguments(data=str(tmp_path / name), **columns))
        assert (example.instruction, example.answer, example.context) == ("who", "a cat", "")


def test_a_context_may_be_missing_unless_its_column_is_named(tmp_path):
    args = write(tmp_path, [{"instruction": "who", "response": "a cat"}])
    (example,) = load_examples(args)
    assert (example.context, example.category) == ("", None)
    with pytest.raises(ValueError, match="has no column contxt; it has instruction, response"):
        load_examples(replace(args, context_field="contxt"))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"question": "who", "response": "x"}], ValueError, "has no column instruction; it has question"),
        ([*ROWS[:2], ROWS[0] | {"instruction": " "}], ValueError, "rows.jsonl, line 3: instruction is empty"),
        ([ROWS[0] | {"response": None}, ROWS[1]], ValueError, "rows.jsonl, line 1: response is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        load_examples(write(tmp_path, rows))


GOOD = '{"instruction": "who", "context": "", "response": "cat"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD + "\n{bad\n", "x.jsonl, line 3: this is no JSON"),
        ("x.jsonl", GOOD + GOOD[:20], "x.jsonl, line 2: this is no JSON"),
        ("x.jsonl", "instruction,context,response\na,,b\n", "x.jsonl, line 1: this is no JSON"),
        ("x.jsonl", GOOD + '["a"]\n', "x.jsonl, line 2: this must be a JSON object"),
        ("x.jsonl", '{"instruction": "a", "instruction": "b"}\n', "line 1: .*the key 'instruction' is there twice"),
        ("x.jsonl", '{"instruction": "\\ud83d", "response": "x"}', "line 1: instruction has half a character"),
        ("x.jsonl", GOOD + '{"instruction": "a", "response": ["b"]}', r"line 2: response must be text, not \['b'\]"),
        ("x.jsonl", GOOD + '{"instruction": "a", "response": true}', "line 2: response must be text, not True"),
        ("x.jsonl", '{"instruction": "a", "context": ["b"], "response": "c"}', "line 1: context must be text"),
        ("x.jsonl", GOOD.encode("utf-16"), "x.jsonl, line 1: this is not UTF-8"),
        ("x.jsonl", GOOD.encode() + "{grün".encode("latin-1"), "x.jsonl, line 2: this is not UTF-8"),
        ("x.jsonl", "[" * 100_000, "x.jsonl.*no JSON that can be read"),
        ("x.json", "[" + GOOD + ", {]", "x.json, line 2: this is no JSON"),
        ("x.json", '[{"instruction": "a", "response": ""}]', "x.json, row 1: response is empty"),
        ("x.jsonl", "", "x.jsonl has no rows"),
        ("x.jsonl", "\n\n", "x.jsonl has no rows"),
        ("x.csv", "instruction,response\n", "x.csv has no rows"),
        ("x.csv", "instruction,response\na,b\n\nc\n", "x.csv, line 4: the row has 1 cells and the file 2 columns"),
        ("x.csv", "instruction,response\na,b,c\n", "x.csv, line 2: the row has 3 cells and the file 2 columns"),
        ("x.csv", 'instruction,response\na,"b\n', "x.csv, line 2: this is no CSV"),
        ("x.jsonl.gz", b"\x1f\x8b", "x.jsonl.gz is none of .jsonl, .json, .csv, .parquet"),
        ("x.tsv", "instruction\tresponse\n", "x.tsv is none of"),
        ("x.parquet", "PAR1", "x.parquet is no Parquet file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        load_examples(DataArguments(data=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "answers"),
    [
        ("x.csv", "instruction,context,response\n2+2,,4\n3+3,,007\n", ["4", "007"]),
        ("x.csv", "instruction,context,response\na,NA,NA\nb,null,None\n", ["NA", "None"]),
        ("x.csv", '\ufeffinstruction,response\r\na,"b\nc"\r\nd,e\r\n', ["b\nc", "e"]),
        (
            "x.jsonl",
            '\ufeff{"instruction": "a", "response": 0}\r\n\r\n{"instruction": 5, "response": 1.5}',
            ["0", "1.5"],
        ),
        ("X.JSONL", GOOD, ["cat"]),
        ("x.json", f"\n[{GOOD}]", ["cat"]),
        (
            "x.jsonl",
            '{"instruction": "a", "response": "2020-01-01 00:00:00", "context": null}',
            ["2020-01-01 00:00:00"],
        ),
    ],
)
def test_cells_are_the_text_that_they_are(tmp_path, name, content, answers):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert [example.answer for example in load_examples(DataArguments(data=str(path)))] == answers


def test_contexts_are_not_lost_and_categories_are_text(tmp_path):
    rows = [ROWS[0] | {"context": "NA", "category": 1}, ROWS[1] | {"category": 2}]
    examples = load_examples(write(tmp_path, rows))
    assert [(e.context, e.category) for e in examples] == [("NA", "1"), ("", "2")]
    assert categories_of(examples) == ["1", "2"]
    with pytest.raises(ValueError, match="m_scope=per_category needs a category; the example .*'name 2' has none"):
        categories_of([*examples, Example("c", "name 2", "", "x")])


def test_a_missing_split_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="has no split test; it has train"):
        load_examples(DataArguments(data=str(tmp_path / "data"), data_split="test"))


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data file .*none\.jsonl does not exist"):
        load_examples(DataArguments(data=str(tmp_path / "none.jsonl")))


def test_the_collator_makes_the_models_inputs(encoder_dir, llama_dir):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(llama_dir))
    examples = [Example(str(i), INSTRUCTIONS[i], "", ANSWERS[i], "ab"[i % 2]) for i in range(3)]
    batch = ProtoGenCollator(processor, categories=["a", "b"])(examples)
    expected = processor(INSTRUCTIONS, None, ANSWERS)
    assert batch["category_ids"].tolist() == [0, 1, 0]
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="unknown category 'z'; the model knows a, b"):
        category_id("z", ["a", "b"])


def test_the_teachers_tokens_are_labels_as_they_are(encoder_dir, llama_dir):
    examples = [
        Example("a", INSTRUCTIONS[0], "", "x", answer_ids=[5, 6, 7, 8, 2]),
        Example("b", INSTRUCTIONS[1], "", "x", answer_ids=[9]),
    ]
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(llama_dir))
    batch = ProtoGenCollator(processor)(examples)
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 2], [9, -100, -100, -100, -100]]
    assert batch["length_labels"].tolist() == [5, 1]


def test_instructions_as_answers():
    examples = [Example("a", "who sat", "on the mat", "the cat", "open", answer_ids=None)]
    (found,) = with_own_texts(examples)
    assert found == Example("a-self", "who sat", "", "who sat", "open")
    assert examples[0].answer == "the cat"


def test_durations_of_a_batch_with_padding_and_a_cut_answer():
    batch = {
        "decoder_prompt_ids": torch.tensor([[0, 0, 4, 5], [4, 5, 6, 7], [0, 4, 5, 6], [0, 0, 4, 5]]),
        "decoder_prompt_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]),
        # The second is cut: what its end repeats is not known. Nothing says of what the last one's tokens come from.
        "labels": torch.tensor([[9, 4, -100], [4, 9, 6], [5, 0, 2], [0, 8, -100]]),
        "length_labels": torch.tensor([2, 5, 3, 2]),
    }
    expected = [[0, 0, 2, 0], [-100] * 4, [0, 0, 1, 2], [0, 0, 0, 2]]
    assert batch_durations(batch, lambda before, after: False).tolist() == expected


def test_a_stretch_that_is_too_long_has_no_durations():
    labels = torch.full((1, 40), 9)
    batch = {"decoder_prompt_ids": torch.tensor([[4, 5]]), "decoder_prompt_mask": torch.tensor([[1, 1]])}
    batch |= {"labels": labels, "length_labels": torch.tensor([40])}
    assert batch_durations(batch, lambda before, after: False).tolist() == [[-100, -100]]


def test_the_collator_finds_durations_where_asked(encoder_dir, llama_dir):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(llama_dir), max_answer_length=5)
    examples = [
        Example("a", "who sat on the mat", "", "the mat"),
        Example("b", "name three animals", "", "a cat and a dog and a bird"),  # cut
        Example("c", "what color is the sky", "the sky was red", "the red sky"),
    ]
    assert "durations" not in ProtoGenCollator(processor)(examples)
    batch = ProtoGenCollator(processor, finds_durations=True)(examples)
    ids, mask, found = batch["decoder_prompt_ids"], batch["decoder_prompt_mask"].bool(), batch["durations"]
    words = [processor.decoder_tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    assert found.shape == ids.shape
    assert (found[[0, 2]][~mask[[0, 2]]] == 0).all()
    assert (found[1] == -100).all()
    lengths = (batch["labels"] != -100).sum(1)
    assert found[[0, 2]].sum(1).tolist() == lengths[[0, 2]].tolist()
    # The chat template ends with a word of its own, which accounts for the answer's EOS where that is not repeated.
    assert [(word, n) for word, n in zip(words[0], found[0].tolist(), strict=True) if n] == [
        ("the", 1),
        ("mat", 1),
        ("<eos>", 1),
    ]

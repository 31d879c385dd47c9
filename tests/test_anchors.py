"""Drafts behind many places of an answer in one pass: each is what a pass of its own over the text before it gives."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, coherent, set_dropout, stir_slot_adapters, weights_hash

from eval_tasks.text_metrics import draft_metrics
from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.anchors import even_anchors, labels_behind, random_anchors, text_so_far
from modeling_protogen.frozen_decoder import answer_logits
from modeling_protogen.objectives import IGNORE_INDEX, reconstruction_loss
from modeling_protogen.proto_tokens import fill_slots
from modeling_protogen.slot_adapters import slots_at_the_end
from trainers.data import Example, ProtoGenCollator
from trainers.protogen_trainer import ProtoGenTrainer
from trainers.resuming import last_complete_checkpoint
from trainers.training_args import ProtoGenTrainingArguments

LONG = ["a cat sat on the mat under the tree", "paris", "the dog ran and the bird flew", "red blue"]
FIELDS = [
    {"latent_source": "none", "arrangement": "e_m"},
    {"latent_source": "none", "arrangement": "e_mN", "coherence_dim": 3},
    {"latent_source": "decoder", "arrangement": "e_only", "chunk_size": 1, "max_chunks": 4},
    {"latent_source": "encoder", "arrangement": "e_m"},
]


@pytest.fixture(params=FIELDS, ids=str)
def drafter(request, build, decoder_dir):
    """A model with adapters, whose drafts have three tokens after the decoder's own, and a batch."""
    fields = {"chunk_size": 4, "slot_adapter_rank": 2, "decoder_sees_prompt": True} | request.param
    fields["first_tokens"] = "drafts"
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    processor.max_answer_length = 32
    batch = processor([*INSTRUCTIONS, "who"], [*CONTEXTS, None], LONG)
    return model, batch


def alone(model, batch, row: int, anchor: int) -> torch.Tensor:
    """Logits of a draft behind one anchor, from one pass over the text before it and the slots."""
    inputs = {k: v[row : row + 1] for k, v in batch.items() if k not in ("labels", "length_labels")}
    prediction = model.predict(**inputs)
    layout = model.layout(torch.tensor([3]), prediction.e.shape[1])
    slots = fill_slots(layout, prediction.e, prediction.m)
    ids = inputs["decoder_prompt_ids"][inputs["decoder_prompt_mask"].bool()]
    text = torch.cat([ids, batch["labels"][row, :anchor]])[None]
    if model.coherence is None:
        return answer_logits(model.decoder, slots, layout, text)
    # What the decoder's last state lacks is in the tokens before.
    embed, head = model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings()
    embeds = torch.cat([embed(text), slots], dim=1)
    with slots_at_the_end(slots.shape[1]):
        states = model.decoder.base_model(inputs_embeds=embeds).last_hidden_state[0, text.shape[1] :][
            layout.predicts[0]
        ]
    tokens = embed(torch.nn.functional.pad(batch["labels"][row], (0, 3))[anchor : anchor + 3].clamp_min(0))
    moved = [coherent(model.coherence, state, tokens[: place + 1].flip(0)) for place, state in enumerate(states)]
    return head(torch.stack(moved))


@pytest.mark.parametrize("in_training", [False, True])
def test_drafts_are_those_of_passes_of_their_own(drafter, in_training):
    model, batch = drafter
    model.train(in_training)
    set_dropout(model, 0.0)
    anchors = torch.tensor([[0, 3, 5, 8], [0, 0, 0, 0], [5, 1, 2, 1], [0, 1, 0, 1]])
    labels = labels_behind(batch["labels"], anchors, 3)
    with torch.set_grad_enabled(in_training):
        found = model(**batch, anchors=anchors).answer_logits
    rows = [
        alone(model, batch, row, anchor)[: (labels[4 * row + column] != IGNORE_INDEX).sum()]
        for row, places in enumerate(anchors.tolist())
        for column, anchor in enumerate(places)
    ]
    assert sum(map(len, rows)) == len(found) > 20
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)
    if in_training:
        given = [p for p in model.parameters() if p.requires_grad]
        losses = reconstruction_loss(found, labels), reconstruction_loss(torch.cat(rows), labels)
        gradients = [torch.autograd.grad(loss, given, allow_unused=True) for loss in losses]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients[0])
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_labels_behind_anchors():
    labels = torch.tensor([[5, 6, 7, 8, 9], [5, 6, -100, -100, -100]])
    expected = [[6, 7], [8, 9], [6, -100], [-100, -100]]
    assert labels_behind(labels, torch.tensor([[0, 2], [0, 1]]), 2).tolist() == expected
    assert labels_behind(labels, torch.tensor([[4], [0]]), 3).tolist() == [[-100] * 3, [6, -100, -100]]


def test_texts_so_far_stand_on_the_right():
    prompts, mask = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    ids, found, read = text_so_far(prompts, mask, torch.tensor([[5, 6, -100], [7, 8, 9]]))
    assert read.tolist() == [1, 2]
    assert [row[m.bool()].tolist() for row, m in zip(ids, found, strict=True)] == [[1, 2, 3, 5], [4, 7, 8]]
    assert found.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_anchors_have_tokens_behind_them():
    labels = torch.full((3, 9), IGNORE_INDEX)
    for row, length in enumerate((9, 4, 1)):
        labels[row, :length] = 1
    torch.manual_seed(0)
    drawn = random_anchors(labels, 400)
    assert [set(row.tolist()) for row in drawn] == [set(range(8)), set(range(3)), {0}]
    assert even_anchors(labels, 4).tolist() == [[0, 2, 4, 6], [0, 0, 1, 2], [0, 0, 0, 0]]


@pytest.fixture
def train(build, llama_dir, tmp_path):
    """Trains a drafter on two answers, and returns the trainer."""

    def train(resumes=False, **arguments):
        model, processor = build(
            llama_dir,
            latent_source="none",
            arrangement="e_m",
            chunk_size=4,
            slot_adapter_rank=4,
            decoder_sees_prompt=True,
            first_tokens="drafts",
        )
        processor.max_answer_length = 32
        examples = [Example(text, text, "", text, answer_ids=processor.encode_answers([text])["labels"][0].tolist())
                    for text in (LONG[0], LONG[2])]  # fmt: skip
        args = ProtoGenTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, num_anchors=6, **{"save_strategy": "no"} | arguments
        )
        trainer = ProtoGenTrainer(
            model,
            args,
            ProtoGenCollator(processor),
            examples,
            examples,
            compute_metrics=draft_metrics(model.config.draft_length),
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path) if resumes else None)
        return trainer

    return train


def test_a_trainer_learns_drafts_and_says_how_many_are_right(train):
    trainer = train(max_steps=150, learning_rate=2e-2, warmup_steps=10)
    assert trainer.args.losses == {"draft": 1.0}
    metrics = trainer.evaluate()
    assert {"eval_top1_1", "eval_top1_2", "eval_top1_3"} < set(metrics)
    assert metrics["eval_top1_1"] > 0.9
    assert metrics["eval_kept_tokens"] > 1.5


def test_training_drafts_resumes(train, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    whole = weights_hash(train(**settings).model)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert weights_hash(train(resumes=True, **settings).model) == whole


def test_a_compiled_pass_trains_the_same(train):
    """Slot adapters are hooks, which torch has to trace."""
    compiled = train(max_steps=2, torch_compile=True, torch_compile_backend="eager")
    assert weights_hash(compiled.model) == weights_hash(train(max_steps=2).model)


def test_metrics_of_drafts():
    labels = np.array([[5, 6, 7, 8, 9, -100], [4, 3, 2, -100, -100, -100]])
    drafts = np.array([[5, 6, 0, 8, 0, -100], [0, 3, 2, -100, -100, -100]])
    found = draft_metrics(3)(SimpleNamespace(predictions=drafts, label_ids=labels))
    assert found == {"top1_1": 2 / 3, "top1_2": 2 / 3, "top1_3": 1 / 2, "kept_tokens": 1.0}


def test_what_drafts_need_is_said(build, llama_dir, tmp_path):
    with pytest.raises(ValueError, match="with num_anchors the losses are draft and reconstruction; got siglip"):
        ProtoGenTrainingArguments(output_dir=str(tmp_path), num_anchors=2, losses={"siglip": 1.0})
    with pytest.raises(ValueError, match="num_anchors=-1 must be at least 0"):
        ProtoGenTrainingArguments(output_dir=str(tmp_path), num_anchors=-1)
    model, processor = build(llama_dir)
    args = ProtoGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True, num_anchors=2)
    with pytest.raises(ValueError, match="set decoder_sees_prompt: true"):
        ProtoGenTrainer(model, args, train_dataset=[], processing_class=processor)
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    with pytest.raises(ValueError, match="num_anchors and first_tokens: drafts need each other"):
        ProtoGenTrainer(model, args, train_dataset=[], processing_class=processor)
    with pytest.raises(ValueError, match="first_tokens=drafts go on from a text that the decoder reads"):
        build(llama_dir, first_tokens="drafts")


def test_a_drafter_writes_in_the_block_modes_alone(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True, first_tokens="drafts")
    model.save_pretrained(tmp_path)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    expected = model.generate(**inputs, mode="verified", max_new_tokens=256)
    assert torch.equal(loaded.generate(**inputs), expected)
    assert expected.shape[1] > model.config.max_answer_length
    for mode in ("one_step", "refine"):
        with pytest.raises(ValueError, match="has learned no whole answers: write with mode=verified"):
            model.generate(**inputs, mode=mode)

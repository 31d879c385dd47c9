"""The trainer: exact under gradient accumulation and resume, every loss logged, the decoder untouched."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS, set_dropout, weights_hash
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import TrainerCallback

from eval_tasks.text_metrics import one_step_metrics
from modeling_protogen.frozen_decoder import decoder_fingerprint
from trainers import protogen_trainer
from trainers.data import Example, ProtoGenCollator, examples_of, is_held_out, place_of
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.losses import LOSSES
from trainers.proto_bank import BankInfo, ProtoTokenBank
from trainers.protogen_trainer import LengthGroupedEpochs, ProgressLines, ProtoGenTrainer
from trainers.resuming import begin_checkpoint, last_complete_checkpoint
from trainers.training_args import REFUSED, ProtoGenTrainingArguments

EXAMPLES = [
    Example(f"{i}-{j}", instruction, CONTEXTS[i] or "", answer)
    for i, instruction in enumerate(INSTRUCTIONS)
    for j, answer in enumerate([*ANSWERS, "a dog ran under the tree"])
]
TOKEN_BY_TOKEN = {"decoder_sees_prompt": True, "latent_source": "both", "upsamples_prompt": True}
TOKEN_BY_TOKEN |= {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8, "slot_adapter_rank": 2}
# What needs a bank, and what needs one vector a token, is not for the same models.
OF_TOKENS = ("token_head", "duration")
WITH_BANK = {}, {name: 0.5 for name in LOSSES if name not in OF_TOKENS}
WITH_TOKENS = TOKEN_BY_TOKEN, {name: 0.5 for name in LOSSES if "bank" not in LOSSES[name].needs}
EVERY_LOSS = pytest.mark.parametrize(("fields", "losses"), [WITH_BANK, WITH_TOKENS], ids=["bank", "tokens"])
EMBEDDINGS = {example.id: torch.randn(6) for example in EXAMPLES}


@pytest.fixture
def trainer_for(build, tmp_path):
    def trainer_for(decoder_dir, bank=None, dropout=0.0, output_dir=tmp_path / "run", fields=None, **arguments):
        model, processor = build(decoder_dir, **(fields or {}))
        set_dropout(model, dropout)
        arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"} | arguments
        args = ProtoGenTrainingArguments(
            output_dir=str(output_dir), use_cpu=True, logging_steps=1, disable_tqdm=True, seed=3, **arguments
        )
        return ProtoGenTrainer(
            model=model,
            args=args,
            train_dataset=EXAMPLES,
            eval_dataset=EXAMPLES[:5],
            data_collator=ProtoGenCollator(
                processor, None, bank if "bank" in args.needs else None, EMBEDDINGS, "durations" in args.needs
            )
            if arguments.get("losses")
            else None,
            processing_class=processor,
            compute_metrics=one_step_metrics(processor),
        )

    return trainer_for


@pytest.fixture
def bank(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    info = BankInfo("tiny", None, decoder_fingerprint(model.decoder), "e_mN", 8, 1, "per_example", "bos", dim=24)
    fitter = ProtoTokenFitter(model.decoder, info, FittingArguments(fit_max_steps=3, fit_attempts=1))
    labels = processor.encode_answers([example.answer for example in EXAMPLES])["labels"]
    texts = [(e.id, row[row != -100].tolist()) for e, row in zip(EXAMPLES, labels, strict=True)]
    bank = ProtoTokenBank(tmp_path / "bank", info)
    with bank.writing():
        for entries in fitter.fit([Text(id, token_ids) for id, token_ids in texts]):
            bank.append(entries)
    return bank


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_sees_prompt": True},
        {"decoder_sees_prompt": True, "first_tokens": "decoder"},
        {"decoder_sees_prompt": True, "latent_source": "both", "slot_adapter_rank": 2},
        {"latent_source": "encoder", "upsamples_prompt": True},
    ],
    ids=str,
)
def test_training_learns_and_leaves_the_decoder_alone(trainer_for, decoder_dir, fields):
    trainer = trainer_for(decoder_dir, fields=fields, max_steps=30, learning_rate=5e-3)
    decoder, start = weights_hash(trainer.model.decoder), parameters_of(trainer)
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert weights_hash(trainer.model.decoder) == decoder
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in trainer.model.decoder.parameters()}
    still = {name for name, p in parameters_of(trainer).items() if torch.equal(p, start[name])}
    # The pooler is not used; a bias of the keys cannot change a softmax.
    assert {name for name in still if "pooler" not in name and not name.endswith("key.bias")} == set()


@pytest.mark.parametrize("fields", [{}, TOKEN_BY_TOKEN], ids=["m", "tokens"])
def test_gradient_accumulation_equals_the_whole_batch(trainer_for, llama_dir, tmp_path, fields):
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_for(
            llama_dir,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            output_dir=tmp_path / f"run-{size}",
            optim="sgd",
            max_steps=3,
            fields=fields,
        )
        trainer.train()
        results.append((losses_of(trainer), parameters_of(trainer)))
    for losses, parameters in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        for name, p in parameters.items():
            torch.testing.assert_close(p, results[0][1][name], rtol=1e-4, atol=1e-6)


TEN_LINES = [{"instruction": e.instruction, "response": e.answer} for e in EXAMPLES]


def test_a_checkpoint_and_a_dataset_are_enough_to_train(build, llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in build(llama_dir):
        part.save_pretrained("checkpoint")
    data = Dataset.from_list(TEN_LINES)
    args = ProtoGenTrainingArguments(use_cpu=True, disable_tqdm=True, max_steps=4, logging_steps=1, seed=3)
    losses = []
    for model, dataset in (("checkpoint", data), (build(llama_dir)[0], examples_of(data))):
        trainer = ProtoGenTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=build(llama_dir)[1],
            eval_dataset={"a": data},
        )
        set_dropout(trainer.model, 0.0)
        trainer.train()
        losses.append(losses_of(trainer))
        assert "eval_a_loss_error_nll" in trainer.evaluate()
    assert losses[0] == pytest.approx(losses[1])
    batch = trainer.data_collator(examples_of(data))
    with torch.no_grad():
        assert trainer.model(**batch).loss.item() == pytest.approx(trainer.compute_loss(trainer.model, batch).item())


def test_a_model_knows_what_it_was_not_trained_on(build, llama_dir, tmp_path):
    """Whatever chose the examples: a share that holds one of them out would be wrong, and a larger one is possible."""
    model, processor = build(llama_dir)

    def share_after(examples):
        args = ProtoGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        ProtoGenTrainer(model, args, train_dataset=examples, processing_class=processor)
        return model.config.validation_share

    held_out = sorted(EXAMPLES, key=lambda example: place_of(example.instruction))
    assert model.config.validation_share is None
    first = share_after(held_out[-1:])
    assert first == place_of(held_out[-1].instruction) > 0
    assert share_after(held_out) == place_of(held_out[0].instruction) < first
    assert not any(is_held_out(example.instruction, model.config.validation_share) for example in EXAMPLES)
    # What was learned once stays learned.
    assert share_after(held_out[-1:]) == place_of(held_out[0].instruction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processing_class": None}, "give processing_class="),
        ({"losses": {"siglip": 1.0}}, r"\(bank\): give data_collator="),
        ({"losses": {"duration": 1.0}}, "upsamples_prompt: true and the loss duration"),
        ({"train_dataset": Dataset.from_list([{"question": "who"}])}, "has no column instruction, response"),
    ],
    ids=str,
)
def test_what_a_trainer_lacks_is_said(build, llama_dir, tmp_path, arguments, message):
    model, processor = build(llama_dir)
    losses = {"losses": arguments.pop("losses")} if "losses" in arguments else {}
    args = ProtoGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **losses)
    with pytest.raises(ValueError, match=message):
        ProtoGenTrainer(model, args, **({"train_dataset": EXAMPLES, "processing_class": processor} | arguments))


@EVERY_LOSS
def test_resuming_equals_an_uninterrupted_run(trainer_for, llama_dir, bank, tmp_path, fields, losses):
    arguments = {"losses": losses, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1}
    arguments["fields"] = fields
    whole = trainer_for(llama_dir, bank=bank, output_dir=tmp_path / "run", **arguments)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = trainer_for(llama_dir, bank=bank, output_dir=tmp_path / "run", **arguments)
    decoder = weights_hash(resumed.model.decoder)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "run"))
    assert losses_of(resumed) == losses_of(whole)
    assert weights_hash(resumed.model) == weights_hash(whole.model)
    assert weights_hash(resumed.losses) == weights_hash(whole.losses)
    assert weights_hash(resumed.model.decoder) == decoder


def test_activation_checkpointing_changes_nothing_but_memory(trainer_for, llama_dir, tmp_path):
    results = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer = trainer_for(llama_dir, dropout=0.1, activation_checkpointing=checkpointing, output_dir=folder)
        passes = []
        layer = trainer.model.encoder.encoder.layer[0].attention
        layer.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer.train()
        results.append((losses_of(trainer), weights_hash(trainer.model), len(passes)))
    assert results[0][:2] == results[1][:2]
    assert results[1][2] == 2 * results[0][2], "the encoder's layers ran again on the way back"


def test_batches_have_like_lengths_in_an_order_that_seed_and_epoch_decide():
    lengths = torch.randint(10, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedEpochs(lengths, batch_size=8, seed=1)
    first, again = list(sampler), LengthGroupedEpochs(lengths, batch_size=8, seed=1)
    torch.manual_seed(99)
    assert list(again) == first
    assert sorted(first) == list(range(400))
    spreads = [np.ptp([lengths[i] for i in first[at : at + 8]]) for at in range(0, 400, 8)]
    assert np.mean(spreads) < 0.2 * np.ptp(lengths)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again.set_epoch(1)
    assert list(again) == second


def test_resuming_in_a_later_epoch(trainer_for, llama_dir, tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 2}
    arguments["train_sampling_strategy"] = "group_by_length"
    whole = trainer_for(llama_dir, dropout=0.1, **(arguments | {"save_steps": 7}))
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    resumed = trainer_for(llama_dir, dropout=0.1, **arguments)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "run"))
    assert resumed.state.epoch > 1
    assert weights_hash(resumed.model) == weights_hash(whole.model)


def test_resuming_from_thin_checkpoints(trainer_for, llama_dir, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "fields": {"thin": True}}
    whole = trainer_for(llama_dir, **arguments)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer_for(llama_dir, **arguments)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "run"))
    assert weights_hash(resumed.model) == weights_hash(whole.model)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "trainer_state.json").write_text(""), r"is damaged \(trainer_state.json\)"),
        (lambda folder: (folder / "optimizer.pt").unlink(), r"is damaged \(optimizer.pt\)"),
        (lambda folder: (folder / "rng_state.pth").write_bytes(b"x"), r"is damaged \(rng_state.pth\)"),
        (lambda folder: (folder / "checksums.json").write_text("["), r"is damaged \(checksums.json\)"),
        (lambda folder: begin_checkpoint(folder), "was not finished"),
        # As they were before they had checksums.
        (lambda folder: [(folder / n).unlink() for n in ("checksums.json", "trainer_state.json")], "was not finished"),
    ],
    ids=["empty", "missing", "changed", "checksums", "unfinished", "of before"],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(trainer_for, llama_dir, tmp_path, damage, said):
    trainer_for(llama_dir, max_steps=2, save_strategy="steps", save_steps=1).train()
    folder, messages = tmp_path / "run", []
    assert last_complete_checkpoint(folder, messages.append).endswith("checkpoint-2")
    damage(folder / "checkpoint-2")
    assert last_complete_checkpoint(folder, messages.append).endswith("checkpoint-1")
    (message,) = messages
    assert re.search(f"checkpoint-2 {said}: going on from .*checkpoint-1.$", message)
    shutil.rmtree(folder / "checkpoint-1")
    if "damaged" in said:
        with pytest.raises(ValueError, match=rf"checkpoint-2 {said}, and no checkpoint before it is whole"):
            last_complete_checkpoint(folder, messages.append)
    else:
        assert last_complete_checkpoint(folder, messages.append) is None
        assert messages[1].endswith("checkpoint-2 was not finished: going on from the start.")


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(trainer_for, llama_dir, tmp_path, monkeypatch):
    synced, forced = [], os.fsync

    def fsync(opened):
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")))
        forced(opened)

    def rotated(*arguments, **options):
        newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
        files = {path for path in newest.rglob("*") if path.is_file() and path.name != "checksums.json"}
        assert {*files, newest, newest.parent} <= {*synced}
        assert last_complete_checkpoint(tmp_path / "run") == str(newest)
        assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
        kept.append(len(list((tmp_path / "run").glob("checkpoint-*"))))
        rotate(*arguments, **options)

    kept, rotate = [], protogen_trainer.rotate_checkpoints
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(protogen_trainer, "rotate_checkpoints", rotated)
    trainer_for(llama_dir, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert kept == [1, 2, 2]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_error_while_training_has_a_line_of_its_own(trainer_for, llama_dir, monkeypatch, capsys):
    trainer = trainer_for(llama_dir, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(ProgressLines)
    monkeypatch.setattr(torch, "save", lambda *_: Path("/dev/full").write_text("x"))
    with pytest.raises(OSError, match=r"^no space left in .*run"):
        trainer.train()
    assert capsys.readouterr().err.endswith("\n")
    assert last_complete_checkpoint(trainer.args.output_dir, lambda message: None) is None


@pytest.mark.parametrize("bad", ["gradient", 0, 1])
def test_training_stops_at_what_is_not_finite_and_goes_on_from_before(trainer_for, llama_dir, monkeypatch, bad):
    """A gradient, or in a micro-batch a term of the loss that has none."""
    options = {"losses": {"reconstruction": 1.0, "length_nll": 0.1}, "gradient_accumulation_steps": 2, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    uninterrupted = trainer_for(llama_dir, **options | {"save_strategy": "no"})
    uninterrupted.train()
    trainer, ids = trainer_for(llama_dir, **options), []
    length_nll, training_step = trainer.losses["length_nll"], trainer.training_step

    def watched(model, inputs, *args):
        if trainer.state.global_step == 3:
            ids.append(inputs["example_ids"])
        return training_step(model, inputs, *args)

    def forward(outputs, inputs):
        loss = type(length_nll).forward(length_nll, outputs, inputs)
        return loss.detach() * torch.nan if len(ids) == bad + 1 else loss

    monkeypatch.setattr(trainer, "training_step", watched)
    if bad == "gradient":
        parameter = next(p for p in trainer.model.proto_predictor.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: grad * torch.nan if ids else grad)
    else:
        monkeypatch.setattr(length_nll, "forward", forward)
    with pytest.raises(ValueError, match="is not finite in step 4, with the examples") as stop:
        trainer.train()
    named, checkpoint = ids[0] + ids[1] if bad == "gradient" else ids[bad], f"{trainer.args.output_dir}/checkpoint-2"
    assert ("the gradient" if bad == "gradient" else "the loss length_nll") in str(stop.value)
    assert f"examples {', '.join(named)}; the last good checkpoint is {checkpoint}: lower" in str(stop.value)
    assert len(losses_of(trainer)) == 3
    assert last_complete_checkpoint(trainer.args.output_dir) == checkpoint
    resumed = trainer_for(llama_dir, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    weights = parameters_of(uninterrupted)
    assert all(torch.equal(p, weights[name]) for name, p in parameters_of(resumed).items())


@pytest.mark.parametrize("fields", [{"learning_rate": 1e20, "encoder_learning_rate": 1e20}, {"learning_rate": 1e38}])
def test_no_log_says_that_a_loss_of_nan_is_none(trainer_for, llama_dir, fields):
    trainer = trainer_for(llama_dir, **fields, save_strategy="steps", save_steps=1, max_steps=6)
    with pytest.raises(ValueError, match=r"step \d.* is none: .*remove .*checkpoint-1, and run"):
        trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_evaluation_stops_at_a_loss_that_is_not_finite(trainer_for, llama_dir):
    trainer = trainer_for(llama_dir)
    with torch.no_grad():
        next(trainer.model.proto_predictor.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="eval_loss is not finite after step 0; the last good checkpoint is none"):
        trainer.evaluate()


@EVERY_LOSS
def test_every_loss_is_logged_and_they_sum_to_the_total(trainer_for, llama_dir, bank, fields, losses):
    trainer = trainer_for(llama_dir, bank=bank, losses=json.dumps(losses), max_steps=2, fields=fields)
    own = {name: p.detach().clone() for name, p in trainer.losses.named_parameters()}
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        total = sum(weight * entry[f"loss_{name}"] for name, weight in losses.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    # Both settings have losses that learn something themselves.
    assert own
    assert not any(torch.equal(p, own[name]) for name, p in trainer.losses.named_parameters())


@EVERY_LOSS
def test_every_loss_is_nearly_the_same_in_bf16(trainer_for, llama_dir, bank, tmp_path, fields, losses):
    logs = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        trainer = trainer_for(
            llama_dir, bank=bank, losses=losses, max_steps=1, bf16=bf16, output_dir=folder, fields=fields
        )
        dtypes = set()
        trainer.losses["reconstruction"].register_forward_pre_hook(
            lambda _, inputs, dtypes=dtypes: dtypes.add((inputs[0].answer_logits.dtype, inputs[0].e.dtype))
        )
        trainer.train()
        # A float32 copy of the logits would be the step's largest tensor.
        assert dtypes == {(torch.bfloat16 if bf16 else torch.float32, torch.float32)}
        logs.append(trainer.state.log_history[0])
    for name in losses:
        assert logs[1][f"loss_{name}"] == pytest.approx(logs[0][f"loss_{name}"], rel=0.05), name
    assert logs[0] != logs[1]


def test_evaluation_reports_the_one_step_answers(trainer_for, llama_dir):
    trainer = trainer_for(llama_dir, max_steps=20, learning_rate=5e-3, per_device_eval_batch_size=2)
    trainer.train()
    metrics = trainer.evaluate()
    model, processor = trainer.model.eval(), trainer.processing_class

    correct, matches, rouges = [], [], []
    for example in EXAMPLES[:5]:
        inputs = processor(example.instruction, example.context or None)
        labels = processor.encode_answers([example.answer])["labels"]
        with torch.no_grad():
            correct += (model(**inputs, labels=labels).answer_logits.argmax(-1) == labels[0]).tolist()
        answer = processor.batch_decode(model.generate(**inputs))[0]
        reference = processor.batch_decode(labels)[0]
        matches.append(answer.strip() == reference.strip())
        rouges.append(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)
    assert metrics["eval_token_accuracy"] == pytest.approx(np.mean(correct))
    assert metrics["eval_exact_match"] == pytest.approx(np.mean(matches))
    assert metrics["eval_rouge_l"] == pytest.approx(np.mean(rouges))
    total = metrics["eval_loss_reconstruction"]
    total += 0.1 * (metrics["eval_loss_length_nll"] + metrics["eval_loss_error_nll"])
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)
    assert metrics["eval_token_accuracy"] > 0


def test_each_evaluation_has_the_losses_of_its_own_examples(trainer_for, llama_dir):
    trainer = trainer_for(llama_dir, max_steps=1)
    trainer.train()
    parts = {"first": EXAMPLES[:3], "last": EXAMPLES[-4:]}
    alone = {name: trainer.evaluate(part, metric_key_prefix=f"test_{name}") for name, part in parts.items()}
    trainer.predict(EXAMPLES)
    together = trainer.evaluate(parts)
    for name in parts:
        found = alone[name][f"test_{name}_loss_reconstruction"]
        assert together[f"eval_{name}_loss_reconstruction"] == pytest.approx(found)
        total = found + 0.1 * sum(alone[name][f"test_{name}_loss_{part}_nll"] for part in ("length", "error"))
        assert alone[name][f"test_{name}_loss"] == pytest.approx(total, rel=1e-5)
    assert together["eval_first_loss_reconstruction"] != pytest.approx(together["eval_last_loss_reconstruction"])


def test_what_needs_no_logits_runs_no_decoder(trainer_for, llama_dir, bank):
    """And learns the same as with the decoder's pass, whose loss weighs nothing."""
    results = []
    for losses in ({"siglip": 1.0, "length_nll": 1.0}, {"siglip": 1.0, "length_nll": 1.0, "reconstruction": 0.0}):
        trainer, passes = trainer_for(llama_dir, bank=bank, losses=losses), []
        trainer.model.decoder.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer.train()
        results.append((bool(passes), parameters_of(trainer)))
    assert [ran for ran, _ in results] == [False, True]
    for name, p in results[0][1].items():
        torch.testing.assert_close(p, results[1][1][name], rtol=1e-4, atol=1e-6)


class Recorder(TrainerCallback):
    """The trained weights after each step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_step_end(self, *_, **__):
        self.steps.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})


def test_the_average_of_the_weights_is_evaluated_and_kept(trainer_for, llama_dir, tmp_path):
    plain = trainer_for(llama_dir, max_steps=6, output_dir=tmp_path / "plain")
    average = parameters_of(plain)
    recorder = Recorder(plain.model)
    plain.add_callback(recorder)
    plain.train()
    averages = []
    for step, weights in enumerate(recorder.steps, start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
        averages.append(average)
    assert (1 + 1) / (10 + 1) < 0.4 < (1 + 6) / (10 + 6), "both decays must have been in use"

    trainer = trainer_for(
        llama_dir, max_steps=6, ema_decay=0.4, eval_strategy="steps", eval_steps=3, output_dir=tmp_path / "average"
    )
    trainer.train()
    assert losses_of(trainer) == losses_of(plain), "training goes on from the weights themselves"
    for name, weight in parameters_of(trainer).items():
        torch.testing.assert_close(weight, averages[-1][name])
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for loss, weights in zip(evaluated, (averages[2], averages[5]), strict=True):
        plain.model.load_state_dict(weights, strict=False)
        assert loss == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-6)


def test_resuming_goes_on_with_the_average(trainer_for, llama_dir, tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9}
    whole = trainer_for(llama_dir, **arguments)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = trainer_for(llama_dir, **arguments)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "run"))
    assert losses_of(resumed) == losses_of(whole)
    assert weights_hash(resumed.model) == weights_hash(whole.model)


def test_an_average_of_nothing_is_refused(tmp_path):
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            ProtoGenTrainingArguments(output_dir=str(tmp_path), ema_decay=decay)


def test_true_durations_are_for_training_alone(trainer_for, llama_dir):
    """In evaluation the model spreads the prompt by its own, as it has to when it answers."""
    losses = {"reconstruction": 1.0, "duration": 1.0}
    trainer = trainer_for(llama_dir, losses=losses, fields=TOKEN_BY_TOKEN, max_steps=1)
    given, upsampling = {True: [], False: []}, trainer.model.proto_predictor.upsampling
    upsampling.register_forward_pre_hook(lambda module, args: given[module.training].append(args[3]))
    trainer.train()
    metrics = trainer.evaluate()
    (durations,) = given[True]
    assert ((durations.sum(1) > 0) | (durations[:, 0] == -100)).all()
    assert given[False]
    assert all(durations is None for durations in given[False])
    # They are compared with all the same.
    assert metrics["eval_loss_duration"] > 0
    total = metrics["eval_loss_duration"] + metrics["eval_loss_reconstruction"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


def test_the_token_head_needs_no_pass_of_the_decoder(trainer_for, llama_dir):
    losses = {"token_head": 1.0, "duration": 1.0}
    fields = TOKEN_BY_TOKEN | {"latent_source": "decoder", "slot_adapter_rank": 0}
    trainer = trainer_for(llama_dir, losses=losses, fields=fields, max_steps=30, learning_rate=5e-3)
    decoder, passes = weights_hash(trainer.model.decoder), []
    trainer.model.decoder.lm_head.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    _, answers = trainer.predict(trainer.eval_dataset).predictions
    assert not passes
    # Evaluation reads the token head too.
    example = trainer.eval_dataset[0]
    with torch.no_grad():
        prediction = trainer.model.predict(**trainer.processing_class(example.instruction, example.context))
    read = (prediction.e[0, :, 0] @ trainer.model.decoder.lm_head.weight.T).argmax(-1)
    length = round(prediction.log_length_mean.exp().item())
    assert answers[0][answers[0] >= 0].tolist() == read[:length].tolist()
    logged = [entry["loss_token_head"] for entry in trainer.state.log_history if "loss_token_head" in entry]
    assert sum(logged[-5:]) < 0.8 * sum(logged[:5])
    assert weights_hash(trainer.model.decoder) == decoder


def test_evaluation_without_a_bank_leaves_out_what_needs_one(trainer_for, llama_dir, bank):
    trainer = trainer_for(llama_dir, bank=bank, losses={"reconstruction": 1.0, "siglip": 1.0})
    trainer.data_collator.bank = None
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_reconstruction"], rel=1e-5)
    assert "eval_loss_siglip" not in metrics


def test_the_encoder_has_its_own_learning_rate(trainer_for, llama_dir):
    trainer = trainer_for(llama_dir, encoder_learning_rate=1e-5, learning_rate=1e-3, weight_decay=0.1)
    encoder = {id(p) for p in trainer.model.encoder.parameters()}
    for group in trainer.create_optimizer().param_groups:
        assert group["lr"] == (1e-5 if id(group["params"][0]) in encoder else 1e-3)
        assert all((id(p) in encoder) == (id(group["params"][0]) in encoder) for p in group["params"])
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    frozen = trainer_for(llama_dir, encoder_learning_rate=0.0)
    assert not any(p.requires_grad for p in frozen.model.encoder.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_do_nothing_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name} cannot be set: "):
        ProtoGenTrainingArguments(output_dir=str(tmp_path), **{name: "x"})


@pytest.mark.parametrize(
    ("losses", "message"),
    [('{"mse": 1}', "unknown losses: mse; the losses are reconstruction"), ({"siglip": 0.0}, "positive weight")],
)
def test_impossible_losses_are_refused(tmp_path, losses, message):
    with pytest.raises(ValueError, match=message):
        ProtoGenTrainingArguments(output_dir=str(tmp_path), losses=losses)

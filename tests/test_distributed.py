"""Training in two processes, plain and under DeepSpeed, against one process with the joined batch."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import weights_hash
from safetensors.torch import load_file
from test_scripts import recipe  # noqa: F401
from transformers import AutoModelForCausalLM

from eval_tasks import command_line
from modeling_protogen import ProtoGenForConditionalGeneration

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "scripts" / "recipes" / "launch"
PLAIN = ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
        reason="DeepSpeed, or the compiler that it needs on CPUs, is not installed",
    ),
]
WAYS = [
    pytest.param(["--multi_gpu", "--num_processes", 2, *PLAIN], id="ddp"),
    pytest.param(["--config_file", LAUNCH / "zero2.yaml"], id="zero2", marks=deepspeed),
    pytest.param(["--config_file", LAUNCH / "zero3.yaml"], id="zero3", marks=deepspeed),
]


@pytest.fixture
def exact_recipe(recipe, tmp_path):  # noqa: F811
    """Nothing random but the start: no dropout, the data in its order."""
    content = yaml.safe_load(recipe.read_text())
    encoder = tmp_path / "encoder"
    shutil.copytree(content["encoder"], encoder)
    config = json.loads((encoder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(config))
    content |= {"encoder": str(encoder), "logging_steps": 1, "per_device_train_batch_size": 2, "save_steps": 2}
    content |= {"train_sampling_strategy": "sequential", "eval_on_start": False}
    content["losses"] = {"reconstruction": 1.0, "length_nll": 0.1, "error_nll": 0.1}
    content |= {"predictor_dim": 128, "predictor_dropout": 0.0, "slot_adapter_rank": 2}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def logged_losses(output_dir):
    log = json.loads((output_dir / "metrics.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def launch(how, recipe, output_dir, *options):  # noqa: F811
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", 0]
    command += [ROOT / "scripts" / "train.py", "--config", recipe, "--output_dir", output_dir, "--use_cpu", "true"]
    return subprocess.run([*map(str, command), *map(str, options)], capture_output=True, text=True, timeout=300)


def losses(how, recipe, output_dir, *options):  # noqa: F811
    done = launch(how, recipe, output_dir, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return logged_losses(output_dir)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_learns(exact_recipe, tmp_path, way):
    decoder = yaml.safe_load(exact_recipe.read_text())["decoder"]
    alone = ["--gradient_accumulation_steps", 2]
    if LAUNCH / "zero3.yaml" in way:
        # It draws the fresh weights in another order, in one process as in two.
        one = losses([*way, "--num_processes", 1], exact_recipe, tmp_path / "one", *alone)
    else:
        output = ["--output_dir", tmp_path / "one", "--use_cpu", "true"]
        command_line.main([*map(str, ["train", "--config", exact_recipe, *output, *alone])])
        one = logged_losses(tmp_path / "one")
    two = losses(way, exact_recipe, tmp_path / "two")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert not any(name.startswith("decoder.") for name in weights[1]), "the checkpoint is thin"
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "two" / "model")
    assert weights_hash(loaded.decoder) == weights_hash(AutoModelForCausalLM.from_pretrained(decoder))

    # From the first checkpoint on, as after an interruption.
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert losses(way, exact_recipe, tmp_path / "again") == two
    again = load_file(tmp_path / "again" / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights[1].items())


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]])
def test_two_processes_learn_drafts(exact_recipe, tmp_path, way):
    """Behind anchors that each draws for itself; from a checkpoint on they draw the same."""
    options = {"latent_source": "none", "arrangement": "e_m", "chunk_size": 4, "coherence_dim": 3, "num_anchors": 3}
    options |= {"decoder_sees_prompt": "true", "losses": '{"draft": 1}'}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    whole = losses(way, exact_recipe, tmp_path / "whole", *arguments)
    assert len(set(whole)) == 4
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert losses(way, exact_recipe, tmp_path / "again", *arguments) == whole
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert weights[0]["coherence.out.weight"].any()


@pytest.mark.parametrize("way", WAYS)
def test_processes_stop_together_at_a_loss_that_is_not_finite(exact_recipe, tmp_path, way):
    done = launch(way, exact_recipe, tmp_path / "run", "--learning_rate", 1e20, "--max_grad_norm", 0)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "is not finite in step" in line]
    assert len(errors) == 2, done.stderr[-4000:]
    assert errors[0].split("error: ")[1] == errors[1].split("error: ")[1]
    assert "last good checkpoint is none" in errors[0]
    assert not (tmp_path / "run" / "checkpoint-4").exists()

"""Saving and loading: full and thin, with our code and through `trust_remote_code` in a process without it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, save_decoder, stir_slot_adapters, weights_hash
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor

REMOTE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_protogen", "trainers", "eval_tasks"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
folder, batch_file, output_file, auto_class = sys.argv[1:]
import torch, transformers
torch.set_num_threads(1)  # As in the tests: bits depend on it.
from safetensors.torch import load_file, save_file
try:
    import modeling_protogen
    raise SystemExit("our package must be out of reach")
except ImportError:
    pass
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(config).__name__ == "ProtoGenConfig"
with open(batch_file) as file:
    batch = processor(*json.load(file))
with torch.no_grad():
    logits = model(**batch).answer_logits
output = model.generate(**batch, length=8, return_dict_in_generate=True)
save_file({"logits": logits, "sequences": output.sequences, "confidences": output.confidences}, output_file)
print(processor.batch_decode(output.sequences))
"""


def answers(model, processor):
    batch = processor(INSTRUCTIONS, CONTEXTS)
    with torch.no_grad():
        logits = model(**batch).answer_logits
    output = model.generate(**batch, length=8, return_dict_in_generate=True)
    return {"logits": logits, "sequences": output.sequences, "confidences": output.confidences}


@pytest.mark.parametrize("first_tokens", ["slots", "decoder"])
@pytest.mark.parametrize("thin", [False, True])
def test_round_trip_is_exact(build, decoder_dir, tmp_path, thin, first_tokens):
    model, processor = build(decoder_dir, thin=thin, decoder_sees_prompt=True, first_tokens=first_tokens)
    before = weights_hash(model.decoder)
    model.save_pretrained(tmp_path)
    again, info = ProtoGenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    differing = {name for name, value in again.config.to_dict().items() if model.config.to_dict()[name] != value}
    assert differing <= {"_name_or_path", "transformers_version"}
    assert weights_hash(again) == weights_hash(model)
    assert weights_hash(again.decoder) == before
    assert not any(p.requires_grad for p in again.decoder.parameters())
    assert all(p.requires_grad for p in again.proto_predictor.parameters())
    first, second = answers(model, processor), answers(again, processor)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The tie survives.
    head, table = again.decoder.get_output_embeddings().weight, again.decoder.get_input_embeddings().weight
    assert (head is table) == model.config.decoder_config.tie_word_embeddings
    # What was loaded thin can be saved in full, and the other way round.
    again.save_pretrained(tmp_path / "other", thin=not thin)
    assert again.config.thin == thin
    other = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "other")
    assert weights_hash(other) == weights_hash(model)


def test_thin_checkpoints_hold_nothing_of_the_decoder(build, decoder_dir, tmp_path):
    model, _ = build(decoder_dir)
    model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "full")
    for name, expected in (("thin", False), ("full", True)):
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            assert any(key.startswith("decoder.") for key in file.keys()) == expected  # noqa: SIM118
            assert any(key.startswith("proto_predictor.") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForSeq2SeqLM"])
def test_remote_code_in_a_process_without_our_package(build, decoder_dir, tmp_path, thin, auto_class):
    model, processor = build(decoder_dir, thin=thin, decoder_sees_prompt=True, slot_adapter_rank=2)
    stir_slot_adapters(model)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "batch.json").write_text(json.dumps([INSTRUCTIONS, CONTEXTS]))
    (tmp_path / "remote.py").write_text(REMOTE)
    arguments = [tmp_path / "model", tmp_path / "batch.json", tmp_path / "output.safetensors", auto_class]
    done = subprocess.run(
        [sys.executable, tmp_path / "remote.py", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = answers(model, processor)
    with safe_open(tmp_path / "output.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.items())
    assert done.stdout.strip() == str(processor.batch_decode(expected["sequences"]))


@pytest.mark.parametrize("thin", [False, True])
def test_bfloat16_and_device_map(build, decoder_dir, tmp_path, thin):
    model, processor = build(decoder_dir, thin=thin, slot_adapter_rank=2)
    stir_slot_adapters(model)
    model.save_pretrained(tmp_path)
    half = ProtoGenForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.generate(**processor(INSTRUCTIONS), length=8).shape[0] == 3
    mapped = ProtoGenForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    first, second = answers(model, processor), answers(mapped, processor)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_sees_prompt": True, "latent_source": "both", "slot_adapter_rank": 2},
        {"decoder_sees_prompt": True, "latent_source": "both", "upsamples_prompt": True, "first_tokens": "decoder"},
    ],
    ids=str,
)
def test_disk_offload_gives_the_same_answers(build, decoder_dir, tmp_path, fields):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    model.save_pretrained(tmp_path / "model")
    device_map = {"encoder": "cpu", "proto_predictor": "disk", "decoder": "disk"}
    if model.slot_adapters is not None:
        device_map["slot_adapters"] = "disk"
    offloaded = ProtoGenForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    first, second = answers(model, processor), answers(offloaded, processor)
    torch.testing.assert_close(second, first)


def test_a_decoder_of_another_width_is_refused(build, llama_dir, tmp_path):
    model, _ = build(llama_dir, thin=True)
    model.save_pretrained(tmp_path / "model")
    wide = save_decoder(tmp_path / "wide", "llama", hidden_size=32)
    with pytest.raises(ValueError, match="hidden_size=24 .*the one given has hidden_size=32"):
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "model", decoder_name_or_path=str(wide))
    other = save_decoder(tmp_path / "neox", "neox")
    with pytest.raises(ValueError, match="model_type=llama"):
        model.attach_decoder(AutoModelForCausalLM.from_pretrained(other))


def test_a_missing_decoder_says_how_to_go_on(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, thin=True)
    model.config.decoder_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match="thin checkpoint and its decoder .* cannot be loaded; pass decoder_name_or_path"):
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "model")
    found = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "model", decoder_name_or_path=str(llama_dir))
    assert torch.equal(answers(found, processor)["sequences"], answers(model, processor)["sequences"])


def test_what_cannot_be_saved_is_refused_before_anything_is_written(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    model.config.decoder_name_or_path = None
    with pytest.raises(ValueError, match="a thin checkpoint needs config.decoder_name_or_path"):
        model.save_pretrained(tmp_path / "model", thin=True)
    model.decoder = None
    with pytest.raises(ValueError, match="there is no decoder to save"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(RuntimeError, match="no decoder is attached"):
        model.generate(**processor(INSTRUCTIONS))


def test_processor_and_model_share_a_folder(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert ProtoGenProcessor.from_pretrained(tmp_path).max_answer_length == 8
    written = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "modeling_protogen.py",
        "proto_tokens.py",
        "slot_adapters.py",
    } <= written
    assert {
        "configuration_protogen.py",
        "generation_protogen.py",
        "processing_protogen.py",
        "key_value_lines.py",
    } <= written
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in written)

"""Saving and loading: full and thin, with our code and through `trust_remote_code` in a process without it."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, save_decoder, stir_slot_adapters, weights_hash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.decoders import load_decoder, load_processor_of

REMOTE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_protogen", "trainers", "eval_tasks"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
batch_file, *folders = sys.argv[1:]
import torch, transformers
torch.set_num_threads(1)  # As in the tests: bits depend on it.
from safetensors.torch import load_file, save_file
try:
    import modeling_protogen
    raise SystemExit("our package must be out of reach")
except ImportError:
    pass
for folder in folders:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "ProtoGenConfig"
    with open(batch_file) as file:
        batch = processor(*json.load(file))
    for auto_class in (transformers.AutoModel, transformers.AutoModelForSeq2SeqLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        with torch.no_grad():
            logits = model(**batch).answer_logits
        output = model.generate(**batch, length=8, return_dict_in_generate=True)
        tensors = {"logits": logits, "sequences": output.sequences, "confidences": output.confidences}
        save_file(tensors, f"{folder}-{auto_class.__name__}.safetensors")
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


def test_remote_code_in_a_process_without_our_package(build, decoder_dir, tmp_path):
    expected, folders = [], []
    for thin in (False, True):
        model, processor = build(decoder_dir, thin=thin, decoder_sees_prompt=True, slot_adapter_rank=2)
        stir_slot_adapters(model)
        folders.append(tmp_path / ("thin" if thin else "full"))
        model.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
        expected.append(answers(model, processor))
    (tmp_path / "batch.json").write_text(json.dumps([INSTRUCTIONS, CONTEXTS]))
    (tmp_path / "remote.py").write_text(REMOTE)
    command = [sys.executable, tmp_path / "remote.py", tmp_path / "batch.json", *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, tensors in zip(folders, expected, strict=True):
        for auto_class in ("AutoModel", "AutoModelForSeq2SeqLM"):
            with safe_open(f"{folder}-{auto_class}.safetensors", framework="pt") as file:
                assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    texts = [str(processor.batch_decode(tensors["sequences"])) for tensors in expected for _ in range(2)]
    assert done.stdout.strip().splitlines() == texts


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
        {"decoder_sees_prompt": True, "latent_source": "encoder", "upsamples_prompt": True, "first_tokens": "decoder"},
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


def changed_decoder(decoder_dir, folder):
    """Of the same shape, one weight of which differs."""
    decoder = AutoModelForCausalLM.from_pretrained(decoder_dir)
    with torch.no_grad():
        decoder.base_model.layers[1].mlp.up_proj.weight[0, 0] += 1
    decoder.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("auto_class", [ProtoGenForConditionalGeneration, AutoModel])
def test_a_decoder_with_other_weights_is_refused(build, llama_dir, tmp_path, auto_class):
    model, _ = build(llama_dir, thin=True)
    model.save_pretrained(tmp_path / "model")
    load = partial(auto_class.from_pretrained, tmp_path / "model")
    other = changed_decoder(llama_dir, tmp_path / "other")
    message = f"trained for {llama_dir} .*the decoder given, {other}, has other weights"
    with pytest.raises(ValueError, match=message):
        load(decoder_name_or_path=other)
    with pytest.raises(ValueError, match=message):
        model.attach_decoder(AutoModelForCausalLM.from_pretrained(other))
    taken = load(decoder_name_or_path=other, ignore_other_decoder=True)
    assert weights_hash(taken.decoder) == weights_hash(AutoModelForCausalLM.from_pretrained(other))
    # Where it was found is no other configuration.
    assert taken.config.decoder_name_or_path == str(llama_dir)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        load(dtype=dtype)
    # Without a fingerprint, as older checkpoints are, any one of the shape is taken.
    model.config.decoder_fingerprint = None
    model.save_pretrained(tmp_path / "model")
    load(decoder_name_or_path=other)


def without(folder, prefix, **added):
    """Takes the weights with a prefix out of a checkpoint, and puts others in."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(prefix)}  # noqa: SIM118
    save_file(kept | added, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("prefix", "added", "message"),
    [
        ("proto_predictor.queries", {}, "it lacks proto_predictor.queries;"),
        ("encoder.embeddings.word", {}, "it lacks encoder.embeddings.word_embeddings.weight;"),
        ("decoder.", {}, "it lacks decoder.lm_head.weight, decoder.model.embed_tokens.weight, .* and 18 more;"),
        ("none", {"proto_predictor.queries": torch.ones(1, 2)}, "it has in other shapes proto_predictor.queries;"),
        ("none", {"slot_adapters.x": torch.ones(1)}, "it has beyond its configuration slot_adapters.x;"),
    ],
    ids=str,
)
def test_a_checkpoint_that_is_not_whole_is_refused(build, llama_dir, tmp_path, prefix, added, message):
    model, _ = build(llama_dir)
    model.save_pretrained(tmp_path)
    without(tmp_path, prefix, **added)
    with pytest.raises(ValueError, match=message):
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_without_its_configuration_is_refused(build, llama_dir, tmp_path):
    build(llama_dir)[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"has no config\.json"):
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("auto_class", [ProtoGenForConditionalGeneration, AutoModel])
def test_the_decoder_is_loaded_as_the_model_is(build, llama_dir, tmp_path, thin, auto_class):
    build(llama_dir, thin=thin)[0].save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.encoder.config._attn_implementation == model.decoder.config._attn_implementation == "eager"


def test_options_reach_a_thin_checkpoints_decoder(build, llama_dir, tmp_path, monkeypatch):
    build(llama_dir, thin=True)[0].save_pretrained(tmp_path)
    load, seen = AutoModelForCausalLM.from_pretrained, {}

    def loaded(*args, **kwargs):
        seen.update(kwargs)
        return load(llama_dir)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    options = {"device_map": "cpu", "offload_folder": str(tmp_path / "offload"), "local_files_only": True}
    ProtoGenForConditionalGeneration.from_pretrained(tmp_path, **options, trust_remote_code=True)
    assert seen.items() >= options.items()
    # A decoder's code runs only where that is asked for.
    assert "trust_remote_code" not in seen
    own = {"trust_remote_code": True, "quantization_config": "any"}
    ProtoGenForConditionalGeneration.from_pretrained(tmp_path, decoder_kwargs=own)
    assert seen.items() >= own.items()


def test_a_relative_decoder_folder_is_found_from_elsewhere(build, llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(llama_dir.parent)
    model, _ = build(llama_dir.name, thin=True)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    again = ProtoGenForConditionalGeneration.from_pretrained("model")
    assert weights_hash(again) == weights_hash(model)


def test_unknown_fields_are_refused(build, llama_dir):
    with pytest.raises(TypeError, match="ProtoGenConfig has no chunksize"):
        build(llama_dir, chunksize=4)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("decoder_tokenizer", "decoder_tokenizer has no whole tokenizer"),
        ("decoder_tokenizer/tokenizer.json", "decoder_tokenizer has no whole tokenizer"),
        ("tokenizer.json", r"needs one there \(tokenizer\)"),
        ("processor_config.json", r"has no processor_config\.json"),
    ],
)
@pytest.mark.parametrize("load", [ProtoGenProcessor.from_pretrained, AutoProcessor.from_pretrained, load_processor_of])
def test_a_processor_that_is_not_whole_is_refused(build, llama_dir, tmp_path, missing, message, load):
    model, processor = build(llama_dir)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(OSError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [None, b"no JSON", b"\xff", b"", b"[]"], ids=["cut", "text", "bytes", "empty", "list"]
)
def test_a_damaged_file_of_a_tokenizer_is_named(encoder_dir, llama_dir, tmp_path, name, content):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in (encoder_dir, llama_dir)]
    for copy in copies:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    encoder, decoder = copies
    join = ProtoGenProcessor.from_encoder_decoder_pretrained
    for folder, call in (
        (encoder, partial(join, encoder, llama_dir)),
        (decoder, partial(join, encoder_dir, decoder)),
        (decoder, partial(load_decoder, str(decoder), None, "float32", torch.device("cpu"))),
    ):
        with pytest.raises(OSError, match=f"^{name} in {folder} is damaged .*: get the tokenizer again"):
            call()


@pytest.mark.parametrize("part", ["", "decoder_tokenizer"])
def test_a_damaged_tokenizer_of_a_processor_is_named(build, llama_dir, tmp_path, part):
    _, processor = build(llama_dir)
    processor.save_pretrained(tmp_path)
    (tmp_path / part / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match=rf"^tokenizer\.json in {tmp_path / part} is damaged"):
        ProtoGenProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_tokenizer_of_another_vocabulary_is_refused(build, llama_dir, tmp_path, is_packed):
    """A packed model has the tokenizers of its encoder and its decoder, which may have moved."""
    model, processor = build(llama_dir, latent_source="none", decoder_sees_prompt=True, thin=True)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    moved = shutil.copytree(llama_dir, tmp_path / "moved")
    if is_packed:
        shutil.rmtree(tmp_path / "model" / "decoder_tokenizer")
        for file in (tmp_path / "model").glob("*token*.json"):
            file.unlink()
    load = partial(load_processor_of, tmp_path / "model", str(moved))
    assert load()(INSTRUCTIONS)["decoder_prompt_ids"].tolist() == processor(INSTRUCTIONS)["decoder_prompt_ids"].tolist()
    path = (moved if is_packed else tmp_path / "model" / "decoder_tokenizer") / "tokenizer.json"
    rules = json.loads(path.read_text())
    words = rules["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="the decoder_tokenizer from .* has another vocabulary"):
        load()


def damaged_weights():
    pickled, zipped = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(999)}, pickled, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(999)}, zipped)
    contents = {"text": b"version https://git-lfs", "empty": b"", "zeros": bytes(99), "other": pickle.dumps(Path(), 2)}
    return contents | {"cut pickle": pickled.getvalue()[:-999], "cut archive": zipped.getvalue()[:-999]}


@pytest.mark.parametrize("content", damaged_weights().values(), ids=damaged_weights().keys())
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_named(encoder_dir, llama_dir, tmp_path, file, content):
    encoder, decoder = (shutil.copytree(folder, tmp_path / folder.name) for folder in (encoder_dir, llama_dir))
    for copy in (encoder, decoder):
        (copy / "model.safetensors").unlink()
        (copy / file).write_bytes(content)
    join = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained
    for folder, call in (
        (encoder, partial(join, encoder, llama_dir)),
        (decoder, partial(join, encoder_dir, decoder)),
        (decoder, partial(load_decoder, str(decoder), None, "float32", torch.device("cpu"))),
    ):
        with pytest.raises(
            ValueError, match=rf"^the weights of {folder} are damaged \([^\n]{{1,120}}\): get them again\.$"
        ):
            call()


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


def test_word_embeddings_are_frozen_and_may_come_from_elsewhere(build, encoder_dir, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    words = model.encoder.get_input_embeddings().weight
    assert not words.requires_grad
    assert not model.train().encoder.get_input_embeddings().weight.requires_grad
    model.config.encoder_name_or_path = str(encoder_dir)
    model.save_pretrained(tmp_path / "without", thin=True)
    assert model.word_embeddings_name not in load_file(tmp_path / "without" / "model.safetensors")
    shutil.copytree(encoder_dir, tmp_path / "moved")
    found = ProtoGenForConditionalGeneration.from_pretrained(
        tmp_path / "without", encoder_name_or_path=str(tmp_path / "moved")
    )
    assert weights_hash(found) == weights_hash(model)
    assert len(found.generate(**processor(INSTRUCTIONS))) == len(INSTRUCTIONS)
    # What was loaded has them, and is saved whole.
    found.save_pretrained(tmp_path / "whole", thin=True)
    assert weights_hash(ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "whole")) == weights_hash(model)

    with pytest.raises(ValueError, match="word embeddings of width 32, and that of .*, where they are to come from"):
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "without", encoder_name_or_path=str(llama_dir))

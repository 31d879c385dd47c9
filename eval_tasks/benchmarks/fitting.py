"""Fitting: against the paper's loop in time, its memory, and killed again and again."""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from eval_tasks import report
from eval_tasks.baselines.one_text_fit import fit_one_text
from eval_tasks.latency import peak_gigabytes
from trainers.data import DataArguments, fitting_targets, load_examples
from trainers.decoders import load_frozen_decoder
from trainers.devices import fastest_dtype
from trainers.embedded import decoder_revision
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.proto_bank import BankInfo, ProtoTokenBank
from trainers.text_files import read_json

PROTOGEN = [sys.executable, "-m", "eval_tasks.command_line"]


def add_commands(commands) -> None:
    fitting = argparse.ArgumentParser(add_help=False)
    fitting.add_argument("--decoder", default="embedded:smollm2-135m")
    fitting.add_argument("--dtype", default="bfloat16")
    fitting.add_argument("--tokens", type=int, default=16, help="length of the texts")
    command = commands.add_parser("fit", parents=[fitting])
    command.add_argument("--texts", type=int, default=8)
    command.add_argument("--data", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--memory-slots", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    command.add_argument("--memory-tokens", type=int, default=64, help="length of the texts for the memory")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--result", default="runs/benchmark_fit.json")
    command.set_defaults(run_command=fit)
    command = commands.add_parser("fit-memory", parents=[fitting])
    command.add_argument("--slots", type=int, required=True)
    command.set_defaults(run_command=fit_memory)
    command = commands.add_parser("fit-kill")
    command.add_argument("--run", default="runs/fit_kill", help="folder, which must not exist")
    command.add_argument("--recipe", default="scripts/recipes/embedded.yaml")
    command.add_argument("--kills", type=int, default=20)
    command.add_argument("--longest", type=float, default=40, help="seconds until a kill, at most")
    command.add_argument("--texts", type=int, default=200)
    command.add_argument("--tokens", type=int, default=6, help="length of the texts")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--result", default="runs/fit_kill_test.json")
    command.set_defaults(run_command=fit_kill)


def fit(arguments) -> None:
    memory = {}
    for slots in tqdm(arguments.memory_slots, desc="memory", unit="run"):
        command = [*PROTOGEN, "bench", "fit-memory", "--slots", slots, "--tokens", arguments.memory_tokens]
        command += ["--decoder", arguments.decoder, "--dtype", arguments.dtype]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {slots} slots failed: {done.stderr.strip()[-500:]}")
        memory[slots] = float(done.stdout.split()[-1])

    tokenizer, decoder = load_frozen_decoder(arguments.decoder, arguments.dtype)
    examples = load_examples(DataArguments(data=arguments.data))
    targets = fitting_targets(tokenizer, examples, arguments.tokens)
    texts = [Text(id, ids) for id, ids in targets.items() if len(ids) == arguments.tokens][: arguments.texts]
    info = BankInfo("", None, "", "e_mN", arguments.tokens, 1, "per_example", "bos", decoder.config.hidden_size)

    paper = papers_fits(decoder, texts, arguments)

    fitter = ProtoTokenFitter(decoder, info, FittingArguments(fit_seed=arguments.seed))
    entries, start = [], time.perf_counter()
    with tqdm(total=len(texts), desc="slots", unit="text") as bar:
        for ended in fitter.fit(texts):
            entries += ended
            bar.update(len(ended))
    seconds = time.perf_counter() - start

    device = decoder.device.type
    slots_rate = 60 * len(texts) / seconds
    paper_rate = 60 * len(texts) / sum(fit["seconds"] for fit in paper)
    paper_steps, steps = np.mean([fit["steps"] for fit in paper]), np.mean([entry.steps for entry in entries])
    content = report.result(
        command=arguments.command_line,
        model=f"{arguments.decoder}, {arguments.dtype}",
        revision=decoder_revision(arguments.decoder),
        data=f"first {arguments.tokens} tokens of {len(texts)} responses of {arguments.data}",
        seed=arguments.seed,
        metrics={
            f"texts_per_minute_{device}": slots_rate,
            f"texts_per_minute_paper_{device}": paper_rate,
            f"texts_per_minute_ratio_{device}": slots_rate / paper_rate,
            "accuracy": float(np.mean([entry.accuracy for entry in entries])),
            "accuracy_paper": float(np.mean([fit["accuracy"] for fit in paper])),
            "steps_a_text": float(steps),
            "steps_a_text_paper": float(paper_steps),
            "steps_ratio_to_paper_recipe": float(paper_steps / steps),
            **{f"peak_memory_gb_{slots}_slots": gigabytes for slots, gigabytes in memory.items()},
        },
    )
    report.write_result(arguments.result, content)


def papers_fits(decoder, texts, arguments) -> list[dict]:
    """The paper's loop over the texts, minutes each; a file beside the result keeps what is done."""
    path = Path(arguments.result).with_suffix(".paper.json")
    done = read_json(path) if path.is_file() else {}
    keys = [f"{arguments.decoder} {arguments.dtype} {arguments.seed} {text.id} {len(text.token_ids)}" for text in texts]
    for key, text in zip(keys, tqdm(texts, desc="the paper's loop", unit="text"), strict=True):
        if key not in done:
            start = time.perf_counter()
            fit = fit_one_text(decoder, text.token_ids, decoder.config.bos_token_id, seed=arguments.seed)
            done[key] = {"seconds": time.perf_counter() - start, "steps": fit.steps, "accuracy": fit.accuracy}
            report.write_json(path, done)
    return [done[key] for key in keys]


def fit_memory(arguments) -> None:
    """Prints the gigabytes that two steps take with all slots full of texts of one length."""
    _, decoder = load_frozen_decoder(arguments.decoder, arguments.dtype)
    info = BankInfo("", None, "", "e_mN", arguments.tokens, 1, "per_example", "bos", decoder.config.hidden_size)
    settings = FittingArguments(fit_slots=str(arguments.slots), fit_max_steps=2, fit_attempts=1)
    fitter = ProtoTokenFitter(decoder, info, settings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (arguments.slots, arguments.tokens), generator=generator).tolist()
    texts = [Text(str(number), row) for number, row in enumerate(ids)]
    print(peak_gigabytes(lambda: list(fitter.fit(texts))))


def fit_kill(arguments) -> None:
    run = Path(arguments.run)
    if run.exists():
        raise FileExistsError(f"{run} exists; the kill test starts from nothing: remove it, or give another --run.")
    command = [*PROTOGEN, "fit", "--output_dir", run]
    command += ["--config", arguments.recipe, "--fit_num_texts", arguments.texts, "--fit_slots", 8]
    # Measured again in the dtype of the fit: in another one, tokens that nearly tie may change places.
    dtype = fastest_dtype()
    command += ["--decoder_dtype", dtype]
    command = [*map(str, command), "--fit_max_length", str(arguments.tokens)]
    rng = random.Random(arguments.seed)
    seen, lost, kills = set(), set(), 0
    with tqdm(total=arguments.kills, desc="kill", unit="kill") as bar:
        while kills < arguments.kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0, arguments.longest))
                raise ValueError(f"the fit ended after {kills} kills; give it more --texts, or fewer --kills.")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            kills += 1
            if (run / "bank" / "bank.json").is_file():
                ids = set(ProtoTokenBank(run / "bank").ids)
                lost |= seen - ids
                seen |= ids
            bar.set_postfix(texts=len(seen))
            bar.update()
    subprocess.run(command, check=True)

    bank = ProtoTokenBank(run / "bank")
    bank.verify()
    summary = read_json(run / "fit.json")
    _, decoder = load_frozen_decoder(bank.info.decoder, dtype)
    fitter = ProtoTokenFitter(decoder, bank.info, FittingArguments())
    mismatches = sum(
        abs(fitter.measure(bank[id]) - bank.row(id)["accuracy"]) > 1e-6 for id in tqdm(bank.ids, desc="measure again")
    )
    # Not through the bank, which would refuse to open.
    stored = [id for path in bank.folder.glob("shard-*.parquet") for id in pq.read_table(path)["id"].to_pylist()]
    content = report.result(
        command=arguments.command_line,
        model=f"{bank.info.decoder}, {dtype}",
        revision=decoder_revision(bank.info.decoder),
        data=f"first {arguments.tokens} tokens of {arguments.texts} responses, recipe {arguments.recipe}",
        seed=arguments.seed,
        metrics={
            "kills": kills,
            "texts": summary["texts"],
            "texts_fitted_before_the_last_kill": len(seen),
            "lost": len(lost) + summary["texts"] - len(bank),
            "duplicated": len(stored) - len(set(stored)),
            "accuracy_mismatches": mismatches,
            "mean_accuracy": summary["reconstruction_accuracy"],
        },
    )
    report.write_result(arguments.result, content)

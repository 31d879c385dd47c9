"""
Faults: killed runs, full disks, damaged files, numbers that are not finite. Each is made many times on tiny models;
what is lost is counted, and what a person reads is kept.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eval_tasks import command_line, report
from trainers.files import read_lines
from trainers.proto_bank import ProtoTokenBank
from trainers.resuming import checkpoints

# A command runs in a fork: importing takes longer than the work.
FORK = multiprocessing.get_context("fork")
SCRIPTS = Path(command_line.__file__).parent.parent / "scripts"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
WORLD = {"world_rows": 120, "world_width": 32, "world_layers": 2, "world_steps": 1, "validation_share": 0.2}
RECIPE = {
    "chunk_size": 8,
    "predictor_dim": 64,
    "decoder_dtype": "float32",
    "fit_num_texts": 24,
    "fit_max_length": 6,
    "fit_slots": 4,
    "fit_max_steps": 60,
    "fit_attempts": 1,
    "teacher_max_length": 6,
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "save_total_limit": 3,
    "logging_steps": 2,
    "losses": {"reconstruction": 1.0, "length_nll": 0.1},
    "use_cpu": True,
}


@dataclass
class Outcome:
    """
    What came of a fault.

    Args:
        tried (`int`): how often it was made.
        lost (`int`): what was lost, doubled or silently wrong in all of them together.
        seen (`str`): the last line that a person read.
    """

    tried: int
    lost: int
    seen: str


def add_commands(commands) -> None:
    command = commands.add_parser("faults")
    command.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT")
    command.add_argument("--kills", type=int, default=20, help="of each command, at random moments")
    command.add_argument("--launched-kills", type=int, default=3, help="of runs with two processes, which start slowly")
    command.add_argument("--flips", type=int, default=200, help="bits of a bank, one at a time")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--result", default="runs/faults.json")
    command.set_defaults(run_command=faults)


def faults(arguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ground, outcomes = Ground(Path(folder), arguments), {}
        for name in tqdm(arguments.only, desc="faults", unit="kind"):
            if (outcome := FAULTS[name](ground)) is not None:
                outcomes[name] = outcome
                report.write_json(arguments.result, result_of(outcomes, arguments))
    report.write_result(arguments.result, result_of(outcomes, arguments), ["tried", "lost", "what_a_person_reads"])


def result_of(outcomes: dict[str, Outcome], arguments) -> dict:
    metrics = {f"{name}_{what}": getattr(o, what) for name, o in outcomes.items() for what in ("tried", "lost")}
    content = report.result(
        command=arguments.command_line,
        model="a tiny random GPTNeoX and BERT, float32",
        revision=None,
        data=f"{WORLD['world_rows']} instructions of the controlled world",
        seed=arguments.seed,
        metrics=metrics | {"lost": sum(outcome.lost for outcome in outcomes.values())},
    )
    return content | {"messages": {f"{name}_what_a_person_reads": o.seen for name, o in outcomes.items()}}


def started(arguments: Sequence[str | Path], output: Path) -> multiprocessing.Process:
    """A process that runs a command of `protogen` and writes all that it says into a file."""
    process = FORK.Process(target=run_quietly, args=(list(map(str, arguments)), output))
    process.start()
    return process


def run_quietly(arguments: list[str], output: Path) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    command_line.main(arguments)


class Ground:
    """
    A folder with a tiny world, and runs in it that nothing happened to, each made when it is first asked for.

    Args:
        folder (`Path`): empty.
        arguments: of the command: how often, and the seed.
    """

    def __init__(self, folder: Path, arguments):
        self.folder = folder
        self.arguments = arguments
        self.rng = random.Random(arguments.seed)
        world = {"data": str(folder / "world" / "data.jsonl"), "output_dir": str(folder / "world")} | WORLD
        options = [f"--{name}={value}" for name, value in world.items()]
        status, seen = self.run("world", "--use_cpu", "true", *options)
        if status:
            raise RuntimeError(f"protogen world does not run at all: {seen}")
        self.recipe = folder / "recipe.yaml"
        paths = {name: str(folder / "world" / name) for name in ("encoder", "decoder")}
        data = {name: world[name] for name in ("data", "validation_share")}
        self.recipe.write_text(yaml.safe_dump(RECIPE | paths | data))

    def run(self, *arguments: str | Path, kill_after: float | None = None) -> tuple[int, str]:
        """Runs a command of `protogen`: its exit status, negative for a signal, and the last line that it wrote."""
        output = self.folder / "output.txt"
        process = started(arguments, output)
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, self.last_line(output.read_text(errors="replace"))

    def last_line(self, text: str) -> str:
        """Without the folder, and without the hint at the traceback."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text))]
        said = [line for line in lines if line and not line.startswith("(--debug")] or [""]
        return said[-1].replace(f"{self.folder}/", "")

    def command(self, name: str, output: Path, *options: str | Path) -> list[str]:
        return [name, "--config", str(self.recipe), "--output_dir", str(output), *map(str, options)]

    def whole(self, name: str) -> Path:
        """The folder of a run of this command that nobody interrupted."""
        run = self.folder / f"whole_{name}"
        if not run.exists():
            status, seen = self.run(*self.command(name, run))
            if status:
                raise RuntimeError(f"protogen {name} does not run at all: {seen}")
        return run


@contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A copy to damage."""
    copy = folder.with_name("damaged")
    shutil.copytree(folder, copy)
    yield copy
    shutil.rmtree(copy)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def files_in(folder: Path) -> list[Path]:
    """Relative to it, those with nothing in them left out."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def tensors_that_differ(one: Path, other: Path) -> int:
    """Between two safetensors files, tensors that only one of them has included."""
    a, b = load_file(one), load_file(other)
    return sum(name not in a or name not in b or not torch.equal(a[name], b[name]) for name in a | b)


def texts_that_differ(run: Path, whole: Path) -> int:
    """Between the banks of two runs: texts that are missing, too many, or of other vectors."""
    try:
        found, expected = ProtoTokenBank(run / "bank"), ProtoTokenBank(whole / "bank")
        found.verify()
    except ValueError:
        return RECIPE["fit_num_texts"]
    wrong = len(set(found.ids) ^ set(expected.ids)) + len(found.ids) - len(set(found.ids))
    for id in set(found.ids) & set(expected.ids):
        a, b = found[id], expected[id]
        wrong += not (a.token_ids == b.token_ids and torch.equal(a.e, b.e) and torch.equal(a.m, b.m))
    return wrong


def weights_that_differ(run: Path, whole: Path) -> int:
    return tensors_that_differ(run / "model" / "model.safetensors", whole / "model" / "model.safetensors")


def answers_that_differ(run: Path, whole: Path) -> int:
    """Between the answers of two teachers, doubled ones included."""

    def answers(folder: Path) -> list[str]:
        files = sorted((folder / "teacher").glob("*.jsonl"))
        return [json.dumps(row, sort_keys=True) for file in files for row in read_lines(file)]

    found, expected = answers(run), answers(whole)
    return len(set(found) ^ set(expected)) + len(found) - len(set(found))


DIFFERENCES = {"fit": texts_that_differ, "train": weights_that_differ, "teacher": answers_that_differ}


def killed(name: str) -> Callable[[Ground], Outcome]:
    """SIGKILL at random moments of one run after the other, each then run to its end."""

    def outcome(ground: Ground) -> Outcome:
        whole, kills, lost, rounds = ground.whole(name), 0, 0, 0
        while kills < ground.arguments.kills:
            run = ground.folder / f"killed_{name}_{rounds}"
            # Once within the imports and the first steps, then anywhere.
            for longest in (1, 3, 5):
                status, _ = ground.run(*ground.command(name, run), kill_after=ground.rng.uniform(0.1, longest))
                kills += status == -signal.SIGKILL
            status, seen = ground.run(*ground.command(name, run))
            lost += (status != 0) + DIFFERENCES[name](run, whole)
            rounds += 1
        return Outcome(kills, lost, seen)

    return outcome


def killed_processes(how: list[str]) -> Callable[[Ground], Outcome]:
    """SIGKILL of a training run with two processes, all of it, once it has a checkpoint."""

    def outcome(ground: Ground) -> Outcome:
        def launched(run: Path, wanted: float) -> tuple[int, str]:
            command = [*LAUNCH, *how, SCRIPTS / "train.py", *ground.command("train", run)[1:]]
            output = run.with_suffix(".txt")
            with open(output, "w") as file:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
                while process.poll() is None and len(list(run.glob("checkpoint-*/trainer_state.json"))) < wanted:
                    time.sleep(0.01)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), ground.last_line(output.read_text(errors="replace"))

        whole = ground.folder / f"whole_{Path(how[-1]).stem}"
        status, seen = launched(whole, math.inf)
        if status:
            raise RuntimeError(f"two processes do not run at all: {seen}")
        run, kills = whole.with_name(f"killed_{whole.name}"), 0
        for number in range(1, 1 + ground.arguments.launched_kills):
            status, _ = launched(run, min(number, RECIPE["save_total_limit"]))
            kills += status == -signal.SIGKILL
        status, seen = launched(run, math.inf)
        return Outcome(kills, (status != 0) + weights_that_differ(run, whole), seen)

    return outcome


def two_at_once(ground: Ground) -> Outcome:
    """Two fits in one folder at the same time: one does all, the other says why it does nothing."""
    whole, tried, lost, seen = ground.whole("fit"), 3, 0, ""
    for number in range(tried):
        run = ground.folder / f"twice_{number}"
        outputs = [run.with_name(f"{run.name}_{side}.txt") for side in "ab"]
        both = [started(ground.command("fit", run), file) for file in outputs]
        for process in both:
            process.join()
        refused = [file for file, process in zip(outputs, both, strict=True) if process.exitcode]
        seen = ground.last_line(refused[0].read_text()) if refused else seen
        lost += texts_that_differ(run, whole)
    return Outcome(tried, lost, seen)


def full_disk(ground: Ground) -> Outcome | None:
    """A disk of too few bytes, which gets more afterwards; None where a person may not mount one."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        return None
    whole, seen, tried, lost = ground.whole("train"), "", 0, 0
    disk, run = ground.folder / "disk", ground.folder / "disk" / "run"
    protogen = [sys.executable, "-m", "eval_tasks.command_line", *ground.command("train", run)]
    script = (
        f'mount -t tmpfs -o size=$1 none {disk} && shift && "$@"; mount -o remount,size=1g {disk} && "$@" '
        f"> {ground.folder}/second.txt 2>&1 && cp -r {run}/model {disk}_model"
    )
    weights = whole / "model" / "model.safetensors"
    for share in (0.5, 2, 4):
        disk.mkdir(exist_ok=True)
        size = f"{int(share * weights.stat().st_size / 1024) + 8}k"
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", script, "bash", size, *protogen], capture_output=True, text=True
        )
        message = ground.last_line(done.stdout + done.stderr)
        tried, seen = tried + 1, message if message.startswith("error") else seen
        copied = ground.folder / "disk_model" / "model.safetensors"
        lost += tensors_that_differ(copied, weights) if copied.is_file() else 1
        shutil.rmtree(ground.folder / "disk_model", ignore_errors=True)
    return Outcome(tried, lost, seen)


def flipped_bits(ground: Ground) -> Outcome:
    """One bit of a bank at a time: an error that names the file, or no difference; then the repair of every file."""
    whole, lost, seen = ground.whole("fit"), 0, ""
    files = files_in(whole / "bank")
    for number in tqdm(range(ground.arguments.flips), desc="bits", unit="bit", leave=False):
        with copy_of(whole) as run:
            path = run / "bank" / files[number % len(files)]
            content = bytearray(path.read_bytes())
            content[ground.rng.randrange(len(content))] ^= 1 << ground.rng.randrange(8)
            path.write_bytes(content)
            status, message = ground.run("bank", "show", run / "bank")
            if status:
                seen = message
                lost += not message.startswith("error")
            else:
                lost += texts_that_differ(run, whole)
    for file in files:
        with copy_of(whole) as run:
            cut_in_half(run / "bank" / file)
            status, _ = ground.run(*ground.command("fit", run, "--refit_damaged", "true"))
            lost += (status != 0) + texts_that_differ(run, whole)
    return Outcome(ground.arguments.flips + len(files), lost, seen)


def cut_checkpoints(ground: Ground) -> Outcome:
    """Each file of the newest checkpoint cut in half: the run goes on from the one before."""
    whole, lost, seen = ground.whole("train"), 0, ""
    newest = checkpoints(whole)[-1]
    files = files_in(newest)
    for file in files:
        with copy_of(whole) as run:
            (run / "metrics.json").unlink()
            shutil.rmtree(run / "model")
            cut_in_half(run / newest.name / file)
            status, seen = ground.run(*ground.command("train", run))
            lost += status != 0 or weights_that_differ(run, whole) > 0
    return Outcome(len(files), lost, seen)


def exploded(ground: Ground) -> Outcome:
    """Learning rates at which weights stop being numbers: the run ends, and its checkpoints are finite."""
    rates, lost, seen = ("1e20", "1e30", "1e38"), 0, ""
    for rate in rates:
        run = ground.folder / f"rate_{rate}"
        options = ("--learning_rate", rate, "--encoder_learning_rate", rate)
        status, seen = ground.run(*ground.command("train", run, *options))
        lost += status == 0
        for file in run.glob("checkpoint-*/model.safetensors"):
            lost += any(not tensor.isfinite().all() for tensor in load_file(file).values())
    return Outcome(len(rates), lost, seen)


def damaged_models(ground: Ground) -> Outcome:
    """Each file of a model folder removed, then cut in half: an error, or the same answer."""
    model, lost, seen = ground.whole("train") / "model", 0, ""
    question = ["--dtype", "float32", "say apple bell"]

    def answer(folder: Path) -> tuple[int, str]:
        status, _ = ground.run("generate", folder, "--json", *question)
        lines = (ground.folder / "output.txt").read_text(errors="replace").splitlines()
        return status, json.loads(lines[-1])["answer"] if not status else ground.last_line("\n".join(lines))

    _, expected = answer(model)
    cases = [(file, Path.unlink) for file in files_in(model)]
    # Half of a module is a mistake in the code.
    cases += [(file, cut_in_half) for file, _ in cases if file.suffix != ".py"]
    for file, damage in cases:
        with copy_of(model) as copy:
            damage(copy / file)
            status, said = answer(copy)
            if status:
                seen = said
                lost += not said.startswith("error")
            else:
                lost += said != expected
    return Outcome(len(cases), lost, seen)


def another_decoder(ground: Ground) -> Outcome:
    """A decoder of the same shape with other weights."""
    model = ground.whole("train") / "model"
    torch.manual_seed(ground.arguments.seed)
    with copy_of(ground.folder / "world" / "decoder") as other:
        weights = load_file(other / "model.safetensors")
        noisy = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
        save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
        status, seen = ground.run("generate", model, "say apple", "--dtype", "float32", "--decoder", other)
    return Outcome(1, int(status == 0), seen)


def bad_prompts(ground: Ground) -> Outcome:
    """Files of five prompts, one of them no prompt: the other four are answered."""
    model, lost, seen = ground.whole("train") / "model", 0, ""
    rows = ('{"instruction": ', '{"instruction": ""}', '{"instruction": 5}', '{"context": "x"}', '["say apple"]')
    for row in rows:
        good = [json.dumps({"instruction": f"say {thing}"}) for thing in ("apple", "bell", "cup", "drum")]
        prompts = ground.folder / "prompts.jsonl"
        prompts.write_text("\n".join([*good[:3], row, good[3]]) + "\n")
        status, seen = ground.run("generate", model, "--file", prompts, "--json", "--dtype", "float32")
        answered = (ground.folder / "output.txt").read_text().count('"answer"')
        lost += (status == 0) + len(good) - answered
    return Outcome(len(rows), lost, seen)


FAULTS: dict[str, Callable[[Ground], Outcome | None]] = {
    "fit_killed": killed("fit"),
    "teacher_killed": killed("teacher"),
    "training_killed": killed("train"),
    "training_killed_in_two_processes": killed_processes(TWO),
    "two_fits_at_once": two_at_once,
    "disk_full": full_disk,
    "bits_of_a_bank_flipped": flipped_bits,
    "newest_checkpoint_cut": cut_checkpoints,
    "numbers_not_finite": exploded,
    "model_files_removed_or_cut": damaged_models,
    "another_decoder": another_decoder,
    "bad_line_among_prompts": bad_prompts,
}
if importlib.util.find_spec("deepspeed"):
    zero3 = str(SCRIPTS / "recipes" / "launch" / "zero3.yaml")
    FAULTS["training_killed_under_zero3"] = killed_processes(["--config_file", zero3])

"""A server under load, one-step answers beside greedy ones: throughput, latency, what is lost, memory."""

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from eval_tasks import report
from trainers.data import DataArguments, load_examples
from trainers.decoders import load_processor_of

NAME = "model"
# Blocks of one token are greedy decoding, with keys and values cached.
SETTINGS = {"one_step": {"mode": "one_step"}, "greedy": {"mode": "adaptive", "block_size": 1}}


def add_commands(commands) -> None:
    command = commands.add_parser("serve")
    command.add_argument("--model", required=True, help="folder or Hub id of a trained model")
    command.add_argument("--dtype", default="float32")
    command.add_argument("--data", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at a time")
    command.add_argument("--requests", type=int, default=256, help="one-step ones, at each concurrency")
    command.add_argument("--greedy-requests", type=int, default=128, help="at each concurrency")
    command.add_argument("--tokens", type=int, help="of an answer at most; the model's own limit by default")
    command.add_argument("--deadline-ms", type=float, default=10, help="of the server's batcher")
    command.add_argument("--memory-requests", type=int, default=5000, help="one-step ones, at the highest concurrency")
    command.add_argument("--result", default="runs/serve_load.json")
    command.set_defaults(run_command=serve)


@dataclass(frozen=True)
class Reply:
    """
    Args:
        id (`str`, *optional*): of the response; None where there was none.
        text (`str`, *optional*): the answer.
        seconds (`float`): from the request to the whole answer.
    """

    id: str | None
    text: str | None
    seconds: float


@contextmanager
def served(arguments) -> Iterator[str]:
    """`protogen serve` in a process of its own; gives the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "eval_tasks.command_line", "serve", arguments.model, "--name", NAME]
    command += ["--port", port, "--dtype", arguments.dtype, "--deadline-ms", arguments.deadline_ms]
    # Time is what is measured here; the server refuses nobody for it.
    command += ["--seconds", 3600]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start (status {process.returncode}); its errors are above.")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def scraped(client: httpx2.Client) -> dict[tuple[str, str | None], float]:
    """What the server says of itself, by name and, for counts of a histogram, its upper bound."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name.removeprefix("protogen_"), sample.labels.get("le")): sample.value for sample in samples}


def load(client: httpx2.Client, bodies: list[dict], concurrency: int, desc: str) -> tuple[list[Reply], float]:
    """Replies to requests, this many at a time, and the seconds that all took."""

    def ask(body):
        start, content = time.perf_counter(), {}
        try:
            response = client.post("/v1/completions", json=body)
            if response.is_success:
                content = response.json()
            else:
                print(f"refused with {response.status_code}: {response.text}")
        except httpx2.HTTPError as error:
            print(f"a request failed: {error!r}")
        text = content["choices"][0]["text"] if content else None
        return Reply(content.get("id"), text, time.perf_counter() - start)

    with ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        replies = list(tqdm(pool.map(ask, bodies), desc=desc, total=len(bodies)))
        return replies, time.perf_counter() - start


def faults(replies: list[Reply], num_written: float) -> dict[str, int]:
    """Requests without an answer, and answers that came twice or were written for no request."""
    ids = [reply.id for reply in replies if reply.id is not None]
    twice = len(ids) - len(set(ids)) + max(0, int(num_written) - len(replies))
    return {"lost": len(replies) - len(ids), "answered_twice": twice}


def measured(client: httpx2.Client, bodies: list[dict], concurrency: int, name: str) -> tuple[list[Reply], dict, dict]:
    """Replies, metrics and faults of one setting at one concurrency."""
    before = scraped(client)
    replies, seconds = load(client, bodies, concurrency, f"{name}, {concurrency} at a time")
    grown = {key: value - before.get(key, 0) for key, value in scraped(client).items()}
    milliseconds = [1000 * reply.seconds for reply in replies if reply.id is not None]
    if not milliseconds:
        raise RuntimeError(f"no {name} request was answered; what the server said is above.")
    setting = f"{name}_{concurrency}"
    metrics = {f"{setting}_requests_per_second": len(milliseconds) / seconds}
    metrics |= {f"{setting}_p{q}_milliseconds": float(np.percentile(milliseconds, q)) for q in (50, 95, 99)}
    num_passes = grown["pass_requests_count", None]
    metrics[f"{setting}_requests_a_pass"] = grown["pass_requests_sum", None] / num_passes
    bounds = [float(le) for (key, le), n in grown.items() if key == "pass_requests_bucket" and n == num_passes]
    metrics[f"{setting}_largest_pass_at_most"] = int(min(bounds))
    return replies, metrics, faults(replies, grown["answers_total", None])


def memory(client: httpx2.Client, bodies: list[dict], concurrency: int, parts: int = 5) -> tuple[dict, dict]:
    """Growth of the server's memory after the first part of the requests and in the last two; and faults."""
    megabytes, found = [], Counter(lost=0, answered_twice=0)
    for part in np.array_split(np.array(bodies), parts):
        _, _, part_faults = measured(client, part.tolist(), concurrency, "memory")
        megabytes.append(scraped(client)["process_resident_memory_bytes", None] / 1e6)
        found.update(part_faults)
    last = 2 * len(bodies) // parts
    metrics = {
        f"memory_growth_megabytes_{len(bodies)}_requests": megabytes[-1] - megabytes[0],
        f"memory_growth_megabytes_last_{last}_requests": megabytes[-1] - megabytes[-3],
        "memory_megabytes": megabytes[-1],
    }
    return metrics, found


def serve(arguments) -> None:
    processor = load_processor_of(arguments.model)
    examples = [e for e in load_examples(DataArguments(data=arguments.data)) if processor.fits(e.instruction)]

    def bodies(setting, number):
        limit = {} if arguments.tokens is None else {"max_tokens": arguments.tokens}
        for example in islice(cycle(examples), number):
            extension = SETTINGS[setting] | {"context": example.context}
            yield {"model": NAME, "prompt": example.instruction, "temperature": 0, "protogen": extension} | limit

    numbers = {"one_step": arguments.requests, "greedy": arguments.greedy_requests}
    metrics, found, different = {}, Counter(lost=0, answered_twice=0), 0
    # Certificates are not for plain HTTP, and take long to load.
    with (
        served(arguments) as url,
        httpx2.Client(base_url=url, timeout=None, limits=httpx2.Limits(), verify=False) as client,
    ):
        for name, number in numbers.items():
            asked = list(bodies(name, number))
            load(client, asked[:2], 1, "warm up")
            alone = None
            for concurrency in arguments.concurrency:
                replies, level, level_faults = measured(client, asked, concurrency, name)
                metrics |= level
                found.update(level_faults)
                texts = [reply.text for reply in replies]
                alone = alone or texts
                different += sum(text != own for text, own in zip(texts, alone, strict=True))
        if arguments.memory_requests:
            asked = list(bodies("one_step", arguments.memory_requests))
            growth, memory_faults = memory(client, asked, arguments.concurrency[-1])
            metrics |= growth
            found.update(memory_faults)
    metrics |= dict(found) | {"answers_different": different} | ratios(metrics, arguments.concurrency)
    content = report.result(
        command=arguments.command_line,
        model=f"{arguments.model}, {arguments.dtype}",
        revision=None,
        data=f"instructions of {arguments.data}: at each concurrency {arguments.requests} answered in one step, "
        f"{arguments.greedy_requests} greedily",
        seed=0,
        metrics=metrics,
    )
    report.write_result(arguments.result, content)


def ratios(metrics: dict[str, float], concurrency: list[int]) -> dict[str, float]:
    """Throughput at the last concurrency over that at the first, and of one step over greedy decoding."""
    first, last = concurrency[0], concurrency[-1]
    rate = {(name, n): metrics[f"{name}_{n}_requests_per_second"] for name in SETTINGS for n in (first, last)}
    return {
        f"throughput_ratio_{last}_to_{first}": rate["one_step", last] / rate["one_step", first],
        f"greedy_throughput_ratio_{last}_to_{first}": rate["greedy", last] / rate["greedy", first],
        **{f"throughput_ratio_one_step_to_greedy_{n}": rate["one_step", n] / rate["greedy", n] for n in (first, last)},
    }

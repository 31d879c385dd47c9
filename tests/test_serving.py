"""The server, asked by the `openai` package in the same process."""

import asyncio
import json
import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx2
import openai
import pytest
import torch
from conftest import INSTRUCTIONS

from eval_tasks import command_line
from eval_tasks.benchmarks import serve as serve_benchmark
from eval_tasks.commands import serve as serve_command
from eval_tasks.serving import writing
from eval_tasks.serving.api import Limits, create_app
from eval_tasks.serving.batcher import Batcher, Job
from eval_tasks.serving.running import running
from eval_tasks.serving.writing import settled
from modeling_protogen import ProtoGenProcessor

# One for all: each would read the certificates of the machine again.
HTTP = httpx2.Client(verify=False, timeout=120)
MODES = ["one_step", "refine", "adaptive", "verified"]
ASK = {"model": "tiny", "prompt": INSTRUCTIONS[0]}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": INSTRUCTIONS[0]}]}


@pytest.fixture(scope="module")
def parts(build, llama_dir):
    return build(llama_dir, decoder_sees_prompt=True)


class Gate:
    """Stands before the model: records what is written together, and holds passes while it is closed."""

    def __init__(self, server):
        self.write, self.passes, self.threads = server.batcher.write, [], set()
        self.opened = threading.Event()
        self.opened.set()
        server.batcher.write = self

    def __call__(self, jobs):
        self.passes.append([job.instructions[0] for job in jobs])
        self.threads.add(threading.current_thread().name)
        assert self.opened.wait(120)
        return self.write(jobs)


@contextmanager
def serving(parts, limits=None, api_key="any", **options):
    app = create_app(*parts, "tiny", limits or Limits(deadline_ms=1), **options)
    gate = Gate(app.state.server)
    with running(app) as url:
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=api_key, max_retries=0, http_client=httpx2.Client(verify=False)
        )
        try:
            yield SimpleNamespace(client=client, url=url, gate=gate, batcher=app.state.server.batcher, port=port(url))
        finally:
            gate.opened.set()


def port(url):
    return int(url.rpartition(":")[2])


def until(served, condition):
    """Asks the server how it is until something has happened there."""
    for _ in range(2000):
        if condition():
            return
        HTTP.get(f"{served.url}/health")
    raise AssertionError("nothing happened")


@pytest.fixture(scope="module")
def served(parts):
    with serving(parts) as served:
        yield served


def post(served, content, path="/v1/completions", **headers):
    body = content if isinstance(content, bytes) else json.dumps(content)
    return HTTP.post(served.url + path, content=body, headers={"content-type": "application/json"} | headers)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_what_generate_writes(served, parts, mode):
    model, processor = parts
    output = model.generate(**processor(INSTRUCTIONS[0]), mode=mode, return_dict_in_generate=True)
    (text,) = processor.batch_decode(output.sequences)
    extension = {"protogen": {"mode": mode}}
    completion = served.client.completions.create(**ASK, logprobs=1, extra_body=extension)
    chat = served.client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=1, extra_body=extension)
    assert completion.choices[0].text == chat.choices[0].message.content == text
    confidences = torch.tensor(completion.choices[0].logprobs.token_logprobs).exp()
    torch.testing.assert_close(confidences, output.token_confidences[0, : len(confidences)])
    assert [t.logprob for t in chat.choices[0].logprobs.content] == completion.choices[0].logprobs.token_logprobs
    assert completion.usage.completion_tokens == output.lengths.item()
    assert completion.usage.prompt_tokens == processor(INSTRUCTIONS[0])["decoder_prompt_mask"].sum()
    said = completion.choices[0].protogen
    assert said["mode"] == mode
    if mode in ("one_step", "refine"):
        assert said["uncertainty"] == pytest.approx(output.uncertainties.item(), abs=1e-4)
        assert said["predicted_length"] == pytest.approx(output.predicted_lengths.item(), abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [None, [" sky", "xyz"]])
def test_a_stream_adds_up_to_the_answer(served, mode, stop):
    options = {"extra_body": {"protogen": {"mode": mode}}, "stop": stop, "max_tokens": 6}
    whole = served.client.completions.create(**ASK, **options)
    *chunks, counts = served.client.completions.create(
        **ASK, **options, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices[0].protogen == whole.choices[0].protogen
    assert counts.usage == whole.usage
    assert mode in ("one_step", "refine") or len(chunks) > 2
    assert not stop or stop[0] not in whole.choices[0].text
    chat = served.client.chat.completions.create(**CHAT, **options, stream=True)
    first, *rest = [chunk.choices[0].delta for chunk in chat]
    assert first.role == "assistant"
    assert "".join(delta.content for delta in rest) == whole.choices[0].text


def test_a_text_is_settled_where_no_later_token_changes_it():
    assert settled("a red bi", ["bird", "i x"]) == "a red "
    assert settled("a red bird", ["bird"]) == "a red "
    assert settled("a red", ["red and"]) == "a "
    assert settled("caf\N{REPLACEMENT CHARACTER}", []) == "caf"


def test_limits_and_stop_strings_end_an_answer(served):
    verified = {"extra_body": {"protogen": {"mode": "verified"}}}
    whole = served.client.completions.create(**ASK, **verified).choices[0].text.split()
    cut = served.client.completions.create(**ASK, **verified, max_tokens=1).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[0], "length")
    stopped = served.client.completions.create(**ASK, **verified, stop=f" {whole[1]}").choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[0], "stop")


def test_the_extension_asks_for_context_length_and_abstention(served, parts):
    model, processor = parts
    inputs = processor(INSTRUCTIONS[1], "the sky was red and blue")
    (text,) = processor.batch_decode(model.generate(**inputs, length=3))
    extension = {"context": "the sky was red and blue", "length": 3}
    body = {"model": "tiny", "prompt": INSTRUCTIONS[1]}
    (choice,) = served.client.completions.create(**body, extra_body={"protogen": extension}).choices
    assert choice.text == text
    for threshold, abstains in ((2.0, False), (-1.0, True)):
        extension = {"abstain_above": threshold}
        (choice,) = served.client.completions.create(**body, extra_body={"protogen": extension}).choices
        assert choice.protogen["abstained"] is abstains
        assert (choice.text == "") is abstains


def test_choices_come_prompt_by_prompt(served):
    alone = [served.client.completions.create(model="tiny", prompt=i).choices[0].text for i in INSTRUCTIONS]
    together = served.client.completions.create(model="tiny", prompt=INSTRUCTIONS, n=2, temperature=0)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    stream = served.client.completions.create(model="tiny", prompt=INSTRUCTIONS, stream=True)
    assert {chunk.choices[0].index: chunk.choices[0].text for chunk in stream} == dict(enumerate(alone))


def test_answers_do_not_depend_on_who_shares_their_pass(parts):
    """Of many requests at once; those that differ in options do not share passes, nor do sampled ones with a seed."""
    options = [{"protogen": {"mode": mode}} for mode in MODES] + [{"temperature": 1.5, "seed": s} for s in (1, 2)]
    asked = [{"model": "tiny", "prompt": i} | body for i in INSTRUCTIONS[:2] for body in options]

    def answer(body):
        known = {name: body[name] for name in body.keys() & {"model", "prompt", "temperature", "seed"}}
        extra = {"protogen": body["protogen"]} if "protogen" in body else {}
        return served.client.completions.create(**known, extra_body=extra).choices[0].text

    with serving(parts) as served, ThreadPoolExecutor(len(asked) + 1) as pool:
        alone = list(map(answer, asked))
        assert all(len(jobs) == 1 for jobs in served.gate.passes)
        served.gate.passes.clear()
        served.gate.opened.clear()
        first = pool.submit(answer, asked[0])
        until(served, lambda: served.gate.passes)
        together = [pool.submit(answer, body) for body in asked]
        until(served, lambda: len(served.batcher.queue) == len(asked))
        served.gate.opened.set()
        assert [future.result() for future in together] == alone
        assert first.result() == alone[0]
    sizes = sorted(len(jobs) for jobs in served.gate.passes[1:])
    assert sizes == [1] * 4 + [2] * 4
    assert served.gate.threads == {"model_0"}


def test_seeds_decide_what_is_drawn(served):
    def drawn(**options):
        choices = served.client.completions.create(**ASK, n=4, temperature=2.0, max_tokens=8, **options).choices
        return [choice.text for choice in choices]

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert len(set(drawn(seed=1))) > 1
    # Nothing to draw from.
    assert len(set(drawn(seed=1, top_p=1e-6))) == 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "body"),
        (b"", 422, "body"),
        ({"model": "tiny"}, 422, "prompt"),
        (ASK | {"model": "other"}, 404, "'tiny'"),
        (ASK | {"prompt": " "}, 400, "empty"),
        (ASK | {"prompt": "cat " * 40}, 400, "shorten"),
        (ASK | {"prompt": [1, 2]}, 422, "prompt"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 422, "surrogate"),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 422, "unicode"),
        (ASK | {"tools": []}, 422, "tools is not supported"),
        (ASK | {"presence_penalty": 0.5}, 422, "presence_penalty"),
        (ASK | {"logit_bias": {"3": 1}}, 422, "logit_bias"),
        (ASK | {"temperature": -1}, 422, "temperature"),
        (ASK | {"temperature": "1"}, 422, "temperature"),
        (ASK | {"temperature": float("nan")}, 422, "temperature"),
        (ASK | {"n": 0}, 422, "n: "),
        (ASK | {"response_format": {"type": "json_object"}}, 422, "response_format"),
        (ASK | {"temperature": 1, "logprobs": 1}, 422, "temperature"),
        (ASK | {"protogen": {"mode": "best"}}, 422, "protogen.mode"),
        (ASK | {"protogen": {"block_size": 2}}, 422, "block_size is not for mode=one_step"),
        (ASK | {"protogen": {"length": 99}}, 422, "length must lie in 1..8"),
        (ASK | {"protogen": {"processor": 1}}, 422, "protogen.processor is not supported"),
        (ASK | {"n": 128, "temperature": 1, "protogen": {"num_candidates": 64}}, 422, "tokens of a pass"),
        (ASK | {"max_tokens": 10**6, "protogen": {"mode": "verified"}}, 422, "tokens of a pass"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(served, body, status, said):
    response = post(served, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (CHAT | {"max_tokens": 2, "max_completion_tokens": 3}, 422, "give one of them"),
        (CHAT | {"top_logprobs": 1}, 422, "needs logprobs"),
        (CHAT | {"messages": []}, 422, "messages"),
        (CHAT | {"messages": [{"role": "tool", "content": "a"}]}, 422, "messages.0.role"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages.0.content.0.type"),
        (CHAT | {"protogen": {"context": "the sky"}}, 400, "context"),
    ],
)
def test_chats_are_checked(served, body, status, said):
    response = post(served, body, "/v1/chat/completions")
    assert (response.status_code, said in response.json()["error"]["message"]) == (status, True)


def test_values_without_effect_are_accepted(served):
    body = ASK | {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "echo": False, "best_of": 1}
    body |= {"suffix": None, "user": "somebody", "response_format": {"type": "text"}, "top_p": 1.0, "stop": None}
    plain = served.client.completions.create(**ASK).choices[0].text
    assert post(served, body).json()["choices"][0]["text"] == plain
    parts = [{"type": "text", "text": INSTRUCTIONS[0][:5]}, {"type": "text", "text": INSTRUCTIONS[0][5:]}]
    chat = CHAT | {"messages": [{"role": "user", "content": parts}]}
    assert post(served, chat, "/v1/chat/completions").json()["choices"][0]["message"]["content"] == plain


def test_long_bodies_are_refused_whether_they_say_so_or_not(parts):
    with serving(parts, Limits(body_bytes=1000)) as served:
        for content in (b"x" * 100_000, (b"x" * 10_000 for _ in range(10))):
            headers = {"content-type": "application/json"}
            response = HTTP.post(f"{served.url}/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert "1000 bytes" in response.json()["error"]["message"]


def test_a_key_is_asked_for_where_there_is_one(parts):
    with serving(parts, key="sécret", api_key="wrong") as served:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            served.client.completions.create(**ASK)
        assert post(served, ASK).status_code == 401
        assert post(served, ASK, authorization="Bearer sécret".encode()).status_code == 200
        assert HTTP.get(f"{served.url}/health").json() == {"status": "ok"}


def test_models_and_unknown_paths(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "protogen"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    assert HTTP.get(f"{served.url}/nothing").json()["error"]["message"] == "Not Found"


def test_a_full_queue_takes_no_more_until_somebody_leaves(parts):
    with serving(parts, Limits(queue=2)) as served, ThreadPoolExecutor() as pool:
        served.gate.opened.clear()
        first = pool.submit(served.client.completions.create, **ASK)
        until(served, lambda: served.gate.passes)
        body = json.dumps(ASK | {"prompt": "where is the bird"})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", served.port)) as leaver:
            leaver.sendall(f"{head}\r\n\r\n{body}".encode())
            until(served, lambda: len(served.batcher.taken) == 2)
            with pytest.raises(openai.RateLimitError):
                served.client.completions.create(**ASK)
        until(served, lambda: len(served.batcher.taken) == 1)
        second = pool.submit(served.client.completions.create, **ASK)
        until(served, lambda: len(served.batcher.taken) == 2)
        served.gate.opened.set()
        assert first.result().choices == second.result().choices
    assert ["where is the bird"] not in served.gate.passes


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_answer_is_refused_and_those_after_it_are_not(parts, stream):
    with serving(parts, Limits(seconds=0.2)) as served:
        served.gate.opened.clear()
        late = post(served, ASK | {"stream": stream})
        assert (late.status_code, "in time" in late.json()["error"]["message"]) == (504, True)
        served.gate.opened.set()
        # Late ones on a busy machine again, but not for ever.
        until(served, lambda: post(served, ASK).status_code == 200)


def test_a_stream_ends_when_its_client_leaves(parts):
    with serving(parts, Limits(seconds=20)) as served:
        put, texts = served.batcher.put, []

        def putting(job):
            put(job)
            on_text = job.on_text
            # The first piece is sent; the next one waits until the client has left.
            job.on_text = lambda text: (on_text(text), texts.append(text), left.wait(120) if len(texts) > 1 else None)
            job.answers.add_done_callback(lambda _: left.set())

        served.batcher.put, left = putting, threading.Event()
        stream = served.client.completions.create(**ASK, stream=True, extra_body={"protogen": {"mode": "verified"}})
        next(iter(stream))
        stream.close()
        assert left.wait(120)
        assert served.client.models.list().data
    # The answer has more pieces.
    assert len(texts) <= 2


def test_what_was_taken_is_answered_before_the_server_ends(parts):
    app = create_app(*parts, "tiny")
    gate, server = Gate(app.state.server), running(app)
    served = SimpleNamespace(url=server.__enter__(), batcher=app.state.server.batcher)
    gate.opened.clear()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(post, served, ASK) for _ in range(3)]
        until(served, lambda: len(served.batcher.taken) == 3)
        ending = pool.submit(server.__exit__, None, None, None)
        address = ("127.0.0.1", port(served.url))
        with suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(address).close()
        assert not any(future.done() for future in asked)
        gate.opened.set()
        assert [future.result().status_code for future in asked] == [200] * 3
        ending.result()


def test_a_closed_server_takes_nothing(parts):
    with serving(parts) as served:
        served.batcher.is_closed = True
        with pytest.raises(openai.InternalServerError) as raised:
            served.client.completions.create(**ASK)
        assert raised.value.status_code == HTTP.get(f"{served.url}/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_said_and_logs_hold_no_text(parts, capfd, stream):
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    with serving(parts) as served:

        def fail(jobs):
            raise RuntimeError(f"cannot write {jobs[0].instructions}")

        served.gate.write = fail
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            served.client.completions.create(model="tiny", prompt="green animals", stream=stream)
        served.gate.write = parts[0]
    logged = capfd.readouterr()
    assert "RuntimeError" in logged.err
    assert "green animals" not in logged.err + logged.out


def test_browsers_may_ask_from_named_origins_only(parts, served):
    origin = {"origin": "http://page.example"}
    assert "access-control-allow-origin" not in post(served, ASK, **origin).headers
    with serving(parts, cors_origins=["http://page.example"]) as open_to_page:
        assert post(open_to_page, ASK, **origin).headers["access-control-allow-origin"] == origin["origin"]
        assert "access-control-allow-origin" not in post(open_to_page, ASK, origin="http://other.example").headers


def test_metrics_count_requests_passes_and_tokens(parts):
    with serving(parts) as served:
        written = served.client.completions.create(**ASK).usage.completion_tokens
        post(served, b"{")
        values = serve_benchmark.scraped(httpx2.Client(base_url=served.url, verify=False))
        text = HTTP.get(f"{served.url}/metrics").text
    assert values["answers_total", None] == values["pass_requests_count", None] == 1
    assert f'protogen_tokens_total{{kind="answer"}} {written:.1f}' in text
    for status in ("200", "400"):
        assert f'protogen_requests_total{{route="/v1/completions",status="{status}"}} 1.0' in text


def test_the_answers_of_a_structured_model_come_whole(parts):
    model, processor = parts
    processor = ProtoGenProcessor(
        processor.tokenizer, processor.decoder_tokenizer, max_input_length=32, answer_format="key_value_lines"
    )
    body = ASK | {"protogen": {"mode": "verified"}, "stream": True}
    with serving((model, processor)) as served:
        assert post(served, body).text.count("data: ") == 2
        assert post(served, body | {"stop": "a"}).status_code == 422


def joined(jobs, deadline=0.0, max_pass_tokens=100):
    """Which jobs a batcher writes together, by instruction, when all come at once."""
    passes = []

    def write(jobs):
        passes.append([job.instructions for job in jobs])
        return jobs

    async def main():
        batcher = Batcher(lambda job: None, write, deadline, max_pass_tokens, len(jobs))
        for job in jobs:
            batcher.put(job)
        await asyncio.gather(*(job.reading for job in jobs))
        running = asyncio.create_task(batcher.run())
        assert await asyncio.gather(*(job.answers for job in jobs)) == jobs
        await batcher.close()
        running.cancel()

    asyncio.run(main())
    return passes


def job(name, rows=1, row_tokens=10, mode="one_step", **fields):
    return Job(name, [None], 1, {"mode": mode}, rows=rows, row_tokens=row_tokens, **fields)


def test_passes_hold_what_may_share_them_up_to_a_cap_in_tokens():
    assert joined([job("a"), job("b"), job("c", mode="refine"), job("d")]) == [["a", "b", "d"], ["c"]]
    assert joined([job("a"), job("b", alone=True), job("c")]) == [["a", "c"], ["b"]]
    # Rows are padded to the longest one.
    assert joined([job("a", rows=3), job("b", row_tokens=30), job("c")]) == [["a"], ["b", "c"]]
    assert joined([job(str(n)) for n in range(12)]) == [[str(n) for n in range(10)], ["10", "11"]]


def test_a_full_pass_and_a_lone_job_do_not_wait_for_the_deadline():
    assert joined([job("a", rows=10)], deadline=3600) == [["a"]]
    assert joined([job("a", alone=True)], deadline=3600) == [["a"]]


def test_the_command_serves_a_folder(parts, tmp_path, monkeypatch, capsys):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    served = {}
    monkeypatch.setattr(serve_command.uvicorn, "run", lambda app, **options: served.update(app=app, **options))
    monkeypatch.setenv("PROTOGEN_API_KEY", "secret")
    capacity = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(capacity, raising=False)
    command_line.main(["serve", str(tmp_path), "--name", "tiny", "--port", "8123", "--queue", "7", "--seconds", "20"])
    assert (served["host"], served["port"], served["timeout_graceful_shutdown"]) == ("127.0.0.1", 8123, 21)
    assert served["app"].state.server.limits == Limits(queue=7, seconds=20.0)
    assert os.environ[capacity] == "32"
    with running(served["app"]) as url:
        assert HTTP.post(f"{url}/v1/completions", json=ASK).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert HTTP.post(f"{url}/v1/completions", json=ASK, headers=headers).json()["choices"][0]["text"]
    monkeypatch.setenv("PROTOGEN_API_KEY", "")
    with pytest.raises(SystemExit, match="PROTOGEN_API_KEY is empty"):
        command_line.main(["serve", str(tmp_path)])
    monkeypatch.setenv("PROTOGEN_API_KEY", "secret")
    monkeypatch.setenv(capacity, "64")
    command_line.main(["serve", str(tmp_path)])
    assert os.environ[capacity] == "64"


@pytest.mark.parametrize(("seconds", "times"), [(0, 3), (3600, 0)])
def test_freed_memory_is_given_back_now_and_then(parts, monkeypatch, seconds, times):
    given_back = []
    give_back = writing.give_back_memory
    monkeypatch.setattr(writing, "give_back_memory", lambda: given_back.append(give_back()))
    monkeypatch.setattr(writing, "SECONDS", seconds)
    with serving(parts) as served:
        for _ in range(3):
            served.client.completions.create(model="tiny", prompt=INSTRUCTIONS[0])
    assert len(given_back) == times


def test_the_benchmark_loses_nothing(parts, tmp_path, monkeypatch):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = [{"instruction": instruction, "response": "a"} for instruction in [*INSTRUCTIONS, "cat " * 40]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(serve_benchmark, "served", lambda arguments: running(create_app(*parts, "model")))
    arguments = ["--model", tmp_path, "--data", tmp_path / "data.jsonl", "--concurrency", 1, 4, "--requests", 8]
    arguments += ["--greedy-requests", 4, "--memory-requests", 10, "--result", tmp_path / "serve_load.json"]
    command_line.main(["bench", "serve", *map(str, arguments)])
    metrics = json.loads((tmp_path / "serve_load.json").read_text())["metrics"]
    assert metrics["lost"] == metrics["answered_twice"] == metrics["answers_different"] == 0
    assert metrics["one_step_1_requests_a_pass"] == 1
    assert 1 < metrics["one_step_4_requests_a_pass"] <= metrics["one_step_4_largest_pass_at_most"] <= 4
    assert metrics["throughput_ratio_4_to_1"] > 0
    assert metrics["greedy_4_p50_milliseconds"] <= metrics["greedy_4_p99_milliseconds"]
    assert "memory_growth_megabytes_10_requests" in metrics


def test_lost_and_doubled_answers_are_counted():
    reply = serve_benchmark.Reply
    replies = [reply("a", "x", 1.0), reply("a", "x", 1.0), reply(None, None, 1.0)]
    assert serve_benchmark.faults(replies, 3) == {"lost": 1, "answered_twice": 1}
    assert serve_benchmark.faults(replies[:1], 2) == {"lost": 0, "answered_twice": 1}

"""Requests that come at the same time are answered in one pass, by one thread."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from transformers import GenerationConfig


class QueueFull(Exception):
    """As many requests are waiting as may."""


class Closed(Exception):
    """No more requests are taken."""


@dataclass(eq=False)
class Job:
    """
    What one request asks for.

    Args:
        instructions (`list`): texts or chats.
        contexts (`list[str | None]`): one for each.
        number (`int`): answers to each.
        options (`dict`): of `generate`. Jobs with equal options may share a pass.
        config (`GenerationConfig`, *optional*): all options, the model's own among them.
        seed (`int`, *optional*): of what is drawn, in a pass of its own.
        alone (`bool`): whether the pass has to be its own.
        grows (`bool`): whether `on_text` gets the text of the single answer as it grows, in the model's thread.
    """

    instructions: list
    contexts: list[str | None]
    number: int
    options: dict
    config: GenerationConfig | None = None
    seed: int | None = None
    alone: bool = False
    grows: bool = False
    on_text: Callable[[str], None] | None = None
    # Rows of the pass, and tokens of the longest one, which others are padded to. Reading sets them.
    rows: int = 0
    row_tokens: int = 0
    prompt_tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    answers: asyncio.Future | None = None
    reading: asyncio.Task | None = None


class Batcher:
    """
    Takes jobs in an event loop and gives them to the model's thread, several together.

    The oldest job decides which options a pass has. It waits for others up to the deadline, or until no more fit; while
    the model is busy, those that come wait anyhow. Cancelling `job.answers` drops a job that has not begun.

    Args:
        read (`Callable`): gets a job and sets its size; in a thread of its own, so that no job waits for the model to
            be counted.
        write (`Callable`): gets jobs, and returns what each is answered; in the model's thread.
        deadline (`float`): seconds.
        max_pass_tokens (`int`): tokens of a pass at most, padding included.
        max_queue (`int`): jobs that are not answered yet, at most.
    """

    def __init__(
        self,
        read: Callable[[Job], None],
        write: Callable[[list[Job]], list],
        deadline: float,
        max_pass_tokens: int,
        max_queue: int,
    ):
        self.read, self.write = read, write
        self.deadline, self.max_pass_tokens, self.max_queue = deadline, max_pass_tokens, max_queue
        self.reader, self.writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "model")
        self.taken: set[Job] = set()
        self.queue: list[Job] = []
        self.arrival = asyncio.Event()
        self.is_closed = False

    def put(self, job: Job) -> None:
        """
        Takes a job, whose `answers` will have what it is answered, or why it is not.

        Raises:
            QueueFull, Closed: if it is not taken.
        """
        if self.is_closed:
            raise Closed
        if len(self.taken) >= self.max_queue:
            raise QueueFull
        job.answers = asyncio.get_running_loop().create_future()
        self.taken.add(job)
        job.answers.add_done_callback(lambda _: self.taken.discard(job))
        job.reading = asyncio.create_task(self._enqueue(job))

    async def _enqueue(self, job: Job) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self.reader, self.read, job)
        except Exception as error:
            if not job.answers.done():
                job.answers.set_exception(error)
        else:
            self.queue.append(job)
            self.arrival.set()

    async def run(self) -> None:
        """Answers jobs, for ever."""
        while True:
            await self._write(await self._next())

    async def _next(self) -> list[Job]:
        """The jobs of the next pass."""
        while True:
            self.arrival.clear()
            self.queue = [job for job in self.queue if not job.answers.done()]
            if not self.queue:
                await self.arrival.wait()
                continue
            jobs, is_full = self._joined()
            left = jobs[0].since + self.deadline - time.monotonic()
            if is_full or left <= 0:
                self.queue = [job for job in self.queue if job not in jobs]
                return jobs
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.arrival.wait(), left)

    def _joined(self) -> tuple[list[Job], bool]:
        """The oldest job and those that may share its pass, and whether there is no room for more."""
        first, *others = self.queue
        jobs, rows, longest = [first], first.rows, first.row_tokens
        if first.alone:
            return jobs, True
        for job in others:
            if job.alone or job.options != first.options:
                continue
            if (rows + job.rows) * max(longest, job.row_tokens) > self.max_pass_tokens:
                return jobs, True
            jobs.append(job)
            rows, longest = rows + job.rows, max(longest, job.row_tokens)
        return jobs, (rows + 1) * longest > self.max_pass_tokens

    async def _write(self, jobs: list[Job]) -> None:
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.writer, self.write, jobs)
            answered = list(zip(jobs, answers, strict=True))
        except Exception as error:
            answered = [(job, error) for job in jobs]
        for job, answer in answered:
            if job.answers.done():
                continue
            if isinstance(answer, Exception):
                job.answers.set_exception(answer)
            else:
                job.answers.set_result(answer)

    async def close(self) -> None:
        """Takes no more jobs, and returns when those that were taken are answered."""
        self.is_closed = True
        while self.taken:
            await asyncio.wait([job.answers for job in self.taken])
        self.reader.shutdown()
        self.writer.shutdown()

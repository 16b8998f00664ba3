"""An engine without a model, and a tokenizer of bytes: enough to drive the server through everything it does."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ziphius.ipc.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    Finish,
    FlushCache,
    FlushResult,
    FromEngine,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutput,
    ToEngine,
    TokenLogprob,
)
from ziphius.tokenizer.files import TokenizerFiles
from ziphius.tokenizer.pieces import byte_characters

IM_START, EOS = 256, 257
VOCAB_SIZE = 258
CONTEXT = 512
PAGE_SIZE = 16
REPLY = "The capital of France is Paris."

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_json() -> str:
    """Ids 0..255 are the bytes; then the two special tokens."""
    characters = byte_characters()
    special = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, text in ((IM_START, "<|im_start|>"), (EOS, "<|im_end|>"))
    ]  # fmt: skip
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": characters, "merges": []},
        }
    )


def tokenizer_files() -> TokenizerFiles:
    return TokenizerFiles(
        tokenizer_json=tokenizer_json(),
        chat_template=TEMPLATE,
        bos_token=None,
        eos_token="<|im_end|>",
        add_bos=False,
        eos_token_ids=(EOS,),
    )


@dataclass
class _Running:
    request: AddRequest
    reply: list[int]
    sent: int = 0


@dataclass
class FakeCore:
    """Generates one token a step for each running request: `reply`'s, then EOS; again and again with ignore_eos."""

    max_running: int = 32
    reply: Callable[[AddRequest], bytes] = lambda request: REPLY.encode()
    fail_after: int | None = None
    """Each request ends in an error after so many tokens."""
    tokens_per_output: int = 1
    added: list[AddRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: dict[str, _Running] = field(default_factory=dict)
    queued: dict[str, _Running] = field(default_factory=dict)
    seen_prompts: set[tuple[int, ...]] = field(default_factory=set)
    generated: int = 0
    steps: int = 0

    def take(self, message: ToEngine) -> list[FromEngine]:
        if isinstance(message, AddRequest):
            self.added.append(message)
            self.queued[message.rid] = _Running(message, self._tokens(message))
        elif isinstance(message, AbortRequest):
            self.aborted.append(message.rid)
            if self.running.pop(message.rid, None) or self.queued.pop(message.rid, None):
                end = RequestOutput(rid=message.rid, finish=Finish("abort", None, "Aborted"))
                return [StepOutput(outputs=[end]), self.stats()]
        elif isinstance(message, FlushCache):
            busy = bool(self.running or self.queued)
            if not busy:
                self.seen_prompts.clear()
            return [FlushResult(flushed=not busy, reason="requests are running" if busy else None)]
        return []

    def step(self) -> list[FromEngine]:
        while self.queued and len(self.running) < self.max_running:
            rid = next(iter(self.queued))
            self.running[rid] = self.queued.pop(rid)
        if not self.running:
            return []
        outputs = [self._advance(rid, entry) for rid, entry in list(self.running.items())]
        self.steps += 1
        return [StepOutput(outputs=outputs), self.stats()]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            queued=len(self.queued),
            pages_total=1000,
            pages_free=1000 - 10 * len(self.running),
            page_size=PAGE_SIZE,
            prompt_tokens=sum(len(r.prompt_ids) for r in self.added),
            generated_tokens=self.generated,
            steps=self.steps,
        )

    def _tokens(self, request: AddRequest) -> list[int]:
        if request.sampling.temperature > 0:
            drawn = hashlib.sha256(str(request.sampling.seed).encode()).hexdigest() * 4
            return [*drawn.encode(), EOS]
        return [*self.reply(request), EOS]

    def _advance(self, rid: str, entry: _Running) -> RequestOutput:
        sampling = entry.request.sampling
        ids: list[int] = []
        finish = None
        while finish is None and len(ids) < self.tokens_per_output:
            if self.fail_after is not None and entry.sent >= self.fail_after:
                finish = Finish("error", None, "the fake engine broke")
                break
            token = entry.reply[entry.sent % len(entry.reply)]
            ids.append(token)
            entry.sent += 1
            ends = entry.sent > sampling.min_new_tokens and (
                token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
            )
            if ends:
                finish = Finish("stop", token)
            elif entry.sent >= sampling.max_new_tokens:
                finish = Finish("length")
        self.generated += len(ids)
        if finish is not None:
            del self.running[rid]
        return self._output(rid, entry, ids, finish)

    def _output(self, rid: str, entry: _Running, ids: list[int], finish: Finish | None) -> RequestOutput:
        sampling, prompt = entry.request.sampling, entry.request.prompt_ids
        first = entry.sent == len(ids)
        prompt_logprobs: list[TokenLogprob] = []
        if first and sampling.prompt_logprobs_from >= 0:
            start = sampling.prompt_logprobs_from
            prompt_logprobs = [self._logprob(i, sampling.top_logprobs) for i in prompt[start:]]
            if start == 0:
                prompt_logprobs[0] = TokenLogprob(None, prompt[0])
        cached = len(prompt) - 1 if tuple(prompt) in self.seen_prompts else 0
        if finish is not None:
            self.seen_prompts.add(tuple(prompt))
        return RequestOutput(
            rid=rid,
            token_ids=ids,
            logprobs=[self._logprob(i, sampling.top_logprobs) for i in ids] if sampling.logprobs else [],
            prompt_logprobs=prompt_logprobs,
            cached_tokens=cached,
            finish=finish,
        )

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        return TokenLogprob(-0.5, token, [(-0.5 - i, (token + i) % VOCAB_SIZE) for i in range(top)])


def ready_message(vocab_size: int = VOCAB_SIZE, context: int = CONTEXT) -> Ready:
    return Ready(
        context_length=context,
        kv_tokens=1000 * PAGE_SIZE,
        kv_bytes_per_token=1,
        weight_bytes=1,
        load_seconds=0.1,
        device="cpu",
        vocab_size=vocab_size,
        max_running_requests=32,
    )


class FakeEngine:
    """A FakeCore behind the transport seam, in the server's own event loop."""

    def __init__(self, core: FakeCore, step_s: float) -> None:
        self.core = core
        self.step_s = step_s
        self.running = asyncio.Event()
        """Cleared: the engine says nothing and computes nothing."""
        self.running.set()
        self._messages: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def send(self, message: ToEngine) -> None:
        # As between processes: what cannot be encoded must fail here too
        message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngine)
        if isinstance(message, Shutdown):
            return
        for answer in self.core.take(message):
            self._messages.put_nowait(answer)

    async def receive(self) -> FromEngine:
        if self._task is None:
            self._task = asyncio.create_task(self._loop())
        return await self._messages.get()

    def say(self, message: FromEngine) -> None:
        self._messages.put_nowait(message)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            await self.running.wait()
            for message in self.core.step():
                self._messages.put_nowait(message)

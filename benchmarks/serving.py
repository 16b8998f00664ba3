"""Load generator for any OpenAI-compatible server: measures what a client sees.

    pip install -e '.[bench]'
    python benchmarks/serving.py --url http://127.0.0.1:30000 --concurrency 1 8 16 --prompt-tokens 41

The client is aiohttp, because it runs on the same cores as the server that it measures: with httpx in its place, 16
streams on two cores lost 20% of their speed.

Each level of concurrency (or each --rate, in requests a second with Poisson arrivals) is one run of streamed
requests. Prompts are random words that start differently, so that a prefix cache cannot help. Their length is found by
asking the server how many tokens a sample has. Times are seconds on the client's clock:

TTFT   first token: from sending the request to the first chunk with text
TPOT   time per output token after the first: (last - first) / (tokens - 1), of one request
ITL    inter-token latency: the gaps between chunks with text, over all requests
output tok/s   all output tokens (the server's own count) over the run's wall time
stream tok/s   one request's tokens / its own duration
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

try:
    import aiohttp
except ImportError:
    raise SystemExit("this needs aiohttp: pip install -e '.[bench]'") from None

WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back parent face level office door"
).split()


@dataclass(frozen=True)
class Options:
    url: str
    model: str
    api: str
    prompt_tokens: int
    output_tokens: int
    ignore_eos: bool
    api_key: str | None
    timeout_s: float


@dataclass
class Sample:
    """One request as the client saw it."""

    started: float
    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    def saw_text(self, now: float) -> None:
        if self.last is not None:
            self.gaps.append(now - self.last)
        else:
            self.first = now
        self.last = now


@dataclass(frozen=True)
class Spread:
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            nan = float("nan")
            return cls(nan, nan, nan, nan)
        ordered = sorted(values)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(statistics.fmean(ordered), statistics.median(ordered), at(0.9), at(0.99))


@dataclass(frozen=True)
class Run:
    """The result of one level."""

    concurrency: int | None
    rate: float | None
    requests: int
    failed: int
    wall_s: float
    prompt_tokens_mean: float
    output_tokens_mean: float
    output_tok_s: float
    stream_tok_s: Spread
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    errors: list[str]


def random_prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(max(1, words)))


def body_of(options: Options, prompt: str, output_tokens: int, stream: bool) -> dict[str, object]:
    body: dict[str, object] = {"model": options.model, "max_tokens": output_tokens, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    return body


def endpoint(options: Options) -> str:
    path = "/v1/chat/completions" if options.api == "chat" else "/v1/completions"
    return options.url.rstrip("/") + path


def text_of(choice: dict[str, object], api: str) -> str:
    if api == "completions":
        return str(choice.get("text") or "")
    delta = choice.get("delta")
    return str(delta.get("content") or "") if isinstance(delta, dict) else ""


async def measure(session: aiohttp.ClientSession, options: Options, prompt: str) -> Sample:
    """One streamed request. A failure is recorded, not raised: the run goes on."""
    sample = Sample(time.perf_counter())
    body = json.dumps(body_of(options, prompt, options.output_tokens, stream=True))
    try:
        async with session.post(endpoint(options), data=body) as response:
            if response.status != 200:
                sample.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return sample
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                now = time.perf_counter()
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    break
                read_event(sample, json.loads(payload), options.api, now)
    except (TimeoutError, aiohttp.ClientError, ValueError) as e:
        sample.error = f"{type(e).__name__}: {e}"
    if sample.error is None and sample.first is None:
        sample.error = "the stream ended without any text"
    return sample


def read_event(sample: Sample, event: dict[str, object], api: str, now: float) -> None:
    usage = event.get("usage")
    if isinstance(usage, dict):
        sample.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        sample.output_tokens = int(usage.get("completion_tokens") or 0)
    if "error" in event:
        sample.error = str(event["error"])[:200]
    choices = event.get("choices")
    if isinstance(choices, list) and choices and text_of(choices[0], api):
        sample.saw_text(now)


async def words_per_prompt(session: aiohttp.ClientSession, options: Options) -> int:
    """How many random words make `prompt_tokens` tokens on this server, its template included."""
    rng = random.Random(0)

    async def count(words: int) -> int:
        body = json.dumps(body_of(options, random_prompt(rng, words), 1, stream=False))
        async with session.post(endpoint(options), data=body) as response:
            if response.status != 200:
                raise SystemExit(f"{endpoint(options)}: HTTP {response.status}: {(await response.text())[:300]}")
            return int((await response.json())["usage"]["prompt_tokens"])

    few, many = 10, 110
    low, high = await count(few), await count(many)
    per_word = (high - low) / (many - few)
    overhead = low - few * per_word
    return max(1, round((options.prompt_tokens - overhead) / per_word))


async def run_level(
    session: aiohttp.ClientSession, options: Options, prompts: list[str], concurrency: int | None, rate: float | None
) -> Run:
    """All `prompts`, at most `concurrency` at a time, or arriving at `rate` a second."""
    rng = random.Random(1)
    samples: list[Sample] = []
    waiting = iter(prompts)

    async def client() -> None:
        for prompt in waiting:
            samples.append(await measure(session, options, prompt))

    started = time.perf_counter()
    if rate is None:
        await asyncio.gather(*(client() for _ in range(concurrency or 1)))
    else:
        async with asyncio.TaskGroup() as tasks:
            running = []
            for prompt in prompts:
                running.append(tasks.create_task(measure(session, options, prompt)))
                await asyncio.sleep(rng.expovariate(rate))
        samples.extend(task.result() for task in running)
    return summarize(samples, time.perf_counter() - started, concurrency, rate)


def summarize(samples: list[Sample], wall_s: float, concurrency: int | None, rate: float | None) -> Run:
    good = [s for s in samples if s.error is None]
    tokens = sum(s.output_tokens for s in good)
    tpot = [(s.last - s.first) / (s.output_tokens - 1) for s in good if s.first and s.last and s.output_tokens > 1]
    speeds = [s.output_tokens / (s.last - s.started) for s in good if s.last]
    return Run(
        concurrency=concurrency,
        rate=rate,
        requests=len(samples),
        failed=len(samples) - len(good),
        wall_s=wall_s,
        prompt_tokens_mean=statistics.fmean([s.prompt_tokens for s in good]) if good else 0.0,
        output_tokens_mean=tokens / len(good) if good else 0.0,
        output_tok_s=tokens / wall_s,
        stream_tok_s=Spread.of(speeds),
        ttft_s=Spread.of([s.first - s.started for s in good if s.first is not None]),
        tpot_s=Spread.of(tpot),
        itl_s=Spread.of([gap for s in good for gap in s.gaps]),
        errors=sorted({s.error for s in samples if s.error})[:5],
    )


def print_run(run: Run) -> None:
    level = f"{run.concurrency} clients" if run.rate is None else f"{run.rate:g} req/s"
    print(
        f"{level:>12}  {run.requests:4d} req {run.failed:3d} failed  in {run.prompt_tokens_mean:6.0f}"
        f"  out {run.output_tokens_mean:5.0f}  {run.output_tok_s:8.1f} tok/s"
        f"  TTFT {run.ttft_s.p50 * 1e3:7.0f}/{run.ttft_s.p99 * 1e3:7.0f} ms"
        f"  TPOT {run.tpot_s.p50 * 1e3:6.1f}/{run.tpot_s.p99 * 1e3:6.1f} ms"
        f"  ITL {run.itl_s.p50 * 1e3:6.1f}/{run.itl_s.p99 * 1e3:6.1f} ms",
        flush=True,
    )
    for error in run.errors:
        print(f"{'':>12}  {error}", file=sys.stderr)


async def model_of(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url.rstrip("/") + "/v1/models") as response:
        if response.status != 200:
            raise SystemExit(f"{url}/v1/models: HTTP {response.status}: {(await response.text())[:300]}")
        return str((await response.json())["data"][0]["id"])


async def benchmark(args: argparse.Namespace) -> list[Run]:
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    # A connection for each request: some servers close a kept one just when the next request goes out on it
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        model = args.model or await model_of(session, args.url)
        options = Options(
            args.url, model, args.api, args.prompt_tokens, args.output_tokens, not args.stop_at_eos, args.api_key,
            args.timeout,
        )  # fmt: skip
        words = await words_per_prompt(session, options)
        rng = random.Random(args.seed)
        levels = [(c, None) for c in args.concurrency] if args.rate is None else [(None, r) for r in args.rate]
        runs = []
        for concurrency, rate in levels:
            count = args.requests or max(4, 3 * (concurrency or 8))
            for _ in range(args.warmup):
                await measure(session, options, random_prompt(rng, words))
            prompts = [random_prompt(rng, words) for _ in range(count)]
            runs.append(await run_level(session, options, prompts, concurrency, rate))
            print_run(runs[-1])
        return runs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", help="model name in the API (default: the server's first)")
    parser.add_argument("--api", choices=("chat", "completions"), default="completions")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rate", type=float, nargs="+", help="requests a second, in place of --concurrency")
    parser.add_argument("--requests", type=int, help="requests of each level (default: 3 a client, at least 4)")
    parser.add_argument("--prompt-tokens", type=int, default=41)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--stop-at-eos", action="store_true", help="let answers end early (default: ignore_eos)")
    parser.add_argument("--warmup", type=int, default=1, help="uncounted requests before each level")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    parser.add_argument("--api-key")
    parser.add_argument("--seed", type=int, help="of the prompts (default: another each time; a cache knows no prompt)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--note", default="", help="free text kept in the JSON (what was measured)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.seed is None:
        args.seed = random.SystemRandom().getrandbits(32)
    try:
        runs = asyncio.run(benchmark(args))
    except aiohttp.ClientError as e:
        raise SystemExit(f"{args.url}: {e}") from e
    if args.json:
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "api_key")}
        report = {
            "note": args.note,
            "arguments": arguments,
            "client": {"python": platform.python_version(), "machine": platform.machine()},
            "runs": [asdict(run) for run in runs],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())

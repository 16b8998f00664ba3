"""Known failures, from what SGLang and those below it really wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziphius.launchers.diagnosis import diagnose, last_exception

DATA = Path(__file__).with_name("data")

# Recorded from SGLang 0.5.23 on a CPU, each by doing just that.
RECORDED = {
    "arch": ("architecture", "does not know the model's architecture"),
    "context": ("context too long", "--context-length 100000 is beyond what the model was made for (8192)"),
    "flag": ("argument", "SGLang does not know --frobnicate"),
    "fraction": ("no room for a cache", "Raise --mem-fraction above 0.030"),
    "hub": ("hub out of reach", "could not be reached"),
    "nomodel": ("no such model", "Check --model"),
    "notok": ("no tokenizer", "tokenizer.json"),
    "noweights": ("no weights", "has no weights"),
    "page": ("page and chunk", "multiple of --page-size"),
    "port": ("port", "Choose another --port"),
    "quant": ("quantization", "not quantized with awq"),
    "quantbad": ("argument", "argument --quantization: invalid choice: 'frob'"),
    "tp2": ("ranks on a CPU", "Use --tp 1"),
    "trunc": ("broken weights", "Fetch it again"),
}
UP = "[2026-01-01 00:00:00] The server is fired up and ready to roll!\n"

# Messages of SGLang on GPUs, CUDA, NCCL, the hub and Apptainer.
TOLD = [
    (
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
        "no room for a cache",
        "Raise --mem-fraction",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "out of memory",
        "--tp",
    ),
    (
        UP + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB.",
        "out of memory under load",
        "Lower --mem-fraction",
    ),
    (
        "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate",
        "out of memory capturing graphs",
        "Lower --mem-fraction or --cuda-graph-max-bs",
    ),
    (
        "[rank0]:[E] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=42, OpType=ALLREDUCE)",
        "NCCL timeout",
        "NCCL_SOCKET_IFNAME",
    ),
    ("torch.distributed.DistBackendError: NCCL error: ncclSystemError", "NCCL", "NCCL_DEBUG"),
    ("Fatal Python error: Bus error", "small /dev/shm", "size=16g"),
    ("OSError: [Errno 98] Address already in use", "port", "--port"),
    (
        "RuntimeError: CUDA error: Error 803: system has unsupported display driver / cuda driver combination",
        "driver too old",
        "Update the driver",
    ),
    ("RuntimeError: Error 804: forward compatibility", "driver too old", "older"),
    ("RuntimeError: No CUDA GPUs are available", "no GPU", "nvidia-smi"),
    (
        "ValueError: Weight output_partition_size = 192 is not divisible by weight quantization block_n = 128.",
        "block sizes",
        "block of 128",
    ),
    ("AssertionError: 102400 is not divisible by 3", "sizes do not divide", "ziphius plan"),
    (
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url",
        "gated model",
        "HF_TOKEN",
    ),
    (
        "AttributeError: 'ColumnParallelLinear' object has no attribute 'weight'",
        "quantization",
        "cannot run this model in that quantization",
    ),
    ("ValueError: Loading X requires you to execute the configuration file in that repo", "remote code", "trust it"),
    ("/usr/bin/python3: No module named sglang.launch_server; 'sglang' is not a package", "no SGLang", "--python"),
    ("python: Error while finding module (ModuleNotFoundError: No module named 'sglang')", "no SGLang", "image"),
    ("OSError: [Errno 30] Read-only file system: '/opt/cache'", "read-only file system", "writable"),
    ("OSError: [Errno 28] No space left on device", "disk full", "HF_HOME"),
    ("ERROR  : Failed to create user namespace: user namespace disabled", "namespaces", "administrator"),
    ("FATAL:   container creation failed: mount hook function failure", "image", "container creation failed"),
    ("Watchdog timeout (self.watchdog_timeout=300)", "watchdog", "--rank-timeout"),
    (
        "Subprocess scheduler_0 (pid=6229) crashed with exit code -9. Triggering SIGQUIT for cleanup...",
        "killed",
        "process scheduler_0 was ended by signal 9. A 9 that nobody sent is the kernel's",
    ),
    (
        "docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "docker's daemon",
        "--runtime apptainer",
    ),
    (
        "docker: permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
        "docker's daemon",
        "join its group",
    ),
    (
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
        "docker without GPUs",
        "container toolkit",
    ),
    (
        "docker: Error response from daemon: manifest for a/b:c not found: manifest unknown.",
        "docker",
        "manifest unknown. Check --image",
    ),
    ("Scheduler or DataParallelController 21333 terminated with 0", "machine 0 ended", "on every machine"),
    (UP + "Health check failed. Server couldn't get a response from detokenizer for", "health", "prefill"),
]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    trouble, words = RECORDED[name]
    found = diagnose((DATA / f"{name}.txt").read_text())
    assert found is not None
    assert found.trouble == trouble
    assert words in str(found)


@pytest.mark.parametrize(("text", "trouble", "words"), TOLD)
def test_told(text: str, trouble: str, words: str) -> None:
    found = diagnose(f"[2026-01-01 00:00:00 TP0] Load weight begin. avail mem=138.00 GB\n{text}\n")
    assert found is not None
    assert found.trouble == trouble
    assert words in str(found)


def test_each_is_one_sentence_of_cause_and_one_of_remedy() -> None:
    for name in RECORDED:
        found = diagnose((DATA / f"{name}.txt").read_text())
        assert found is not None
        for sentence in (found.cause, found.remedy):
            assert sentence.endswith(".")
            assert "{" not in sentence
            assert "\n" not in sentence


def test_a_good_start_has_no_trouble() -> None:
    assert diagnose((DATA / "start.txt").read_text()) is None


def test_the_first_failure_outranks_what_follows_from_it() -> None:
    text = "torch.OutOfMemoryError: CUDA out of memory.\nWatchdog caught collective operation timeout\n"
    found = diagnose(text)
    assert found is not None
    assert found.trouble == "out of memory"


def test_a_setting_that_reads_like_a_trouble_is_none() -> None:
    assert diagnose("[2026-01-01 00:00:00] server_args={'chat_template': 'CUDA out of memory'}") is None


def test_an_unknown_failure_is_told_by_its_exception() -> None:
    text = 'Traceback (most recent call last):\n  File "x", line 1\nmy.module.OddError: never seen\n\nReceived sigquit'
    assert diagnose(text) is None
    assert last_exception(text) == "my.module.OddError: never seen"
    assert last_exception("nothing") is None


@pytest.mark.parametrize("answer", ['"GET /health HTTP/1.1" 200 OK', '"POST /v1/chat/completions HTTP/1.1" 200 OK'])
def test_what_a_server_outlived_is_not_why_it_ended(answer: str) -> None:
    """As of a server that was killed much later: its log ends without a word."""
    odd = "Traceback (most recent call last):\nrequests.exceptions.ConnectionError: connection refused\n"
    health = "Health check failed. Server couldn't get a response from detokenizer for 20 s\n"
    answered = f"[2026-01-01 00:00:02] INFO:     127.0.0.1:5 - {answer}\n"
    assert last_exception(odd + UP) is None
    assert last_exception(UP + odd + answered) is None
    assert diagnose(UP + health + answered) is None
    later = diagnose(UP + health + answered + "torch.OutOfMemoryError: CUDA out of memory.\n")
    assert later is not None
    assert later.trouble == "out of memory under load"
    # These are answered by a server that cannot compute any more.
    assert last_exception(UP + odd + answered.replace("/health", "/metrics/").replace("POST", "GET")) is not None


def test_a_call_that_sglang_does_without_is_not_why_it_ended() -> None:
    """With few log lines nothing tells that the server was up after it."""
    refused = "[Errno 111] Connection refused"
    call = f"Max retries exceeded with url: /freeze_gc (Caused by NewConnectionError('{refused}'))"
    log = (
        "[2026-01-01 00:00:00] post-warmup freeze_gc failed\nTraceback (most recent call last):\n"
        f"ConnectionRefusedError: {refused}\nurllib3.exceptions.NewConnectionError: {refused}\n"
        "[2026-01-01 00:00:00] No space left on device\n"
        f"urllib3.exceptions.MaxRetryError: {call}\nrequests.exceptions.ConnectionError: {call}\n"
    )
    assert last_exception(log) is None
    assert last_exception(log + "my.module.OddError: never seen\n") == "my.module.OddError: never seen"
    assert last_exception("my.module.OddError: never seen\n" + log) == "my.module.OddError: never seen"
    found = diagnose(log)
    assert found is not None
    assert found.trouble == "disk full", "what others wrote between its lines counts"

"""Known failures of SGLang: each gives one sentence of cause and one of remedy for log lines.

The patterns are SGLang's own messages (0.5.16, 0.5.23), those of CUDA, NCCL, PyTorch and the hub that it passes on, and
those of the container that it runs in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ziphius.launchers.sglang_log import FIRED_UP, STAMP, lines_of


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What went wrong, and what to do: one sentence each."""

    trouble: str
    """A short name."""
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}"


@dataclass(frozen=True, slots=True)
class Trouble:
    """`pattern`'s groups fill {1}, {2} in the sentences. `when`: only before, or only after, the server was up."""

    name: str
    pattern: str
    cause: str
    remedy: str
    when: str = ""


_OUT_OF_MEMORY = r"torch\.(?:cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA error: out of memory"
_UP, _START = "up", "start"
# The first pattern that matches any line counts, so precise patterns come before general ones.
_TROUBLES = (
    Trouble("no room for a cache", r"leave no GPU memory for the KV cache under --mem-fraction-static=([\d.]+)\. Raise "
            r"--mem-fraction-static above ([\d.]+)",
            "The weights fill the share of memory that SGLang may use ({1}), so no KV cache is left.",
            "Raise --mem-fraction above {2}, or spread the model over more GPUs with --tp."),
    Trouble("no room for a cache", r"Not enough memory\. Please try to increase --mem-fraction-static",
            "The weights fill the share of memory that SGLang may use, so no KV cache is left.",
            "Raise --mem-fraction (the weights are what they are), or spread the model over more GPUs with --tp."),
    Trouble("out of memory capturing graphs", r"Capture cuda graph failed.*out of memory|Capture CUDA graph failed",
            "Memory ran out while CUDA graphs were captured.",
            "Lower --mem-fraction or --cuda-graph-max-bs.", _START),
    Trouble("out of memory under load", _OUT_OF_MEMORY,
            "Memory ran out while requests were computed: the KV cache leaves too little for a step.",
            "Lower --mem-fraction, --chunked-prefill-size or --cuda-graph-max-bs.", _UP),
    Trouble("out of memory", _OUT_OF_MEMORY,
            "Memory ran out while the model was loaded or warmed up.",
            "If other programs hold the GPUs (`ziphius doctor` tells), end them; if not, use more GPUs with --tp, "
            "fewer bits with --weights-format fp8, or, when the weights had been loaded, a lower --mem-fraction."),
    Trouble("cache too small under load", r"(?:Prefill|Decode) out of memory\. Try to lower your batch size",
            "The KV cache had no room for a step of the running requests.",
            "Lower --max-running-requests or --chunked-prefill-size.", _UP),
    Trouble("small /dev/shm", r"[Bb]us error|SIGBUS|No space left on device.*/dev/shm|"
            r"Error while creating shared memory",
            "A rank died on a bus error: /dev/shm is full or too small.",
            "Give it some GiB (`mount -o remount,size=16g /dev/shm`; docker: --ipc host); Apptainer uses the "
            "host's."),
    Trouble("NCCL timeout", r"(?:Watchdog caught collective operation timeout|NCCL watchdog|ncclRemoteError|"
            r"NCCL error.*remote process)",
            "A rank waited in vain for another in NCCL: one hangs, died, or cannot be reached.",
            "Look for the first error of the other ranks; with several machines set NCCL_SOCKET_IFNAME to the network "
            "they share, and NCCL_DEBUG=INFO to hear more."),
    Trouble("NCCL", r"(?:ncclSystemError|ncclUnhandledCudaError|ncclInternalError|NCCL error)",
            "NCCL could not connect the GPUs.",
            "Set NCCL_DEBUG=INFO to hear why; a second server on this machine needs a port of its own "
            "(-- --nccl-port N)."),
    Trouble("port", r"address already in use|Address already in use|EADDRINUSE",
            "A port that SGLang wants is taken: --port, or one that its ranks meet on.",
            "Choose another --port, or with a second server here -- --nccl-port N."),
    Trouble("driver too old", r"(?:Error 80[34]\b|system has unsupported display driver / cuda driver combination|"
            r"forward compatibility was attempted on non supported HW|CUDA driver version is insufficient|"
            r"NVIDIA driver on your system is too old)",
            "This SGLang is built for a newer CUDA than the driver here offers.",
            "Update the driver, or build an image of an older SGLang (`ziphius image build --from docker://lmsysorg/sglang:TAG`)."),
    Trouble("no GPU", r"(?:No CUDA GPUs are available|no CUDA-capable device is detected|Found no NVIDIA driver)",
            "SGLang sees no GPU.",
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES here (an image gets the driver's libraries from the host)."),
    Trouble("block sizes", r"not divisible by weight quantization block_([nk])\s*=\s*(\d+)",
            "Split over so many ranks, a matrix of this block-quantized model is no multiple of its block of {2}.",
            "Use a smaller --tp, or a checkpoint without blocks (`ziphius plan` lists the sizes that divide)."),
    Trouble("sizes do not divide", r"(\d+) is not divisible by (\d+)|not divisible by (?:tp|tensor)",
            "A dimension of the model does not divide by the number of ranks.",
            "Use another --tp: `ziphius plan` lists the sizes that divide, dimension by dimension."),
    Trouble("context too long", r"User-specified context_length \((\d+)\) is greater than the derived "
            r"context_length \((\d+)\)",
            "--context-length {1} is beyond what the model was made for ({2}).",
            "Ask for at most {2}."),
    Trouble("gated model", r"(?:gated repo|GatedRepoError|Access to model .* is restricted|403 Client Error|"
            r"401 Client Error)",
            "The hub refuses this model without a permission.",
            "Accept its terms on its page, and set HF_TOKEN to a token of that account."),
    Trouble("no such model", r"Repo id must be in the form|RepositoryNotFoundError|"
            r"is not a local folder and is not a valid model",
            "There is no such folder, and no such model on the hub.",
            "Check --model (and, in an image, that its folder is not a link to one that is not there)."),
    Trouble("hub out of reach", r"couldn't connect to '?https?://huggingface|LocalEntryNotFoundError|"
            r"Cannot find the requested files in the (?:disk|local) cache",
            "The hub could not be reached, and the model is not in the cache.",
            "Fetch it where there is a network (`ziphius pull MODEL`), or give its folder with --model."),
    Trouble("no weights", r"Cannot find any model weights with|No such file or directory: .*\.safetensors",
            "The model's folder has no weights.",
            "Give the folder that holds the .safetensors files."),
    Trouble("broken weights", r"(?:Error while deserializing header|MetadataIncompleteBuffer|SafetensorError|"
            r"InvalidHeaderDeserialization)",
            "A weights file is cut short or damaged.",
            "Fetch it again, and compare its size with the hub's."),
    Trouble("no tokenizer", r"(?:Couldn't instantiate the backend tokenizer|Can't load tokenizer for|"
            r"Unable to load vocabulary)",
            "The model's folder has no tokenizer that can be used.",
            "Put tokenizer.json and tokenizer_config.json beside the weights."),
    Trouble("quantization", r"Cannot find the config file for (\w+)",
            "The checkpoint is not quantized with {1}.",
            "Drop the quantization, or use a checkpoint that was made with it."),
    Trouble("quantization", r"Unknown quantization method|[Qq]uantization method .* is not supported|"
            r"object has no attribute 'weight'",
            "This SGLang cannot run this model in that quantization.",
            "Use the unquantized checkpoint or one in fp8 (`ziphius plan` tells what fits)."),
    Trouble("architecture", r"Model architectures \[?'?([^'\]]+)'?\]? (?:are|failed|is) not supported|"
            r"Cannot find model module\. '([^']+)'|has no SGLang implementation",
            "This SGLang does not know the model's architecture.",
            "Check config.json, or use a newer SGLang."),
    Trouble("remote code", r"trust_remote_code=True|requires you to execute the configuration file",
            "The model brings code of its own, which nobody has allowed to run.",
            "Read that code, and if you trust it add -- --trust-remote-code."),
    Trouble("ranks on a CPU", r"SGLANG_CPU_OMP_THREADS_BIND is not set",
            "On a CPU, SGLang wants no more ranks than the machine has memory nodes.",
            "Use --tp 1, or name each rank's cores in SGLANG_CPU_OMP_THREADS_BIND."),
    Trouble("page and chunk", r"chunked_prefill_size must be divisible by page_size",
            "The prefill chunk is no multiple of a page.",
            "Make --chunked-prefill-size a multiple of --page-size."),
    Trouble("argument", r"(argument --[\w-]+: invalid choice: '[^']*')",
            "SGLang refuses an argument: {1}.",
            "Its own list: python3 -m sglang.launch_server --help."),
    Trouble("argument", r"error: unrecognized arguments: (.*)",
            "SGLang does not know {1}.",
            "Check what stands after `--`; its own list: python3 -m sglang.launch_server --help."),
    Trouble("argument", r"sglang serve: error: (.*)|launch_server\.py: error: (.*)",
            "SGLang refuses an argument: {1}.",
            "Check what stands after `--`."),
    Trouble("no SGLang", r"No module named '?sglang(?:\.launch_server)?'?(?:[;)\s]|$)",
            "That Python has no SGLang.",
            "Name one that has with --python, or use an image."),
    Trouble("CPU build", r"No module named '?(sgl_kernel|torchvision|triton)'?",
            "SGLang's Python lacks {1}.",
            "Install SGLang with what it needs, or use an image."),
    Trouble("read-only file system", r"Read-only file system: '?([^'\s]+)",
            "Something wants to write {1} in the image, which is read-only.",
            "Point the variable that names that folder to a writable one in the environment."),
    Trouble("disk full", r"No space left on device",
            "A disk is full.",
            "Free some; what SGLang compiles and fetches goes to --cache-dir and HF_HOME."),
    Trouble("too many files", r"Too many open files",
            "SGLang may not open as many files as it wants.",
            "Raise the limit (`ulimit -n 65535`) before the start."),
    Trouble("namespaces", r"Failed to create user namespace|(?:not|isn't) allowed to (?:create|use) user namespaces",
            "Apptainer may not make a user namespace on this machine.",
            "Ask its administrator for user namespaces (user.max_user_namespaces) or for Apptainer's setuid part."),
    Trouble("docker's daemon", r"connect to the (?:Docker daemon|docker API)",
            "Docker's daemon cannot be reached by this user.",
            "Start it or join its group, or use --runtime apptainer, which needs neither."),
    Trouble("docker without GPUs", r"could not select device driver .*\[\[gpu\]\]",
            "Docker cannot hand GPUs to a container.",
            "Install NVIDIA's container toolkit, or use --runtime apptainer, which does without."),
    Trouble("docker", r"docker: (?:Error response from daemon: )?(.*)",
            "Docker could not run the image: {1}.",
            "Check --image, and that `docker pull` gets it."),
    Trouble("image", r"FATAL:\s+(.*)",
            "Apptainer could not run the image: {1}.",
            "`ziphius image info` tells whether the image is whole."),
    Trouble("machine 0 ended", r"Scheduler or DataParallelController \d+ terminated with 0\b",
            "The server ended on machine 0, and with it the ranks of this one.",
            "Start it on every machine again."),
    Trouble("watchdog", r"Watchdog timeout|self\.watchdog_timeout|Scheduler watchdog timeout",
            "A step took longer than SGLang's watchdog allows.",
            "If it was slow rather than stuck, raise --rank-timeout."),
    Trouble("health", r"Health check failed\. Server couldn't get a response from detokenizer",
            "A health check got no token within its limit: a long prefill, or a rank that hangs.",
            "Look whether tokens are still generated; lower --chunked-prefill-size if prefills take that long.", _UP),
    Trouble("killed", r"Subprocess (\w+) \(pid=\d+\) crashed with exit code -(\d+)",
            "SGLang's process {1} was ended by signal {2}.",
            "A 9 that nobody sent is the kernel's, when main memory runs out (see dmesg); other numbers are crashes, "
            "which the lines before tell more of."),
)  # fmt: skip
_ERROR = re.compile(r"^(?:\w+\.)*(?:\w*(?:Error|Exception|Interrupt|Exit)): .+")
_NOT_TOLD = re.compile(r"^(?:\[[^\]]*\] )?(?:server_args=|usage:|Ignore import error)")
_FREEZE, _FREEZE_FAILED = "/freeze_gc", "freeze_gc failed"
# The server is up once it has computed a token.
_ANSWERED = re.compile(r'"(?:POST /\S*|GET /health(?:_generate)?) HTTP/[\d.]+" 200')


def diagnose(text: str) -> Diagnosis | None:
    """The trouble that ended a server, found in its log. None when the log shows no known trouble.

    A trouble before an answered request does not count, because the server survived it.
    """
    lines = [line for line in _telling(text) if not _NOT_TOLD.match(line)]
    answered = _after_last(lines, _ANSWERED.search)
    up = next((number for number, line in enumerate(lines) if FIRED_UP in line), len(lines))
    lines, up = lines[answered:], max(0, up - answered)
    for trouble in _TROUBLES:
        part = lines[up:] if trouble.when == _UP else lines[:up] if trouble.when == _START else lines
        pattern = re.compile(trouble.pattern)
        for line in part:
            if match := pattern.search(line):
                return _told(trouble, match)
    return None


def last_exception(text: str) -> str | None:
    """The last exception's line, for a failure that matches no known trouble. None when the server survived it."""
    lines = _telling(text)
    alive = _after_last(lines, lambda line: FIRED_UP in line or _ANSWERED.search(line))
    found = [line for line in lines[alive:] if _ERROR.match(line) and not line.startswith("KeyboardInterrupt")]
    return found[-1] if found else None


def _telling(text: str) -> list[str]:
    """The lines without the exceptions of /freeze_gc, which SGLang calls itself and which may fail."""
    lines = lines_of(text)
    said = [number for number, line in enumerate(lines) if _FREEZE in line and _ERROR.match(line)]
    if not said:
        return lines
    # The first exceptions of the chain are about a connection and do not name the call.
    begin = next((number for number, line in enumerate(lines[: said[0]]) if _FREEZE_FAILED in line), said[0])
    return [line for number, line in enumerate(lines) if not begin <= number <= said[-1] or STAMP.match(line)]


def _after_last(lines: list[str], says: Callable[[str], object]) -> int:
    """The number of the line after the last one for which `says` is true; 0 when there is none."""
    return next((number for number in range(len(lines), 0, -1) if says(lines[number - 1])), 0)


def _told(trouble: Trouble, match: re.Match[str]) -> Diagnosis:
    groups = [match[0], *[group for group in match.groups() if group is not None]]
    words = [group.strip().rstrip(".") for group in groups] + [""] * 2
    return Diagnosis(trouble.name, trouble.cause.format(*words), trouble.remedy.format(*words))

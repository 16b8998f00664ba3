"""The exact commands: apptainer, docker, local; what is mounted, what the environment is, that secrets stay off."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ziphius.config import Resolved, resolve
from ziphius.errors import ConfigError, DoesNotFit
from ziphius.launchers.apptainer import mount_option
from ziphius.launchers.command_line import command_line
from ziphius.launchers.engines import engine_launcher, with_absolute_paths
from ziphius.launchers.launcher import Launch
from ziphius.launchers.runtime import Mount, needed_folders
from ziphius.planner.hardware import Host, parse_gpus

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET = "hf_secretsecret"
ENV = {"PATH": "/nowhere", "HOME": "/home/me", "HF_TOKEN": SECRET, "HF_HOME": "/data/hf",
       "LD_LIBRARY_PATH": "/opt/cuda", "CUDA_HOME": "/opt/cuda",
       "CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": "/mine", "ZIPHIUS_API_KEY": "the-key",
       "NCCL_DEBUG": 'a "b", {"c": "$HOME"}'}  # fmt: skip


def deepseek(tmp_path: Path) -> Path:
    data = Path(__file__).parents[1] / "planner" / "data" / "deepseek-v2.5-1210.json"
    folder = tmp_path / "DeepSeek-V2.5-1210"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(data.read_text())
    return folder


def resolved(tmp_path: Path, **flags: Any) -> Resolved:
    given = {"engine": "sglang", "model": str(deepseek(tmp_path)), "tp": 4, **flags}
    return resolve(given, env={})


def launched(made: Resolved, env: Mapping[str, str] = ENV, host: Host | None = None, force: bool = False) -> Launch:
    return engine_launcher(force=force, show_for=host or parse_gpus("4xH200"))(with_absolute_paths(made), env)


def test_apptainer_on_four_h200(tmp_path: Path) -> None:
    made = resolved(
        tmp_path, runtime="apptainer", image="/images/sglang.sif", api_key="the-key", cache_dir="/local/jit"
    )
    launch = launched(made, {**ENV, "ZIPHIUS_HOME": str(tmp_path / "home")})
    model = str(tmp_path / "DeepSeek-V2.5-1210")
    key = str(tmp_path / "home/instances/default/sglang.yaml")
    places = sorted([("/data/hf/hub", ""), ("/local/jit", ""), (model, ",ro"), (key, ",ro")])
    mounts = [f"type=bind,source={path},destination={path}{ro}" for path, ro in places]
    assert list(launch.argv) == [
        "apptainer", "exec", "--pid", "--nv", "--cleanenv", "--no-eval", "--no-mount", "cwd", "--pwd", "/",
        "--home", "/local/jit/home",
        *[word for mount in mounts for word in ("--mount", mount)],
        "/images/sglang.sif", "python3", "-m", "sglang.launch_server",
        "--model-path", model, "--served-model-name", "DeepSeek-V2.5-1210", "--host", "127.0.0.1", "--port", "30000",
        "--max-queued-requests", "512", "--enable-metrics", "--tp-size", "4", "--mem-fraction-static", "0.9",
        "--trust-remote-code", "--config", key,
    ]  # fmt: skip
    assert launch.predicted_kv_tokens is not None
    assert 200_000 < launch.predicted_kv_tokens < 225_000
    assert [file.told for file in launch.files] == ["api-key: ********"]
    assert msgspec.json.decode(launch.files[0].text) == {"api-key": "the-key"}


def test_each_node_has_its_own_file_for_the_key(tmp_path: Path) -> None:
    """They share the folder, start at once, and a file that another one replaces is gone for who has mounted it."""
    nodes = {"nnodes": 2, "tp": 8, "dist_init_addr": "a:1", "runtime": "apptainer", "api_key": "the-key"}
    launches = [launched(resolved(tmp_path, node_rank=rank, **nodes)) for rank in (0, 1)]
    assert len({launch.files[0].path for launch in launches}) == 2


def test_the_environment_in_an_image(tmp_path: Path) -> None:
    launch = launched(resolved(tmp_path, runtime="apptainer", cache_dir="/local/jit"))
    inside = {k.removeprefix("APPTAINERENV_"): v for k, v in launch.env.items() if k.startswith("APPTAINERENV_")}
    assert inside["HF_TOKEN"] == SECRET
    assert inside["NCCL_DEBUG"] == ENV["NCCL_DEBUG"]
    assert inside["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert inside["HF_HUB_CACHE"] == "/data/hf/hub"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "FLASHINFER_WORKSPACE_BASE",
                 "DG_JIT_CACHE_DIR"):  # fmt: skip
        assert inside[name].startswith("/local/jit/")
    for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_HOME", "HF_HOME", "ZIPHIUS_API_KEY", "HOME"):
        assert name not in inside
    assert not any(SECRET in word for word in launch.argv)
    assert "ZIPHIUS_API_KEY" not in launch.env
    assert set(launch.marks) == {"ZIPHIUS_RUN_ID", "APPTAINERENV_ZIPHIUS_RUN_ID"}


def test_docker(tmp_path: Path) -> None:
    launch = launched(resolved(tmp_path, runtime="docker", name="one"))
    words = list(launch.argv)
    assert words[:5] == ["docker", "run", "--rm", "--name", "ziphius-one"]
    assert words[words.index("--gpus") + 1] == "all"
    assert words[words.index("--network") + 1] == "host"
    assert "HF_TOKEN" in [words[i + 1] for i, word in enumerate(words) if word == "--env"]
    assert not any(SECRET in word for word in words)
    assert launch.env["HF_TOKEN"] == SECRET
    image = words.index("lmsysorg/sglang:v0.5.23")
    assert words[image - 2 : image] == ["--entrypoint", "python3"]
    assert words[image + 1 : image + 3] == ["-m", "sglang.launch_server"]
    assert launch.cleanup == ("docker", "rm", "--force", "ziphius-one")


def test_a_cpu_gets_no_gpu_flags(tmp_path: Path) -> None:
    made = resolved(tmp_path, runtime="apptainer", device="cpu", tp=1)
    assert "--nv" not in launched(made, host=Host(memory_available_mib=10**7), force=True).argv


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("/a", "type=bind,source=/a,destination=/a,ro"),
        ("/a b:c", "type=bind,source=/a b:c,destination=/a b:c,ro"),
        ("/a,b", 'type=bind,"source=/a,b","destination=/a,b",ro'),
        ('/a"b', 'type=bind,"source=/a""b","destination=/a""b",ro'),
    ],
)
def test_mounts_of_odd_paths(path: str, option: str) -> None:
    assert mount_option(Mount(Path(path))) == option


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    assert needed_folders(str(snapshot)) == (blobs, snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert snapshot in needed_folders(str(tmp_path / "link"))


def test_a_plan_that_says_no_refuses_and_force_does_not(tmp_path: Path) -> None:
    made = resolved(tmp_path, runtime="docker", tp=2)
    with pytest.raises(DoesNotFit, match=r"does not fit here.*--force"):
        launched(made)
    launch = launched(made, force=True)
    assert "although" in launch.notes[0]
    assert "--mem-fraction-static" not in launch.argv


def test_a_model_that_the_planner_does_not_know_is_started_without_a_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    launch = launched(resolved(tmp_path, runtime="docker", model=str(tmp_path)))
    assert "without a plan" in launch.notes[0]
    assert launch.predicted_kv_tokens is None


def test_two_machines_have_their_gpus_together(tmp_path: Path) -> None:
    made = resolved(tmp_path, runtime="docker", tp=8, nnodes=2, node_rank=1, dist_init_addr="a:1")
    assert "--nnodes" in launched(made).argv
    with pytest.raises(DoesNotFit):
        launched(resolved(tmp_path, runtime="docker", tp=8))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"runtime": "apptainer", "python": "/usr/bin/python3"}, "--python is for --runtime local"),
        ({"runtime": "local", "image": "x.sif"}, "--image is for"),
        ({"engine": "native", "image": "x.sif"}, "--image is for --engine sglang"),
        ({"engine": "native", "engine_args": "--x"}, "is for --engine sglang"),
        ({"engine": "native", "weights_format": "fp8"}, "is for --engine sglang"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        launched(resolved(tmp_path, **flags))


def test_what_is_not_there_is_told_before_a_start(tmp_path: Path) -> None:
    start = engine_launcher()
    with pytest.raises(ConfigError, match="apptainer is not installed"):
        start(resolved(tmp_path, runtime="apptainer"), ENV)
    with pytest.raises(ConfigError, match="docker is not installed"):
        start(resolved(tmp_path, runtime="docker"), ENV)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "bin/apptainer").chmod(0o755)
    with pytest.raises(ConfigError, match=r"no image /no\.sif.*image build"):
        start(resolved(tmp_path, runtime="apptainer", image="/no.sif"), {**ENV, "PATH": str(tmp_path / "bin")})


def test_auto_takes_an_image_where_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launched(resolved(tmp_path)).argv[0] == sys.executable
    (tmp_path / "sglang.sif").touch()
    argv = launched(resolved(tmp_path)).argv
    assert argv[0] == "apptainer"
    assert str(tmp_path / "sglang.sif") in argv
    assert launched(resolved(tmp_path, python=sys.executable)).argv[0] == sys.executable


class TestCommandLine:
    def test_a_shell_reads_it_as_it_was(self, tmp_path: Path) -> None:
        launch = launched(resolved(tmp_path, runtime="apptainer", engine_args="--x 'a b' '$HOME' '{\"a\": \"`b`\"}'"))
        line = command_line(launch, ENV).splitlines()[-1]
        words = shlex.split(line)
        start = words.index("apptainer")
        assert tuple(words[start:]) == launch.argv
        assert f"APPTAINERENV_NCCL_DEBUG={ENV['NCCL_DEBUG']}" in words[:start]

    def test_secrets_are_masked_and_still_arrive(self, tmp_path: Path) -> None:
        launch = launched(resolved(tmp_path, runtime="apptainer", api_key="the-key"))
        text = command_line(launch, ENV)
        assert SECRET not in text
        assert "the-key" not in text
        assert 'APPTAINERENV_HF_TOKEN="$HF_TOKEN"' in text
        shown = text.splitlines()[-1].split(" apptainer exec")[0]
        done = subprocess.run(
            ["/bin/sh", "-c", f"{shown} /usr/bin/env"], env=ENV, capture_output=True, text=True, check=True
        )
        assert f"APPTAINERENV_HF_TOKEN={SECRET}" in done.stdout

    def test_a_proxys_password(self, tmp_path: Path) -> None:
        env = {**ENV, "HTTPS_PROXY": "http://me:word@proxy:3128"}
        assert "word@" not in command_line(launched(resolved(tmp_path, runtime="apptainer"), env), env)


def test_the_command_in_the_docs_is_what_a_dry_run_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1000)
    (tmp_path / "me").mkdir()
    monkeypatch.chdir(tmp_path / "me")
    env = {"PATH": "/nowhere", "HOME": "/home/me", "HF_TOKEN": SECRET}
    printed = command_line(launched(resolved(tmp_path, runtime="apptainer"), env), env)
    printed = printed.replace(f"{tmp_path}/me/", "/home/me/").replace(str(tmp_path), "/models")
    docs = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
    block = docs.partition("word by word\n")[2].split("```\n")[1]
    assert re.sub(r" \\\n *", " ", block).strip() == printed

"""Two hosts of one run: what must be the same on both is compared before anything is written."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.agreement import compare_ranks
from engine.policy import weights_fingerprint
from hicodet import InputError

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_hosts(folder, out, *second: str) -> tuple[list[int], str]:
    """Exit codes and stderr of an SFT on two nodes, where the second has these flags besides."""
    port = free_port()
    options = f"--model {folder}/model --data {folder}/data --traces {folder}/traces.jsonl"
    options += f" --out {out} --no-task-description --workers 0 --max-steps 1 --untraced skip"

    def host(number: int) -> subprocess.CompletedProcess:
        torchrun = f"--nnodes 2 --node_rank {number} --nproc_per_node 1 --master_port {port}"
        line = ["-m", "torch.distributed.run", *torchrun.split(), "--master_addr", "127.0.0.1"]
        line += ["hoi_r1.py", "sft", *options.split(), *(second if number else ())]
        return subprocess.run(
            [sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip

    with ThreadPoolExecutor(2) as hosts:
        done = list(hosts.map(host, (0, 1)))
    return [one.returncode for one in done], "".join(one.stderr for one in done)


def refusal(codes_and_errors: tuple[list[int], str]) -> str:
    """The one line that two hosts print which do not agree."""
    codes, errors = codes_and_errors
    assert codes == [1, 1], errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_two_hosts_that_agree_train(folder, tmp_path):
    codes, errors = two_hosts(folder, tmp_path / "run")
    assert codes == [0, 0], errors
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["weights"] == weights_fingerprint(str(folder / "model"))
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
def test_another_option_ends_both(folder, tmp_path):
    line = refusal(two_hosts(folder, tmp_path / "run", "--learning-rate", "0.5"))
    assert "--learning-rate 1e-06 on rank 0" in line and "--learning-rate 0.5 on rank 1" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.slow
def test_another_folder_ends_both(folder, tmp_path):
    """As where --out is a disk of each host."""
    line = refusal(two_hosts(folder, tmp_path / "one", "--out", str(tmp_path / "two")))
    assert f"--out {tmp_path / 'one'} (lock file: " in line
    assert f"--out {tmp_path / 'two'} (lock file: none)" in line
    assert not (tmp_path / "two").exists()


def test_the_first_values_of_all_weights_count(folder, tmp_path):
    """Here those of one bias."""
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = weights_fingerprint(str(tmp_path / "model"))
    assert before == weights_fingerprint(str(folder / "model"))
    name = max(name for name in weights if name.endswith("bias"))
    weights[name][0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(str(tmp_path / "model")) != before


def test_paths_and_workers_may_differ():
    one = {"lock file": "word", "data": "/a", "workers": 2, "examples": "3 images", "seed": 0}
    two = one | {"data": "/b", "workers": 0, "host": "b"}
    compare_ranks([one | {"host": "a"}, two])
    with pytest.raises(InputError, match=r"--seed 0 on rank 0 \(a\), --seed 1 on rank 1 \(b\)"):
        compare_ranks([one | {"host": "a"}, two | {"seed": 1}])


@pytest.mark.parametrize(
    "name, flags", [("examples", "--data d --traces t"), ("weights", "--model m")]
)
def test_other_contents_are_named_by_their_flags(name, flags):
    one = {"model": "m", "data": "d", "traces": "t", "examples": "1", "weights": "2", "host": "a"}
    with pytest.raises(InputError) as refused:
        compare_ranks([one, one | {name: "other"}])
    assert f"{flags} ({name}: other) on rank 1 (a)" in str(refused.value)


def two_ranks(code: str) -> tuple[subprocess.Popen, subprocess.Popen]:
    """Two processes of a run, each with this code; they read a pipe, and write to one."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return tuple(
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **place, "RANK": rank},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_ends_with_the_reason():
    """The other one has joined and then stands still, as a host does whose link is cut."""
    waits, stands = two_ranks(
        "import sys; from datetime import timedelta; from engine.policy import start_ranks; "
        "ranks = start_ranks(timedelta(seconds=2)); print('joined', flush=True); "
        "ranks.rank and sys.stdin.read(); ranks.gather([0])"
    )
    try:
        assert [one.stdout.readline() for one in (waits, stands)] == ["joined\n"] * 2
        _, errors = waits.communicate(timeout=60)
        assert waits.returncode == 1 and "Timed out waiting 2000ms" in errors
    finally:
        waits.kill()
        stands.communicate("")


@pytest.mark.slow
def test_the_model_may_take_longer_to_write_than_ranks_wait(tmp_path):
    """--timeout is of ranks that are gone: here 2 seconds, and the first one writes for 4."""
    ranks = two_ranks(
        "import time; from datetime import timedelta; from pathlib import Path; "
        "from torch import nn; from engine.policy import start_ranks; from engine.run import Run; "
        "ranks = start_ranks(timedelta(seconds=2)); "
        "Run._write_model = lambda *what: time.sleep(4); "
        f"Run(Path({str(tmp_path)!r}), None, ranks).export(nn.Module(), 'model', [], {{}})"
    )
    for one in ranks:
        _, errors = one.communicate(timeout=60)
        assert one.returncode == 0, errors

"""A full disk: one line names the file, no file is half-written, and the run can continue."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo.show
from engine.data.annotations import load_split
from engine.files import write_json
from engine.report.page import write_page
from engine.report.pictures import show
from engine.runs.run_folder import RunFolder
from tests.run_folders import write_prediction
from tests.runs import config_of, refusal, run, same_weights, weights

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def no_file_above(size: int):
    """Writing fails at this size, as on a full disk: "File too large"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 140_000])
def test_checkpoint_that_does_not_fit(size, tmp_path, ranks):
    policy = torch.nn.Linear(100, 100)  # 148,900 bytes with AdamW's moments
    optimizer = torch.optim.AdamW(policy.parameters())
    with no_file_above(size), pytest.raises(OSError) as failed:
        RunFolder(tmp_path, None, ranks).save(policy, optimizer, 3, keep=1)
    file = tmp_path / "checkpoint-000003.tmp" / "__0_0.distcp"
    assert str(failed.value) == f"[Errno 27] File too large: '{file}'"
    assert not list(tmp_path.iterdir())


def test_model_that_does_not_fit(folder, tmp_path):
    """The run ends with one line, and continues when there is space."""
    config = config_of("sft", folder, tmp_path, max_steps=2, save_every=0)
    with no_file_above(500_000):
        found = refusal(config)
    assert found.startswith(f"{tmp_path}/model.tmp: ") and "File too large" in found
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "model").exists()
    run(replace(config, resume=True))
    assert weights(tmp_path)


def test_log_names_its_file(tmp_path, ranks):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '.*/metrics.jsonl'"):
        RunFolder(tmp_path, None, ranks).log("metrics", 1, {"loss": 1.0})


def test_settings_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"seed": 0})
    with no_file_above(1000), pytest.raises(OSError, match="File too large: .*config.json.tmp"):
        write_json(path, {"seed": "x" * 2000})
    assert json.loads(path.read_text()) == {"seed": 0}
    assert [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_picture_or_page_that_does_not_fit_leaves_the_old_one(folder, tmp_path):
    """In show, report and the demo."""
    (sample, *_), run = load_split(folder / "data", "test"), write_prediction(tmp_path)
    picture, page = tmp_path / f"{Path(sample.file_name).stem}.png", run / "report.html"
    drawn = Image.new("RGB", (9, 9))
    shown = {"data": folder / "data", "out": tmp_path, "images": 1}
    for path, name, write in (
        (picture, f"{picture}.tmp", lambda: list(show(**shown))),
        (picture, f"{picture}.tmp", lambda: demo.show.save(drawn, picture)),
        (page, f"{page}.tmp", lambda: write_page([run])),
    ):
        path.write_text("old")
        with no_file_above(10), pytest.raises(OSError, match=f"File too large: '{name}'"):
            write()
        assert path.read_text() == "old" and not list(path.parent.glob("*.tmp"))
        write()
        assert path.stat().st_size > 10


# A disk of $1 KB and a run that fills it; a cut checkpoint that takes the last byte, and --resume;
# a larger disk, and --resume. The command of the run follows $1.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1k tmpfs "$0" || exit 9
shift
"$@" --out "$0/run"; echo "exit $?"; ls "$0/run"
cat /dev/zero > "$0/run/checkpoint-000009.tmp"; rm "$0/run/first_sample.png"
"$@" --out "$0/run" --resume; echo "exit $?"; ls "$0/run"
mount -o remount,size=64m "$0"
"$@" --out "$0/run" --resume; echo "exit $?"; ls "$0/run"
mkdir "$0.copy"; cp -r "$0/run/model" "$0.copy"
"""


@pytest.mark.slow
def test_full_disk(folder, tmp_path):
    """One checkpoint fits, two do not. On a larger disk the run ends with the right weights."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("needs Linux's unshare, for a small disk of its own")
    run(config_of("sft", folder, tmp_path / "whole", max_steps=3, save_every=1))
    last = tmp_path / "whole" / "checkpoint-000003"
    room = 1.5 * sum(file.stat().st_size for file in last.iterdir()) / 1024
    (tmp_path / "disk").mkdir()
    line = f"{sys.executable} hoi_r1.py sft --model {folder}/model --data {folder}/data --traces "
    line += f"{folder}/traces.jsonl --untraced skip --no-task-description --workers 0 --keep 1 "
    line += "--batch-size 4 --learning-rate 1e-3 --max-steps 3 --save-every 1"
    script = ["sh", "-c", ON_A_SMALL_DISK, str(tmp_path / "disk"), str(int(room))]
    done = subprocess.run(
        [*inside, *script, *line.split()], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    first, second, third = done.stdout.split("exit ")[1:]
    new = tmp_path / "disk" / "run" / "checkpoint-000002.tmp"
    message = f"error: [Errno 28] No space left on device: '{new}/__0_0.distcp'"
    assert done.stderr.splitlines().count(message) == 2, done.stderr
    for found in (first, second):
        assert found.startswith("1\n") and "checkpoint-000001" in found and ".tmp" not in found
    assert third.startswith("0\n")
    assert same_weights(tmp_path / "whole", tmp_path / "disk.copy")

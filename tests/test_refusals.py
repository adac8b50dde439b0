"""hoi_r1.py: what a user gets wrong is one line that names it, and nothing of theirs is lost."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import engine.files
import engine.runs.run_folder
import hicodet
import hoi_r1
import sft
from engine.data import annotations
from engine.model.model_files import read_config, read_from_model
from tests.runs import config_of, metrics, refusal, run

ROOT = Path(hoi_r1.__file__).parent


# The folder of a run


def test_a_folder_with_other_files_is_left_alone(folder, tmp_path):
    """--out one level too high would replace the model that is trained from."""
    shutil.copytree(folder / "model", tmp_path / "mine" / "model")
    before = sorted(path.name for path in (tmp_path / "mine" / "model").iterdir())
    for resume in (False, True):
        for out in ("mine", "mine/model"):
            model = str(tmp_path / "mine" / "model")
            config = config_of("sft", folder, tmp_path / out, model=model, resume=resume)
            assert str(tmp_path / out) in refusal(config)
    assert sorted(path.name for path in (tmp_path / "mine" / "model").iterdir()) == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model"]


def test_a_folder_is_written_by_one_process(folder, tmp_path):
    config = config_of("sft", folder, tmp_path / "run", max_steps=1)
    run(config)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1]); "
         "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); input()",
         str(tmp_path / "run" / "run.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        for other in (config, replace(config, resume=True)):
            assert "run.lock is being written by another process" in refusal(other)
    finally:
        holder.kill()
        holder.wait()
    run(replace(config, resume=True))


def test_a_lock_that_is_freed_in_a_moment_is_waited_for(tmp_path, monkeypatch):
    """Image workers of a trainer that was just killed hold it until they have ended."""
    monkeypatch.setattr(engine.files, "LOCK_SECONDS", 60.0)
    with open(tmp_path / "lock", "w") as worker, open(tmp_path / "lock") as mine:
        fcntl.flock(worker, fcntl.LOCK_EX)
        threading.Timer(0.2, worker.close).start()
        engine.files.lock(mine)


def test_a_run_that_failed_before_its_first_result_can_be_begun_again(folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(folder / "model", broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    for stage in ("sft", "predict"):
        config = config_of(stage, folder, tmp_path / stage, model=str(broken))
        assert f"--model {broken}: no weights" in refusal(config)
        good = {"max_steps": 1} if stage == "sft" else {"limit": 1, "max_new_tokens": 2}
        run(config_of(stage, folder, tmp_path / stage, **good))


def test_a_resumed_run_has_the_same_data_and_traces(folder, tmp_path):
    """Paths may change, what is in the files not: it decides the order of images and the rates."""
    lines = (folder / "traces.jsonl").read_text().splitlines(keepends=True)
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(lines[:5]))
    options = {"max_steps": 2, "save_every": 1}
    config = config_of("sft", folder, tmp_path / "run", traces=str(traces), **options)
    run(config)
    traces.write_text("".join(lines))
    found = refusal(replace(config, resume=True))
    assert "examples = '5 images, " in found and f"not '{len(lines)} images, " in found
    traces.write_text("".join(lines[:4]) + lines[4].replace("person", "human"))
    assert "the run has examples" in refusal(replace(config, resume=True))
    (tmp_path / "moved.jsonl").write_text("".join(lines[:5]))
    shutil.copytree(folder / "data", tmp_path / "data")
    moved = {"traces": str(tmp_path / "moved.jsonl"), "data": str(tmp_path / "data")}
    relative = os.path.relpath(config.model) + "/"
    run(replace(config, resume=True, model=relative, **moved))


# What --resume may change, and why nothing else; `dry_run` and `out` go without saying.
FREE = {
    *("resume", "out", "data", "traces", "workers", "dry_run", "slots", "timeout"),
    *("save_every", "keep", "export_every"),
    *("learning_rate", "max_steps", "epochs", "skip_bad_images"),
    *("tokens_per_microbatch", "gradient_checkpointing", "offload"),
    *("eval_every", "eval_images", "eval_max_new_tokens"),
    *("stage", "command"),  # how it was started, to be looked at
}


@pytest.mark.parametrize("stage", ["sft", "grpo", "predict"])
def test_a_resumed_run_is_told_the_same(stage, folder, tmp_path):
    config = config_of(stage, folder, tmp_path, resume=True)
    settings = asdict(config) | {"examples": "24 images, 0123456789abcdef"}
    settings |= {"stage": stage, "command": ["hoi_r1.py", stage]}
    engine.runs.run_folder._write_settings(tmp_path, settings, resume=False)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text("")
    assert stored.keys() - FREE > {"weight_decay", "examples"} or stage == "predict"
    for name in stored.keys() - FREE:
        changed = stored | {name: "something else"}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(hicodet.InputError, match=f"{name} = 'something else'"):
            engine.runs.run_folder._write_settings(tmp_path, settings, resume=True)
    for name in FREE & stored.keys():
        changed = stored | {name: "something else"}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        engine.runs.run_folder._write_settings(tmp_path, settings, resume=True)


def test_offloading_is_refused_without_a_gpu(folder, tmp_path):
    found = refusal(config_of("sft", folder, tmp_path / "run", offload=True))
    assert found == "--offload: it spares a GPU's memory, and torch finds no GPU here"
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_says_what_to_remove(folder, tmp_path):
    config = config_of("sft", folder, tmp_path / "run", max_steps=2, save_every=2)
    run(config)
    again = replace(config, resume=True)
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoint = tmp_path / "run" / "checkpoint-000002"
    part = next(checkpoint.glob("*.distcp"))
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    assert f"{checkpoint} cannot be read" in refusal(again)
    part.write_bytes(whole)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text()
    log.write_text("{]\n" + lines)
    assert f"{log}, line 1" in refusal(again)
    log.write_text(lines)
    (tmp_path / "run" / "config.json").write_text('{"model"')
    assert "config.json is damaged" in refusal(again)


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        found = refusal(config_of("sft", folder, tmp_path / out))
        assert f"--out {tmp_path / out}: " in found


# The model


def spoil_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def drop_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    kept = {name: value for name, value in state.items() if "visual" not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})


SPOILT_MODELS = {
    "tokenizer": (lambda m: [p.unlink() for p in m.glob("token*")], "no tokenizer|no <.im_end.>"),
    "image processor": (lambda m: (m / "preprocessor_config.json").unlink(), "no image processor"),
    "configuration": (lambda m: (m / "config.json").unlink(), "no configuration"),
    "another model": (lambda m: spoil_config(m, model_type="qwen2_vl"), "a qwen2_vl"),
    "chat template": (lambda m: (m / "chat_template.jinja").unlink(), "chat template"),
    "placeholder": (lambda m: (m / "chat_template.jinja").write_text("no image"), "placeholders"),
    "weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
    "vision weights": (drop_weights, "weights are missing"),
}


@pytest.mark.parametrize("spoilt", SPOILT_MODELS)
def test_a_spoilt_model_is_refused(spoilt, folder, tmp_path):
    spoil, message = SPOILT_MODELS[spoilt]
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    spoil(model)
    found = refusal(config_of("predict", folder, tmp_path / "test", model=str(model), limit=1))
    assert re.search(message, found) and str(model) in found


def test_the_folder_above_the_model_is_told_from_it(folder, tmp_path):
    found = refusal(config_of("predict", folder, tmp_path / "x", model=str(folder)))
    assert f"is {folder / 'model'} meant?" in found


def test_a_mistyped_folder_of_a_model_is_said_not_to_be_there(tmp_path):
    """What the library says of it is about names of its hub, which are taken as before."""
    (tmp_path / "empty").mkdir()
    names = {tmp_path / "modle": True, "runs/modle": True, tmp_path / "empty": False}
    for name, absent in names.items():
        with pytest.raises(hicodet.InputError, match=f"--model {name}: no configuration") as said:
            read_config(str(name))
        assert str(said.value).endswith("; there is no such folder here") == absent
    assert read_from_model(str.lower, "Qwen/Qwen2.5-VL", "name") == "qwen/qwen2.5-vl"


# Images, numbers


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cut_image_is_one_line(workers, folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    image = annotations.load_split(tmp_path / "data", "train")[1].path
    image.write_bytes(image.read_bytes()[:-300])
    config = config_of(
        "sft", folder, tmp_path / "out", data=str(tmp_path / "data"), workers=workers,
        batch_size=20)
    assert f"{image}: not a readable image" in refusal(config)


def test_numbers_are_within_bounds(capsys):
    run = "--model m --data d --out o"
    bad = {
        f"sft {run}": [
            "--max-grad-norm -1", "--max-grad-norm 0", "--learning-rate inf", "--adam-beta2 1",
            "--adam-beta2 -0.1", "--weight-decay -1", "--weight-decay nan"],
        f"grpo {run}": ["--kl-coef inf", "--clip-eps nan", "--temperature inf"],
        "demo": ["--train-images 0", "--test-images -1", "--sft-steps 0", "--grpo-steps 0",
                 "--steps-scale 0", "--seed -1"],
    }
    for stage, flags in bad.items():
        for flag in flags:
            with pytest.raises(SystemExit):
                hoi_r1.parse_config([*stage.split(), *flag.split()])
            assert f"{flag.split()[0]} " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("data, message", [
    ("data", "--out {out}: holds files that are not of a run; choose another folder"),
    ("x", "{folder}/x/anno_bbox.mat is missing: the data folder is that of hico_20160224_det, or "
     "has annotations.jsonl for other images"),
])  # fmt: skip
def test_under_torchrun_one_rank_says_why(data, message, folder, tmp_path):
    """What only the first one finds, and what all of them find: before torchrun's own page."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    line = f"sft --model {folder}/model --data {folder}/{data} --traces {folder}/traces.jsonl"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "hoi_r1.py",
         *line.split(), "--untraced", "skip", "--no-task-description",
         "--out", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = [line for line in run.stderr.splitlines() if line and "socket" not in line]
    assert said[0] == "error: " + message.format(out=tmp_path / "run", folder=folder)
    assert run.returncode == 1 and run.stderr.count("error: ") == 1
    assert 'hoi_r1.py", line' not in run.stderr


def test_what_is_not_finite_is_null_in_the_log(folder, tmp_path):
    """JSON has no NaN: other readers than Python's stop at it."""
    config = config_of("sft", folder, tmp_path / "run", max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "sft_loss", lambda *arguments: arguments[0].sum() * float("nan"))
        run(config)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] is None and row["skipped"]


def test_the_first_sample_is_drawn_as_the_model_sees_it(folder, tmp_path):
    from PIL import Image

    run(config_of("sft", folder, tmp_path / "run", max_steps=1))
    with Image.open(tmp_path / "run" / "first_sample.png") as picture:
        assert picture.width >= 640

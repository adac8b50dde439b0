"""hoi_r1.py: a mistake of the user is one line that names it, and no file is lost."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hoi_r1
from engine.data import annotations
from tests.runs import config_of, refusal, run

ROOT = Path(hoi_r1.__file__).parent


# The folder of a run


def test_folder_with_other_files_is_left_alone(folder, tmp_path):
    """Even if --out is the folder of the model, or its parent."""
    shutil.copytree(folder / "model", tmp_path / "mine" / "model")
    before = sorted((tmp_path / "mine").rglob("*"))
    for resume in (False, True):
        for out in ("mine", "mine/model"):
            model = str(tmp_path / "mine" / "model")
            config = config_of("sft", folder, tmp_path / out, model=model, resume=resume)
            said = f"--out {tmp_path / out}: holds other files; choose an empty folder"
            assert refusal(config) == said
    assert sorted((tmp_path / "mine").rglob("*")) == before


def test_folder_is_written_by_one_process(folder, tmp_path):
    config = config_of("sft", folder, tmp_path / "run", max_steps=1)
    run(config)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1]); "
         "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); input()",
         str(tmp_path / "run" / "run.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout.readline() == b"locked\n"
        for other in (config, replace(config, resume=True)):
            assert "run.lock is being written by another process" in refusal(other)
    finally:
        holder.kill()
        holder.wait()
    run(replace(config, resume=True))
    assert "holds a run; --resume it, or choose another folder" in refusal(config)
    predict = config_of("predict", folder, config.out, resume=True)
    assert "holds a run of sft; choose another folder" in refusal(predict)


def test_folder_of_a_failed_start_can_be_used_again(folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(folder / "model", broken)
    text = (broken / "config.json").read_text().replace(": 96", ": 97")  # of intermediate_size
    (broken / "config.json").write_text(text)
    config = config_of("predict", folder, tmp_path / "out", limit=1, max_new_tokens=2)
    assert f"--model {broken}: " in refusal(replace(config, model=str(broken)))
    assert (tmp_path / "out").is_dir()
    run(config)


def test_damaged_run_names_the_file(folder, tmp_path):
    config = config_of("sft", folder, tmp_path, max_steps=2, save_every=1)
    run(config)
    (tmp_path / "model").rename(tmp_path / "first")
    again = replace(config, resume=True)
    for name, said in (("metrics.jsonl", "line 1: not JSON"), ("config.json", "is damaged: no")):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text("{]\n" + whole)
        found = refusal(again)
        assert str(tmp_path / name) in found and said in found
        (tmp_path / name).write_text(whole)
    run(again)


# What --resume may change


def test_resumed_run_has_the_same_data_and_traces(folder, tmp_path):
    """Paths may change. The content may not: it decides the order of images."""
    lines = (folder / "traces.jsonl").read_text().splitlines(keepends=True)
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(lines[:5]))
    options = {"max_steps": 2, "save_every": 1}
    config = config_of("sft", folder, tmp_path / "run", traces=str(traces), **options)
    run(config)
    traces.write_text("".join(lines))
    found = refusal(replace(config, resume=True))
    assert "content of --data or --traces was 5 images, " in found
    assert f", is {len(lines)} images, " in found
    traces.write_text("".join(lines[:4]) + lines[4].replace("person", "human"))
    assert "content of --data or --traces was" in refusal(replace(config, resume=True))
    (tmp_path / "moved.jsonl").write_text("".join(lines[:5]))
    shutil.copytree(folder / "data", tmp_path / "data")
    moved = {"traces": str(tmp_path / "moved.jsonl"), "data": str(tmp_path / "data")}
    relative = os.path.relpath(config.model) + "/"
    run(replace(config, resume=True, model=relative, **moved))


def test_all_differences_are_named_by_their_flags(folder, tmp_path):
    """Only those that resume refuses."""
    config = config_of("grpo", folder, tmp_path, max_steps=1)
    run(config)
    other = replace(config, resume=True, kl_coef=0.1, seed=5, without=("iou",), timeout=3.0)
    assert refusal(replace(other, learning_rate=1e-5, tokens_per_microbatch=50)) == (
        "--resume: the run in --out differs: --seed was 0, is 5; --kl-coef was 0.04, is 0.1; "
        "--without was [], is ['iou']"
    )


# Flags


def test_offloading_is_refused_without_a_gpu(folder, tmp_path):
    found = refusal(config_of("sft", folder, tmp_path / "run", offload=True))
    assert found == "--offload saves GPU memory, and torch finds no GPU here"
    assert not (tmp_path / "run").exists()


RUN = "--model m --data d --out o"


@pytest.mark.parametrize("flag", [
    f"sft {RUN} --max-grad-norm 0", f"sft {RUN} --learning-rate inf", f"sft {RUN} --adam-beta2 1",
    f"sft {RUN} --weight-decay nan", f"grpo {RUN} --kl-coef inf", f"grpo {RUN} --clip-eps nan",
    f"grpo {RUN} --temperature inf", "demo --train-images 0", "demo --steps-scale 0",
    f"sft {RUN} --timeout 1e300", f"sft {RUN} --seed {2**63}", f"grpo {RUN} --ratio both",
    f"sft {RUN} --max-stepz 5",
])  # fmt: skip
def test_values_out_of_bounds_are_refused_with_the_flag(flag, capsys):
    with pytest.raises(SystemExit):
        hoi_r1.parse_config(flag.split())
    assert flag.split()[-2] in capsys.readouterr().err.splitlines()[-1]


def test_values_have_the_types_of_the_fields():
    words = "grpo --model m --data d --out o --without label iou --no-thinking --lora-alpha 4"
    config = hoi_r1.parse_config([*words.split(), "--lora-rank", "2", "--slots", "3"])
    assert (config.without, config.thinking, config.lora_alpha) == (("label", "iou"), False, 4.0)
    assert (config.slots, config.task_description, config.resume) == (3, None, False)


def under_torchrun(*words):
    """The lines with an error of a run of two ranks that fails without a traceback."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words = ["hoi_r1.py", *words, "--untraced", "skip", "--no-task-description"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*torchrun, *words], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 1 and 'hoi_r1.py", line' not in found.stderr, found.stderr
    return [line for line in found.stderr.splitlines() if "error: " in line]


@pytest.mark.slow
@pytest.mark.parametrize("data, lines", [
    ("data", ["error: --out {out}: holds other files; choose an empty folder"]),
    ("x", ["{rank}error: {folder}/x/anno_bbox.mat is missing: --data is the folder of "
           "hico_20160224_det, or of annotations.jsonl for other images"] * 2),
])  # fmt: skip
def test_under_torchrun(data, lines, folder, tmp_path):
    """Each rank prints the faults that it finds; all but the first add their number."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    line = f"sft --model {folder}/model --data {folder}/{data} --traces {folder}/traces.jsonl"
    said = under_torchrun(*line.split(), "--out", str(tmp_path / "run"))
    names = {"out": tmp_path / "run", "folder": folder}
    expected = [text.format(rank="rank 1: " if n else "", **names) for n, text in enumerate(lines)]
    assert said and set(said) <= set(expected), said


@pytest.mark.slow
def test_cut_image_of_one_rank_is_one_line_on_each(folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    path = annotations.load_split(data, "train")[5].path
    path.write_bytes(path.read_bytes()[:500])
    line = f"sft --model {folder}/model --data {data} --traces {folder}/traces.jsonl"
    found = under_torchrun(*line.split(), "--out", str(tmp_path / "run"))
    bad = [text for text in found if "cannot be read as an image" in text]
    other = [text for text in found if "error: another rank has ended" in text]
    assert len(bad) == len(other) == 1 and "--exclude bad.txt" in bad[0]

"""The demo: drawings, a base model, SFT, GRPO, predictions and mAP, by commands a user would type.

    python hoi_r1.py demo
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from demo.show import draw, table
from hicodet import InputError

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = 0.55  # share of the training half's further pairs that is not annotated
BASE_SEED = 1000  # added to the seed: the base model learns from other drawings than SFT
# A million weights want other learning rates than 3 billion, and another second beta of AdamW (see
# `train`); the rest of GRPO is Sec. 4.2's.
RECIPE = {
    "sft": "--batch-size 16 --learning-rate 1.5e-3 --warmup-steps 20",
    "grpo": "--learning-rate 2e-4 --max-new-tokens 96",
}


def run_demo(
    *,
    out: str,
    seed: int,
    train_images: int,
    test_images: int,
    base_steps: int,
    sft_steps: int,
    grpo_steps: int,
    base: str,
    complete: bool,
    steps_scale: float,
) -> None:
    """Train, predict, evaluate, and show what was learned; the options are DemoConfig's.

    Raises InputError if `out` exists, or `base` is no folder of a model.
    """
    out, started = Path(out).resolve(), time.perf_counter()
    if out.exists():
        raise InputError(f"{out} exists: choose another --out, or remove it")
    if base and not (Path(base) / "config.json").is_file():
        raise InputError(f"--base {base}: no folder of a model, as the model/ of demo.base is")
    asked = train_images, base_steps, sft_steps, grpo_steps
    images, *steps = (max(1, round(number * steps_scale)) for number in asked)
    number = process_count()
    with ThreadPoolExecutor() as beside:  # either takes one core
        others = [] if base else [beside.submit(draw_for_base, out, images, seed)]
        make_data(out, images, test_images, seed, left_out=0.0 if complete else LEFT_OUT)
    [other.result() for other in others]  # or what it raised
    model = Path(base).resolve() if base else make_base(out, steps[0], seed, number)
    models = [model]
    predict(out, "base", model, number)
    for name, length in (("sft", steps[1]), ("grpo", steps[2])):
        model = train(out, name, model, f"--max-steps {length} --seed {seed}", number)
        models.append(model)
        predict(out, name, model, number)
    sample(out, out / "sampled.json", models, seed, number)
    report(out)
    print(table(out, ("base", "sft", "grpo")))
    draw(out, count=6)
    print(f"\npictures: {out / 'pictures'}\n{(time.perf_counter() - started) / 60:.1f} minutes")


def make_data(out: Path, train: int, test: int, seed: int, *, left_out: float) -> None:
    """Drawings, random weights and the teacher's traces. left_out: as in demo.toy."""
    sizes = f"--train {train} --test {test} --left-out {left_out} --seed {seed}"
    command(f"-m demo.toy {{out}} {sizes}", out=out)
    command("teacher.py --backend template --data {out}/data --out {out}/traces.jsonl", out=out)


def draw_for_base(out: Path, images: int, seed: int) -> None:
    """The drawings that the base model learns from, others than those of SFT and GRPO."""
    drawings, flags = out / "grounding", f"--train {images} --test 1 --seed {BASE_SEED + seed}"
    command(f"-m demo.toy {{drawings}} --complete {flags}", drawings=drawings)


def make_base(out: Path, steps: int, seed: int, processes: int) -> Path:
    """Train a base model from the toy's random weights. Returns its folder."""
    flags = f"--model {{out}}/model --out {{out}}/base --steps {steps} --seed {seed}"
    command(f"-m demo.base {{out}}/grounding {flags}", processes, out=out)
    return out / "base" / "model"


def train(out: Path, stage: str, model: Path, flags: str, processes: int, name: str = "") -> Path:
    """Run SFT or GRPO from a model. Returns the new model's folder, in that of `name`."""
    traces = "--traces {out}/traces.jsonl " if stage == "sft" else ""
    flags += f" {RECIPE[stage]} --adam-beta2 0.98 --no-gradient-checkpointing --save-every 0"
    run = out / (name or stage)
    command(
        f"hoi_r1.py {stage} --model {{model}} --data {{out}}/data {traces}--out {{run}} "
        f"--no-task-description --workers 0 {flags}",
        processes, model=model, out=out, run=run)
    return run / "model"


def predict(out: Path, name: str, model: Path, processes: int, flags: str = "") -> None:
    """Greedy answers for the held-out drawings, and their mAP."""
    paths = {"model": model, "out": out, "test": out / f"test_{name}"}
    command(
        "hoi_r1.py predict --model {model} --data {out}/data --out {test} --max-new-tokens 96 "
        f"--no-task-description --workers 0 {flags}",
        processes, **paths)
    command(
        "evaluate.py {test}/predictions.jsonl --data {out}/data --classes present --breakdown "
        "--json {test}/map.json", **paths)


def sample(out: Path, file: Path, models: list[Path], seed: int, processes: int) -> None:
    """Sampled answers of every model for the held-out drawings; their mean rewards go to `file`."""
    paths = {f"model_{number}": model for number, model in enumerate(models)}
    folders = " ".join(f"{{{name}}}" for name in paths)
    flags = f"--data {{out}}/data --max-new-tokens 96 --seed {seed} --out {{file}}"
    command(f"-m demo.sampled {folders} {flags}", processes, out=out, file=file, **paths)


def report(out: Path) -> None:
    """One page of the trainings and predictions, with their curves and Table 1."""
    names = ("sft", "grpo", "test_base", "test_sft", "test_grpo")
    runs = " ".join(f"{{out}}/{name}" for name in names)
    command(f"hoi_r1.py report {runs} --out {{out}}/report.html", out=out)


def process_count() -> int:
    """How many processes train and predict: one for each GPU or else each core, two at most."""
    return min(2, torch.cuda.device_count() or os.cpu_count() or 1)


def command(line: str, processes: int = 1, **paths: Path) -> None:
    """Show and run one of the project's programs; exits if it fails, as it has said why."""
    words = [word.format(**paths) for word in line.split()]  # paths may hold spaces
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node"
        words = [*torchrun.split(), str(processes), *words]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    # a million weights are too few to share: on a busy machine two threads wait for each other
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which the command got too; torchrun needs a moment to end its ranks
        process.wait()
        raise
    if code:
        sys.exit(f"the demo stopped at: python {shlex.join(words)} (exit status {code})")

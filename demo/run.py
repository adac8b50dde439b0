"""The demo: drawings, SFT, GRPO, predictions and mAP, by commands that a user would type.

    python hoi_r1.py demo

It starts from the model in demo/base_model, as a real run starts from Qwen2.5-VL. The base model
lists people, objects and pairs in a format of its own. It does not know the format of the task.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo.show import draw_answers, results_table
from engine.files import remove, replace_file
from engine.signals import RESUME, one_line
from hicodet import InputError

ROOT = Path(__file__).resolve().parents[1]
BASE_MODEL = ROOT / "demo" / "base_model"
BASE_IMAGES, BASE_STEPS, BASE_SEED = 20000, 3000, 1000  # how it was made
BASE_ANSWERS = 100  # drawings for the base model, whose score is 0
START = 8  # seconds that a program with torch needs to start
LEFT_OUT = 0.55  # share of the training half's further pairs that is not annotated
# A million weights need other learning rates than 3 billion, and another second beta of AdamW. The
# rest of GRPO is as in Sec. 4.2.
RECIPE = {
    "sft": "--batch-size 16 --learning-rate 1.5e-3 --warmup-steps 20",
    "grpo": "--learning-rate 2e-4 --max-new-tokens 96",
}
COMMON = "--no-task-description --workers 0"
LOG = "commands.txt"  # the commands that finished, for --resume


@dataclass(frozen=True)
class Stage:
    """A command of the demo."""

    title: str
    words: list[str]  # of the command, after "python"
    seconds: float  # on two calm cores, to estimate the time left
    writes: tuple[str, ...] = ()  # names in --out that are removed before the command runs again
    parallel: bool = False  # whether two processes may share the work


def run_demo(config) -> None:
    """Run every stage, then print the table and draw the answers. config: DemoConfig.

    Raises InputError if --out or --base is a folder that cannot be used.
    """
    out, started = Path(config.out).resolve(), time.perf_counter()
    if out.exists() and not config.resume:
        raise InputError(f"{out} exists: choose another --out, or go on with --resume")
    if out.exists() and not (out / LOG).exists():  # the user may need what it holds
        raise InputError(f"--resume: {out} is not the folder of a demo ({LOG} is missing)")
    if config.base and not any(Path(config.base).glob("*.safetensors")):
        hint = f"; is {inside} meant?" if (inside := Path(config.base) / "model").is_dir() else ""
        raise InputError(f"--base {config.base}: no safetensors in this folder{hint}")
    with one_line("", RESUME):
        run_stages(out, demo_stages(config, out))
        print(results_table(out, ("base", "sft", "grpo")))
        draw_answers(out, count=6)
    minutes = (time.perf_counter() - started) / 60
    print(f"\npictures: {out / 'pictures'}\nreport: {out / 'report.html'}\n{minutes:.1f} minutes")


def demo_stages(config, out: Path) -> list[Stage]:
    """All commands of the demo, in their order. config: DemoConfig."""
    seed, test, left_out = config.seed, config.test_images, 0.0 if config.complete else LEFT_OUT
    numbers = (config.train_images, config.sft_steps, config.grpo_steps, BASE_IMAGES, BASE_STEPS)
    images, sft_steps, grpo_steps, base_images, base_steps = (
        max(1, round(number * config.steps_scale)) for number in numbers
    )
    toy = toy_command(out, images, test, left_out, seed)
    picture = "hoi_r1.py show --data {out}/data --split train --images 1 --out {out}/pictures"
    stages = [
        Stage("drawings", toy, 5 + images / 700, ("data", "model", "grounding.jsonl")),
        Stage("a teacher's traces", trace_command(out), 2, ("traces.jsonl",)),
        Stage("a first picture", words(picture, out), 2, ("pictures",)),
    ]
    model = Path(config.base).resolve() if config.base else BASE_MODEL
    if config.train_base:
        toy, base = base_commands(out, base_images, base_steps, seed)
        stages.append(Stage("drawings for the base", toy, 5 + base_images / 700, ("grounding",)))
        stages.append(Stage("base", base, START + 0.14 * base_steps, ("base",), True))
        model = out / "base" / "model"
    stages += answer_stages(out, "base", model, min(BASE_ANSWERS, test))
    for name, steps, seconds in (("sft", sft_steps, 0.14), ("grpo", grpo_steps, 0.67)):
        train = train_command(out, name, model, f"--max-steps {steps} --seed {seed}")
        stages.append(Stage(name.upper(), train, START + seconds * steps, (name,), True))
        model = out / name / "model"
        stages += answer_stages(out, name, model, test)
    runs = "{out}/sft {out}/grpo {out}/test_base {out}/test_sft {out}/test_grpo"
    report = words(f"hoi_r1.py report {runs} --out {{out}}/report.html", out)
    return [*stages, Stage("the page of all runs", report, 3)]


def answer_stages(out: Path, name: str, model: Path, images: int) -> list[Stage]:
    """Greedy answers for held-out drawings, and their mAP."""
    folder, limit = f"test_{name}", f"--limit {images}"
    predict, score = predict_command(out, folder, model, limit), score_command(out, folder, limit)
    return [Stage(f"answers of {name}", predict, START + images / 70, (folder,), True),
            Stage(f"mAP of {name}", score, 3)]  # fmt: skip


def words(line: str, out: Path, **paths: Path) -> list[str]:
    """The words of a command line; {name} is a path, which may hold spaces."""
    return [word.format(out=out, **paths) for word in line.split()]


def toy_command(out: Path, train: int, test: int, left_out: float, seed: int) -> list[str]:
    """Drawings with their annotations. left_out: as in demo.toy."""
    sizes = f"--train {train} --test {test} --left-out {left_out:g} --seed {seed}"
    return words(f"-m demo.toy {{out}} {sizes}", out)


def trace_command(out: Path) -> list[str]:
    """The teacher's traces."""
    return words("teacher.py --backend template --data {out}/data --out {out}/traces.jsonl", out)


def base_commands(out: Path, images: int, steps: int, seed: int, flags: str = "") -> list:
    """The commands of the base model: drawings that SFT does not have, and the training."""
    drawings = toy_command(out / "grounding", images, 1, 0.0, BASE_SEED + seed)
    flags += f" --steps {steps} --seed {seed}"
    return [drawings, words(f"-m demo.base {{out}}/grounding --out {{out}}/base {flags}", out)]


def train_command(out: Path, stage: str, model: Path, flags: str, name: str = "") -> list[str]:
    """SFT or GRPO from a model, into the folder `name`, by default that of the stage."""
    traces = "--traces {out}/traces.jsonl " if stage == "sft" else ""
    recipe = f"{RECIPE[stage]} --adam-beta2 0.98 --no-gradient-checkpointing --save-every 0"
    line = f"hoi_r1.py {stage} --model {{model}} --data {{out}}/data {traces}--out {{run}} {COMMON}"
    # flags last: they may have another learning rate than the recipe
    return words(f"{line} {recipe} {flags}", out, model=model, run=out / (name or stage))


def predict_command(out: Path, folder: str, model: Path, flags: str) -> list[str]:
    """Greedy answers of a model for the held-out drawings."""
    line = f"hoi_r1.py predict --model {{model}} --data {{out}}/data --out {{test}} {COMMON}"
    return words(f"{line} --max-new-tokens 96 {flags}", out, model=model, test=out / folder)


def score_command(out: Path, folder: str, flags: str) -> list[str]:
    """mAP over the classes that are drawn, and the kinds of mistakes."""
    line = ("evaluate.py {test}/predictions.jsonl --data {out}/data --json {test}/map.json "
            "--classes present --breakdown")  # fmt: skip
    return words(f"{line} {flags}", out, test=out / folder)


def process_count(seconds: float) -> int:
    """The number of processes for work that takes one process `seconds`: 1 or 2.

    Short work gets one, as a second process takes longer to start than it saves.
    """
    if seconds < 2 * START:
        return 1
    import torch  # takes seconds, which a short demo saves

    return min(2, torch.cuda.device_count() or os.cpu_count() or 1)


def run_stages(out: Path, stages: list[Stage]) -> None:
    """Run the stages that are not in out/commands.txt yet, and add each to it that finishes.

    Raises InputError if the file has the commands of a demo with other options.
    """
    log, spent, expected = out / LOG, 0.0, 0.0
    out.mkdir(parents=True, exist_ok=True)
    log.touch()
    done = log.read_text().splitlines()
    lines = [shlex.join(["python", *stage.words]) for stage in stages]
    if done != lines[: len(done)]:
        raise InputError(f"--resume: {out} was made with other options: see {log}")
    for number, stage in enumerate(stages[len(done) :], start=len(done)):
        pace = spent / expected if expected > 10 else 1.0  # this machine against two calm cores
        left, later = (pace * sum(s.seconds for s in stages[n:]) for n in (number, number + 1))
        print(f"\n[{number + 1} of {len(stages)}] {stage.title}; time left: {clock(left)}")
        for name in stage.writes:  # of a command that was interrupted
            remove(out / name)
        started = time.perf_counter()
        processes = process_count(stage.seconds) if stage.parallel else 1
        run_command(stage.words, processes, later)
        spent, expected = spent + time.perf_counter() - started, expected + stage.seconds
        replace_file(log, "".join(f"{line}\n" for line in lines[: number + 1]))


def clock(seconds: float) -> str:
    """Minutes and seconds, as in 3:05."""
    return "{}:{:02d}".format(*divmod(round(seconds), 60))


def run_command(words: list[str], processes: int = 1, later: float = 0.0) -> None:
    """Show and run one of the project's programs. Exits if it fails.

    later: estimated seconds of all later commands, which the progress bar shows too.
    """
    if processes > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes}"
        words = [*torchrun.split(), *words]
    print(f"$ python {shlex.join(words)}", flush=True)
    # a million weights are too few to share: on a busy machine two threads wait for each other
    settings = {"OMP_NUM_THREADS": "1", **os.environ}
    if later:  # tqdm takes the defaults of its bars from variables of these names
        settings["TQDM_BAR_FORMAT"] = (
            "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining} + "
            f"{clock(later)} for later stages{{postfix}}]"
        )
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=settings)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too; torchrun needs a moment to end its ranks
        process.wait()
        raise
    if code:
        sys.exit(f"the demo stopped at: python {shlex.join(words)} (exit status {code})")

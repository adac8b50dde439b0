"""The demo: draw the toy, then SFT, GRPO, prediction and mAP, by the commands a user would type.

    python hoi_r1.py demo
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import hicodet
from engine import panels
from engine.files import json_lines, open_image
from engine.records import line_hois

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {  # a million random weights want another recipe than 3 billion that know images
    "sft": "--batch-size 16 --learning-rate 1.5e-3 --warmup-steps 50 --adam-beta2 0.98",
    "grpo": "--batch-size 32 --group-size 8 --learning-rate 1e-4 --warmup-steps 10 "
    "--kl-coef 0.01 --max-new-tokens 64",
}


def run_demo(
    *, out: str, seed: int, train_images: int, test_images: int, sft_steps: int, grpo_steps: int
) -> None:
    """Train, predict, evaluate, and show what was learned. Raises ValueError if `out` exists."""
    out, started = Path(out).resolve(), time.perf_counter()
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or choose another --out")
    images = f"--train {train_images} --test {test_images}"
    command(f"-m demo.toy {{out}} {images} --seed {seed}", out=out)
    command("teacher.py --backend template --data {out}/data --out {out}/traces.jsonl", out=out)
    common = f"--data {{out}}/data --no-task-description --workers 1 --seed {seed}"
    stages = {
        "sft": f"--traces {{out}}/traces.jsonl --max-steps {sft_steps}",
        "grpo": f"--max-steps {grpo_steps}",
    }
    model = out / "model"
    for name in ("untrained", *stages):
        if name in stages:
            flags = f"{common} {RECIPE[name]} {stages[name]} --no-gradient-checkpointing"
            command(
                f"hoi_r1.py {name} --model {{model}} --out {{out}}/{name} {flags}",
                model=model, out=out)
            model = out / name / "model"
        test = out / f"test_{name}"
        command(
            f"hoi_r1.py predict --model {{model}} {common} --out {{test}} --max-new-tokens 64",
            model=model, out=out, test=test)
        command(
            "evaluate.py {test}/predictions.jsonl --data {out}/data --classes present "
            "--json {test}/map.json", out=out, test=test)
    print(table(out, ("untrained", *stages)))
    draw(out, stages, count=6)
    print(f"\npictures: {out / 'pictures'}\n{(time.perf_counter() - started) / 60:.1f} minutes")


def command(line: str, **paths: Path) -> None:
    """Show and run one of the project's programs; exits if it fails, as it has said why."""
    words = [word.format(**paths) for word in line.split()]  # paths may hold spaces
    print(f"\n$ python {shlex.join(words)}", flush=True)
    # a million weights are too few to share: on a busy machine two threads wait for each other
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if code := subprocess.run([sys.executable, *words], cwd=ROOT, env=environment).returncode:
        sys.exit(f"the demo stopped at: python {shlex.join(words)} (exit status {code})")


def table(out: Path, names) -> str:
    """mAP in percent and the mean greedy reward on the held-out images, a row a model."""
    lines = [
        "\n                 Default             Known Object       mean",
        "            Full   Rare  Non-R     Full   Rare  Non-R   reward",
    ]
    for name in names:
        result = json.loads((out / f"test_{name}" / "map.json").read_text())
        reward = json.loads((out / f"test_{name}" / "summary.json").read_text())["reward"]["total"]
        cells = [
            "     -" if result[setting][part] is None else f"{100 * result[setting][part]:6.2f}"
            for setting in ("default", "known_object")
            for part in ("full", "rare", "non_rare")
        ]
        lines.append(f"{name:9s} {' '.join(cells[:3])}   {' '.join(cells[3:])}   {reward:6.3f}")
    return "\n".join(lines)


def draw(out: Path, names, count: int) -> None:
    """Pictures of the first held-out images: the ground truth, then each model's prediction."""
    (out / "pictures").mkdir()
    files = (json_lines(out / f"test_{name}" / "predictions.jsonl") for name in names)
    samples = hicodet.load_split(out / "data", "test")[:count]
    for sample, *lines in zip(samples, *files):
        image, truth = open_image(sample.path), sample.hois
        panes = [panels.draw_pairs(image, truth, range(len(truth)), caption="ground truth")]
        for name, (_, line) in zip(names, lines):
            hois = line_hois(line)
            caption = name if hois else f"{name}: no instance"
            colours = panels.match_pairs(truth, hois)
            panes.append(panels.draw_pairs(image, hois, colours, caption=caption))
        path = out / "pictures" / f"{Path(sample.file_name).stem}.png"
        panels.side_by_side(panes).save(path)

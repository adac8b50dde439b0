"""Run folders as the programs write them, made by hand without a model or a GPU."""

import json
from dataclasses import replace

from PIL import Image

from hicodet import HOI, HOI_CLASSES, format_completion

TRUTH = HOI((10.0, 10.0, 50.0, 90.0), (60.0, 40.0, 110.0, 90.0), "bicycle", ("ride", "sit on"))
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & \"quoted\""
PARTS = {  # of the reward, as grpo writes them into config.json
    "format": {"title": "Format", "largest": 0.8},
    "object": {"title": "Object label", "largest": 1.0},
    "verb": {"title": "Verb label", "largest": 1.0},
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((140, 112)).convert("RGB").save(path)


def write_config(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def change_config(folder, **changes):
    write_config(folder, **json.loads((folder / "config.json").read_text()) | changes)


def write_training(root, *, parts=PARTS, model="Qwen/Qwen2.5-VL-3B-Instruct"):
    """A GRPO run of 20 steps in root/grpo."""
    folder, data = root / "grpo", root / "data"
    command = ["hoi_r1.py", "grpo", "--model", model, "--data", str(data)]
    options = {"model": model, "data": str(data), "steps": 20, "batch_size": 16}
    write_config(folder, stage="grpo", command=command, reward_parts=parts, **options)
    write_lines(folder / "metrics.jsonl", [metrics_row(step, parts) for step in range(1, 21)])
    write_lines(folder / "rollouts.jsonl", [group_row(20, 1.0, 3.0, parts=parts)])
    write_image(data / "images" / "train2015" / "a.jpg")
    return folder


def write_sft(root, **config):
    """An SFT run of 50 steps in root/sft."""
    config = {"model": "base", "data": str(root / "data"), "batch_size": 8, "steps": 50} | config
    write_config(root / "sft", stage="sft", **config)
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 1e-6} for step in range(1, 51)]
    write_lines(root / "sft" / "metrics.jsonl", rows)
    return root / "sft"


def metrics_row(step, parts):
    row = {"step": step, "loss": 1 / step, "grad_norm": 1.0, "kl": 0.01 * step, "entropy": 0.5}
    row |= {"logprob_gap": 1e-3, "clip_fraction": 0.0, "truncated": 0.0, "skipped": False}
    row |= {f"reward_{part}": 0.5 + 0.01 * step for part in ("total", *parts)}
    row |= {f"advantage_{part}": i / 10 for i, part in enumerate(parts)}
    row |= {"instances": 1.2, "instances_true": 2.3, "learning_rate": 1e-6}
    return row | {"seconds": 9.0, "share_waiting": 0.05}


def instance_row(hoi):
    row = {"human": list(hoi.human), "object": list(hoi.object), "object_class": hoi.object_class}
    return row | {"verbs": list(hoi.verbs), "scores": [1.0] * len(hoi.verbs)}


def group_row(step, *totals, parts=PARTS):
    """A row of rollouts.jsonl: each part earns 0.2; the advantage is the total less 2."""
    answer = {"text": format_completion([TRUTH], EVIL), "instances": [instance_row(TRUTH)]}
    completions = [
        answer | {"rewards": dict.fromkeys(parts, 0.2) | {"total": total}, "advantage": total - 2}
        for total in totals
    ]
    return {"step": step, "file_name": "a.jpg", "completions": completions}


def write_prediction(root, rewards=(3.0, 1.0, 2.0)):
    """A prediction of one image per reward, and its mAP, in root/test."""
    folder = root / "test"
    options = {"model": str(root / "grpo/model"), "data": str(root / "data"), "split": "test"}
    options |= {"scores": "rank", "command": ["hoi_r1.py", "predict"]}
    write_config(folder, stage="predict", **options)
    summary = {"images": len(rewards), "truncated": 0.5, "reward": {"total": 2.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = []
    for i, total in enumerate(rewards):
        instances = [instance_row(replace(TRUTH, verbs=("ride",)))]
        line = {"file_name": f"{i}.jpg", "text": EVIL, "instances": instances}
        reward = None if total is None else {"format": 0.2, "total": total}
        rows.append({"index": i, "length": 3, "finished": True, "line": line, "reward": reward})
        write_image(root / "data" / "images" / "test2015" / f"{i}.jpg")
    write_lines(folder / "part-0000.jsonl", rows)
    (folder / "map.json").write_text(json.dumps(result()))
    return folder


def result(**changes):
    """A result of evaluate.py in which class i has an AP of i / 1000, and the last no true pair."""
    ap = [i / 1000 for i in range(len(HOI_CLASSES))]
    means = {"full": 0.1234, "rare": None, "non_rare": 0.2, "ap": ap}
    values = {"default": means, "known_object": means, "true_pairs": [7] * 599 + [0]}
    return values | {"classes": "present", "num_images": 3} | changes

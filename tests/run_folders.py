"""Folders of runs as the programs leave them, written by hand: no model and no GPU."""

import json

from PIL import Image

from hicodet import HOI, HOI_CLASSES, format_completion

TRUTH = HOI((10.0, 10.0, 50.0, 90.0), (60.0, 40.0, 110.0, 90.0), "bicycle", ("ride", "sit on"))
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & \"quoted\""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(path, size=(140, 112)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)


def write_training(root, *, steps=20, before=None):
    """A GRPO run of `steps` steps in root/grpo. before: the folder of the run it goes on from."""
    folder, data = root / "grpo", root / "data"
    folder.mkdir(parents=True)
    model = str(before / "model") if before else "Qwen/Qwen2.5-VL-3B-Instruct"
    config = {"model": model, "data": str(data), "out": str(folder), "group_size": 2}
    config |= {"max_steps": steps, "batch_size": 16, "thinking": True, "without": ["iou"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, steps + 1)])
    write_lines(folder / "rollouts.jsonl", [group_row(1, 1.0, 1.0), group_row(2, 1.0, 3.0)])
    write_image(data / "images" / "train2015" / "a.jpg")
    return folder


def metrics_row(step):
    row = {"step": step, "loss": 1 / step, "grad_norm": 1.0, "kl": 0.01 * step, "entropy": 0.5}
    row |= {"logprob_gap": 1e-3, "clip_fraction": 0.0, "truncated": 0.0, "skipped": False}
    row |= {"completion_length": 90.0, "zero_variance_groups": 0.25}
    for part in ("total", "format", "object", "verb", "iou"):
        row |= {f"reward_{part}": 0.5 + 0.01 * step, f"reward_{part}_std": 0.1}
    row |= {"advantage_format": -0.1, "advantage_object": 0.0, "advantage_verb": 0.4}
    row |= {"advantage_iou": 0.7, "instances": 1.2, "instances_true": 2.3}
    row |= {"verbs_per_instance": 1.1, "verbs_per_instance_true": 1.5}
    row |= {"seconds_sample": 3.0, "seconds_reward": 0.5, "seconds_update": 4.0}
    row |= {"seconds_waiting": 0.5, "seconds": 9.0, "share_waiting": 0.05}
    return row | ({"eval_map": float(step), "eval_reward": 1.0} if step % 5 == 0 else {})


def group_row(step, *totals):
    completion = {"text": format_completion([TRUTH], EVIL), "format": 0.2}
    completion |= {"object": 0.0, "verb": 0.0, "iou": 0.0}
    completions = [completion | {"total": total} for total in totals]
    return {"step": step, "file_name": "a.jpg", "completions": completions}


def write_prediction(root, rewards=(3.0, 1.0, 2.0), *, data=None):
    """A prediction of as many images as there are rewards, and its mAP, in root/test."""
    folder, data = root / "test", data or root / "data"
    folder.mkdir(parents=True)
    config = {"model": str(root / "grpo" / "model"), "data": str(data), "split": "test"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"images": len(rewards), "truncated": 0.5}))
    instance = {"human": TRUTH.human, "object": TRUTH.object, "object_class": "bicycle"}
    instance |= {"verbs": ["ride"], "scores": [1.0]}
    rows = []
    for i, total in enumerate(rewards):
        line = {"file_name": f"{i}.jpg", "text": EVIL, "instances": [instance]}
        reward = None if total is None else {"format": 0.2, "total": total}
        rows.append({"index": i, "line": line, "reward": reward})
        write_image(data / "images" / "test2015" / f"{i}.jpg")
    write_lines(folder / "part-0000.jsonl", rows)
    write_lines(folder / "predictions.jsonl", [row["line"] for row in rows])
    (folder / "map.json").write_text(json.dumps(result()))
    return folder


def result(**changes):
    """A result of evaluate.py in which class i has an AP of i / 1000."""
    ap = [i / 1000 for i in range(len(HOI_CLASSES))]
    means = {"full": 0.1234, "rare": None, "non_rare": 0.2, "ap": ap}
    pairs = [7] * 599 + [0]
    values = {"default": means, "known_object": means, "max_recall": [0.5] * 599 + [None]}
    return values | {"true_pairs": pairs, "classes": "present", "num_images": 3} | changes

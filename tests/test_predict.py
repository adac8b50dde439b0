"""predict.py: --eval-every logs what predict and evaluate.py find."""

import json
import shutil

import pytest

import evaluate
from engine.data import annotations
from tests.annotation_files import own_line, write_own
from tests.runs import config_of, metrics, run


def write_held_out(folder, out):
    """A folder with four test images. The first one is also the only training image."""
    (out / "images").mkdir(parents=True)
    samples, lines = annotations.load_split(folder / "data", "train")[:4], []
    for sample in samples:
        shutil.copy(sample.path, out / "images")
        pairs = [(pair.human, pair.object, pair.hoi_id) for pair in sample.pairs]
        size = {"width": sample.width, "height": sample.height}
        lines.append(own_line(sample.file_name, "test", pairs) | size)
    write_own(out, *lines, lines[0] | {"split": "train"})


def test_evaluation_in_training_equals_predict(folder, tmp_path):
    """--eval-every logs after the last step what predict and evaluate say of the exported model.

    The model learns one image by heart. It is the first of the two images of the evaluation.
    """
    data = tmp_path / "data"
    write_held_out(folder, data)
    common = {"data": str(data), "thinking": False}
    options = {"traces": "", "batch_size": 1, "learning_rate": 1e-2, "max_steps": 25}
    options |= {"eval_every": 25, "eval_images": 2, "eval_max_new_tokens": 30}
    run(config_of("sft", folder, tmp_path / "run", **options, **common))
    options = {"model": str(tmp_path / "run" / "model"), "limit": 2, "max_new_tokens": 30}
    run(config_of("predict", folder, tmp_path / "test", **options, **common))
    lines = (tmp_path / "test" / "predictions.jsonl").read_text().splitlines()
    samples, counts = annotations.load_split(data, "test")[:2], annotations.training_counts(data)
    rows = [json.loads(line) for line in lines]
    expected = evaluate.evaluate(rows, samples, counts, classes="present")
    logged = metrics(tmp_path / "run")[-1]
    summary = json.loads((tmp_path / "test" / "summary.json").read_text())
    assert logged["eval_map"] == pytest.approx(100 * expected["default"]["full"])
    assert logged["eval_map"] > 10 and logged["eval_reward"] > 1
    assert logged["eval_reward"] == pytest.approx(summary["reward"]["total"])
    assert logged["eval_length"] == pytest.approx(summary["completion_length"])

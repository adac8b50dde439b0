"""predict.py: rows of a model that is right; and what --eval-every logs is what predict finds."""

import json
import math
import shutil

import pytest
import torch

import evaluate
import predict
from engine.data import annotations
from engine.model.policy import load_model
from engine.sampling.sampler import Rollout
from sft import supervised_text
from tests.annotation_files import own_line, write_own
from tests.runs import config_of, examples_of, metrics, run


@pytest.mark.parametrize("scores", ["ones", "likelihood"])
def test_predictions_of_a_model_that_is_right(folder, ranks, monkeypatch, scores):
    """predict_rows on completions that are the ground truth, each token with log-prob -0.01."""
    config = config_of("predict", folder, "x")
    samples = annotations.load_split(folder / "data", "test")
    examples = examples_of(config, samples)
    texts = [supervised_text(examples[i].text_hois, "x") for i in range(len(samples))]
    answers = [examples.token_ids(text) for text in texts]

    class Sampler:
        """In place of a model: all prompts are under way at a time, and the last ends first."""

        def __init__(self, model, **options):
            assert options["banned"][examples.image_id] and options["temperature"] == 0

        def run(self, prompts):
            for number in reversed(range(len(list(prompts)))):
                ids = answers[number]
                logprobs = [torch.full((len(ids),), -0.01)]
                yield number, Rollout([ids], logprobs, torch.ones(1), logprobs)

    monkeypatch.setattr(predict, "Sampler", Sampler)
    model, indices = load_model(config.model, ranks.device), list(range(len(samples)))
    options = {"max_new_tokens": 9, "slots": 1, "scores": scores}
    rows = list(predict.predict_rows(model, examples, indices, ranks, **options))
    assert [row["index"] for row in rows] == indices[::-1]
    for row, sample in zip(reversed(rows), samples, strict=True):
        assert row["line"]["file_name"] == sample.file_name and row["finished"]
        # Eq. 7 as printed punishes a person's second object: 0.6 of two instances' mean
        shared = len({hoi.human for hoi in sample.hois}) < len(sample.hois)
        assert row["reward"]["total"] == pytest.approx(3.5 if shared else 3.8)
        for instance, hoi in zip(row["line"]["instances"], sample.hois, strict=True):
            assert instance["human"] == pytest.approx(hoi.human, abs=0.5)
            if scores == "ones":
                assert instance["scores"] == [1.0] * len(hoi.verbs)
            else:  # some 15 of the answer's tokens
                assert math.exp(-0.01 * row["length"]) < instance["scores"][0] < 0.95


def write_held_out(folder, out):
    """A folder in which the one training image is the first of four test images."""
    (out / "images").mkdir(parents=True)
    samples, lines = annotations.load_split(folder / "data", "train")[:4], []
    for split, part in (("train", samples[:1]), ("test", samples)):
        for sample in part:
            shutil.copy(sample.path, out / "images")
            pairs = [(pair.human, pair.object, pair.hoi_id) for pair in sample.pairs]
            size = {"width": sample.width, "height": sample.height}
            lines.append(own_line(sample.file_name, split, pairs) | size)
    write_own(out, *lines)


def test_evaluation_in_training_is_of_the_present_weights(folder, tmp_path):
    """What --eval-every logs after the last step is what predict says of the exported model.

    One image is learned by heart, and two are held out, of which it is the first.
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

"""hicodet.py, its language: the prompt, and real annotations as text."""

import hashlib

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import evaluate
import hicodet
from engine.data import annotations
from engine.scoring.predictions import predicted_instances, rank_scores
from tests.conftest import HICO_DET

QWEN_PIXELS = {"factor": 28, "min_pixels": 3136, "max_pixels": 12845056}


PROMPT_SHA256 = "02de28236c8a0d32bc0a0313abb6ac85890074adbe9bb3dd2444114288bffea3"  # the authors'


def test_fig4_prompt_equals_the_authors():
    text = hicodet.prompt_text()
    assert len(text) == 6844
    assert hashlib.sha256(text.encode()).hexdigest() == PROMPT_SHA256


TABLE_2 = {  # (thinking, task_description) -> the first line of the text, and the next words
    (True, True): ("You are an HOI detection model. Follow this exact structure:", "<VALID OBJECT"),
    (False, True): ("You are an HOI detection model. Follow this exact structure:", "<VALID OBJEC"),
    (True, False): ("Follow this exact structure:", "Thinking Process:\n1. How many"),
    (False, False): ("Follow this exact structure:", "EXAMPLE OUTPUT FORMAT:\n<answer>\n[\n    {"),
}


@pytest.mark.parametrize("thinking, task_description", TABLE_2)
def test_prompt_ablations_of_table_2(thinking, task_description):
    text = hicodet.prompt_text(thinking=thinking, task_description=task_description)
    opening, following = TABLE_2[thinking, task_description]
    assert text.startswith(f"{opening}\n\n{following}")
    assert ("Thinking Process" in text) == ("<think>" in text) == thinking
    assert ("zebra: feed, hold, pet, watch, no interaction\n\n" in text) == task_description
    assert "\n\nEXAMPLE OUTPUT FORMAT:\n" in text and text.endswith("\n    ...\n]\n</answer>")
    assert "\n\n\n" not in text  # one empty line between parts
    assert not hicodet.parse_completion(text).instances  # a copy of the prompt earns nothing


def in_model_frame(sample):
    """The sample's instances and the (width, height) that they are written for."""
    model = smart_resize(sample.height, sample.width, **QWEN_PIXELS)[::-1]
    size = (sample.width, sample.height)
    return [hicodet.in_frame(hoi, size, model) for hoi in sample.hois], model


def test_real_annotations_survive_as_text(real_samples):
    for sample in real_samples:
        hois, _ = in_model_frame(sample)
        completion = hicodet.parse_completion(hicodet.format_completion(hois, "People."))
        for found, hoi in zip(completion.instances, hois, strict=True):
            assert found.human == tuple(map(round, hoi.human))
            assert found.object == tuple(map(round, hoi.object))
            assert (found.object_class, found.verbs) == (hoi.object_class, hoi.verbs)
            assert found.key_count == 4


@pytest.mark.parametrize("frame, full", [("model", 0.9966), ("original", 0.9970)])
def test_map_of_the_ground_truth_as_text(frame, full, real_samples):
    lines = []
    for sample in real_samples:
        size = sample.width, sample.height
        hois, model = in_model_frame(sample) if frame == "model" else (sample.hois, size)
        completion = hicodet.parse_completion(hicodet.format_answer(hois))
        instances = predicted_instances(completion, size, model, rank_scores(completion))
        lines.append({"file_name": sample.file_name, "instances": instances})
    result = evaluate.evaluate(lines, real_samples, annotations.training_counts(HICO_DET))
    assert result["default"]["full"] == pytest.approx(full, abs=0.0005)

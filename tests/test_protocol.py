"""Box frames, recorded prompt options, model folders as the Hub has them, exports."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import hicodet
import predict
from engine.data import annotations
from engine.data.examples import PROMPT_FILE, PromptOptions, prompt_options
from engine.model.policy import load_model
from engine.sampling.sampler import Sampler
from tests.runs import config_of, examples_of, refusal, run, same_weights
from tests.test_quantized import write_twins
from tests.tiny import collect, generate, plain_logprobs


@pytest.fixture
def doubling_model(folder, tmp_path):
    """The tiny model with a processor that doubles the images of the toy, 224 x 112."""
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"min_pixels": 448 * 224, "max_pixels": 448 * 224}
    settings.pop("size", None)
    path.write_text(json.dumps(settings))
    return str(tmp_path / "model")


# The frame of boxes


@pytest.mark.parametrize("frame, size", [
    ("model", (448, 224)), ("original", (224, 112)), ("thousand", (1000, 1000))
])  # fmt: skip
def test_text_has_boxes_in_the_frame_of_box_frame(frame, size, doubling_model, folder):
    """In SFT's target and the rewards' ground truth. Predictions are converted back."""
    config = config_of("sft", folder, "x", model=doubling_model, box_frame=frame)
    sample = annotations.load_split(folder / "data", "train")[0]
    examples = examples_of(config, [sample], {sample.file_name: "x"})
    example = examples[0]
    assert example.model_size == (448, 224) and example.text_size == size
    scales = (size[0] / 224, size[1] / 112) * 2
    text = examples.decode(example.target_ids)
    for written, true, hoi in zip(
        hicodet.parse_completion(text).instances, example.text_hois, sample.hois, strict=True
    ):
        assert written.human == tuple(round(s * side) for s, side in zip(scales, hoi.human))
        assert true.object == pytest.approx([s * side for s, side in zip(scales, hoi.object)])
    logprobs = torch.zeros(len(example.target_ids))
    row = predict.prediction(examples, example, example.target_ids, logprobs, "rank")
    for found, hoi in zip(row["line"]["instances"], sample.hois, strict=True):
        assert found["human"] == pytest.approx(hoi.human, abs=0.5)
        assert found["object"] == pytest.approx(hoi.object, abs=0.5)
        assert (found["object_class"], tuple(found["verbs"])) == (hoi.object_class, hoi.verbs)
    assert row["reward"]["iou"] > 0.98


def test_trained_folder_knows_its_prompt(folder, tmp_path):
    """The next stages take its options as defaults and refuse contradicting flags."""
    recorded = {"thinking": False, "task_description": False, "box_frame": "original"}
    recorded |= {"text_first": True}
    run(config_of("sft", folder, tmp_path / "run", traces="", max_steps=1, **recorded))
    model = str(tmp_path / "run" / "model")
    assert json.loads((tmp_path / "run" / "model" / "prompt.json").read_text()) == recorded
    default = {"model": model, "task_description": None, "max_new_tokens": 2}
    for stage, short in (("predict", {"limit": 1}), ("grpo", {"max_steps": 1})):
        run(config_of(stage, folder, tmp_path / stage, **default, **short))
        used = json.loads((tmp_path / stage / "config.json").read_text())
        assert {name: used[name] for name in recorded} == recorded
    found = json.loads((tmp_path / "grpo" / "model" / "prompt.json").read_text())
    assert found == recorded
    flags = {"--thinking": {"thinking": True}, "--box-frame model": {"box_frame": "model"}}
    flags["--no-text-first"] = {"text_first": False}
    for flag, asked in flags.items():
        found = refusal(config_of("predict", folder, tmp_path / "q", **default | asked))
        assert found == f"{flag}: {model} was not trained with it; leave the option out"


def test_prompt_options_that_cannot_be_read_are_named(folder, tmp_path):
    for text, said in (("{", "is damaged: no JSON"), ('{"other": 1}', "not the prompt options")):
        (tmp_path / PROMPT_FILE).write_text(text)
        with pytest.raises(hicodet.InputError, match=f"{tmp_path / PROMPT_FILE}.*{said}"):
            prompt_options(str(folder / "model"), str(tmp_path))


def test_prompt_options_of_other_models(folder, tmp_path):
    """The paper's, or those of the flags. An adapter has its own."""
    model = str(folder / "model")
    assert prompt_options(model, "", thinking=None) == PromptOptions(True, True, "model")
    asked = {"thinking": False, "box_frame": "original"}
    assert prompt_options(model, "", **asked) == PromptOptions(False, True, "original")
    (tmp_path / PROMPT_FILE).write_text(json.dumps(vars(PromptOptions())))
    with pytest.raises(hicodet.InputError, match=f"^--no-thinking: {tmp_path} was not trained"):
        prompt_options(model, str(tmp_path), thinking=False)


# A folder of the Hub


@pytest.fixture
def hub_folder(folder, tmp_path):
    """Flat configuration, older keys, fp16, tied head, a near-greedy generation_config."""
    write_twins(folder, tmp_path)
    near_greedy = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.05}
    (tmp_path / "plain" / "generation_config.json").write_text(json.dumps(near_greedy))
    return tmp_path / "plain"


def test_hub_folder_equals_the_librarys_model(hub_folder, folder):
    mine = load_model(str(hub_folder), torch.device("cpu"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub_folder, dtype=torch.float32)
    assert mine.lm_head.weight.data_ptr() == mine.get_input_embeddings().weight.data_ptr()
    config = config_of("predict", folder, "x", model=str(hub_folder))
    examples = examples_of(config, annotations.load_split(folder / "data", "test")[:2])
    prompts = [examples[i].prompt for i in range(2)]
    options = {"slots": 2, "prompt_room": examples.longest_prompt(), "end_id": examples.end_id}
    sampler = Sampler(mine, group_size=4, max_new_tokens=8, **options)
    rollout = collect(sampler, prompts, list(range(8)))
    assert len({tuple(ids.tolist()) for ids in rollout.completion_ids}) == 8  # not near-greedy
    for row, (ids, logprobs) in enumerate(zip(rollout.completion_ids, rollout.logprobs)):
        expected = plain_logprobs(plain, prompts[row // 4], ids)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [1, 3])
def test_repetition_penalty_equals_the_librarys(model, reference, prompts, slots):
    options = {"group_size": 1, "max_new_tokens": 12, "end_id": -1, "temperature": 0}
    room = max(len(prompt.prompt_ids) for prompt in prompts)
    sampler = Sampler(model, slots=slots, prompt_room=room, repetition_penalty=1.3, **options)
    found = [ids.tolist() for ids in collect(sampler, prompts).completion_ids]
    for prompt, mine in zip(prompts, found, strict=True):
        expected = generate(reference, prompt, 12, -1, repetition_penalty=1.3)
        assert mine == expected.tolist()
    plain = Sampler(model, slots=slots, prompt_room=room, **options)
    assert [ids.tolist() for ids in collect(plain, prompts).completion_ids] != found


# What a run lists and exports


def test_images_without_a_trace_are_listed_in_the_run(folder, tmp_path):
    run(config_of("sft", folder, tmp_path / "run", max_steps=1))
    names = [sample.file_name for sample in annotations.load_split(folder / "data", "train")]
    assert (tmp_path / "run" / "untraced.txt").read_text().split() == names[20:]
    config = replace(config_of("sft", folder, tmp_path / "other"), untraced=None)
    assert "4 of 24 annotated images" in refusal(config)


def test_export_every_keeps_models_of_earlier_steps(folder, tmp_path):
    run(config_of("sft", folder, tmp_path / "run", max_steps=4, export_every=2, save_every=0))
    found = sorted((tmp_path / "run").glob("model*"))
    assert [path.name for path in found] == ["model", "model-000002", "model-000004"]
    end, two, last = (load_file(path / "model.safetensors") for path in found)
    assert same_weights(last, end) and not same_weights(two, end)
    model = str(found[1])
    run(config_of("predict", folder, tmp_path / "p", model=model, limit=1, max_new_tokens=2))

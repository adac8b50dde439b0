"""engine/model/families.py: each family equals the library's model and runs all commands."""

import json

import pytest

import evaluate
from demo import toy
from engine.data.examples import prompt_options
from engine.model.attention import use_group_attention
from engine.model.families import FAMILIES
from tests.runs import config_of, metrics, refusal, run
from tests.test_lora_runs import assert_same_results, stopped_copy
from tests.test_packing import (  # noqa: F401  these tests run for each family
    test_gradient_checkpointing_changes_only_memory,
    test_gradients_equal_separate_forwards,
    test_token_logprobs_equal_separate_forwards,
)
from tests.test_sampler import (  # noqa: F401
    test_greedy_ids_equal_generate,
    test_what_was_sampled_from_equals_a_fresh_forward,
)
from tests.tiny import family_config, family_model, write_family


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, seed):
    """A tiny model of each family; the imported tests use it too."""
    return use_group_attention(family_model(request.param, seed))


@pytest.mark.parametrize("family, frame", [
    ("qwen2_5_vl", "model"), ("qwen2_vl", "thousand"), ("qwen3_vl", "thousand")
])  # fmt: skip
def test_default_frame_of_boxes_is_that_of_the_family(family, frame, tmp_path):
    family_config(family).save_pretrained(tmp_path)
    assert prompt_options(str(tmp_path), "").box_frame == frame
    assert prompt_options(str(tmp_path), "", box_frame="original").box_frame == "original"


def test_folder_that_does_not_fit_is_refused(folder, tmp_path):
    """Packed weights of a family that has none, and weights that open <think> themselves."""
    path = tmp_path / "model"
    write_family(path, "qwen3_vl")
    config = config_of("predict", folder, tmp_path / "out", model=str(path))
    values = json.loads((path / "config.json").read_text())
    packed = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
    packed = {"quantization_config": packed | {"group_size": 32}}
    (path / "config.json").write_text(json.dumps(values | packed))
    said = f"--model {path}: quantised qwen3_vl is not supported"
    assert refusal(config).startswith(said)
    (path / "config.json").write_text(json.dumps(values))
    opens = toy.CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
    (path / "chat_template.jinja").write_text(opens)
    said = f"--model {path}: its chat template opens <think> itself, as Thinking weights do"
    assert refusal(config).startswith(said)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_tiny_family_runs_all_commands(family, folder, tmp_path):
    """SFT after which rewards differ, GRPO stopped and resumed, prediction, mAP."""
    write_family(tmp_path / "base", family)
    base = str(tmp_path / "base")
    run(config_of("sft", folder, tmp_path / "sft", model=base, batch_size=8, max_steps=25))
    options = {"max_new_tokens": 40, "save_every": 1, "learning_rate": 1e-3}
    options["model"] = str(tmp_path / "sft" / "model")
    run(config_of("grpo", folder, tmp_path / "whole", **options))
    stopped_copy(tmp_path / "whole", tmp_path / "resumed", 2)
    run(config_of("grpo", folder, tmp_path / "resumed", resume=True, **options))
    assert_same_results(tmp_path / "whole", tmp_path / "resumed", tmp_path / "sft")
    assert max(row["logprob_gap"] for row in metrics(tmp_path / "whole")) < 1e-4
    model, out = str(tmp_path / "resumed" / "model"), tmp_path / "test"
    run(config_of("predict", folder, out, model=model, max_new_tokens=40))
    assert json.loads((out / "config.json").read_text())["box_frame"] == "thousand"
    evaluate.main([str(out / "predictions.jsonl"), "--data", str(folder / "data")])

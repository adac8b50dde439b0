"""hoi_r1.py: what a flag says is what arrives, each at another value than its default."""

import inspect
import json

import pytest

import engine.attention
import engine.examples
import engine.policy
import engine.sampler
import grpo
import hicodet
import hoi_r1
import predict
import rewards
import sft
import train
from tests.runs import config_of, metrics


@pytest.fixture
def arrived(monkeypatch):
    """Note the arguments of every call of a function, which does what it did."""

    def note(owner, name):
        function, calls = getattr(owner, name), []
        signature = inspect.signature(function)

        def noting(*values, **options):
            calls.append(signature.bind(*values, **options).arguments)
            return function(*values, **options)

        monkeypatch.setattr(owner, name, noting)
        return calls

    return note


def assert_holds(arguments, **expected):
    assert {name: arguments.get(name) for name in expected} == expected


# behind two steps of warm-up (1 + cos(pi k / 3)) / 2 of the highest rate, or 1 - k / 3
FALLING = {"sft": [0.75, 0.25], "grpo": [2 / 3, 1 / 3]}


@pytest.mark.parametrize("stage", FALLING)
def test_options_of_both_trainings(stage, folder, tmp_path, arrived):
    stepper, reading = arrived(train, "Stepper"), arrived(engine.examples, "read_ahead")
    policy, parts = arrived(train, "load_policy"), arrived(sft if stage == "sft" else grpo, "micro_batches")
    updating = {"sft": (train, "sft_update"), "grpo": (grpo.GRPOTrainer, "update")}
    updates = arrived(*updating[stage])
    limits = {"weight_decay": 0.2, "max_grad_norm": 0.3}
    options = {"seed": 7, "workers": 1, "batch_size": 2, "max_steps": 5, "warmup_steps": 2}
    options |= {"adam_beta2": 0.9, "tokens_per_microbatch": 321, "gradient_checkpointing": False}
    hoi_r1.main(config_of(stage, folder, tmp_path / "run", **options, **limits))
    assert_holds(stepper[0], beta2=0.9, **limits)
    order = engine.examples.batch_order(20 if stage == "sft" else 24, 2, 5, seed=7)
    assert_holds(reading[0], indices=sum(order, []), workers=1)
    assert_holds(policy[0], gradient_checkpointing=False)
    assert {call["budget"] for call in parts} == {321} and len(parts) == 5
    rates = [1e-3 * part for part in (0.5, 1, 1, *FALLING[stage])]
    assert [call["lr"] for call in updates] == pytest.approx(rates)
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx(rates)


def test_options_of_grpo(folder, tmp_path, arrived):
    sampler, reward = arrived(grpo, "Sampler"), arrived(rewards, "total_reward")
    objective, logprobs = arrived(grpo, "grpo_objective"), arrived(grpo, "token_logprobs")
    terms = {"clip_eps": 0.3, "kl_coef": 0.2, "ratio": "sequence"}
    drawing = {"slots": 1, "group_size": 3, "max_new_tokens": 9, "temperature": 0.7}
    read = {"duplicate_rule": "pair", "without": ("iou",)}
    options = {"batch_size": 2, "max_steps": 1, "updates_per_batch": 2, **terms, **drawing, **read}
    hoi_r1.main(config_of("grpo", folder, tmp_path / "run", **options))
    assert_holds(sampler[0], **drawing)
    assert len(objective) == 2 and len(reward) == 6
    for call in objective:
        assert_holds(call, **terms)
    for call in reward:
        assert_holds(call, **read)
    assert {call["temperature"] for call in logprobs} == {0.7}


def test_options_of_predict(folder, tmp_path, arrived):
    rows, sampler = arrived(predict, "predict_rows"), arrived(predict, "Sampler")
    options = {"max_new_tokens": 3, "slots": 2, "workers": 1, "scores": "likelihood"}
    switches = {"thinking": False, "task_description": True}
    config = config_of(
        "predict", folder, tmp_path / "run", split="train", limit=4, **options, **switches
    )
    hoi_r1.main(config)
    assert_holds(rows[0], **options)
    assert_holds(sampler[0], max_new_tokens=3, slots=2, temperature=0)
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    names = [sample.file_name for sample in hicodet.load_split(folder / "data", "train")[:4]]
    assert [json.loads(line)["file_name"] for line in lines] == names
    examples = rows[0]["examples"]
    asked = examples.decode(examples[0].prompt.prompt_ids)
    assert "airplane: board, direct" in asked and "Thinking Process" not in asked

"""--text-first: the text shared by all prompts is computed once, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

import engine.model.attention
import engine.sampling.decode_step
from engine.data import annotations
from engine.data.examples import Examples, PromptOptions
from engine.model.packing import pack
from tests.runs import config_of, metrics, run
from tests.test_end_to_end import assert_equal_metrics, difference, stage
from tests.test_flash import masked_varlen
from tests.test_lora import assert_near, backward, plainly_scored, scored
from tests.test_lora_runs import assert_same_results, stopped_copy
from tests.tiny import generate, make_prompt, sample, text_ids

TEXT = 140  # tokens; a text of 128 or more is shared
TASK = {"task_description": True, "text_first": True}  # 3,287 tokens of text


@pytest.fixture(scope="module")
def prompts(model, seed):
    """One text, followed by three images of unequal sizes and by different words."""
    generator = torch.Generator().manual_seed(seed)
    text = text_ids(model, TEXT, generator)
    ends = [make_prompt(model, *size, 0, 5, generator) for size in ((2, 3), (4, 2), (3, 3))]
    return [replace(end, prompt_ids=torch.cat([text, end.prompt_ids])) for end in ends]


@pytest.fixture(params=["cpu", "gpu"])
def path(request, monkeypatch):
    """How attention is computed: by SDPA, or by a substitute for a GPU's kernel."""
    if request.param == "gpu":
        for module in (engine.model.attention, engine.sampling.decode_step):
            monkeypatch.setattr(module, "has_flash", lambda x: True)
        monkeypatch.setattr(engine.model.attention, "varlen_attn", masked_varlen)


def test_shared_row_equals_separate_forwards(path, model, reference, prompts, completions):
    batch = pack(model, prompts, completions)
    apart = sum(len(p.prompt_ids) + sum(map(len, c)) for p, c in zip(prompts, completions))
    assert batch.layout.prefix == TEXT and batch.input_ids.shape[1] == apart - 2 * TEXT
    found = scored(model, prompts, completions)
    expected = plainly_scored(reference, prompts, completions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.zero_grad(), reference.zero_grad()
    backward(found, expected)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert_near(mine.grad, other.grad, 1e-4)
    model.zero_grad(), reference.zero_grad()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_greedy_ids_equal_generate(path, model, reference, prompts, slots):
    """slots: prompts in one prefill. Two or more share their text."""
    options = {"group_size": 1, "temperature": 0, "max_new_tokens": 12, "end_id": -1}
    found = sample(model, prompts, slots=slots, **options)
    for prompt, ids in zip(prompts, found.completion_ids, strict=True):
        assert ids.tolist() == generate(reference, prompt, 12, -1).tolist()


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    run(sft_config(folder, out / "whole", save_every=1))
    return out


def sft_config(folder, out, **more):
    return config_of("sft", folder, out, batch_size=4, max_steps=2, **TASK | more)


def test_separate_rows_and_a_resumed_run_train_alike(runs, folder):
    run(sft_config(folder, runs / "apart", tokens_per_microbatch=1))
    assert_equal_metrics(runs / "whole", runs / "apart")
    assert difference(runs / "whole", runs / "apart") < 1e-4
    stopped_copy(runs / "whole", runs / "resumed", 1)
    run(sft_config(folder, runs / "resumed", save_every=1, resume=True))
    assert_same_results(runs / "whole", runs / "resumed", folder)


@pytest.mark.slow
def test_two_ranks_equal_one(runs, folder):
    flags = ["--model", folder / "model", "--data", folder / "data", "--out", runs / "two"]
    flags += ["--traces", folder / "traces.jsonl", "--untraced", "skip", "--workers", 0]
    flags += ["--batch-size", 4, "--max-steps", 2, "--learning-rate", 1e-3, "--text-first"]
    stage("sft", *flags, ranks=2)
    assert_equal_metrics(runs / "whole", runs / "two")
    assert difference(runs / "whole", runs / "two") < 1e-4 < difference(runs / "whole", folder)


def test_grpo_samples_what_it_trains(runs, folder):
    """No flag is needed, as the folder says that the text comes first."""
    options = {"model": str(runs / "whole" / "model"), "task_description": None, "group_size": 2}
    run(config_of("grpo", folder, runs / "grpo", max_steps=1, max_new_tokens=8, **options))
    assert 0 < metrics(runs / "grpo")[0]["logprob_gap"] < 1e-4


def test_image_follows_the_text(folder):
    samples = annotations.load_split(folder / "data", "test")[:1]
    for text_first in (False, True):
        options = PromptOptions(task_description=False, text_first=text_first)
        example = Examples(str(folder / "model"), samples, options)
        ids = example[0].prompt.prompt_ids
        after = ids[int((ids == example.image_id).nonzero()[-1]) + 1 :]
        assert (len(after) < 12) == text_first and example.decode(after).endswith("assistant\n")

"""engine/sampling/slots.py: slots for given memory, and a prefill that runs out of it."""

import copy

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from demo.toy import tiny_model
from engine.ranks import Ranks
from engine.sampling.slots import choose_slots, slot_bytes
from hicodet import InputError
from tests.tiny import sample

GPU = torch.device("cuda", 0)
IMAGES = 9658  # of the test split


# 2 * 64 layers * 8 heads * 128 * 2 bytes = 262,144; 2 * 80 * 8 * 128 * 2 = 327,680
@pytest.mark.parametrize("width, layers, heads, a_token", [
    (5120, 64, 40, 262_144), (8192, 80, 64, 327_680),  # of 32B and 72B
])  # fmt: skip
def test_bytes_of_a_slot(width, layers, heads, a_token):
    """Prompts and completions fill whole blocks of 128 keys: 20 for 2,500, 16 for 2,048."""
    text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = Qwen2_5_VLConfig(text_config=text | {"num_key_value_heads": 8}).text_config
    assert slot_bytes(config, torch.bfloat16, 1, 2500, 2048) == (20 + 16) * 128 * a_token
    assert slot_bytes(config, torch.bfloat16, 4, 2500, 2048) == (20 + 4 * 16) * 128 * a_token


@pytest.fixture
def slots_of(monkeypatch):
    """`choose_slots` on a GPU whose free memory holds `fitting` slots and a prefill."""

    def choose(asked, images, fitting):
        model, room = tiny_model(), {"group_size": 1, "prompt_room": 300, "new": 100}
        free = fitting * slot_bytes(model.config.text_config, model.dtype, 1, 300, 100) / 0.75
        calls = []  # memory that PyTorch holds without using it counts as free
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
        found = (int(free) + 1, 10**12)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls and found)
        return choose_slots(model, Ranks(0, 1, GPU), asked, images, **room)

    return choose


@pytest.mark.parametrize("asked, images, fitting, expected", [
    (0, IMAGES, 999, 64), (0, IMAGES, 10, 10), (0, 3, 10, 3), (80, IMAGES, 999, 80),
    (7, IMAGES, 10, 7), (11, IMAGES, 10, 10), (0, 0, 10, 1),
])  # fmt: skip
def test_number_of_slots(asked, images, fitting, expected, slots_of, capsys):
    """At most the number asked for (0: 64) and no more than images. Fewer are announced."""
    assert slots_of(asked, images, fitting) == expected
    said = capsys.readouterr().out
    assert said.startswith("10 images at a time: 0.0 GB are free, and an image takes 0.00 GB") == (
        expected == 10
    )


def test_model_without_room_for_a_slot_is_refused(slots_of):
    with pytest.raises(InputError, match="not one image fits at a time: .*; take a smaller model"):
        slots_of(0, IMAGES, 0.9)


@pytest.fixture
def limited(model):
    """A copy of the model that has memory for `most` prompts, and the numbers that it tried."""

    def limit(most: int):
        small, taken = copy.deepcopy(model), []

        def refuse(visual, args, options):
            taken.append(len(options["grid_thw"]))
            if taken[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        small.model.visual.register_forward_pre_hook(refuse, with_kwargs=True)
        return small, taken

    return limit


OPTIONS = {"group_size": 2, "max_new_tokens": 8, "end_id": 7, "seeds": list(range(24))}


def test_prefill_that_runs_out_of_memory_takes_fewer_prompts(model, prompts, limited):
    """It tries 12, 6, 3, and later never more than 3. The completions are the same."""
    small, taken = limited(3)
    found, expected = (sample(one, prompts * 4, **OPTIONS) for one in (small, model))
    assert taken == [12, 6, 3, 3, 3, 3]
    for mine, other in zip(found.completion_ids, expected.completion_ids, strict=True):
        assert mine.tolist() == other.tolist()


def test_too_little_memory_for_one_prompt_is_refused(prompts, limited):
    with pytest.raises(InputError, match="memory runs out at one prompt: lower --slots"):
        sample(limited(0)[0], prompts * 4, **OPTIONS)

"""Samples as the model reads them, supervised tokens, and scores of instances."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hicodet
import predict
import sft
from engine.data import annotations
from engine.model.packing import pack, token_logprobs
from engine.model.policy import load_model
from engine.traces.template import template_trace
from engine.traces.trace_file import read_traces, traces_of
from tests.runs import config_of, examples_of, refusal
from tests.tiny import plain_logprobs

SHARED = Path(__file__).resolve().parents[2] / "shared"


# What is supervised


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    """A model folder with the real tokenizer and image processor, and no weights."""
    source = SHARED / "qwen2.5-vl"
    if not source.is_dir():
        pytest.skip("the tokenizer files of Qwen2.5-VL are not in ../shared/qwen2.5-vl")
    folder = tmp_path_factory.mktemp("qwen")
    for path in source.iterdir():
        shutil.copy(path, folder)
    Qwen2_5_VLConfig(vision_config={"out_hidden_size": 8192}).save_pretrained(folder)
    return folder


def test_supervised_tokens_with_the_real_tokenizer(folder, real_model):
    config = config_of("sft", folder, "unused", model=str(real_model), task_description=True)
    sample = annotations.load_split(folder / "data", "train")[0]
    think = "There is 1 person."
    example = examples_of(config, [sample], {sample.file_name: think})[0]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    pieces = [tokenizer.decode([i]) for i in example.target_ids.tolist()]
    assert pieces[:4] == ["<th", "ink", ">", " There"] and pieces[-2:] == [">", "<|im_end|>"]
    assert "".join(pieces) == hicodet.format_completion(example.text_hois, think) + "<|im_end|>"
    assert example.target_ids.tolist().count(151645) == 1  # the turn ends once
    text = tokenizer.decode(example.prompt.prompt_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text.endswith("</answer><|im_end|>\n<|im_start|>assistant\n")
    # the image comes first, one token for four patches
    patches = int(example.prompt.image_grid_thw.prod())
    assert text.count("<|image_pad|>") == patches // 4
    assert "<|vision_start|>" + "<|image_pad|>" * (patches // 4) + "<|vision_end|>You are" in text
    assert len(example.prompt.prompt_ids) - patches // 4 == 1970


def test_only_the_target_is_in_the_loss(folder):
    """The packed loss is the mean over the target's tokens in separate forwards (Eq. 1)."""
    config = config_of("sft", folder, "unused")
    samples = annotations.load_split(folder / "data", "train")[:3]
    thinks = {s.file_name: template_trace(s.hois) for s in samples}
    examples = examples_of(config, samples, thinks)
    model = load_model(config.model, torch.device("cpu"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
    batch = [examples[i] for i in range(3)]
    targets = torch.cat([plain_logprobs(plain, e.prompt, e.target_ids) for e in batch])
    packed = pack(model, [e.prompt for e in batch], [[e.target_ids] for e in batch])
    loss = sft.sft_loss(token_logprobs(model, packed), torch.ones(3), len(targets))
    assert loss.item() == pytest.approx(-targets.mean().item(), rel=1e-5)
    assert packed.completion_mask.sum() == len(targets)


def test_eq1_sft_loss():
    # -(ln 0.5 + ln 0.25 + ln 0.5) / 3 = 4 ln 2 / 3; the row of weight 0 does not count
    logprobs = torch.tensor([[0.5, 0.25], [0.5, 1.0], [0.1, 0.1]]).log()
    loss = sft.sft_loss(logprobs, torch.tensor([1.0, 1.0, 0.0]), 3)
    assert loss.item() == pytest.approx(4 * math.log(2) / 3)


def test_images_without_a_trace(folder):
    """Four of 24 have none; the model learns their answer alone."""
    samples = annotations.load_split(folder / "data", "train")
    thinks = read_traces(folder / "traces.jsonl")
    assert len(samples) == 24
    examples = examples_of(config_of("sft", folder, "x"), samples, thinks)
    for number, opening in ((0, "<think>"), (23, "<answer>")):
        assert examples.decode(examples[number].target_ids).startswith(opening)
        asked = examples.decode(examples[number].prompt.prompt_ids)
        assert ("Thinking Process" in asked) == (opening == "<think>")


def test_traces_of_other_images_are_refused(folder, tmp_path):
    """With --untraced answer the run would train without any trace."""
    for options in ({"traces": ""}, {"traces": "no.jsonl"}, {"thinking": False}):
        assert "--traces" in refusal(config_of("sft", folder, "x", **options))
    traces, data = tmp_path / "traces.jsonl", str(folder / "data")
    for text in ((folder / "traces.jsonl").read_text().replace("HICO", "OTHER"), ""):
        traces.write_text(text)
        with pytest.raises(hicodet.InputError, match="none of its .* images is in --data"):
            traces_of(str(traces), data, annotations.load_split(data, "train"))


def test_each_side_of_an_image_has_its_scale(folder, tmp_path):
    """120 x 40 pixels become 112 x 28: x is scaled by 14 / 15, y by 7 / 10."""
    path = tmp_path / "wide.png"
    Image.new("RGB", (120, 40)).save(path)
    hoi = hicodet.HOI((30, 10, 60, 30), (45, 20, 105, 30), "bicycle", ("ride",))
    sample = hicodet.Sample(path.name, path, 120, 40, (hoi,), (), frozenset())
    examples = examples_of(config_of("sft", folder, "x"), [sample], {path.name: "x"})
    assert examples[0].model_size == (112, 28)
    text = examples.decode(examples[0].target_ids)
    assert '"human": [28, 7, 56, 21], "object": [42, 14, 98, 21]' in text
    row = predict.prediction(examples, examples[0], examples[0].target_ids, None, "ones")
    (found,) = row["line"]["instances"]
    assert found["human"] == pytest.approx(hoi.human)
    assert found["object"] == pytest.approx(hoi.object)


def test_banned_ids(folder):
    examples = examples_of(config_of("predict", folder, "x"), [])
    vocabulary = len(examples.tokenizer) + 9
    banned = examples.banned(vocabulary)
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>"):
        assert banned[examples.tokenizer.convert_tokens_to_ids(token)]
    assert not banned[examples.end_id] and banned[-9:].all()
    assert not banned[examples.tokenizer("people ride")["input_ids"]].any()


# Scores and means of predictions


def test_instance_scores_after_invalid_bytes(folder):
    """A score is the probability of an instance's tokens. Invalid UTF-8 before it changes none."""
    examples = examples_of(config_of("predict", folder, "x"), [])
    tokenizer, symbol_of = examples.tokenizer, bytes_to_unicode()
    one, two = '{"human": [1, 2, 3, 4]}', '{"human": [5, 6, 7, 8]}'
    texts = ["<think> é", "", " </think><answer> [", one, ", ", two, "] </answer><|im_end|>"]
    pieces = [tokenizer(text)["input_ids"] for text in texts]
    # 3 of an emoji's 4 bytes, a byte UTF-8 lacks, a lone continuation, half an é, a surrogate
    broken = b"\xf0\x9f\x98 \xff\x80 \xc3 \xed\xa0\x80"
    pieces[1] = tokenizer.convert_tokens_to_ids([symbol_of[byte] for byte in broken])
    ids = torch.tensor(sum(pieces, []))
    logprobs = -torch.rand(len(ids))
    text = examples.decode(ids)
    assert text.count("\ufffd") == 1 + 2 + 1 + 3
    completion = hicodet.parse_completion(text)
    found = predict.instance_scores(tokenizer, completion, ids, logprobs)
    parts = logprobs.split([len(piece) for piece in pieces])
    assert found == pytest.approx([math.exp(parts[3].sum()), math.exp(parts[5].sum())])


def test_summary_of_predictions_by_hand():
    """Four images, one without ground truth. One answer was cut, three hold no instance."""
    answers = [(3.0, 3, ["x"]), (1.0, 9, []), (None, 4, []), (2.0, 4, [])]
    rows = [
        {"reward": total and {"total": total}, "length": length, "finished": length < 9,
         "line": {"instances": found}}
        for total, length, found in answers
    ]  # fmt: skip
    summary = predict.summarise(rows)
    expected = {"images": 4, "reward": {"total": 2.0}, "completion_length": 5.0}
    assert summary == expected | {"truncated": 0.25, "without_instances": 0.75}
    assert predict.summarise(rows[2:3])["reward"] == {}
    (said,) = predict.warnings_of(summary)
    assert said.startswith("warning: most answers hold no interaction that can be read; was the")
    said = predict.warnings_of(summary | {"truncated": 0.6, "without_instances": 0.5})
    assert [line[:30] for line in said] == ["warning: most answers were cut"]

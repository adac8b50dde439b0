"""hoi_r1.py, samples as the model reads them, what is supervised, and scores of instances."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import engine.traces.trace_file
import hicodet
import predict
import sft
import train
from engine.data import annotations
from engine.data.images import read_image
from engine.model.packing import pack, token_logprobs
from engine.model.policy import load_model
from engine.traces.template import template_trace
from tests.runs import config_of, examples_of, refusal

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
    if not hasattr(AutoTokenizer.from_pretrained(folder), "chat_template"):
        shutil.copy(source / "chat_template.json", folder)
    Qwen2_5_VLConfig(vision_config={"out_hidden_size": 8192}).save_pretrained(folder)
    return folder


def test_supervised_tokens_with_the_real_tokenizer(folder, real_model):
    config = config_of("sft", folder, "unused", model=str(real_model), task_description=True)
    sample = annotations.load_split(folder / "data", "train")[0]
    think = "There is 1 person."
    example = examples_of(config, [sample], {sample.file_name: think})[0]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    pieces = [tokenizer.decode([i]) for i in example.target_ids.tolist()]
    # fmt: off
    assert pieces[:19] == [
        "<th", "ink", ">", " There", " is", " ", "1", " person", ".", " </", "think", ">",
        " <", "answer", ">", " [{\"", "human", "\":", " [",
    ]
    # fmt: on
    assert pieces[-6:] == ['"}', "]", " </", "answer", ">", "<|im_end|>"]
    assert "".join(pieces) == hicodet.format_completion(example.text_hois, think) + "<|im_end|>"
    assert example.target_ids.tolist().count(151645) == 1  # one end of the turn, the last token
    text = tokenizer.decode(example.prompt.prompt_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text.endswith("</answer><|im_end|>\n<|im_start|>assistant\n")
    # image first: 224 x 112 toy pixels become the processor's smallest size, patches / 4 tokens
    patches = int(example.prompt.image_grid_thw.prod())
    assert text.count("<|image_pad|>") == patches // 4
    assert "<|vision_start|>" + "<|image_pad|>" * (patches // 4) + "<|vision_end|>You are" in text
    text_tokens = len(example.prompt.prompt_ids) - patches // 4
    assert 1900 < text_tokens < 2050


def test_only_the_target_is_in_the_loss(folder):
    """The packed loss equals cross-entropy with labels on the target's tokens alone (Eq. 1)."""
    config = config_of("sft", folder, "unused")
    samples = annotations.load_split(folder / "data", "train")[:3]
    thinks = {s.file_name: template_trace(s.hois) for s in samples}
    examples = examples_of(config, samples, thinks)
    model = load_model(config.model, torch.device("cpu"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
    total, count = 0.0, 0
    for example in (examples[i] for i in range(3)):
        ids = torch.cat([example.prompt.prompt_ids, example.target_ids])[None]
        labels = ids.clone()
        labels[0, : len(example.prompt.prompt_ids)] = -100
        logits = plain(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=example.prompt.pixel_values,
            image_grid_thw=example.prompt.image_grid_thw,
            mm_token_type_ids=(ids == plain.config.image_token_id).int(),
        ).logits
        total += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += len(example.target_ids)
    batch = [examples[i] for i in range(3)]
    packed = pack(model, [e.prompt for e in batch], [[e.target_ids] for e in batch])
    logprobs = token_logprobs(model, packed)
    loss = sft.sft_loss(logprobs, torch.ones(3), count)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert packed.completion_mask.sum() == count


def test_eq1_sft_loss():
    # -(ln 0.5 + ln 0.25 + ln 0.5) / 3 = 4 ln 2 / 3; the row of weight 0 does not count
    logprobs = torch.tensor([[0.5, 0.25], [0.5, 1.0], [0.1, 0.1]]).log()
    loss = sft.sft_loss(logprobs, torch.tensor([1.0, 1.0, 0.0]), 3)
    assert loss.item() == pytest.approx(4 * math.log(2) / 3)


def test_images_without_a_trace(folder, tmp_path):
    """Left out, or asked for the answer alone; four of the 24 training images have none."""
    samples = annotations.load_split(folder / "data", "train")
    thinks = engine.traces.trace_file.read_traces(folder / "traces.jsonl")
    assert len(samples) == 24
    assert sft.traced_samples(samples, thinks, "skip") == samples[:20]
    assert sft.traced_samples(samples, thinks, "answer") == samples
    examples = examples_of(config_of("sft", folder, "x"), samples, thinks)
    traced, untraced = examples[0], examples[23]
    assert examples.decode(traced.target_ids).startswith("<think>")
    assert examples.decode(untraced.target_ids).startswith("<answer>")
    assert "Thinking Process" in examples.decode(traced.prompt.prompt_ids)
    assert "Thinking Process" not in examples.decode(untraced.prompt.prompt_ids)


def test_an_image_without_ground_truth_trains_nothing(folder, monkeypatch):
    bare = replace(annotations.load_split(folder / "data", "train")[0], hois=())
    monkeypatch.setattr(annotations, "load_split", lambda root, split: [bare])
    assert "no image" in refusal(config_of("grpo", folder, "x"))


def test_sft_asks_for_traces(folder):
    assert "--traces" in refusal(config_of("sft", folder, "x", traces=""))
    assert "--traces" in refusal(config_of("sft", folder, "x", thinking=False))


def test_traces_of_another_data_set_are_refused(folder, tmp_path):
    """--untraced answer would train without a single trace."""
    traces, data = tmp_path / "traces.jsonl", folder / "data"
    traces.write_text((folder / "traces.jsonl").read_text().replace("HICO", "OTHER"))
    said = f"none of its 20 images is in --data {data}; are they of another data set?"
    config = config_of("sft", folder, tmp_path, traces=str(traces), untraced="answer")
    assert refusal(config) == f"--traces {traces}: {said}"
    traces.write_text("")  # no trace at all is no other data set
    assert train.traces_of(str(traces), str(data), annotations.load_split(data, "train")) == {}


def test_boxes_of_the_target_are_in_the_frame_that_the_model_sees(folder, tmp_path):
    """With a processor that doubles the image, every coordinate of the target doubles."""
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"min_pixels": 448 * 224, "max_pixels": 448 * 224}
    settings.pop("size", None)
    path.write_text(json.dumps(settings))
    sample = annotations.load_split(folder / "data", "train")[0]
    assert (sample.width, sample.height) == (224, 112)
    config = config_of("sft", folder, "x", model=str(tmp_path / "model"))
    examples = examples_of(config, [sample], {sample.file_name: "x"})
    assert examples[0].model_size == (448, 224)
    written = hicodet.parse_completion(examples.decode(examples[0].target_ids)).instances
    for instance, hoi in zip(written, sample.hois, strict=True):
        assert instance.human == tuple(round(2 * side) for side in hoi.human)
        assert instance.object == tuple(round(2 * side) for side in hoi.object)
    # and back: the same text as a prediction has the boxes of the annotation, and a full reward
    row = predict.prediction(examples, examples[0], examples[0].target_ids, None, "ones")
    for instance, hoi in zip(row["line"]["instances"], sample.hois, strict=True):
        assert instance["human"] == pytest.approx(hoi.human, abs=0.5)
        assert instance["object"] == pytest.approx(hoi.object, abs=0.5)
        assert (instance["object_class"], tuple(instance["verbs"])) == (hoi.object_class, hoi.verbs)
    assert row["reward"]["total"] == pytest.approx(3.8, abs=0.02)


def test_an_image_that_is_not_square_has_a_scale_for_each_side(folder, tmp_path):
    """120 x 40 pixels are seen as 112 x 28: x by 14 / 15, y by 7 / 10, and back."""
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


def test_unreadable_images_are_named(folder, tmp_path):
    sample = annotations.load_split(folder / "data", "train")[0]
    cut = tmp_path / sample.file_name
    cut.write_bytes(sample.path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{sample.file_name}: not a readable image"):
        read_image(replace(sample, path=cut))
    with pytest.raises(ValueError, match="annotated as 99 x 112"):
        read_image(replace(sample, width=99))


def test_the_longest_prompt_is_known_before_an_image_is_read(folder, tmp_path):
    samples = []
    for width, height in ((112, 60), (300, 40), (84, 112)):
        path = tmp_path / f"{width}.png"
        Image.new("RGB", (width, height)).save(path)
        hois = ()
        samples.append(hicodet.Sample(path.name, path, width, height, hois, (), frozenset()))
    for thinking in (True, False):
        config = config_of("predict", folder, "x", thinking=thinking)
        examples = examples_of(config, samples)
        lengths = [len(examples[i].prompt.prompt_ids) for i in range(3)]
        assert len(set(lengths)) == 3
        longest_text = max(len(ids) for ids in examples.questions.values())
        asked = len(examples.questions[thinking])
        assert examples.longest_prompt() == max(lengths) + longest_text - asked


# Scores and means of predictions


def test_instance_scores(folder):
    """The probability of the tokens that overlap an instance, and of no others."""
    examples = examples_of(config_of("predict", folder, "x"), [])
    text = '<think> é </think><answer> [{"human": [1, 2, 3, 4]}, {"human": [5, 6, 7, 8]}] </answer>'
    ids = examples.tokenizer(text + "<|im_end|>", return_tensors="pt")["input_ids"][0]
    completion = hicodet.parse_completion(text)
    logprobs = -torch.rand(len(ids))
    expected = []
    for instance in completion.instances:
        start, stop, place, total = *instance.span, 0, 0.0
        encoded = text.encode()
        start, stop = (len(text[:p].encode()) for p in (start, stop))
        for i, token in enumerate(ids.tolist()[:-1]):
            size = len(examples.tokenizer.convert_ids_to_tokens(token))
            if place < stop and place + size > start:
                total += logprobs[i].item()
            place += size
        assert place == len(encoded)
        expected.append(math.exp(total))
    found = predict.instance_scores(examples.tokenizer, completion, ids, logprobs)
    assert found == pytest.approx(expected) and len(found) == 2


def test_instance_scores_behind_bytes_that_are_no_text(folder):
    """Bytes of no valid UTF-8, decoded to one character each or together, shift no instance."""
    examples = examples_of(config_of("predict", folder, "x"), [])
    tokenizer, symbol_of = examples.tokenizer, bytes_to_unicode()
    one, two = '{"human": [1, 2, 3, 4]}', '{"human": [5, 6, 7, 8]}'
    texts = ["<think> é", "", " </think><answer> [", one, ", ", two, "] </answer><|im_end|>"]
    pieces = [tokenizer(text)["input_ids"] for text in texts]
    # an emoji cut after 3 of 4 bytes, a byte of none, a lone continuation, half an é, a surrogate
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
    """Four images, one without ground truth; one completion of the four was cut."""
    totals = [{"total": 3.0}, {"total": 1.0}, None, {"total": 2.0}]
    rows = [
        {"reward": reward, "length": length, "finished": length < 9}
        for reward, length in zip(totals, (3, 9, 4, 4))
    ]
    assert predict.summarise(rows) == {
        "images": 4,
        "reward": {"total": 2.0},
        "completion_length": 5.0,
        "truncated": 0.25,
    }
    assert predict.summarise(rows[2:3])["reward"] == {}

"""Greedy prediction for a split of HICO-DET (Sec. 4.1), or for any photographs.

`predict` and `predict_photographs` unpack the options of the stage. The functions that they call
take plain arguments.
"""

import codecs
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

import evaluate
import hicodet
from engine.configs import DECODING, PROMPT, SPEED, PredictConfig, StageConfig, TrainConfig
from engine.data.annotations import load_split, require_images, training_counts
from engine.data.examples import Example, Examples, PromptOptions, prompt_options
from engine.data.image_check import excluded_images, read_names
from engine.data.loader import read_ahead
from engine.files import aside, write_json
from engine.model.lora import add_adapters, read_adapter
from engine.model.model_files import model_and_adapter, model_warnings, weights_fingerprint
from engine.model.policy import load_model, refresh
from engine.ranks import Ranks, start_ranks
from engine.report.dry_run import describe
from engine.report.pictures import answer_text, draw_photograph, photographs, picture_paths
from engine.report.run_view import update_page
from engine.runs.run_folder import open_run
from engine.sampling.sampler import Sampler
from engine.sampling.slots import choose_slots
from engine.scoring import predictions
from rewards import reward_parts, total_reward

MANY = 0.5  # a larger share of cut or unreadable answers brings a warning


def predict(config: PredictConfig) -> None:
    """Write predictions.jsonl and summary.json for a split."""
    ranks, config = start_ranks(), with_base(config)
    every = load_split(config.data, config.split)[: config.limit or None]
    excluded = excluded_images(config.exclude, every)
    samples = [sample for i, sample in enumerate(every) if i not in excluded]
    if config.exclude:
        ranks.print(f"{len(excluded)} images are excluded")
    examples = Examples(config.model, samples, asked_options(config))
    if config.dry_run:
        return ranks.print(describe(examples, examples[0], text_reward))
    run = open_run(config.out, config, settings_of(config, examples, "predict"), ranks)
    stored, number = predictions.stored_rows(run.path)
    ranks.print(f"{len(stored)} of {len(samples)} images are predicted already")
    dist.barrier()  # every rank has listed the part files before any rank adds one
    todo = [index for index in range(len(samples)) if index not in stored]
    rows, started = adapted_rows(config, examples, todo, ranks), time.perf_counter()
    mine = predictions.write_rows(predictions.part_file(run.path, number + ranks.rank), rows)
    stored |= {row["index"]: row for row in ranks.gather(mine)}
    rows = [stored[index] for index in range(len(samples))]
    unread = [row["unread"] for row in rows if "unread" in row]
    if len(unread) == len(samples):
        raise hicodet.InputError(f"none of {len(unread)} images can be used, as {unread[0]}")
    summary = summarise(rows) | ({"unread": len(unread)} if unread else {})
    if todo:
        seconds = time.perf_counter() - started
        tokens = sum(stored[index]["length"] for index in todo)
        summary |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
    if ranks.rank == 0 and (todo or not (run.path / "predictions.jsonl").exists()):
        write_json(run.path / "summary.json", summary)
        lines = {sample.file_name: empty_line(sample) for sample in every}
        lines |= {row["line"]["file_name"]: row["line"] for row in rows}
        predictions.write_predictions(run.path / "predictions.jsonl", lines.values())
        update_page(run.path)
    ranks.print("\n".join([json.dumps(summary, indent=2), *warnings_of(summary)]))
    run.finish(complete=not unread)  # --resume predicts the others once they can be read


def predict_photographs(config: PredictConfig) -> None:
    """Print the answers for photographs, and draw them."""
    ranks, config = start_ranks(), with_base(config)
    samples, paths = photographs(config.image), picture_paths(config.image, config.out)
    examples = Examples(config.model, samples, asked_options(config), upright=True)
    if config.dry_run:
        return ranks.print(describe(examples, examples[0]))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    rows, mine = adapted_rows(config, examples, list(range(len(samples))), ranks), []
    with closing(rows):
        for row in rows:  # drawn at once, so that finished pictures survive a crash
            with aside(paths[row["index"]]) as new:
                draw_photograph(samples[row["index"]], row["line"]).save(new, format="PNG")
            mine.append(row)
    rows = sorted(ranks.gather(mine), key=lambda row: row["index"])
    for sample, path, row in zip(samples, paths, rows, strict=True):
        cut = "" if row["finished"] else "The answer was cut at --max-new-tokens.\n"
        ranks.print(f"\n{answer_text(sample, row['line'])}\n{cut}picture: {path}")


def with_base(config: StageConfig) -> StageConfig:
    """The config with an adapter's base as the model, if --model names the adapter alone.

    Raises InputError if the adapter cannot be read.
    """
    model, adapter = model_and_adapter(config.model, config.adapter)
    if adapter:
        read_adapter(adapter)
    return dataclasses.replace(config, model=model, adapter=adapter)


def adapted_rows(
    config: PredictConfig, examples: Examples, indices: list[int], ranks: Ranks
) -> Iterator[dict]:
    """`predict_rows` by the model of the options, which is loaded first, with its LoRA adapter."""
    for line in model_warnings(config.model, examples.config):
        ranks.print(line)
    model = load_model(config.model, ranks.device)
    if config.adapter:
        add_adapters(model, read_adapter(config.adapter), model.dtype, seed=0).eval()
    decoding = config.group(DECODING) | config.group(SPEED)
    return predict_rows(model, examples, indices, ranks, **decoding)


def asked_options(config: StageConfig) -> PromptOptions:
    """The prompt options: ablations of Table 2, frame of boxes, order of image and text."""
    return prompt_options(config.model, config.adapter, **config.group(PROMPT))


def settings_of(config: StageConfig, examples: Examples, stage: str) -> dict:
    """The content of config.json: all options, and hashes of the files that they name."""
    return {
        **dataclasses.asdict(config),
        **dataclasses.asdict(examples.options),
        "examples": examples.fingerprint(),
        "weights": weights_fingerprint(config.model, config.adapter),
        "stage": stage,
        "command": sys.argv,
        "reward_parts": reward_parts(without=getattr(config, "without", ())),
    }


def text_reward(text: str, hois: tuple[hicodet.HOI, ...], **options) -> dict[str, float]:
    """The rewards of a completion's text (Eqs. 6-23). options: of `rewards.total_reward`."""
    return total_reward(hicodet.parse_completion(text), hois, **options)


def predict_rows(
    model,
    examples: Examples,
    indices: list[int],
    ranks: Ranks,
    *,
    max_new_tokens: int,
    slots: int = 0,
    workers: int = 0,
    scores: str = "rank",
    repetition_penalty: float = 1.0,
) -> Iterator[dict]:
    """Greedy predictions of this rank's share of the images, in the order in which they end.

    slots: most images decoded at once, 0 for as many as fit. Yields a dict for each image: its
    "index", its "line" of predictions.jsonl, its "reward" (None without ground truth), its "length"
    in tokens, and "finished", whether the model ended it. If an image cannot be used, its line is
    empty, and "unread" says why.
    """
    mine, under_way, unread = indices[ranks.rank :: ranks.world], {}, {}
    room = {"group_size": 1, "prompt_room": examples.longest_prompt()}
    sampler = Sampler(
        model,
        **room,
        slots=choose_slots(model, ranks, slots, len(mine), **room, new=max_new_tokens),
        max_new_tokens=max_new_tokens,
        end_id=examples.end_id,
        temperature=0,
        repetition_penalty=repetition_penalty,
        banned=examples.banned(model.config.text_config.vocab_size).to(model.device),
    )

    def arriving():
        numbers = itertools.count()
        for index, example in zip(mine, read_ahead(examples, mine, workers), strict=True):
            if isinstance(example, hicodet.InputError):
                unread[index] = example
                tqdm.write(f"warning: {example}; nothing is predicted", file=sys.stderr)
                continue
            under_way[next(numbers)] = index, example
            yield example.prompt, None

    with tqdm(total=len(mine), desc="predict", unit="image", disable=ranks.rank > 0) as bar:
        for number, rollout in sampler.run(arriving()):
            ids, finished = rollout.completion_ids[0], bool(rollout.finished[0])
            index, example = under_way.pop(number)
            row = prediction(examples, example, ids, rollout.logprobs[0], scores)
            yield {"index": index, "length": len(ids), "finished": finished, **row}
            bar.update()
        for index, error in unread.items():
            sample = examples.samples[index]
            reward = text_reward("", sample.hois) if sample.hois else None
            row = {"index": index, "length": 0, "finished": True, "line": empty_line(sample)}
            yield row | {"reward": reward, "unread": str(error)}
            bar.update()


def empty_line(sample: hicodet.Sample) -> dict:
    """The line of an image without a prediction, which evaluate.py needs too."""
    return {"file_name": sample.file_name, "text": "", "instances": []}


def prediction(
    examples: Examples, example: Example, ids: Tensor, logprobs: Tensor, scores: str
) -> dict:
    """The line of predictions.jsonl and the rewards of one completion. ids, logprobs: (C,)."""
    text = examples.decode(ids)
    completion = hicodet.parse_completion(text)
    given = None
    if scores == "rank":
        given = predictions.rank_scores(completion)
    elif scores == "likelihood":
        given = instance_scores(examples.tokenizer, completion, ids, logprobs)
    size = (example.sample.width, example.sample.height)
    instances = predictions.predicted_instances(completion, size, example.text_size, given)
    line = {"file_name": example.sample.file_name, "text": text, "instances": instances}
    reward = total_reward(completion, example.text_hois) if example.text_hois else None
    return {"line": line, "reward": reward}


def instance_scores(tokenizer, completion, ids: Tensor, logprobs: Tensor) -> list[float]:
    """The probability that the model gave to the tokens of each instance.

    A byte-level token has one symbol per byte, which gives its place in the text. Encoding the text
    again could cut it into other tokens. Bytes that are not UTF-8 become one character, as in the
    tokenizer's own decoding.
    """
    special, symbols = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(ids)
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    decoder, ends = codecs.getincrementaldecoder("utf-8")(errors="replace"), [0]
    for i, token in zip(ids.tolist(), symbols):
        written = b"" if i in special else bytes(byte_of[symbol] for symbol in token)
        ends.append(ends[-1] + len(decoder.decode(written)))
    starts, ends = np.array(ends[:-1]), np.array(ends[1:])
    spans = [instance.span for instance in completion.instances]
    inside = [torch.from_numpy((ends > start) & (starts < stop)) for start, stop in spans]
    return [math.exp(logprobs[tokens].sum().item()) for tokens in inside]


def summarise(rows: list[dict]) -> dict:
    """Means over predicted images; rewards over those that have ground truth."""
    scored = [row["reward"] for row in rows if row["reward"]]
    names = scored[0] if scored else ()
    return {
        "images": len(rows),
        "reward": {name: float(np.mean([reward[name] for reward in scored])) for name in names},
        "completion_length": float(np.mean([row["length"] for row in rows])),
        "truncated": 1 - float(np.mean([row["finished"] for row in rows])),
        "without_instances": float(np.mean([not row["line"]["instances"] for row in rows])),
    }


def warnings_of(summary: dict) -> list[str]:
    """Warnings about suspicious results: cut or unreadable answers."""
    lines = []
    if summary["truncated"] > MANY:
        lines.append("most answers were cut at --max-new-tokens")
    if summary["without_instances"] > MANY:
        lines.append("most answers hold no interaction that can be read")
    hint = "was the model trained, and with these prompt options?"
    return [f"warning: {line}; {hint}" for line in lines]


class Evaluation:
    """--eval-every: mean greedy reward, and mAP over the classes of the first test images."""

    def __init__(self, config: TrainConfig, options: PromptOptions, ranks: Ranks):
        names = read_names(config.exclude)
        samples = [s for s in load_split(config.data, "test") if s.file_name not in names]
        samples = samples[: config.eval_images]
        require_images(samples)
        self.examples, self.ranks = Examples(config.model, samples, options), ranks
        self.counts, self.limit = training_counts(config.data), config.eval_max_new_tokens

    def __call__(self, policy, replica) -> dict[str, float]:
        """Evaluate the policy. replica: a copy for sampling; it gets the policy's weights."""
        refresh(replica, policy)
        indices = list(range(len(self.examples)))
        options = {"max_new_tokens": self.limit, "slots": 32}  # few, as training holds most memory
        mine = predict_rows(replica, self.examples, indices, self.ranks, **options)
        rows = sorted(self.ranks.gather(list(mine)), key=lambda row: row["index"])
        lines, summary = [row["line"] for row in rows], summarise(rows)
        result = evaluate.evaluate(lines, self.examples.samples, self.counts, classes="present")
        return {
            "eval_reward": summary["reward"].get("total", 0.0),
            "eval_map": 100 * (result["default"]["full"] or 0.0),
            "eval_length": summary["completion_length"],
        }

"""Mean rewards of sampled answers for held-out drawings: temperature 1, as GRPO samples.

    torchrun --nproc_per_node 2 -m demo.sampled runs/demo/sft/model \\
        runs/demo/grpo/model --data runs/demo/data --out sampled.json

One answer a drawing and model. Greedy answers hide what GRPO moves first, the probabilities.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

import hicodet
from engine.data import annotations
from engine.data.examples import Examples
from engine.data.loader import read_ahead, usable
from engine.files import write_json
from engine.model.policy import load_model
from engine.options import Config, option, parse_config, required
from engine.ranks import Ranks, start_ranks
from engine.sampling.sampler import Sampler
from engine.signals import one_line
from grpo import sample_seeds
from predict import text_reward


def sampled_rewards(
    model, examples: Examples, ranks: Ranks, *, max_new_tokens: int, seed: int
) -> list[float]:
    """The total reward (Eq. 23) of one sampled answer for each of this rank's share of images."""
    mine, under_way = range(ranks.rank, len(examples), ranks.world), {}
    sampler = Sampler(
        model,
        slots=min(64, max(len(mine), 1)),
        group_size=1,
        prompt_room=examples.longest_prompt(),
        max_new_tokens=max_new_tokens,
        end_id=examples.end_id,
        banned=examples.banned(model.config.text_config.vocab_size).to(model.device),
    )

    def arriving():
        for number, example in enumerate(map(usable, read_ahead(examples, list(mine), 0))):
            under_way[number] = example
            yield example.prompt, sample_seeds(seed, 0, mine[number], 1)

    rewards = []
    for number, rollout in sampler.run(arriving()):
        text = examples.decode(rollout.completion_ids[0])
        rewards.append(text_reward(text, under_way.pop(number).text_hois)["total"])
    return rewards


@dataclass(frozen=True, kw_only=True)
class SampledConfig(Config):
    """Options of the command."""

    models: tuple[str, ...] = required(
        "folders of models", metavar="MODEL", positional=True, group="what to read and write"
    )
    data: str = required("folder of hico_20160224_det", group="what to read and write")
    out: Path = required(
        "JSON file for the mean reward of each model", group="what to read and write"
    )
    max_new_tokens: int = option(96, "longest answer", least=1, group="sampling")
    seed: int = option(0, "of sampling", least=0, group="sampling")


def main(argv: list[str] | None = None) -> None:
    """Write mean rewards of sampled answers; --help lists the options."""
    config = parse_config(SampledConfig, __doc__, argv, prog="python -m demo.sampled")
    with one_line():
        measure(config, start_ranks())
    dist.destroy_process_group()


def measure(config: SampledConfig, ranks: Ranks) -> None:
    """Write the mean reward of each model."""
    means = []
    samples = [sample for sample in annotations.load_split(config.data, "test") if sample.hois]
    prompt_text = partial(hicodet.prompt_text, task_description=False)
    options = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    for folder in config.models:
        examples = Examples(folder, samples, prompt_text=prompt_text)
        model = load_model(folder, ranks.device)
        rewards = ranks.gather(sampled_rewards(model, examples, ranks, **options))
        means.append(sum(rewards) / len(rewards))
        ranks.print(f"{folder}: mean reward at temperature 1 {means[-1]:.3f}")
    if ranks.rank == 0:
        write_json(config.out, {"reward": means, "answers": len(samples)})


if __name__ == "__main__":
    main()

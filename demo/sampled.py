"""Mean rewards of sampled answers for held-out drawings: temperature 1, as GRPO samples.

    torchrun --nproc_per_node 2 -m demo.sampled MODEL [MODEL ...] --data FOLDER --out sampled.json

One answer a drawing and model. Greedy answers hide what GRPO moves first, the probabilities.
"""

import argparse
from functools import partial
from pathlib import Path

import torch.distributed as dist

import hicodet
from engine.examples import Examples, read_ahead
from engine.files import write_json
from engine.policy import Ranks, load_model, start_ranks
from engine.sampler import Sampler
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
        for number, example in enumerate(read_ahead(examples, list(mine), workers=0)):
            under_way[number] = example
            yield example.prompt, sample_seeds(seed, 0, mine[number], 1)

    rewards = []
    for number, rollout in sampler.run(arriving()):
        text = examples.decode(rollout.completion_ids[0])
        rewards.append(text_reward(text, under_way.pop(number).text_hois)["total"])
    return rewards


def main(argv: list[str] | None = None) -> None:
    """Write mean rewards of sampled answers; --help lists the options."""
    parser = argparse.ArgumentParser(description="Mean rewards of answers at temperature 1.")
    add = parser.add_argument
    add("models", nargs="+", help="folders of models")
    add("--data", required=True, help="folder of hico_20160224_det")
    add("--max-new-tokens", type=int, default=96, help="longest answer")
    add("--seed", type=int, default=0, help="of sampling")
    add("--out", type=Path, required=True, help="JSON file for a mean reward a model")
    args = parser.parse_args(argv)
    ranks, means = start_ranks(), []
    samples = [sample for sample in hicodet.load_split(args.data, "test") if sample.hois]
    prompt_text = partial(hicodet.prompt_text, task_description=False)
    options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    for folder in args.models:
        examples = Examples(folder, samples, prompt_text=prompt_text)
        model = load_model(folder, ranks.device)
        rewards = ranks.gather(sampled_rewards(model, examples, ranks, **options))
        means.append(sum(rewards) / len(rewards))
        ranks.print(f"{folder}: mean reward at temperature 1 {means[-1]:.3f}")
    if ranks.rank == 0:
        write_json(args.out, {"reward": means, "answers": len(samples)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

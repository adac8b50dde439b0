"""Run steps of TRL's GRPOTrainer on the folder that tests/bench_peer.py wrote.

    python tests/peer_trl.py FOLDER

FOLDER holds model/, images, and task.json: text, images, rewards by first token, and the options.
Writes FOLDER/trl.json: seconds of each step, peak memory, completions and gradient norm of the
first step. It runs in TRL's environment and imports nothing of this project.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

CUDA = torch.cuda.is_available()


class WithoutVideo(Qwen2_5_VLProcessor):
    """The processor without video, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2_5_VLProcessor, self).__init__(
            image_processor, tokenizer, chat_template=chat_template)


class Clock(TrainerCallback):
    """Notes when training began and each step ended: in CPU seconds, on a GPU by the clock."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, *args, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() if CUDA else time.process_time())

    on_step_end = on_train_begin


def config_of(folder: Path, task: dict) -> GRPOConfig:
    """The paper's options, where TRL's defaults differ (loss dapo, beta 0, bf16)."""
    return GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=task["repeats"] + 1,
        per_device_train_batch_size=task["group_size"],
        gradient_accumulation_steps=len(task["images"]), num_generations=task["group_size"],
        max_completion_length=task["new_tokens"], beta=task["kl_coef"], epsilon=0.2,
        loss_type="grpo", temperature=1.0, top_p=1.0, top_k=0, bf16=CUDA, use_cpu=not CUDA,
        generation_kwargs={"suppress_tokens": task["banned"]}, learning_rate=task["lr"],
        lr_scheduler_type="constant", max_grad_norm=1.0, shuffle_dataset=False,
        gradient_checkpointing=task["gradient_checkpointing"], logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0)


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    content = [{"type": "image"}, {"type": "text", "text": task["text"]}]
    rows = {"prompt": [[{"role": "user", "content": content}]] * len(task["images"]),
            "image": [str(folder / name) for name in task["images"]],
            "place": list(range(len(task["images"])))}
    data = Dataset.from_dict(rows).cast_column("image", Image())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
    processor = WithoutVideo(images, tokenizer, chat_template=tokenizer.chat_template)
    seen = []  # completions by place in the batch

    def reward(completion_ids, place, **columns):
        seen.append(list(zip(place, [list(ids) for ids in completion_ids])))
        return [task["rewards"][ids[0] % len(task["rewards"])] for ids in completion_ids]

    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    clock = Clock()
    trainer = GRPOTrainer(
        model=load(folder / "model", dtype=torch.float32), reward_funcs=reward,
        args=config_of(folder, task), train_dataset=data, processing_class=processor,
        callbacks=[clock])
    trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:])]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "seconds": seconds, "peak_memory": torch.cuda.max_memory_allocated() if CUDA else memory,
        "completions": seen[0], "grad_norm": trainer.state.log_history[0]["grad_norm"]}
    (folder / "trl.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

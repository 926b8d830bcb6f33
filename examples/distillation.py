"""On-policy distillation: a student learns from a larger teacher's hidden states, on samples of its own.

    python examples/distillation.py

Task: sort four digits and leave out repeated ones: "3 1 3 0" -> "0 1 3 <end>". The teacher first learns it
from answers. The student sees no answer and no reward. It samples completions, the teacher runs on them, and
the loss is the reverse KL of the student from the teacher at each sampled token (GKD, arXiv:2306.13649). Both
models start from random weights. The script takes less than a minute on one core, needs torch and
transformers, downloads nothing, and draws its curves if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import linear_distillation_loss

END, START, VOCAB = 10, 11, 12  # the digits are their own ids; START separates prompt and completion
PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 5, 5  # four digits and START; four digits and END
BATCH = 256
EVALUATED = 1000  # prompts of an accuracy
TEACHER = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
STUDENT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build_model(hidden_size: int, **options: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=PROMPT_TOKENS + MAX_COMPLETION_TOKENS,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        **options,
    )
    return LlamaForCausalLM(config)


def new_prompts(count: int) -> Tensor:
    """Draw prompts, `[count, PROMPT_TOKENS]`."""
    digits = torch.randint(10, (count, PROMPT_TOKENS - 1))
    return torch.cat([digits, torch.full((count, 1), START)], 1)


def answers(prompts: Tensor) -> Tensor:
    """Return the right completions, `[B, MAX_COMPLETION_TOKENS]`, with END after the last digit."""
    rows = [sorted(set(row)) for row in prompts[:, :-1].tolist()]
    return torch.tensor([row + [END] * (MAX_COMPLETION_TOKENS - len(row)) for row in rows])


def until_end(completion_ids: Tensor) -> Tensor:
    """Return the mask of the tokens up to and including the first END, `[B, T]` bool."""
    is_end = completion_ids == END
    return is_end.cumsum(1) - is_end.long() == 0


def hidden_states(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Return the input of the head, `[B, T, H]`, at the positions that predict the completion.

    All prompts have the same length here. If they differ, pad them on the left and also pass `attention_mask`
    and `position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)`.
    """
    return model.model(input_ids, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]


@torch.no_grad()
def complete(model: LlamaForCausalLM, prompts: Tensor, *, sample: bool) -> Tensor:
    """Return the completions of prompts, `[B, T]` with T at most MAX_COMPLETION_TOKENS."""
    options = {"temperature": 1.0, "top_k": 0} if sample else {}  # sample from the whole distribution
    input_ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=MAX_COMPLETION_TOKENS,
        do_sample=sample,
        **options,
    )
    return input_ids[:, PROMPT_TOKENS:]


def solved(prompts: Tensor, completion_ids: Tensor) -> float:
    """Return the share of right completions. After its first END, a completion has only END."""
    missing = MAX_COMPLETION_TOKENS - completion_ids.shape[1]
    whole = torch.nn.functional.pad(completion_ids, (0, missing), value=END)
    return float((whole == answers(prompts)).all(1).float().mean())


def accuracy(model: LlamaForCausalLM, *, sample: bool) -> float:
    """Return the share of right completions of new prompts."""
    prompts = new_prompts(EVALUATED)
    return solved(prompts, complete(model, prompts, sample=sample))


def train_teacher(teacher: LlamaForCausalLM, steps: int) -> None:
    """Train on answers with the cross-entropy."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        prompts = new_prompts(BATCH)
        ids = answers(prompts)
        mask = until_end(ids)
        logits = teacher.lm_head(hidden_states(teacher, torch.cat([prompts, ids], 1)))
        loss = torch.nn.functional.cross_entropy(logits[mask], ids[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def distill(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, steps: int, divergence: str
) -> list[dict[str, float]]:
    """Train the student on its own samples, and return the metrics of each step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    history = []
    for step in range(steps):
        prompts = new_prompts(BATCH)
        completion_ids = complete(student, prompts, sample=True)
        input_ids = torch.cat([prompts, completion_ids], 1)
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher, input_ids)
        out = linear_distillation_loss(
            hidden_states(student, input_ids),
            student.lm_head.weight,
            teacher_hidden=teacher_hidden,
            teacher_lm_head_weight=teacher.lm_head.weight,
            divergence=divergence,
            completion_mask=until_end(completion_ids),
            return_entropy=True,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        logs = {name: float(out.metrics[name]) for name in ("kl", "entropy")}
        history.append({**logs, "solved": solved(prompts, completion_ids)})
        if step % max(1, steps // 15) == 0 or step == steps - 1:
            shown = (f"{name} {value:.4f}" for name, value in history[-1].items())
            print(f"step {step:3d}", *shown, sep="  ", flush=True)
    return history


def draw(path: Path, history: list[dict[str, float]], teacher_accuracy: float, divergence: str) -> bool:
    """Draw the metrics over the steps. Return False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "kl": f"{divergence}, nats per token",
        "entropy": "Entropy of the student, nats per token",
        "solved": "Share of sampled completions that are right",
    }
    figure, panels = plt.subplots(1, len(titles), figsize=(13, 3.8), layout="constrained")
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.plot([logs[name] for logs in history], color="#0072B2", lw=1.5, label="student")
        axes.set(title=title, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_yscale("log")
    panels[2].axhline(teacher_accuracy, color="#000000", lw=1, ls="--", label="teacher")
    panels[2].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Distils a teacher into a smaller student on the student's own samples. Prints and draws "
        "divergence, entropy and accuracy. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of the student")
    parser.add_argument("--teacher-steps", type=int, default=300, help="optimizer steps of the teacher")
    parser.add_argument("--divergence", choices=("reverse_kl", "forward_kl", "jsd"), default="reverse_kl")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the samples")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output/distillation.png"), help="path of the figure"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the models are too small for more
    teacher, student = build_model(**TEACHER), build_model(**STUDENT)
    train_teacher(teacher, arguments.teacher_steps)
    teacher.eval()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    of_teacher = [accuracy(teacher, sample=sample) for sample in (False, True)]
    before = [accuracy(student, sample=sample) for sample in (False, True)]
    history = distill(student, teacher, arguments.steps, arguments.divergence)
    after = [accuracy(student, sample=sample) for sample in (False, True)]
    print(f"\n{'':16}{'parameters':>12}{'greedy':>9}{'sampled':>9}    share of right completions")
    for name, size, (greedy, sampled) in (
        ("teacher", sizes[0], of_teacher),
        ("student, before", sizes[1], before),
        ("student, after", sizes[1], after),
    ):
        print(f"{name:16}{size:12,}{greedy:9.3f}{sampled:9.3f}")
    if draw(arguments.output, history, of_teacher[1], arguments.divergence):
        print(f"curves: {arguments.output}")


if __name__ == "__main__":
    main()

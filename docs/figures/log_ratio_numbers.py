"""The numbers of docs/math.md: what holds a policy near its reference, and what does not.

One categorical policy over 16 actions, started at the reference, in fp64. Gradients are exact expectations:
the sum over all actions, weighted by the sampling distribution, of the per-sample loss's gradient. Only
the line that says so is sampled. The script does not import the package.

    python docs/figures/log_ratio_numbers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

V = 16
BETA = 0.2
LEARNING_RATE = 1.0
CHECKPOINTS = (100, 1_000, 10_000)

Loss = Callable[[Tensor, Tensor], Tensor]  # (logps [V], old_logps [V]) -> loss of each action [V]
Run = tuple[str, str, Loss, int | None]  # name, sampler, loss, refresh


class Bandit(NamedTuple):
    ref_logps: Tensor  # [V]
    rewards: Tensor  # [V], in [0, 1]

    @property
    def ref(self) -> Tensor:
        return self.ref_logps.exp()

    @property
    def advantages(self) -> Tensor:
        """Rewards minus their mean under the reference: what a large group sampled from it would give."""
        return self.rewards - (self.ref * self.rewards).sum()

    @property
    def log_partition(self) -> Tensor:
        return torch.logsumexp(self.ref_logps + self.rewards / BETA, 0)

    @property
    def optimum_logps(self) -> Tensor:
        """argmax of E[r] - beta KL(pi || ref): pi* = ref exp(r / beta) / Z."""
        return self.ref_logps + self.rewards / BETA - self.log_partition


class State(NamedTuple):
    step: int
    logps: Tensor  # [V]


def make_bandit() -> Bandit:
    generator = torch.Generator().manual_seed(6)
    ref_logps = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(0)
    return Bandit(ref_logps, torch.rand(V, generator=generator, dtype=torch.float64))


def kl(logps: Tensor, other_logps: Tensor) -> float:
    return (logps.exp() * (logps - other_logps)).sum().item()


def descend(bandit: Bandit, loss: Loss, sampler: str = "policy", refresh: int | None = None) -> list[State]:
    """Gradient descent on the logits.

    sampler: whose distribution weights the actions, "policy", "old" or "ref".
    refresh: steps after which old becomes the policy; None: old stays the reference.
    """
    logits = bandit.ref_logps.clone().requires_grad_()
    old_logps = bandit.ref_logps
    states = [State(0, bandit.ref_logps)]
    for step in range(1, CHECKPOINTS[-1] + 1):
        logps = logits.log_softmax(0)
        if refresh and (step - 1) % refresh == 0:
            old_logps = logps.detach()
        weights = {"policy": logps.detach(), "old": old_logps, "ref": bandit.ref_logps}[sampler].exp()
        (gradient,) = torch.autograd.grad((weights * loss(logps, old_logps)).sum(), logits)
        with torch.no_grad():
            logits -= LEARNING_RATE * gradient
        if step in CHECKPOINTS:
            states.append(State(step, logits.detach().log_softmax(0)))
    return states


def descend_sampled(bandit: Bandit, loss: Loss, steps: int, batch: int) -> Tensor:
    """The same from `batch` samples of the policy per step; returns the last logits."""
    generator = torch.Generator().manual_seed(0)
    logits = bandit.ref_logps.clone().requires_grad_()
    for _ in range(steps):
        logps = logits.log_softmax(0)
        cumulative = logps.detach().exp().cumsum(0)
        uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
        actions = torch.searchsorted(cumulative, uniform).clamp_(max=V - 1)
        (gradient,) = torch.autograd.grad(loss(logps, logps.detach())[actions].mean(), logits)
        with torch.no_grad():
            logits -= LEARNING_RATE * gradient
    return logits.detach()


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_setting(bandit: Bandit) -> None:
    best = int(bandit.rewards.argmax())
    print(f"V = {V}, beta = {BETA}, learning rate {LEARNING_RATE:g}, fp64")
    print(f"reference: mean reward {(bandit.ref * bandit.rewards).sum().item():.4f}")
    print(f"best action: reward {bandit.rewards[best].item():.4f}", end=", ")
    print(f"ref {bandit.ref[best].item():.4f}, -log ref {-bandit.ref_logps[best].item():.4f}")
    optimum = bandit.optimum_logps
    print(f"optimum pi*: mean reward {(optimum.exp() * bandit.rewards).sum().item():.4f},", end=" ")
    print(f"KL(pi* || ref) {kl(optimum, bandit.ref_logps):.4f}")


def print_drift(bandit: Bandit) -> None:
    """The literal loss compared with REINFORCE."""
    rewards, ref_logps = bandit.rewards, bandit.ref_logps

    def log_ratio(logps: Tensor, _: Tensor) -> Tensor:
        return -rewards * (logps - ref_logps)

    def reinforce(logps: Tensor, _: Tensor) -> Tensor:
        return -rewards * logps

    rows = []
    for a, b in zip(descend(bandit, log_ratio), descend(bandit, reinforce), strict=True):
        rows.append(
            [
                str(a.step),
                f"{kl(a.logps, ref_logps):.4f}",
                f"{kl(b.logps, ref_logps):.4f}",
                f"{kl(ref_logps, a.logps):.4f}",
                f"{(a.logps.exp() * rewards).sum().item():.4f}",
                f"{(a.logps - b.logps).abs().max().item():.0e}",
            ]
        )
    header = ["steps", "KL, log-ratio", "KL, REINFORCE", "KL(ref‖pi)", "mean reward", "max difference"]
    print_table("drift", header, rows)

    steps, batch = 2_000, 64
    a = descend_sampled(bandit, log_ratio, steps, batch)
    b = descend_sampled(bandit, reinforce, steps, batch)
    print(f"\nsampled, {steps} steps of {batch}: KL {kl(a.log_softmax(0), ref_logps):.4f}", end=", ")
    print(
        "logits bitwise equal" if torch.equal(a, b) else f"logits differ by {(a - b).abs().max().item():.1e}"
    )


def print_runs(bandit: Bandit, title: str, runs: list[Run]) -> None:
    rows = []
    for what, sampler, loss, refresh in runs:
        states = descend(bandit, loss, sampler, refresh)
        last = states[-1].logps
        rows.append(
            [
                what,
                sampler,
                *[f"{kl(state.logps, bandit.ref_logps):.4f}" for state in states[1:]],
                f"{kl(bandit.ref_logps, last):.4g}",
                f"{(last - bandit.ref_logps).max().exp().item():.2f}",
                f"{(last.exp() * bandit.rewards).sum().item():.4f}",
                f"{(last.exp() - bandit.optimum_logps.exp()).abs().max().item():.4f}",
            ]
        )
    header = ["loss", "sampled from", *[f"KL, {n} steps" for n in CHECKPOINTS]]
    print_table(title, [*header, "KL(ref‖pi)", "max pi/ref", "mean reward", "distance to pi*"], rows)


def forward_kl_optimum(bandit: Bandit) -> Tensor:
    """Log-probabilities of argmax E[r] - beta KL(ref || pi), beta ref / (lambda - r); lambda by bisection."""
    low, high = bandit.rewards.max().item(), bandit.rewards.max().item() + BETA
    for _ in range(100):
        middle = (low + high) / 2
        mass = (BETA * bandit.ref / (middle - bandit.rewards)).sum().item()
        low, high = (middle, high) if mass > 1 else (low, middle)
    return (BETA * bandit.ref / (high - bandit.rewards)).log()


def print_anchors(bandit: Bandit) -> None:
    """Where the reference acts: as a penalty, as the sampler, in the ratio, in the square."""
    rewards, advantages, ref_logps = bandit.rewards, bandit.advantages, bandit.ref_logps

    def x(logps: Tensor) -> Tensor:
        return ref_logps - logps

    def k3(logps: Tensor) -> Tensor:
        return x(logps).expm1() - x(logps)

    def ppo_clip(logps: Tensor, old_logps: Tensor) -> Tensor:
        ratio = (logps - old_logps).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)

    def penalised(penalty: Callable[[Tensor], Tensor]) -> Loss:
        return lambda logps, _: -rewards * (logps - ref_logps) + BETA * penalty(logps)

    def squared(baseline: float | Tensor) -> Loss:
        return lambda logps, _: -(rewards - baseline) * logps + BETA / 2 * x(logps) ** 2

    mean_reward = (bandit.ref * rewards).sum()
    penalties: list[Run] = [
        ("log-ratio", "policy", penalised(torch.zeros_like), None),
        ("log-ratio + exact KL", "policy", penalised(lambda lp: (lp.exp() * -x(lp)).sum()), None),
        ("log-ratio + k1", "policy", penalised(lambda lp: -x(lp)), None),
        ("log-ratio + k2", "policy", penalised(lambda lp: x(lp) ** 2 / 2), None),
        ("log-ratio + k3", "policy", penalised(k3), None),
        ("log-ratio + ratio · k3", "policy", penalised(lambda lp: (lp - lp.detach()).exp() * k3(lp)), None),
        ("log-ratio + abs", "policy", penalised(lambda lp: x(lp).abs()), None),
    ]
    anchors: list[Run] = [
        ("log-ratio, raw rewards", "ref", lambda lp, _: rewards * x(lp), None),
        ("log-ratio, centred rewards", "ref", lambda lp, _: advantages * x(lp), None),
        ("ratio", "ref", lambda lp, _: -advantages * (-x(lp)).exp(), None),
        ("ratio, at most 2", "ref", lambda lp, _: -advantages * (-x(lp)).exp().clamp(max=2), None),
        ("clip to [0.8, 1.28]", "ref", ppo_clip, None),
        ("clip, old = policy every 16 steps", "old", ppo_clip, 16),
        ("squared log-ratio", "policy", squared(0.0), None),
        ("squared, baseline beta log Z", "ref", squared(BETA * bandit.log_partition), None),
        ("squared, baseline mean reward", "ref", squared(mean_reward), None),
    ]
    print_runs(bandit, "penalties", penalties)
    print_runs(bandit, "the reference as sampler, in the ratio, in a square", anchors)

    best = rewards.argmax()
    # abs leaves an action alone within 2 beta of the best reward and moves the mass of all others to the best
    moved = torch.where(rewards >= rewards[best] - 2 * BETA, bandit.ref, 0.0)
    moved[best] += 1 - moved.sum()
    limits = {
        "no penalty": -ref_logps[best].item(),
        "exact, k2, ratio · k3": kl(bandit.optimum_logps, ref_logps),
        "k3": kl(forward_kl_optimum(bandit), ref_logps),
        "abs": (torch.xlogy(moved, moved) - moved * ref_logps).sum().item(),
        "log-ratio, raw rewards, from ref": kl((ref_logps + rewards.log()).log_softmax(0), ref_logps),
    }
    print("\nKL of the minimisers in closed form: ", end="")
    print(", ".join(f"{name} {value:.4f}" for name, value in limits.items()))

    sizes = []
    for state in descend(bandit, lambda lp, _: -advantages * (-x(lp)).exp(), "ref"):
        second_moment = (bandit.ref * (2 * (state.logps - ref_logps)).exp()).sum().item()
        sizes.append(f"{state.step}: {1 / second_moment:.4f}")
    print("\nuntruncated ratio, effective sample size per sample, by step: " + ", ".join(sizes))


def print_estimators(bandit: Bandit) -> None:
    """Value and gradient of every KL kind, in exact expectation over one sample from the policy."""
    ref_logps = bandit.ref_logps
    for name, exponent in (("near", 0.1), ("far", 1.0)):
        logps = (ref_logps + exponent * bandit.rewards / BETA).log_softmax(0)
        p, x = logps.exp(), ref_logps - logps
        scores = torch.eye(V, dtype=torch.float64) - p  # [V, V]: row y is d logps[y] / d logits
        truth = kl(logps, ref_logps)
        reverse = p * (-x - truth)
        forward = p - bandit.ref
        k1, k2, k3 = -x, x**2 / 2, x.expm1() - x
        kinds = {
            # kind: (value of each action, its derivative with respect to logps)
            "k1": (k1, torch.ones_like(x)),
            "abs": (x.abs(), -x.sign()),
            "k2": (k2, -x),
            "k3": (k3, -x.expm1()),
            "ratio · k1": (k1, k1 + 1),
            "ratio · k2": (k2, k2 - x),
            "ratio · k3": (k3, k3 - x.expm1()),
        }
        rows = []
        for kind, (value, slope) in kinds.items():
            mean = (p * value).sum().item()
            std = math.sqrt(max((p * value**2).sum().item() - mean**2, 0.0))
            gradients = slope[:, None] * scores
            expected = p @ gradients
            noise = (p * (gradients - expected).square().sum(1)).sum().sqrt()
            bias = compare(expected, reverse, forward)
            noise = f"{(noise / reverse.norm()).item():.3f}"
            rows.append([kind, f"{mean / truth:.4f}", f"{std / truth:.3f}", *bias, noise])
        for kind, value, gradient in (
            ("exact", truth, reverse),
            ("exact_forward", kl(ref_logps, logps), forward),
        ):
            rows.append([kind, f"{value / truth:.4f}", "0", *compare(gradient, reverse, forward), "0"])
        header = ["kind", "mean", "std", "off ∇KL(pi‖ref)", "off ∇KL(ref‖pi)", "gradient noise"]
        print_table(f"estimators, {name}: KL(pi‖ref) = {truth:.4f}", header, rows)


def compare(expected: Tensor, reverse: Tensor, forward: Tensor) -> list[str]:
    """Distance from each KL's gradient, relative to that gradient's length."""
    distances = [((expected - target).norm() / target.norm()).item() for target in (reverse, forward)]
    return ["0" if distance < 1e-12 else f"{distance:.4f}" for distance in distances]


def relative_errors(truth: float, *values: float) -> list[str]:
    return [f"{abs(value / truth - 1):.0e}" for value in values]


def print_numerics() -> None:
    """Errors of k3, 1 - p and a log-ratio in fp32 and bf16."""
    rows = []
    for x in (1e-1, 1e-2, 1e-3, 1e-4):
        x32 = torch.tensor(x, dtype=torch.float32)
        truth = sum(x32.item() ** n / math.factorial(n) for n in range(2, 12))
        naive, ours = (x32.exp() - x32 - 1).item(), (x32.expm1() - x32).item()
        rows.append([f"{x:.0e}", f"{truth:.4e}", *relative_errors(truth, naive, ours)])
    print_table("k3 in fp32", ["x", "k3", "error of exp(x) - x - 1", "error of expm1(x) - x"], rows)

    rows = []
    for logp in (-1e-2, -1e-4, -1e-6, -1e-8):
        logp32 = torch.tensor(logp, dtype=torch.float32)
        truth = -math.expm1(logp32.item())
        naive, ours = (1 - logp32.exp()).item(), (-logp32.expm1()).item()
        rows.append([f"{logp:.0e}", f"{truth:.4e}", *relative_errors(truth, naive, ours)])
    print_table("1 - p in fp32", ["logp", "1 - p", "error of 1 - exp(logp)", "error of -expm1(logp)"], rows)

    # One small update, seen through the dtype the logits are held in: by how much is the log-ratio wrong?
    rows = []
    generator = torch.Generator().manual_seed(0)
    old_logits = 5 * torch.randn(1_000, 4_096, generator=generator)  # the largest of a row is near 20
    logits = old_logits + 0.05 * torch.randn(old_logits.shape, generator=generator)
    # y ~ old policy, by the Gumbel trick
    uniform = torch.rand(old_logits.shape, generator=generator, dtype=torch.float64)
    actions = (old_logits - (-uniform.log()).log()).argmax(-1, keepdim=True)

    def logps(logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.to(dtype).log_softmax(-1).gather(-1, actions).double()

    truth = logps(logits, torch.float64) - logps(old_logits, torch.float64)
    pairs = {
        "fp32 logits": [logps(z, torch.float32) for z in (logits, old_logits)],
        "bf16 logits, fp32 arithmetic": [logps(z.bfloat16(), torch.float32) for z in (logits, old_logits)],
        "fp32 logits, bf16 log-probabilities": [
            logps(z, torch.float32).bfloat16().double() for z in (logits, old_logits)
        ],
    }
    for name, (new, old) in pairs.items():
        error = new - old - truth
        flipped = ((truth + error).abs() > math.log(1.2)) != (truth.abs() > math.log(1.2))
        rms = error.square().mean().sqrt().item()
        share = f"{100 * flipped.double().mean():.1f} %"
        rows.append([name, f"{rms:.1e}", f"{error.abs().max().item():.1e}", share])
    rms = truth.square().mean().sqrt().item()
    header = ["held in", "rms error", "largest error", "clipped wrongly at 1.2"]
    print_table(f"the log-ratio of one small update (true rms {rms:.3f})", header, rows)
    spacing = torch.finfo(torch.bfloat16).eps * 16
    print(f"\nspacing of bf16 between 16 and 32: {spacing:g}, largest rounding error {spacing / 2:g}")


def main() -> None:
    torch.set_num_threads(1)  # 16 numbers: threads would only wait for each other
    bandit = make_bandit()
    print_setting(bandit)
    print_drift(bandit)
    print_anchors(bandit)
    print_estimators(bandit)
    print_numerics()


if __name__ == "__main__":
    main()

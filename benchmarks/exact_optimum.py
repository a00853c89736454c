"""PPO against the exact optimum of its own objective.

Responses are four tokens over a vocabulary of eight, so all 4,096 can be enumerated, and with them, exactly,

    J(pi) = E_pi[R] - beta KL(pi || pi_ref)                  what PPO with a KL term maximizes
    pi*   = pi_ref exp(R / beta) / Z,   J* = beta log Z      where it is greatest,  Z = sum pi_ref exp(R / beta)

A run is judged by four numbers that need no sampling: the share of J* - J(pi_ref) it gains, how far the critic's
value of the prompt is from J of the policy it ended at, how close E[R] is to the most that its KL allows, and
which beta that KL would be optimal for. Everything between the reward function and the weights is the package's.

    python -m benchmarks.exact_optimum --seeds 5 --betas 0.1 0.3 1
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import Reference, SeparateCritic
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.experience import ALGORITHMS, Estimation
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.kl_controller import KLController
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.update import Updater, UpdateSettings
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.runtime.run_log import RunLog

VOCABULARY, LENGTH = 8, 4
BOS = VOCABULARY  # a ninth embedding that is the whole prompt and is never sampled
LETTERS = "abcdefgh"

BATCH, STEPS = 128, 640  # 81,920 episodes
EPOCHS = 2  # of one full-batch step each: several minibatches an epoch diverged early at beta = 1
ACTOR_LR, CRITIC_LR = 2e-3, 2e-3  # both decay linearly to 0

# What every seed must reach; the share of J* - J(pi_ref) by beta.
MIN_GAIN = {0.1: 0.965, 0.3: 0.96, 1.0: 0.93}
MAX_VALUE_ERROR, MAX_FRONTIER_GAP, MAX_BETA_ERROR = 0.02, 0.02, 0.08


@dataclass
class Task:
    """A reward over all responses and the policy that training starts from and is regularized to."""

    responses: Tensor  # [4096, 4] int64, every response
    rewards: Tensor  # [4096] float64 in [0, 1]
    reference: LlamaForCausalLM
    ref_logprobs: Tensor  # [4096] float64, of whole responses
    by_text: dict[str, float]

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The reward function as a user writes one."""
        return [self.by_text[completion] for completion in completions]


@dataclass
class Outcome:
    """How a trained policy compares with the optimum."""

    gain: float  # (J - J_ref) / (J* - J_ref)
    value_error: float  # V(prompt) - J, the return that the critic predicts being the score less its KL
    frontier_gap: float  # 1 - E[R] / (the most E[R] at this KL)
    implied_beta: float  # the beta whose optimum has this KL
    kl: float

    def failures(self, beta: float) -> list[str]:
        """The criteria that are not met; a number that is not finite meets none."""
        criteria = {
            f"gain {self.gain:.3f} < {MIN_GAIN[beta]}": self.gain >= MIN_GAIN[beta],
            f"value error {self.value_error:+.3f}": abs(self.value_error) <= MAX_VALUE_ERROR,
            f"frontier gap {self.frontier_gap:.3f}": self.frontier_gap <= MAX_FRONTIER_GAP,
            f"implied beta {self.implied_beta:.3g}": abs(self.implied_beta / beta - 1) <= MAX_BETA_ERROR,
        }
        return [text for text, met in criteria.items() if not met]


def make_task(seed: int = 0) -> Task:
    """A random reward of single tokens and of pairs, and a random reference of some shape (entropy below uniform)."""
    generator = torch.Generator().manual_seed(seed)
    responses = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    single = torch.randn(LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    raw = sum(single[t, responses[:, t]] for t in range(LENGTH))
    for s, t in itertools.combinations(range(LENGTH), 2):
        pair = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        raw = raw + 0.5 * pair[responses[:, s], responses[:, t]]
    rewards = raw.argsort().argsort().double() / (len(raw) - 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY + 1,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH + 1,
                initializer_range=0.1,  # the usual 0.02 makes a policy that is all but uniform
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        ).eval()
    by_text = {decode(row): reward for row, reward in zip(responses.tolist(), rewards.tolist(), strict=True)}
    return Task(responses, rewards, reference, response_logprobs(reference, responses), by_text)


def decode(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


@torch.no_grad()
def response_logprobs(model: LlamaForCausalLM, responses: Tensor) -> Tensor:
    """log pi of whole responses, [N] float64: plain transformers and log-softmax, nothing of the package."""
    ids = torch.cat([torch.full_like(responses[:, :1], BOS), responses], dim=1)
    logits = model(input_ids=ids).logits[:, :-1, :VOCABULARY].double()
    return logits.log_softmax(dim=-1).gather(2, responses[..., None]).squeeze(-1).sum(dim=1)


def tilted(task: Task, beta: float) -> tuple[float, float, float]:
    """pi_ref exp(R / beta) / Z, the optimum at beta: its E[R], its KL to the reference, and beta log Z = J*."""
    unnormalized = task.ref_logprobs + task.rewards / beta
    log_z = torch.logsumexp(unnormalized, dim=0)
    probabilities = (unnormalized - log_z).exp()
    reward = float((probabilities * task.rewards).sum())
    optimum = beta * float(log_z)
    return reward, (reward - optimum) / beta, optimum


def beta_of_kl(task: Task, kl: float) -> float:
    """The beta whose optimum has this KL, by bisection (the KL falls as beta rises); clamped to [1e-3, 1e3]."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(task, math.exp(middle))[1] > kl else (low, middle)
    return math.exp((low + high) / 2)


def measure(task: Task, actor_critic: SeparateCritic, beta: float) -> Outcome:
    """Judge a policy and its critic by enumeration."""
    logprobs = response_logprobs(actor_critic.policy, task.responses)
    probabilities = logprobs.exp()
    reward = float((probabilities * task.rewards).sum())
    kl = float((probabilities * (logprobs - task.ref_logprobs)).sum())
    start = float((task.ref_logprobs.exp() * task.rewards).sum())
    objective = reward - beta * kl
    with torch.no_grad():
        state = actor_critic.critic(input_ids=torch.tensor([[BOS]])).last_hidden_state[0, 0]
        value = float(actor_critic.value_head(state))
    implied = beta_of_kl(task, kl)
    return Outcome(
        gain=(objective - start) / (tilted(task, beta)[2] - start),
        value_error=value - objective,
        frontier_gap=1 - reward / tilted(task, implied)[0],
        implied_beta=implied,
        kl=kl,
    )


def make_trainer(task: Task, beta: float, seed: int, run_dir: Path, steps: int = STEPS) -> PPOTrainer:
    """The package's PPO on this task, put together by hand."""
    device = torch.device("cpu")
    distribution = SamplingDistribution(forbidden_ids=(BOS,))
    policy, critic = copy.deepcopy(task.reference), copy.deepcopy(task.reference.base_model)
    head = ScalarHead(task.reference.config.hidden_size).zero_()
    actor_critic = SeparateCritic(policy, critic, head, distribution)
    groups = actor_critic.parameter_groups(ACTOR_LR, CRITIC_LR)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = steps * EPOCHS
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
    settings = UpdateSettings(epochs=EPOCHS, batch_size=BATCH, micro_batch_size=BATCH)
    log = RunLog(run_dir)
    log.console.quiet = True
    return PPOTrainer(
        prompts=PromptSchedule([[BOS]], [""], BOS, prompts_per_step=1, samples_per_prompt=BATCH, seed=seed),
        engine=RolloutEngine(policy, distribution, Limits(LENGTH, LENGTH + 1), BOS, decode),
        scorer=Scorer(
            actor_critic,
            Reference(copy.deepcopy(task.reference), distribution),
            FunctionReward(task.reward, "exact optimum"),
            RewardScaling(),
            device,
            micro_batch_size=BATCH,
        ),
        updater=Updater(
            actor_critic, ALGORITHMS["ppo"], settings, device, PlainBackend(actor_critic, optimizer, scheduler, device)
        ),
        algorithm=ALGORITHMS["ppo"],
        estimation=lambda coef: Estimation(kl_coef=coef, gamma=1.0, lam=0.95, whiten_advantages=True),
        kl=KLController(beta),
        num_steps=steps,
        seed=seed,
        log=log,
    )


def run(task: Task, beta: float, seed: int, steps: int = STEPS) -> Outcome:
    """Train once and judge the result."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, beta, seed, Path(folder), steps)
        trainer.train()
    return measure(task, trainer.updater.actor_critic, beta)


def main(arguments: list[str] | None = None) -> int:
    """Print one line a run; the exit status is 1 if one of them misses a criterion."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_optimum", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="training seeds for each beta")
    parser.add_argument("--betas", type=float, nargs="+", default=list(MIN_GAIN), choices=list(MIN_GAIN))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is too small for more
    task = make_task()
    entropy = -float((task.ref_logprobs.exp() * task.ref_logprobs).sum())
    print(f"reference: entropy {entropy:.2f} of {math.log(len(task.rewards)):.2f} nats (uniform)")
    print(
        f"{'beta':>5} {'seed':>4} {'gain':>6} {'of':>6} {'V - J':>7} {'frontier':>8} {'implied':>8} {'KL':>6} {'s':>5}"
    )
    failed = False
    for beta, seed in itertools.product(options.betas, range(options.seeds)):
        began = time.perf_counter()
        outcome = run(task, beta, seed)
        failures = outcome.failures(beta)
        failed |= bool(failures)
        print(
            f"{beta:5.2g} {seed:4d} {outcome.gain:6.3f} {MIN_GAIN[beta]:6.3f} {outcome.value_error:+7.3f} "
            f"{outcome.frontier_gap:8.4f} {outcome.implied_beta:8.4f} {outcome.kl:6.3f} "
            f"{time.perf_counter() - began:5.1f}  {'; '.join(failures) or 'ok'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

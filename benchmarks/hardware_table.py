"""Which model fits which hardware, beside what ChatLLaMA advised: the table in docs/hardware.md.

    python -m benchmarks.hardware_table > docs/hardware.md

It is arithmetic on the models' dimensions (`chatrlhf plan`), and no measurement. ChatLLaMA's README gives a range of
actors for each machine; here stand both ends of each range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chatrlhf.runtime.run_log import quiet_libraries
from chatrlhf.tools.plan.compare import WAYS, Way, memory_of, usual
from chatrlhf.tools.plan.hardware import GB, Hardware, hardware
from chatrlhf.tools.plan.zero_memory import Sharding

TOKENS = 512  # of a row
SHOWN = [way for way in WAYS if way.name in ("SFT", "reward", "PPO", "SFT, QLoRA", "PPO, QLoRA")]
WHOLE = ("SFT", "reward", "PPO")


@dataclass(frozen=True)
class Advice:
    """A line of ChatLLaMA's "Hardware requirements"."""

    line: str
    gpus: str
    models: tuple[str, ...]
    zero: int = 0
    offload: bool = False

    def sharding(self, where: Hardware) -> Sharding:
        if not self.zero:
            return usual(where)
        return Sharding("deepspeed", where.count, self.zero, self.offload, low=where.device.bf16)


ADVICE = (
    Advice("125M to 1.3B: 1x 3090/4090", "RTX3090", ("opt-125m", "opt-1.3b")),
    Advice("1.3B to 3B: 1x A100 (80 GB)", "A100-80GB", ("opt-1.3b", "opt-2.7b")),
    Advice("3B, DeepSpeed CPU off-loading: 1x 3090/4090", "RTX3090", ("opt-2.7b",), zero=2, offload=True),
    Advice("3B to 7B, DeepSpeed ZeRO: 4x T4", "4xT4", ("opt-2.7b", "opt-6.7b"), zero=3),
    Advice("3B to 13B: 4x A100 (80 GB)", "4xA100-80GB", ("opt-2.7b", "opt-13b")),
    Advice("13B to 20B, DeepSpeed ZeRO: 4x A100 (80 GB)", "4xA100-80GB", ("opt-13b", "gpt-neox-20b"), zero=3),
    Advice("13B to 20B: 8x A100 (80 GB)", "8xA100-80GB", ("opt-13b", "gpt-neox-20b")),
)

TEXT = """# Which model fits which hardware

ChatLLaMA's README advises hardware for sizes of actors. Below stands what a plan of this toolkit says of both ends of
each range: gigabytes that one device needs with one row of {tokens} tokens in a backward under activation
checkpointing, and whether it has them. PPO has a value head on the policy, a reference and a reward model of the
actor's size; under QLoRA one base in 4 bits carries them all. Where a card has no bfloat16 (T4), weights are float32.

`python -m benchmarks.hardware_table` makes this page; `chatrlhf plan --compare opt-1.3b,llama-7b --gpu 24GB` compares
models of your choice, and `--dry-run --gpu NAME` plans a run of yours. All of it is arithmetic; `benchmarks/memory.py`
compares such plans with memory that was measured on a CPU.

Where the two differ: this toolkit keeps float32 weights under bfloat16 products, 16 bytes a trained weight with Adam's
states, so 1.3 billion whole ones need more than a card of 24 GB; data parallelism alone (a line without ZeRO) makes no
model fit that one card does not hold; and PPO holds a reference and a reward model beside what it trains.

"""


def main() -> None:
    quiet_libraries()
    print(TEXT.format(tokens=TOKENS), end="")
    print(f"| ChatLLaMA | actor | {' | '.join(way.name for way in SHOWN)} | agree? |")
    print("|---|---|" + "---:|" * len(SHOWN) + "---|")
    for advice in ADVICE:
        for row in rows(advice):
            print(row, flush=True)


def rows(advice: Advice) -> Iterator[str]:
    """The lines of the table for one of ChatLLaMA's."""
    where = hardware(advice.gpus)
    for model in advice.models:
        needs = {way.name: _needed(model, way, where, advice) for way in SHOWN}
        room = where.device.memory
        cells = [f"{need / GB:.0f} GB, {'fits' if need <= room else 'no'}" for need in needs.values()]
        missing = [name for name in WHOLE if needs[name] > room]
        verdict = "yes" if not missing else "not " + ", ".join(missing)
        yield f"| {advice.line} | {model} | {' | '.join(cells)} | {verdict} |"


def _needed(model: str, way: Way, where: Hardware, advice: Advice) -> int:
    # Quantized weights are not sharded.
    sharding = usual(where) if "QLoRA" in way.name else advice.sharding(where)
    return memory_of(model, way, where, TOKENS, sharding, 1)[1]


if __name__ == "__main__":
    main()

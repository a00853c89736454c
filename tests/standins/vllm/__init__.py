"""Stands in for vLLM, which needs a GPU: names, signatures and rules of vLLM 0.31 as far as TRL 1.16 relies on them.

TRL's own code runs on it unchanged. A transformers model samples, one row after the other, so that its
log-probabilities can be compared with the trainer's. The rules were read in vLLM's source: `sampling_params.py`,
`v1/core/sched/utils.py` (`check_stop`), `v1/worker/gpu/sample/` and `renderers/params.py`. None of this is vLLM's code.
"""

from vllm.llm import LLM, RequestOutput
from vllm.sampling_params import SamplingParams

__version__ = "0.31.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams"]

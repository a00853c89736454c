"""For the tests of vLLM as a rollout backend: its stand-in installed, and a policy that lies as files."""

from pathlib import Path

import pytest
import torch
from tiny import llama
from vllm_standin import EOS, PAD, TOKENIZER, VOCAB, installed


@pytest.fixture
def vllm():
    """vLLM's stand-in, sampling in float32: then its log-probabilities are the policy's up to rounding."""
    with installed():
        import vllm

        vllm.LLM.dtype = torch.float32
        yield vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    model = llama(vocab=VOCAB, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path

"""What a rollout asks of a model, watched; for vLLM as a backend its stand-in, and a policy that lies as files."""

from pathlib import Path

import pytest
import torch
from tiny import llama
from torch import nn
from vllm_standin import EOS, PAD, TOKENIZER, VOCAB, installed

from chatrlhf.rollout.llama_cpu import LlamaStep


@pytest.fixture
def untried(monkeypatch) -> None:
    """Direct steps are taken without a trial, which would be among what is counted."""
    monkeypatch.setattr(LlamaStep, "matches_model", lambda self: True)


@pytest.fixture
def forwards(untried, monkeypatch):
    """Of a model: rows and columns of every forward from now on, its direct steps among them."""
    seen: list[tuple[int, int]] = []
    step = LlamaStep.__call__

    def watched(self, ids, *args):
        seen.append((len(ids), 1))
        return step(self, ids, *args)

    monkeypatch.setattr(LlamaStep, "__call__", watched)

    def watch(model: nn.Module) -> list[tuple[int, int]]:
        model.register_forward_pre_hook(
            lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        return seen

    return watch


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

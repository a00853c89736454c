"""Models on this machine, through transformers: causal ones and encoder-decoders such as Flan-T5."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from chatrlhf.conversation import SPEAKERS, Prompt, Turn
from chatrlhf.data.render_limits import refuse_long, render_limits
from chatrlhf.errors import ConfigError, GenerationError
from chatrlhf.models.loading.loading_report import explained, load_pretrained
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.safe_config import auto_config
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.models.stop_tokens import ids_without_token, stop_tokens, vocabulary_rows
from chatrlhf.runtime.device import pick_device
from chatrlhf.runtime.run_log import quiet_libraries
from chatrlhf.tools.synth.llm import Message, NoAnswer, Reply, Request

FIRST_TURNS = 10  # turns of the event loop in which requests gather before a batch is taken


class LocalModel:
    """A model that answers several requests side by side; see `TextGenerator`.

    Each reply is drawn with random numbers of its own, made from the request, so it does not depend on what else is
    in the batch (up to rounding), and the same request gives the same reply. A request with choices gets one of them:
    where the model would say something else its next likeliest choice is taken.
    """

    def __init__(self, name: str, max_batch_size: int = 8) -> None:
        """
        Args:
            name: a folder or hub id.
            lanes: most requests in a batch.

        Raises:
            GenerationError: it cannot be loaded, or it is no model that writes.
        """
        quiet_libraries()
        self.model, self.max_batch_size = name, max_batch_size
        try:
            if base_of(name) is not None:
                raise ConfigError(f"--model: {name!r} holds adapters; merge them first (chatrlhf export merge)")
            with explained("--model", name):
                config = auto_config(name)
                self.tokenizer = load_tokenizer(name, "--model")
            self.is_seq2seq = bool(config.is_encoder_decoder)
            kind = AutoModelForSeq2SeqLM if self.is_seq2seq else AutoModelForCausalLM
            self.network = load_pretrained(kind, name, "--model", dtype="auto").to(pick_device()).eval()
            self.ends = stop_tokens(self.network, self.tokenizer).ids
            unused = ids_without_token(self.tokenizer, vocabulary_rows(self.network))
            self.suppressed = [*(self.network.generation_config.suppress_tokens or []), *unused] or None
        except ConfigError as error:
            raise GenerationError(f"{error}; or give --base-url for an endpoint") from None
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GenerationError(
                f"--model: {name!r} cannot be loaded ({reason}); give a smaller model, or --base-url for an endpoint"
            ) from None
        self.positions = None if self.is_seq2seq else getattr(config, "max_position_embeddings", None)
        self._waiting: deque[tuple[Request, list[int], asyncio.Future[Reply]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def reply(self, request: Request) -> Reply:
        ids = self.prompt_ids(request.messages)
        if self.positions is not None and len(ids) + request.max_tokens > self.positions:
            remedy = "lower --max_tokens" if len(ids) < self.positions else "it takes a model with a longer context"
            raise NoAnswer(
                f"a prompt of {len(ids)} tokens and a reply of up to {request.max_tokens} do not fit into the "
                f"{self.positions} of {self.model!r}; {remedy}"
            )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, ids, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        pass

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """A chat as this model knows chats: by its template, or as one text where it has none."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(flat(messages, opens_reply=not self.is_seq2seq)).input_ids
        chat = [{"role": each.role, "content": each.content} for each in messages]
        try:
            text = self._rendered(chat)
        except GenerationError:  # of models that know no system message
            text = self._rendered(_without_system(chat))
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _rendered(self, chat: list[dict[str, str]]) -> str:
        """A chat by the model's own template. Raises GenerationError where that refuses it, or is beyond the limits."""
        from jinja2 import TemplateError

        try:
            with render_limits():
                text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            refuse_long(text, chat)
        except (TemplateError, TimeoutError, MemoryError, ValueError) as error:
            raise GenerationError(f"--model: the chat template of {self.model!r} fails ({error})") from None
        return text

    async def _work(self) -> None:
        while self._waiting:
            for _ in range(FIRST_TURNS):
                if len(self._waiting) < self.max_batch_size:
                    await asyncio.sleep(0)
            first = self._waiting[0][0]
            batch = [item for item in self._waiting if item[0].max_tokens == first.max_tokens][: self.max_batch_size]
            for item in batch:
                self._waiting.remove(item)
            try:
                requests, prompts = [item[0] for item in batch], [item[1] for item in batch]
                replies = await asyncio.to_thread(self._generate, requests, prompts)
            except Exception as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (*_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    @torch.inference_mode()
    def _generate(self, requests: list[Request], prompts: list[list[int]]) -> list[Reply]:
        width = max(map(len, prompts))
        device = self.network.device
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if self.is_seq2seq else slice(width - len(prompt), width)
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        start = 1 if self.is_seq2seq else width
        draw = Draw(requests, self.model, start, [self._spelled(request.choices) for request in requests])
        whole = self.network.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,  # `draw` has added the chance already
            num_beams=1,
            eos_token_id=list(self.ends),
            suppress_tokens=self.suppressed,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([draw]),
        )
        return [self._reply(row, len(prompt)) for row, prompt in zip(whole[:, start:].tolist(), prompts, strict=True)]

    def _reply(self, ids: list[int], prompt_tokens: int) -> Reply:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        finished = end is not None
        ids = ids[:end]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if self.tokenizer.chat_template is None:  # a model that continues with the other side's next words
            text, turned, _ = text.partition(f"\n\n{SPEAKERS['user']}:")
            finished = finished or bool(turned)
        return Reply(text, prompt_tokens, len(ids) + finished, finished)

    def _spelled(self, choices: tuple[str, ...]) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        return [[*self.tokenizer(each, add_special_tokens=False).input_ids, eos] for each in choices]


class Draw(LogitsProcessor):
    """Makes the likeliest token a sample: argmax of logits / T + Gumbel noise (Maddison et al. 2014, section 2)."""

    def __init__(self, requests: list[Request], model: str, start: int, choices: list[list[list[int]]]) -> None:
        """
        Args:
            start: position of a reply's first token.
            choices: of each request the replies it may get, in ids, EOS included; none: any.
        """
        self.temperatures = [request.temperature for request in requests]
        seeds = [int(request.key(model)[:15], 16) for request in requests]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.start, self.choices = start, choices

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, S] ids so far and [B, V] logits to logits of which the greatest is taken."""
        scores = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self.temperatures, self.generators, strict=True)):
            if self.choices[row]:
                said = input_ids[row, self.start :].tolist()
                open_ids = [each[len(said)] for each in self.choices[row] if each[: len(said)] == said != each]
                if open_ids:
                    kept = scores[row, open_ids].clone()
                    scores[row] = float("-inf")
                    scores[row, open_ids] = kept
            if temperature > 0:
                uniform = torch.rand(scores.shape[1], generator=generator).clamp(min=1e-20)
                noise = -(-uniform.log()).log()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


def flat(messages: tuple[Message, ...], opens_reply: bool) -> str:
    """A chat as one text, for models without a chat template: what is asked, or a dialogue with named sides.

    Args:
        opens_reply: end a dialogue with the name of who speaks next.
    """
    system = "\n\n".join(each.content for each in messages if each.role == "system")
    turns = tuple(Turn(each.role, each.content) for each in messages if each.role != "system")
    if len(turns) == 1:
        return f"{system}\n\n{turns[0].text}" if system else turns[0].text
    text = Prompt(turns, system or None).text
    return f"{text}\n\n{SPEAKERS['assistant']}:" if opens_reply else text


def _without_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = [each["content"] for each in chat if each["role"] == "system"]
    rest = [dict(each) for each in chat if each["role"] != "system"]
    rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
    return rest

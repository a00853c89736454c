"""A `vllm serve` on the loopback: the endpoints that TRL's client asks, answered by the engine that stands in."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer import nccl_common

# Fields of a completion request that are no sampling parameters.
ENVELOPE = {"model", "prompt", "return_token_ids", "return_tokens_as_token_ids"}


class Server:
    """Serves one model until closed; ``asked`` lists what came in, path and body."""

    def __init__(self, model: str, max_model_len: int, logprobs_mode: str = "processed_logprobs") -> None:
        self.llm = LLM(model, max_model_len=max_model_len, logprobs_mode=logprobs_mode)
        self.name, self.asked, self.healthy, self.silent_about = model, [], True, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hidden = self.path.split("?")[0] == outer.silent_about
                self.reply(outer.get(self.path), 404 if hidden else 200)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else {}
                outer.asked.append((self.path, body))
                try:
                    self.reply(outer.post(self.path, body))
                except (ValueError, TypeError) as error:
                    self.reply({"error": {"message": str(error)}}, 400)

            def reply(self, content: Any, status: int = 200) -> None:
                if not outer.healthy:
                    status = 503
                text = json.dumps(content, allow_nan=False).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> Any:
        settings = {"max_model_len": self.llm.max_model_len, "logprobs_mode": self.llm.logprobs_mode}
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": self.name}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {"vllm_config": {"model_config": settings, "weight_transfer_config": {"backend": "nccl"}}},
        }[path.split("?")[0]]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            return {"choices": [self.completion(prompt, body) for prompt in body["prompt"]]}
        if path == "/update_weights":
            info = body["update_info"]
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                weight = nccl_common.opened[-1].sent.get(timeout=20)
                assert (str(weight.dtype), list(weight.shape)) == (f"torch.{dtype}", shape)
                self.llm.weights.load_weights([(name, weight)])
        return {"success": True}

    def completion(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """One prompt. Unlike the engine, the server takes no request that might not fit."""
        params = SamplingParams(**{key: value for key, value in body.items() if key not in ENVELOPE})
        if len(prompt) + params.max_tokens > self.llm.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.llm.max_model_len} tokens. However, you requested "
                f"{params.max_tokens} output tokens and your prompt contains {len(prompt)} input tokens."
            )
        output = self.llm.one(prompt, params).outputs[0]
        tokens = [f"token_id:{token}" for token in output.token_ids]
        values = [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]
        logprobs = {"tokens": tokens, "token_logprobs": values}
        logprobs["top_logprobs"] = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return {
            "prompt_token_ids": prompt,
            "token_ids": output.token_ids,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }

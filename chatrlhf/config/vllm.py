"""The keys of `trainer_config.vllm`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from chatrlhf.config.section import Section


class VllmConfig(Section):
    """Where vLLM samples, for `rollout_backend: vllm`; how it samples is `gen_kwargs`, as for any backend."""

    mode: Literal["colocate", "server"] = Field(
        "colocate", description="colocate: in this process, on its GPU; server: a `vllm serve` of its own"
    )
    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="colocate: share of the GPU's memory that vLLM takes for weights and cache"
    )
    enable_sleep_mode: bool = Field(False, description="colocate: vLLM gives that memory back between two rollouts")
    server_base_url: str = Field("http://localhost:8000", description="server: the address it answers at")
    server_timeout: float = Field(240.0, gt=0, description="server: seconds until it has to answer at the start")
    group_port: int = Field(51216, ge=1, le=65535, description="server: a free port, for sending weights")

    @field_validator("server_base_url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected http://host:port or https://…, got {url!r}")
        return url.rstrip("/")

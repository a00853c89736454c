"""vLLM behind an address: TRL's own client speaks HTTP to a stand-in for `vllm serve` on the loopback."""

from __future__ import annotations

import socket
import time

import pytest
import torch
from vllm_standin import DISTRIBUTIONS, EOS, PAD, PLAIN, assert_lawful, ragged, sampler

from chatrlhf.config.rl import VllmConfig
from chatrlhf.errors import ConfigError, RolloutError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.rollout.vllm import VllmSampler, wait_for_server


@pytest.fixture
def serve(vllm, folder, monkeypatch):
    """Start servers; the device that weights would be sent from is called a GPU, as TRL asks for one."""
    import accelerate
    import vllm_server

    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: torch.device("cuda")))
    started = []

    def start(max_model_len: int = 40, **options):
        started.append(vllm_server.Server(str(folder), max_model_len, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def served(folder, server, distribution=PLAIN, **options) -> VllmSampler:
    return sampler(folder, distribution, mode="server", server_base_url=server.url, server_timeout=5, **options)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_server_samples_what_is_scored_with_current_weights(serve, folder, name):
    server = serve()
    made = served(folder, server, DISTRIBUTIONS[name], min_new_tokens=2)
    for _ in range(2):
        with torch.no_grad():
            for weight in made.policy.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        assert_lawful(made.generate(ragged(), seed=0), DISTRIBUTIONS[name], made)
    once = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    paths = [path for path, _ in server.asked]
    assert paths == ["/init_weight_transfer_engine", *[*once, "/v1/completions"] * 2]


def test_a_server_is_asked_for_no_more_than_fits_and_rows_keep_their_places(serve, folder):
    server = serve(max_model_len=12)
    no_end = SamplingDistribution(eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    made = served(folder, server, no_end, max_new_tokens=10, max_length=12)
    rollout = made.generate(ragged(), seed=0)
    assert_lawful(rollout, no_end, made)
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    # Rows of 3, 9, 1, 6, 4 and 2 prompt tokens may say 9, 3, 10, 6, 8 and 10.
    assert [body["max_tokens"] for body in asked] == [10, 9, 8, 6, 3]


def test_where_the_server_has_room_one_request_is_enough(serve, folder):
    server = serve(max_model_len=40)
    no_end = SamplingDistribution(eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    made = served(folder, server, no_end, max_new_tokens=10, max_length=12)
    assert_lawful(made.generate(ragged(), seed=0), no_end, made)
    assert sum(path == "/v1/completions" for path, _ in server.asked) == 1


def test_an_absent_server_is_an_error_in_time(vllm, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"server_base_url: no vLLM server answers at {url} within 1 s .*vllm serve"):
        sampler(folder, mode="server", server_base_url=url, server_timeout=1)
    assert time.monotonic() - start < 10


def test_a_server_that_is_never_well_or_never_speaks_is_an_error_in_time(serve):
    server = serve()
    server.healthy = False
    with pytest.raises(ConfigError, match="within 0.5 s .*503"):
        wait_for_server(server.url, 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConfigError, match="within 0.5 s .*timed out"):
            wait_for_server(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.5)


@pytest.mark.parametrize(
    "options, limits, said",
    [
        ({"logprobs_mode": "raw_logprobs"}, {}, "gives raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"max_model_len": 20}, {"max_length": 30}, "takes 20 tokens, expected 30.*--max-model-len 30"),
    ],
)
def test_a_server_that_serves_something_else_is_refused(serve, folder, options, limits, said):
    with pytest.raises(ConfigError, match=f"server_base_url: .*{said}"):
        served(folder, serve(**options), **limits)


def test_a_server_that_does_not_say_what_it_serves_is_refused(serve, folder):
    server = serve()
    server.silent_about = "/server_info"  # as without VLLM_SERVER_DEV_MODE
    with pytest.raises(ConfigError, match="server_base_url: .* VLLM_SERVER_DEV_MODE=1.*404"):
        served(folder, server)


def test_a_server_without_a_gpu_beside_it_is_one_line(vllm, serve, folder, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: torch.device("cpu")))
    with pytest.raises(ConfigError, match="server_base_url: the server at .* did not start .*needs a CUDA device"):
        served(folder, serve())


def test_a_server_that_refuses_a_request_is_one_line_with_its_words(serve, folder):
    server = serve()
    made = served(folder, server)
    server.llm.max_model_len = 5  # it was started anew with less
    with pytest.raises(RolloutError, match="server_base_url: .* gave no rollout .*maximum context length"):
        made.generate(ragged(), seed=0)


def test_a_server_that_dies_is_one_line(serve, folder):
    server = serve()
    made = served(folder, server)
    made.generate(ragged((2,)), seed=0)
    # TRL asks five times again, with pauses of a minute in all.
    made.vllm.vllm_client.session.get_adapter(server.url).max_retries = 0
    server.close()
    with pytest.raises(RolloutError, match="server_base_url: .* gave no rollout .*onnection"):
        made.generate(ragged((2,)), seed=0)


def test_a_configuration_names_an_address():
    with pytest.raises(ValueError, match="expected http://host:port"):
        VllmConfig(server_base_url="localhost:8000")
    assert VllmConfig(server_base_url="http://gpu:8000/").server_base_url == "http://gpu:8000"

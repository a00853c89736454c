"""What the generating scripts share on the command line: which model is asked, and how much of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError, GenerationError
from chatrlhf.tools.synth.client import Limits, Price
from chatrlhf.tools.synth.llm import TextGenerator

WHICH = """which model is asked: --base-url names an OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, a provider's);
without it a folder, or a hub id with a slash, is a model that transformers loads on this machine (causal, or Flan-T5),
and any other name is one of OpenAI's. Keys come from the environment."""


def add_model_options(
    parser: argparse.ArgumentParser, *, temperature: float, max_tokens: int, model: str | None = None
) -> None:
    """Add the options that say which model is asked and within which limits.

    Args:
        temperature, max_tokens: the script's defaults.
        model: on this machine, the script's default where no endpoint is named.
    """
    parser.set_defaults(local_model=model)
    which = parser.add_argument_group("model", WHICH)
    add = which.add_argument
    on_this_machine = f"; without one {model}" if model else ""
    add("-m", "--model", help=f"name or folder (the only one of the endpoint{on_this_machine})")
    add("--base-url", "--base_url", metavar="URL", help="such as http://localhost:8000/v1 (OPENAI_BASE_URL)")
    add(
        "--api-key-env",
        "--api_key_env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="holds the key (%(default)s)",
    )
    add("-t", "--temperature", type=not_negative, default=temperature, help="(%(default)s)")
    add("-k", "--max_tokens", "--max-tokens", type=positive, default=max_tokens, help="of a reply (%(default)s)")
    limits = parser.add_argument_group("limits", "Of one run; what an earlier run was answered costs nothing again.")
    add = limits.add_argument
    add("--concurrency", type=positive, default=16, metavar="N", help="requests at once (%(default)s)")
    add("--retries", type=natural, default=6, metavar="N", help="of a request that failed (%(default)s)")
    add("--timeout", type=above_zero, default=60.0, metavar="S", help="seconds for a request (%(default)g)")
    add("--max-requests", "--max_requests", type=positive, metavar="N", help="sent, tries included")
    add("--max-cost", "--max_cost", type=above_zero, metavar="USD", help="stop before it is exceeded; needs --price")
    add(
        "--price", type=not_negative, nargs=2, metavar=("IN", "OUT"), help="US dollars for a million tokens, in and out"
    )
    rest = parser.add_argument_group("output")
    add = rest.add_argument
    add("--seed", type=int, default=0, help="draws examples, topics and lengths (%(default)s)")
    add("--force", action="store_true", help="overwrite a file that is there")
    add("--dry-run", "--dry_run", action="store_true", help="say what would be asked, and ask nothing")


def add_templates(parser: argparse.ArgumentParser, root: Path, *names: str, help: str) -> None:
    """Add the option that names the file of templates: that of the project, where there is one.

    Args:
        root: the folder that holds the project's ``templates.json``.
        names: of the option.
    """
    path = root / "templates.json"
    default = path if path.exists() else None
    parser.add_argument(*names, type=Path, default=default, metavar="FILE", help=f"{help} (%(default)s)")


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits of a run. Raises ConfigError where a cost is to be kept and no price is known."""
    if options.max_cost is not None and options.price is None:
        raise ConfigError(
            "--max-cost needs --price IN OUT, the model's price in US dollars for a million tokens: prices change, so "
            "none is built in"
        )
    return Limits(options.concurrency, options.retries, options.max_requests, options.max_cost)


def price_of(options: argparse.Namespace) -> Price | None:
    """The price that was named."""
    return Price(*options.price) if options.price else None


def base_url_of(options: argparse.Namespace) -> str | None:
    """The endpoint that was named, on the command line or as the openai package knows it."""
    return options.base_url or os.environ.get("OPENAI_BASE_URL") or None


def model_of(options: argparse.Namespace) -> str | None:
    """The model that was named, or the script's default on this machine; None where the endpoint has to know."""
    return options.model or (None if base_url_of(options) else options.local_model)


def is_local(options: argparse.Namespace) -> bool:
    """Whether a model on this machine is meant."""
    model = model_of(options)
    return base_url_of(options) is None and model is not None and ("/" in model or Path(model).is_dir())


def open_generator(options: argparse.Namespace) -> TextGenerator:
    """The model that was named, ready to be asked. Raises GenerationError."""
    if is_local(options):
        from chatrlhf.tools.synth.llm.local_model import LocalModel

        return LocalModel(str(model_of(options)), options.concurrency)
    from chatrlhf.tools.synth.llm.openai_endpoint import Endpoint, served_model

    base_url, key_name = base_url_of(options), options.api_key_env
    model = model_of(options)
    if model is None:
        if base_url is None:
            raise GenerationError(
                "which model? --model google/flan-t5-xl or a folder runs on this machine, --base-url URL asks an "
                "endpoint, --model NAME with a key in OPENAI_API_KEY asks OpenAI's"
            )
        model = served_model(base_url, key_name)
    return Endpoint(model, base_url, key_name, options.timeout)


def _checked(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


natural = _checked(int, lambda value: value >= 0, "a whole number from 0")
positive = _checked(int, lambda value: value >= 1, "a whole number from 1")
not_negative = _checked(float, lambda value: 0 <= value < float("inf"), "a number from 0")
above_zero = _checked(float, lambda value: 0 < value < float("inf"), "a number above 0")

"""How near the generating scripts come to the least time that a limit of concurrency allows.

    python -m benchmarks.asking
    python -m benchmarks.asking --requests 200 --concurrency 8 --latency 0.2

An endpoint in a process of its own answers each request after a fixed time; `generate_rewards.py` scores a row with
each. The least time is that of one request after the other in as many lanes as there may be. What is compared with it
is the whole command, from its start to its end, and what of that lies between the first request and the last answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSWER = json.dumps(
    {
        "id": "0",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Score: 3"}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103},
    }
).encode()


def main() -> None:
    """Serve, run the script, and print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds (%(default)s)")
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs, options.latency), daemon=True)
    server.start()
    port = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"user_input": f"{i}?", "completion": f"{i}!", "score": None} for i in range(options.requests)]
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, str(ROOT / "artifacts" / "generate_rewards.py"), f"{folder}/rows.json"]
        command += ["--base-url", f"http://127.0.0.1:{port}/v1", "--model", "judge"]
        began = time.monotonic()
        subprocess.run([*command, "--concurrency", str(options.concurrency)], check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - began
    ours.send("times")
    first, last = ours.recv()
    server.terminate()
    least = math.ceil(options.requests / options.concurrency) * options.latency
    print(f"{options.requests:,} requests of {options.latency:g} s, {options.concurrency} at once: least {least:.2f} s")
    print(f"first request to last answer {last - first:.2f} s, {(last - first) / least:.3f} of it")
    print(f"the whole command            {whole:.2f} s, {whole / least:.3f} of it")


def _serve(pipe: Connection, latency: float) -> None:
    asyncio.run(_answer(pipe, latency))


async def _answer(pipe: Connection, latency: float) -> None:
    """HTTP as far as a client that keeps its connections needs it."""
    times: list[float] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _read_head(reader):
            lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
            times.append(time.monotonic())
            await reader.readexactly(int(lines.get(b"content-length", 0)))
            await asyncio.sleep(latency)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(f"Content-Length: {len(ANSWER)}\r\n\r\n".encode() + ANSWER)
            times.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    while not pipe.poll():
        await asyncio.sleep(0.05)
    pipe.send((min(times), max(times)))


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


if __name__ == "__main__":
    main()

"""Draws the pictures of README and docs: python -m docs.pictures (`make pictures`)."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import radixkv
from radixkv import cli
from radixkv.journal_log import read_log
from radixkv.observe import history_of, timeline_html, tree_html, tree_svg
from radixkv.traces.workload import generate

HERE = Path(__file__).parent
DARK = "--blink-settings=preferredColorScheme=0"
SYSTEM = "You are a helpful assistant of the city library. "
TURNS = [
    [SYSTEM + "User: When do you open? ", "Bot: At nine. ", "User: And on Sunday? ", "Bot: We are closed. "],
    [SYSTEM + "User: When do you open? ", "Bot: At nine. ", "User: Thank you! "],
    [SYSTEM + "User: Where can I print? ", "Bot: On the first floor. "],
]


def library() -> tuple[radixkv.PrefixCache, radixkv.Lease]:
    """Three conversations, a token a letter: one is running, the system prompt is pinned."""
    cache = radixkv.PrefixCache(num_pages=64, page_size=8)
    for conversation in TURNS:
        for end in range(1, len(conversation) + 1):
            with cache.acquire([ord(c) for c in "".join(conversation[:end])]) as lease:
                lease.advance()
    cache.pin([ord(c) for c in SYSTEM])
    return cache, cache.acquire([ord(c) for c in "".join(TURNS[0]) + "User: Pity. "])


ARCHITECTURE = [  # row: what stands side by side, from left to right
    [("your server or loop", "docs/examples/server.py", 3)],
    [("AsyncGenerator, Generator", "radixkv.hf: any model of Transformers", 2),
     ("your model", "step.attend(layer, q, k, v)", 1)],
    [("Scheduler", "who runs next, on which pages", 3)],
    [("Engine, Step", "one forward pass over a batch of leases", 3)],
    [("PrefixCache", "tree, leases, LRU: C++", 1), ("KVPool", "K and V, by layer", 1),
     ("attention", "CPU kernels, FlashInfer", 1)],
    [("Journal", "what entered and left", 1), ("Tiers", "RAM, disk, snapshots", 2)],
]  # fmt: skip


def architecture() -> str:
    """The parts, each on those that it uses."""
    unit, height, gap = 236, 46, 12
    out = []
    for row, parts in enumerate(ARCHITECTURE):
        column = 0
        for name, what, span in parts:
            x, y = 10 + column * (unit + gap), 10 + row * (height + gap)
            width = span * unit + (span - 1) * gap
            box = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="part"/>'
            middle = x + width // 2
            out.append(box + f'<text x="{middle}" y="{y + 20}" class="name">{name}</text>')
            out.append(f'<text x="{middle}" y="{y + 37}" class="what">{what}</text>')
            column += span
    size = f'{20 + 3 * unit + 2 * gap}" height="{8 + len(ARCHITECTURE) * (height + gap)}'
    style = (
        "text{font:13px ui-sans-serif,Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1f2328}"
        ".what{font-size:11px;fill:#59636e}.part{fill:#eef2f6;stroke:#9aa4ae}.name{font-weight:600}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}"><style>{style}</style>\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


def letters(tokens: list[int]) -> str:
    """The text of the tokens."""
    return "".join(map(chr, tokens))


def screenshot(page: str, target: Path, width: int, height: int, *options: str) -> None:
    """What a browser shows of a page of HTML."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page)
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
        command += [
            "--virtual-time-budget=3000",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
        ]
        subprocess.run([*command, f"--screenshot={target}", file.as_uri()], check=True, capture_output=True)


def chat_log(path: Path) -> None:
    """The operation log of a cache that serves 300 requests of a chat."""
    cache = radixkv.PrefixCache(num_pages=750)
    with cache.record(str(path)) as log:
        for request in generate("chat", 300):
            with cache.acquire(request.tokens_in) as lease:
                lease.advance()
                lease.extend(request.tokens_out)
                lease.advance()
            log.pump()


def library_log(path: Path) -> str:
    """The page of an operation log with text: the conversations of the library, in a cache too small for them."""
    cache = radixkv.PrefixCache(num_pages=20, page_size=8)
    with cache.record(str(path)) as log:
        for conversation in TURNS:
            for end in range(1, len(conversation) + 1):
                with cache.acquire([ord(c) for c in "".join(conversation[:end])]) as lease:
                    lease.advance()
                log.pump()
    return timeline_html(history_of(read_log(str(path))), letters, "The city library's cache, step by step")


def pages() -> None:
    """The pages of HTML as pictures, where there is a Chromium."""
    cache, running = library()
    now = tree_html(cache.snapshot(), letters, "The city library's cache")
    running.release()
    with tempfile.TemporaryDirectory() as folder:
        log, page = Path(folder) / "chat.log", Path(folder) / "cache.html"
        chat_log(log)
        cli.main(["view", str(log), "-o", str(page)])
        screenshot(page.read_text().replace(f"{folder}/", ""), HERE / "view.png", 1000, 460)
        steps = library_log(Path(folder) / "library.log")
    screenshot(now, HERE / "view_dark.png", 900, 380, DARK)
    screenshot(steps, HERE / "view_log_dark.png", 900, 420, DARK)
    screenshot(steps.replace("max-width: 1200px", "max-width: 360px"), HERE / "view_phone.png", 500, 640)


if __name__ == "__main__":
    made, lease = library()
    (HERE / "tree.svg").write_text(tree_svg(made.snapshot(), decode=letters))
    (HERE / "architecture.svg").write_text(architecture())
    cli.main(["plan", "llama-3-8b", "--memory", "80GiB", "--weights", "16GiB", "--svg", str(HERE / "plan.svg")])
    lease.release()
    for name, *arguments in (("curve", "chat", "--clairvoyant", "--hints"), ("curves", "chat", "agent", "fewshot")):
        more = ["--requests", "2000", "--model", "llama-3-8b", "--svg", str(HERE / f"{name}.svg")]
        cli.main(["curve", *arguments, *more])
    if shutil.which("chromium"):
        pages()

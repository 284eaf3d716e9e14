"""What a pool for each group of layers would save where only some layers have a window, and what it would cost in hits.

    python -m bench.cache.windows

One pool keeps K and V of all layers for every cached page. A pool of its own for the layers with a window could keep
of them only what a request that goes on from a cached prefix looks back at: the window before each end of a prompt,
each end of an answer, and each place where an earlier request was seen to branch off. Then a prefix can be continued at
these places only; what lies behind the last of them is computed again, in all layers.

Both are counted without a limit of memory, in whole pages, over generated workloads and the traces of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.cache.npz_traces import read_npz, traces_folder
from radixkv.capacity import FORMATS, Layer, Model, bytes_per_token, read_model
from radixkv.traces import WORKLOADS, TraceRequest, generate

PAGE = 16
MODELS = ("gpt-oss-20b", "gemma-4-e4b", "gemma-4-31b")
TRACES = ("tau_airline", "bbh_zipf", "react_hotpot", "tot_game24", "mooncake_conv")


@dataclass
class Counts:
    """Over one trace, for one length of the windows. In pages, but for `tokens_in`."""

    look_back: int
    """Pages before its own that a row's window reaches into."""
    tokens_in: int = 0
    hits: int = 0
    hits_at_kept: int = 0
    seen: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)

    def add(self, request: TraceRequest) -> None:
        """Serve a request after all those before it."""
        keys = page_keys(request)
        count = len(request.tokens_in)
        prompt = keys[: (count - 1) // PAGE]  # of the prompt's last token the logits are wanted
        match = next((i for i, key in enumerate(prompt) if key not in self.seen), len(prompt))
        self.tokens_in += count
        self.hits += match
        self.hits_at_kept += self._last_kept(prompt[:match])
        self.seen.update(keys)
        for end in (match, len(prompt), len(keys)):
            self.kept.update(keys[max(0, end - self.look_back) : end])

    def _last_kept(self, keys: list[int]) -> int:
        """How many of these pages precede the last place with all that a window looks back at."""
        found = run = 0
        for i, key in enumerate(keys, 1):
            run = run + 1 if key in self.kept else 0
            if run >= min(i, self.look_back):
                found = i
        return found


def page_keys(request: TraceRequest) -> list[int]:
    """For each full page of input and output a number that stands for it and all before it."""
    known, blocks = request.tokens_in, request.blocks
    if blocks is not None:  # no output, and of the last block no more is known than that nobody shares it
        known = known[: len(known) // blocks.unit * blocks.unit]
    data = known.tobytes() + request.tokens_out.tobytes()
    size, key, keys = 4 * PAGE, 0, []
    for start in range(0, len(data) - size + 1, size):
        key = hash((key, data[start : start + size]))
        keys.append(key)
    return keys


def windowed(model: Model) -> tuple[Layer, int, int]:
    """A layer with the model's window, and bytes of a token in layers with and without one."""
    local = [layer for layer in model.layers if layer.window]
    inside = bytes_per_token(Model("local", tuple(local)), FORMATS["bf16"])
    return local[0], inside, bytes_per_token(model, FORMATS["bf16"]) - inside


def requests_of(name: str) -> Iterator[TraceRequest] | None:
    if name in WORKLOADS:
        return generate(name, 2000)
    folder = traces_folder()
    return None if folder is None else read_npz(folder / f"{name}.npz")


def main() -> None:
    heads = ("trace", "model", "window", "one pool", "a pool a group", "saved", "hits", "hits left")
    print(("{:14}" + "{:>15}" * 7).format(*heads))
    for trace in (*WORKLOADS, *TRACES):
        for name in MODELS:
            requests = requests_of(trace)
            if requests is None:
                print(f"{trace:14}  left out: set RADIXKV_TRACES to the folder of the traces")
                break
            layer, inside, outside = windowed(read_model(name))
            counts = Counts(-(-(int(layer.window or 0) - 1) // PAGE))
            for request in requests:
                counts.add(request)
            one = len(counts.seen) * PAGE * (inside + outside)
            groups = PAGE * (len(counts.seen) * outside + len(counts.kept) * inside)
            shares = (PAGE * hits / counts.tokens_in for hits in (counts.hits, counts.hits_at_kept))
            figures = (f"{one / 2**30:.1f} GiB", f"{groups / 2**30:.1f} GiB", f"{1 - groups / one:.1%}")
            print(("{:14}" + "{:>15}" * 7).format(trace, name, layer.window, *figures, *(f"{s:.1%}" for s in shares)))


if __name__ == "__main__":
    main()

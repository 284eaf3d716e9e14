"""Hypothesis strategies for small traces: few tokens, so prefixes meet; sequences grown from earlier ones."""

from hypothesis import strategies as st

from radixkv.traces.request import TraceRequest


@st.composite
def traces(draw, max_requests=25, max_tokens=24):
    """Requests with outputs: below a page, repeated, extended, cut and longer than a small cache."""
    alphabet = st.integers(0, draw(st.integers(0, 2)))
    seen, requests = [[]], []
    for _ in range(draw(st.integers(1, max_requests))):
        base = draw(st.sampled_from(seen))
        base = base[: draw(st.integers(0, len(base)))] if draw(st.booleans()) else base
        tokens = (base + draw(st.lists(alphabet, max_size=6)))[:max_tokens] or [0]
        seen.append(tokens)
        num_in = draw(st.integers(1, len(tokens)))
        requests.append(TraceRequest(tokens[:num_in], tokens[num_in:], namespace=draw(st.sampled_from(["", "", "b"]))))
    return requests

"""The tree as text and as a picture."""

import xml.etree.ElementTree as ElementTree

import radixkv
from radixkv.observe import tree_svg, tree_text


def node(tokens, pages, *children, locks=0, pins=0):
    return {"tokens": tokens, "pages": pages, "locks": locks, "pins": pins, "children": list(children)}


SNAPSHOT = [
    {
        "namespace": "",
        "children": [
            node([1, 2, 3], [7, 8], node([4], [9], locks=2), node([5, 6], [1], node([9], [3])), pins=1, locks=2),
            node([2], [4]),
        ],
    },
    {"namespace": "tenant <a>", "children": []},
]


def test_every_branch_is_drawn_where_it_belongs():
    assert tree_text(SNAPSHOT).splitlines() == [
        "default namespace",
        "├─ 3 tokens, 2 pages, pinned  1 2 3",
        "│  ├─ 1 token, 1 page, leased  4",
        "│  └─ 2 tokens, 1 page  5 6",
        "│     └─ 1 token, 1 page  9",
        "└─ 1 token, 1 page  2",
        "namespace 'tenant <a>': empty",
    ]


def test_text_is_decoded_shortened_and_kept_on_one_line():
    def decode(ids):
        return "\n".join(f"word{token}" for token in ids)

    lines = tree_text(SNAPSHOT, decode, width=60).splitlines()
    assert lines[2].endswith("leased  word4")
    assert lines[3].endswith("word5⏎word6")
    long = [{"namespace": "", "children": [node(list(range(500)), [0] * 32)]}]
    for width in (40, 60, 100):
        line = tree_text(long, decode, width).splitlines()[1]
        assert len(line) <= width
        assert line.endswith("…")


def test_nothing_is_cut_inside_a_word():
    long = [{"namespace": "", "children": [node([1234] * 64, [0] * 4)]}]
    for width in range(36, 60):
        shown = tree_text(long, None, width).splitlines()[1].partition("pages  ")[2]
        assert shown.endswith("1234…"), shown
        words = tree_text(long, lambda ids: "library " * len(ids), width).splitlines()[1].partition("pages  ")[2]
        assert words.endswith("library…"), words
    assert "pages  " in tree_text(long, lambda ids: "x" * 500, 40).splitlines()[1]


def test_the_tree_of_a_real_cache():
    with radixkv.PrefixCache(num_pages=16, page_size=2) as cache:
        assert "empty" in tree_text(cache.snapshot())
        for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]):
            with cache.acquire(tokens, "a") as lease:
                lease.advance()
        with cache.acquire([1, 2, 3, 4, 5, 6, 9], "a"), cache.pin([1, 2, 3, 4], "a"):
            text = tree_text(cache.snapshot())
    lines = [line for line in text.splitlines() if "token" in line]
    assert lines[0] == "└─ 4 tokens, 2 pages, pinned  1 2 3 4"
    assert sorted(line[6:] for line in lines[1:]) == [
        "2 tokens, 1 page  7 8",
        "2 tokens, 1 page, leased  5 6",
    ]


def test_a_deep_tree_needs_no_recursion():
    deep = node([0], [0])
    for _ in range(3000):
        deep = node([0], [0], deep)
    snapshot = [{"namespace": "", "children": [deep]}]
    assert len(tree_text(snapshot).splitlines()) == 3002
    assert tree_svg(snapshot).count('<rect class="node"') == 3001


def test_the_picture_is_valid_and_has_a_box_for_every_node():
    svg = ElementTree.fromstring(tree_svg(SNAPSHOT, lambda ids: f'<{ids}> & "more"'))
    boxes = [rect.get("class") for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if rect.get("class")]
    assert boxes == ["pinned", "leased", "node", "node", "node", "key leased", "key pinned", "key node"]
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "3 tokens, 2 pages" in texts
    assert any('<[4]> & "more"' in text for text in texts)


def test_a_picture_of_tokens_that_xml_forbids_is_valid():
    """Half a surrogate pair and control characters are replaced; spaces and joined letters of any script are not."""
    svg = ElementTree.fromstring(tree_svg(SNAPSHOT, lambda ids: "\0\ud800\uffff \u3000\u200d."))
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "\ufffd\ufffd\ufffd \u3000\u200d." in texts

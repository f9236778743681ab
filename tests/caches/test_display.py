"""Pasts and records to look at."""

import html.parser

import pytest
import torch

import funcattn as fa
from funcattn.caches import display

MODEL = fa.decoder(fa.Config())
PARAMS = MODEL.init(fa.key(0))
KINDS = {
    "dense": (fa.Cache, "Cache: 3 of 64 tokens"),
    "pages": (fa.caches.pages(block=16), "Pages: 3 of 64 tokens"),
    "quantized": (fa.caches.quantized(bits=4), "QuantizedCache: 3 of"),
    "ring": (fa.caches.ring(window=16, sinks=4), "Ring: 3 tokens"),
}


class Balanced(html.parser.HTMLParser):
    """Raises where a tag is closed that was not open."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("br", "rect"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", KINDS)
def test_a_past_says_how_much_it_holds(name):
    kind, begins = KINDS[name]
    _, past = MODEL.apply(PARAMS, torch.tensor([1, 2, 3]), MODEL.cache(64, kind=kind))
    assert str(past).startswith(begins)
    assert "2 layers, 2 heads of 16" in str(past)
    assert begins in past._repr_html_()
    Balanced(past._repr_html_())


def test_a_branch_counts_both_parts():
    _, past = MODEL.apply(PARAMS, torch.tensor([1, 2, 3]), MODEL.cache(64))
    assert str(fa.Branch(past, MODEL.cache(8))).startswith("Branch: 3 + 0 of 72 tokens")


def test_many_pasts_and_one_that_is_gone_are_described():
    many = torch.func.vmap(lambda n: MODEL.cache(8)._replace(length=n))(torch.tensor([2, 5]))
    assert "2 pasts of 2 to 5 tokens" in display.line(many)
    assert "layers" not in display.line(many)  # its axes are not those of one past
    assert "given away" in display.line(
        MODEL.cache(8)._replace(length=torch.tensor(fa.caches.DONATED))
    )


def test_params_unfold_to_every_leaf_and_layers_alike_share_a_line():
    text = PARAMS._repr_html_()
    Balanced(text)
    assert "0 to 1, each: Layer" in text
    assert text.count("float32[") == len(fa.tree.leaves(PARAMS)) - len(
        fa.tree.leaves(PARAMS.layers[0])
    )


def test_what_a_record_holds_is_escaped():
    assert "<b>" not in fa.records.unfolded("<b>", ({"<b>": torch.ones(1)},))

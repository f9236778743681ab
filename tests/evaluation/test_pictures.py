"""Pictures: what is printed holds the values, and the HTML is whole and escaped."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn.evaluation import (
    attention_maps,
    attention_pattern,
    bars,
    curve,
    heat_map,
    lens_table,
    logit_lens,
    ranked,
    surprise,
    token_labels,
)

CONFIG = fa.Config(vocabulary=90, width=8, heads=2, kv_heads=1, head_size=4, feed_forward=8)
MODEL = fa.decoder(CONFIG)
PARAMS = MODEL.init(fa.key(0))


class Letters:
    """A tokenizer of characters, some of which HTML and terminals read as commands."""

    def decode(self, ids):
        return "".join({1: "<b>", 2: "\n", 3: "\x1b[2J"}.get(i, chr(33 + i)) for i in ids)


class Balanced(HTMLParser):
    """Raises where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.styles = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.styles.append(dict(attributes).get("style", ""))
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


TOKENS = torch.tensor([40, 1, 2, 3, 50])
WORDS = ["I", "<b>", "⏎", r"\x1b[2J", "S"]
FOUND = logit_lens(MODEL, PARAMS, TOKENS)
PATTERN = attention_pattern(MODEL, PARAMS, TOKENS, 0)
BEAMS = fa.beam_search(MODEL, PARAMS, TOKENS, steps=3, beams=2, best=2)
HISTORY = [(10, 3.0, 3.5), (20, 2.0, None), (30, 1.0, 2.5)]
PICTURES = {
    "heat_map": heat_map(
        torch.tensor([[1.0, -2.0], [float("nan"), 0.5]]), ["a", "<b>"], ["c", "d"]
    ),
    "lens_table": lens_table(FOUND, TOKENS, Letters()),
    "attention_maps": attention_maps(PATTERN, WORDS),
    "surprise": surprise(fa.score(MODEL, PARAMS, TOKENS), TOKENS, Letters()),
    "bars": bars(torch.arange(90.0).log_softmax(-1), Letters(), k=4),
    "ranked": ranked(BEAMS, Letters()),
    "curve": curve(HISTORY),
}


@pytest.mark.parametrize("name", PICTURES)
def test_html_is_whole_and_nothing_in_it_is_a_command(name):
    picture = PICTURES[name]
    Balanced(picture._repr_html_())
    assert "<b>" not in picture.html
    assert "\x1b" not in picture.html + str(picture)
    assert repr(picture) == str(picture)
    assert len(str(picture).splitlines()) > 1


def test_labels_are_the_texts_of_tokens_on_one_line():
    assert token_labels(TOKENS, Letters()) == WORDS == token_labels(TOKENS.tolist(), Letters())


def test_a_token_of_spaces_is_seen():
    class Spaces:
        def decode(self, ids):
            return " " * ids[0]

    assert token_labels([0, 1, 2], Spaces()) == ["", "␣", "␣␣"]


def test_a_heat_map_prints_its_values_and_colours_them_by_sign():
    picture = PICTURES["heat_map"]
    assert [line.split() for line in str(picture).splitlines()] == [
        ["c", "d"],
        ["a", "1.0", "-2.0"],
        ["<b>", "nan", "0.5"],
    ]
    colours = [style for style in Balanced(picture.html).styles if "background" in style]
    assert colours == [
        "text-align:center;background:rgba(59,110,165,0.38)",
        "text-align:center;background:rgba(200,70,50,0.75)",
        "text-align:center;background:rgba(59,110,165,0.19)",
    ]


def test_a_lens_table_has_a_row_for_each_layer_the_last_on_top():
    lines = str(PICTURES["lens_table"]).splitlines()
    assert lines[0].split() == WORDS
    for line, layer in zip(lines[1:], (1, 0), strict=True):
        said = token_labels(FOUND.ids[layer, :, 0], Letters())
        assert line.split() == [str(layer), *said]
    one = str(lens_table(FOUND, TOKENS, Letters(), layers=[-1])).splitlines()
    assert [line.split() for line in one] == [line.split() for line in lines[:2]]


def test_attention_maps_are_darker_where_more_is_attended_to():
    lines = attention_maps(torch.tensor([[[1.0, 0.0], [0.5, float("nan")]]]), ["a", "b"]).text
    assert lines.splitlines() == ["head 0", "█ ", "▒?"]
    assert PICTURES["attention_maps"].text.count("head") == CONFIG.heads
    few = attention_maps(PATTERN[:, -2:], WORDS, heads=[1])
    assert few.text.startswith("head 1\n")
    assert "\\x1b[2J → I" in few.html


def test_surprise_is_in_bits():
    scores = torch.tensor([-1.0, -2.0, -4.0, float("-inf")]) * torch.tensor(2.0).log()
    picture = surprise(scores, TOKENS, Letters())
    assert re.findall(r"\d+\.\d\d|inf", str(picture)) == ["1.00", "2.00", "4.00", "inf", "inf"]
    plain = str(surprise(scores[:3], TOKENS[:4], Letters()))
    assert plain.endswith("2.33 bits a token")
    assert plain.splitlines()[3].count("█") == 24


def test_bars_are_the_likeliest_tokens_and_the_rest():
    sampler = fa.sampling.top_k(3)
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    picture = bars(fa.sampling.log_probs(sampler)(logits), Letters(), k=2)
    probs = torch.tensor([3.0, 2.0, 1.0]).softmax(-1)
    lines = [line.split() for line in str(picture).splitlines()]
    assert [line[:-1] for line in lines[:2]] == [
        ["<b>", f"{probs[0]:.3f}"],
        ["⏎", f"{probs[1]:.3f}"],
    ]
    assert str(picture).splitlines()[2].startswith(f"(1 others) {probs[2]:.3f}")
    assert len(lines[0][-1]) == 24
    whole = bars(fa.sampling.log_probs(sampler)(logits), Letters(), k=9)
    assert "others" not in str(whole)
    assert len(str(whole).splitlines()) == 3


def test_ranked_beams_are_their_scores_lengths_and_texts():
    for n, line in enumerate(str(PICTURES["ranked"]).splitlines()):
        assert line.split()[:3] == [str(n + 1), f"{BEAMS.scores[n]:.3f}", "3"]
        text = Letters().decode(BEAMS.tokens[n].tolist()).replace("\n", "⏎")
        assert line.endswith(text.replace("\x1b", r"\x1b"))


def test_a_curve_is_the_losses_of_both_texts():
    lines = str(PICTURES["curve"]).splitlines()
    assert lines == [
        "training   ▇▄▁ 3.000 → 1.000 in 30 steps",
        "validation █▅ 3.500 → 2.500 in 30 steps",
    ]
    assert PICTURES["curve"].html.count("<circle") == 5
    alone = curve([(5, float("nan"), None)])
    assert str(alone) == "training   █ nan → nan in 5 steps"
    Balanced(alone.html)


def test_the_history_of_a_fit_is_drawn():
    text = fa.random.randint(fa.key(1), (80,), 0, 90)
    done = fa.training.fit(
        fa.key(2),
        MODEL,
        PARAMS,
        text,
        optimizer=fa.training.adamw(1e-2),
        steps=4,
        rows=2,
        context=8,
        report_every=2,
        progress=False,
    )
    assert f"→ {done.history[-1].training:.3f} in 4 steps" in str(curve(done.history))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: heat_map(torch.ones(2, 3), ["a"], ["b"] * 3), r"\(R, C\) = \(1, 3\)"),
        (lambda: lens_table(FOUND, TOKENS[:2], Letters()), r"\(R, C\) = \(2, 2\)"),
        (lambda: lens_table(FOUND, TOKENS, Letters(), layers=[2]), "layers should be in 0..1"),
        (
            lambda: lens_table(logit_lens(MODEL, PARAMS, TOKENS[None]), TOKENS, Letters()),
            "of one text",
        ),
        (lambda: attention_maps(PATTERN, ["a"]), "S = 1 labels"),
        (lambda: attention_maps(PATTERN, WORDS, heads=[2]), "heads should be in 0..1"),
        (lambda: surprise(torch.zeros(5), TOKENS, Letters()), r"\(T - 1,\) for tokens \(5,\)"),
        (lambda: bars(torch.zeros(2, 5), Letters()), r"log_probs should be \(V,\)"),
        (lambda: bars(torch.zeros(5), Letters(), k=0), "k should be at least 1"),
        (lambda: ranked(BEAMS._replace(scores=torch.zeros(2, 2)), Letters()), "of one prompt"),
        (lambda: curve([]), "of one report or more"),
        (
            lambda: vmap(lambda x: (heat_map(x, ["a"], ["b"]), x)[1])(torch.ones(2, 1, 1)),
            "outside of vmap",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()

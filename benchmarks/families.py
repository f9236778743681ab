"""Every name that transformers has for decoders: equal to the original, refused, or wrong?

Usage: python benchmarks/families.py [--write] [--table] [NAME ...]

Of each name that is read, the tiny models of tests/family_models.py are made by transformers, read,
and run whole and step by step. Of every other name the config.json of its class at its defaults must
be refused, by a CheckpointError. `--write` puts the result into docs/families.md, and makes the
table of families there anew (family_table.py); `--table` does the latter alone, without a run, with
the differences that the page has. Without names, all are run, some minutes on one core; with names
the others are as the page has them.
"""

import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import transformers
from family_models import MODELS, TEXT, TOWERS, T, V, settings, wrap_text
from family_table import equal_in, with_table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import funcattn as fa
from funcattn.families import CheckpointError, read_config

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- by benchmarks/families.py -->", "<!-- end -->"
TOLERANCE = 1e-4
# wrappers whose class needs a package more: their text, in the files of the wrapper
WRAPPED = {"gemma3n": ("gemma3n_text", "Gemma3nForConditionalGeneration")}
IDEAS = {  # of names that are not read: what Config cannot say
    "latent attention": "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 sarvam_mla youtu",
    "latent attention with a sparse indexer": "axk2 deepseek_v32 deepseek_v4 dots3_note "
    "dots3_note_text glm_moe_dsa hy_v4",
    "twice latent attention a layer, experts that do nothing": "longcat_flash",
    "short convolutions": "lfm2 lfm2_moe lfm3",
    "a gated delta net": "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text "
    "qwen3_next qwen4_exp qwen4_exp_text",
    "other linear attention": "bailing_hybrid lara_mini minimax",
    "state spaces": "bamba falcon_h1 falcon_mamba jamba mamba mamba2 nemotron_h zamba zamba2",
    "other recurrences": "recurrent_gemma rwkv xlstm inkling2_loop_text inkling2_text "
    "inkling_text hrm_text",
    "drafters that read keys and values of another model": "gemma4_assistant "
    "gemma4_unified_assistant",
    "attention of another form": "beam blt diffllama doge dory jetmoe prophetnet reformer "
    "transfo-xl xlm xlnet zaya",
    "another router or activation": "flint kolibri1 minimax_m3_vl_text",
    "weights of two bits": "bitnet",
    "embeddings of another form": "big_bird bigbird_pegasus blenderbot-small cpmant rembert "
    "roc_bert roformer xmod",
    "models of images or sound around a text that is not read yet": "emu3 fuyu git got_ocr2 mllama "
    "moshi moss_transcribe_diarize musicgen musicgen_melody",
}


def tokens():
    ids = fa.random.randint(fa.key(0), (T,), 0, V)
    return torch.where(ids == 1, 3, ids)  # the padding of RoBERTa


def original(name, tower):
    """A model of transformers with random weights, none at a neutral value."""
    if tower:
        text, eyes, more = TOWERS[name]
        given = {"text_config": {**TEXT, **text}, "vision_config": eyes, **more}
        config, maker = AutoConfig.for_model(name, **given), AutoModelForImageTextToText
    else:
        config, maker = (
            AutoConfig.for_model(MODELS[name][0], **settings(name)),
            AutoModelForCausalLM,
        )
    torch.manual_seed(0)
    model = maker.from_config(config, attn_implementation="eager").eval()
    ends = ("correction_bias", "layer_scalar")
    biases = [x for at, x in model.named_buffers() if at.endswith(ends)]
    with torch.no_grad():
        for parameter in (*model.parameters(), *biases):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def difference(name, case, tower):
    """The greatest difference of logits of a case of a name, whole and step by step."""
    model, ids = original(case, tower), tokens()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if name in WRAPPED:
            wrap_text(Path(folder), name, WRAPPED[name][1])
        config, params, _ = fa.load(folder)
    model = (
        model.language_model if tower and name == "llama4" else model
    )  # whose own forward pass fails
    with torch.no_grad():
        wanted = model(ids[None], use_cache=False).logits[0]
    ours = fa.decoder(config)
    past, steps = ours.cache(T), []
    if not config.follows_length:
        for piece in ids.split([10, 10, *[1] * (T - 20)]):
            logits, past = ours.apply(params, piece, past)
            steps.append(logits)
    whole = ours.extend(params, ids)[0]
    each = [whole, *([torch.cat(steps)] if steps else [])]
    return max((logits - wanted).abs().max().item() for logits in each)


def defaults(name):
    """The fields of a class at its defaults; none where they make no model."""
    try:
        return CONFIG_MAPPING[name]().to_dict()
    except Exception:
        return {}


def outcome(name):
    """(what came of it, a number or a reason)."""
    kind = WRAPPED[name][0] if name in WRAPPED else name
    cases = [(case, False) for case, (other, _) in MODELS.items() if other == kind]
    cases = cases or ([(name, True)] if name in TOWERS else [])
    try:
        if cases:
            worst = max(difference(name, *case) for case in cases)
            return ("equal" if worst < TOLERANCE else "wrong"), worst
        read_config({**defaults(name), "model_type": name, "architectures": [NAMES[name]]})
    except CheckpointError as error:
        return "refused", str(error)
    except Exception as error:
        return "raw error", f"{type(error).__name__}: {error}"
    return "wrong", "read, and no model of it is in tests/family_models.py"


def page(found):
    """What docs/families.md says of it."""
    of = lambda kind: {name: x for name, (what, x) in found.items() if what == kind}
    equal, refused = of("equal"), of("refused")
    wrong = {**of("wrong"), **of("raw error")}
    lines = [
        f"Of the {len(found)} names that transformers {transformers.__version__} has for decoders, "
        f"{len(equal)} are read and equal, {len(refused)} refused, {len(wrong)} wrong. "
        "The greatest difference of logits of order one, in float32, whole and step by step:",
        "",
        ", ".join(f"`{name}` {worst:.0e}" for name, worst in sorted(equal.items())) + ".",
        "",
        "| refused for | names |",
        "|---|---|",
    ]
    left = set(refused)
    for idea, names in IDEAS.items():
        some = sorted(left & set(names.split()))
        left -= set(some)
        if some:
            lines.append(f"| {idea} | {', '.join(f'`{name}`' for name in some)} |")
    if left:
        lines.append(f"| other | {', '.join(f'`{name}`' for name in sorted(left))} |")
    return "\n".join([*lines, *(f"\nWrong: `{name}`, {why}" for name, why in wrong.items())])


def written():
    """The outcomes that the page has."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    equal, _, refused = text.partition("| refused for")
    found = re.findall(r"`([^`]+)` (\d\S*e-\d+)", equal)
    return {
        **{name: ("equal", float(worst)) for name, worst in found},
        **dict.fromkeys(re.findall(r"`([^`]+)`", refused), ("refused", "")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names to run; all by default")
    parser.add_argument("--write", action="store_true", help="write the result to the page")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    options = parser.parse_args()
    if options.table:
        text = PAGE.read_text()
        PAGE.write_text(with_table(text, equal_in(text)))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = written() if options.names else {}
    for name in options.names or NAMES:
        found[name] = outcome(name)
        what, more = found[name]
        shown = f"{more:.1e}" if isinstance(more, float) else more[:100]
        print(f"{name:<28} {what:<10} {shown}", flush=True)
    text = page(found)
    print("\n" + text)
    if options.write:
        before, rest = PAGE.read_text().split(BEGIN)
        text = f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
        PAGE.write_text(with_table(text, equal_in(text)))
    sys.exit(any(what in ("wrong", "raw error") for what, _ in found.values()))


if __name__ == "__main__":
    main()

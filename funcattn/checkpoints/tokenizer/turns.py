"""Which tokens of a GGUF file end a turn: those that its metadata names, and those known by their
names, as llama.cpp finds them.

Converters write one end, which for a chat is often that of a text; what ends a turn is another
token, of which the file has no more than the name.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, special_eog_ids. Its ends of infilling
    (fim_pad, fim_rep, fim_sep) are
left out: they stand between files, and no turn ends with one. "</s>" is a tag of HTML too, and
counts where it is a control token.
"""

from collections.abc import Collection, Mapping, Sequence

from ..families.tables import Json
from ..gguf import metadata as fields

TAG = "</s>"
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
NAMES = frozenset(
    [
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|eom_id|>",
            "<|end_of_text|>",
        ),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),  # harmony and Solar
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
        *(
            "<EOT>",
            "_<EOT>",
            "\u2581<EOT>",
            "[EOT]",
            "[EOS]",
            "<end_of_utterance>",
            TAG,
            "<eos>",
            "<turn|>",
            "<|tool_response>",
        ),
    ]
)


def ends_of_turns(
    metadata: Mapping[str, Json], tokens: Sequence[str], control: Collection[int]
) -> tuple[int, ...]:
    """The ids that end a generation, those that the metadata names first.

    Args:
        tokens: the text of each id. control: the ids of control tokens.
    """
    named = [fields.index(metadata, f"tokenizer.ggml.{name}", len(tokens)) for name in ENDS]
    known = {
        token: number
        for number, token in enumerate(tokens)
        if token in NAMES and (token != TAG or number in control)
    }
    if known.keys() & {"<|call|>", "<|calls|>"} and known.keys() & {"<|return|>", "<|flush|>"}:
        message = known.pop("<|end|>", None)  # ends one message of several in a turn
        named = [number for number in named if number != message]
    # of Gemma 4, whose "</s>" is the tag
    if "<|tool_response>" in known and known.pop(TAG, None) is not None:
        named = [number for number in named if number is None or tokens[number] != TAG]
    return tuple(
        dict.fromkeys(number for number in [*named, *sorted(known.values())] if number is not None)
    )

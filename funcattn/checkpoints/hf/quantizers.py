"""The quantization method of a file, recognized by names and types of its tensors.

config.json of such a file has a `quantization_config` (see `quantized`). Where it is missing, the
tensors still show the method, which the error names: nothing is read by a guess.

Source: the modules that each tool substitutes for linear layers, as of transformers 5
(integrations/) and the tools themselves.
"""

import re
from collections.abc import Mapping

Shape = tuple[int, ...]

# Method -> names of tensors that no float model has; the first match is reported.
METHODS: dict[str, str] = {
    "fp_quant": r"\.(dqweight|(forward|backward)_hadamard_matrix)",
    "bitsandbytes (4 bit)": r"\.(nested_)?(absmax|quant_map)|\.quant_state\.bitsandbytes__\w+",
    "bitsandbytes (8 bit)": r"\.(SCB|weight_format)",
    "modelopt (nvfp4)": r"\.weight_scale_2",
    "compressed-tensors": (
        r"\.(weight_(packed|shape|zero_point|g_idx|global_scale)"
        r"|input_global_scale|bitmask|compressed)"
    ),
    "fp8 (in blocks)": r"(weight|proj)_scale_inv",
    "mxfp4": r"[._]blocks",
    "hqq": r"\.W_q",
    "aqlm": r"\.codebooks",
    "vptq": r"\.(res_)?(centroids|indices)(\.weight)?",
    "spqr": r"\.(dense_weights|row_offsets|col_vals)",
    "higgs": r"\.tables2?",
    "quanto": r"\.(weight\.)?_(data|scale|shift|zeropoint)",
    "torchao": (
        r"weight[_:]_?(qdata|scale_and_zero|zero_point)|:_?(qdata|scale|zero_point)|\.tensor_impl\.\w+"
    ),
    "eetq": r"\.weight_scales",
    "exl2": r"\.q_(weight|scale|scale_max|perm|invperm|groups)",
    "exl3": r"\.(trellis|suh|svh)",
    "quip": r"\.(Qidxs|Wscale)",
    "marlin": r"\.(B|B_24|B_meta)",
    "mlx": r"\.q?biases",
    "quark": r"_quantizer\.\w+",
    "funcattn, which is said in the config.json that fa.save wrote": r"\.codes",
}
LONGEST = 100  # characters at the end of a name that are searched; names may have any length
ANY = re.compile(rf"({'|'.join(METHODS.values())})\Z")


def method_of(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> tuple[str, str] | None:
    """The method that quantized a file and a tensor that shows it, or None if it is not known.

    Args:
        shapes, types: name -> shape, and type as in safetensors, of each tensor that is not one of
            a float model.

    Example:
        >>> method_of({"a.qweight": (8, 64), "a.scales": (1, 64)}, {"a.qweight": "I32",
        ...     "a.scales": "F16"})
        ('gptq', 'a.qweight')
    """
    marked = [name for name in shapes if ANY.search(name[-LONGEST:])]
    for method, pattern in METHODS.items():
        ending = re.compile(rf"({pattern})\Z")
        if shown := next((name for name in marked if ending.search(name[-LONGEST:])), None):
            return method, shown
    if shown := next((name for name in shapes if name.endswith(".qweight")), None):
        return _packed_in_32_bits(shown.removesuffix("qweight"), shapes), shown
    if shown := next((name for name in shapes if types[name].startswith("F8_")), None):
        scaled = any(name.endswith("_scale") for name in shapes)
        return "fp8" + (" (fbgemm_fp8, compressed-tensors or modelopt)" if scaled else ""), shown
    if scale := next((name for name in shapes if name.endswith(".weight_scale")), None):
        bits = types.get(scale.removesuffix("_scale"))
        return ("bitnet" if bits == "U8" else "compressed-tensors"), scale
    return None


def _packed_in_32_bits(module: str, shapes: Mapping[str, Shape]) -> str:
    """Eight codes of 4 bits are one integer: GPTQ packs the inputs (in / 8, out), AWQ the outputs
    (in, out / 8).
    """
    scales = shapes.get(f"{module}scales", ())
    if f"{module}g_idx" in shapes or (scales and scales[-1] == shapes[f"{module}qweight"][-1]):
        return "gptq"
    return "awq" if scales else "gptq or awq"

"""Several adaptations of one model in one tree, of which each row of a batch chooses one.

    stack = stack_lora([params, first, second])              bases once, a (n, r, in), b (n, out, r)
    vmap(lambda n, tokens: f(choose_lora(stack, n), tokens))(indices, rows)

The base multiplies all rows together; what is added is a batch of products of low rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door, what_is
from ..layers import Weight, embed, linear
from ..records import ABSENT, is_absent, record
from ..tree import Tree
from .adaptations import Lora, is_adapted, is_weight


@record
class LoraStack(NamedTuple):
    """n adaptations of one weight, of which `choose_lora` takes one.

    base: (out, in), any weight; a: (n, r, in); b: (n, out, r); scale: (n,); gain: (n, out) or ().
    """

    base: Weight
    a: Tensor
    b: Tensor
    scale: Tensor
    gain: Weight = ABSENT

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight, (out, in)."""
        return tuple(self.base.shape)


@linear.register(LoraStack)
@embed.register(LoraStack)
def _(weight: LoraStack, x: Tensor) -> Tensor:
    got = f"a stack of {len(weight.scale)}"
    remedy = "Choose one, under vmap one for each row: fa.choose_lora(params, index)."
    errors.fail("linear", "weight", "one adaptation", got, remedy, TypeError)


@door
def stack_lora(trees: Sequence[Tree]) -> Tree:
    """Several adaptations of one model as one tree, whose base weights are held once.

    Adaptations of smaller rank are padded with zeros; a tree without one at a weight (the base
    itself, say) adds nothing there.

    Args:
        trees: n trees of the same base tensors, each adapted by `lora` or `load_lora`, or not.

    Raises:
        ValueError: no trees, or leaves that are not adapted differ between them, as those that
            PEFT calls modules_to_save do.

    Law: a row computes what the adaptation that it chooses does
        (test_stacks.py::test_each_row_of_a_batch_chooses_its_adaptation).
    Source: Sheng et al., S-LoRA, arXiv:2311.03285, section 5 (batched products of low rank).

    Example:
        >>> from funcattn import lora, randomness
        >>> params = {"q": torch.eye(3)}
        >>> adapted = lora(1)(randomness.key(0), params)
        >>> stack = stack_lora([params, adapted])
        >>> rows = torch.func.vmap(lambda n, x: linear(choose_lora(stack, n)["q"], x))
        >>> rows(torch.tensor([0, 1]), torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if isinstance(trees, Tensor) or not isinstance(trees, Sequence) or not len(trees):
        remedy = "Give a list of adapted params: stack_lora([params, adapted])."
        errors.fail("stack_lora", "trees", "a list of trees", what_is(trees), remedy)
    flat = [dict(tree.items(one, is_leaf=is_weight)) for one in trees]
    for n, other in enumerate(flat):
        if other.keys() != flat[0].keys():
            path = sorted(other.keys() ^ flat[0].keys())[0]
            got = f"{path!r} in one of tree 0 and tree {n}"
            errors.fail("stack_lora", "trees", "of one structure", got, "Adapt the same params.")

    def stacked(path: str, _: Weight) -> Weight:
        return _stack(path, [one[path] for one in flat])

    return tree.map_with_path(stacked, trees[0], is_leaf=is_weight)


@door
def choose_lora(params: Tree, index: int | Tensor) -> Tree:
    """The params with one adaptation of a stack; under vmap over index, one for each row.

    Args:
        params: from `stack_lora`.
        index: which of the trees that were stacked, an int or an integer tensor ().

    Raises:
        TypeError, ValueError: index is no integer of shape (), or not below the number of trees.
    """
    at = index if isinstance(index, Tensor) else torch.tensor(index)
    if at.dim() or at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
        got = f"{at.dtype} {errors.shape(at)}"
        remedy = "A batch of indices is a vmap of choose_lora."
        errors.fail("choose_lora", "index", "an integer, of shape ()", got, remedy, TypeError)

    def chosen(weight: Weight) -> Weight:
        if not isinstance(weight, LoraStack):
            return weight
        count = weight.a.shape[0]
        if errors.is_true((at < 0) | (at >= count)):
            remedy = "It is the place in the list that was stacked."
            errors.fail("choose_lora", "index", f"from 0 to {count - 1}", errors.peek(at), remedy)
        one = lambda x: x.index_select(0, at.to(x.device).reshape(1)).squeeze(0)
        gain = weight.gain if is_absent(weight.gain) else one(weight.gain)
        return Lora(weight.base, one(weight.a), one(weight.b), one(weight.scale), gain)

    return tree.map(chosen, params, is_leaf=lambda node: isinstance(node, LoraStack))


def _stack(path: str, weights: Sequence[Weight]) -> Weight:
    """The stack of n weights of one base, or the weight itself where none is adapted."""
    bases = [weight.base if is_adapted(weight) else weight for weight in weights]
    ours, theirs = tree.leaves(bases[0]), [tree.leaves(base) for base in bases[1:]]
    if any(x is not y for other in theirs for x, y in zip(ours, other, strict=True)):
        wanted = "of one base: the same tensors but for adaptations"
        remedy = "Adapt the same params; what else differs is a tree of its own."
        errors.fail("stack_lora", "trees", wanted, f"another tensor at {path!r}", remedy)
    found = [weight for weight in weights if is_adapted(weight)]
    if not found:
        return weights[0]
    rank, (out, inner) = max(weight.a.shape[0] for weight in found), tuple(found[0].shape)
    like = found[0].a

    def padded(weight: Weight) -> Lora:
        if not is_adapted(weight):
            a, b = like.new_zeros(rank, inner), like.new_zeros(out, rank)
            return Lora(weight, a, b, found[0].scale.new_zeros(()))
        short = rank - weight.a.shape[0]
        a, b = F.pad(weight.a, (0, 0, 0, short)), F.pad(weight.b, (0, short))
        return weight._replace(a=a, b=b)

    each = [padded(weight) for weight in weights]
    gain: Weight = ABSENT
    if any(not is_absent(one.gain) for one in each):
        ones = like.new_ones(out)
        gain = torch.stack([ones if is_absent(one.gain) else one.gain for one in each])
    a, b, scale = (torch.stack([one[field] for one in each]) for field in (1, 2, 3))
    return LoraStack(bases[0], a, b, scale, gain)

"""Operations of attention layers by what they do at a step, with the projections, as DiTFastAttn's tables count them.

A layer of N tokens and hidden size C takes 2 (4 N C² + 2 N² C β) operations, projections of queries, keys, values and
output, and products with a share β of the pairs. Adding a residual, or fetching an output, counts as nothing.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import Action, Course
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.families import FAMILIES
from dit_accel.pipelines.specs import ModelSpec

# What β counts: pairs that the method's exact rule keeps, as the tables do, or those in tiles that are computed.
Counted = Literal["rule", "tiles"]


def layer_flops(layout: TokenLayout, dim: int, density: float = 1.0) -> float:
    """Operations of one attention module at batch 1.

    Args:
        layout: its tokens.
        dim: hidden size.
        density: share of the query-key pairs, text included, that are computed.
    """
    return 8.0 * layout.num_tokens * dim**2 + 4.0 * layout.num_tokens**2 * dim * density


def action_share(action: Action, layout: TokenLayout, dim: int, *, counted: Counted = "rule") -> float:
    """Share of a full step's operations that an action leaves to a guided layer; what it takes from others is there."""
    if action.reuse:
        return 0.0
    share = layer_flops(layout, dim, pair_share(action.method, layout, counted)) / layer_flops(layout, dim)
    return share / 2 if action.share else share


class Work(NamedTuple):
    """Operations of a model's attention layers in one forward at batch 1, the mean over a run's steps.

    Args:
        projections: of queries, keys, values and outputs.
        dense, sparse: of the products, in full attention and in sparse methods.
    """

    projections: float
    dense: float
    sparse: float


def full_work(spec: ModelSpec, layout: TokenLayout) -> Work:
    """What full attention computes."""
    projections = (spec.num_blocks - spec.visual_blocks) * layer_flops(layout, spec.hidden_dim, 0.0)
    projections += spec.visual_blocks * layer_flops(layout.without_text(), spec.hidden_dim, 0.0)
    return Work(projections, spec.attention_flops(layout), 0.0)


def is_guided(spec: ModelSpec) -> bool:
    """Whether the model's default run has an unconditional branch."""
    batched = any(family.guidance == "batched" for family in FAMILIES if family.name == spec.family)
    return spec.guidance > 1 and (batched or spec.guidance_calls > 1)


def course_work(
    course: Course, spec: ModelSpec, layout: TokenLayout, *, guided: bool = True, counted: Counted = "rule"
) -> Work:
    """What is left to compute when an assignment is followed, with what full steps add to leave a residual.

    Args:
        course: the assignment on the run (``course_of``, or ``course`` of a processor).
        spec: the model.
        layout: tokens of one call.
        guided: the run has an unconditional branch, which sharing spares.
        counted: pairs of the exact "rule" (default) or of the "tiles" that are computed.
    """
    projections = dense = sparse = 0.0
    for block in range(spec.num_blocks):
        seen = layout if block < spec.num_blocks - spec.visual_blocks else layout.without_text()
        fixed, pairs = layer_flops(seen, spec.hidden_dim, 0.0), 4.0 * seen.num_tokens**2 * spec.hidden_dim
        for step in range(course.steps):
            if not course.whole[step, block]:
                forwards = 0.5 if guided and course.shares(step, block) else 1.0
                in_full, in_methods = _pairs(course, step, block, seen, counted)
                projections += forwards * fixed
                dense += forwards * pairs * in_full
                sparse += forwards * pairs * in_methods
    return Work(projections / course.steps, dense / course.steps, sparse / course.steps)


def course_share(
    course: Course, spec: ModelSpec, layout: TokenLayout, *, guided: bool = True, counted: Counted = "rule"
) -> float:
    """Share of the operations of a run's attention layers that ``course_work`` leaves."""
    return sum(course_work(course, spec, layout, guided=guided, counted=counted)) / sum(full_work(spec, layout))


def _pairs(course: Course, step: int, block: int, layout: TokenLayout, counted: Counted) -> tuple[float, float]:
    """Share of the pairs that a layer computes in full and by methods at a step, means over its heads."""
    dense = sparse = 0.0
    for action, groups in course.parts(step, block):
        if action.full:
            dense += len(groups)
            left = [method for group in groups for method in course.keep_residuals[step][block][group]]
            sparse += sum(pair_share(method, layout, counted) for method in left)
        elif action.method is not None:
            sparse += len(groups) * pair_share(action.method, layout, counted)
    return dense / course.assignment.groups, sparse / course.assignment.groups


@functools.lru_cache(maxsize=256)
def pair_share(method: AttnMethod | None, layout: TokenLayout, counted: Counted = "rule") -> float:
    """Share of all query-key pairs, text included, that a method computes; None attends in full."""
    attention = None if method is None else method.attention(layout)
    if method is None or attention is None:
        return 1.0
    return attention.density if counted == "tiles" else layout.joint_density(method.ideal_density(layout))

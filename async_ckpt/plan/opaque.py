"""Bytes as they are: a file whose content somebody else made (a configuration, a tokenizer)."""

from __future__ import annotations

from .plan import FilePlan, PlannedState, hash_layout, planned_state


def opaque_state(data: bytes) -> PlannedState:
    """The plan of a file that holds exactly `data`."""
    plan = FilePlan(
        file_bytes=len(data),
        literals=((0, data),),
        payload_offsets=(),
        payload_nbytes=(),
        format="opaque",
        planner="opaque",
        plan_hash=hash_layout("opaque", len(data), (), ()),
    )
    return planned_state(plan, [], [], [], [], list)

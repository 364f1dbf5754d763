"""Any part of what a contiguous copy of a tensor would hold, found without that copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.plan.strided import Strided, row_major_bytes

DTYPES = (torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Transposed, cut, thinned out and expanded."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    tensor = torch.arange(1000).to(draw(st.sampled_from(DTYPES)))[: torch.Size(shape).numel()].reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for dim in range(len(shape)):
        step = draw(st.integers(1, 2))
        tensor = tensor[(slice(None),) * dim + (slice(draw(st.integers(0, tensor.size(dim) - 1)), None, step),)]
    return tensor.expand(2, *tensor.shape) if draw(st.booleans()) else tensor


@settings(max_examples=200, deadline=None)
@given(views(), st.data())
def test_every_part_is_that_of_a_contiguous_copy(tensor: torch.Tensor, data: st.DataObject) -> None:
    wanted = tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    layout = Strided(tensor.dtype, tuple(tensor.shape), tensor.stride())
    first = tensor.storage_offset() * tensor.element_size()
    memory = layout.memory(tensor.untyped_storage(), first)
    start = data.draw(st.integers(0, wanted.numel()))
    nbytes = data.draw(st.integers(0, wanted.numel() - start))
    assert torch.equal(row_major_bytes(memory, start, nbytes), wanted[start : start + nbytes])
    # Where each element lies.
    held = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    item = tensor.element_size()
    for element in range(tensor.numel()):
        place = first + layout.displacement(element)
        assert torch.equal(held[place : place + item], wanted[element * item : (element + 1) * item])
    assert first + layout.span_bytes <= held.numel()


@pytest.mark.parametrize("bits", [(False, False), (True, False), (False, True), (True, True)])
def test_conjugates_and_negatives_are_worked_into_the_bytes(bits: tuple[bool, bool]) -> None:
    tensor = torch.randn(4, 6, dtype=torch.complex64).t()
    memory = Strided(tensor.dtype, tuple(tensor.shape), tensor.stride(), *bits).memory(tensor.untyped_storage(), 0)
    wanted = tensor.conj() if bits[0] else tensor
    wanted = (-wanted if bits[1] else wanted).resolve_conj().contiguous()
    assert torch.equal(row_major_bytes(memory, 0, wanted.nbytes), wanted.flatten().view(torch.uint8))

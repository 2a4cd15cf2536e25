"""The emulated machine itself: its tensor core, its orders of threads, and that no barrier is missing or too many."""

import pytest
import torch

from cacr_kernels.testing import loss_and_gradients, make_input, make_scores

from .cuda_backend import FIXTURES, NAN, cuda

emulation, emulated, device, short_spans, products, emulated_order = FIXTURES


def fragments(matrix, rows, words):
    """[32, words, 2] as the lanes of a warp hold a matrix [rows, 16] (PTX ISA, mma.m16n8k16; b by columns)."""
    held = torch.empty(32, words, 2, dtype=matrix.dtype)
    for lane in range(32):
        for i in range(2 * words):
            upper = rows == 16 and not (0 <= i < 2 or 4 <= i < 6)
            right = i >= 4 if rows == 16 else i >= 2
            row = lane // 4 + (8 if upper else 0)
            column = lane % 4 * 2 + (i & 1) + (8 if right else 0)
            held[lane, i // 2, i % 2] = matrix[row, column]
    return held


def tf32_fragments(matrix, rows, words):
    """[32, words] as the lanes of a warp hold a matrix [rows, 8] (PTX ISA, mma.m16n8k8 of .tf32; b by columns)."""
    held = torch.empty(32, words)
    for lane in range(32):
        for i in range(words):
            down, right = (i % 2, i // 2) if rows == 16 else (0, i)
            held[lane, i] = matrix[lane // 4 + 8 * down, lane % 4 + 4 * right]
    return held


def multiply_add(emulation, a, b, c):
    """c + a b^T of a [16, 16], b [8, 16] in 16 bits, or [16, 8], [8, 8] in float32, by one emulated instruction."""
    held = torch.empty(32, 4)
    places = [[(lane // 4 + i // 2 * 8, lane % 4 * 2 + (i & 1)) for i in range(4)] for lane in range(32)]
    for lane, i in ((lane, i) for lane in range(32) for i in range(4)):
        held[lane, i] = c[places[lane][i]]
    fragments_of = tf32_fragments if a.dtype == torch.float32 else fragments
    emulation.multiply_add(fragments_of(a, 16, 4), fragments_of(b, 8, 2), held)
    result = torch.empty(16, 8)
    for lane, i in ((lane, i) for lane in range(32) for i in range(4)):
        result[places[lane][i]] = held[lane, i]
    return result


@pytest.mark.parametrize(("dtype", "inner"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 8)])
def test_emulated_tensor_core_multiplies_the_fragments_of_the_ptx_isa(emulation, dtype, inner):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-99, 100, s, generator=generator) for s in ((16, inner), (8, inner), (16, 8)))
    result = multiply_add(emulation, a.to(dtype), b.to(dtype), c.float())
    assert torch.equal(result.long(), c + a @ b.T)


def test_emulated_tensor_core_cuts_float32_off_to_tf32(emulation):
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    a[:, 0] = 1 + 2.0**-10 + 2.0**-11  # ten bits of a fraction
    b[:, 0] = -1 - 2.0**-11 - 2.0**-23
    assert (multiply_add(emulation, a, b, c) == -1 - 2.0**-10).all()


def test_emulated_ldmatrix_loads_the_fragments_of_the_ptx_isa(emulation):
    """Matrix i comes from the rows of lanes 8 i + 0..7; the four of a left operand in their order are its fragment."""
    rows = torch.arange(256, dtype=torch.int16).view(32, 8)
    matrices = rows.view(4, 8, 8)
    for transposed in (False, True):
        words = emulation.load_matrices(rows, transposed)
        for lane in range(32):
            for i in range(4):
                matrix = matrices[i].T if transposed else matrices[i]
                assert torch.equal(words[lane, i], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
    operand = torch.arange(256).view(16, 16).half()
    corners = [operand[:8, :8], operand[8:, :8], operand[:8, 8:], operand[8:, 8:]]
    assert torch.equal(emulation.load_matrices(torch.cat(corners), False), fragments(operand, 16, 4))


def test_emulated_tensor_core_truncates(emulation):
    """Four products and the accumulator are cut off at the 24 bits of the largest of them, their sum at its own."""
    a, b, c = torch.zeros(16, 16).half(), torch.ones(8, 16).half(), torch.full((16, 8), -(2.0**24))
    c[1] = 0
    a[0, 0] = -1.75
    a[1, :4] = torch.tensor([1024.0, 2.0**-13, -1024.0, 2.0**-14])
    result = multiply_add(emulation, a, b, c)
    assert (result[0] == -(2**24)).all()
    assert (result[1] == 2**-13).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("softmax", torch.float32),
        ("scores", torch.float32),
        ("scores", torch.float16),
        ("scores", torch.bfloat16),
        ("probs", torch.bfloat16),
    ],
)
def test_no_order_of_threads_and_blocks_changes_a_bit(device, products, emulated_order, kind, dtype):
    attn = make_input(kind, 35, 66, batch=2, std=0.5, dtype=dtype, device=device)
    results = []
    for seed in range(3):
        emulated_order(seed)
        loss, (gradient,) = loss_and_gradients(lambda x: cuda(x, 35, kind=kind), attn)
        results.append((loss, gradient))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1]) for loss, g in results[1:])


@pytest.mark.parametrize(
    ("dtype", "fused", "count"),
    [
        (torch.float32, False, 8),
        (torch.float16, False, 8),
        (torch.float16, True, 4),
        (torch.bfloat16, True, 4),
        (torch.float32, True, 4),
    ],
)
def test_every_barrier_is_needed(emulated, dtype, fused, count):
    """With any one of the barriers taken out, results differ or the emulation refuses: a missing one is found."""
    emulated.fused(fused)

    def results():
        """Loss and gradient for several and for one tile a row; NaN where the emulation refuses."""
        values = []
        for n_text in (66, 20):
            attn = make_scores(n_text, 35, std=0.5, dtype=dtype)
            try:
                loss, (gradient,) = loss_and_gradients(lambda x, n=n_text: cuda(x, n), attn)
            except RuntimeError:
                return torch.tensor(NAN)
            values += [loss.flatten(), gradient.flatten()]
        return torch.cat(values)

    emulated.configure(1)
    expected = results()
    barriers = emulated.barriers()
    assert not expected.isnan().any()
    assert len(barriers) >= count
    for barrier in barriers:
        for seed in range(1, 17):  # not every order of the threads meets a race
            emulated.configure(seed, barrier)
            if not torch.equal(results(), expected):
                break
        else:
            pytest.fail(f"nobody needs the barrier at {barrier}")

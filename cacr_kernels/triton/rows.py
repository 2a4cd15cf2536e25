"""Row statistics of the comparison of X with Y: running numbers, loss, gradients, and their storage.

Triton only, no torch. Per row i of side a, p = softmax(X_i), q = softmax(Y_i), Y = S_aa:
KL(p||q) + KL(q||p) = sum_j (p_j - q_j)(x_j - y_j) = E_p[x - y] - E_q[x - y].
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_E, exponential

#: probabilities are clamped from below by this number before their logarithm is taken (kind "probs")
SMALLEST_PROBABILITY = tl.constexpr(1e-12)
#: below every logit, and so far from overflow that differences of such numbers stay finite
LOW = tl.constexpr(-1e30)


@triton.jit
def target_logits(b_s, KIND: tl.constexpr):
    """Y in float32 from a tile of S_aa: its scores, or log max(S_aa, 1e-12) of probabilities. NaN stays NaN."""
    b_y = b_s.to(tl.float32)
    if KIND == "probs":
        b_y = tl.log(tl.where(b_y < SMALLEST_PROBABILITY, SMALLEST_PROBABILITY, b_y))
    return b_y


@triton.jit
def target_gradient(b_dy, b_s, KIND: tl.constexpr):
    """dS_aa from dY: dY itself, or dY / S_aa where S_aa was not clamped."""
    if KIND == "probs":
        b_s = b_s.to(tl.float32)
        b_dy = tl.where(b_s < SMALLEST_PROBABILITY, 0.0, b_dy / b_s)
    return b_dy


@triton.jit
def side_scale(scaling, side):
    """(factor of X: projection_scale [/ n_b^2], weight of a row's loss: 1 [/ n_a], whether the side counts)."""
    scale = scaling.projection_scale
    n = tl.maximum(side.n_b, 1).to(tl.float32)
    scale = tl.where(scaling.projection_mean != 0, scale / (n * n), scale)
    weight = tl.where(scaling.row_mean != 0, 1.0 / tl.maximum(side.n_a, 1).to(tl.float32), 1.0)
    return scale, weight, tl.where(side.is_text, scaling.text, scaling.vision) != 0


@triton.jit
def store_numbers(p, s_n, o_i, mask, keep, n_0, n_1, n_2, n_3, n_4, n_5, PRESENT: tl.constexpr):
    """Write eight numbers a row to p + k s_n + o_i, where ``mask``: n_0 ... n_5, 0, 0; all 0 unless ``keep``.

    Bits of PRESENT: those that stay as they are. One tile [I, 8]: on its way from the layout of rows to that of a store
    it meets two barriers, as every number of its own would.
    """
    o_k = tl.arange(0, 8)[None, :]
    b = tl.where(o_k == 0, n_0[:, None], tl.where(o_k == 1, n_1[:, None], 0.0))
    b = tl.where(o_k == 2, n_2[:, None], tl.where(o_k == 3, n_3[:, None], b))
    b = tl.where(o_k == 4, n_4[:, None], tl.where(o_k == 5, n_5[:, None], b))
    b = tl.where(keep[:, None], b, 0.0)
    mask = mask[:, None] & ((PRESENT >> o_k) % 2 == 0)
    tl.store(p + o_k * s_n + o_i[:, None], b, mask=mask)


@triton.jit
def store_rows(side, spans, o_i, active, m_x, l_x, m_y, l_y, e_p, e_q, KIND: tl.constexpr):
    """Write the eight numbers of rows o_i, 0 for rows beyond the span and for a side left out.

    In order: max and sum of exp of X, of Y; E_p[d], E_q[d]; max and sum of exp of the cross block's rows. For kind
    "softmax" those of Y and of the cross block are there already, since the products need them.
    """
    mask = o_i < tl.where(side.is_text, spans.n_text, spans.n_vision)
    keep = (o_i < side.n_a) & active
    PRESENT: tl.constexpr = 0b11001100 if KIND == "softmax" else 0
    store_numbers(side.p_n, side.s_n, o_i, mask, keep, m_x, l_x, m_y, l_y, e_p, e_q, PRESENT)


@triton.jit
def load_rows(side, i, BLOCK_I: tl.constexpr):
    """(m_x, l_x, m_y, l_y, E_p[d], E_q[d]) of BLOCK_I rows from i; beyond the span l = 1 and the rest 0."""
    p, s_n = side.p_n, side.s_n
    o_i = i + tl.arange(0, BLOCK_I)
    mask = o_i < side.n_a
    return (
        tl.load(p + o_i, mask=mask, other=0.0),
        tl.load(p + s_n + o_i, mask=mask, other=1.0),
        tl.load(p + 2 * s_n + o_i, mask=mask, other=0.0),
        tl.load(p + 3 * s_n + o_i, mask=mask, other=1.0),
        tl.load(p + 4 * s_n + o_i, mask=mask, other=0.0),
        tl.load(p + 5 * s_n + o_i, mask=mask, other=0.0),
    )


@triton.jit
def rows_start(BLOCK_I: tl.constexpr):
    """The numbers (m_x, l_x, s_x, m_y, l_y, s_y, c) of BLOCK_I rows before their first tile: see rows_update."""
    low = tl.full([BLOCK_I], LOW, tl.float32)
    zero = tl.zeros([BLOCK_I], tl.float32)
    return low, zero, zero, low, zero, zero, zero


@triton.jit
def rows_update(m_x, l_x, s_x, m_y, l_y, s_y, c, b_x, b_y, y_scale, inside, LOG2: tl.constexpr):
    """Take the tile b_x, b_y [I, J] into the rows' numbers; ``inside`` [1, J] masks columns. LOG2: logits / ln 2.

    The logits are x and y_scale y with y_scale >= 0: the maximum comes before the scale, which then costs nothing. Per
    row: m = max x, l = sum_j e^(x_j - m), s = sum_j e^(x_j - m) (d_j - c) with d = (x - m_x) - (y - m_y), so that a
    common offset of X and Y costs no precision. c follows E_p[d]: both s stay small where E_p[d] and E_q[d] are nearly
    equal, and their difference, the loss, keeps its digits.
    """
    n_x = tl.maximum(m_x, tl.max(tl.where(inside, b_x, LOW), 1))
    n_y = tl.maximum(m_y, tl.max(tl.where(inside, b_y, LOW), 1) * y_scale)
    shift = (m_x - n_x) - (m_y - n_y)
    b_x = tl.where(inside, b_x, LOW) - n_x[:, None]  # select first: see rows_gradient
    b_y = tl.where(inside, b_y * y_scale - n_y[:, None], LOW)
    b_d = b_x - b_y
    if LOG2:
        b_p, b_q, r_x, r_y = tl.exp2(b_x), tl.exp2(b_y), tl.exp2(m_x - n_x), tl.exp2(m_y - n_y)
    else:
        b_p, b_q, r_x, r_y = exponential(b_x), exponential(b_y), exponential(m_x - n_x), exponential(m_y - n_y)
    w_x = l_x * r_x
    w_y = l_y * r_y
    l_x = w_x + tl.sum(b_p, 1)
    l_y = w_y + tl.sum(b_q, 1)
    # relative to the new maxima the old columns' c is c + shift; where these maxima dwarf the old ones, its weight is 0
    c_new = (w_x * (c + shift) + tl.sum(b_p * b_d, 1)) / l_x
    shift += c - c_new
    b_d -= c_new[:, None]
    s_x = s_x * r_x + w_x * shift + tl.sum(b_p * b_d, 1)
    s_y = s_y * r_y + w_y * shift + tl.sum(b_q * b_d, 1)
    return n_x, l_x, s_x, n_y, l_y, s_y, c_new


@triton.jit
def rows_advance(m_x, l_x, s_x, m_y, l_y, s_y, c, b_x, b_y, y_scale, inside, MASKED: tl.constexpr):
    """rows_update for tiles after a row's first, in fewer steps an element; LOG2. Unless MASKED all columns count.

    The tile's d are taken relative to the c that is known, in place of one that counts the tile; or to 0 where a new
    maximum of X leaves the old columns less than half of their weight: that c is then as far away as the maxima are.
    """
    if MASKED:
        n_x = tl.maximum(m_x, tl.max(tl.where(inside, b_x, LOW), 1))
        n_y = tl.maximum(m_y, tl.max(tl.where(inside, b_y, LOW), 1) * y_scale)
    else:
        n_x = tl.maximum(m_x, tl.max(b_x, 1))
        n_y = tl.maximum(m_y, tl.max(b_y, 1) * y_scale)
    r_x = tl.exp2(m_x - n_x)
    r_y = tl.exp2(m_y - n_y)
    c += (m_x - n_x) - (m_y - n_y)
    near = tl.where(r_x > 0.5, c, 0.0)
    b_x -= n_x[:, None]
    b_y = b_y * y_scale - n_y[:, None]
    if MASKED:
        b_x = tl.where(inside, b_x, LOW)
        b_y = tl.where(inside, b_y, LOW)
    b_p = tl.exp2(b_x)
    b_q = tl.exp2(b_y)
    b_d = b_x - b_y - near[:, None]
    l_x *= r_x
    l_y *= r_y
    s_x = s_x * r_x + l_x * (c - near) + tl.sum(b_p * b_d, 1)
    s_y = s_y * r_y + l_y * (c - near) + tl.sum(b_q * b_d, 1)
    l_x += tl.sum(b_p, 1)
    l_y += tl.sum(b_q, 1)
    # c = E_p[d] again; s_x and s_y take the step that was made, rounded as it is
    c = near + s_x / l_x
    step = c - near
    return n_x, l_x, s_x - l_x * step, n_y, l_y, s_y - l_y * step, c


@triton.jit
def rows_finish(l_x, s_x, l_y, s_y, c):
    """(loss, E_p[d], E_q[d]) of the rows, with d = (x - m_x) - (y - m_y).

    KL(p||q) + KL(q||p) = E_p[x - y] - E_q[x - y], in which every reference cancels. Not below 0: rounding only.
    """
    e_x = s_x / l_x
    e_y = s_y / l_y
    loss = e_x - e_y
    return tl.where(loss < 0.0, 0.0, loss), e_x + c, e_y + c


@triton.jit
def mask_logits(b_x, b_y, inside):
    """(x, y) of a tile, LOW where not ``inside``: probabilities and differences d are exactly 0 there.

    The mask of y is read from x, which costs nothing and ties y to the layout in which the dots leave x: sums over rows
    then stay inside a few lanes. (Load the tile of y before the dots of x, or the layout of the load wins.)
    """
    b_x = tl.where(inside, b_x, LOW)
    return b_x, tl.where(b_x > LOW, b_y, LOW)


@triton.jit
def compare_logits(b_x, b_y):
    """(losses, m_x, l_x, m_y, l_y, E_p[d], E_q[d]) of whole rows [I, J] of masked logits (mask_logits).

    A row's loss is E_p[d - c] - E_q[d - c] with c = E_q[d], d = (x - m_x) - (y - m_y).
    """
    m_x = tl.max(b_x, 1)
    m_y = tl.max(b_y, 1)
    b_x -= m_x[:, None]
    b_y -= m_y[:, None]
    b_p = exponential(b_x)  # without their sums: p l_x, q l_y
    b_q = exponential(b_y)
    l_x = tl.sum(b_p, 1)
    l_y = tl.sum(b_q, 1)
    b_d = b_x - b_y
    e_p = tl.sum(b_p * b_d, 1) / l_x
    e_q = tl.sum(b_q * b_d, 1) / l_y
    # relative to E_q[d] both sums are small, and equal to the bit where p is q
    b_d -= e_q[:, None]
    b_loss = tl.sum(b_p * b_d, 1) / l_x - tl.sum(b_q * b_d, 1) / l_y
    return b_loss, m_x, l_x, m_y, l_y, e_p, e_q


@triton.jit
def rows_gradient(b_x, b_y, rows, inside):
    """(dL/dX, dL/dY) of a tile [I, J] whose rows' numbers are ``rows`` (load_rows), 0 where not ``inside``.

    dX = p (d - E_p[d]) + (p - q), dY = -q (d - E_q[d]) - (p - q), d = (x - m_x) - (y - m_y).
    """
    m_x, l_x, m_y, l_y, e_p, e_q = rows
    # X = scale times a product: the select keeps that multiplication out of a fused one with this difference, as in the
    # forward, so that the X of the largest element is m_x to the bit
    b_x, b_y = mask_logits(b_x, b_y, inside)
    b_x -= m_x[:, None]
    b_y -= m_y[:, None]
    # the sums go into the exponents: a product at the end would be fused with p - q, which is then not 0 where p is q
    b_p = tl.exp2(b_x * LOG2_E - tl.log2(l_x)[:, None])
    b_q = tl.exp2(b_y * LOG2_E - tl.log2(l_y)[:, None])
    b_d = b_x - b_y
    b_r = b_p - b_q
    return b_p * (b_d - e_p[:, None]) + b_r, -b_q * (b_d - e_q[:, None]) - b_r

"""Literal float64 formulas with closed-form gradients, in NumPy; no code of the package is used.

A margin is a function (t, norm) -> (value, d value / d t, d value / d norm), arrays [N].
`margin_softmax` is the whole head, materialised. `eager_margin_softmax` is no oracle but the
yardstick of an error budget: what a user would write in PyTorch, in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Array = np.ndarray
Margin = Callable[[Array, Array], tuple[Array, Array, Array]]


# --- margins -------------------------------------------------------------------------------------


def plain() -> Margin:
    """t"""
    return lambda t, norm: (t, np.ones_like(t), np.zeros_like(t))


def cosface(m: float | Array) -> Margin:
    """t - m"""
    return lambda t, norm: (t - m, np.ones_like(t), np.zeros_like(t))


def sine(t: Array) -> Array:
    # (1 - t)(1 + t) keeps the digits that 1 - t^2 loses near |t| = 1
    return np.sqrt(np.clip((1 - t) * (1 + t), 0, None))


def _ratio(top: Array, t: Array) -> Array:
    """top / sin(theta); 0 at |t| = 1, where the direction of x has no first-order effect on t."""
    below = sine(t)
    return np.where(below > 0, top / np.where(below > 0, below, 1), 0)


def added_angle(t: Array, m: float | Array) -> tuple[Array, Array]:
    """cos(theta + m) = t cos m - sin(theta) sin m, slope sin(theta + m) / sin(theta)."""
    value = t * np.cos(m) - sine(t) * np.sin(m)
    return value, _ratio(sine(t) * np.cos(m) + t * np.sin(m), t)


def arcface(m: float | Array, beyond_pi: str = "linear", eps: float = 1e-3) -> Margin:
    """cos(theta + m) under each convention for theta + m > pi, told by t against cos(pi - m)."""

    def margin(t: Array, norm: Array) -> tuple[Array, Array, Array]:
        value, slope = added_angle(t, m)
        past = t < np.cos(np.pi - m)  # theta + m > pi, as long as 0 <= m <= pi
        if beyond_pi == "none":
            pass
        elif beyond_pi == "linear":
            value = np.where(past, t - m * np.sin(m), value)
            slope = np.where(past, 1, slope)
        elif beyond_pi == "easy":
            value, slope = np.where(t > 0, value, t), np.where(t > 0, slope, 1)
        elif beyond_pi == "clamp":
            value, slope = np.where(past, np.cos(3.14159), value), np.where(past, 0, slope)
        elif beyond_pi == "monotone":
            value, slope = np.where(past, -value - 2, value), np.where(past, -slope, slope)
        elif beyond_pi == "clip":
            inside = np.clip(t, -1 + eps, 1 - eps)
            value, slope = added_angle(inside, m)
            # the angle passes eps or pi - eps
            high = inside < np.cos(np.pi - eps - m)
            low = (inside > np.cos(np.clip(eps - m, 0, np.pi))) & (eps - m > 0)
            value = np.where(high, np.cos(np.pi - eps), np.where(low, np.cos(eps), value))
            slope = np.where(high | low | (np.abs(t) > 1 - eps), 0, slope)
        else:
            raise ValueError(beyond_pi)
        return value, slope, np.zeros_like(t)

    return margin


def sphereface4() -> Margin:
    """(-1)^k cos(4 theta) - 2k by Chebyshev's polynomial 8 t^4 - 8 t^2 + 1, k counted on t."""

    def margin(t: Array, norm: Array) -> tuple[Array, Array, Array]:
        k = sum((t <= np.cos(j * np.pi / 4)).astype(float) for j in (1, 2, 3))
        sign = 1 - 2 * (k % 2)
        value, slope = 8 * t**4 - 8 * t**2 + 1, 32 * t**3 - 16 * t
        return sign * value - 2 * k, sign * slope, np.zeros_like(t)

    return margin


def combined(m1: float, m2: float, m3: float, beyond_pi: str = "monotone") -> Margin:
    """cos(m1 theta + m2) - m3, by the angle (what `arcface` is for m1 = 1, by algebra)."""

    def margin(t: Array, norm: Array) -> tuple[Array, Array, Array]:
        phi = m1 * np.arctan2(sine(t), t) + m2
        value, slope = np.cos(phi), _ratio(m1 * np.sin(phi), t)
        if beyond_pi == "monotone":
            k = np.floor(phi / np.pi)
            sign = 1 - 2 * (k % 2)
            value, slope = sign * value - 2 * k, sign * slope
        elif beyond_pi == "clamp":
            past = phi > 3.14159
            value, slope = np.where(past, np.cos(3.14159), value), np.where(past, 0, slope)
        elif beyond_pi == "easy":
            value, slope = np.where(t > 0, value, t), np.where(t > 0, slope, 1)
        elif beyond_pi != "none":
            raise ValueError(beyond_pi)
        return value - m3, slope, np.zeros_like(t)

    return margin


def adaface(mean: float, std: float, m: float = 0.4, h: float = 0.333, eps: float = 1e-3) -> Margin:
    """cos(clip(theta - m z)) - m (1 + z), z = clip(h (norm - mean) / (std + eps)) detached."""

    def margin(t: Array, norm: Array) -> tuple[Array, Array, Array]:
        z = np.clip(h * (np.clip(norm, 0.001, 100) - mean) / (std + eps), -1, 1)
        inside = np.clip(t, -1 + eps, 1 - eps)
        theta = np.arctan2(sine(inside), inside) - m * z
        clipped = (theta < eps) | (theta > np.pi - eps)
        value = np.cos(np.clip(theta, eps, np.pi - eps))
        slope = np.where(clipped | (np.abs(t) > 1 - eps), 0, np.sin(theta) / sine(inside))
        return value - m * (1 + z), slope, np.zeros_like(t)

    return margin


def adaface_state(
    norm: Array, mean: float, std: float, momentum: float = 0.01
) -> tuple[float, float]:
    """The moving mean and (unbiased) std after a batch."""
    norm = np.clip(norm, 0.001, 100)
    mean = (1 - momentum) * mean + momentum * norm.mean()
    return mean, (1 - momentum) * std + momentum * norm.std(ddof=1) if len(norm) > 1 else std


def magface(
    l_a: float = 10, u_a: float = 110, l_margin: float = 0.45, u_margin: float = 0.8
) -> Margin:
    """cos(theta + m(norm)) where t > 0, else t; the margin's gradient reaches the norm."""

    def margin(t: Array, norm: Array) -> tuple[Array, Array, Array]:
        a = np.clip(norm, l_a, u_a)
        rate = (u_margin - l_margin) / (u_a - l_a)
        m = rate * (a - l_a) + l_margin
        value, slope = added_angle(t, m)
        to_m = -(sine(t) * np.cos(m) + t * np.sin(m))  # -sin(theta + m)
        moves = (norm >= l_a) & (norm <= u_a) & (t > 0)
        return (
            np.where(t > 0, value, t),
            np.where(t > 0, slope, 1),
            np.where(moves, to_m * rate, 0),
        )

    return margin


def magface_penalty(
    norm: Array, l_a: float = 10, u_a: float = 110, weight: float = 35.0
) -> tuple[Array, Array]:
    """weight (a / u_a^2 + 1 / a) and its slope in the norm, 0 outside the clamp."""
    a = np.clip(norm, l_a, u_a)
    inside = (norm >= l_a) & (norm <= u_a)
    return weight * (a / u_a**2 + 1 / a), np.where(inside, weight * (1 / u_a**2 - 1 / a**2), 0)


# --- the head ------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The loss of each row, the reduced loss, its gradients and the stats of each row."""

    rows: Array
    loss: Array
    dx: Array
    dw: Array
    dbias: Array
    dscale: Array  # one value a row: d loss / d scale_i
    stats: dict[str, Array]


def margin_softmax(
    x: Array,  # [N, D]
    w: Array,  # [C, D]
    labels: Array,  # [N]
    *,
    margin: Margin | None = None,
    penalty: Callable[[Array], tuple[Array, Array]] | None = None,
    scale: float | Array = 64.0,
    normalize: bool = True,
    bias: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Array | None = None,
    classes: Array | None = None,
    straight_through: bool = False,
    reduction: str = "mean",
    upstream: Array | None = None,  # [N], for reduction="none": the loss is then <upstream, rows>
) -> Answer:
    """loss_i = (1 - eps) v_y (lse - z_y) + eps / K sum_j v_j (lse - z_j) [+ penalty], and so on."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    (n, _), c = x.shape, w.shape[0]
    taking_part = np.ones(c, bool)
    if classes is not None:
        taking_part[:] = False
        taking_part[classes] = True
    valid = labels != ignore_index
    y = np.where(valid, labels, 0)
    row = np.arange(n)
    s = np.broadcast_to(np.asarray(scale, np.float64), (n,))
    v = np.ones(c) if class_weight is None else np.asarray(class_weight, np.float64)
    b = np.zeros(c) if bias is None else np.asarray(bias, np.float64)

    x_norm, w_norm = np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=1)
    xh = x / x_norm[:, None] if normalize else x
    wh = w / w_norm[:, None] if normalize else w
    cosine = xh @ wh.T
    t = cosine[row, y]
    f, slope, norm_slope = (margin or plain())(t, x_norm)
    if straight_through:
        slope, norm_slope = np.ones_like(t), np.zeros_like(t)
    entered = cosine.copy()
    entered[row, y] = f
    z = np.where(taking_part, s[:, None] * entered + b, -np.inf)
    top = z.max(axis=1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))[:, 0]
    p = np.exp(z - lse[:, None])

    # target distribution q [N, C], so that loss = sum_j q_j (lse - z_j) = A lse - <q, z>
    k = taking_part.sum()
    uniform = label_smoothing / k * np.where(taking_part, v, 0)
    q = np.broadcast_to(uniform, (n, c)).copy()
    q[row, y] += (1 - label_smoothing) * v[y]
    others = p.copy()
    others[row, y] = 0
    rest = others.sum(axis=1)  # 1 - p_y without the cancellation
    gap = np.where(rest > 0.5, lse - f * s - b[y], -np.log1p(-np.minimum(rest, 0.6)))
    rows = q[row, y] * gap
    apart = np.where(taking_part, lse[:, None] - z, 0)
    apart[row, y] = 0
    rows = rows + (q * apart).sum(axis=1)
    extra, extra_slope = penalty(x_norm) if penalty else (np.zeros(n), np.zeros(n))
    rows = np.where(valid, rows + v[y] * extra, 0)

    if reduction == "mean":
        total = (valid * v[y]).sum()
        share = np.full(n, 1 / total if total else 0.0)
    elif reduction == "sum":
        share = np.ones(n)
    else:
        share = np.ones(n) if upstream is None else np.asarray(upstream, np.float64)
    share = np.where(valid, share, 0)

    total_q = q.sum(axis=1)
    dz = total_q[:, None] * p - q
    away = q.copy()
    away[row, y] = 0
    dz[row, y] = away.sum(axis=1) - total_q * rest
    dz = np.where(taking_part, dz, 0) * share[:, None]
    dcos = dz * s[:, None]
    dcos[row, y] *= slope
    dxh, dwh = dcos @ wh, dcos.T @ xh
    if normalize:
        dx = (dxh - xh * (dxh * xh).sum(1, keepdims=True)) / x_norm[:, None]
        dw = (dwh - wh * (dwh * wh).sum(1, keepdims=True)) / w_norm[:, None]
    else:
        dx, dw = dxh, dwh
    dnorm = dz[row, y] * s * norm_slope + share * v[y] * extra_slope
    dx = dx + (dnorm / x_norm)[:, None] * x

    # the stats look at the cosines before the margin
    before = np.where(taking_part, s[:, None] * cosine + b, -np.inf)
    own = before[row, y].copy()
    before[row, y] = -np.inf
    hardest = before.argmax(axis=1)
    alone = ~np.isfinite(before[row, hardest])
    stats = {
        "logsumexp": np.where(valid, lse, 0),
        "target_cosine": np.where(valid, t, 0),
        "hardest_class": np.where(valid & ~alone, hardest, -1),
        "hardest_cosine": np.where(valid, np.where(alone, -np.inf, cosine[row, hardest]), 0),
        "hit": valid & (own > before[row, hardest]),
    }
    return Answer(
        rows,
        (share * rows).sum() if reduction != "none" or upstream is not None else rows,
        dx,
        dw,
        dz.sum(axis=0),
        (dz * np.where(taking_part, entered, 0)).sum(axis=1),
        stats,
    )


def eager_margin_softmax(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: Callable | None = None,
    scale: float | torch.Tensor = 64.0,
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows' losses as a training script has them: the logits as a matrix, F.cross_entropy."""
    if classes is not None:
        at = torch.full((w.shape[0],), ignore_index)
        at[classes] = torch.arange(len(classes))
        labels = torch.where(labels == ignore_index, ignore_index, at[labels.clamp_min(0)])
        w, bias = w[classes], None if bias is None else bias[classes]
        class_weight = None if class_weight is None else class_weight[classes]
    norm = x.norm(dim=1)
    cosine = F.linear(F.normalize(x), F.normalize(w)) if normalize else F.linear(x, w)
    valid = labels != ignore_index
    y = torch.where(valid, labels, 0)[:, None]
    t = cosine.gather(1, y)[:, 0]
    if margin is not None:
        moved = margin(t, norm) if getattr(margin, "uses_norm", False) else margin(t)
        cosine = cosine.scatter(1, y, moved[:, None].to(cosine.dtype))
    logits = cosine * (scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale)
    logits = logits if bias is None else logits + bias
    return F.cross_entropy(
        logits,
        labels,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


def relative_error(got: torch.Tensor | Array, wanted: Array) -> float:
    """|got - wanted| / |wanted| over all entries together; |got| where nothing is wanted."""
    if isinstance(got, torch.Tensor):
        got = got.detach().double().numpy()
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, f"shape {got.shape}, wanted {wanted.shape}"
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / (size if size > 0 else 1.0))

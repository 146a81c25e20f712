"""What drawn hard data found: each as the call that showed it."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import require
from draws import CASES, Call, Draw, judge
from kinds_of_draws import KINDS

from fused_losses import backends

FOUND = {
    # the bound's: two clusters' masses by logsumexps of 660,000
    "masses of a far plan": (
        "sinkhorn_dot",
        Draw((7, 33, 33), "clusters", "one class", torch.float64, 1937471345),
        Call("bounded"),
    ),
    # the angle to a row of zeros is constant, by two chords' slopes that cancel
    "an angle to nothing": (
        "pairwise_angular",
        Draw((7, 1, 2), "sparse", "all distinct", torch.float64, 281922065),
        Call("reference"),
    ),
    # a class without pairs, in whose sum the loss has slope 1e6, set the scale of float16's G
    "steep in nothing": (
        "orthogonal_projection",
        Draw((29, 29, 8), "decaying", "all distinct", torch.float16, 847525359),
        Call("cuda"),
    ),
    # a boundary a class took its rows' gradients up in 16 bits
    "one boundary, many rows": (
        "margin_loss_none",
        Draw((7, 17, 33), "plain", "all distinct", torch.bfloat16, 1259257193),
        Call("bounded"),
    ),
    # what three sweeps send to a row cancels, and was added in 16 bits
    "sums of 16 bits": (
        "cauchy_schwarz_qmi",
        Draw((5, 5, 3), "near duplicates", "skewed", torch.bfloat16, 661778249),
        Call("cpu"),
    ),
    # a row of zeros had no gradient, since its moved self was a constant
    "a constant row's slope": (
        "pairwise_snr",
        Draw((31, 13, 3), "sparse", "one class", torch.float32, 1930616076),
        Call("cpu"),
    ),
    # the slope of a root, 1 / (2 d), took float16's G of short distances to inf
    "a short distance's slope": (
        "contrastive",
        Draw((17, 13, 16), "tiny", "skewed", torch.float16, 5),
        Call("cuda"),
    ),
    "a short distance's slope, boundaries": (
        "margin_loss_beta_pair",
        Draw((33, 33, 7), "tiny", "skewed", torch.float16, 1),
        Call("cuda"),
    ),
    # the scale follows 1 / (1 - the target's cosine), and that was of rows rounded to 16 bits
    "a scale of rounded rows": (
        "adaptive_margin_softmax",
        Draw((1, 16, 3), "aligned", "as they are", torch.float16, 136698),
        Call("cuda"),
    ),
    "a scale of rounded rows, short": (
        "adaptive_margin_softmax",
        Draw((2, 8, 16), "tiny", "as they are", torch.float16, 31639),
        Call("cuda"),
    ),
    # and so the slope 1 / sin of the angle
    "an angle of rounded rows": (
        "margin_ArcFace_clamp",
        Draw((1, 3, 2), "outlier", "as they are", torch.bfloat16, 314728),
        Call("cuda"),
    ),
    # the formula's: e^-745 is 0 in float64, and its logarithm infinite
    "a logarithm of nothing": (
        "cauchy_schwarz_divergence",
        Draw((1, 32, 31), "large", "as they are", torch.float16, 1026941218),
        Call("bounded"),
    ),
    # log(1 + e^z) with a small e^z was rounded as 1 is
    "beside one": (
        "class_loss_MLCD",
        Draw((2, 1, 1), "large", "one class", torch.float64, 75113273),
        Call("bounded"),
    ),
    # the formula's: an infinite term took the slopes of the others away
    "one infinite term": (
        "pairwise_kl",
        Draw((31, 32, 65), "tiny", "one class", torch.float16, 676460726),
        Call("cpu"),
    ),
    # weights and whitening multiplied rows before they were subtracted
    "near, and far from 0, weighted": (
        "pairwise_weighted_euclidean",
        Draw((17, 7, 3), "clusters", "as they are", torch.float64, 551485620),
        Call("reference"),
    ),
    "near, and far from 0, whitened": (
        "pairwise_mahalanobis",
        Draw((7, 3, 7), "clusters", "skewed", torch.float32, 2139648909),
        Call("cuda"),
    ),
    # the bound's: two pairs of a row cross the margin, and six movements took one away by the other
    "two pairs at a boundary": (
        "margin_loss_class_beta_triplet",
        Draw((8, 5, 33), "near duplicates", "all distinct", torch.float32, 1261728583),
        Call("cpu", precision="bf16"),
    ),
    # the bound's: in three movements four roundings of one size took one another away
    "roundings of one size": (
        "soft_nearest_neighbor",
        Draw((5, 15, 16), "anti-aligned", "as they are", torch.float64, 1494105700),
        Call("reference"),
    ),
    # the bound's: a cost 1 - cos of 0 is off by roundings of 1
    "a cost of nothing": (
        "sinkhorn_cosine",
        Draw((3, 31, 1), "far", "as they are", torch.float64, 1493093109),
        Call("reference"),
    ),
    # the bound's: a temperature's gradient is read off dx, of which narrowed G made 3e-3
    "a temperature off dx": (
        "supervised_contrastive_out",
        Draw((5, 17, 65), "constant", "as they are", torch.float16, 1189372397),
        Call("cpu", precision="bf16"),
    ),
    # a teacher's score was kept as its distance from the student's, of 7e4
    "a teacher beside a long student": (
        "distillation_pskd",
        Draw((2, 13, 7), "clusters", "one class", torch.float64, 762884743),
        Call("cpu"),
    ),
    # the bound's: of rows of one coordinate 1 - cos is 2 within roundings of 1, and has no slope
    "a weighted cosine of -1": (
        "pairwise_weighted_cosine",
        Draw((13, 16, 1), "sparse", "skewed", torch.float32, 400258765),
        Call("reference"),
    ),
    # the bound's: G that is rounded alike for a cluster's pairs, in a temperature's gradient
    "a temperature of rounded G": (
        "supervised_contrastive_out",
        Draw((3, 32, 65), "clusters", "as they are", torch.bfloat16, 1994801799),
        Call("cuda"),
    ),
    # the bound's: the sum of a pair's rounded G, where short negatives leave the products little
    "an angle of rounded G": (
        "angular_plain_negatives",
        Draw((7, 2, 2), "tiny", "skewed", torch.float32, 975859089),
        Call("cuda", precision="mixed"),
    ),
    # a plan of rows far from 0 was made of their products' roundings, its mass 54 for 1
    "a plan of roundings": (
        "sinkhorn_dot",
        Draw((1, 17, 17), "far", "as they are", torch.float32, 1662827001),
        Call("cuda"),
    ),
    # the formula's: a variance far from 0 was off by its mean's rounding
    "a variance far from 0": (
        "snr_contrastive_ref",
        Draw((5, 8, 3), "far", "skewed", torch.float64, 808575502),
        Call("reference"),
    ),
    # the formula's: a mixture's logarithm of a class that both sides find impossible
    "impossible to both": (
        "distillation_jsd_options",
        Draw((16, 15, 7), "clusters", "as they are", torch.bfloat16, 1492271130),
        Call("bounded"),
    ),
    # where the teacher is nearly one class, its slope was what two numbers of 1e2 left
    "a teacher of one class": (
        "distillation_pskd",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1453344766),
        Call("cpu"),
    ),
    "a teacher of one class, bounded": (
        "distillation_pskd",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1453344766),
        Call("bounded"),
    ),
    "a teacher of one class, with options": (
        "distillation_pskd_options",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1857577117),
        Call("cpu"),
    ),
    "a teacher of one class, with options, bounded": (
        "distillation_pskd_options",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1857577117),
        Call("bounded"),
    ),
    "a power of one class": (
        "distillation_ofa_options",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1418615680),
        Call("cpu"),
    ),
    "a power of one class, bounded": (
        "distillation_ofa_options",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1418615680),
        Call("bounded"),
    ),
    "a mixture of one class": (
        "distillation_jsd_options",
        Draw((2, 13, 7), "large", "one class", torch.float64, 1467179099),
        Call("cpu"),
    ),
    # slopes of equal classes sum to 0 as well as a backend's shares sum to 1
    "slopes that sum to nothing": (
        "distillation_jsd",
        Draw((17, 16, 16), "constant", "one class", torch.float64, 1350944510),
        Call("bounded"),
    ),
}


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    name, draw, call = FOUND[find]
    require(call.backend)
    precision = call.precision
    refused = backends.reasons_against(call.backend, torch.device("cpu"), draw.dtype, precision)
    if refused and precision != "fp32":
        pytest.skip(refused[0])
    for verdict in judge(CASES[name], draw, [call]):
        assert verdict.share <= 1, verdict


# found by another kind of draw, and which
OF_OTHER_KINDS = {
    # in forward mode torch's logsumexp of nothing but -inf has NaN for a slope
    "no other class": (
        "tangents",
        "class_loss_MLCD",
        Draw((15, 1, 16), "far", "one class", torch.float32, 1339153277),
    ),
    "no other class, N 1": (
        "tangents",
        "adaptive_margin_softmax",
        Draw((1, 1, 5), "plain", "one class", torch.float32, 1),
    ),
    # torch takes an empty result of a Function for a view of the empty list
    "a list of no pairs": (
        "tangents",
        "supervised_contrastive_mined",
        Draw((31, 1, 3), "far", "all distinct", torch.float32, 1998792481),
    ),
    # and logaddexp of two numbers that are 88 apart has no curve
    "two far numbers": (
        "second derivatives",
        "distillation_jsd",
        Draw((33, 29, 15), "large", "skewed", torch.float32, 192754040),
    ),
    "a far number and 0": (
        "second derivatives",
        "class_loss_SphereFace2",
        Draw((3, 31, 5), "large", "one class", torch.float32, 1),
    ),
    "a number and nothing": (
        "second derivatives",
        "unpg_margin_softmax",
        Draw((1, 31, 65), "large", "all distinct", torch.float32, 956498904),
    ),
    # the mean of scores was rounded in their length, where the loss sees what is between them
    "a mean of long scores": (
        "second derivatives",
        "distillation_soft_ce",
        Draw((33, 1, 15), "anti-aligned", "skewed", torch.float32, 1777638218),
    ),
    # s (1 - s) of a small s was rounded as 1 is, and divided by s
    "a curve of a small sigmoid": (
        "second derivatives",
        "one_label_MappedLDR_softplus",
        Draw((7, 31, 7), "constant", "skewed", torch.float32, 398880821),
    ),
    # and 1 - s of a large one
    "a curve of a large sigmoid": (
        "second derivatives",
        "one_label_LDR",
        Draw((15, 2, 17), "plain", "skewed", torch.float32, 1276579279),
    ),
    # e^(v_y - lse) of the label's score, which no sum takes, was no number and had a slope
    "a label far above the others": (
        "second derivatives",
        "distillation_dkd",
        Draw((17, 5, 17), "far", "one class", torch.float32, 256308538),
    ),
    # the formula's: a NaN over a zero was 0
    "a NaN beside a zero": (
        "NaN and inf",
        "pairwise_kl",
        Draw((32, 15, 1), "sparse", "skewed", torch.float16, 975139976),
    ),
    # the formula's: the angle of a NaN to a zero was a number
    "the angle of a NaN to a zero": (
        "NaN and inf",
        "pairwise_angular",
        Draw((3, 33, 2), "sparse", "skewed", torch.bfloat16, 42077566),
    ),
    # the logarithm of an infinite ratio was finite on some
    "inf in a divergence": (
        "NaN and inf",
        "pairwise_kl",
        Draw((15, 15, 7), "large", "one class", torch.float32, 1797796990),
    ),
    # a row with inf was NaN or inf by the order of a sum
    "inf in a whitened row": (
        "NaN and inf",
        "pairwise_mahalanobis",
        Draw((16, 31, 2), "near duplicates", "skewed", torch.float32, 1093301502),
    ),
    # inf - inf and max(., 0) are each order's own: a row with inf is one with NaN
    "inf in a triplet": (
        "NaN and inf",
        "triplet_margin_00",
        Draw((33, 16, 3), "sparse", "as they are", torch.bfloat16, 541505201),
    ),
    # another form's products made the logsumexp: weights above 1 overflowed
    "a weight above 1": (
        "second derivatives",
        "info_nce_banks_and_negatives",
        Draw((15, 13, 65), "far", "all distinct", torch.float32, 1934394304),
    ),
    # the bound's: what is stored in 16 bits has their grain
    "attention to denormals": (
        "lengths",
        "attention_cosine_same",
        Draw((31, 17, 3), "duplicates", "skewed", torch.bfloat16, 1763288451),
    ),
    # x log(x/m) and y log(y/m) cancel to the square of their difference
    "nearly equal shares": (
        "many digits",
        "pairwise_jensenshannon",
        Draw((2, 2, 2), "plain", "as they are", torch.float64, 0),
    ),
    # the half angle's sine holds no angle near pi
    "an opposite angle": (
        "many digits",
        "pairwise_angular, opposite",
        Draw((2, 2, 2), "plain", "as they are", torch.float64, 1),
    ),
    # the curve of log(sigmoid(-z)) is s (1 - s), where 1 - s was rounded as 1 is
    "a curve beside one": (
        "second derivatives",
        "tuplet_margin_ref",
        Draw((5, 2, 17), "large", "all distinct", torch.float32, 1809830070),
    ),
    # the bound's: a direction's tangent is rounded as 1 over the row's length is
    "directions of one coordinate": (
        "tangents",
        "pairwise_cosine",
        Draw((31, 33, 1), "sparse", "one class", torch.float16, 1200694466),
    ),
    # 0 at rows without a variance, and inf around them, had a curve
    "constant rows beside one another": (
        "second derivatives",
        "pairwise_snr",
        Draw((9, 9, 2), "sparse", "all distinct", torch.float64, 1723032086),
    ),
    # a margin saw the direction of a class that the kernels take for zeros
    "a bend beside zeros": (
        "lengths",
        "margin_MVSoftmax_arc_fixed",
        Draw((9, 9, 9), "clusters", "one class", torch.float32, 579573374),
    ),
    # a ratio of variances overflowed; the formula took rows of 1e-30 for constant
    "a ratio of long squares": (
        "lengths",
        "snr_contrastive_mined",
        Draw((31, 31, 65), "anti-aligned", "all distinct", torch.float16, 1679775806),
    ),
    # squares of rows of 1e-30 are 0 in float32, and with them what two lengths differ by
    "near sides that are short": (
        "lengths",
        "distillation_mse_unit",
        Draw((3, 31, 8), "far", "as they are", torch.float32, 1374631130),
    ),
    # a positive in a bin of its own moved into one that was empty, where no share had a slope
    "a distance of 0": (
        "hard data",
        "fast_ap_mined",
        Draw((1, 1, 15), "clusters", "all distinct", torch.float32, 688932207),
    ),
    # a series of seven terms has float64's digits of its value at 0.01, and not of its slope
    "a series of seven terms": (
        "hard data",
        "pnp_Ib",
        Draw((7, 32, 7), "aligned", "as they are", torch.float64, 1047401287),
    ),
}


@pytest.mark.parametrize("find", list(OF_OTHER_KINDS))
def test_found_by_another_kind(find: str) -> None:
    kind, name, draw = OF_OTHER_KINDS[find]
    found = list(KINDS[kind].judge(name, draw, random.Random(find)))
    assert found
    for call, within, parts in found:
        assert within, (call, parts)
